"""NF4 against brute force in NumPy, and as the frozen base of an adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import lowrank_jax as lrx
from lowrank_jax import linalg

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

RNG = np.random.default_rng(0)


def book():
    """Quantiles of the normal distribution between the offsets of bitsandbytes, over the largest;
    and an exact 0."""
    offset = 0.9677083
    negative, positive = np.linspace(1 - offset, 0.5, 8)[:-1], np.linspace(0.5, offset, 9)
    return norm.ppf(np.concatenate([negative, positive])) / norm.ppf(offset)


def brute(w, scales=None):
    """`(nearest values, scales)`, one block of 64 rows of one column at a time; `scales` are those
    to decode by."""
    values = np.asarray(linalg.normal_float_book(), np.float64)
    out, found = np.zeros(w.shape), np.zeros((-(-w.shape[0] // 64), w.shape[1]))
    for block in range(found.shape[0]):
        for col in range(w.shape[1]):
            part = w[64 * block : 64 * block + 64, col].astype(np.float64)
            found[block, col] = scale = np.abs(part).max()
            nearest = np.abs(part[:, None] / (scale or 1) - values).argmin(axis=1)
            out[64 * block : 64 * block + 64, col] = values[nearest] * (
                scale if scales is None else scales[block, col]
            )
    return out, found


def test_the_book_is_that_of_the_normal_distribution():
    np.testing.assert_allclose(linalg.normal_float_book(), book(), atol=1e-6)


@pytest.mark.parametrize("shape", [(128, 5), (100, 3), (7, 70)], ids=str)
def test_nearest_value_of_a_block(shape):
    w = np.float32(RNG.normal(size=shape) * 10.0 ** RNG.integers(-6, 3, size=shape[1]))
    w[:, 0] = 0
    small = jax.jit(linalg.quantize_nf4)(w)
    np.testing.assert_allclose(small.dequantize(), brute(w)[0], rtol=1e-6)
    assert small.shape == shape
    assert small.codes.nbytes == 32 * -(-shape[0] // 64) * shape[1]
    twice = small.requantize(small.dequantize())
    np.testing.assert_array_equal(twice.dequantize(), small.dequantize())


def test_a_byte_holds_rows_i_and_i_plus_32():
    w = np.zeros((128, 1), np.float32)
    w[[0, 64 + 33], 0] = 1.0, -1.0  # codes 15 and 0 among 7, which is 0
    codes = np.asarray(linalg.quantize_nf4(w).codes[:, 0])
    assert (codes[0], codes[32 + 1]) == (0xF7, 0x70)
    assert set(np.delete(codes, [0, 33])) == {0x77}


def test_doubly_quantised_scales():
    w = np.float32(
        RNG.normal(size=(320, 70))
    )  # 5 blocks a column: a block of 256 scales spans columns
    small = linalg.quantize_nf4(w, double=True)
    exact = brute(w)[1]
    left = exact.T.reshape(-1) - exact.mean()
    values, scales = np.asarray(linalg.dynamic_code_book(True), np.float64), np.zeros_like(left)
    for start in range(0, left.size, 256):
        part = left[start : start + 256]
        peak = np.abs(part).max()
        nearest = np.abs(part[:, None] / peak - values).argmin(axis=1)
        scales[start : start + 256] = values[nearest] * peak
    scales = (scales + exact.mean()).reshape(exact.T.shape).T
    np.testing.assert_allclose(small.scales(), scales, rtol=1e-5)
    np.testing.assert_allclose(small.dequantize(), brute(w, scales)[0], rtol=1e-5)
    assert np.abs(scales / exact - 1).max() > 1e-4  # codes, not copies
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(small)) / w.size
    np.testing.assert_allclose(
        bits, 4 + 8 / 64 + 32 * 3 / w.size, rtol=1e-6
    )  # two blocks of scales and one mean


@pytest.mark.parametrize("double", [False, True])
def test_a_stack_is_its_matrices(double):
    w = jnp.asarray(RNG.normal(size=(3, 70, 8)), jnp.float32)
    stack = linalg.quantize_nf4(w, double=double)
    assert stack.shape == (3, 70, 8)
    for index, one in enumerate(w):
        own = linalg.quantize_nf4(one, double=double)
        np.testing.assert_allclose(stack.dequantize()[index], own.dequantize(), rtol=1e-6)
        sliced = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
        np.testing.assert_allclose(sliced.dequantize(), own.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_block_nan(value):
    w = np.float32(RNG.normal(size=(2, 128, 3)))
    w[0, 70, 1] = value
    found = linalg.quantize_nf4(w).dequantize()
    expected = np.zeros(w.shape, bool)
    expected[0, 64:, 1] = True
    np.testing.assert_array_equal(np.isnan(found), expected)
    whole = np.isnan(
        linalg.quantize_nf4(w, double=True).dequantize()
    )  # one mean of all scales of a matrix
    assert whole[0].all() and not whole[1].any()


@pytest.mark.parametrize("double", [False, True])
def test_requantising_keeps_form_and_codes(double):
    w = np.float32(RNG.normal(size=(320, 70)))
    small = linalg.quantize_nf4(w, double=double, implementation="pallas")
    again = small.requantize(small.dequantize())
    assert jax.tree.structure(again) == jax.tree.structure(small)
    np.testing.assert_array_equal(again.codes, small.codes)
    # the scales of a decoded matrix are coded scales, whose mean is another by a rounding; a step
    # of the code between
    step = np.abs(small.scales() - brute(w)[1]).max() if double else 0.0
    np.testing.assert_allclose(again.scales(), small.scales(), atol=step)
    other = small.requantize(jnp.asarray(2 * w))
    np.testing.assert_array_equal(other.codes, small.codes)
    np.testing.assert_allclose(other.scales(), 2 * small.scales(), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linalg.quantize_nf4(jnp.ones((4, 4), jnp.int8)), "int8 and shape"),
        (lambda: linalg.quantize_nf4(jnp.ones(4)), "at least two axes"),
        (
            lambda: linalg.quantize_nf4(jnp.ones((4, 4)), implementation="kernels"),
            "implementation='kernels' must be one of",
        ),
        (
            lambda: linalg.quantize_nf4(jnp.ones((4, 4))).requantize(
                jnp.ones((4, 4)), jax.random.key(0)
            ),
            "key=None",
        ),
    ],
)
def test_errors_name_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "adapter", [lrx.adapters.lora(rank=3, init="gaussian"), lrx.adapters.dora(rank=3)], ids=repr
)
def test_qlora_is_the_adapter_on_the_decoded_base(adapter):
    w = jnp.asarray(RNG.normal(size=(70, 8)), jnp.float32)
    small = {"kernel": linalg.quantize_nf4(w, double=True)}
    plain = {"kernel": small["kernel"].dequantize()}
    x, found = jnp.asarray(RNG.normal(size=(5, 70)), jnp.float32), []
    for params in (small, plain):
        made = lrx.adapt(params, adapter, jax.random.key(0))

        def loss(train, x, params=params, made=made):
            train = jax.tree.map(lambda leaf: leaf + 0.1, train)
            return jnp.sum(
                jnp.sin(lrx.matmul(x, lrx.attach(params, made.replace(train=train))["kernel"]))
            )

        found.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(made.train, x))
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-4), *found)
