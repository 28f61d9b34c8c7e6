"""GoLore against a float64 reference written from its algorithm, in (in, out) layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, SCALE, RANK, EVERY, SWITCH, B1, B2, EPS = 9, 0.02, 0.25, 3, 2, 5, 0.9, 0.999, 1e-6


def golore(w, grads, random):
    """The weight `(s, k)`, s the smaller, after all steps; `random {step: P (s, r)}`."""
    p, m, v = None, np.zeros((RANK, w.shape[1])), np.zeros((RANK, w.shape[1]))
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            new = random[t] if t >= SWITCH else np.linalg.svd(g)[0][:, :RANK]
            if t < SWITCH:  # signs as a convention: the largest entry of a vector is positive
                new = new * np.sign(new[np.argmax(np.abs(new), axis=0), np.arange(RANK)])
            m = m if p is None else new.T @ p @ m
            p = new
        r = p.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        correction = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        w = w - RATE * SCALE * correction * p @ (m / (np.sqrt(v) + EPS))
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


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    return generator.normal(size=(6, 10)), generator.normal(size=(STEPS, 6, 10))


def test_golore_is_numpys_across_the_switch(problem):
    weight, grads = problem
    tx = lrx.golore(RATE, rank=RANK, refresh_every=EVERY, random_from=SWITCH)
    got, bases = run(tx, weight, grads)
    want = golore(weight, grads, dict(enumerate(bases)))
    np.testing.assert_allclose(got - weight, want - weight, rtol=1e-3, atol=2e-5)
    for t, basis in enumerate(bases):  # all are orthonormal, and from the switch on see no data
        np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-5)
        u = np.linalg.svd(grads[t - t % EVERY])[0][:, :RANK]
        captured = np.linalg.norm(u.T @ basis) ** 2
        assert captured > RANK - 1e-4 if t < SWITCH + 1 else captured < RANK - 0.1
    assert not np.allclose(bases[6], bases[8])


def test_a_step_known_while_tracing_leaves_one_projector_in_the_program(problem):
    """And one that is not leaves both, with the same bases."""
    first, then = lrx.projectors.svd(rank=2), lrx.projectors.random(rank=2, kind="orthonormal")
    switch = lrx.projectors.switch(at=3, first=first, then=then)
    g = jnp.asarray(problem[1][0], jnp.float32)
    view = lrx.resolution.resolve(g, rank=switch.rank_for).projected[0]
    key = jax.random.key(1)
    basis, memory = switch.init(view, key)

    def refresh(step):
        inputs = lrx.projectors.RefreshInputs(target=g, key=key, step=step)
        return switch.refresh(view, basis, memory, inputs)[0]

    for step, own in ((2, first), (3, then)):
        inputs = lrx.projectors.RefreshInputs(target=g, key=key, step=step)
        want = own.refresh(view, basis, (), inputs)[0]
        np.testing.assert_allclose(refresh(step), want, atol=1e-6)
        np.testing.assert_allclose(jax.jit(refresh)(jnp.int32(step)), want, atol=1e-6)
        program = str(jax.make_jaxpr(lambda: refresh(step))())  # noqa: B023
        assert ("svd" in program, "random_bits" in program) == (own is first, own is then)


P = lrx.projectors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"then": P.dct(rank=4)}, r"switch: first=.* keeps its basis as .*store bases alike"),
        ({"then": P.random(rank=4)}, "store bases alike"),  # a key, not a matrix
        ({"then": P.random(rank=4, kind="orthonormal", dtype=jnp.bfloat16)}, "of one dtype"),
        ({"then": P.power(rank=3)}, "must have one rank"),
        ({"then": P.given(matrix=np.eye(6, 4))}, "never moves its basis"),
        ({"then": "random"}, "then='random' must be one of lrx.projectors"),
        ({"at": -1}, "switch: at=-1 must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_switched_is_refused(options, message):
    given = {"at": 3, "first": P.svd(rank=4), "then": P.power(rank=4)} | options
    with pytest.raises(ValueError, match=message):
        P.switch(**given)
