"""Laws of the optimizers on pairs: programs, stacks, guard, schedule, and what they do to the
product a b."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax.optim import pair_optimizers as A
from tests.adapters.pair_methods import (
    SCALE,
    STEPS,
    build,
    every,
    gradients,
    params_like,
    preconditioned,
)
from tests.laws.methods import FAST_COMPILE, assert_close, at, copy, eager, same

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

BAD = (0, 2)


@functools.cache
def program(name):
    """A scan over steps whose body is a cond, with parameters and state donated; and its traces."""
    tx, traces = build(name), []

    def run(params, state, grads, live):
        traces.append(1)

        def body(carry, step):
            params, state = carry
            grad, alive = step
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = jax.lax.cond(
                alive, lambda: tx.update(grad, state, params), lambda: (zeros, state)
            )
            return (optax.apply_updates(params, updates), state), (updates, state)

        return jax.lax.scan(body, (params, state), (grads, live))

    return tx, jax.jit(run, donate_argnums=(0, 1), compiler_options=FAST_COMPILE), traces


def run(name, grads, live):
    tx, compiled, _ = program(name)
    params = params_like()
    return compiled(copy(params), tx.init(params), grads, jnp.asarray(live))


@every
def test_compiled_scan_equals_eager_loop(name):
    tx, _, traces = program(name)
    params, grads = params_like(), gradients()
    _, (updates, states) = run(name, grads, np.ones(STEPS, bool))
    state = tx.init(params)
    for step in range(3):
        update, state = eager(tx.update, at(grads, step), state, params)
        assert_close(at(updates, step), update, 1e-4)
        assert any(np.any(x) for x in jax.tree.leaves(update["q"]))
        params = optax.apply_updates(params, update)
    assert_close(at(states, 2), state, 1e-4)
    assert len(traces) == 1


@every
def test_a_skipped_step_is_a_step_that_was_never_made(name):
    """Bitwise, schedule and turns included; only `skipped` counts."""
    grads = gradients()
    grads["q"]["kernel"]["magnitude"] = grads["q"]["kernel"]["magnitude"].at[0, 1].set(jnp.nan)
    grads["experts"]["a"] = grads["experts"]["a"].at[2, 1, 0, 0, 0].set(1e30)
    live = np.array([step not in BAD for step in range(STEPS)])
    _, (updates, states) = run(name, grads, np.ones(STEPS, bool))
    _, (expected, never) = run(name, gradients(), live)
    assert states.skipped.tolist() == np.cumsum(~live).tolist()
    assert states.step.tolist() == np.cumsum(live).tolist()
    assert same(states._replace(skipped=never.skipped), never)
    for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, want)
        assert not np.any(np.asarray(got)[list(BAD)])


@every
def test_init_and_state(name):
    """Traced and from shapes, stable dtypes, distinct buffers, no empty leaf, and the bytes of the
    docstrings."""
    tx, params = build(name), params_like()
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), state)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, after)))
    leaves = jax.tree.leaves((state, params))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    assert all(leaf.size for leaf in leaves)
    factors = 4 * sum(
        x.size for key in ("a", "b") for x in (params["experts"][key], params["q"]["kernel"][key])
    )
    copies = {"lora_plus": 2, "scaled_adamw": 2, "altlora": 2, "altlora_plus": 3}[name.split()[0]]
    plain = 2 * params["q"]["kernel"]["magnitude"].nbytes
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == copies * factors + plain + 6 * 4


@every
def test_a_stack_is_its_layers_one_by_one(name):
    def split(trees):
        return {
            f"{i}{j}": {"a": trees["experts"]["a"][i, j], "b": trees["experts"]["b"][i, j]}
            for i in range(2)
            for j in range(3)
        }

    params, grads = params_like(), gradients()
    stacked, layers = build(name), build(name)
    if name != "lora_plus":
        layers = build(name, scale=dict.fromkeys(split(params), SCALE["experts"]))
        stacked = build(name, scale=SCALE)
    state, apart, alone = stacked.init(params), split(params), layers.init(split(params))
    for step in range(3):
        updates, state = eager(stacked.update, at(grads, step), state, params)
        each, alone = eager(layers.update, split(at(grads, step)), alone, apart)
        assert_close(split(updates), each, 1e-4)
        params, apart = optax.apply_updates(params, updates), optax.apply_updates(apart, each)


@every
def test_schedule_sees_accepted_steps(name):
    """The update at the second step is the schedule's second rate times the direction."""
    results = []
    for rate in (0.1, lambda step: 0.1 * (1 - step) + 0.3 * step):
        tx, params, grads = build(name, rate, weight_decay=0.0), params_like(), gradients()
        _, state = eager(tx.update, at(grads, 0), tx.init(params), params)
        results.append(eager(tx.update, at(grads, 1), state, params)[0])
    constant, scheduled = results
    assert_close(constant["q"]["kernel"]["magnitude"] * 3, scheduled["q"]["kernel"]["magnitude"])
    if "sequential" in name or "both" in name or "official" in name:  # there b sees how far a went
        constant, scheduled = ({"a": x["experts"]["a"]} for x in results)
    assert_close(jax.tree.map(lambda x: 3 * x, constant), scheduled, 1e-4)


def factors(seed=0, n=7, r=3, m=6):
    generator = np.random.default_rng(seed)
    a, b, gradient = (generator.normal(size=shape) for shape in ((n, r), (r, m), (STEPS, n, m)))
    return a, b, gradient


def product_path(tx, a, b, gradients, scale=2.0, steps=STEPS):
    """The products a b after each step on kernel gradients that are given."""
    params = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    state, products = tx.init(params), []
    for gradient in jnp.asarray(gradients[:steps], jnp.float32):
        grads = {"a": scale * gradient @ params["b"].T, "b": scale * params["a"].T @ gradient}
        updates, state = eager(tx.update, grads, state, params)
        params = optax.apply_updates(params, updates)
        products.append(np.asarray(params["a"] @ params["b"]))
    return np.stack(products)


INVARIANT = {
    "altlora": lambda: A.altlora(0.1, scale=2.0, damping=0.0, weight_decay=0.3),
    "altlora both": lambda: build("altlora both", damping=0.0),
    "scaled gradient descent": lambda: optax.chain(
        A.precondition_pairs(damping=0.0), optax.sgd(0.1)
    ),
}
GAUGES = {
    "any": np.array([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 1.0]]),
    "orthogonal": np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0],
    "signed permutation": np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
}


def gauge_error(tx, gauge):
    a, b, gradients = factors()
    path = product_path(tx, a, b, gradients)
    moved = product_path(tx, a @ GAUGES[gauge], np.linalg.inv(GAUGES[gauge]) @ b, gradients)
    return np.max(np.abs(moved - path)) / np.max(
        np.abs(path - a @ b)
    )  # of the way that the product went


@pytest.mark.parametrize("name", INVARIANT)
def test_products_do_not_depend_on_the_gauge(name):
    """a M, M⁻¹ b for any invertible M: momentum, decay and alternation included, at full rank and
    without damping."""
    assert gauge_error(INVARIANT[name](), "any") < 1e-4


@preconditioned
def test_gauges_under_damping_and_under_adam(name):
    """Damping leaves the orthogonal gauges, Adam's entrywise steps the signed permutations, and no
    more."""
    options = {"damping": 0.5, "scale": 2.0}
    tx = build(name, **options)
    adam = "adamw" in name or "plus" in name
    assert gauge_error(tx, "signed permutation") < 1e-4
    assert (gauge_error(tx, "orthogonal") < 1e-4) == (not adam)
    assert gauge_error(tx, "any") > 1e-2


@pytest.mark.parametrize("rank_deficient", [False, True])
@pytest.mark.parametrize("turn", [0, 1])
def test_the_product_moves_by_the_projected_gradient(turn, rank_deficient):
    """s Δ(a b) = -lr G Π_b on the turn of a, -lr Π_a G on that of b: the nearest to -lr G that one
    factor can make."""
    a, b, gradients = factors()
    if rank_deficient:
        a, b = a.copy(), b.copy()
        a[:, 2], b[2] = a[:, 0] - a[:, 1], 2 * b[0] + b[1]
    tx = A.altlora(0.1, scale=2.0, b1=0.0, damping=0.0)
    gradients = (
        gradients * np.array([1 - turn, 1.0, 1, 1, 1])[:, None, None]
    )  # nothing happens on the turn of a
    path = product_path(tx, a, b, gradients, steps=1 + turn)
    projected = (
        gradients[0] @ np.linalg.pinv(b) @ b if turn == 0 else a @ np.linalg.pinv(a) @ gradients[1]
    )
    np.testing.assert_allclose(2 * (path[turn] - a @ b), -0.1 * projected, atol=3e-5)


def test_momentum_is_moved_to_the_nearest_of_the_new_space():
    """After b moved, the momentum of a stands for `m b_old` projected on the rows of the new b."""
    a, b, gradients = factors()
    tx = A.altlora(0.1, scale=2.0, damping=0.0)
    path = product_path(tx, a, b, gradients * np.array([1, 1, 0, 0, 0])[:, None, None], steps=3)
    new_b = np.linalg.svd(path[1])[2][:3]
    momentum = 0.1 * gradients[0] @ np.linalg.pinv(b) @ b  # of the kernel, times s
    np.testing.assert_allclose(
        2 * (path[2] - path[1]), -0.1 * 0.9 * momentum @ new_b.T @ new_b, atol=3e-5
    )


@preconditioned
def test_a_zero_factor_and_padded_ranks(name):
    """b = 0, as adapters start: a waits, b moves. Ranks that scale masks stay, and do not touch the
    others."""
    a, b, gradients = factors()
    tx = build(name, weight_decay=0.0, scale=1.0)
    start = product_path(tx, a, 0 * b, gradients)
    assert np.all(np.isfinite(start)) and np.any(start)
    mask = np.array([2.0, 0.0, 2.0])
    whole, short = (
        build(name, weight_decay=0.0, scale=mask),
        build(name, weight_decay=0.0, scale=mask[[0, 2]]),
    )
    params = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    cut = lambda x: {"a": x["a"][:, ::2], "b": x["b"][::2]}  # noqa: E731
    few, one, two = cut(params), whole.init(params), short.init(cut(params))
    for gradient in jnp.asarray(gradients[:3], jnp.float32):
        grads = {
            "a": gradient @ params["b"].T * mask,
            "b": mask[:, None] * (params["a"].T @ gradient),
        }
        updates, one = eager(whole.update, grads, one, params)
        fewer, two = eager(short.update, cut(grads), two, few)
        assert not np.any(updates["a"][:, 1]) and not np.any(updates["b"][1])
        assert_close(cut(updates), fewer, 1e-4)
        params, few = optax.apply_updates(params, updates), optax.apply_updates(few, fewer)


@every
def test_init_of_shapes_is_that_of_arrays(name):
    transformation = build(name)
    made = [transformation.init(tree) for tree in (jax.eval_shape(params_like), params_like())]
    assert same(*made)
