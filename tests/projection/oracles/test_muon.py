"""Muon against a float64 reference by singular values, the recorded official traces, and optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

MUON = (3.4445, -4.7750, 2.0315)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(x, steps=5):
    """Muon's polynomial of the singular values."""
    a, b, c = MUON
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt


def momentum_steps(grads, momentum, nesterov):
    """Input of the iteration at every step."""
    m = np.zeros_like(grads[0])
    for g in grads:
        m = momentum * m + g
        yield g + momentum * m if nesterov else m


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6)])
def test_newton_schulz_is_numpys(shape, nesterov):
    """One matrix and a stack: the stack is its matrices one by one."""
    inner = lrx.inner.newton_schulz(momentum=0.8, nesterov=nesterov)
    grads = drawn(4, *shape)
    state = inner.init(jnp.zeros(shape))
    update = jax.jit(inner.update)
    for g, ahead in zip(grads, momentum_steps(grads, 0.8, nesterov), strict=True):
        direction, scale, state = update(jnp.asarray(g, jnp.float32), state)
        np.testing.assert_allclose(direction, orthogonal(ahead), atol=5e-4)
        assert np.all(np.asarray(scale) == 1)


def test_a_step_that_is_not_accepted_leaves_the_momentum():
    inner = lrx.inner.newton_schulz(mu_dtype=jnp.bfloat16)
    g = jnp.asarray(drawn(3, 5), jnp.float32)
    _, _, state = inner.update(g, inner.init(g))
    _, _, kept = inner.guarded(g * jnp.nan, state, ok=jnp.asarray(False))
    _, _, moved = inner.guarded(g, state, ok=jnp.asarray(True))
    assert kept.mu.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept.mu, state.mu)
    assert np.any(moved.mu != state.mu)


def muon(**options):
    return lrx.scale_by_projection(
        lrx.projectors.identity(),
        inner=lrx.inner.newton_schulz(**options),
        plain=lrx.inner.adam(),
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax_contrib_muon(nesterov):
    """optax averages (`(1 - b) m`) and corrects the bias, which the normalisation undoes.

    With Nesterov's step it corrects momentum and gradient by different counts, so that both agree
    when `b^t` is small.
    """
    steps = 3 if not nesterov else 400
    grads = {"kernel": jnp.asarray(drawn(steps, 6, 4), jnp.float32)}
    zeros = {"kernel": jnp.zeros((6, 4))}

    def last(tx):
        def body(state, g):
            update, state = tx.update(g, state, zeros)
            return state, update

        _, updates = jax.lax.scan(body, tx.init(zeros), grads)
        return np.asarray(updates["kernel"][-1])

    axes = {"kernel": optax.contrib.MuonDimensionNumbers()}
    peer = optax.contrib.scale_by_muon(nesterov=nesterov, weight_dimension_numbers=axes)
    np.testing.assert_allclose(last(muon(nesterov=nesterov)), last(peer), atol=2e-5)


@pytest.mark.parametrize("shape_factor", ["fan_ratio", "rms"])
def test_optax_contrib_muon_with_adamw_on_the_rest(shape_factor):
    """Matrices and vectors with decay, each with their own rate, in both of its shape factors."""
    params = {"kernel": jnp.asarray(drawn(6, 4), jnp.float32), "bias": jnp.ones(4)}
    grads = {"kernel": drawn(5, 6, 4, seed=1), "bias": drawn(5, 4, seed=2)}
    scale = {"fan_ratio": lrx.scales.fan_ratio(least=1.0), "rms": lrx.scales.rms(0.2)}
    common = {"nesterov": False, "weight_decay": 0.1}
    plain_rate = optax.linear_schedule(3e-3, 1e-3, 4)
    peer = optax.contrib.muon(
        0.02,
        adam_learning_rate=plain_rate,
        adam_b1=0.8,
        adam_b2=0.9,
        adam_weight_decay=0.1,
        consistent_rms={"rms": 0.2}.get(shape_factor),
        **common,
    )
    ours = lrx.muon(
        0.02,
        plain_learning_rate=plain_rate,
        scale=scale[shape_factor],
        b1=0.8,
        b2=0.9,
        **common,
    )

    def trained(tx):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        return jax.lax.scan(body, (params, tx.init(params)), steps)[0][0]

    chex.assert_trees_all_close(trained(ours), trained(peer), atol=1e-5)


def test_leaves_that_are_no_matrices_need_another_inner():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    tx = lrx.scale_by_projection(lrx.projectors.identity(), inner=lrx.inner.newton_schulz())
    with pytest.raises(ValueError, match=r"a leaf of shape \(6,\) is no matrix.*plain=lrx.inner"):
        tx.init(params)
    muon().init(params)
    for options, match in [({"momentum": 1.0}, "momentum=1.0"), ({"steps": 0}, "steps=0")]:
        with pytest.raises(ValueError, match=f"newton_schulz: {match}"):
            lrx.inner.newton_schulz(**options)
