"""`y = x dequant(W)` of NF4: both kernels, interpreted, against the reference and NumPy's
float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import kernels, linalg
from lowrank_jax.kernels import _nf4, _platform

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

SHAPES = [
    (40, 150, 70),
    (1, 33, 300),
    (70, 200, 17),
]  # rows, n, m: no multiple of any tile or block
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def operands(shape, dtype, **options):
    rows, n, m = shape
    rng = np.random.default_rng(0)
    w = linalg.quantize_nf4(jnp.asarray(rng.standard_normal((n, m)) / 4, jnp.float32), **options)
    return jnp.asarray(rng.standard_normal((rows, n)), dtype), w


def decoded(w):
    """The matrix from its bytes, row by row, in float64."""
    codes, scales = np.asarray(w.codes), np.asarray(w.scales(), np.float64)
    out = np.zeros((2 * codes.shape[0], codes.shape[1]))
    for row in range(len(out)):
        byte = codes[row // 64 * 32 + row % 32]
        out[row] = np.asarray(linalg.normal_float_book(), np.float64)[
            byte & 15 if row % 64 >= 32 else byte >> 4
        ]
        out[row] *= scales[row // 64]
    return out[: w.rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_are_those_of_float64(shape, dtype, monkeypatch):
    monkeypatch.setattr(
        _nf4, "_TPU_ROWS", (24, 40)
    )  # several tiles, the last of them cut, of chunks, the last cut
    monkeypatch.setattr(_nf4, "_CHUNK", 16)
    monkeypatch.setattr(_nf4, "_TPU_COLS", (128,))
    x, w = operands(shape, dtype, double=True)
    weight = np.random.default_rng(1).standard_normal((shape[0], shape[2])).astype(dtype)
    matrix, own, dy = decoded(w), np.asarray(x, np.float64), np.asarray(weight, np.float64)
    for name in ("reference", "tpu", "gpu"):
        options = {"implementation": name, "interpret": name != "reference"}
        y, pull = jax.vjp(lambda x, options=options: kernels.nf4_linear(x, w, **options), x)
        for found, exact in ((y, own @ matrix), (*pull(jnp.asarray(weight)), dy @ matrix.T)):
            assert found.dtype == dtype
            bound = TOLERANCE[dtype] * np.abs(exact).max()
            np.testing.assert_allclose(
                np.asarray(found, np.float64), exact, atol=bound, err_msg=name
            )


def test_the_backward_tile_spans_blocks_and_cuts_the_last():
    x, w = operands((3, 700, 40), "float32")  # 11 blocks, of which a tile turns eight
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((3, 40)), jnp.float32)
    _, pull = jax.vjp(lambda x: kernels.nf4_linear(x, w, implementation="tpu", interpret=True), x)
    np.testing.assert_allclose(pull(dy)[0], np.asarray(dy, np.float64) @ decoded(w).T, atol=1e-4)


def test_leading_axes_are_rows_and_no_rows_are_nothing():
    x, w = operands((6, 8, 4), "float32")
    np.testing.assert_array_equal(
        kernels.nf4_linear(x.reshape(2, 3, 8), w), kernels.nf4_linear(x, w).reshape(2, 3, 4)
    )
    assert kernels.nf4_linear(x[:0], w, implementation="tpu").shape == (0, 4)


def test_the_frozen_matrix_has_no_cotangent():
    x, w = operands((6, 70, 4), "float32")
    by_scale = jax.grad(
        lambda scales: jnp.sum(
            kernels.nf4_linear(x, linalg.NormalFloat4(w.codes, scales, None, 70, "xla"))
        )
    )
    np.testing.assert_array_equal(by_scale(w.absmax), jnp.zeros_like(w.absmax))


@pytest.mark.parametrize("double", [False, True])
def test_a_block_that_is_not_finite_spoils_its_own_column(double):
    w = np.float32(np.random.default_rng(0).standard_normal((200, 40)))
    w[70, 3] = np.inf
    w, x = linalg.quantize_nf4(w, double=double), jnp.ones((6, 200))
    expected = np.zeros((6, 40), bool)
    expected[:, slice(None) if double else 3] = True
    rows = np.zeros((6, 200), bool)
    rows[:, slice(None) if double else slice(64, 128)] = True
    for name in ("reference", "tpu", "gpu"):
        options = {"implementation": name, "interpret": name != "reference"}
        y, pull = jax.vjp(lambda x, options=options: kernels.nf4_linear(x, w, **options), x)
        np.testing.assert_array_equal(np.isnan(y), expected, err_msg=name)
        np.testing.assert_array_equal(np.isnan(pull(jnp.ones((6, 40)))[0]), rows, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton' must be one of"),
        ({"interpret": True}, "name the kernel to interpret"),
        ({"chip": "v9", "implementation": "tpu"}, "chip='v9' must be one of"),
        ({"x": jnp.ones((4, 8), jnp.float16)}, "float16 must be float32 or bfloat16"),
        ({"x": jnp.ones((4, 9))}, r"must be \(..., n\), \(n, m\)"),
        ({"w": linalg.quantize_nf4(jnp.ones((2, 8, 4)))}, "slice a stack"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_field_value_and_remedy(change, message):
    x, w = operands((4, 8, 4), "float32")
    with pytest.raises(ValueError, match=message):
        kernels.nf4_linear(**({"x": x, "w": w} | change))


def test_a_tile_fits_the_chip_it_is_made_for():
    wide = (4096, 4096, 11008)
    large, small = (_nf4.tiles(wide, 2, "tpu", chip, transpose=True) for chip in ("v5e", "v5p"))
    assert large > small
    assert _nf4.fast_bytes(wide, 2, "tpu", True, *large) > _platform.budget("tpu", "v5p")
    assert _nf4.tiles((16, 4096, 11008), 2, "gpu", "h100") < _nf4.tiles(wide, 2, "gpu", "h100")
    with pytest.raises(_platform.Misfit, match="implementation='reference' has no such bound"):
        _nf4.tiles((4096, 400_000, 4096), 4, "tpu", "v5p")


def lowered(platform, shape, implementation=None, chip=None):
    rows, n, m = shape
    shapes = (rows, n), (32 * -(-n // 64), m), (-(-n // 64), m)
    dtypes = jnp.bfloat16, jnp.uint8, jnp.float32

    def product(x, codes, scales):
        w = linalg.NormalFloat4(codes, scales, None, n, "xla")
        return kernels.nf4_linear(x, w, implementation=implementation, chip=chip)

    abstract = map(jax.ShapeDtypeStruct, shapes, dtypes)
    return jax.jit(product).trace(*abstract).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "shape", "taken"),
    [
        ("tpu", (40, 4096, 11008), True),
        ("tpu", (40, 4096, 4096), False),  # XLA keeps it in a v5e's VMEM
        ("tpu", (40, 4096, 11000), False),  # XLA would copy it
        ("cuda", (512, 256, 264), True),
        ("cuda", (513, 256, 264), False),  # the fifth tile of rows
        ("cpu", (40, 4096, 11008), False),
    ],
)
def test_the_default_is_the_kernel_where_it_moves_less(platform, shape, taken):
    chip = {"tpu": "v5e", "cuda": "h100"}.get(platform)
    call = {"tpu": "tpu_custom_call", "cuda": "triton"}.get(platform, "custom_call")
    assert (call in lowered(platform, shape, chip=chip)) == taken


def test_what_does_not_fit_falls_back_unless_it_is_named():
    wide = (512, 409_600, 256)
    assert "custom_call" not in lowered("tpu", wide)
    with pytest.raises(_platform.Misfit):
        lowered("tpu", wide, "tpu")


@pytest.mark.parametrize("adapted", [True, False])
def test_matmul_takes_the_kernel_only_where_the_matrix_asks_for_it(adapted):
    found = {}
    for implementation in ("xla", "pallas"):
        x, w = operands((5, 70, 24), "float32", implementation=implementation)
        params = {"kernel": w}
        if adapted:
            made = lrx.adapt(
                params, lrx.adapters.lora(rank=2, init="orthogonal"), jax.random.key(0)
            )
            params = lrx.attach(params, made)

        def loss(x, params=params):
            return jnp.sum(jnp.sin(lrx.matmul(x, params["kernel"])))

        found[implementation] = jax.value_and_grad(loss)(x)
        text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
        assert ("triton" in text) == (implementation == "pallas")
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), *found.values()
    )


def test_a_product_of_another_form_decodes():
    x, w = operands((5, 64, 24), "float32", implementation="pallas")
    exact = np.asarray(x, np.float64) @ decoded(w)
    np.testing.assert_allclose(
        lrx.dot_general(w.dequantize(), w, (((0,), (0,)), ((), ()))).shape, (24, 24)
    )
    np.testing.assert_allclose(lrx.einsum("bn,nm->bm", x, w), exact, atol=1e-4)
    high = lrx.dot_general(x, w, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(high, exact, atol=1e-4)
