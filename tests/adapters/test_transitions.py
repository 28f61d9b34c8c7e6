"""What happens between two updates, by a family that needs it: its adapter is merged every few steps
and starts again (ReLoRA's way), so that the kernel changes by more than its rank."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.optim.surgery import Keep, Mask, Zero

A = lrx.adapters
GENERATOR = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)  # noqa: E731
PARAMS = {"one": draw(8, 6), "stack": draw(2, 8, 8), "plain": draw(6, 4), "bias": draw(4)}
VIEWS = lrx.Views(stacked=("stack",))
TARGET, X = draw(5, 4), draw(5, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarting(A.lora):
    """LoRA that every `every` steps is written into the kernel and starts again."""

    every: int = 4

    def transition(self, group, key, step, base, train, frozen, stats):
        restart = step % self.every == 0
        sites, policy, kernels = {}, {}, {}
        for number, (path, site) in enumerate(group.sites.items()):

            def one(key, kernel, own, fixed, site=site):
                merged = self.effective(site, kernel, own | fixed)
                again, _ = self.init_site(key, site, None, fixed)
                return merged, again

            keys = jax.random.fold_in(key, number)
            if site.lead:
                keys, one = jax.random.split(keys, site.lead), jax.vmap(one)
            own, fixed = train["sites"][path], frozen["sites"][path]
            kernels[path], sites[path] = jax.lax.cond(
                restart,
                one,
                lambda key, kernel, own, fixed: (kernel, own),
                *(keys, base[path], own, fixed),
            )
            # Adam's moments speak of factors that are gone
            policy[path] = {name: Mask(jnp.where(restart, 0.0, 1.0)) for name in own}
        return A.Transition(kernels, train | {"sites": sites}, frozen, {"sites": policy})


def model(params, train, adaptation):
    tree = lrx.attach(params, adaptation.replace(train=train))
    x = jnp.tanh(
        lrx.matmul(
            X, tree["stack"] if "stack" not in adaptation.layout.by_path else first(tree["stack"])
        )
    )
    return lrx.matmul(jnp.tanh(lrx.matmul(x, tree["one"])), tree["plain"]) + tree["bias"]


def first(kernel):
    return jax.tree.map(lambda leaf: leaf[0], kernel)


@functools.cache
def trained(steps, every=4, tx=optax.adam):
    """`[(outputs before, outputs after, adaptation, base, state)]` of every step."""
    tx, start = (
        tx(0.05),
        lrx.adapt(
            PARAMS,
            {"one|stack": Restarting(rank=1, every=every)},
            jax.random.key(0),
            views=VIEWS,
            trainable="bias",
        ),
    )

    @jax.jit
    def step(number, adaptation, base, state):
        def loss(train):
            return jnp.mean((model(base, train, adaptation) - TARGET) ** 2)

        updates, state = tx.update(jax.grad(loss)(adaptation.train), state, adaptation.train)
        adaptation = adaptation.replace(train=optax.apply_updates(adaptation.train, updates))
        before = model(base, adaptation.train, adaptation)
        key = jax.random.fold_in(jax.random.key(1), number)
        moved = lrx.adapters.transition(adaptation, key, number, base, state)
        after = model(moved.base, moved.adaptation.train, moved.adaptation)
        return before, after, loss(adaptation.train), moved

    found, adaptation, base, state = [], start, PARAMS, tx.init(start.train)
    for number in range(1, steps + 1):
        before, after, loss, moved = step(number, adaptation, base, state)
        adaptation, base, state = moved.adaptation, moved.base, moved.opt_state
        found.append((before, after, float(loss), moved))
    assert step._cache_size() == 1  # restarts are data
    return found


def test_a_restart_changes_arrays_and_not_the_function():
    for number, (before, after, _, moved) in enumerate(trained(8), 1):
        np.testing.assert_allclose(after, before, atol=2e-6)
        b = [own["b"] for own in moved.adaptation.train["sites"].values()]
        assert all(np.any(x) for x in b) == bool(number % 4)


def test_the_kernel_changes_by_more_than_the_rank_of_its_adapter():
    *_, (_, _, loss, moved) = trained(8)
    merged = lrx.merge(moved.base, moved.adaptation)
    for path in ("one", "stack"):
        changes = np.reshape(merged[path] - PARAMS[path], (-1, *PARAMS[path].shape[-2:]))
        # the second layer of the stack is used by nobody
        assert np.linalg.matrix_rank(changes[0], tol=1e-4) == 2
    assert loss < trained(8)[0][2]
    np.testing.assert_array_equal(moved.base["plain"], PARAMS["plain"])
    *_, (_, _, _, without) = trained(8, every=99)
    change = lrx.merge(without.base, without.adaptation)["one"] - PARAMS["one"]
    assert np.linalg.matrix_rank(np.asarray(change), tol=1e-4) == 1


@pytest.mark.parametrize("tx", [optax.adam, lrx.lora_plus], ids=["adam", "lora_plus"])
def test_moments_start_again_with_their_parameters_and_the_others_go_on(tx):
    found = trained(8, tx=tx)

    def firsts(state):
        """`{path: first moments}`."""
        mu = [
            node.mu
            for node in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(node, "mu")
        ]
        leaves = [leaf for tree in mu for leaf in jax.tree_util.tree_leaves_with_path(tree)]
        return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in leaves}

    for number, (*_, moved) in enumerate(found, 1):
        for path, moment in firsts(moved.opt_state).items():
            gone = "sites" in path and number % 4 == 0
            # the factor a has no gradient while b is 0
            waits = path.endswith("['a']") and number % 4 == 1
            assert np.any(moment) != (gone or waits), (number, path)
        counts = [
            leaf
            for leaf in jax.tree.leaves(moved.opt_state)
            if jnp.issubdtype(leaf.dtype, jnp.integer)
        ]
        assert all(int(count) in (0, 1, number) for count in counts)


def test_families_without_a_transition_leave_everything_as_it_is():
    adaptation = lrx.adapt(PARAMS, {"one": A.lora(rank=2)}, jax.random.key(0))
    state = optax.adam(1e-3).init(adaptation.train)
    moved = A.transition(adaptation, jax.random.key(1), 3, PARAMS, state)
    assert moved.base is PARAMS and moved.opt_state is state
    assert all(map(np.array_equal, jax.tree.leaves(moved.adaptation), jax.tree.leaves(adaptation)))
    is_policy = lambda x: isinstance(x, Keep)  # noqa: E731
    assert len(jax.tree.leaves(moved.policy, is_leaf=is_policy)) == len(
        jax.tree.leaves(adaptation.train)
    )
    assert A.transition(adaptation, jax.random.key(1), 3, PARAMS).opt_state is None


def test_a_quantised_base_is_written_as_it_is_stored_and_boxes_stay():
    import flax.linen as nn

    kernel = lrx.linalg.quantize_blocks(draw(16, 8), "linear", 8)
    params = {"one": kernel, "boxed": nn.Partitioned(draw(16, 8), ("in", "out"))}
    adaptation = lrx.adapt(params, {".*": Restarting(rank=2, every=1)}, jax.random.key(0))
    adaptation = adaptation.replace(train=jax.tree.map(lambda x: x + 0.1, adaptation.train))
    moved = A.transition(adaptation, jax.random.key(1), 1, params)
    assert type(moved.base["one"]) is type(kernel)
    assert moved.base["boxed"].names == ("in", "out")
    found, wanted = (
        lrx.effective(*pair) for pair in ((moved.base, moved.adaptation), (params, adaptation))
    )
    np.testing.assert_allclose(found["boxed"].value, wanted["boxed"].value, atol=1e-6)
    np.testing.assert_allclose(found["one"].dequantize(), wanted["one"].dequantize(), atol=0.05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(A.lora):
    what: str

    def transition(self, group, key, step, base, train, frozen, stats):
        sites = {path: dict(own) for path, own in train["sites"].items()}
        policy = {}
        if self.what == "shape":
            sites["one"]["a"] = sites["one"]["a"][:, :1]
        if self.what == "dtype":
            sites["one"]["b"] = sites["one"]["b"].astype(jnp.bfloat16)
        if self.what == "name":
            policy = {"sites": {"one": {"c": Zero()}}}
        if self.what == "policy":
            policy = {"sites": {"one": {"a": 0}}}
        if self.what == "stats":
            sites["one"]["a"] = sites["one"]["a"] * stats["one"]["weight"]
        return A.Transition({}, train | {"sites": sites}, frozen, policy)


ERRORS = {
    "shape": r"transition of wrong: train changes .*\['a'\]: \(\(8, 2\), 'float32'\) -> \(\(8, 1\),",
    "dtype": r"\['b'\]: \(\(2, 6\), 'float32'\) -> \(\(2, 6\), 'bfloat16'\)",
    "name": r"policy names \['c'\] at 'one', which do not train",
    "policy": r"policy of \['a'\] at 'one' is none of lrx.surgery's",
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_a_family_may_not_change_is_refused(what):
    adaptation = lrx.adapt(PARAMS, {"one": Wrong(rank=2, what=what)}, jax.random.key(0))
    with pytest.raises(ValueError, match=ERRORS[what]):
        A.transition(adaptation, jax.random.key(1), 0, PARAMS)


def test_measurements_reach_the_family_and_other_trees_are_refused():
    adaptation = lrx.adapt(PARAMS, {"one": Wrong(rank=2, what="stats")}, jax.random.key(0))
    moved = A.transition(
        adaptation, jax.random.key(1), 0, PARAMS, stats={"one": {"weight": jnp.float32(0.5)}}
    )
    before, after = (one.train["sites"]["one"]["a"] for one in (adaptation, moved.adaptation))
    np.testing.assert_array_equal(after, 0.5 * before)
    with pytest.raises(ValueError, match=r"base: adapted leaves \['one'\] are missing"):
        A.transition(adaptation, jax.random.key(1), 0, {"two": PARAMS["one"]})
    both = A.candidates({"a": adaptation, "b": adaptation})
    with pytest.raises(
        ValueError, match="rows choose among .'a', 'b'.; move each of them by itself"
    ):
        A.transition(both, jax.random.key(1), 0, PARAMS)
