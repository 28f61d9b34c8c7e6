"""What becomes of the rest of the gradient: each rule against NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

RNG = np.random.default_rng(0)
G = RNG.normal(size=(3, 4, 6)).astype(np.float32)
ROWS = [0, 2]
PROJECTOR = lrx.projectors.columns(select=tuple(ROWS))


def _run(residual, inner, steps=2, **slots):
    transformation = lrx.scale_by_projection(PROJECTOR, residual=residual, inner=inner, **slots)
    state, updates = transformation.init(jnp.asarray(G[0])), []
    for g in G[:steps]:
        update, state = transformation.update(jnp.asarray(g), state)
        updates.append(np.asarray(update))
    return updates, state


def _kept(g):
    low = np.zeros_like(g)
    low[ROWS] = g[ROWS]
    return low


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_sign_and_sgd(scale):
    for g, sign, sgd, none in zip(
        G,
        *(
            _run(rule, optax.scale(3.0), scale=2.0)[0]
            for rule in (
                lrx.residuals.sign(scale=scale),
                lrx.residuals.sgd(scale=scale),
                lrx.residuals.discard(),
            )
        ),
        strict=False,
    ):
        rest = g - _kept(g)
        np.testing.assert_allclose(none, 6 * _kept(g), rtol=1e-6)
        np.testing.assert_allclose(sign, 6 * _kept(g) + scale * np.sign(rest), rtol=1e-6)
        np.testing.assert_allclose(sgd, 6 * _kept(g) + scale * rest, rtol=1e-6)


def _fed_back(**options):
    target = lrx.targets.error_feedback(**options)
    return _run(lrx.residuals.discard(), optax.identity(), target=target)


def test_error_feedback():
    (first, second), state = _fed_back()
    np.testing.assert_allclose(first, _kept(G[0]))
    np.testing.assert_allclose(second, _kept(G[1]))
    rest = [g - _kept(g) for g in G]
    np.testing.assert_allclose(state.matrices.target, rest[0] + rest[1], rtol=1e-6)
    _, state = _fed_back(dtype=jnp.bfloat16)
    assert state.matrices.target.dtype == jnp.bfloat16


def test_an_error_fed_back_by_its_old_spelling_is_the_target():
    with pytest.warns(DeprecationWarning, match="use lrx.targets.error_feedback"):
        old = lrx.residuals.error_feedback(dtype=jnp.bfloat16)
    target = lrx.targets.error_feedback(dtype=jnp.bfloat16)
    made = lrx.projection.Projection(projector=PROJECTOR, residual=old)
    assert made == lrx.projection.Projection(projector=PROJECTOR, target=target)
    with pytest.raises(ValueError, match="give one of them, as target="):
        lrx.projection.Projection(projector=PROJECTOR, residual=old, target=target)


def test_a_momentum_is_projected_and_its_projected_part_decays():
    """`K = M + G`, `M <- K - (1 - mu) up(down(K))`, which is the official code's form."""
    target = lrx.targets.momentum(mu=0.75)
    updates, state = _run(lrx.residuals.discard(), optax.identity(), steps=3, target=target)
    momentum = np.zeros((4, 6))
    for g, update in zip(G.astype(np.float64), updates, strict=True):
        projected = _kept(momentum + g)
        np.testing.assert_allclose(update, projected, rtol=1e-6)
        momentum = momentum + g - 0.25 * projected
    np.testing.assert_allclose(state.matrices.target, momentum, rtol=1e-5, atol=1e-6)


def test_a_momentum_is_not_clipped():
    with pytest.raises(ValueError, match="clip_norm=1.0: Momentum sums gradients up.*chain"):
        lrx.projection.Projection(projector=PROJECTOR, target=lrx.targets.momentum(), clip_norm=1.0)
    with pytest.raises(ValueError, match="momentum: mu=1.5 must be"):
        lrx.targets.momentum(mu=1.5)


@pytest.mark.parametrize("axis", ["channel", "tensor"])
@pytest.mark.parametrize("limiter", [None, 1.01])
def test_gradient_rescale(axis, limiter):
    """`f = |N| / |R|` with the uncorrected direction, the limiter on the norm before the bias
    correction."""
    scale, eps, b1, b2 = 1.5, 1e-6, 0.9, 0.999
    rule = lrx.residuals.gradient_rescale(axis=axis, scale=scale, limiter=limiter)
    updates, state = _run(rule, lrx.inner.adam(convention="hf", eps=eps), steps=3)
    m = v = np.zeros((2, 6))
    axes = 0 if axis == "channel" else None
    norm_before = None
    for t, (g, update) in enumerate(zip(G.astype(np.float64), updates, strict=True), 1):
        low = g[ROWS]
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        direction = m / (np.sqrt(v) + eps)
        rescaled = (
            scale
            * g
            * np.linalg.norm(direction, axis=axes)
            / (np.linalg.norm(low, axis=axes) + 1e-8)
        )
        if limiter is not None:
            norm = np.linalg.norm(rescaled)
            if norm_before is not None and norm > limiter * norm_before:
                rescaled *= limiter * norm_before / norm
            norm_before = np.linalg.norm(rescaled)
        np.testing.assert_allclose(
            update, np.sqrt(1 - b2**t) / (1 - b1**t) * rescaled, rtol=1e-4, atol=1e-6
        )
    if limiter is not None:
        np.testing.assert_allclose(state.matrices.residual, norm_before, rtol=1e-4)


def test_a_zero_gradient_at_the_start_does_not_silence_the_limiter():
    transformation = lrx.scale_by_projection(PROJECTOR, residual=lrx.residuals.gradient_rescale())
    _, state = transformation.update(jnp.zeros((4, 6)), transformation.init(jnp.asarray(G[0])))
    updates, state = transformation.update(jnp.asarray(G[0]), state)
    assert np.linalg.norm(updates) > 1
    assert float(state.matrices.residual) > 0
