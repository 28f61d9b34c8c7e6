"""The update beyond pre-training: what a state holds besides parameters, frozen arguments, keys and
extra arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import methods, optimizers, updates
from experiments.settings import configuration, finetuning_configuration
from tests.experiments import runs

METHODS = methods.METHODS
ROWS = np.arange(8.0, dtype=np.float32)


def sums(params, batch, rest, shift):
    """Linear in the parameters, with noise from the key: gradient = sum_i w_i (x_i + shift + fixed
    + noise_i)."""
    noise = jax.random.normal(rest["key"], batch["x"].shape)
    values = params["w"] * (batch["x"] + shift + rest["fixed"] + noise)
    return jnp.sum(values * batch["weights"]), jnp.sum(batch["weights"])


def method(name):
    """(optimizer, parameters) of a configured method, on a schedule that begins with a rate of
    0."""
    is_of_pairs = METHODS[name].kind == methods.PAIRS
    section = (
        finetuning_configuration.TuningOptimizerConfig
        if is_of_pairs
        else configuration.OptimizerConfig
    )
    rate = optimizers.schedule(configuration.ScheduleConfig(steps=10, warmup_steps=2), 0.1)
    config = section(**runs.settings_of(name, rank=2))
    optimizer = optimizers.build(config, rate, stacked=False, seed=0)
    matrices = (
        {"a": jnp.eye(4, 2), "b": jnp.eye(2, 8)} if is_of_pairs else {"kernel": jnp.eye(4, 8)}
    )
    return optimizer, {"layer_0": matrices, "bias": jnp.ones(3)}


def filled(params, value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_every_method_counts_its_updates(name):
    """By which a checkpoint's state is compared with its folder; a skipped update counts, too."""
    optimizer, params = method(name)
    state = optimizer.init(params)
    assert optimizers.done(state) == 0
    for number, value in enumerate((1.0, jnp.nan, 2.0), 1):
        _, state = optimizer.update(filled(params, value), state, params)
        assert optimizers.done(state) == number


@pytest.mark.parametrize("name", METHODS)
def test_the_schedule_of_every_method_begins_anew_and_its_moments_stay(name):
    """A run that starts from another's state follows its own schedule, whose first rate is 0
    here."""
    optimizer, params = method(name)
    state = optimizer.init(params)
    watches = bool(optax.tree.get_all_with_path(state, "skipped"))
    for value in (1.0, 1.0, *((jnp.nan,) if watches else ())):
        _, state = optimizer.update(filled(params, value), state, params)
    moved, _ = optimizer.update(filled(params, 1.0), state, params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(moved))
    begun = optimizers.restarted(state)
    assert optimizers.done(begun) == 0
    moved, after = optimizer.update(filled(params, 1.0), begun, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved))
    assert optimizers.done(after) == 1
    before, now = (
        [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        for tree in (state, begun)
    )
    jax.tree.map(np.testing.assert_array_equal, before, now)


def recording():
    """SGD of rate 1 that adds the extra argument `scale` to what it moves, and so shows that it
    came."""

    def update(grads, state, params=None, *, scale=0.0, **extra):
        del params, extra
        return jax.tree.map(lambda g: -(g + scale), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_microbatch_has_a_key_of_its_own_and_the_state_moves_on(accumulation):
    weights = np.array([1, 0, 2, 1, 0, 1, 1, 3], np.float32)
    batch = {"x": jnp.asarray(ROWS), "weights": jnp.asarray(weights)}
    key, fixed, shift = jax.random.key(7), jnp.float32(0.5), jnp.float32(10.0)
    optimizer = recording()
    state = {"params": {"w": jnp.float32(2.0)}, "fixed": fixed, "key": key}
    state["opt_state"] = optimizer.init(state["params"])
    after, measured = jax.jit(updates.step(sums, optimizer, accumulation))(state, batch, shift)

    following, own = jax.random.split(key)
    gradient = 0.0
    for number, each in enumerate(jax.random.split(own, accumulation)):
        rows = slice(number, None, accumulation)
        noise = np.asarray(jax.random.normal(each, ROWS[rows].shape))
        gradient += np.sum((ROWS[rows] + 10.5 + noise) * weights[rows])
    gradient /= weights.sum()
    np.testing.assert_allclose(after["params"]["w"], 2.0 - (gradient + 0.5), rtol=1e-5)
    np.testing.assert_allclose(measured["loss"], 2.0 * gradient, rtol=1e-5)
    np.testing.assert_allclose(measured["grad_norm"], abs(gradient), rtol=1e-5)
    assert float(measured["tokens"]) == weights.sum()
    np.testing.assert_array_equal(jax.random.key_data(after["key"]), jax.random.key_data(following))
    assert float(after["fixed"]) == 0.5
    assert after.keys() == state.keys()


def test_without_frozen_arrays_the_optimizer_gets_no_scale():
    optimizer = recording()
    step = updates.step(
        lambda params, batch, rest: (params["w"] * jnp.sum(batch["x"]), jnp.float32(8)),
        optimizer,
        1,
    )
    after, _ = step(
        {"params": {"w": jnp.float32(1.0)}, "opt_state": optax.EmptyState()},
        {"x": jnp.asarray(ROWS)},
    )
    np.testing.assert_allclose(after["params"]["w"], 1.0 - ROWS.sum() / 8)
