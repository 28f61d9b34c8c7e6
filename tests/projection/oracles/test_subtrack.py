"""SubTrack++ against a float64 reference written from its equations, in (in, out) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, EVERY, TURN, B1, B2, EPS = 9, 0.02, 3, 3, 0.02, 0.9, 0.999, 1e-6


def geodesic(p, g, step_size):
    """The basis after one turn: the full tangent, its leading triple, and the exponential map."""
    a = np.linalg.lstsq(p, g, rcond=None)[0]
    tangent = (np.eye(len(p)) - p @ p.T) @ (-2 * (g - p @ a) @ a.T)
    u, sigma, vt = np.linalg.svd(tangent, full_matrices=False)
    u, v, angle = u[:, :1], vt[:1].T, sigma[0] * step_size
    turned = np.hstack([p @ v, -u]) @ np.array([[np.cos(angle)], [np.sin(angle)]]) @ v.T
    return turned + p @ (np.eye(RANK) - v @ v.T)


def subtrack(w, grads, scale=0.25, removed=1.0, limiter=1.01, turn=lambda t: TURN):
    """The weight `(s, k)`, s the smaller, after all steps."""
    m, v, previous = np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1])), None
    for t, g in enumerate(grads):
        if t == 0:
            p = np.linalg.svd(g)[0][:, :RANK]
        elif t % EVERY == 0:
            new = geodesic(p, g, turn(t))
            c, mean = new.T @ p, m / (1 - B1**t)
            v = (1 - B2**t) * np.abs(c**2 @ (v / (1 - B2**t) - mean**2) + (c @ mean) ** 2)
            p, m = new, c @ m
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        n = m / (np.sqrt(v) + EPS)
        f = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        s = (g - removed * p @ r) * f
        size = np.linalg.norm(s)
        if previous is not None and limiter:
            growth = max(size / (previous + 1e-8), limiter) / limiter
            s, size = s / growth, size / growth
        previous = size
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = (w - RATE * correction * (scale * p @ n + s)) * (1 - RATE * 0.1)
    return w


def run(tx, weight, grads):
    """The weight after all steps, and the basis of each."""
    params, bases = {"kernel": jnp.asarray(weight, jnp.float32)}, []
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        bases.append(np.asarray(state.projection.matrices["kernel"].basis, np.float64))
    return np.asarray(params["kernel"]), bases


OTHERS = {"form": "code", "limiter": None, "scale": 0.5, "step_size": lambda step: 0.1 / step}
CASES = {
    "wide": ((6, 10), {}, {}),
    "tall": ((10, 6), {}, {}),
    "others": (
        (6, 10),
        OTHERS,
        {"removed": 0.5, "limiter": None, "scale": 0.5, "turn": lambda t: 0.1 / t},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_subtrack_is_numpys_on_both_sides(case):
    """Of both orientations the basis turns, by the same rule."""
    shape, options, of_reference = CASES[case]
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    given = {"rank": RANK, "refresh_every": EVERY, "step_size": TURN, "weight_decay": 0.1}
    got, bases = run(lrx.subtrack(RATE, **given | options), weight, grads)
    flip = (lambda x: x) if shape[0] < shape[1] else np.transpose
    want = flip(subtrack(flip(weight), [flip(g) for g in grads], **of_reference))
    np.testing.assert_allclose(got - weight, want - weight, rtol=1e-3, atol=2e-5)
    turns = [np.linalg.norm(bases[t].T @ bases[t - 1], 2) for t in range(1, STEPS)]
    cosines = [np.linalg.svd(bases[t].T @ bases[t - 1])[1][-1] for t in range(1, STEPS)]
    np.testing.assert_allclose(turns, 1, atol=1e-5)
    assert [cosine < 0.999 for cosine in cosines] == [t % EVERY == 0 for t in range(1, STEPS)]


def test_a_turn_descends_and_keeps_columns_orthonormal():
    """Small steps capture more of the gradient; hundreds of large ones do not wear a basis out."""
    generator = np.random.default_rng(1)
    g = jnp.asarray(generator.normal(size=(3, 8, 12)), jnp.float32)
    view = lrx.resolution.resolve(
        {"kernel": g}, lrx.Views(stacked=("kernel",)), rank=lambda *_: RANK
    ).projected[0]
    basis, _ = lrx.projectors.random(rank=RANK, kind="orthonormal").init(
        view, jax.random.split(jax.random.key(0), 3)
    )
    inputs = lrx.projectors.RefreshInputs(target=g, step=1)
    small, large = (lrx.projectors.grassmann(rank=RANK, step_size=x) for x in (1e-3, 3.0))
    moved, _ = small.refresh(view, basis, (), inputs)
    assert jnp.all(small.measure(view, moved, g) > small.measure(view, basis, g) + 1e-3)
    step = jax.jit(lambda basis: large.refresh(view, basis, (), inputs)[0])
    for _ in range(300):
        basis = step(basis)
    gram = jnp.einsum("...sr,...sq->...rq", basis, basis)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-5)


def test_a_gradient_inside_of_the_subspace_leaves_it():
    """Also at full rank, and where the gradient is zero: rounding is no direction."""
    generator = np.random.default_rng(2)
    for s, rank in ((8, RANK), (4, 4)):
        inside = np.linalg.qr(generator.normal(size=(s, rank)))[0]
        g = jnp.asarray(inside @ generator.normal(size=(rank, 12)), jnp.float32)
        projector = lrx.projectors.grassmann(rank=rank, step_size=1e4)
        view = lrx.resolution.resolve({"kernel": g}, rank=projector.rank_for).projected[0]
        basis = jnp.asarray(inside, jnp.float32)
        for target in (g, jnp.zeros_like(g)):
            inputs = lrx.projectors.RefreshInputs(target=target, step=1)
            moved, _ = projector.refresh(view, basis, (), inputs)
            np.testing.assert_allclose(moved, basis, atol=1e-6)


def test_a_negative_step_size_is_refused():
    with pytest.raises(ValueError, match=r"grassmann: step_size=-1\.0 must be .*at least 0"):
        lrx.subtrack(1e-3, rank=4, step_size=-1.0)
