"""The law of the rest: what a basis does not see is the same inside a program that scaled the
gradient, and alone.

XLA contracts `0.3 G` into a subtraction, so a difference of two equal numbers is noise there, of
which a sign makes whole steps. Entries that a coordinate basis selects and the others are compared
apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.residuals import Combine
from lowrank_jax.projection.targets import Kept
from tests.laws.methods import FAST_COMPILE

P, R = lrx.projectors, lrx.residuals
S, K = 16, 24
W, G = (
    jnp.asarray(np.random.default_rng(seed).normal(size=(S, K)), jnp.float32) for seed in (1, 2)
)
SELECTED = np.isin(np.arange(S), (1, 2, 5, 9, 11, 12, 14))[:, None] & np.ones((S, K), bool)
EVERYTHING, NOTHING = np.ones((S, K), bool), np.zeros((S, K), bool)
AXES = np.eye(S, dtype=np.float32)[:, SELECTED[:, 0]]

# projector, and the entries that it sees whole
PROJECTORS = {
    "columns": (P.columns(select=tuple(np.flatnonzero(SELECTED[:, 0]))), SELECTED),
    "given axes": (P.given(matrix=AXES), SELECTED),
    "identity": (P.identity(), EVERYTHING),
    "full svd": (P.svd(rank=S), EVERYTHING),
    "full dct": (P.dct(rank=S), EVERYTHING),
    "full hadamard": (P.hadamard(rank=S), EVERYTHING),
    "full random": (P.random(rank=S, kind="orthonormal"), EVERYTHING),
    "svd": (P.svd(rank=5), NOTHING),
    "two-sided": (P.svd_two_sided(rank=5), NOTHING),
    "power": (P.power(rank=5), NOTHING),
    "online pca": (P.online_pca(rank=5, first="random"), NOTHING),
    "dct": (P.dct(rank=5), NOTHING),
    "gaussian": (P.random(rank=5), NOTHING),
}
TARGETS = lrx.targets
# residual rule and target
RULES = {
    "discard": (R.discard(), TARGETS.gradient()),
    "sign": (R.sign(), TARGETS.gradient()),
    "sgd": (R.sgd(), TARGETS.gradient()),
    "error feedback": (R.discard(), TARGETS.error_feedback()),
    "ldadam": (R.discard(), TARGETS.ldadam_error_feedback()),
    "momentum": (R.discard(), TARGETS.momentum(mu=0.0)),
    "rescale": (R.gradient_rescale(axis="tensor"), TARGETS.gradient()),
    "norm scaled": (R.norm_scaled(axis="tensor"), TARGETS.gradient()),
}


def views_and_bases():
    """`{projector: view}` and `{projector: basis}`, bases from another gradient's data."""

    def bases(gradient, key):
        found = {}
        for name, (projector, _) in PROJECTORS.items():
            found[name], memory = projector.init(views[name], key)
            if projector.moves:
                inputs = lrx.projectors.RefreshInputs(target=gradient, step=jnp.asarray(0), key=key)
                found[name], _ = projector.refresh(views[name], found[name], memory, inputs)
        return found

    views = {
        name: lrx.resolution.resolve(W, rank=projector.rank_for, side="rows").projected[0]
        for name, (projector, _) in PROJECTORS.items()
    }
    return views, jax.jit(bases, compiler_options=FAST_COMPILE)(W, jax.random.key(3))


def combined(views, bases, gradient):
    """`{(projector, rule): (update, residual state)}` of a gradient that is scaled here."""
    made = {}
    for name, (projector, _) in PROJECTORS.items():
        view, basis = views[name], bases[name]
        for kind, (rule, target) in RULES.items():
            matrix, left = target.take(target.init(view), 0.3 * gradient)
            low = projector.down(view, basis, matrix)
            kept, combine = records(projector, view, basis, matrix, low, jnp.sign(low))
            update, _ = rule.combine(combine._replace(state=rule.init(view)))
            made[name, kind] = update, target.kept(left, kept)
    return made


def records(projector, view, basis, matrix, low, direction):
    """What a step gives to a target and to a residual rule."""
    lift = lambda low: projector.up(view, basis, low)  # noqa: E731
    rest = lambda: projector.rest(view, basis, matrix, low)  # noqa: E731
    combine = Combine(
        view=view,
        lift=lift,
        rest=rest,
        rounding=lambda: projector.rounding(view, matrix),
        target=matrix,
        low=low,
        direction=direction,
        inner_scale=jnp.ones(()),
        scale=1.0,
        state=(),
    )
    return Kept(view, matrix, low, lift, rest), combine


def assert_alike(got, expected, seen, tolerance):
    for name, entries in (("selected", seen), ("unselected", ~seen)):
        a, b = np.asarray(got)[entries], np.asarray(expected)[entries]
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_rule_and_projector_inside_a_program_and_alone():
    views, bases = views_and_bases()
    run = jax.jit(
        lambda bases, gradient: combined(views, bases, gradient), compiler_options=FAST_COMPILE
    )
    inside, alone = run(bases, G), combined(views, bases, G)
    for (name, rule), (update, state) in inside.items():
        projector, seen = PROJECTORS[name]
        expected, own = alone[name, rule]
        assert_alike(update, expected, seen, 2e-5)
        if rule in ("error feedback", "ldadam", "momentum"):
            assert_alike(state, own, seen, 2e-6)
            np.testing.assert_allclose(np.asarray(state)[seen], 0, atol=2e-6)
        if rule == "sign":
            direction = jnp.sign(projector.down(views[name], bases[name], 0.3 * G))
            rest = np.round(
                np.asarray(update - projector.up(views[name], bases[name], direction)), 4
            )
            assert not np.any(rest[seen]), name
            assert np.all(np.abs(rest[~seen]) == 1), name


def test_a_gradient_that_lies_in_the_subspace_leaves_nothing():
    """One of rank 3 and a basis of rank 5: its rest is rounding."""
    gradient = W[:, :3] @ W[:3]
    projector = P.svd(rank=5)
    view = lrx.resolution.resolve(W, rank=projector.rank_for, side="rows").projected[0]
    basis, _ = projector.refresh(view, None, (), lrx.projectors.RefreshInputs(target=gradient))
    low = projector.down(view, basis, gradient)
    _, combine = records(projector, view, basis, gradient, low, jnp.zeros_like(low))
    update, _ = R.sign().combine(combine)
    assert not np.any(update)


RATE = 1e-2
TX = lrx.frugal(RATE, rank=0.5, projection="columns", weight_decay=0.0, clip_norm=1.0, eps=0.0)


def _optax(params, state, gradient):
    updates, _ = TX.update({"kernel": 0.3 * gradient}, state, params)
    return optax.apply_updates(params, updates)


def _fused(params, state, gradient):
    return lrx.fused(TX).step(params, {"kernel": 0.3 * gradient}, state)[0]


def _accumulated(params, state, gradient):
    weights = jnp.asarray([0.5, 1.5, 1.0])
    return lrx.train_step(lambda p, w: jnp.sum(w * gradient * p["kernel"]), TX, accumulate=3)(
        params, state, weights
    )[0]


@pytest.mark.parametrize("form", [_optax, _fused, _accumulated])
def test_frugal_moves_every_entry_by_the_rate(form):
    """The first step of Adam is a sign, and so is the rule of the rest: no entry moves by nothing,
    or by twice."""
    params = {"kernel": jnp.zeros((S, K))}
    state = TX.init(params)
    moved = jax.jit(form)(params, state, G)["kernel"]
    np.testing.assert_allclose(moved, -RATE * np.sign(G), rtol=1e-5)
