"""Inside `jax.shard_map` with its defaults, where array types say over which mesh axes numbers
vary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_jax as lrx
from experiments.models.attention import chunked_attention


def DRAW(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, jnp.float32)


VIEWS = lrx.Views(stacked=("layers/.*",))
PARAMS = {
    "in": {"kernel": DRAW(0, 12, 16)},
    "layers": {"kernel": DRAW(1, 3, 16, 16)},
    "bias": jnp.zeros(16),
}
X, Y = DRAW(2, 32, 12), DRAW(3, 32, 16)
STACK = lrx.projection.Stack(
    before=lambda rest, x, y: lrx.matmul(x, rest["in"]["kernel"]) + rest["bias"],
    layer=lambda layer, x: jnp.tanh(lrx.matmul(x, layer["kernel"])),
    after=lambda rest, x, x0, y: jnp.mean(jnp.square(x - y)),
)
galore = functools.partial(lrx.galore, 1e-2, views=VIEWS)
AFTER = lrx.refresh_schedules.every(period=2, when="after")
OPTIMIZERS = {
    "svd": galore(rank=4, refresh_every=2, clip_norm=1.0),
    "svd staggered": galore(
        projector=lrx.projectors.svd(rank=4),
        refresh_schedule=lrx.refresh_schedules.staggered(period=2),
    ),
    "sketch": galore(projector=lrx.projectors.alternating(rank=4), refresh_schedule=AFTER),
    "sketch of both sides": galore(
        projector=lrx.projectors.alternating_two_sided(rank=4), refresh_schedule=AFTER, eps=1e-2
    ),
    "random": galore(projector=lrx.projectors.random(rank=4), refresh_schedule=AFTER),
    "frugal": lrx.frugal(1e-2, projection="columns", refresh_every=2, views=VIEWS),
}


def mapped(function, **specs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))


def averaged(loss):
    return lambda *args: jax.lax.pmean(loss(*args), "data")


def trained(step, tx, *batch):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state, value = step(params, state, *batch)
    return params, value, state.projection.step


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


ROWS = [
    ("svd", 1),
    ("sketch", 2),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in OPTIMIZERS),
]


@pytest.mark.parametrize("name, accumulate", ROWS)
def test_a_training_step_over_rows_is_that_of_one_device(name, accumulate):
    tx = OPTIMIZERS[name]
    batch, rows = (X, Y), P("data")
    if accumulate > 1:
        batch, rows = tuple(x.reshape(accumulate, -1, x.shape[-1]) for x in batch), P(None, "data")
    alone = trained(jax.jit(lrx.train_step(STACK.loss, tx, accumulate=accumulate)), tx, *batch)
    step = lrx.train_step(averaged(STACK.loss), tx, accumulate=accumulate)
    assert_close(
        trained(mapped(step, in_specs=(P(), P(), rows, rows), out_specs=P()), tx, *batch), alone
    )


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_layerwise_step_over_rows_is_that_of_one_device(accumulate):
    views = lrx.Views(stacked=("layers/.*",), rules=(("in/kernel", None),))
    tx = lrx.galore(1e-2, rank=4, refresh_every=2, views=views)
    over = lrx.projection.Stack(before=STACK.before, layer=STACK.layer, after=averaged(STACK.after))
    batch, rows = (X, Y), P("data")
    if accumulate > 1:
        batch, rows = tuple(x.reshape(accumulate, -1, x.shape[-1]) for x in batch), P(None, "data")
    alone = trained(jax.jit(lrx.layerwise_step(STACK, tx, accumulate=accumulate)), tx, *batch)
    step = mapped(
        lrx.layerwise_step(over, tx, accumulate=accumulate),
        in_specs=(P(), P(), rows, rows),
        out_specs=P(),
    )
    assert_close(trained(step, tx, *batch), alone)


def test_a_value_that_varies():
    """A loss of the device's own rows: gradients are summed over devices, as by
    `jax.value_and_grad`."""
    taps = lrx.taps(OPTIMIZERS["random"].init(PARAMS))

    def own(params, x, y):
        parts = tuple(x.reshape(2, -1, x.shape[-1]) for x in (x, y))
        value, low = lrx.projected_value_and_grad(STACK.loss, taps, accumulate=2)(params, *parts)
        return value[None], low, jax.grad(STACK.loss)(params, x, y)

    value, low, full = mapped(
        own, in_specs=(P(), P("data"), P("data")), out_specs=(P("data"), P(), P())
    )(PARAMS, X, Y)
    np.testing.assert_allclose(jnp.mean(value), STACK.loss(PARAMS, X, Y), rtol=1e-5)
    for path, tap in taps.taps.items():
        room, leaf = path.split("/")
        expected = tap.projector.down(tap.view, tap.basis, tap.view.orient(full[room][leaf]))
        np.testing.assert_allclose(low[room][leaf].low, expected, rtol=1e-4, atol=1e-6)


def test_kernels_of_which_every_device_has_a_part():
    """Columns of the first and rows of the second kernel are divided, and the input is not: its
    gradient is a sum."""
    params = {"up": {"kernel": DRAW(5, 12, 64)}, "down": {"kernel": DRAW(6, 64, 16)}}
    specs = {"up": {"kernel": P(None, "data")}, "down": {"kernel": P("data", None)}}
    tx = lrx.galore(1e-2, projector=lrx.projectors.random(rank=4))

    def loss(params, x, y):
        hidden = jnp.tanh(lrx.matmul(x, params["up"]["kernel"]))
        return jnp.mean(
            jnp.square(jax.lax.psum(lrx.matmul(hidden, params["down"]["kernel"]), "data") - y)
        )

    def own(params, x, y):
        taps = lrx.taps(tx.init(params))
        _, low = lrx.projected_value_and_grad(loss, taps)(params, x, y)
        full, dx = jax.grad(loss, (0, 1))(params, x, y)
        _, tapped_dx = lrx.projected_value_and_grad(lambda p, y: loss(p, p["x"], y), taps)(
            params | {"x": x}, y
        )
        expected = {
            path: tap.projector.down(
                tap.view, tap.basis, tap.view.orient(full[path.split("/")[0]]["kernel"])
            )
            for path, tap in taps.taps.items()
        }
        errors = [low[path.split("/")[0]]["kernel"].low - value for path, value in expected.items()]
        return jnp.stack([jnp.max(jnp.abs(x)) for x in errors])[None], tapped_dx["x"] - dx

    errors, difference = mapped(own, in_specs=(specs, P(), P()), out_specs=(P("data"), P()))(
        params, X, Y
    )
    assert np.max(errors) < 1e-6
    assert np.max(np.abs(difference)) < 1e-6


@pytest.mark.parametrize("shared", [(), ("a",)], ids=["own factors", "one a for all"])
@pytest.mark.parametrize("name", ["altlora", "altlora_plus"])
def test_pairs_that_differ_by_device_take_turns(name, shared):
    """A task on each device: the branches of the turn and of the rest have one type, whatever of a
    pair varies."""
    tx = getattr(lrx, name)(1e-2, scale=2.0, alternate=1)
    factors = {"a": DRAW(11, 8, 6, 2), "b": DRAW(12, 8, 2, 5)}
    for side in shared:
        factors[side] = factors[side][:1]

    def trained(pair):
        state = tx.init(pair)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.sin, pair), state, pair)
            pair = optax.apply_updates(pair, updates)
        return pair

    def own(factors):
        return jax.tree.map(lambda x: x[None], trained({side: x[0] for side, x in factors.items()}))

    specs = {side: P() if side in shared else P("data") for side in factors}
    found = mapped(own, in_specs=(specs,), out_specs=P("data"))(factors)
    every = {side: jnp.broadcast_to(x, (8, *x.shape[1:])) for side, x in factors.items()}
    assert_close(found, jax.jit(jax.vmap(trained))(every))


KERNEL = DRAW(7, 64, 16)
CODES = lrx.linalg.quantize_nf4(KERNEL)
SHIRA = lrx.adapters.shira(rank=2)
FACTORS = {"x": DRAW(8, 32, 64), "w": KERNEL, "a": DRAW(9, 64, 2), "b": DRAW(10, 2, 16)}
CUSTOM = {
    "lora_linear": lambda x, p: lrx.kernels.lora_linear(x, p["w"], p["a"], p["b"]),
    "nf4_linear": lambda x, p: lrx.kernels.nf4_linear(x + p["a"][:, 0], CODES),
    "shira": lambda x, p: SHIRA.apply(x, p["w"], p["sparse"]),
    "attention": lambda x, p: (
        chunked_attention(*[(x @ p["w"]).reshape(-1, 4, 2, 8)] * 3, chunk=2) + p["b"][:, :8]
    ),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_gradients_of_custom_products_are_those_of_one_device(name):
    """Rows vary over the devices and weights do not: their gradients are sums over all of them."""
    sparse = SHIRA.start(jax.random.key(1), KERNEL)
    free = {key: x for key, x in FACTORS.items() if key != "x"} | {"values": sparse["values"]}

    def objective(free, x):
        p = free | {"sparse": sparse | {"values": free["values"]}}
        return jnp.mean(jnp.sin(CUSTOM[name](x, p)))

    alone = jax.grad(objective)(free, FACTORS["x"])
    found = mapped(jax.grad(averaged(objective)), in_specs=(P(), P("data")), out_specs=P())(
        free, FACTORS["x"]
    )
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(alone))
    assert_close(found, alone)
