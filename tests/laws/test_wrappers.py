"""Inside optax's wrappers: masked, partition, MultiSteps, inject_hyperparams, apply_if_finite and
others.

Values are compared eagerly with the bare transformation; the fast tier also traces every wrapped
update, which shows that its state keeps dtype, shape and structure under `jit`.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.laws import methods as m

ONE = {"dense": m.SHAPES["dense"]}  # one matrix and one plain leaf


def _one(method, **overrides):
    """`(transformation, params, three gradients)` on the small tree."""
    return (
        method.build(views=lrx.Views(), **overrides),
        m.tree(0, shapes=ONE),
        m.tree(1, steps=3, shapes=ONE),
    )


def _check_trace(method, transformation, state, params, grads):
    if method.fast:
        _, after = jax.eval_shape(transformation.update, grads, state, params)
        chex.assert_trees_all_equal_structs(after, state)
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(state)
        ]


def _start(method, transformation, params, grads):
    state = m.eager(transformation.init, params)
    _check_trace(method, transformation, state, params, grads)
    return state


@m.every_method(unless=lambda method: method.name in m.COUPLED)
def test_masked_and_partition(method):
    """A leaf that others handle is as if it were not there; what remains is what it was without the
    wrapper."""
    params, grads = m.params_like(), m.at(m.gradients(), 0)
    expected = m.at(m.trajectory(method)[1][0], 0)
    inner = method.build()
    mask = {"dense": {"bias": True, "kernel": True}, "stack": {"kernel": False}}
    labels = {"dense": {"bias": "plain", "kernel": "low"}, "stack": {"kernel": "low"}}
    masked = optax.masked(inner, lambda _: mask)
    updates, _ = m.eager(masked.update, grads, _start(method, masked, params, grads), params)
    assert m.same(updates["stack"], grads["stack"])
    m.assert_close(updates["dense"], expected["dense"], method.tolerance)
    for given in (labels, lambda _: labels):
        both = optax.partition({"low": inner, "plain": optax.sgd(0.5)}, given)
        updates, _ = m.eager(both.update, grads, _start(method, both, params, grads), params)
        m.assert_close(updates["dense"]["bias"], -0.5 * grads["dense"]["bias"])
        m.assert_close(updates["stack"], expected["stack"], method.tolerance)
        m.assert_close(updates["dense"]["kernel"], expected["dense"]["kernel"], method.tolerance)


@m.every_method()
def test_multi_steps(method):
    """Two micro-steps are one step with the mean gradient; the clock counts windows."""
    inner, params, _ = _one(method)
    grads = m.tree(1, steps=4, shapes=ONE)
    wrapped = optax.MultiSteps(inner, 2).gradient_transformation()
    state, expected_state = (
        _start(method, wrapped, params, m.at(grads, 0)),
        m.eager(inner.init, params),
    )
    for window in range(2):
        first, second = m.at(grads, 2 * window), m.at(grads, 2 * window + 1)
        updates, state = m.eager(wrapped.update, first, state, params)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        updates, state = m.eager(wrapped.update, second, state, params)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, expected_state = m.eager(inner.update, mean, expected_state, params)
        m.assert_close(updates, expected, method.tolerance)
    assert int(m.projection_state(state.inner_opt_state).step) == 2
    m.assert_close(state.inner_opt_state, expected_state, method.tolerance)


def _injected(method, **options):
    if not method.named:

        def chained(learning_rate):
            return optax.chain(
                method.build(views=lrx.Views()), optax.scale_by_learning_rate(learning_rate)
            )

        return optax.inject_hyperparams(chained, **options)(learning_rate=0.1)
    # a mask that is a function would be called with the step's count, as of optax's own optimizers
    fixed = {"rank", "kind", "steps", "leading", "max_precond_dim", "mask", "queue", "history"}
    static = fixed & inspect.signature(method.factory).parameters.keys()
    return optax.inject_hyperparams(method.factory, static_args=static, **options)(**method.options)


@m.every_method()
def test_inject_hyperparams(method):
    """On bf16 parameters, with float32 hyper-parameters; `tree_get` and `tree_set` find the
    learning rate."""
    transformation = _injected(method, hyperparam_dtype=jnp.float32)
    params, grads = m.tree(0, jnp.bfloat16, shapes=ONE), m.at(m.tree(1, steps=3, shapes=ONE), 0)
    state = _start(method, transformation, params, grads)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == pytest.approx(0.1)
    updates, after = m.eager(transformation.update, grads, state, params)
    bare = method.build(views=lrx.Views())
    if not method.named:
        bare = optax.chain(bare, optax.scale_by_learning_rate(0.1))
    expected, _ = m.eager(bare.update, grads, m.eager(bare.init, params), params)
    m.assert_close(updates, expected, 1e-2)
    stopped = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0))
    updates, _ = m.eager(transformation.update, grads, stopped, params)
    assert not any(np.any(np.asarray(x, np.float32)) for x in jax.tree.leaves(updates))
    m.assert_finite(after)


@pytest.mark.parametrize(
    "factory, options",
    [
        (lrx.galore, {"rank": 4}),
        (lrx.frugal, {}),
        (lrx.ldadam, {}),
        (lrx.apollo, {"rank": 4}),
        (lrx.dct_adamw, {"rank": 4}),
        (lrx.muon, {"steps": 5}),
        (lrx.soap, {"max_precond_dim": 8}),
        (lrx.dion, {"rank": 4}),
    ],
)
def test_a_traced_rank_names_static_args(factory, options):
    transformation = optax.inject_hyperparams(factory)(learning_rate=0.1, **options)
    with pytest.raises(ValueError, match="static_args"):
        jax.eval_shape(transformation.init, m.tree(0, shapes=ONE))


def test_a_traced_kind_names_static_args():
    transformation = optax.inject_hyperparams(lrx.dct_adamw, static_args=("rank",))(
        learning_rate=0.1, rank=4
    )
    with pytest.raises(ValueError, match="kind.*static_args"):
        jax.eval_shape(transformation.init, m.tree(0, shapes=ONE))


def test_injected_slots_reach_the_transformation():
    """Every option passes through inject_hyperparams by its name."""
    params = m.tree(0, shapes=ONE)
    views = lrx.Views(rules=(("dense/kernel", None), ("dense/bias", None)))
    for transformation in (
        optax.inject_hyperparams(lrx.scale_by_projection)(
            projector=lrx.projectors.svd(rank=4), views=views
        ),
        optax.inject_hyperparams(lrx.apollo_mini, static_args=("rank",))(
            learning_rate=0.1, views=views
        ),
    ):
        with pytest.raises(ValueError, match="no leaf is projected"):
            transformation.init(params)


@m.every_method()
def test_apply_if_finite(method):
    inner, params, grads = _one(method)
    wrapped = optax.apply_if_finite(inner, 3)
    first = m.at(grads, 0)
    state = _start(method, wrapped, params, first)
    expected, expected_state = m.eager(inner.update, first, m.eager(inner.init, params), params)
    updates, state = m.eager(wrapped.update, first, state, params)
    m.assert_close((updates, state.inner_state), (expected, expected_state))
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), first)
    updates, after = m.eager(wrapped.update, bad, state, params)
    assert m.same(after.inner_state, state.inner_state)
    assert int(after.notfinite_count) == 1
    m.assert_close(updates, jax.tree.map(jnp.zeros_like, updates))


@m.every_method()
def test_lookahead_and_schedule_free(method):
    inner, params, grads = _one(method)
    first = m.at(grads, 0)
    expected, _ = m.eager(inner.update, first, m.eager(inner.init, params), params)

    ahead = optax.lookahead(inner, sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params)
    updates, state = m.eager(ahead.update, first, _start(method, ahead, both, first), both)
    m.assert_close(updates.fast, expected)
    m.assert_finite(m.eager(ahead.update, first, state, optax.apply_updates(both, updates)))

    free = optax.contrib.schedule_free(inner, learning_rate=0.1, b1=0.9)
    updates, state = m.eager(free.update, first, _start(method, free, params, first), params)
    m.assert_close(state.z, optax.apply_updates(params, expected))
    m.assert_finite(m.eager(free.update, first, state, optax.apply_updates(params, updates)))


def test_extra_arguments_reach_the_inner_transformation():
    def scaled():
        return optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, *, value, **extra: (
                jax.tree.map(lambda u: value * u, updates),
                state,
            ),
        )

    params, grads = m.params_like(), m.at(m.gradients(), 0)
    inner = optax.chain(
        optax.clip_by_global_norm(1e9),
        lrx.scale_by_projection(
            lrx.projectors.columns(rank=4, select="l2"), inner=scaled(), views=m.VIEWS
        ),
    )
    state = inner.init(params)
    one, two = (
        jax.jit(inner.update)(grads, state, params, value=value, loss=0.0)[0]
        for value in (1.0, 2.0)
    )
    m.assert_close(jax.tree.map(lambda x: 2 * x, one), two)
    assert np.any(one["stack"]["kernel"])
    assert np.any(one["dense"]["bias"])
