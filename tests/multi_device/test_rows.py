"""Products on one axis of rows send nothing that those on all axes do not, whatever the mesh
divides."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import collectives as sent
from experiments.models import attention, axes, divided, llama
from lowrank_jax.rows import fold_rows, over_rows
from lowrank_jax.sharding import meshes

TINY = llama.preset("nano", layers=2, width=64, hidden=128, heads=4, kv_heads=2, sequence_length=16)
MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x tensor, two keys": {"data": 2, "tensor": 4},
    "fsdp x sequence": {"fsdp": 4, "sequence": 2},
    "fsdp x sequence x tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


def received(sizes, explicit):
    """Bytes by kind of collective that the gradient of the model receives, compiled for a mesh."""
    mesh, model = meshes.make_mesh(**sizes, explicit=explicit), llama.Llama(TINY)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    place = lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)  # noqa: E731
    placed = meshes.shardings(params, axes.LLAMA, mesh)
    rows = jax.NamedSharding(mesh, meshes.spec(("batch", "length"), mesh))

    def loss(params, tokens):
        with meshes.use(mesh):
            logits = model.apply({"params": params}, tokens)
            return llama.loss_and_metrics(logits, tokens, jnp.ones_like(tokens))[0]

    jax.clear_caches()
    step = jax.jit(jax.grad(loss), out_shardings=None if explicit else placed)
    program = step.lower(jax.tree.map(place, params, placed), place(tokens, rows)).compile()
    found = collections.Counter()
    for one in sent.read(program.as_text()):
        found[one.kind] += one.bytes
    return found


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_more_is_sent(mesh, explicit, monkeypatch):
    found = received(MESHES[mesh], explicit)
    for module in (llama, divided):
        monkeypatch.setattr(module, "dot_general", jax.lax.dot_general)
    reference = lambda q, k, v, *, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
    monkeypatch.setattr(llama, "attention", reference)
    before = received(MESHES[mesh], explicit)
    assert found and set(found) <= set(before)
    assert all(found[kind] <= 1.01 * before[kind] for kind in found), (found, before)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize(("mesh", "folded"), [("fsdp x tensor", True), ("fsdp x sequence", False)])
def test_rows_are_folded_where_the_batch_alone_is_divided(mesh, folded, explicit):
    mesh = meshes.make_mesh(**MESHES[mesh], explicit=explicit)

    def shapes(x):
        with meshes.use(mesh):
            x = meshes.constrain(x, "batch", "length", None)
            (rows,) = fold_rows(x)
            assert over_rows(jnp.sin, x).shape == x.shape
        return rows

    place = jax.NamedSharding(mesh, meshes.spec(("batch", "length", None), mesh))
    x = jax.device_put(jnp.ones((8, 16, 4)), place)
    program = jax.jit(shapes).lower(x).compile()
    assert program(x).shape == ((128, 4) if folded else (8, 16, 4))
    assert not sent.read(program.as_text())


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_attention_on_explicit_axes_is_that_of_one_device(sizes):
    mesh = meshes.make_mesh(**sizes, explicit=True)
    q, k, v = (
        np.random.default_rng(i).normal(size=(8, 16, heads, 8)).astype(np.float32)
        for i, heads in enumerate((8, 4, 4))
    )
    expected = attention.attention(*map(jnp.asarray, (q, k, v)), causal=True)

    def run(q, k, v):
        with meshes.use(mesh):
            q = meshes.constrain(q, "batch", "length", "heads", None)
            k, v = (meshes.constrain(x, "batch", None, "heads", None) for x in (k, v))
            return attention.attention(q, k, v, causal=True)

    whole = jax.NamedSharding(mesh, jax.P(None, None, None, None))
    found = jax.jit(run)(*(jax.device_put(x, whole) for x in (q, k, v)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
