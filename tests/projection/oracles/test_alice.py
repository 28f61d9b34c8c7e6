"""Alice against a float64 reference written from its Algorithms 2 to 4, in (in, out) layout, given
the directions that are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, LEADING, EVERY, DECAY = 9, 0.02, 3, 2, 3, 0.1
DEFAULTS = {"scale": 0.3, "compensation": 0.4, "limiter": 1.01, "b1": 0.9, "b2": 0.9, "b3": 0.999}


def alice(w, grads, bases, scale, compensation, limiter, b1, b2, b3):
    """The weight `(s, k)`, s the smaller, after all steps; `bases[t] (s, r)` serves at step t, and
    its leading columns are compared on the way."""
    s, k = w.shape
    m, v, p, phi = np.zeros((RANK, k)), np.zeros((RANK, k)), np.zeros(k), 0.0
    c = np.zeros((RANK, RANK))
    for t, (g, u) in enumerate(zip(grads, bases, strict=True), 1):
        if t == 1:
            expected = np.linalg.svd(g)[0]
        elif t % EVERY == 0:
            a = b3 * old @ c @ old.T + (1 - b3) * g @ g.T  # noqa: F821
            q = np.linalg.qr(a @ old)[0]  # noqa: F821
            expected = q @ np.linalg.eigh(q.T @ a @ q)[1][:, ::-1]
        cosines = np.abs(np.sum(expected[:, :LEADING] * u[:, :LEADING], axis=0))
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
        np.testing.assert_allclose(u.T @ u, np.eye(RANK), atol=1e-5)
        old = u  # noqa: F841
        r = u.T @ g
        c = b3 * c + (1 - b3) * r @ r.T
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        p = b1 * p + (1 - b1) * (np.sum(g**2, axis=0) - np.sum(r**2, axis=0))
        extra = np.sqrt(s - RANK) * (g - u @ r) @ np.diag(p**-0.5)
        eta = 1.0
        if phi > 0 and limiter:
            eta = limiter / max(np.linalg.norm(extra) / phi, limiter)
        phi = np.linalg.norm(eta * extra)
        step = u @ (m / np.sqrt(v)) + compensation * eta * extra
        w = (1 - RATE * DECAY) * w - RATE * scale * step
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


@pytest.mark.parametrize(
    "shape, options",
    [
        ((6, 10), {}),
        ((10, 6), {"b3": 0.0, "limiter": None}),
        (
            (6, 10),
            {"b1": 0.5, "b2": 0.7, "b3": 0.6, "scale": 0.5, "compensation": 0.1, "limiter": 1.1},
        ),
    ],
)
def test_alice_is_numpys(shape, options):
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    given = {"rank": RANK, "leading": LEADING, "refresh_every": EVERY, "weight_decay": DECAY}
    got, bases = run(lrx.alice(RATE, **given | options), weight, grads)
    flip = (lambda x: x) if shape[0] < shape[1] else np.transpose
    want = alice(flip(weight), [flip(g) for g in grads], bases, **DEFAULTS | options)
    np.testing.assert_allclose(got - weight, flip(want) - weight, rtol=1e-3, atol=2e-5)
    moved = [t for t in range(1, STEPS) if not np.array_equal(bases[t], bases[t - 1])]
    assert moved == [t for t in range(1, STEPS) if (t + 1) % EVERY == 0]


def test_a_gradient_inside_of_the_subspace_needs_no_compensation():
    """Rounding is not divided by its own size; at full rank and of zeros nothing is there."""
    generator = np.random.default_rng(1)
    g = jnp.asarray(generator.normal(size=(6, 2)) @ generator.normal(size=(2, 10)), jnp.float32)
    for rank, gradient in ((2, g), (6, g), (2, 0 * g)):
        updates = []
        for compensation in (0.0, 0.4):
            tx = lrx.alice(RATE, rank=rank, leading=2, compensation=compensation)
            state = tx.init({"kernel": g})
            updates.append(tx.update({"kernel": gradient}, state, {"kernel": g})[0]["kernel"])
        np.testing.assert_allclose(updates[1], updates[0], atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"leading": 0}, "switching: leading=0 must be a positive integer, or a fraction"),
        ({"leading": 1.5}, r"switching: leading=1\.5 must be"),
        ({"b3": 1.0}, r"switching: b=1\.0 must be"),
        ({"limiter": 0.5}, r"compensated: limiter=0\.5 must be .*None for no limit"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.alice(1e-2, rank=4, **options)
    with pytest.raises(ValueError, match="leading=5 exceeds 4, the rank of 'kernel'"):
        lrx.alice(1e-2, rank=4, leading=5).init({"kernel": jnp.ones((8, 12))})
