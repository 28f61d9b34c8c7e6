"""Block-wise 8-bit storage and stochastic rounding against brute force in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import linalg
from lowrank_jax.linalg import dynamic_code

RNG = np.random.default_rng(0)


def book(signed):
    """The dynamic code book, written from its description: 256 values in seven decades."""
    values = {0.0, 1.0}
    for i in range(7):
        cells = 2**i * (1 if signed else 2)
        for j in range(cells):
            middle = (0.1 + 0.9 * (j + 0.5) / cells) * 10.0 ** (i - 6)
            values |= {middle, -middle} if signed else {middle}
    return np.array(sorted(values), np.float32)


def brute(x, code, block):
    """Nearest values one block at a time; a negative value keeps its sign."""
    values = book(code == "signed")
    out = np.zeros_like(x)
    for row_in, row_out in zip(
        x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]), strict=True
    ):
        for start in range(0, x.shape[-1], block):
            part = row_in[start : start + block]
            scale = np.abs(part).max()
            if scale == 0:
                continue
            index = np.abs(part[:, None] / scale - values).argmin(axis=1)
            if code == "signed":
                index = np.where(
                    (part < 0) & (values[index] >= 0), np.flatnonzero(values < 0)[-1], index
                )
            row_out[start : start + block] = values[index] * scale
    return out


def test_the_code_books():
    signed, unsigned = linalg.dynamic_code_book(True), linalg.dynamic_code_book(False)
    np.testing.assert_allclose(signed, book(True), rtol=1e-6)
    np.testing.assert_allclose(unsigned, book(False), rtol=1e-6)
    assert signed.shape == unsigned.shape == (256,)
    assert signed[127] == 0
    np.testing.assert_allclose(
        [signed[0], signed[-2], signed[128]], [-0.99297, 0.99297, 5.5e-7], rtol=1e-4
    )
    np.testing.assert_allclose(unsigned[1], 3.25e-7, rtol=1e-4)


@pytest.mark.parametrize("code", ["signed", "unsigned"])
@pytest.mark.parametrize("block", [256, 7, 64])
def test_nearest_code(code, block):
    x = RNG.normal(size=(3, 5, 100)) * 10.0 ** RNG.integers(-9, 3, size=(3, 5, 100))
    x = np.float32(np.abs(x) if code == "unsigned" else x)
    x[0, 0] = 0
    quantized = jax.jit(lambda x: linalg.quantize_blocks(x, code, block))(x)
    np.testing.assert_allclose(quantized.dequantize(), brute(x, code, block), rtol=2e-6)
    assert quantized.codes.dtype == jnp.uint8
    assert quantized.shape == x.shape
    assert quantized.scales.shape == (3, 5, -(-100 // block))
    if code == "signed":
        assert np.all(np.asarray(quantized.dequantize())[x < 0] < 0)


def test_code_values_are_fixed_points():
    values = np.float32(linalg.dynamic_code_book(True))
    np.testing.assert_allclose(linalg.quantize_blocks(values).dequantize(), values, rtol=1e-7)


def test_linear_code():
    x = np.float32(RNG.normal(size=(4, 300)))
    quantized = linalg.quantize_blocks(x, "linear")
    assert quantized.codes.dtype == jnp.int8
    step = np.repeat(np.asarray(quantized.scales), 256, axis=-1)[:, :300] / 127
    assert np.all(np.abs(quantized.dequantize() - x) <= 0.5001 * step)
    again = quantized.requantize(quantized.dequantize())
    np.testing.assert_array_equal(again.codes, quantized.codes)
    assert quantized.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_stochastic_rounding_has_no_bias():
    x = jnp.full((1, 20000), 0.3).at[0, 0].set(1.0)
    codes = linalg.quantize_blocks(x, "linear", 20000, jax.random.key(0)).codes[0, 1:]
    assert set(np.unique(codes)) == {38, 39}
    np.testing.assert_allclose(np.mean(np.float64(codes)), 0.3 * 127, atol=5 * 0.5 / np.sqrt(20000))
    value = 1 + 0.3 * 2**-7
    rounded = np.float64(
        linalg.stochastic_round(jnp.full(20000, value), jnp.bfloat16, jax.random.key(0))
    )
    assert set(rounded) == {1.0, 1 + 2**-7}
    np.testing.assert_allclose(np.mean((rounded - 1) * 2**7), 0.3, atol=5 * 0.5 / np.sqrt(20000))


def test_stochastic_rounding_keeps_what_is_exact():
    big = float(jnp.finfo(jnp.float32).max)
    x = jnp.array([0.0, -0.0, 1.5, -3.0, np.inf, -np.inf, big, -big], jnp.float32)
    rounded = linalg.stochastic_round(x, jnp.bfloat16, jax.random.key(1))
    np.testing.assert_array_equal(rounded[:6], x[:6].astype(jnp.bfloat16))
    assert bool(jnp.all(jnp.isfinite(rounded[6:])))
    assert bool(
        jnp.isnan(linalg.stochastic_round(jnp.array([np.nan]), jnp.bfloat16, jax.random.key(1)))[0]
    )
    assert linalg.stochastic_round(x, jnp.float32, jax.random.key(1)) is x


def test_slices_of_stacks():
    x = np.float32(RNG.normal(size=(3, 4, 300)))
    whole, one = linalg.quantize_blocks(x), linalg.quantize_blocks(x[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), whole, one)


@pytest.mark.parametrize("code", ["signed", "linear"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_come_back_clean(code, bad):
    value = linalg.quantize_blocks(jnp.array([1.0, bad, 2.0]), code).dequantize()
    assert not np.all(np.isfinite(value))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((jnp.ones(3), "nf4"), "code='nf4' must be one of"),
        ((jnp.ones(3), "signed", 0), "block=0 must be a positive integer"),
        ((jnp.ones(3, jnp.int32),), "must be floating"),
        ((jnp.ones(()),), "at least one axis"),
        (
            (jnp.ones(3), "signed", 256, jax.random.key(0)),
            "stochastic rounding is for code='linear'",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        linalg.quantize_blocks(*arguments)


def test_rounding_to_another_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype=float16 must be bfloat16"):
        linalg.stochastic_round(jnp.ones(3), jnp.float16, jax.random.key(0))


@pytest.mark.parametrize("code", ["signed", "unsigned"])
def test_nearest_at_and_around_every_middle(code):
    values = linalg.dynamic_code_book(code == "signed").astype(np.float64)
    middles = np.float32((values[:-1] + values[1:]) / 2)
    up, down = np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))
    x = np.concatenate(
        [np.float32(values), middles, up, down, np.float32([1.0])]
    )  # the last makes the scale 1
    index = np.asarray(linalg.quantize_blocks(x, code, x.size).codes).astype(int)
    distance = np.abs(x[:, None].astype(np.float64) - values)
    nearest = distance[np.arange(x.size), index] == distance.min(axis=1)
    assert np.all(nearest | ((x < 0) & (index == 126)))


def test_a_negative_value_that_underflows_stays_negative():
    codes = linalg.quantize_blocks(jnp.array([-1e-30, 0.0, 1e-30, 1e10])).codes
    assert codes.tolist() == [126, 127, 127, 255]


def test_requantize_keeps_code_and_block_and_uses_the_key():
    x = jnp.asarray(RNG.normal(size=(2, 10)), jnp.float32)
    for code in ("signed", "unsigned", "linear"):
        again = linalg.quantize_blocks(x, code, 3).requantize(2 * x)
        assert (again.code, again.block, again.scales.shape) == (code, 3, (2, 4))
        np.testing.assert_array_equal(again.scales, 2 * linalg.quantize_blocks(x, code, 3).scales)
    old, key = linalg.quantize_blocks(x, "linear", 3), jax.random.key(3)
    np.testing.assert_array_equal(
        old.requantize(x, key).codes, linalg.quantize_blocks(x, "linear", 3, key).codes
    )
    assert np.any(old.requantize(x, key).codes != old.codes)


def test_linear_stochastic_rounding_keeps_whole_codes():
    # float32 rounds -126 + u up to -125 for 4 in a million u
    x = jnp.full(2_000_000, -126.0).at[:3].set(jnp.array([127.0, 0.0, 1.0]))
    codes = linalg.quantize_blocks(x, "linear", x.size, jax.random.key(0)).codes
    np.testing.assert_array_equal(codes, x.astype(jnp.int8))


def test_stochastic_rounding_of_negative_and_tiny_values_has_no_bias():
    for value in (-(1 + 0.3 * 2**-7), 1e-30, -3.3e5):
        x = np.float32(value)
        rounded = np.float64(
            linalg.stochastic_round(jnp.full(20000, x), jnp.bfloat16, jax.random.key(5))
        )
        gap = np.ptp(rounded)
        assert len(set(rounded)) == 2
        np.testing.assert_allclose(
            rounded.mean(), np.float64(x), atol=5 * 0.5 * gap / np.sqrt(20000), rtol=0
        )


@pytest.mark.parametrize("code", ["signed", "unsigned", "linear"])
def test_jit_vmap_and_scan_equal_eager(code):
    x = np.float32(np.abs(RNG.normal(size=(3, 4, 300))))
    eager = linalg.quantize_blocks(x, code, 64)
    one = lambda x: linalg.quantize_blocks(x, code, 64)  # noqa: E731
    scanned = jax.lax.scan(lambda carry, x: (carry, one(x)), 0, x)[1]
    decoded = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), 0, eager)[1]
    for other in (jax.jit(one)(x), jax.vmap(one)(x), scanned):
        jax.tree.map(np.testing.assert_array_equal, eager, other)
    np.testing.assert_array_equal(decoded, eager.dequantize())


def test_dtypes_shape_and_bytes():
    x = jnp.asarray(RNG.normal(size=(3, 600)), jnp.bfloat16)
    for code in ("signed", "linear"):
        quantized = linalg.quantize_blocks(x, code)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(quantized)) == 3 * 600 + 4 * 3 * 3
        assert (quantized.shape, quantized.ndim, quantized.dtype) == ((3, 600), 2, jnp.float32)
        same = linalg.quantize_blocks(x.astype(jnp.float32), code)
        np.testing.assert_array_equal(quantized.codes, same.codes)
        assert quantized.dequantize().dtype == jnp.float32
        np.testing.assert_array_equal(
            quantized.dequantize(jnp.bfloat16), quantized.dequantize().astype(jnp.bfloat16)
        )


@pytest.mark.parametrize("code, bound", [("signed", 0.012), ("unsigned", 0.007), ("linear", 0.008)])
def test_error_and_memory_of_a_large_array(code, bound):
    x = np.float32(RNG.normal(size=(64, 1000)))
    x = x**2 if code == "unsigned" else x
    error = linalg.quantize_blocks(x, code).dequantize() - x
    assert np.linalg.norm(error) < bound * np.linalg.norm(x)
    compiled = jax.jit(lambda x: linalg.quantize_blocks(x, code)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * x.nbytes


@pytest.mark.parametrize("code", ["signed", "unsigned", "linear"])
def test_blocks_of_zeros_are_exact_zeros(code):
    quantized = linalg.quantize_blocks(jnp.zeros((2, 5)).at[1, 4].set(1.0), code, 4)
    np.testing.assert_array_equal(quantized.scales, [[0, 0], [0, 1]])
    np.testing.assert_array_equal(quantized.dequantize()[0], np.zeros(5))
    np.testing.assert_array_equal(quantized.dequantize()[1, :4], np.zeros(4))
    np.testing.assert_array_equal(
        quantized.codes[0], {"signed": 127, "unsigned": 0, "linear": 0}[code]
    )


def test_stochastic_rounding_keeps_every_kind_of_nan():
    nans = np.repeat(np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF]), 64).view(
        np.float32
    )
    rounded = jax.jit(linalg.stochastic_round, static_argnums=1)(
        nans, jnp.bfloat16, jax.random.key(2)
    )
    assert bool(jnp.all(jnp.isnan(rounded)))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_by_arithmetic_are_those_of_the_tables(signed):
    book = linalg.dynamic_code_book(signed)
    encode = jax.jit(dynamic_code.encode, static_argnums=2)
    decoded = jax.jit(dynamic_code.decode, static_argnums=1)(jnp.arange(256), signed)
    np.testing.assert_allclose(decoded, book, rtol=2e-7)
    middles = (book[1:] + book[:-1]) / 2
    x = jnp.asarray(
        np.concatenate([book, middles * 1.00001, middles * 0.99999, [0.0, 1e-30]]), jnp.float32
    )[None]
    expected = linalg.quantize_blocks(x, "signed" if signed else "unsigned", 1024)
    np.testing.assert_array_equal(encode(x, x, signed), expected.codes)
    negative = jnp.array([[-1e-30, -0.5, 1.0]])
    expected = linalg.quantize_blocks(negative, "signed" if signed else "unsigned")
    np.testing.assert_array_equal(encode(negative, negative, signed), expected.codes)
