"""Grouped-query attention: with all scores at once, and, where it is causal, in chunks of them.

    o_i = sum_j p_ij v_j,  p_ij = exp(s_ij - l_i),  s_ij = q_i k_j / sqrt(K),  l_i = log sum_j exp(s_ij)

`attention` makes all scores of a sequence, in products with one batch axis `(B G)` of heads: on
CPUs they take little over half the time of those of `jax.nn.dot_product_attention`, which have two.
`chunked_attention`, whose sums are over j <= i, keeps no S x S scores, forward or backward: a row
of chunks keeps a running maximum, sum and output, which give o and l exactly (online softmax:
Milakov and Gimelshein 2018, arXiv:1805.02867). The backward pass keeps o and l and makes the
probabilities of a chunk again, once (Dao et al. 2022, arXiv:2205.14135):

    ds_ij = p_ij (do_i v_j - do_i o_i) / sqrt(K)
    dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i

Chunks above the diagonal are not visited, so the products are half of those of a masked square.
Scores, softmax and every sum are float32, operands of products have the dtype of the inputs. Beside
its arguments and results a step needs some B x H x C x C float32.

Shapes are named by their suffix:

    B batch   S sequence, of queries   T sequence, of keys   N chunks   C positions of a chunk   H query heads
    G key/value heads   R = H / G   K head size
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.sharding.meshes import divided


def attention(
    q_BxSxHxK: jax.Array, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, *, causal: bool
) -> jax.Array:
    """`jax.nn.dot_product_attention` by products with one batch axis of all heads.

    Query head h reads key/value head h // R. Scores and softmax are float32. An axis that the mesh
    of `lrx.meshes.use` divides (query heads, or the queries' positions) stays apart, so that
    nothing is gathered.

    Args:
      q_BxSxHxK, k_BxTxGxK, v_BxTxGxK: of one floating dtype; G divides H.
      causal: a query reads the keys up to its own position.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention(x, x, x, causal=True).shape
    (1, 5, 2, 4)
    """
    B, S, H, K = q_BxSxHxK.shape
    _, T, G, _ = k_BxTxGxK.shape
    _, length, heads, _ = divided(q_BxSxHxK.shape, "batch", "length", "heads", None)
    batch = (B, G) if heads else (B * G,)
    rows = (H // G, S) if length else (H // G * S,)

    def by_head(x_BxTxGxK, *kept):
        x_BxGxTxK = jnp.swapaxes(x_BxTxGxK, 1, 2)
        return sharding.reshape(x_BxGxTxK, (*batch, *kept, K), first=0)

    product = functools.partial(_batched, axes=len(batch))
    q, k, v = by_head(q_BxSxHxK, *rows), by_head(k_BxTxGxK, T), by_head(v_BxTxGxK, T)
    scores = product(q, k, contract=-1, preferred_element_type=jnp.float32) / math.sqrt(K)
    if causal:
        seen_SxT = jnp.arange(S)[:, None] >= jnp.arange(T)
        seen = jnp.broadcast_to(seen_SxT, (H // G, S, T)).reshape(*rows, T)
        scores = jnp.where(seen, scores, -jnp.inf)
    out = product(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v, contract=-2)
    out_BxHxSxK = sharding.reshape(out, (B, H, S, K), first=0)
    return jnp.swapaxes(out_BxHxSxK, 1, 2)


def _batched(x: jax.Array, y: jax.Array, *, axes: int, contract: int, **options: Any) -> jax.Array:
    """The product over x's last axis and y's axis `contract`; `axes` leading ones are batch."""
    both = tuple(range(axes))
    numbers = (((x.ndim - 1,), (y.ndim + contract,)), (both, both))
    return jax.lax.dot_general(x, y, numbers, **options)


def chunked_attention(
    q_BxSxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, *, chunk: int
) -> jax.Array:
    """Causal attention in chunks, as `jax.nn.dot_product_attention`; reverse-differentiable.

    Query head h reads key/value head h // R.

    Args:
      q_BxSxHxK, k_BxSxGxK, v_BxSxGxK: of one floating dtype; G divides H.
      chunk: C, positions taken at once; a last chunk may be short.

    Raises:
      ValueError: for a chunk below 1, or shapes that do not fit together.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> chunked_attention(x, x, x, chunk=2).shape
    (1, 5, 2, 4)
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")
    B, S, H, K = q_BxSxHxK.shape
    G = k_BxSxGxK.shape[2]
    if k_BxSxGxK.shape != (B, S, G, K) or v_BxSxGxK.shape != (B, S, G, K) or H % G:
        raise ValueError(
            f"q {q_BxSxHxK.shape}, k {k_BxSxGxK.shape} and v {v_BxSxGxK.shape} must be (B, S, H, "
            "K), (B, S, G, K) and (B, S, G, K), with G a divisor of H"
        )
    chunk = min(chunk, S)
    # keys after the end lie above the diagonal of every query that counts, so padding needs no mask
    # of its own
    split = functools.partial(_split, chunk=chunk, groups=G)
    parts = sharding.varying_alike(
        split(q_BxSxHxK), split(k_BxSxGxK)[..., 0, :], split(v_BxSxGxK)[..., 0, :]
    )
    out_NxBxCxGxRxK = _attention(*parts)
    chunks = len(out_NxBxCxGxRxK)
    return sharding.reshape(
        jnp.moveaxis(out_NxBxCxGxRxK, 0, 1), (B, chunks * chunk, H, K), first=1
    )[:, :S]


def _split(x_BxSxHxK: jax.Array, chunk: int, groups: int) -> jax.Array:
    """(N, B, C, G, R, K), padded with zeros to whole chunks."""
    B, S, H, K = x_BxSxHxK.shape
    x_BxSxHxK = jnp.pad(x_BxSxHxK, ((0, 0), (0, -S % chunk), (0, 0), (0, 0)))
    shape = (B, x_BxSxHxK.shape[1] // chunk, chunk, groups, H // groups, K)
    return jnp.moveaxis(sharding.reshape(x_BxSxHxK, shape, first=1), 1, 0)


def _take(x: jax.Array, number: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(q_BxCxGxRxK: jax.Array, k_BxCxGxK: jax.Array, row: Any, column: Any) -> jax.Array:
    """(B, G, R, C, C) of queries by keys, minus infinity above the diagonal."""
    C, K = q_BxCxGxRxK.shape[1], q_BxCxGxRxK.shape[-1]
    s_BxGxRxCxC = _product("BqGRK,BkGK->BGRqk", q_BxCxGxRxK, k_BxCxGxK) / math.sqrt(K)
    position = jnp.arange(C)
    seen_CxC = row * C + position[:, None] >= column * C + position
    return jnp.where(seen_CxC, s_BxGxRxCxC, -jnp.inf)


@jax.custom_vjp
def _attention(
    q_NxBxCxGxRxK: jax.Array, k_NxBxCxGxK: jax.Array, v_NxBxCxGxK: jax.Array
) -> jax.Array:
    return _forward(q_NxBxCxGxRxK, k_NxBxCxGxK, v_NxBxCxGxK)[0]


def _forward(q, k, v):
    """The output and what the backward pass needs: inputs, output and l (N, B, G, R, C)."""

    def row(number):
        q_BxCxGxRxK = _take(q, number)

        def one(column, carry):
            most_BxGxRxC, sum_BxGxRxC, out_BxGxRxCxK = carry
            s_BxGxRxCxC = _scores(q_BxCxGxRxK, _take(k, column), number, column)
            new_BxGxRxC = jnp.maximum(most_BxGxRxC, jnp.max(s_BxGxRxCxC, axis=-1))
            p_BxGxRxCxC = jnp.exp(s_BxGxRxCxC - new_BxGxRxC[..., None])
            fade_BxGxRxC = jnp.exp(most_BxGxRxC - new_BxGxRxC)
            part_BxGxRxCxK = _product(
                "BGRqk,BkGK->BGRqK", p_BxGxRxCxC.astype(v.dtype), _take(v, column)
            )
            sum_BxGxRxC = fade_BxGxRxC * sum_BxGxRxC + jnp.sum(p_BxGxRxCxC, axis=-1)
            return (
                new_BxGxRxC,
                sum_BxGxRxC,
                fade_BxGxRxC[..., None] * out_BxGxRxCxK + part_BxGxRxCxK,
            )

        # column 0 holds a key for every query, so that the maximum is finite from the first chunk
        # on
        start_BxGxRxCxK = jnp.zeros_like(jnp.moveaxis(q_BxCxGxRxK, 1, 3), jnp.float32)
        zero_BxGxRxC = start_BxGxRxCxK[..., 0]
        start = (zero_BxGxRxC - jnp.inf, zero_BxGxRxC, start_BxGxRxCxK)
        most, total, out = jax.lax.fori_loop(0, number + 1, one, start)
        return jnp.moveaxis(out / total[..., None], 3, 1).astype(q.dtype), most + jnp.log(total)

    out_NxBxCxGxRxK, l_NxBxGxRxC = jax.lax.map(row, jnp.arange(q.shape[0]))
    return out_NxBxCxGxRxK, (q, k, v, out_NxBxCxGxRxK, l_NxBxGxRxC)


def _backward(kept, d_out):
    q, k, v, out, l_NxBxGxRxC = kept
    chunks, scale = q.shape[0], 1 / math.sqrt(q.shape[-1])
    inner_NxBxCxGxR = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inner_NxBxGxRxC = jnp.moveaxis(inner_NxBxCxGxR, 2, -1)

    def column(dq, number):
        k_BxCxGxK, v_BxCxGxK = _take(k, number), _take(v, number)

        def one(row, carry):
            dq, dk_BxCxGxK, dv_BxCxGxK = carry
            q_BxCxGxRxK, do_BxCxGxRxK = _take(q, row), _take(d_out, row)
            s_BxGxRxCxC = _scores(q_BxCxGxRxK, k_BxCxGxK, row, number)
            p_BxGxRxCxC = jnp.exp(s_BxGxRxCxC - _take(l_NxBxGxRxC, row)[..., None])
            dp_BxGxRxCxC = _product("BqGRK,BkGK->BGRqk", do_BxCxGxRxK, v_BxCxGxK)
            ds_BxGxRxCxC = (
                scale * p_BxGxRxCxC * (dp_BxGxRxCxC - _take(inner_NxBxGxRxC, row)[..., None])
            )
            p_BxGxRxCxC, ds_BxGxRxCxC = (x.astype(q.dtype) for x in (p_BxGxRxCxC, ds_BxGxRxCxC))
            dq_BxCxGxRxK = _take(dq, row) + _product("BGRqk,BkGK->BqGRK", ds_BxGxRxCxC, k_BxCxGxK)
            dq = jax.lax.dynamic_update_index_in_dim(dq, dq_BxCxGxRxK, row, 0)
            dk_BxCxGxK += _product("BGRqk,BqGRK->BkGK", ds_BxGxRxCxC, q_BxCxGxRxK)
            dv_BxCxGxK += _product("BGRqk,BqGRK->BkGK", p_BxGxRxCxC, do_BxCxGxRxK)
            return dq, dk_BxCxGxK, dv_BxCxGxK

        zero_BxCxGxK = jnp.zeros_like(k_BxCxGxK, jnp.float32)
        dq, dk_BxCxGxK, dv_BxCxGxK = jax.lax.fori_loop(
            number, chunks, one, (dq, zero_BxCxGxK, zero_BxCxGxK)
        )
        return dq, (dk_BxCxGxK.astype(k.dtype), dv_BxCxGxK.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(column, jnp.zeros_like(q, jnp.float32), jnp.arange(chunks))
    return dq.astype(q.dtype), dk, dv


_attention.defvjp(_forward, _backward)
