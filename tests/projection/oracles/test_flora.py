"""Flora against a float64 reference written from its rule, and its gradients summed in a subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, RANK, EVERY, DECAY = 8, 0.05, 3, 3, 0.1


def flora(w, grads, bases, b1, power, rms):
    """The weight `(s, k)` after all steps, s the smaller; `bases` one P `(s, r)` a step."""
    r, c, p = np.zeros(w.shape[0]), np.zeros(w.shape[1]), bases[0]
    m = np.zeros((RANK, w.shape[1]))
    for t, g in enumerate(grads):
        b2, squares = 1 - (t + 1.0) ** -power, g**2 + 1e-30
        r = b2 * r + (1 - b2) * squares.mean(axis=1)
        c = b2 * c + (1 - b2) * squares.mean(axis=0)
        u = g / np.sqrt(np.outer(r, c) / r.mean())
        if t % EVERY == 0:
            m = bases[t].T @ (p @ m)
            p = bases[t]
        d = b1 * p @ m + (1 - b1) * u
        m = b1 * m + (1 - b1) * p.T @ u
        if rms is not None:
            d = d / max(1, np.sqrt((d**2).mean()) / rms)
        w = (1 - RATE * DECAY) * w - RATE * d
    return w


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("options", [{}, {"b1": 0.5, "power": 0.5, "rms": None}, {"rms": 0.1}])
def test_flora_is_numpys(shape, options):
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    own = {"b1": 0.9, "power": 0.8, "rms": 1.0} | options
    tx = lrx.flora(RATE, rank=RANK, refresh_every=EVERY, weight_decay=DECAY, **options)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update, bases = tx.init(params), jax.jit(tx.update), []
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        matrix = state.projection.matrices["kernel"]
        basis = tx.projection.projector.columns(matrix.view, matrix.basis)
        bases.append(np.asarray(basis, np.float64))
    flip = np.transpose if shape[0] > shape[1] else lambda x: x
    want = flip(flora(flip(weight), [flip(g) for g in grads], bases, **own))
    np.testing.assert_allclose(params["kernel"] - weight, want - weight, rtol=1e-3, atol=5e-5)
    assert not np.allclose(bases[2], bases[3])
    np.testing.assert_array_equal(bases[3], bases[5])


def test_gradients_are_summed_in_the_subspace_of_a_cycle():
    """Flora's accumulation: up(mean of down(G_i)), whose basis changes with every update."""
    generator = np.random.default_rng(3)
    w, x = generator.normal(size=(6, 10)), generator.normal(size=(3, 4, 5, 6))
    tx = lrx.scale_by_projection(
        lrx.projectors.random(rank=RANK),
        inner=optax.identity(),
        refresh_schedule=lrx.refresh_schedules.every_step(when="after"),
    )
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    state, bases = tx.init(params), []

    @jax.jit
    def update(params, state, batches):
        loss = lambda params, x: jnp.sum(jnp.sin(x @ params["kernel"]))  # noqa: E731
        taps = lrx.taps(state)
        _, grads = lrx.projected_value_and_grad(loss, taps, accumulate=4)(params, batches)
        return grads["kernel"].low, *tx.update(grads, state, params, taps=taps)

    for batches in x:
        matrix = state.matrices["kernel"]
        p = np.asarray(tx.projection.projector.columns(matrix.view, matrix.basis), np.float64)
        bases.append(p)
        low, updates, state = update(params, state, jnp.asarray(batches, jnp.float32))
        packs = sum(p.T @ (one.T @ np.cos(one @ w)) for one in batches) / 4
        np.testing.assert_allclose(low, packs, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(updates["kernel"], p @ packs, rtol=1e-3, atol=1e-5)
    # what is drawn at the first step is what was there
    assert not np.allclose(bases[1], bases[2])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lrx.flora(1e-2, rank=4, rms=0.0), r"sgd: rms=0\.0 must be .*None for no limit"),
        (lambda: lrx.flora(1e-2, rank=4, power=-1.0), r"adafactor: power=-1\.0"),
        (lambda: lrx.flora(1e-2, rank=4, refresh_every=0), "period=0"),
        (
            lambda: lrx.targets.preconditioned(inner=lrx.inner.row_column_scaled()),
            "preconditioned: inner=.* must work on one matrix",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
