"""The layer-wise step is the ordinary one: clipping, accumulation, refreshes and counts
included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.laws import methods as m

RNG = np.random.default_rng(5)
DRAW = lambda *shape: jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
VIEWS = lrx.Views(stacked=(r"layers/.*",), rules=((r"(embed|out)/kernel", None),))
PARAMS = {
    "embed": {"kernel": DRAW(6, 10)},
    "layers": {
        "up": {"kernel": DRAW(3, 10, 16)},
        "down": {"kernel": DRAW(3, 16, 10)},
        "norm": {"scale": jnp.ones((3, 10))},
    },
    "out": {"kernel": DRAW(10, 4)},
}
X, Y = DRAW(40, 6) * 5, DRAW(40, 4) * 5
BATCHES = [(X + 0.1 * i, Y) for i in range(5)]
STACK = lrx.projection.Stack(
    before=lambda rest, x, y: x @ rest["embed"]["kernel"],
    layer=lambda layer, x: x + lrx.matmul(
        jnp.tanh(lrx.matmul(x * layer["norm"]["scale"], layer["up"]["kernel"])), layer["down"]["kernel"]
    ),
    after=lambda rest, x, x0, y: jnp.mean(jnp.square(x @ rest["out"]["kernel"] - y)),
)  # fmt: skip
AFTER = {"when": "after"}
every, P = lrx.refresh_schedules.every, lrx.projectors
BY_LAYER = lrx.rank_schedules.by_layer(shares=(1, 1, 0.3))


def galore(projector, refresh_schedule, **options):
    return lrx.galore(
        1e-2,
        projector=projector,
        refresh_schedule=refresh_schedule,
        views=VIEWS,
        **({"eps": 1e-3} | options),
    )


ROWS = {
    "svd": galore(P.svd(rank=3), every(period=3), weight_decay=0.1),
    "svd clipped": galore(P.svd(rank=3), every(period=3), clip_norm=0.5),
    "svd after": galore(P.svd(rank=3), every(period=3, **AFTER)),
    "svd reset": galore(P.svd(rank=3), every(period=2), transport=lrx.transports.reset()),
    "svd staggered": galore(P.svd(rank=3), lrx.refresh_schedules.staggered(period=2)),
    "random after": galore(P.random(rank=3), every(period=2, **AFTER), clip_norm=0.5),
    "ranked": galore(P.ranked(projector=P.dct(rank=3), schedule=BY_LAYER), every(period=2)),
    "alternating": galore(P.alternating(rank=3), every(period=3, **AFTER)),
    "alternating two-sided": galore(P.alternating_two_sided(rank=3), every(period=3, **AFTER), eps=1e-2),
    "masked decay": galore(P.svd(rank=3), every(period=3), weight_decay=0.5,
                           mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    "stored": galore(P.svd(rank=3), every(period=3), inner=lrx.inner.stored8(minimum=0), plain=lrx.inner.adam()),
    "adafactor": galore(P.svd(rank=3), every(period=3), inner=lrx.inner.adafactor(), plain=lrx.inner.adam()),
    "identity, slices": galore(P.identity(), lrx.refresh_schedules.staggered(period=2),
                               transport=lrx.transports.reset()),
}  # fmt: skip
OPTIONS = {
    "galore": {"eps": 1e-3},
    "frugal": {"clip_norm": 5.0},
    "dct_adamw": {"error_feedback": True},
    "muon": {"plain_learning_rate": optax.linear_schedule(1e-3, 0.0, 7)},
    # no basis of the long sides: their Gram matrices lack rank, and rounding decides what it is there
    "soap": {"max_precond_dim": 10, "eps": 1e-3},
}


def named(name, row):
    """A named optimizer on this stack, by its row of the laws."""
    options = row.settings("refresh_every", rank=3, learning_rate=1e-2, views=VIEWS)
    return row.factory(**options | OPTIONS.get(name, {}))


ROWS |= {name: named(name, row) for name, row in m.NAMED.items()}


def run(step, tx, batches, state=None):
    """From a state that is made already, or a new one."""
    state = tx.init(PARAMS) if state is None else state
    step, params, values = jax.jit(step), PARAMS, []
    for batch in batches:
        params, state, value = step(params, state, *batch)
        values.append(float(value))
    return params, state, values


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("svd clipped", "frugal") else pytest.param(n, marks=pytest.mark.slow)
        for n in ROWS
    ],
)
def test_layer_by_layer_is_the_ordinary_step(name):
    tx = ROWS[name]
    start = tx.init(PARAMS)
    full, layerwise = lrx.train_step(STACK.loss, tx, backprop="full"), lrx.layerwise_step(STACK, tx)
    params, state, values = run(full, tx, BATCHES, start)
    own_params, own_state, own_values = run(layerwise, tx, BATCHES, start)
    np.testing.assert_allclose(own_values, values, rtol=2e-3 if name == "stored" else 2e-4)
    tolerance = 2e-3 if name == "stored" else 3e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
        own_params,
        params,
    )
    chex.assert_trees_all_equal_structs(own_state, state)
    for field in ("step", "skipped", "refreshes"):
        assert int(getattr(own_state.projection, field)) == int(getattr(state.projection, field))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd clipped", "random after", "frugal"])
def test_accumulation_is_one_update_of_the_large_batch(name):
    tx = ROWS[name]
    _, _, values = run(lrx.layerwise_step(STACK, tx), tx, BATCHES)
    parts = [(x.reshape(4, 10, -1), y.reshape(4, 10, -1)) for x, y in BATCHES]
    _, state, got = run(lrx.layerwise_step(STACK, tx, accumulate=4), tx, parts)
    np.testing.assert_allclose(got, values, rtol=2e-3)
    assert int(state.projection.step) == len(BATCHES)


@pytest.mark.slow
def test_int8_kernels_refresh_by_the_gradients_of_their_values():
    quantise = lambda x: lrx.linalg.quantize_blocks(x, "linear") if x.ndim == 3 else x  # noqa: E731
    params = PARAMS | {"layers": jax.tree.map(quantise, PARAMS["layers"])}
    tx = ROWS["svd"]
    values = {}
    for name, step in (
        ("own", lrx.layerwise_step(STACK, tx)),
        ("ordinary", lrx.train_step(STACK.loss, tx)),
    ):
        step, found, state = jax.jit(step), params, tx.init(params)
        values[name] = []
        for batch in BATCHES[:3]:
            found, state, value = step(found, state, *batch)
            values[name].append(float(value))
        values[name].append(found)
    np.testing.assert_allclose(values["own"][:3], values["ordinary"][:3], rtol=2e-2)
    decoded = [
        [x.dequantize() for x in (v[3]["layers"][k]["kernel"] for k in ("up", "down"))]
        for v in values.values()
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), *decoded)
    chex.assert_trees_all_equal_structs(values["own"][3], params)


def test_a_bad_batch_is_skipped():
    tx = ROWS["svd"]
    step, state = jax.jit(lrx.layerwise_step(STACK, tx)), tx.init(PARAMS)
    params, after, _ = step(PARAMS, state, X.at[0, 0].set(np.nan), Y)
    assert (int(after.projection.step), int(after.projection.skipped)) == (0, 1)
    chex.assert_trees_all_equal(params, PARAMS)
    old = state.projection._replace(skipped=after.projection.skipped)
    chex.assert_trees_all_equal(after.projection, old)


def test_no_gradient_of_the_stack_is_held():
    layers, width = 16, 128
    params = {"layers": {"kernel": jnp.zeros((layers, width, width))}}
    stack = lrx.projection.Stack(
        before=lambda rest, x: x,
        layer=lambda p, x: jnp.tanh(lrx.matmul(x, p["kernel"])),
        after=lambda rest, x, _: jnp.mean(x**2),
    )
    tx = lrx.frugal(1e-2, views=lrx.Views(stacked=("layers/.*",)), projection="columns")
    x, state = jnp.ones((8, width)), tx.init(params)
    small, large = (
        jax.jit(f, donate_argnums=(0, 1))
        .lower(params, state, x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (lrx.layerwise_step(stack, tx), lrx.train_step(stack.loss, tx))
    )
    assert small < 10 * width * width * 4
    assert large > layers * width * width * 4


def test_what_cannot_be_taken_layer_by_layer():
    tx = lrx.galore(1e-2, rank=2, views=lrx.Views(stacked=(r"layers/.*",)))
    with pytest.raises(ValueError, match="out/kernel.*cannot be updated layer by layer"):
        lrx.layerwise_step(STACK, tx)(PARAMS, tx.init(PARAMS), X, Y)
    with pytest.raises(ValueError, match="accumulate=0"):
        lrx.layerwise_step(STACK, tx, accumulate=0)


def _breaking():
    """The stack with finite values, whose gradient is not finite below the input of the layer with
    mark 1."""

    @jax.custom_vjp
    def through(x, mark):
        return x

    def forward(x, mark):
        return x, mark

    through.defvjp(
        forward, lambda mark, dx: (jnp.where(mark > 0, jnp.nan, dx), jnp.zeros_like(mark))
    )
    layer = lambda p, x: STACK.layer(p, through(x, p["mark"]["scale"][0]))  # noqa: E731
    before = lambda rest, x, y: through(STACK.before(rest, x, y), rest["mark"])  # noqa: E731
    return lrx.projection.Stack(before=before, layer=layer, after=STACK.after)


def _marked(where):
    """Parameters with a mark on one layer, or on what lies before the stack."""
    marks = jnp.zeros((3, 1)) if where == "before" else jnp.zeros((3, 1)).at[where].set(1)
    layers = PARAMS["layers"] | {"mark": {"scale": marks}}
    return PARAMS | {"layers": layers, "mark": jnp.asarray(float(where == "before"))}


def _moved(params, new):
    """`{name: which entries or layers changed}`."""
    kernels = {
        name: np.any(
            np.asarray(new["layers"][name]["kernel"] != params["layers"][name]["kernel"]), (1, 2)
        )
        for name in ("up", "down")
    }
    return kernels | {
        "rest": bool(np.any(np.asarray(new["embed"]["kernel"] != params["embed"]["kernel"])))
    }


BROKEN = {
    "exact": ({}, {"exact_skip": True}),
    "exact, every step": (
        {"refresh_schedule": lrx.refresh_schedules.every_step()},
        {"exact_skip": True},
    ),
    "clipped": ({"clip_norm": 0.5}, {}),
    "accumulated": ({}, {"exact_skip": True, "accumulate": 2}),
}


@pytest.mark.parametrize("where", [1, "before"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "exact" else ()) for n in BROKEN]
)
def test_a_skipped_step_changes_nothing_but_a_counter(name, where):
    """Also where the value is finite and a gradient first is not in the middle of the stack, or
    below it."""
    options, form = BROKEN[name]
    tx = galore(P.svd(rank=3), **({"refresh_schedule": every(period=3)} | options))
    params = _marked(where)
    args = [x.reshape(2, 20, -1) if "accumulate" in form else x for x in (X, Y)]
    step, state = jax.jit(lrx.layerwise_step(_breaking(), tx, **form)), tx.init(params)
    new, after, value = step(params, state, *args)
    assert np.isfinite(value)
    chex.assert_trees_all_equal(new, params)
    assert (int(after.projection.step), int(after.projection.skipped)) == (0, 1)
    old = after._replace(projection=after.projection._replace(skipped=state.projection.skipped))
    chex.assert_trees_all_equal(old, state)


@pytest.mark.parametrize("where", [1, "before"])
def test_what_moves_at_a_skipped_step_without_a_first_pass(where):
    """The layers above the first that is not finite; it counts as partly skipped, and nothing else
    moves."""
    tx, params = ROWS["svd"], _marked(where)
    state = tx.init(params)
    new, after, _ = jax.jit(lrx.layerwise_step(_breaking(), tx))(params, state, X, Y)
    counters = (after.projection.step, after.projection.skipped, after.projection.partly_skipped)
    assert [int(x) for x in counters] == [0, 0, 1]
    expected = [where == "before", True, True]  # the mark breaks what leaves its layer
    moved = _moved(params, new)
    assert not moved.pop("rest")
    for layers in moved.values():
        np.testing.assert_array_equal(layers, expected)
    chex.assert_trees_all_equal(after.projection.plain, state.projection.plain)
    for name in ("basis", "inner"):
        pairs = zip(
            *(
                jax.tree.leaves(getattr(s.projection.matrices["layers"]["up"]["kernel"], name))
                for s in (state, after)
            ),
            strict=True,
        )
        for old, new in pairs:
            assert [
                bool(np.any(np.asarray(a != b))) for a, b in zip(old, new, strict=True)
            ] == expected


@pytest.mark.slow
def test_an_exact_skip_costs_one_backward_pass():
    """Of a step that is not clipped, at most 1.8 times the arithmetic; none where a norm is clipped
    anyway."""
    tx = galore(P.random(rank=2), every(period=9, **AFTER))
    state = tx.init(PARAMS)

    def flops(tx, **options):
        step = jax.jit(lrx.layerwise_step(STACK, tx, **options))
        return step.lower(PARAMS, state, X, Y).compile().cost_analysis()["flops"]

    assert 1.2 < flops(tx, exact_skip=True) / flops(tx) < 1.8
    clipped = galore(P.random(rank=2), every(period=9, **AFTER), clip_norm=1.0)
    assert flops(clipped, exact_skip=True) == flops(clipped)


def test_an_exact_skip_needs_a_guard():
    with pytest.raises(ValueError, match="exact_skip=True.*guard=False"):
        lrx.layerwise_step(
            STACK, galore(P.svd(rank=3), every(period=3), guard=False), exact_skip=True
        )
