"""The learning rate of the leaves that are not projected."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

RNG = np.random.default_rng(4)
PARAMS = {
    "head": {"kernel": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)},
    "up": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), "bias": jnp.ones(8)},
}
GRADS = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), PARAMS)


def trained(tx, params=PARAMS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def galore(rate, **options):
    return lrx.galore(rate, rank=2, weight_decay=0.1, **options)


def test_each_group_moves_as_under_its_own_rate():
    """Projected leaves by one schedule, the others by another; decay follows the rate of its leaf."""
    first, other = optax.linear_schedule(0.1, 0.0, 4), optax.linear_schedule(0.3, 0.01, 4)
    both = trained(galore(first, plain_learning_rate=other))
    alone = {rate: trained(galore(rate)) for rate in (first, other)}
    chex.assert_trees_all_equal(both["up"]["kernel"], alone[first]["up"]["kernel"])
    chex.assert_trees_all_equal(both["up"]["bias"], alone[other]["up"]["bias"])
    chex.assert_trees_all_equal(both["head"], alone[other]["head"])


def test_it_may_be_injected_and_zero():
    build = optax.inject_hyperparams(lrx.galore, static_args=("rank",))
    tx = build(0.1, rank=2, weight_decay=0.1, plain_learning_rate=0.3)
    chex.assert_trees_all_close(
        trained(tx), trained(galore(0.1, plain_learning_rate=0.3)), rtol=1e-5
    )
    frozen = trained(galore(0.1, plain_learning_rate=0.0))
    chex.assert_trees_all_equal(frozen["head"], PARAMS["head"])
    assert np.any(frozen["up"]["kernel"] != PARAMS["up"]["kernel"])


def test_the_fused_form_takes_it_too():
    """And the rate that a caller gives is that of the projected leaves."""
    tx = galore(0.1, plain_learning_rate=0.3)
    form, params, state = lrx.fused(tx), PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = form.step(params, GRADS, state, 0.05)
    expected = trained(galore(0.05, plain_learning_rate=0.3))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="plain_learning_rate=nan must be .* or a schedule"):
        galore(0.1, plain_learning_rate=float("nan"))
