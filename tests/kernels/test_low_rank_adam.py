"""Adam in a subspace with the weight written in place: both kernels, interpreted, against NumPy's
float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import kernels, linalg
from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.kernels import _platform
from lowrank_jax.projection import fused

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

NAMED = [
    {"implementation": "reference"},
    *({"implementation": k, "interpret": True} for k in ("tpu", "gpu")),
]
NUMBERS = {
    "b1": 0.9,
    "b2": 0.95,
    "eps": jnp.array([1e-3, 1e-2]),
    "rate": jnp.array([0.1, 0.3]),
    "decay": 0.02,
    "factor": 0.5,
}


def operands(side, moments="float32", dtype="float32", sizes=(2, 20, 140, 35), block=128):
    count, s, k, r = sizes
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((count, *shape))  # noqa: E731
    w = jnp.asarray(draw(s, k) if side == "rows" else draw(k, s), dtype)
    basis, low = (jnp.asarray(draw(*shape), jnp.float32) for shape in ((s, r), (r, k)))
    mu, nu = jnp.asarray(draw(r, k), jnp.float32), jnp.asarray(draw(r, k) ** 2, jnp.float32)
    if moments == "8 bits":
        return (
            w,
            basis,
            low,
            linalg.quantize_blocks(mu, "signed", block),
            linalg.quantize_blocks(nu, "unsigned", block),
        )
    return w, basis, low, mu.astype(moments), nu.astype(moments)


def value(x):
    return np.asarray(x.dequantize() if hasattr(x, "dequantize") else x, np.float64)


def oracle(arrays, side):
    w, basis, low, mu, nu = map(value, arrays)
    eps, rate = (np.asarray(NUMBERS[name], np.float64)[:, None, None] for name in ("eps", "rate"))
    g = NUMBERS["factor"] * low
    m = NUMBERS["b1"] * mu + (1 - NUMBERS["b1"]) * g
    v = NUMBERS["b2"] * nu + (1 - NUMBERS["b2"]) * g * g
    step = basis @ (m / (np.sqrt(v) + eps))
    return (
        w - rate * (step if side == "rows" else np.swapaxes(step, 1, 2)) - NUMBERS["decay"] * w,
        m,
        v,
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, the last of them cut, of chunks, the last cut."""
    monkeypatch.setattr(parts, "TPU_COLS", (128,))
    monkeypatch.setattr(parts, "CHUNK", 16)
    monkeypatch.setattr(parts, "GPU_TILES", (16, 32))


@pytest.mark.parametrize(
    ("side", "moments", "dtype"),
    [("rows", "float32", "float32"), ("cols", "bfloat16", "bfloat16"), ("rows", "8 bits", "bfloat16"),
     ("cols", "8 bits", "float32")],
)  # fmt: skip
def test_weight_and_moments_are_those_of_float64(side, moments, dtype, small_tiles):
    arrays = operands(side, moments, dtype)
    expected = oracle(arrays, side)
    for option in NAMED:
        w, *found = kernels.low_rank_adam(*arrays, **NUMBERS, side=side, **option)
        assert w.dtype == arrays[0].dtype
        scale = np.abs(expected[0]).max() * (1e-5 if dtype == "float32" else 4e-3)
        np.testing.assert_allclose(value(w), expected[0], atol=scale, err_msg=str(option))
        for own, exact, old, code in zip(
            found, expected[1:], arrays[3:], ("signed", "unsigned"), strict=True
        ):
            if moments != "8 bits":
                tolerance = 1e-6 if moments == "float32" else 4e-3
                np.testing.assert_allclose(
                    value(own), exact, rtol=tolerance, atol=1e-6, err_msg=str(option)
                )
                continue
            stored = linalg.quantize_blocks(jnp.asarray(exact, jnp.float32), code, old.block)
            np.testing.assert_allclose(own.scales, stored.scales, rtol=1e-5)
            apart = np.abs(np.asarray(own.codes, int) - np.asarray(stored.codes, int))
            assert apart.max() <= 1
            assert np.mean(apart > 0) < 1e-3  # middles of two codes


def test_blocks_that_do_not_end_with_the_matrix_are_whole_in_a_tile():
    """384 columns in blocks of 256: a tile of all of them would cut the second block."""
    arrays = operands("rows", "8 bits", sizes=(1, 8, 384, 8), block=256)
    numbers = NUMBERS | {"eps": NUMBERS["eps"][:1], "rate": NUMBERS["rate"][:1]}
    expected = kernels.low_rank_adam(*arrays, **numbers, implementation="reference")
    found = kernels.low_rank_adam(*arrays, **numbers, **NAMED[1])
    for own, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(value(own), value(exact), atol=1e-2 * np.abs(value(exact)).max())
    np.testing.assert_allclose(value(found[0]), value(expected[0]), atol=1e-5)


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_stochastic_rounding_draws_the_bits_of_linalg(side, small_tiles):
    arrays, keys = operands(side, dtype="bfloat16"), jax.random.split(jax.random.key(3), 2)
    exact = oracle(arrays, side)[0]
    expected = [
        linalg.stochastic_round(jnp.asarray(x, jnp.float32), jnp.bfloat16, k)
        for x, k in zip(exact, keys, strict=True)
    ]
    for option in (NAMED[0], NAMED[1 if side == "rows" else 2]):
        found = kernels.low_rank_adam(*arrays, **NUMBERS, side=side, keys=keys, **option)[0]
        assert np.mean(value(found) != value(jnp.stack(expected))) < 1e-3, (
            option
        )  # sums differ in their last bit
    plain = kernels.low_rank_adam(*arrays, **NUMBERS, side=side)[0]
    assert np.mean(value(plain) != value(jnp.stack(expected))) > 0.1


@pytest.mark.parametrize("moments", ["bfloat16", "8 bits"])
def test_what_is_not_accepted_changes_nothing(moments, small_tiles):
    w, basis, low, *stored = operands("rows", moments)
    for option in NAMED:
        bad = low.at[:, 3].set(np.nan)
        found = kernels.low_rank_adam(
            w, basis, bad, *stored, **NUMBERS, accepted=jnp.asarray(False), **option
        )
        jax.tree.map(np.testing.assert_array_equal, found, (w, *stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "columns"}, "side='columns' must be 'rows' or 'cols'"),
        ({"side": "cols"}, r"must be w \(L, k, s\)"),
        ({"low": jnp.ones((2, 35, 140), jnp.bfloat16)}, "low of dtype bfloat16 must be float32"),
        ({"nu": linalg.quantize_blocks(jnp.ones((2, 35, 140)), "unsigned")}, "give both as arrays"),
        ({"keys": jax.random.key(0)}, r"keys of shape \(\) must be \(2,\)"),
    ],
    ids=str,
)
def test_errors_name_field_value_and_remedy(change, message):
    arrays = dict(zip(("w", "basis", "low", "mu", "nu"), operands("rows"), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.low_rank_adam(**(arrays | NUMBERS | change))


def test_a_tile_fits_the_chip_it_is_made_for():
    shape, sizes = (4096, 1024, 11008), (2, 4, 4)
    large, small = (parts.tiles(shape, sizes, 0, "tpu", chip) for chip in ("v5e", "v5p"))
    assert large[1] > small[1]
    assert parts.fast_bytes(shape, sizes, "tpu", *large) > _platform.budget("tpu", "v5p")
    assert (
        parts.tiles((4096, 256, 11008), (2, 4, 1), 2048, "tpu", "v5e")[1] == 2048
    )  # no block is cut
    for block, platform, message in (
        (200, "tpu", "multiple of 128 on a TPU"),
        (384, "gpu", "power of two"),
    ):
        with pytest.raises(_platform.Misfit, match=message):
            parts.tiles(shape, (2, 4, 1), block, platform, None)
    with pytest.raises(_platform.Misfit, match="implementation='reference' has no such bound"):
        parts.tiles((8192, 8192, 8192), sizes, 0, "tpu", "v5e")


PARAMS = {
    "layers": {"up": {"kernel": jnp.ones((2, 16, 24))}, "down": {"kernel": jnp.ones((2, 24, 16))}},
    "bias": jnp.zeros(16),
}


def galore(**options):
    options = {
        "rank": 3,
        "views": lrx.Views(stacked=("layers/.*",)),
        "eps": 1e-3,
        "clip_norm": 1.0,
    } | options
    return lrx.galore(options.pop("learning_rate", 1e-1), weight_decay=0.1, **options)


def spoiled(grads, leaf):
    """The gradients with a NaN in one leaf."""
    grads = jax.tree.map(lambda x: x, grads)
    node = grads if leaf == "bias" else grads["layers"][leaf]
    key = "bias" if leaf == "bias" else "kernel"
    node[key] = node[key].at[(0,) * node[key].ndim].set(np.nan)
    return grads


def trained(form, dtype="float32", params=PARAMS, leaf="bias"):
    shapes = params
    params = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape).astype(dtype), shapes
    )
    step, state = jax.jit(form.step), form.init(params)
    for i in range(4):
        grads = jax.tree.map(
            lambda x, i=i: jnp.cos((i + 2) * jnp.arange(x.size)).reshape(x.shape), shapes
        )
        if i == 2:  # a step that is skipped
            before, grads = (params, state), spoiled(grads, leaf)
        params, state = step(params, grads, state)
        if i == 2 and form.recipe.projection.guard:
            now, then = (
                (p, s.projection.matrices, s.projection.plain) for p, s in ((params, state), before)
            )
            jax.tree.map(np.testing.assert_array_equal, now, then)
    return params, state


CASES = {
    "mask, schedule": (
        None,
        {"mask": lambda p: jax.tree.map(lambda x: x.shape[-1] == 24, p),
         "learning_rate": lambda step: 0.1 / (1 + step)},
        {},
    ),
    "reset at a refresh": (
        "tpu", {"refresh_schedule": lrx.refresh_schedules.every(period=2), "transport": lrx.transports.reset()}, {}
    ),
    "8 bits": ("gpu", {"inner": lrx.inner.stored8(minimum=1, block=8)}, {}),
    "no guard, stochastic": (
        None,
        {"projector": lrx.projectors.svd(rank=3, dtype=jnp.bfloat16), "rank": None, "guard": False, "clip_norm": None,
         "inner": lrx.inner.adam(convention="hf")},
        {"rounding": "stochastic"},
    ),
    "bases move after the step": ("tpu", {"refresh_schedule": lrx.refresh_schedules.every(period=2, when="after")}, {}),
}  # fmt: skip


def compare(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
        ),
        found,
        expected,
    )


@pytest.fixture
def interpreted(monkeypatch):
    """`interpreted("tpu")`: the form's kernel is that one, interpreted; of None the reference."""

    def choose(implementation):
        chosen = {"implementation": implementation, "interpret": implementation is not None}
        monkeypatch.setattr(
            kernels, "low_rank_adam", functools.partial(kernels.low_rank_adam, **chosen)
        )

    return choose


@pytest.mark.parametrize("name", CASES)
def test_the_fused_form_by_the_kernel_is_the_fused_form(name, interpreted):
    implementation, options, form = CASES[name]
    interpreted(implementation)
    dtype = "bfloat16" if "rounding" in form else "float32"
    expected, found = (
        trained(lrx.fused(galore(**options), implementation=p, **form), dtype)
        for p in ("xla", "pallas")
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert int(found[1].projection.skipped) == (0 if name.startswith("no guard") else 1)
    compare(found, expected, 1e-5 if dtype == "float32" else 8e-3)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_decay_before_the_step_and_a_gradient_that_is_not_finite(implementation, interpreted):
    """`trained` asserts that a skipped step leaves parameters and state as they were, a projected
    leaf's NaN too."""
    interpreted(implementation)
    recipe = dataclasses.replace(
        galore(refresh_schedule=lrx.refresh_schedules.every(period=3)).recipe, decay="before"
    )
    found = {}
    for implementation in ("xla", "pallas"):
        found[implementation] = trained(
            fused.Fused(recipe=recipe, implementation=implementation), leaf="down"
        )
        assert int(found[implementation][1].projection.skipped) == 1
    compare(found["pallas"], found["xla"], 1e-5)
    after = trained(
        fused.Fused(recipe=dataclasses.replace(recipe, decay="after"), implementation="pallas"),
        leaf="down",
    )
    assert (
        np.abs(
            after[0]["layers"]["up"]["kernel"] - found["pallas"][0]["layers"]["up"]["kernel"]
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize("guard", [True, False])
def test_a_gradient_that_is_not_finite_at_a_refresh_is_what_xla_makes_of_it(guard, interpreted):
    interpreted("tpu")
    options = {
        "guard": guard,
        "clip_norm": None,
        "refresh_schedule": lrx.refresh_schedules.every(period=2),
        "projector": lrx.projectors.random(rank=3, stored=True),
        "rank": None,
    }
    form = {p: lrx.fused(galore(**options), implementation=p) for p in ("xla", "pallas")}
    found = {implementation: trained(own, leaf="up") for implementation, own in form.items()}
    compare(found["pallas"], found["xla"], 1e-5)
    assert np.isnan(found["pallas"][0]["layers"]["up"]["kernel"]).any() == (not guard)


@pytest.mark.parametrize(
    ("implementation", "moments", "form", "dtype"),
    [("tpu", lrx.inner.adam(), {}, "float32"),
     ("gpu", lrx.inner.stored8(minimum=1, block=8), {"rounding": "stochastic"}, "bfloat16")],
)  # fmt: skip
def test_a_leaf_with_two_batch_axes(implementation, moments, form, dtype, interpreted):
    interpreted(implementation)
    params = {"layers": {"up": {"kernel": jnp.ones((2, 3, 16, 24))}}, "bias": jnp.zeros(16)}
    view = lrx.MatrixView(batch=(0, 1), rows=(2,), cols=(3,))
    tx = galore(views=lrx.Views(rules=(("layers/.*", view),)), inner=moments)
    own = (
        lrx.fused(tx, implementation=implementation, **form) for implementation in ("xla", "pallas")
    )
    expected, found = (trained(one, dtype, params, "up") for one in own)
    # the form's noise is one draw for an index of the first axis, the kernel's one for each matrix
    compare(found, expected, 1e-5 if dtype == "float32" else 2e-2)


def test_the_kernel_is_taken_only_where_it_is_told_to():
    params = {"kernel": jnp.ones((2, 128, 256))}
    for implementation in ("xla", "pallas"):
        form = lrx.fused(
            galore(views=lrx.Views(stacked=("kernel",))), implementation=implementation
        )
        text = (
            jax.jit(form.step)
            .trace(params, params, form.init(params))
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
        assert ("tpu_custom_call" in text) == (implementation == "pallas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": lrx.inner.from_optax(lrx.galore(1.0, rank=1))}, "runs Adam"),
        ({"residual": lrx.residuals.sign()}, "drops the rest of the gradient"),
        ({"projector": lrx.projectors.dct(rank=3), "rank": None}, "reads a stored basis"),
        (
            {"projector": lrx.projectors.svd(rank=3, dtype=jnp.int8), "rank": None},
            "reads a stored basis",
        ),
    ],
    ids=["inner", "residual", "no stored basis", "int8 basis"],
)
def test_the_form_refuses_what_the_kernel_does_not_compute(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.fused(galore(**options), implementation="pallas")
    with pytest.raises(ValueError, match="must be one of"):
        lrx.fused(galore(), implementation="kernels")


def test_leaves_and_layer_wise_steps_that_it_cannot_write_are_refused():
    form = lrx.fused(galore(views=lrx.Views()), implementation="pallas")
    for kernel, message in (
        (jnp.ones((8, 8), jnp.float16), "writes float32 or bfloat16, not float16"),
        (linalg.quantize_blocks(jnp.ones((8, 8)), "linear"), "not QuantizedBlocks"),
    ):
        params, state = {"kernel": kernel}, form.init({"kernel": jnp.ones((8, 8))})
        with pytest.raises(ValueError, match=message):
            form.step(params, {"kernel": jnp.ones((8, 8))}, state)
    turned = lrx.Views(rules=((".*", lrx.MatrixView(rows=(1,), cols=(0,))),))
    form = lrx.fused(galore(views=turned), implementation="pallas")
    params = {"kernel": jnp.ones((8, 16))}
    with pytest.raises(ValueError, match=r"the view takes axes \(1, 0\)"):
        form.step(params, params, form.init(params))
    stack = lrx.projection.Stack(
        before=lambda rest, x: x, layer=lambda layer, x: x, after=lambda rest, x: jnp.mean(x)
    )
    with pytest.raises(ValueError, match="implementation='pallas' writes whole stacks"):
        lrx.layerwise_step(stack, dataclasses.replace(form))
