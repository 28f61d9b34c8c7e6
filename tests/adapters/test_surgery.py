"""One function moves the moments of any optimizer as a method says, entry by entry against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax import linalg
from lowrank_jax.optim.surgery import Keep, LinearMap, Mask, Zero, apply_policy

N, R, M = 8, 4, 6
GENERATOR = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)  # noqa: E731
PARAMS = {"sites": {"q/kernel": {"a": draw(2, N, R), "b": draw(2, R, M)}}, "head": draw(5)}
TURN = draw(R, R)
ROWS = jnp.arange(R) < 2
POLICY = {
    "sites": {"q/kernel": {"a": LinearMap(TURN), "b": Mask(ROWS[:, None])}},
    "head": Zero(),
}


def quantised(node):
    return isinstance(node, linalg.QuantizedBlocks)


def dense(tree):
    return jax.tree.map(lambda x: x.dequantize() if quantised(x) else x, tree, is_leaf=quantised)


def moment_trees(state):
    """`[(kind, tree)]` of everything that is like the parameters, found by its structure."""
    found, known = [], {"mu": "first", "nu": "second", "acc_grads": "first", "trace": "first"}

    def visit(node):
        for name in getattr(node, "_fields", ()):
            child = getattr(node, name)
            if name in known:
                found.append((known[name], child))
            else:
                visit(child)
        if isinstance(node, dict):
            [visit(node[key]) for key in sorted(node)]
        elif isinstance(node, (tuple, list)) and not hasattr(node, "_fields"):
            [visit(child) for child in node]

    visit(state)
    return found


def expected(path, moment, kind):
    """What the policies make of one moment, in NumPy."""
    moment = np.asarray(moment, np.float64)
    name = path[-1].key
    if name == "head":
        return 0 * moment
    if name == "a":
        turn = np.asarray(TURN, np.float64)
        return moment @ (turn if kind == "first" else turn**2).T
    return moment * np.asarray(ROWS)[:, None]


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw in a chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0, 9))
    ),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"sites": True, "head": False}),
    "partition": lambda: optax.partition(
        {"slow": optax.adam(1e-3), "fast": optax.adam(1e-2)}, {"sites": "fast", "head": "slow"}
    ),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "moments in bfloat16": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "moments in 8 bits": lambda: lrx.lora_plus(1e-2, inner=lrx.inner.stored8(minimum=1, block=4)),
    "lora_plus": lambda: lrx.lora_plus(1e-2),
    "scaled_adamw": lambda: lrx.scaled_adamw(1e-2),
    "altlora_plus": lambda: lrx.altlora_plus(1e-2, scale=1.0),
}
ROUGH = {"moments in bfloat16": 2**-7, "moments in 8 bits": 0.06}


def stepped(tx, steps=3):
    state = tx.init(PARAMS)
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: jnp.cos(x + step), PARAMS)
        _, state = tx.update(grads, state, PARAMS)
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_moment_moves_as_its_policy_says_and_nothing_else_does(name):
    state = stepped(OPTIMIZERS[name]())
    moved = jax.jit(apply_policy)(POLICY, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    before, after = moment_trees(state), moment_trees(moved)
    assert before
    for (kind, old), (_, new) in zip(before, after, strict=True):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(dense(old)),
            jax.tree.leaves(dense(new)),
            strict=True,
        )
        for (path, moment), found in pairs:
            assert found.dtype == moment.dtype
            wanted = expected(path, moment, kind)
            size = max(np.abs(wanted).max(), 1e-8)
            assert (
                np.abs(np.asarray(found, np.float64) - wanted).max() <= ROUGH.get(name, 1e-6) * size
            )
    # counts, rates and the rest
    is_moment = {id(leaf) for _, tree in before for leaf in jax.tree.leaves(tree)}
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        if id(old) not in is_moment:
            np.testing.assert_array_equal(old, new)


def test_what_is_kept_is_kept_to_the_bit_and_one_policy_serves_a_subtree():
    state = stepped(lrx.lora_plus(1e-2, inner=lrx.inner.stored8(minimum=1, block=4)))
    assert apply_policy(Keep(), state) is state
    moved = apply_policy({"sites": Keep(), "head": Zero()}, state)
    for old, new in zip(jax.tree.leaves(state.a), jax.tree.leaves(moved.a), strict=True):
        assert np.array_equal(old, new)
    old, new = (dense(one.plain.mu)["head"] for one in (state, moved))
    assert not np.any(new) and np.any(old)


def test_a_traced_number_starts_all_of_it_again_or_nothing():
    state = stepped(optax.adam(1e-2))
    restart = jax.jit(lambda on, state: apply_policy(Mask(jnp.where(on, 0.0, 1.0)), state))
    for old, new in zip(
        jax.tree.leaves(state), jax.tree.leaves(restart(False, state)), strict=True
    ):
        assert np.array_equal(old, new)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restart(True, state)[0].mu))
    assert int(restart(True, state)[0].count) == 3
    broken = state[0]._replace(mu=jax.tree.map(lambda x: x * jnp.nan, state[0].mu))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restart(True, broken).mu))


def test_a_permutation_of_parameters_commutes_with_adam():
    """Turned and stepped is stepped and turned: the moments go where their parameters go."""
    order = jnp.asarray([2, 0, 3, 1])
    turn = jnp.eye(R)[order]
    params = {"a": draw(N, R)}
    grads = {"a": draw(N, R)}
    tx = optax.adam(1e-2)
    _, state = tx.update(grads, tx.init(params))
    permuted = lambda tree: {"a": tree["a"][:, order]}  # noqa: E731
    moved = apply_policy({"a": LinearMap(turn)}, state)
    there, _ = tx.update(permuted(grads), moved)
    here, _ = tx.update(grads, state)
    np.testing.assert_allclose(there["a"], permuted(here)["a"], rtol=1e-6)
    rows = apply_policy({"a": LinearMap(jnp.eye(N)[::-1], axis=-2)}, state)
    np.testing.assert_allclose(rows[0].mu["a"], state[0].mu["a"][::-1], rtol=1e-6)


def test_projected_moments_take_what_speaks_of_a_whole_parameter():
    params = {"kernel": draw(N, M), "bias": draw(M)}
    tx = lrx.galore(1e-2, rank=2)
    grads = jax.tree.map(jnp.cos, params)
    _, state = tx.update(grads, tx.init(params), params)
    moved = jax.jit(apply_policy)({"kernel": Mask(jnp.float32(0.5)), "bias": Zero()}, state)
    own = lambda state: jax.tree.leaves(state, is_leaf=is_projection)  # noqa: E731
    is_projection = lambda x: isinstance(x, lrx.projection.ProjectionState)  # noqa: E731
    (old,), (new,) = ([x for x in own(one) if is_projection(x)] for one in (state, moved))
    before, after = old.matrices["kernel"], new.matrices["kernel"]
    np.testing.assert_allclose(after.inner.mu, 0.5 * before.inner.mu, rtol=1e-6)
    np.testing.assert_array_equal(after.basis, before.basis)
    assert not np.any(new.plain.mu["bias"]) and np.any(old.plain.mu["bias"])
    with pytest.raises(ValueError, match=r"inner/mu: a mask of shape \(8, 6\) does not fit a"):
        apply_policy({"kernel": Mask(jnp.ones((N, M))), "bias": Keep()}, state)
    with pytest.raises(ValueError, match="inner/mu: a projected moment .* cannot be mapped"):
        apply_policy({"kernel": LinearMap(jnp.eye(M)), "bias": Keep()}, state)


ERRORS = {
    "no policy": (optax.adam, {"sites": Zero()}, "policy: 'head', of which the optimizer has moments"),
    "no object": (optax.adam, {"sites": Zero(), "head": "zero"}, r"policy: \['head'\] are none of Keep"),
    "mask": (optax.adam, POLICY | {"head": Mask(jnp.ones((3, 5)))},
             r"mu/head: a mask of shape \(3, 5\) does not fit a first moment of shape \(5,\)"),
    "axis": (optax.adam, POLICY | {"head": LinearMap(jnp.eye(5))},
             r"mu/head: a first moment of shape \(5,\) cannot be mapped"),
    "factored": (functools.partial(optax.adafactor, min_dim_size_to_factor=4), POLICY,
                 "v_row/sites/q/kernel/a: a factored moment"),
    "unknown": (optax.adagrad, POLICY, "sum_of_squares/.*no registered moment"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_moved_is_refused_by_its_place(case):
    make, policy, message = ERRORS[case]
    state = make(1e-2).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        apply_policy(policy, state)
    with pytest.raises(ValueError, match="axis=0 must be -1 or -2"):
        LinearMap(jnp.eye(2), axis=0)
