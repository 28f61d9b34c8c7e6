"""APOLLO with singular vectors, at its own rank, against a float64 reference written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, DECAY, PERIOD, LIMIT, B1, B2, EPS = 9, 0.02, 0.1, 4, 1.01, 0.9, 0.999, 1e-6


def apollo(w, grads, rank, tensor, scale):
    """The weight `(s, k)` after the gradients, with `rank` singular vectors."""
    m, v, previous = 0.0, 0.0, None
    axis = None if tensor else 0
    for t, g in enumerate(grads):
        if t % PERIOD == 0:
            p = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
            # moments outlive a refresh, so signs matter: the largest entry of a vector is positive
            p = p * np.sign(p[np.abs(p).argmax(axis=0), np.arange(rank)])
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        n = m / (np.sqrt(v) + EPS)
        ratio = np.linalg.norm(n, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        s = np.sqrt(scale) * g * ratio
        norm = np.linalg.norm(s)
        if previous is not None and norm > LIMIT * previous:
            s, norm = s * LIMIT * previous / norm, LIMIT * previous
        previous = norm
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = (w - RATE * correction * s) * (1 - RATE * DECAY)
    return w


def gradients(generator, shape):
    """Singular values far apart, so that the vectors are defined up to sign."""
    spread = np.geomspace(4, 0.1, min(shape[-2:]))
    for _ in range(STEPS):
        u, _, vt = np.linalg.svd(generator.normal(size=shape), full_matrices=False)
        yield (u * spread) @ vt


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "make, rank, tensor, scale",
    [(lrx.apollo, 2, False, 1), (lrx.apollo_mini, 1, True, 128)],
    ids=["apollo", "mini"],
)
def test_apollo_with_singular_vectors_is_numpys(make, rank, tensor, scale, turned):
    """A stack of two matrices; an eighth of 16 is rank 2."""
    generator = np.random.default_rng(0)
    shape = (2, 24, 16) if turned else (2, 16, 24)
    flip = (lambda x: np.swapaxes(x, -1, -2)) if turned else (lambda x: x)
    weight, grads = generator.normal(size=shape), np.stack([*gradients(generator, shape)])
    views = lrx.Views(stacked=("kernel",))
    options = {"projection": "svd", "refresh_every": PERIOD, "weight_decay": DECAY}
    tx = make(RATE, views=views, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    assert state.projection.matrices["kernel"].basis.shape == (2, 16, rank)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    moved = flip(np.asarray(params["kernel"]) - weight)
    for layer in range(2):
        start = flip(weight)[layer]
        want = apollo(start, flip(grads)[:, layer], rank, tensor, scale)
        np.testing.assert_allclose(moved[layer], want - start, rtol=1e-3, atol=2e-5)


def test_the_rank_of_its_own_is_an_eighth():
    assert lrx.apollo(1e-2).projection.projector == lrx.projectors.random(rank=0.125)
    assert lrx.apollo(1e-2, rank=0.25).projection.projector == lrx.projectors.random(rank=0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"projection": "qr"}, r"apollo: projection='qr' must be one of \['random', 'svd'\]"),
        (
            {"projection": "svd", "projector": lrx.projectors.dct(rank=2)},
            "apollo: projection='svd' and projector=.* both fix the basis",
        ),
        ({"rank": 2, "projector": lrx.projectors.dct(rank=2)}, "both fix the rank"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.apollo(1e-2, **options)
