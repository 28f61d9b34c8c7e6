"""`y = x W + (x A) B` in one pass: both kernels, interpreted, against the reference and NumPy's
float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import kernels
from lowrank_jax.kernels import _lora_linear, _platform

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

SHAPES = [
    (40, 70, 50, 5),
    (1, 33, 300, 3),
    (300, 48, 17, 20),
]  # rows, n, m, rank: no multiple of any tile
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def operands(shape, dtype):
    rows, n, m, r = shape
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(s) / 4, dtype) for s in [(rows, n), (n, m), (n, r), (r, m)]
    ]


def gradients(arrays, weight, **options):
    """`(y, gradients of x, W, A, B)` of a loss that weighs every entry of y."""

    def loss(*arrays):
        y = kernels.lora_linear(*arrays, **options)
        return jnp.sum(y.astype(jnp.float32) * weight), y

    found, y = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    return [np.asarray(leaf, np.float64) for leaf in (y, *found)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_float64(shape, dtype, monkeypatch):
    monkeypatch.setattr(
        _lora_linear, "_TPU_ROWS", (24, 40)
    )  # several tiles, the last of them cut, of chunks, the last cut
    monkeypatch.setattr(_lora_linear, "_CHUNK", 16)
    monkeypatch.setattr(_lora_linear, "_TPU_COLS", (128,))
    arrays = operands(shape, dtype)
    weight = (
        np.random.default_rng(1)
        .standard_normal((shape[0], shape[2]))
        .astype(dtype)
        .astype(np.float64)
    )
    x, w, a, b = (np.asarray(leaf, np.float64) for leaf in arrays)
    expected = [x @ w + (x @ a) @ b, weight @ w.T + (weight @ b.T) @ a.T, x.T @ weight]
    expected += [x.T @ (weight @ b.T), (x @ a).T @ weight]
    options = [
        {"implementation": "reference"},
        *({"implementation": k, "interpret": True} for k in ("tpu", "gpu")),
    ]
    for option in options:
        found = gradients(arrays, jnp.asarray(weight, jnp.float32), **option)
        for own, exact in zip(found, expected, strict=True):
            np.testing.assert_allclose(
                own, exact, atol=TOLERANCE[dtype] * np.abs(exact).max(), err_msg=str(option)
            )


def test_leading_axes_are_rows_and_no_rows_are_nothing():
    x, w, a, b = operands((6, 8, 4, 2), "float32")
    flat = kernels.lora_linear(x, w, a, b)
    np.testing.assert_array_equal(
        kernels.lora_linear(x.reshape(2, 3, 8), w, a, b), flat.reshape(2, 3, 4)
    )
    assert kernels.lora_linear(x[:0], w, a, b, implementation="tpu").shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton' must be one of"),
        ({"interpret": True}, "name the kernel to interpret"),
        ({"chip": "v9", "implementation": "tpu"}, "chip='v9' must be one of"),
        ({"x": jnp.ones((4, 8), jnp.float16)}, "float16 must be float32 or bfloat16"),
        ({"b": jnp.ones((3, 4))}, r"must be \(..., n\), \(n, m\), \(n, r\), \(r, m\)"),
        (
            {"a": jnp.ones((8, 200)), "b": jnp.ones((200, 4)), "implementation": "gpu"},
            "rank 200 exceeds 128",
        ),
    ],
    ids=str,
)
def test_errors_name_field_value_and_remedy(change, message):
    arrays = dict(zip("xwab", operands((4, 8, 4, 2), "float32"), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.lora_linear(**(arrays | change))


def test_a_tile_fits_the_chip_it_is_made_for():
    wide = (4096, 11008, 4096, 16)
    large, small = (_lora_linear.tiles(wide, 2, "tpu", chip) for chip in ("v5e", "v5p"))
    assert large > small
    assert _lora_linear.fast_bytes(wide, 2, "tpu", *large) > _platform.budget("tpu", "v5p")
    with pytest.raises(_platform.Misfit, match="implementation='reference' has no such bound"):
        _lora_linear.tiles((4096, 200_000, 4096, 16), 4, "tpu", "v5p")


def lowered(function, arrays, platform):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "call"), [("tpu", "tpu_custom_call"), ("cpu", None)])
def test_the_platform_of_the_program_chooses(platform, call):
    text = lowered(kernels.lora_linear, operands((40, 128, 256, 4), "float32"), platform)
    assert ("custom_call" in text) == (call is not None)
    assert call is None or call in text


def test_cut_lanes_are_left_to_xla():
    assert "custom_call" not in lowered(
        kernels.lora_linear, operands((40, 128, 250, 4), "float32"), "tpu"
    )


def test_what_does_not_fit_falls_back_unless_it_is_named():
    arrays = [
        jax.ShapeDtypeStruct(s, jnp.float32)
        for s in [(512, 409_600), (409_600, 256), (409_600, 4), (4, 256)]
    ]
    assert "custom_call" not in lowered(kernels.lora_linear, arrays, "tpu")
    with pytest.raises(_platform.Misfit):
        lowered(lambda *arrays: kernels.lora_linear(*arrays, implementation="tpu"), arrays, "tpu")


def adapted_loss(implementation, **options):
    params = {"kernel": jax.random.normal(jax.random.key(0), (128, 256)) / 8}
    adapter = lrx.adapters.lora(rank=4, alpha=16, implementation=implementation, **options)
    adaptation = lrx.adapt(params, adapter, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (5, 128))

    def loss(train):
        train = jax.tree.map(lambda leaf: leaf + 0.01, train)  # b starts at 0
        own = lrx.attach(params, adaptation.replace(train=train))
        return jnp.sum(jnp.sin(lrx.matmul(x, own["kernel"])))

    return loss, adaptation.train


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_lora_by_the_kernel_is_lora(init):
    (by_xla, train), (by_kernel, _) = (
        adapted_loss(implementation, init=init) for implementation in ("xla", "pallas")
    )
    found, expected = jax.value_and_grad(by_kernel)(train), jax.value_and_grad(by_xla)(train)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_lora_takes_the_kernel_only_where_it_is_told_to(implementation):
    loss, train = adapted_loss(implementation)
    assert ("tpu_custom_call" in lowered(loss, (train,), "tpu")) == (implementation == "pallas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "kernel"}, "must be 'xla' or 'pallas'"),
        ({"implementation": "pallas", "dropout": 0.1}, "dropout=0.1"),
    ],
)
def test_lora_refuses_what_the_kernel_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.adapters.lora(rank=2, **options)


def test_rows_that_choose_among_adapters_take_the_kernel_too():
    params, found = {"kernel": jax.random.normal(jax.random.key(0), (128, 256)) / 8}, {}
    x = jax.random.normal(jax.random.key(2), (3, 5, 128))  # sequences, each with its own adapter
    for implementation in ("xla", "pallas"):
        adapter = lrx.adapters.lora(rank=4, init="orthogonal", implementation=implementation)
        made = {name: lrx.adapt(params, adapter, jax.random.key(i)) for i, name in enumerate("ab")}
        both = lrx.adapters.candidates(made)

        def run(x, both=both):
            return lrx.matmul(x, lrx.attach(params, both, ids=jnp.asarray([1, -1, 0]))["kernel"])

        found[implementation] = run(x)
        assert ("triton" in lowered(run, (x,), "cuda")) == (implementation == "pallas")
    np.testing.assert_allclose(found["pallas"], found["xla"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["precision", "dtype of x", "an adapter before"])
def test_lora_leaves_to_xla_what_the_kernel_would_change(change):
    params = {"kernel": jax.random.normal(jax.random.key(0), (128, 256)) / 8}
    x = jnp.ones((5, 128), jnp.bfloat16 if change == "dtype of x" else jnp.float32)
    kernel = lrx.adapters.lora(rank=4, implementation="pallas")
    chosen = {"own": lrx.adapt(params, kernel, jax.random.key(1))}
    if change == "an adapter before":
        chosen = {"first": lrx.adapt(params, lrx.adapters.dora(rank=2), jax.random.key(2))} | chosen
    tree = lrx.attach(params, chosen)
    options = {"precision": "highest"} if change == "precision" else {}
    numbers = (((1,), (0,)), ((), ()))
    text = lowered(lambda x: lrx.dot_general(x, tree["kernel"], numbers, **options), (x,), "tpu")
    assert "tpu_custom_call" not in text
    assert change != "precision" or text.count("HIGHEST") >= 2
