"""The 7B benchmark on a small model: its step is the model's, its bytes are those of the trees, its
table their sum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from experiments.benchmarks import memory_7b, workload
from experiments.models import llama
from experiments.reporting import tables

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

CONFIG = llama.preset("nano", layers=2, width=32, hidden=48, heads=2, kv_heads=2, attention_chunk=8)
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)
REFRESHES = ("none", "random", "alternating", "power")


@pytest.mark.slow
def test_the_three_parts_are_the_model():
    tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 259)
    params = llama.Llama(CONFIG).init(jax.random.key(0), tokens)["params"]
    logits = llama.Llama(CONFIG).apply({"params": params}, tokens)
    expected = llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]
    np.testing.assert_allclose(memory_7b.stack(CONFIG).loss(params, tokens), expected, rtol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_every_refresh_makes_a_step(refresh, int8):
    step, params, state = memory_7b.step_of(CONFIG, 8, refresh, int8=int8)
    codes = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]
    assert len(codes) == (7 if int8 else 0)
    after, new, value = jax.eval_shape(step, params, state, TOKENS)
    assert jax.tree.structure((after, new)) == jax.tree.structure((params, state))
    assert value.shape == ()
    plans = {
        "none": "taps",
        "random": "taps",
        "alternating": "sketch at a refresh",
        "power": "full at a refresh",
    }
    assert (
        lrx.projection.gradient_mode(memory_7b.optimizer(refresh, 8, dtype=jnp.int8).projection)
        == plans[refresh]
    )


@pytest.mark.slow
def test_parts_add_up_to_the_arguments():
    step, params, state = memory_7b.step_of(CONFIG, 8, "none", int8=False)
    row = memory_7b.compiled(step, params, state, TOKENS, 7)
    assert row["input_bytes"] == 7
    elements = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert row["parameter_bytes"] == 4 * llama.parameter_count(CONFIG)
    assert row["basis_bytes"] == 2 * 7 * 32 * (8 + 4)  # int8, one float32 scale a row
    parts = sum(row[f"{name}_bytes"] for name in ("parameter", "plain", "basis", "moment"))
    assert 0 < row["argument_bytes"] - parts < 4 * 16 + 32  # tokens, and the scalars of the state
    assert row["peak_bytes"] >= row["argument_bytes"] + row["temporary_bytes"]
    assert row["moment_bytes"] < 8 * elements


def test_a_slice_splits_what_projection_keeps():
    """On a mesh of one the specs are those of sixteen."""
    mesh = jax.make_mesh((1,), ("chips",), axis_types=(jax.sharding.AxisType.Auto,))
    params = memory_7b.abstract_parameters(CONFIG)
    tx = memory_7b.optimizer("alternating", 8, dtype=jnp.float32)
    for split in (False, True):
        placed, state = memory_7b.pod_shardings(mesh, tx, params, split=split)
        specs = {
            name: tuple(placed["layers"]["mlp"][f"{name}_proj"]["kernel"].spec)
            for name in ("up", "down")
        }
        assert specs == {"up": (None, None, "chips"), "down": (None, "chips", None)}
        assert tuple(placed["embed"]["embedding"].spec) == ("chips", None)
        assert not any(placed["layers"]["mlp_norm"]["scale"].spec)
        for name in ("up", "down"):
            matrix = state.projection.matrices["layers"]["mlp"][f"{name}_proj"]["kernel"]
            assert tuple(matrix.inner.mu.spec) == (None, None, "chips")
            assert tuple(matrix.basis.spec) == (
                (None, "chips", None) if split else (None, None, None)
            )


def test_bytes_are_those_of_one_device():
    mesh = jax.sharding.AbstractMesh((16,), ("chips",))
    split = jax.NamedSharding(mesh, jax.P(None, "chips"))
    tree = {
        "a": jax.ShapeDtypeStruct((2, 32), jnp.float32, sharding=split),
        "b": jax.ShapeDtypeStruct((3,), jnp.int8),
    }
    assert memory_7b.nbytes(tree) == 2 * 2 * 4 + 3


def test_the_table():
    sizes = dict.fromkeys(
        [f"{name}_bytes" for name in ("parameter", "plain", "basis", "moment", "temporary")], 2**30
    )
    sizes |= {"peak_bytes": 5 * 2**30, "input_bytes": 2**29}
    card = {"weights": "int8", "rank": 256, "refresh": "power", "bound_gib": 4.5, "met": False}
    chip = {
        "optimizer": "galore",
        "form": "layerwise_step",
        "rank": 1024,
        "refresh": "none",
        "split": True,
    }
    result = {"command": "c", "device": "d", "slice": "v5e:4x4", "length": 2048}
    text = tables.memory_7b(result | {"card_rows": [card | sizes], "slice_rows": [chip | sizes]})
    assert (
        "| int8 | 256 | power | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 5.00 | 4.5 | **missed** |"
        in text
    )
    assert "| galore | layerwise_step | 1024 | none | split | 1.00 |" in text
    assert "0.50 GiB are the inputs" in text
    assert "slice" not in tables.memory_7b(result | {"card_rows": [card | sizes]})


def test_rows_cover_what_was_aimed_at():
    assert {
        (weights, rank) for weights, rank, refresh, _ in memory_7b.CARD if refresh == "none"
    } == {("bfloat16", 1024), ("bfloat16", 256), ("int8", 1024), ("int8", 256)}
    assert {refresh for *_, refresh, _ in memory_7b.CARD} == set(REFRESHES)
    assert math.prod(map(int, memory_7b.SLICE.split(":")[1].split("x"))) == memory_7b.CHIPS
    assert workload.rank("7B") == 1024
