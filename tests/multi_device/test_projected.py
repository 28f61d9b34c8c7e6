"""Projected backprop under data parallelism: what is reduced is low-rank, and the numbers are those
of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import lowrank_jax as lrx
from experiments.benchmarks import data_parallel
from experiments.models import llama

pytestmark = pytest.mark.multi_device

RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN, RANK = 3, 24, 40, 4
PARAMS = {
    "layers": {
        "up": {"kernel": jnp.asarray(RNG.normal(size=(LAYERS, WIDTH, HIDDEN)) / 5, jnp.float32)},
        "down": {"kernel": jnp.asarray(RNG.normal(size=(LAYERS, HIDDEN, WIDTH)) / 5, jnp.float32)},
    },
    "bias": jnp.zeros(WIDTH),
}
X = jnp.asarray(RNG.normal(size=(16, 5, WIDTH)), jnp.float32)
VIEWS = lrx.Views(stacked=(r"layers/.*",))
AFTER = lrx.refresh_schedules.every(period=3, when="after")


def loss(params, x):
    def layer(x, kernels):
        return x + lrx.matmul(
            jnp.tanh(lrx.matmul(x, kernels["up"]["kernel"])), kernels["down"]["kernel"]
        ), None

    x, _ = jax.lax.scan(layer, x + params["bias"], params["layers"])
    return jnp.mean(jnp.square(x - 1))


def run(step, tx, place, steps=4):
    params = jax.tree.map(lambda p: place(p, Spec()), PARAMS)
    state, values = jax.jit(tx.init)(params), []
    step = jax.jit(step)
    for i in range(steps):
        params, state, value = step(params, state, place(X + 0.1 * i, Spec("data")))
        values.append(float(value))
    return params, values


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["svd", "alternating", "random after"])
def test_eight_devices_are_one(name, kind):
    options = {
        "svd": {
            "projector": lrx.projectors.svd(rank=RANK),
            "refresh_schedule": lrx.refresh_schedules.every(period=3),
        },
        "alternating": {
            "projector": lrx.projectors.alternating(rank=RANK),
            "refresh_schedule": AFTER,
        },
        "random after": {
            "projector": lrx.projectors.random(rank=RANK, kind="orthonormal"),
            "refresh_schedule": AFTER,
        },
    }[name]
    tx = lrx.galore(1e-2, views=VIEWS, eps=1e-3, clip_norm=1.0, **options)
    step = lrx.train_step(loss, tx)
    expected, values = run(step, tx, lambda x, spec: x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        got, others = run(step, tx, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(others, values, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=2e-3, atol=2e-4),
        got,
        expected,
    )


def reduced(compiled):
    """Shapes of everything that the program all-reduces."""
    results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in results for shape in re.findall(r"f32\[([\d,]*)\]", result)]
    return {tuple(int(n) for n in shape.split(",") if n) for shape in shapes}


@pytest.mark.parametrize(
    "projector",
    [
        lrx.projectors.random(rank=RANK, kind="orthonormal"),
        # a refresh too: of both sides by thin products
        lrx.projectors.alternating_two_sided(rank=RANK),
    ],
    ids=["random", "two-sided"],
)
def test_reductions_carry_low_rank_gradients(projector):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(mesh, Spec()), NamedSharding(mesh, Spec("data"))
    tx = lrx.galore(1e-2, projector=projector, refresh_schedule=AFTER, views=VIEWS)
    shapes = {}
    for backprop in ("projected", "full"):
        step = lrx.train_step(loss, tx, backprop=backprop)
        place = lambda tree, to: jax.tree.map(  # noqa: E731
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree
        )
        abstract = (
            place(PARAMS, whole),
            place(jax.eval_shape(tx.init, PARAMS), whole),
            place(X, rows),
        )
        shapes[backprop] = reduced(jax.jit(step).lower(*abstract).compile())
    full = {(WIDTH, HIDDEN), (HIDDEN, WIDTH), (LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH)}
    assert shapes["full"] & full
    assert not shapes["projected"] & full
    assert any(RANK in shape for shape in shapes["projected"])


def test_the_benchmark_counts_what_a_step_reduces():
    """Loops count their trips, and taps divide the bytes of the blocks' kernels by width over
    rank."""
    found = data_parallel.measure("nano", length=8, parts=(8,))["rows"]
    config = llama.preset("nano")
    kernels = 4 * llama.layer_matrix_parameters(config) * config.layers
    assert [row["axis"] for row in found] == ["data"] * 2 + ["fsdp"] * 2
    for row in found:
        assert row["block_bytes"] == (
            kernels * row["rank"] // config.width if row["rank"] else kernels
        )
        # FSDP gathers every kernel for the forward and for the backward pass, whatever the
        # optimizer
        assert (
            (row["gathered_bytes"] >= 2 * kernels)
            if row["axis"] == "fsdp"
            else row["gathered_bytes"] == 0
        )
