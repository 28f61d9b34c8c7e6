"""A tree in two, and together again: errors, optax, jit and grad."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters import join, partition

PARAMS = {
    "body": {"layer_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
}


def paths(tree):
    nodes = lrx.resolution.leaves_with_metadata(tree)
    return {path for path, node, _ in nodes if not isinstance(node, optax.MaskedNode)}


def test_each_leaf_is_in_one_half_and_both_have_the_structure_of_the_whole():
    selected, rest = partition(PARAMS, ("head/.*", r".*/bias"))
    assert paths(selected) == {"head/kernel", "head/bias", "body/layer_0/bias"}
    assert paths(rest) == {"body/layer_0/kernel"}
    holes = lambda tree: jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))  # noqa: E731
    assert holes(selected) == holes(rest) == jax.tree.structure(PARAMS)
    for order in ((selected, rest), (rest, selected)):
        whole = join(*order)
        chex.assert_trees_all_equal_structs(whole, PARAMS)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(PARAMS), strict=True)
        )
    body, rest = partition(rest, "body/layer_0/kernel")
    assert jax.tree.leaves(rest) == []
    chex.assert_trees_all_equal_structs(join(selected, body, rest), PARAMS)


def test_boxes_quantised_leaves_and_abstract_ones_are_single_leaves():
    boxed = {
        "a": nn.Partitioned(jnp.ones((2, 2)), names=("x", "y")),
        "b": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    selected, rest = partition(boxed, "a")
    assert isinstance(selected["a"], nn.Partitioned) and isinstance(rest["a"], optax.MaskedNode)
    assert join(selected, rest)["a"] is boxed["a"] and join(selected, rest)["b"] is boxed["b"]


def test_only_the_selected_part_trains_under_jit_and_optax():
    x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
    selected, rest = partition(PARAMS, "head/.*")
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    state = optimizer.init(selected)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (8 + 2) + 1

    def loss(selected, rest):
        params = join(selected, rest)
        hidden = x @ params["body"]["layer_0"]["kernel"] + params["body"]["layer_0"]["bias"]
        return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)

    @jax.jit
    def step(selected, rest, state):
        value, grads = jax.value_and_grad(loss)(selected, rest)
        updates, state = optimizer.update(grads, state, selected)
        return optax.apply_updates(selected, updates), state, value, grads

    values = []
    for _ in range(3):
        selected, state, value, grads = step(selected, rest, state)
        values.append(float(value))
    assert values[2] < values[0]
    chex.assert_trees_all_equal_structs(grads, selected)
    want = jax.grad(
        lambda head: loss(
            PARAMS | {"head": head}, jax.tree.map(lambda _: optax.MaskedNode(), PARAMS)
        )
    )(PARAMS["head"])
    first = jax.grad(loss)(*partition(PARAMS, "head/.*"))
    np.testing.assert_allclose(first["head"]["kernel"], want["kernel"], rtol=1e-6)
    assert join(selected, rest)["body"]["layer_0"]["kernel"] is PARAMS["body"]["layer_0"]["kernel"]


def test_errors():
    with pytest.raises(
        ValueError, match=r"patterns: 'heads/\.\*' matches no leaf.*Did you mean \['head/bias'"
    ):
        partition(PARAMS, ("heads/.*",))
    with pytest.raises(
        ValueError, match="patterns: 'kernel' matches no leaf"
    ):  # the whole path, not a part of it
        partition(PARAMS, "kernel")
    with pytest.raises(ValueError, match="patterns: there is none"):
        partition(PARAMS, ())
    selected, rest = partition(PARAMS, "head/.*")
    with pytest.raises(ValueError, match="no part has the leaf 'body/layer_0/bias'"):
        join(selected)
    with pytest.raises(ValueError, match="2 parts have the leaf 'head/bias'"):
        join(selected, PARAMS)
    with pytest.raises(ValueError, match="not of one structure"):
        join(selected, rest["body"])
    with pytest.raises(ValueError, match="not of one structure"):
        join()
