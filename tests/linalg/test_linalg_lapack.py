"""On a CPU LAPACK is called on one matrix at a time: its calls on stacks wait for threads that they
may hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import linalg

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

RNG = np.random.default_rng(0)
STACK = jnp.asarray(RNG.normal(size=(2, 3, 24, 16)), jnp.float32)
SQUARE = STACK[..., :16, :] + 4 * jnp.eye(16)
CASES = {
    "truncated_svd": (lambda x: linalg.truncated_svd(x, 4), (STACK,)),
    "randomized_svd": (lambda x: linalg.randomized_svd(x, 8, jax.random.key(0)), (STACK,)),
    "svd_of_product": (linalg.svd_of_product, (STACK, jnp.swapaxes(STACK, -1, -2))),
    "qr_orthonormal": (linalg.qr_orthonormal, (STACK,)),
    "orthonormalize": (linalg.orthonormalize, (STACK,)),
    "its derivative": (jax.grad(lambda x: jnp.sum(jnp.sin(linalg.orthonormalize(x)))), (STACK,)),
    "power_step": (lambda x: linalg.power_step(x, jnp.ones((2, 3, 24, 16)) + STACK), (STACK,)),
    "eigh": (linalg.eigh, (SQUARE + jnp.swapaxes(SQUARE, -1, -2),)),
    "solve": (linalg.solve, (SQUARE, STACK[..., :16, :])),
}


def stacks_given_to_lapack(function, *arguments):
    """Leading axes of what each LAPACK call of the lowered program takes."""
    text = jax.jit(function).lower(*arguments).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    shapes = [re.search(r": \(tensor<([0-9x]*)xf32>", line).group(1) for line in calls]
    return [tuple(map(int, shape.split("x")))[:-2] for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_a_stack_goes_matrix_by_matrix_and_comes_out_the_same(name):
    function, stacks = CASES[name]
    given = stacks_given_to_lapack(function, *stacks)
    assert given and set(given) <= {(), (1,)}
    if name in (
        "its derivative",
        "power_step",
        "randomized_svd",
    ):  # one closes over its stack, others draw
        return
    together = jax.tree.leaves(function(*stacks))
    for i in np.ndindex(2, 3):
        alone = jax.tree.leaves(function(*(x[i] for x in stacks)))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def test_a_small_stack_goes_in_one_call():
    assert set(stacks_given_to_lapack(linalg.qr_orthonormal, jnp.ones((3, 8, 4)))) == {(3,)}


def test_several_stacks_in_one_program_come_to_an_end():
    """Seven calls at once on stacks that jaxlib would split: on two threads they waited for
    ever."""
    stacks = [jnp.asarray(RNG.normal(size=(4, 96, 64)), jnp.float32) for _ in range(7)]
    for q in jax.jit(lambda xs: [linalg.orthonormalize(x) for x in xs])(stacks):
        np.testing.assert_allclose(
            jnp.swapaxes(q, 1, 2) @ q, jnp.broadcast_to(jnp.eye(64), (4, 64, 64)), atol=1e-4
        )
