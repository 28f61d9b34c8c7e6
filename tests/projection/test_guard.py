"""The NaN guard in single steps; that a skipped step is bitwise one that was never made is a law
(tests/laws)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
GOOD = jax.tree.map(
    lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), PARAMS
)


@pytest.mark.parametrize(
    "residual", [lrx.residuals.discard(), lrx.residuals.sign()], ids=["low", "full"]
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_one_bad_entry_skips_the_step(residual, when, bad):
    transformation = lrx.scale_by_projection(
        lrx.projectors.dct(rank=2),
        residual=residual,
        refresh_schedule=lrx.refresh_schedules.every(period=2, when=when),
    )
    update = jax.jit(transformation.update)
    states = [transformation.init(PARAMS)]
    for step in range(3):  # on a refresh, off one, and on one again
        for leaf in ("kernel", "bias"):
            grads = GOOD | {leaf: GOOD[leaf].at[..., 1].set(bad)}
            updates, after = update(grads, states[-1])
            assert not any(np.any(x) for x in jax.tree.leaves(updates))
            assert int(after.skipped) == 1
            jax.tree.map(
                np.testing.assert_array_equal,
                after._replace(skipped=states[-1].skipped),
                states[-1],
            )
        states.append(update(GOOD, states[-1])[1])
        assert int(states[-1].step) == step + 1


def test_only_what_the_basis_reads_is_tested():
    """Coordinates that were not chosen are dropped with whatever is in them, except where a refresh
    reads them."""
    given, by_norm = (
        lrx.projectors.columns(select=(0, 1)),
        lrx.projectors.columns(rank=2, select="l2"),
    )
    for projector, skipped in ((given, 0), (by_norm, 1)):
        transformation = lrx.scale_by_projection(projector, inner=optax.identity())
        grads = GOOD | {"kernel": GOOD["kernel"].at[3, 3].set(np.nan)}
        updates, state = transformation.update(grads, transformation.init(PARAMS))
        assert int(state.skipped) == skipped
        assert np.all(np.isfinite(updates["kernel"]))


def test_a_refresh_that_reads_what_the_basis_drops_skips_the_training_step_too():
    """The basis does not move, and what it keeps is finite: full gradients of a due refresh
    tell."""
    tx = lrx.galore(1e-2, projector=lrx.projectors.columns(rank=2, select="l2"))
    x = jnp.ones((3, 4)).at[:, 3].set(jnp.nan)  # the gradient of row i is x[:, i]ᵀ 1
    step = lrx.train_step(lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"])), tx)
    params = {"kernel": PARAMS["kernel"]}
    new, state, _ = jax.jit(step)(params, tx.init(params), x)
    assert (
        int(state.projection.skipped),
        int(state.projection.step),
        int(state.projection.refreshes),
    ) == (1, 0, 0)
    np.testing.assert_array_equal(new["kernel"], params["kernel"])


@pytest.mark.parametrize(
    "target", [lrx.targets.error_feedback(), lrx.targets.ldadam_error_feedback()]
)
def test_errors_that_add_up_make_no_later_step_impossible(target):
    """A coordinate that no basis sees gets errors without end; each gradient is below what
    overflows."""
    inner = lrx.inner.from_optax(optax.trace(0.9), decay=(("first", 0.9),))
    transformation = lrx.scale_by_projection(
        lrx.projectors.columns(select=(0, 1)), target=target, inner=inner
    )
    update = jax.jit(transformation.update)
    for size in (1e10, 1e18):
        state = transformation.init(PARAMS)
        huge = GOOD | {"kernel": GOOD["kernel"].at[3].set(size)}
        for _ in range(30):
            _, state = update(huge, state)
        skipped = int(state.skipped)
        assert skipped == (0 if size < 1e12 else 30)
        updates, state = update(GOOD, state)
        assert int(state.skipped) == skipped
        assert np.all(np.isfinite(updates["kernel"]))


def test_a_norm_that_overflows_leaves_the_limit_as_it_was():
    """A gradient whose projection is nothing is rescaled by 1e8 and more."""
    rule = lrx.residuals.gradient_rescale(scale=1e4, axis="tensor")
    transformation = lrx.scale_by_projection(lrx.projectors.columns(select=(0, 1)), residual=rule)
    _, state = transformation.update(GOOD, transformation.init(PARAMS))
    before = state.matrices["kernel"].residual
    hidden = GOOD | {"kernel": jnp.zeros((4, 6)).at[3].set(1e11)}
    _, state = transformation.update(hidden, state)
    updates, state = transformation.update(GOOD, state)
    assert int(state.skipped) == 0
    assert np.all(np.isfinite(updates["kernel"]))
    assert state.matrices["kernel"].residual <= 1.011 * before


def test_clip_norm():
    """One factor for projected and plain leaves, from the norm of what is kept."""
    slots = {"inner": optax.identity(), "refresh_schedule": lrx.refresh_schedules.never()}
    indices = (0, 2)
    kept = np.zeros((4, 6), np.float32)
    kept[list(indices)] = GOOD["kernel"][np.array(indices)]
    for residual, reads in (
        (lrx.residuals.discard(), kept),
        (lrx.residuals.sgd(), np.asarray(GOOD["kernel"])),
    ):
        norm = np.sqrt(np.sum(reads**2) + np.sum(np.asarray(GOOD["bias"]) ** 2))
        for limit in (0.5, 100.0):
            transformation = lrx.scale_by_projection(
                lrx.projectors.columns(select=indices), residual=residual, clip_norm=limit, **slots
            )
            updates, _ = transformation.update(GOOD, transformation.init(PARAMS))
            factor = min(1.0, limit / norm)
            np.testing.assert_allclose(updates["bias"], factor * GOOD["bias"], rtol=1e-5)
            np.testing.assert_allclose(updates["kernel"], factor * reads, rtol=1e-5, atol=1e-7)


def test_what_clipping_takes_away_is_not_fed_back():
    """Of the gradient plus the error: `E <- c K - up(down(c K))` with `c = min(1, limit / |K|)`."""
    indices, limit = (0, 2), 2.0
    transformation = lrx.scale_by_projection(
        lrx.projectors.columns(select=indices),
        inner=optax.identity(),
        refresh_schedule=lrx.refresh_schedules.never(),
        target=lrx.targets.error_feedback(),
        clip_norm=limit,
    )
    params, gradient = {"kernel": PARAMS["kernel"]}, np.asarray(GOOD["kernel"])
    state, error, clipped = transformation.init(params), np.zeros_like(gradient), 0
    for _ in range(4):
        kept = gradient + error
        factor = min(1.0, limit / np.linalg.norm(kept))
        clipped += factor < 1
        updates, state = transformation.update({"kernel": jnp.asarray(gradient)}, state, params)
        error = factor * kept
        step = np.zeros_like(error)
        step[list(indices)], error[list(indices)] = error[list(indices)], 0
        np.testing.assert_allclose(updates["kernel"], step, rtol=1e-5)
        np.testing.assert_allclose(state.matrices["kernel"].target, error, rtol=1e-5, atol=1e-6)
    assert clipped


def test_scale_and_plain_and_seed_do_something():
    build = lambda **slots: lrx.scale_by_projection(  # noqa: E731
        lrx.projectors.random(rank=2),
        refresh_schedule=lrx.refresh_schedules.every_step(),
        inner=optax.identity(),
        **slots,
    )
    run = lambda transformation: transformation.update(GOOD, transformation.init(PARAMS))[0]  # noqa: E731
    plain = run(build())
    scaled, other, seeded = (
        run(build(scale=2.0)),
        run(build(plain=optax.scale(-1.0))),
        run(build(seed=1)),
    )
    np.testing.assert_allclose(scaled["kernel"], 2 * plain["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(scaled["bias"], plain["bias"])
    np.testing.assert_array_equal(other["bias"], -plain["bias"])
    np.testing.assert_array_equal(other["kernel"], plain["kernel"])
    assert np.max(np.abs(seeded["kernel"] - plain["kernel"])) > 0.1
