"""The Cayley transform against a float64 inverse, its derivatives, and what the program of OFT is
made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import linalg


def skew(seed, *shape, scale=1.0):
    upper = np.triu(np.random.default_rng(seed).normal(size=shape), 1) * scale
    return (upper - np.swapaxes(upper, -1, -2)).astype(np.float32)


def by_inverse(q):
    q, eye = np.asarray(q, np.float64), np.eye(q.shape[-1])
    return (eye - q) @ np.linalg.inv(eye + q)


@pytest.mark.parametrize("size", [1, 2, 3, 32])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 1.0, 10.0])
def test_it_is_the_inverse_in_float64_and_orthogonal(size, scale):
    q = skew(0, 4, size, size, scale=scale)
    found = np.asarray(linalg.cayley(q), np.float64)
    np.testing.assert_allclose(found, by_inverse(q), atol=1e-6)
    np.testing.assert_allclose(
        found @ np.swapaxes(found, 1, 2), np.broadcast_to(np.eye(size), found.shape), atol=2e-6
    )
    if scale == 0:
        np.testing.assert_array_equal(found, np.broadcast_to(np.eye(size), found.shape))


def test_derivatives_of_both_directions_are_those_of_a_solve():
    q, direction, weights = (
        skew(0, 2, 6, 6),
        skew(1, 2, 6, 6),
        np.cos(np.arange(72.0)).reshape(2, 6, 6),
    )
    eye = jnp.eye(6)
    solved = lambda q: jnp.linalg.solve(eye + q, eye - q)  # noqa: E731
    for function in (linalg.cayley, jax.vmap(linalg.cayley), jax.checkpoint(linalg.cayley)):
        for found, want in zip(
            jax.jvp(function, (q,), (direction,)), jax.jvp(solved, (q,), (direction,)), strict=True
        ):
            np.testing.assert_allclose(found, want, atol=2e-6)
        loss = lambda q, of: jnp.sum(weights * of(q) ** 2)  # noqa: E731
        np.testing.assert_allclose(
            jax.grad(loss)(q, function), jax.grad(loss)(q, solved), atol=2e-5
        )
    second = [
        jax.jvp(lambda q, of=of: jax.grad(loss)(q, of), (q,), (direction,))[1]
        for of in (linalg.cayley, solved)
    ]
    np.testing.assert_allclose(*second, atol=1e-4)


def test_a_step_of_oft_solves_no_system():
    """LAPACK took one block after the other: a step of OFT cost ten of LoRA."""
    params = {"kernel": jnp.ones((12, 8))}
    adaptation = lrx.adapt(params, lrx.adapters.oft(block=4), jax.random.key(0))

    def loss(train):
        return jnp.sum(
            lrx.matmul(
                jnp.ones((3, 12)), lrx.attach(params, adaptation.replace(train=train))["kernel"]
            )
            ** 2
        )

    program = str(jax.make_jaxpr(jax.grad(loss))(adaptation.train))
    assert (
        "lu" not in program.split()
        and "triangular_solve" not in program
        and "custom_linear_solve" not in program
    )
