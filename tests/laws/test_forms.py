"""The law of forms: the optax form, the fused form and projected backprop make the same step,
refresh mode by mode."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.state import Rebased
from tests.laws import methods as m

RNG = np.random.default_rng(3)
DRAW = lambda *shape: jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
VIEWS = lrx.Views(stacked=(r"layers/.*",))
PARAMS = {
    "layers": {"up": {"kernel": DRAW(3, 10, 16)}, "down": {"kernel": DRAW(3, 16, 10)}},
    "square": {"kernel": DRAW(10, 10)},
    "bias": jnp.zeros(10),
}
X, Y = DRAW(40, 10) * 5, DRAW(40, 10) * 5
BATCHES = [(X + 0.1 * i, Y) for i in range(7)]
AFTER = {"when": "after"}


def loss(params, x, y):
    def layer(x, kernels):
        return x + lrx.matmul(
            jnp.tanh(lrx.matmul(x, kernels["up"]["kernel"])), kernels["down"]["kernel"]
        ), None

    x, _ = jax.lax.scan(layer, x + params["bias"], params["layers"])
    return jnp.mean(jnp.square(lrx.matmul(x, params["square"]["kernel"]) - y))


def galore(projector, refresh_schedule, **options):
    options = {"eps": 1e-3, "clip_norm": 1.0, "weight_decay": 0.1} | options
    return lrx.galore(
        1e-2, projector=projector, refresh_schedule=refresh_schedule, views=VIEWS, **options
    )


every, staggered = lrx.refresh_schedules.every, lrx.refresh_schedules.staggered
P = lrx.projectors
BY_LAYER = lrx.rank_schedules.by_layer(shares=(1, 1, 0.3))
ROWS = {
    "svd": (galore(P.svd(rank=3), every(period=3)), "full at a refresh"),
    "svd after": (galore(P.svd(rank=3), every(period=3, **AFTER)), "full at a refresh"),
    "svd staggered": (galore(P.svd(rank=3), staggered(period=3)), "full at a refresh"),
    "svd reset": (galore(P.svd(rank=3), every(period=3), transport=lrx.transports.reset()), "full at a refresh"),
    "svd rotate": (galore(P.svd(rank=3), every(period=3), transport=lrx.transports.rotate()), "full at a refresh"),
    "power": (galore(P.power(rank=3), every(period=3)), "full at a refresh"),
    "dct": (galore(P.dct(rank=3), every(period=3)), "full at a refresh"),
    "columns": (galore(P.columns(rank=3), every(period=3)), "full at a refresh"),
    "columns after": (galore(P.columns(rank=3), every(period=3, **AFTER)), "taps"),
    "gaussian after": (galore(P.random(rank=3), every(period=2, **AFTER)), "taps"),
    "gaussian staggered": (galore(P.random(rank=3), staggered(period=2, **AFTER)), "taps"),
    "ranked after": (galore(P.ranked(projector=P.random(rank=3), schedule=BY_LAYER), every(period=2, **AFTER)), "taps"),
    "identity": (galore(P.identity(), every(period=2)), "taps"),
    "alternating": (galore(P.alternating(rank=3), every(period=3, **AFTER)), "sketch at a refresh"),
    "alternating two-sided": (galore(P.alternating_two_sided(rank=3), every(period=3, **AFTER), eps=1e-2),
                              "sketch at a refresh"),
    "alternating staggered": (galore(P.alternating(rank=3), staggered(period=3, **AFTER)), "sketch at a refresh"),
    "alternating before": (galore(P.alternating(rank=3), every(period=3)), "full at a refresh"),
    "sketch": (galore(P.randomized(rank=3, iterations=0), every(period=3, **AFTER)), "sketch at a refresh"),
    "bf16 basis": (galore(P.svd(rank=3, dtype=jnp.bfloat16), every(period=3)), "full at a refresh"),
    "int8 basis": (galore(P.svd(rank=3, dtype=jnp.int8), every(period=3)), "full at a refresh"),
    "int4 basis": (galore(P.svd(rank=3, dtype=jnp.int4), every(period=3)), "full at a refresh"),
    "no guard": (galore(P.svd(rank=3), every(period=3), guard=False), "full at a refresh"),
    "masked decay": (galore(P.svd(rank=3), every(period=3), mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
                     "full at a refresh"),
    "dct_adamw T": (lrx.dct_adamw(1e-2, rank=3, refresh_every=3, views=VIEWS), "full at a refresh"),
    "lazy": (galore(P.svd(rank=3), lrx.refresh_schedules.lazy(period=2, threshold=0.0, queue=1)), "full at a refresh"),
}  # fmt: skip
# What a named optimizer has beside a rate, a rank and its row's period: schedules of both rates, and
# constants that keep rounding small.
OPTIONS = {
    "galore": {"learning_rate": optax.linear_schedule(1e-2, 0.0, 7), "eps": 1e-3},
    "muon": {"plain_learning_rate": optax.linear_schedule(1e-3, 0.0, 7)},
    "soap": {"eps": 1e-3},
    "trion": {"plain_learning_rate": 1e-3},
}


def named(name, row):
    """A named optimizer on this tree, by its row of the laws."""
    options = row.settings("refresh_every", rank=3, learning_rate=1e-2, views=VIEWS)
    return row.factory(**options | OPTIONS.get(name, {}))


ROWS |= {name: (named(name, row), row.gradients) for name, row in m.NAMED.items()}


SPARING = {
    "alternating": (P.alternating(rank=3), "after", "sketch at a refresh"),
    "randomized without iterations": (
        P.randomized(rank=3, iterations=0),
        "after",
        "sketch at a refresh",
    ),
    "random": (P.random(rank=3), "after", "taps"),
    "columns": (P.columns(rank=3), "after", "taps"),
    "columns by norm": (P.columns(rank=3, select="l2"), "before", "full at a refresh"),
    "identity": (P.identity(), "before", "taps"),
    "svd": (P.svd(rank=3), "before", "full at a refresh"),
    "power": (P.power(rank=3), "before", "full at a refresh"),
    "randomized": (P.randomized(rank=3), "before", "full at a refresh"),
    "dct": (P.dct(rank=3), "before", "full at a refresh"),
}


@pytest.mark.parametrize("name", SPARING)
def test_a_recipe_refreshes_without_full_gradients_where_it_can(name):
    """Unless a clock is given, or something else reads all of the gradient anyway."""
    projector, when, plan = SPARING[name]
    recipe = lrx.galore(1e-2, projector=projector, refresh_every=3).projection
    assert (
        recipe.refresh_schedule.when,
        recipe.refresh_schedule.period,
        lrx.projection.gradient_mode(recipe),
    ) == (
        when,
        3,
        plan,
    )
    given = lrx.galore(1e-2, projector=projector, refresh_schedule=every(period=3)).projection
    assert given.refresh_schedule == every(period=3)
    reading = lrx.galore(1e-2, projector=projector, residual=lrx.residuals.sign()).projection
    assert (reading.refresh_schedule.when, lrx.projection.gradient_mode(reading)) == (
        "before",
        "full",
    )
    injected = optax.inject_hyperparams(lrx.galore)(1e-2, projector=projector, views=VIEWS)
    assert jax.eval_shape(injected.init, PARAMS).inner_state.projection.step.shape == ()


def optax_step(tx):
    def step(params, state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def run(step, tx, batches=BATCHES, params=PARAMS):
    step, state = jax.jit(step), tx.init(params)
    values = []
    for batch in batches:
        params, state, value = step(params, state, *batch)
        values.append(float(value))
    return params, state, values


def lowered(step, state):
    """The program of a step, before it is compiled."""
    return jax.jit(step).lower(PARAMS, state, *BATCHES[0])


def rolled(program, state):
    """`run` of a program, from a state that is made already."""
    step, params, values = program.compile(), PARAMS, []
    for batch in BATCHES:
        params, state, value = step(params, state, *batch)
        values.append(float(value))
    return params, state, values


def close(a, b, tolerance):
    a, b = (jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (a, b))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


FAST = ("svd", "alternating", "columns after")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ROWS]
)
def test_optax_fused_and_projected_are_one(name):
    tx, plan = ROWS[name]
    assert lrx.projection.gradient_mode(tx.projection) == plan
    start = tx.init(PARAMS)
    full, projected = (
        lowered(lrx.train_step(loss, tx, **options), start)
        for options in ({"backprop": "full"}, {})
    )
    params, state, values = rolled(lowered(optax_step(tx), start), start)
    fused_params, fused_state, fused_values = rolled(full, start)
    close(fused_params, params, 2e-5)
    close(fused_values, values, 1e-5)
    # where every step reads full gradients the two are one program, which need not run again
    is_one_program = projected.as_text() == full.as_text()
    assert is_one_program == (plan == "full")
    low_params, low_state, low_values = (
        (fused_params, fused_state, fused_values) if is_one_program else rolled(projected, start)
    )
    # int8 codes jump where float noise crosses a boundary
    tolerance = 3e-3 if name == "int8 basis" else 2e-4
    close(low_params, params, tolerance)
    close(low_values, values, tolerance)
    for other in (fused_state, low_state):
        chex.assert_trees_all_equal_structs(other, state)
        for field in ("step", "skipped", "refreshes"):
            assert int(getattr(other.projection, field)) == int(getattr(state.projection, field)), (
                field
            )
    assert int(state.projection.step) == len(BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd", "columns after", "alternating", "apollo"])
def test_accumulation_is_the_large_batch(name):
    tx, _ = ROWS[name]
    _, _, values = run(lrx.train_step(loss, tx), tx)
    parts = [(x.reshape(4, 10, 10), y.reshape(4, 10, 10)) for x, y in BATCHES]
    for backprop in ("projected", "full"):
        _, _, got = run(lrx.train_step(loss, tx, accumulate=4, backprop=backprop), tx, parts)
        np.testing.assert_allclose(got, values, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd", "alternating", "columns after", "frugal"])
def test_a_bad_batch_is_skipped_and_counted(name):
    """Bitwise as if it had never come, also at a refresh."""
    tx, _ = ROWS[name]
    step = jax.jit(lrx.train_step(loss, tx))
    params, state = PARAMS, tx.init(PARAMS)
    bad = (X.at[0, 0].set(np.nan), Y)
    for i, batch in enumerate(BATCHES[:4]):
        again, after, _ = step(params, state, *bad)
        assert int(after.projection.skipped) == int(state.projection.skipped) + 1, i
        chex.assert_trees_all_equal(again, params)
        old = state.projection._replace(skipped=after.projection.skipped)
        chex.assert_trees_all_equal(after.projection, old)
        params, state, _ = step(params, state, *batch)
        assert int(state.projection.step) == i + 1


@pytest.mark.slow
def test_an_explicit_learning_rate_replaces_the_schedule():
    tx, _ = ROWS["galore"]
    form, grads = lrx.fused(tx), jax.grad(loss)(PARAMS, X, Y)
    state = form.init(PARAMS)
    same, _ = form.step(PARAMS, grads, state)
    given, _ = form.step(PARAMS, grads, state, 1e-2)
    double, _ = form.step(PARAMS, grads, state, 2e-2)
    close(same, given, 1e-7)
    moved = lambda new: np.asarray(new["square"]["kernel"] - PARAMS["square"]["kernel"])  # noqa: E731
    np.testing.assert_allclose(moved(double), 2 * moved(given), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("layerwise", [False, True])
def test_no_stack_is_copied_layer_by_layer(layerwise):
    """A loop over layers writes moments in place: one copy of a stack in it would be made for every
    layer."""
    params = {"layers": {"kernel": jnp.zeros((5, 24, 48))}}
    tx = lrx.galore(
        1e-2,
        projector=P.random(rank=7, kind="orthonormal"),
        views=VIEWS,
        refresh_schedule=every(period=9, **AFTER),
    )
    stack = lrx.projection.Stack(
        before=lambda rest, x: x,
        layer=lambda p, x: jnp.tanh(lrx.matmul(x, p["kernel"]))[..., :24],
        after=lambda rest, x, _: jnp.mean(x**2),
    )
    step = lrx.layerwise_step(stack, tx) if layerwise else lrx.train_step(stack.loss, tx)
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, tx.init(params), jnp.ones((8, 24)))
        .compile()
    )
    loops = compiled.as_text().split("ENTRY")[0]
    assert "while" in compiled.as_text()
    assert not re.findall(r"f32\[5,7,48\]\S* copy\(%get-tuple-element", loops)


def test_fused_needs_a_recipe():
    for tx in (
        optax.chain(optax.clip(1.0), lrx.galore(1e-2, rank=2)),
        lrx.scale_by_projection(P.svd(rank=2)),
    ):
        with pytest.raises(TypeError, match="has no fused form"):
            lrx.fused(tx)
    with pytest.raises(ValueError, match="rounding='up'"):
        lrx.fused(lrx.galore(1e-2, rank=2), rounding="up")
    with pytest.raises(ValueError, match="backprop='low'"):
        lrx.train_step(loss, lrx.galore(1e-2, rank=2), backprop="low")


class Listening(lrx.inner.Inner):
    """SGD that says what it is told."""

    trees = True

    def init(self, tree, view=None):
        return ()

    def update(self, grads, state, *, view=None, params=None, **extra):
        assert set(extra) <= {"loss_scale"}  # nothing where only shapes are asked for
        return grads, extra.get("loss_scale", 1.0), state


RATED = {
    "galore": lambda rate: galore(P.svd(rank=3), every(period=3)),
    "a schedule": lambda rate: lrx.galore(lambda count: rate / (1 + count), rank=3, views=VIEWS),
    "plain leaves apart": lambda rate: lrx.muon(rate, views=VIEWS, plain_learning_rate=1e-3),
    "a basis that reads it": lambda rate: lrx.online_subspace_descent(
        rate, rank=3, views=VIEWS, refresh_every=5, peak_rate=1e-2
    ),
    "a sampler": lambda rate: lrx.badam(rate, views=VIEWS, period=1),
}


@pytest.mark.parametrize("name", RATED)
def test_a_rate_that_is_given_stands_for_that_of_the_recipe(name):
    """In `update`, `step` and `rebase` alike."""
    given, grads = 0.03, jax.grad(loss)(PARAMS, X, Y)
    tx, other = RATED[name](1e-2), RATED[name](given)
    if name == "galore":
        other = dataclasses.replace(tx.recipe, learning_rate=given).optax()
    state = tx.init(PARAMS)
    expected = other.update(grads, state, PARAMS)
    found = tx.update(grads, state, PARAMS, learning_rate=given)
    close(found, expected, 1e-6)
    if name == "a sampler":
        return
    form = lrx.fused(tx)
    moved = optax.apply_updates(PARAMS, expected[0])
    fused_params, fused_state = form.step(PARAMS, grads, state, learning_rate=given)
    close((fused_params, fused_state), (moved, expected[1]), 1e-5)
    if tx.projection.refresh_schedule.when == "before" and name != "plain leaves apart":
        low, state, rebased = form.rebase(PARAMS, grads, state, learning_rate=given)
        options = {"taps": lrx.taps(state), "rebased": rebased}
        close(form.step(PARAMS, low, state, given, **options)[0], moved, 1e-5)
        with pytest.raises(ValueError, match="rebased=True must be the third"):
            form.step(PARAMS, low, state, given, taps=lrx.taps(state), rebased=True)


def test_inner_transformations_hear_the_same_in_all_forms():
    """What the caller passes on, and no rate, which is the recipe's own."""
    tx = lrx.galore(1e-2, rank=3, inner=Listening(), views=VIEWS)
    grads, state, extra = jax.grad(loss)(PARAMS, X, Y), tx.init(PARAMS), {"loss_scale": 0.5}
    updates, _ = tx.update(grads, state, PARAMS, learning_rate=0.1, **extra)
    params, _ = lrx.fused(tx).step(PARAMS, grads, state, learning_rate=0.1, **extra)
    close(params, optax.apply_updates(PARAMS, updates), 1e-6)
    direction = lrx.scale_by_projection(P.svd(rank=3), inner=Listening(), views=VIEWS)
    chain = optax.chain(direction, lrx.apply_learning_rate(5.0))
    chained, _ = chain.update(grads, chain.init(PARAMS), PARAMS, learning_rate=0.1, **extra)
    expected, _ = direction.update(grads, direction.init(PARAMS), PARAMS, **extra)
    close(chained, jax.tree.map(lambda x: -0.1 * x, expected), 1e-6)


def test_no_update_of_full_size():
    """The fused form needs the scratch of one layer where the optax form needs that of the
    stack."""
    params = {"layers": {"kernel": jnp.zeros((16, 128, 256))}}
    tx = lrx.galore(1e-2, projector=P.random(rank=8, kind="orthonormal"), views=VIEWS, guard=False)
    state = tx.init(params)
    grads = {"layers": {"kernel": lrx.projection.Projected(jnp.zeros((16, 8, 256)))}}

    def fused(params, grads, state):
        return lrx.fused(tx).step(
            params, grads, state, taps=lrx.taps(state), rebased=Rebased(False)
        )

    def plain(params, grads, state):
        updates, state = tx.update(grads, state, params, taps=lrx.taps(state))
        return optax.apply_updates(params, updates), state

    small, large = (
        jax.jit(f, donate_argnums=(0, 2))
        .lower(params, grads, state)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (fused, plain)
    )
    assert small < 4 * 128 * 256 * 4
    assert large > 16 * 128 * 256 * 4


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bfloat16_weights(rounding):
    """Updates far below half a unit in the last place vanish when rounded to nearest, and add up
    stochastically."""
    params = {"layers": {"kernel": jnp.ones((2, 32, 64), jnp.bfloat16)}}
    tx = lrx.galore(1e-4, projector=P.identity(), scale=1.0, views=VIEWS)
    form = lrx.fused(tx, rounding=rounding)
    grads, state = jax.tree.map(jnp.ones_like, params), form.init(params)
    step = jax.jit(form.step)
    for _ in range(30):
        params, state = step(params, grads, state)
    assert params["layers"]["kernel"].dtype == jnp.bfloat16
    moved = 1 - float(jnp.mean(params["layers"]["kernel"].astype(jnp.float32)))
    assert moved == 0 if rounding == "nearest" else abs(moved - 30e-4) < 3e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "projector, when", [(P.random(rank=3, kind="orthonormal"), "after"), (P.svd(rank=3), "before")]
)
def test_int8_weights_train(projector, when):
    """Quantised kernels are requantised in place and stay a fixed point of a skipped step, also
    where a refresh reads full gradients, which are those of their values."""
    from lowrank_jax import linalg

    small = jax.tree.map(
        lambda x: linalg.quantize_blocks(x, "linear") if x.ndim == 3 else x, PARAMS
    )
    tx = galore(projector, every(period=3, when=when))
    step = jax.jit(lrx.train_step(loss, lrx.fused(tx, rounding="stochastic")))
    params, state = small, tx.init(small)
    first = None
    for batch in BATCHES * 6:
        params, state, value = step(params, state, *batch)
        first = value if first is None else first
    chex.assert_trees_all_equal_structs(params, small)
    assert params["layers"]["up"]["kernel"].codes.dtype == jnp.int8
    assert float(value) < 0.9 * float(first)
    again, after, _ = step(params, state, X.at[0, 0].set(np.nan), Y)
    assert int(after.projection.skipped) == 1
    chex.assert_trees_all_equal(again, params)
    with pytest.raises(ValueError, match="use lrx.fused"):
        tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(small), small)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["keep", "rotate", "ldadam", "reset"])
def test_moments_in_8_bits(transport):
    """Close to float32 moments, at a quarter of the bytes; transports see decoded moments."""
    inner = lrx.inner.adam(eps=1e-3)
    slots = {"transport": getattr(lrx.transports, transport)()}
    stored = lrx.inner.stored8(inner=inner, minimum=0, block=64)
    make = lambda inner: galore(P.svd(rank=4), every(period=3), inner=inner, **slots)  # noqa: E731
    _, state, values = run(optax_step(make(inner)), make(inner))
    _, small_state, small = run(lrx.train_step(loss, make(stored)), make(stored))
    np.testing.assert_allclose(small, values, rtol=2e-2)
    assert small != values

    def nbytes(state):
        nodes = jax.tree.leaves(state.projection.matrices, is_leaf=lambda x: hasattr(x, "inner"))
        return sum(leaf.nbytes for leaf in jax.tree.leaves([node.inner for node in nodes]))

    assert nbytes(small_state) < 0.4 * nbytes(state)


def test_the_minimum_keeps_small_moments():
    state = lrx.inner.stored8(minimum=64).init({"large": jnp.ones((8, 8)), "small": jnp.ones(7)})
    assert state.mu["large"].codes.shape == (8, 8)
    assert state.mu["small"].dtype == jnp.float32
    assert lrx.inner.stored8(minimum=0, block=4).init(jnp.ones((3, 8))).nu.scales.shape == (3, 2)
    for options, message in (({"block": 0}, "block=0"), ({"minimum": -1}, "minimum=-1")):
        with pytest.raises(ValueError, match=message):
            lrx.inner.stored8(**options)
    with pytest.raises(ValueError, match="wrap it once"):
        lrx.inner.stored8(inner=lrx.inner.stored8())
