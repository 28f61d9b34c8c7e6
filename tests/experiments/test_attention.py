"""Both attentions are `jax.nn.dot_product_attention`, in values and gradients; the chunked one
without its scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import llama
from experiments.models.attention import attention, chunked_attention

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

RNG = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def inputs(S, H, G, K=8, B=2, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    return *(draw(B, S, heads, K, dtype=dtype) for heads in (H, G, G)), draw(
        B, S, H, K, dtype=dtype
    )


def dense(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def both(function, q, k, v, d_out):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(d_out)


@pytest.mark.parametrize(
    "S, H, G, chunk",
    [(12, 4, 4, 4), (12, 4, 2, 4), (13, 6, 1, 5), (7, 2, 2, 16), (5, 2, 1, 1)],
    ids=["heads", "grouped", "one key head, short last chunk", "one chunk", "one by one"],
)
def test_values_and_gradients(S, H, G, chunk):
    operands = inputs(S, H, G)
    found = jax.jit(lambda *x: both(lambda *y: chunked_attention(*y, chunk=chunk), *x))(*operands)
    for own, expected in zip(found, jax.jit(lambda *x: both(dense, *x))(*operands), strict=True):
        assert own.dtype == expected.dtype
        np.testing.assert_allclose(own, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S", "H", "G"), [(12, 4, 4), (12, 4, 2), (13, 6, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_batch_axis_of_heads(S, H, G, causal, dtype):
    operands = inputs(S, H, G, dtype=dtype)
    own = lambda q, k, v: attention(q, k, v, causal=causal)  # noqa: E731
    reference = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
    tolerance = 2e-5 if dtype == jnp.float32 else 5e-2
    found, expected = (jax.jit(lambda *x, f=f: both(f, *x))(*operands) for f in (own, reference))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_by_the_formula_in_float64():
    """softmax(q kᵀ / sqrt K) v over j <= i, with scores as large as 60, which overflow without the
    maximum."""
    q, k, v = (np.asarray(x, np.float64) for x in inputs(9, 4, 2, K=4)[:3])
    q = 20 * q
    s = np.einsum("bqhk,bshk->bhqs", q, np.repeat(k, 2, axis=2)) / 2
    s = np.where(np.tril(np.ones((9, 9), bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    expected = np.einsum("bhqs,bshk->bqhk", p / p.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    found = chunked_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), chunk=4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_near_to_float32_as_the_dense_product():
    operands = inputs(24, 4, 2, K=16, dtype=jnp.bfloat16)
    wide = both(dense, *(x.astype(jnp.float32) for x in operands))
    own = both(lambda *x: chunked_attention(*x, chunk=8), *operands)
    for chunked, other, exact in zip(own, both(dense, *operands), wide, strict=True):
        assert chunked.dtype == jnp.bfloat16
        error, usual = (
            float(jnp.linalg.norm(x.astype(jnp.float32) - exact)) for x in (chunked, other)
        )
        assert error < 1.5 * usual


def test_no_scores_are_kept():
    """Temporaries grow with the sequence, not with its square."""

    def temporaries(function, S):
        operands = [jax.ShapeDtypeStruct((1, S, 4, 8), jnp.float32)] * 4
        compiled = jax.jit(lambda *x: both(function, *x)).lower(*operands).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    square = 4 * 4 * 1024 * 1024
    assert temporaries(lambda *x: chunked_attention(*x, chunk=64), 1024) < square / 8
    assert temporaries(dense, 1024) > square


@pytest.mark.slow
def test_the_model_takes_it():
    config = llama.preset("nano", layers=2, width=32, hidden=48, heads=4, kv_heads=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 18), 0, 259)
    params = llama.Llama(config).init(jax.random.key(0), tokens)["params"]

    def loss(params, config):
        logits = llama.Llama(config).apply({"params": params}, tokens)
        return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]

    chunked = dataclasses.replace(config, attention_chunk=4)
    value, grads = jax.value_and_grad(loss)(params, config)
    own, own_grads = jax.value_and_grad(loss)(params, chunked)
    np.testing.assert_allclose(own, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), own_grads, grads
    )
    shapes = str(jax.make_jaxpr(lambda p: loss(p, chunked))(params))
    assert "18,18]" not in shapes
    assert "18,18]" in str(jax.make_jaxpr(lambda p: loss(p, config))(params))


def test_errors_name_the_value():
    q, k, v, _ = inputs(6, 4, 2)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_attention(q, k, v, chunk=0)
    with pytest.raises(ValueError, match="G a divisor of H"):
        chunked_attention(q[:, :, :3], k, v, chunk=2)
    with pytest.raises(ValueError, match="must be"):
        chunked_attention(q, k, v[:, :5], chunk=2)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"attention_chunk={wrong}"):
            llama.preset("nano", attention_chunk=wrong)
