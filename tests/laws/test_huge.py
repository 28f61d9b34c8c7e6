"""The law of one huge gradient: a step that is accepted makes no later one impossible.

Two ordinary steps, one whose gradient is too large by a factor, and six ordinary ones: the large
one may be refused, and none of the others is. Without a bound on what is accepted, factors and
errors grow to where squares overflow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lrx
from tests.adapters import pair_methods as pairs
from tests.laws import methods as m

SIZES = np.concatenate([np.geomspace(1e2, 1e16, 8), np.geomspace(3e16, 3e19, 25)]).astype(
    np.float32
)
ORDINARY = 6


def refused(transformation, params, gradients):
    """`(whether the huge step was refused, how many of the later ones, whether all is finite)`, for
    each size."""

    def step(carry, gradient):
        params, state = carry
        updates, state = transformation.update(gradient, state, params)
        skipped = optax.tree.get_all_with_path(state, "skipped")[0][1]
        return (optax.apply_updates(params, updates), state), skipped

    def run(size):
        sizes = jnp.ones(3 + ORDINARY).at[2].set(size)
        order = jnp.arange(3 + ORDINARY) % 3
        given = jax.tree.map(lambda g: g[order] * sizes.reshape(-1, *[1] * (g.ndim - 1)), gradients)
        last, skipped = jax.lax.scan(step, (params, transformation.init(params)), given)
        floats = [x for x in jax.tree.leaves(last) if jnp.issubdtype(x.dtype, jnp.floating)]
        return (
            skipped[2] - skipped[1],
            skipped[-1] - skipped[2],
            jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats])),
        )

    return jax.jit(lambda sizes: jax.lax.map(run, sizes), compiler_options=m.FAST_COMPILE)(SIZES)


def check(transformation, params, gradients):
    huge, later, finite = refused(transformation, params, gradients)
    assert huge[0] == 0
    assert huge[-1] == 1
    np.testing.assert_array_equal(later, 0)
    assert np.all(finite)


@m.every_method()
def test_projections(method):
    check(method.build(), m.params_like(), m.gradients())


@pairs.every
def test_pairs(name):
    check(pairs.build(name, rate=1.0, weight_decay=0.0), pairs.params_like(), pairs.gradients())


def test_altlora_from_the_start():
    """Its first steps: one factor is zero, the other is preconditioned by what is left of
    damping."""
    params = {"q": {"a": m.tree(0, shapes={"a": (16, 4)})["a"], "b": jnp.zeros((4, 16))}}
    gradients = {"q": m.tree(1, steps=3, shapes={"a": (16, 4), "b": (4, 16)})}
    check(lrx.altlora(1.0, scale=2.0), params, gradients)
