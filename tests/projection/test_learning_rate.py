"""Learning rate and decoupled decay against the two loops they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

W = {"a": np.array([2.0, -4.0], np.float32), "b": np.array([1.0], np.float32)}
U = {"a": np.array([1.0, 3.0], np.float32), "b": np.array([-1.0], np.float32)}


@pytest.mark.parametrize("decay", ["before", "after"])
@pytest.mark.parametrize(
    "mask", [None, {"a": True, "b": False}, lambda params: {"a": True, "b": False}]
)
def test_two_steps(decay, mask):
    schedule = lambda count: 0.1 / (1 + count)  # noqa: E731
    transformation = lrx.apply_learning_rate(schedule, 0.5, decay=decay, mask=mask)
    params, state = jax.tree.map(jnp.asarray, W), transformation.init(W)
    expected = dict(W)
    for step in range(2):
        updates, state = transformation.update(U, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 / (1 + step)
        for name in expected:
            wd = 0.5 if mask is None or name == "a" else 0.0
            if decay == "before":
                expected[name] = (1 - rate * wd) * expected[name] - rate * U[name]
            else:
                expected[name] = (1 - rate * wd) * (expected[name] - rate * U[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)
    assert int(state.count) == 2


def test_a_refused_step_neither_decays_nor_counts():
    transformation = lrx.apply_learning_rate(0.1, 0.5)
    zero = jax.tree.map(np.zeros_like, U)
    updates, state = jax.jit(transformation.update)(
        zero, transformation.init(W), W, accepted=jnp.asarray(False)
    )
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert int(state.count) == 0


def test_dtype_and_params():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), U)
    updates, _ = lrx.apply_learning_rate(jnp.float32(0.1)).update(
        half, lrx.apply_learning_rate(0.1).init(None)
    )
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="needs params"):
        lrx.apply_learning_rate(0.1, 0.5).update(U, lrx.apply_learning_rate(0.1).init(None))
    with pytest.raises(ValueError, match="decay='during'"):
        lrx.apply_learning_rate(0.1, decay="during")
    with pytest.raises(ValueError, match="weight_decay=-1"):
        lrx.apply_learning_rate(0.1, -1)
