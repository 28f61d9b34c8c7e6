"""Rank and period schedules against float64 references: GaLore whose basis has fewer vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, SCALE, RANK, EVERY, B1, B2, EPS = 9, 0.02, 0.25, 4, 2, 0.9, 0.999, 1e-6
K, P = lrx.rank_schedules, lrx.projectors


def first(number):
    return np.arange(RANK) < number


def by_decay(t, layer, u, g):
    gone = min(max((t - 1) / 4, 0), 1)
    return first(round((1 - 0.75 * gone) * RANK))


def by_cosine(t, layer, u, g):
    gone = (1 - np.cos(np.pi * min(t / 6, 1))) / 2
    return first(round((1 - 0.5 * gone) * RANK))


def by_layer(t, layer, u, g):
    return first([4, 2, 1][layer])


def by_energy(t, layer, u, g):
    own, chosen = np.sum((u.T @ g) ** 2, axis=1), np.zeros(RANK, bool)
    for j in np.argsort(-own):
        if own[chosen].sum() < 0.6 * np.sum(g**2) or chosen.sum() < 1:
            chosen[j] = True
    return chosen


SCHEDULES = {
    "decay": (K.decay(steps=4, to=0.25, begin=1), by_decay),
    "cosine": (K.decay(steps=6, to=0.5, shape="cosine"), by_cosine),
    "by layer": (K.by_layer(shares=(1, 0.5, 0.25)), by_layer),
    "energy": (K.energy(share=0.6), by_energy),
}


def galore(w, grads, layer, serving, due):
    """The weight `(s, k)` after all steps, s the smaller, and the number of vectors at each."""
    m, v, numbers = np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1])), []
    for t, g in enumerate(grads):
        if due(t):
            u = np.linalg.svd(g)[0][:, :RANK]
            u = u * np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(RANK)])
            serves = serving(t, layer, u, g)
            p = u * serves
            m[~serves], v[~serves] = 0, 0
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = w - RATE * SCALE * correction * p @ (m / (np.sqrt(v) + EPS))
        numbers.append(int(serves.sum()))
    return w, numbers


def problem(shape):
    """Weights, and gradients whose rank falls with the steps."""
    generator = np.random.default_rng(0)
    grads = generator.normal(size=(STEPS, *shape))
    for t in range(STEPS):
        u, s, vt = np.linalg.svd(grads[t], full_matrices=False)
        grads[t] = (u * s[..., None, :] * 0.8 ** (t * np.arange(s.shape[-1]))) @ vt
    return generator.normal(size=shape), grads


def run(tx, weight, grads):
    """`(weight after all steps, states)`."""
    params, states = {"kernel": jnp.asarray(weight, jnp.float32)}, []
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        states.append(state.projection.matrices["kernel"])
    return np.asarray(params["kernel"]), states


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6)])
def test_a_rank_schedule_is_numpys(shape, name):
    schedule, serving = SCHEDULES[name]
    weight, grads = problem(shape)
    projector = P.ranked(projector=P.svd(rank=RANK), schedule=schedule)
    views = lrx.Views(stacked=("kernel",))
    tx = lrx.galore(RATE, projector=projector, refresh_every=EVERY, views=views)
    got, states = run(tx, weight, grads)
    flip = np.transpose if shape[1] > shape[2] else lambda x: x
    counts = []
    for layer in range(3):
        own = [flip(g[layer]) for g in grads]
        want, numbers = galore(flip(weight[layer]), own, layer, serving, lambda t: t % EVERY == 0)
        change = flip(got[layer]) - flip(weight[layer])
        np.testing.assert_allclose(change, want - flip(weight[layer]), rtol=1e-3, atol=2e-5)
        counts.append(numbers)
    serves = np.stack([np.asarray(state.basis["serves"]) for state in states])
    np.testing.assert_array_equal(serves.sum(axis=-1).T, counts)
    assert len({number for numbers in counts for number in numbers}) > 1
    # moments of vectors that do not serve are zero, of all others not
    for state, served in zip(states, serves, strict=True):
        for moment in (state.inner.mu, state.inner.nu):
            np.testing.assert_array_equal(np.any(np.asarray(moment) != 0, axis=-1), served)


def test_a_vector_that_serves_again_begins_without_moments():
    """Whatever the transport: one that keeps them all would bring back those of long ago."""
    projector = P.ranked(projector=P.svd(rank=2), schedule=K.energy(share=0.9))
    tx = lrx.scale_by_projection(
        projector,
        inner=lrx.inner.adam(b2=0.5),
        refresh_schedule=lrx.refresh_schedules.every_step(),
    )
    one, two = np.zeros((4, 6)), np.zeros((4, 6))
    one[0, 0], two[0, 0], two[1, 1] = 1, 1.1, 1
    params = {"kernel": jnp.zeros((4, 6))}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad, expected in ((two, 2), (one, 1), (two, 2)):
        _, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        matrix = state.matrices["kernel"]
        assert int(matrix.basis["serves"].sum()) == expected
    np.testing.assert_allclose(np.abs(matrix.inner.mu[1]), [0, 0.1, 0, 0, 0, 0], atol=1e-6)


def test_what_does_not_serve_belongs_to_the_rest():
    x = jax.random.normal(jax.random.key(0), (6, 10))
    whole = P.dct(rank=4)
    projector = P.ranked(projector=whole, schedule=K.decay(steps=1, to=0.5))
    view = lrx.resolution.resolve(x, rank=projector.rank_for).projected[0]
    inputs = P.RefreshInputs(target=x, step=jnp.int32(5))
    made = projector.init(view, jax.random.key(0))
    basis, _ = projector.refresh(view, *made, inputs)
    low = projector.down(view, basis, x)
    own = whole.down(view, basis["basis"], x)
    np.testing.assert_allclose(low, own.at[2:].set(0), atol=1e-6)
    rest = x - whole.up(view, basis["basis"], own.at[2:].set(0))
    np.testing.assert_allclose(projector.rest(view, basis, x, low), rest, atol=1e-6)
    share = jnp.sum(jnp.square(own[:2])) / jnp.sum(jnp.square(x))
    np.testing.assert_allclose(projector.measure(view, basis, x), share, rtol=1e-5)


@pytest.mark.parametrize("periods", [((0, 2), (5, 4)), ((0, 1), (3, 3), (4, 2))])
def test_a_period_schedule_is_numpys(periods):
    def due(t):
        begin, period = [pair for pair in periods if pair[0] <= t][-1]
        return (t - begin) % period == 0

    weight, grads = problem((6, 10))
    schedule = lrx.refresh_schedules.piecewise(periods=dict(periods))
    tx = lrx.galore(RATE, rank=RANK, refresh_schedule=schedule)
    got, states = run(tx, weight, grads)
    want, _ = galore(weight, grads, 0, lambda *args: first(RANK), due)
    np.testing.assert_allclose(got - weight, want - weight, rtol=1e-3, atol=2e-5)
    bases = [np.asarray(state.basis) for state in states]
    moved = [t for t in range(1, STEPS) if np.any(bases[t] != bases[t - 1])]
    assert moved == [t for t in range(1, STEPS) if due(t)]


SVD = P.svd(rank=4)
GIVEN = {"projector": SVD, "schedule": K.energy(share=0.9)}


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: P.ranked(projector=P.svd_two_sided(rank=4), schedule=K.energy(share=1)),
            "on one side",
        ),
        (lambda: P.ranked(projector=P.columns(rank=4), schedule=K.energy(share=1)), "on one side"),
        (
            lambda: P.ranked(projector=P.given(matrix=np.eye(6, 4)), schedule=K.energy(share=1)),
            "move it",
        ),
        (lambda: P.ranked(projector=P.ranked(**GIVEN), schedule=K.energy(share=1)), "on one side"),
        (
            lambda: P.ranked(projector=P.power(rank=4, first="svd"), schedule=K.energy(share=1)),
            "the first basis of Power is another computation",
        ),
        (lambda: P.ranked(projector=SVD, schedule=0.5), r"schedule=0\.5 must be one of"),
        (
            lambda: P.ranked(projector=P.random(rank=4), schedule=K.energy(share=1)),
            "not orthonormal",
        ),
        (lambda: K.energy(share=1.5), r"energy: share=1\.5 must be a share in \(0, 1\]"),
        (lambda: K.energy(share=1, least=0), "energy: least=0"),
        (lambda: K.decay(steps=0, to=0.5), "decay: steps=0"),
        (lambda: K.decay(steps=9, to=0.0), r"decay: to=0\.0"),
        (lambda: K.decay(steps=9, to=0.5, begin=-1), "decay: begin=-1"),
        (lambda: K.decay(steps=9, to=0.5, shape="step"), "decay: shape='step' must be"),
        (lambda: K.by_layer(shares=()), "at least one share"),
        (lambda: K.by_layer(shares=(1, 2)), "by_layer: shares=2 must be a share"),
        (lambda: lrx.refresh_schedules.piecewise(periods=()), "must begin at step 0"),
        (lambda: lrx.refresh_schedules.piecewise(periods=((1, 2),)), "must begin at step 0"),
        (lambda: lrx.refresh_schedules.piecewise(periods=((0, 2), (0, 3))), "and ascend"),
        (lambda: lrx.refresh_schedules.piecewise(periods={0: 0}), "period=0"),
        (
            lambda: lrx.scale_by_projection(P.ranked(**GIVEN), inner=lrx.inner.adafactor()).init(
                {"kernel": jnp.ones((6, 10))}
            ),
            "projector Ranked does not know how to move .*factored.*lrx.inner.adam",
        ),
        (
            lambda: lrx.scale_by_projection(
                P.ranked(projector=SVD, schedule=K.by_layer(shares=(1, 0.5))),
                sampler=lrx.samplers.lisa(active=1, period=2),
            ),
            "projector Ranked: the layers of a stack differ by their numbers",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
