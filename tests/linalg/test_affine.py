"""Codes of 4 bits with an offset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import linalg


@pytest.mark.parametrize("size, block", [(20, 8), (7, 256), (16, 16), (1, 4)])
def test_entries_lie_within_half_a_step_and_ends_are_exact(size, block):
    # values of a block may all have one sign
    x = np.float32(np.random.default_rng(0).normal(size=(3, 4, size)) + 5)
    codes = jax.jit(lambda x: linalg.quantize_affine(x, block))(x)
    assert codes.shape == x.shape
    assert codes.codes.shape == (3, 4, -(-size // 2))
    assert codes.offsets.shape == codes.steps.shape == (3, 4, -(-size // block))
    value = np.asarray(codes.dequantize())
    for start in range(0, size, block):
        own = x[..., start : start + block]
        low, high = own.min(-1, keepdims=True), own.max(-1, keepdims=True)
        step = (high - low) / 15
        want = low + step * np.round((own - low) / np.where(step == 0, 1, step))
        np.testing.assert_allclose(value[..., start : start + block], want, rtol=1e-6)
    np.testing.assert_array_equal(codes.requantize(value).codes, codes.codes)


def test_what_is_not_finite_stays_in_its_block():
    x = jnp.ones((2, 8)).at[0, 0].set(jnp.inf).at[1, 5].set(jnp.nan)
    value = linalg.quantize_affine(x, 4).dequantize()
    assert jnp.isnan(value).tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: linalg.quantize_affine(jnp.ones(4), 0), "block=0"),
        (lambda: linalg.quantize_affine(jnp.arange(4)), "dtype int32"),
        (lambda: linalg.quantize_affine(jnp.ones(4)).requantize(jnp.ones(4), 1), "key: affine"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
