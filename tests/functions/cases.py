"""Functions of a kernel, each with the view that says which matrix it is: what the laws are about."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import lowrank_jax as lrx
from lowrank_jax.matrices import MatrixView

DENSE = MatrixView()
STACK = MatrixView(batch=(0,), rows=(1,), cols=(2,))
HEADS = MatrixView(rows=(0,), cols=(1, 2))
TIGHT, LOOSE = 2e-5, 4e-2


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) / 2, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """`function(kernel, *args)`; `cut` where it sees some rows or columns alone."""

    function: Callable[..., jax.Array]
    view: MatrixView
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    cut: bool = False
    tolerance: float = TIGHT


CASES: dict[str, Case] = {}


def case(view, shape, *args, **options):
    def put(function):
        CASES[function.__name__.replace("_", " ")] = Case(function, view, shape, args, **options)
        return function

    return put


# ------------------------------------------------------------------ products, from either side


@case(DENSE, (6, 8), normal(3, 5, 6))
def matmul(w, x):
    return x @ w


@case(DENSE, (6, 8), normal(3, 6))
def from_the_left(w, x):
    return w.T @ x.T


@case(DENSE, (6, 8), normal(3, 8))
def transposed(w, x):
    return x @ w.T


@case(MatrixView(rows=(1,), cols=(0,)), (8, 6), normal(3, 6))
def out_in(w, x):
    return jax.vmap(lambda x: w @ x)(x)


@case(HEADS, (6, 2, 4), normal(3, 5, 6))
def to_heads(w, x):
    return jnp.einsum("bsd,dhk->bhsk", x, w)


@case(MatrixView(rows=(0, 1), cols=(2,)), (2, 4, 6), normal(3, 5, 2, 4))
def from_heads(w, x):
    return jnp.einsum("bshk,hkd->bsd", x, w)


@case(HEADS, (6, 2, 4), normal(3, 2, 4))
def a_part_of_the_columns_contracted(w, x):
    return jnp.einsum("bhk,dhk->bhd", x, w)


@case(MatrixView(rows=(2,), cols=(0, 1, 3)), (3, 2, 6, 4), normal(5, 6))
def fused_query_key_value(w, x):
    return jnp.einsum("td,sndh->stnh", x, w)


@case(DENSE, (6, 8), normal(3, 6), tolerance=LOOSE)
def bfloat16(w, x):
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)


@case(DENSE, (6, 6), normal(3, 6))
def both_ways(w, x):
    return jnp.sin(x @ w) @ w.T


@case(DENSE, (6, 8), normal(3, 5, 6))
def ours(w, x):
    return lrx.matmul(x, w)


# ------------------------------------------------------------------------------- structure


@case(DENSE, (6, 8), normal(3, 6))
def columns_to_heads(w, x):
    return jnp.einsum("bd,dhk->bhk", x, w.reshape(6, 2, 4))


@case(DENSE, (6, 8), normal(3, 2, 3))
def rows_to_heads(w, x):
    return jnp.einsum("bij,ijf->bf", x, w.reshape(2, 3, 8))


@case(HEADS, (6, 2, 4), normal(3, 6))
def heads_merged(w, x):
    return x @ w.reshape(6, 8)


@case(DENSE, (6, 12), normal(3, 6), cut=True)
def split(w, x):
    query, key, value = jnp.split(w, 3, axis=1)
    return (x @ query) * (x @ key) + x @ value


@case(DENSE, (6, 12), normal(3, 6), cut=True)
def some_columns(w, x):
    return x @ w[:, 2:7]


@case(DENSE, (6, 12), normal(3, 3), cut=True)
def some_rows_and_columns(w, x):
    return x @ w[2:5, 1:9]


@case(MatrixView(rows=(0,), cols=(2,), batch=(1,)), (6, 1, 8), normal(3, 6))
def an_axis_of_one(w, x):
    return x @ w[:, 0] + x @ w.squeeze(1)


@case(DENSE, (6, 8), normal(3, 6))
def through_a_barrier(w, x):
    w, x = jax.lax.optimization_barrier((w, x))
    return x @ checkpoint_name(w, "kernel")


# -------------------------------------------------------------------------- stacks, experts


@case(STACK, (3, 6, 8), normal(2, 6), jnp.int32(2))
def layers_by_index(w, x, layer):
    return x @ w[1] + x @ w[-1] * jnp.sin(x @ w[layer])


@case(STACK, (4, 6, 8), normal(2, 6))
def some_layers(w, x):
    return jnp.einsum("bd,ldf->lbf", x, w[1:3])


@case(STACK, (3, 6, 8), normal(3, 2, 6))
def experts(w, x):
    return jnp.einsum("etd,edf->etf", x, w)


@case(STACK, (3, 6, 8), normal(3, 2, 6))
def experts_in_the_middle(w, x):
    return jnp.einsum("etd,edf->tef", x, w)


@case(STACK, (3, 6, 8), normal(2, 6))
def all_tokens_to_all_experts(w, x):
    return jnp.einsum("td,edf->etf", x, w)


@case(STACK, (3, 6, 8), normal(3, 2, 6))
def experts_summed(w, x):
    return jnp.einsum("etd,edf->tf", x, w)


@case(STACK, (3, 6, 8), normal(5, 6), jnp.array([2, 1, 2]))
def tokens_sorted_by_expert(w, x, sizes):
    return jax.lax.ragged_dot(x, w, sizes)


@case(STACK, (3, 6, 8), normal(5, 6), jnp.array([[0, 2], [1, 1], [2, 0], [0, 0], [1, 2]]))
def experts_gathered(w, x, chosen):
    return jnp.einsum("td,tkdf->tkf", x, w[chosen])


# ------------------------------------------------------------------- look-ups, convolutions


@case(DENSE, (9, 8), jnp.array([[1, 2], [8, 0]]))
def look_up(w, ids):
    return w[ids]


@case(DENSE, (9, 8), jnp.array([[1, 2], [8, 0]]))
def take(w, ids):
    return jnp.take(w, ids, axis=0)


@case(DENSE, (9, 8), jnp.array([1, 2, 7, 0]))
def columns_looked_up(w, ids):
    return jnp.take(w, ids, axis=1)


@case(DENSE, (9, 8), jnp.array([[1, 2], [8, 0]]))
def tied(w, ids):
    return jnp.sin(w[ids]) @ w.T


@case(DENSE, (9, 8), jnp.array([[1, 2], [8, 0]]))
def one_hot(w, ids):
    return jax.nn.one_hot(ids, 9) @ w


@case(MatrixView(rows=(0, 1), cols=(2,)), (3, 4, 6), normal(2, 7, 4))
def convolution(w, x):
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@case(MatrixView(rows=(1, 2, 3), cols=(0,)), (6, 4, 3, 2), normal(3, 4, 7, 5))
def convolution_of_torch(w, x):
    return jax.lax.conv_general_dilated(
        x, w, (2, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


@case(MatrixView(rows=(0, 1), cols=(2,)), (3, 4, 6), normal(2, 4, 4))
def convolution_transposed(w, x):
    return jax.lax.conv_transpose(x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


# ----------------------------------------------------------------------------------- calls


@case(STACK, (3, 6, 6), normal(2, 6))
def scan(w, x):
    return jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, w)[0]


@case(MatrixView(batch=(1,), rows=(0,), cols=(2,)), (6, 3, 6), normal(2, 6))
def scan_of_another_axis(w, x):
    return jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, w.transpose(1, 0, 2))[0]


@case(STACK, (4, 6, 6), normal(2, 6))
def scan_in_a_scan(w, x):
    def outer(c, group):
        return jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), c, group)

    return jax.lax.scan(outer, x, w.reshape(2, 2, 6, 6))[0]


@case(STACK, (3, 6, 6), normal(2, 6))
def scan_that_hands_its_layers_back(w, x):
    y, same = jax.lax.scan(lambda c, w: (jnp.sin(c @ w), w), x, w)
    return y @ same[0]


@case(STACK, (3, 6, 6), normal(2, 6))
def remat_in_a_scan(w, x):
    policy = jax.checkpoint_policies.dots_saveable
    body = jax.checkpoint(lambda c, w: (jnp.sin(c @ w), None), policy=policy)
    return jax.lax.scan(body, x, w)[0]


@case(DENSE, (6, 6), normal(4, 3, 6))
def shared_by_a_scan(w, x):
    return jax.lax.scan(lambda c, x: (jnp.sin(c @ w + x), c @ w), x[0], x)[1]


@case(DENSE, (6, 6), normal(3, 6))
def cond(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w.T)


@case(DENSE, (6, 6), normal(3, 6))
def carried(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, c: (jnp.sin(c[0] @ c[1]), c[1]), (x, w))[0]


@case(DENSE, (6, 8), normal(3, 6))
def jit(w, x):
    return jax.jit(lambda w, x: x @ w)(w, x)


@case(DENSE, (6, 8), normal(3, 6))
def gradient_within(w, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x)


@jax.custom_jvp
def _own_rule(w, x):
    return x @ w


_own_rule.defjvps(lambda t, y, w, x: x @ t, lambda t, y, w, x: t @ w)


@case(DENSE, (6, 8), normal(3, 6))
def custom_jvp(w, x):
    return _own_rule(w, x)


@jax.custom_vjp
def registered(w, x):
    return x @ w


registered.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, dy: (r[1].T @ dy, dy @ r[0].T))
lrx.adapters.rule(registered, lambda w, x: x @ w)


@case(DENSE, (6, 8), normal(3, 6))
def a_registered_call(w, x):
    return registered(w, x)
