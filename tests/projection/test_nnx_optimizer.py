"""Projection optimizers and adapters on nnx Variables: one path for a Variable and for its value.

`nnx.Optimizer` gives `init` a state of Variables and `update` their values. What it trains is
compared with the same optimizer on a dict of arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowrank_jax as lrx
from lowrank_jax.trees import leaves_with_metadata

TOKENS = jnp.arange(6)[None]
VIEWS = lrx.Views(stacked=(r"layers/.*",))
GALORE = lrx.galore(1e-2, rank=4, weight_decay=0.1, views=VIEWS)


class Model(nnx.Module):
    """A tied head, layers made by nnx.vmap and run by nnx.scan, and two layers of their own."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        make = nnx.split_rngs(splits=2)(
            nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=(0,), out_axes=0)
        )
        self.layers = make(rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens):
        run = nnx.scan(
            lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        x = run(self.embed(tokens), self.layers)
        return self.embed.attend(self.down(jnp.tanh(self.up(x))))


def loss(model):
    return jnp.mean(jnp.square(model(TOKENS) - 1))


def gradients(params):
    """Any: what is tested is not the model."""
    return jax.tree.map(lambda x: jnp.cos(3 * x), params)


def update(model, optimizer, wrt=nnx.Param):
    with jax.disable_jit():
        optimizer.update(model, gradients(nnx.state(model, wrt)))


def by_path(tree):
    return {path: np.asarray(leaf) for path, leaf, _ in leaves_with_metadata(tree)}


def assert_same(trained, expected):
    trained, expected = by_path(trained), by_path(expected)
    assert trained.keys() == expected.keys()
    for path, leaf in trained.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def steps_of_arrays(tx, steps, of=gradients):
    params = nnx.to_pure_dict(nnx.state(Model(), nnx.Param))
    with jax.disable_jit():
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(of(params), state, params)
            params = optax.apply_updates(params, updates)
    return params


NAMED = {
    "galore-chain": optax.chain(optax.clip_by_global_norm(0.5), GALORE),
    "dct_adamw": lrx.dct_adamw(1e-2, rank=4, views=VIEWS, error_feedback=True),
    "frugal": lrx.frugal(1e-2, rank=0.5, rule="sgd", views=VIEWS),
    "ldadam": lrx.ldadam(1e-2, rank=4, views=VIEWS),
    "apollo": lrx.apollo(1e-2, rank=4, views=VIEWS),
    "apollo_mini": lrx.apollo_mini(1e-2, views=VIEWS),
    "muon": lrx.muon(1e-2, views=VIEWS),
    "soap": lrx.soap(1e-2, views=VIEWS, first="identity"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "dct_adamw" else pytest.mark.slow) for x in NAMED]
)
def test_an_optimizer_of_a_model_is_that_of_its_arrays(name):
    model = Model()
    optimizer = nnx.Optimizer(model, NAMED[name], wrt=nnx.Param)
    update(model, optimizer)
    assert_same(nnx.state(model, nnx.Param), steps_of_arrays(NAMED[name], 1))


def test_variables_and_values_have_one_state_and_updates_like_the_parameters():
    params = nnx.state(Model(), nnx.Param)
    boxed, bare = GALORE.init(params), GALORE.init(nnx.as_pure(params))
    assert jax.tree.structure(boxed) == jax.tree.structure(bare)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    assert not any(map(is_variable, jax.tree.leaves(boxed, is_leaf=is_variable)))
    with jax.disable_jit():
        updates, _ = GALORE.update(params, boxed, params)
        pure, _ = GALORE.update(nnx.as_pure(params), bare, nnx.as_pure(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_same(updates, pure)
    assert str(lrx.explain(GALORE, params)) == str(lrx.explain(GALORE, nnx.as_pure(params)))


@pytest.mark.slow
def test_under_nnx_jit_with_a_model_and_optimizer_in_one():
    model = Model()
    optimizer = nnx.ModelAndOptimizer(model, GALORE)

    @nnx.jit
    def step(optimizer):
        value, grads = nnx.value_and_grad(loss)(optimizer.model)
        optimizer.update(grads)
        return value

    first, second = float(step(optimizer)), float(step(optimizer))
    assert second < first
    graphdef, _, rest = nnx.split(Model(), nnx.Param, ...)
    of = jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest)))
    assert_same(nnx.state(model, nnx.Param), steps_of_arrays(GALORE, 2, of))


def test_parameters_by_path_train_alone():
    model, wrt = Model(), nnx.All(nnx.Param, nnx.PathContains("up"))
    before = by_path(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, lrx.galore(1e-2, rank=4), wrt=wrt)
    update(model, optimizer, wrt)
    moved = {
        path
        for path, leaf in by_path(nnx.state(model, nnx.Param)).items()
        if np.any(leaf != before[path])
    }
    assert moved == {"up/kernel", "up/bias"}


def test_inside_partition():
    """Masked Variables hold the mask; masked values are the mask."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "low" if "kernel" in str(keys) else "plain", params
        )

    tx = optax.partition({"low": GALORE, "plain": optax.adam(1e-2)}, labels)
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update(model, optimizer)
    assert_same(nnx.state(model, nnx.Param), steps_of_arrays(tx, 1))


def test_shapes_without_arrays():
    def make():
        model = Model()
        return nnx.Optimizer(model, GALORE, wrt=nnx.Param)

    abstract, real = nnx.state(nnx.eval_shape(make)), nnx.state(make())
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(abstract) == shapes(real)


@pytest.mark.slow
def test_an_optimizer_comes_back_from_orbax(tmp_path):
    model = Model()
    optimizer = nnx.Optimizer(model, GALORE, wrt=nnx.Param)
    update(model, optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
    other = Model(seed=1)
    restored = nnx.Optimizer(other, GALORE, wrt=nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "state", nnx.state((other, restored)))
    nnx.update((other, restored), found)
    for one, its in ((model, optimizer), (other, restored)):
        update(one, its)
    for first, second in zip(
        jax.tree.leaves(nnx.state((model, optimizer))),
        jax.tree.leaves(nnx.state((other, restored))),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_shardings_of_a_state_of_variables():
    params = nnx.state(Model(), nnx.Param)
    mesh = lrx.meshes.make_mesh(data=-1)
    placed = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), params)
    found = lrx.state_shardings(GALORE, params, placed)
    assert jax.tree.structure(found) == jax.tree.structure(GALORE.init(params))
    assert lrx.projection.sides_for(params, placed, views=VIEWS) == lrx.projection.resolved_sides(
        GALORE, params
    )


@pytest.mark.slow
def test_adapters_of_variables_are_those_of_arrays():
    """`adapt`, `attach`, `effective`, `merge`, `unmerge`, `partition`, `join`, `to_lora` and
    `absorb`."""
    graphdef, state, rest = nnx.split(Model(), nnx.Param, ...)
    values = []
    for params in (state, nnx.to_pure_dict(state)):
        rules = {
            r".*/kernel": lrx.adapters.lora(rank=2, init="pissa"),
            "embed/embedding": lrx.adapters.lora(rank=2),
        }
        adaptation = lrx.adapt(params, rules, jax.random.key(0), views=VIEWS, bias="adapted")
        adaptation = adaptation.replace(train=jax.tree.map(lambda x: x + 0.1, adaptation.train))
        of = lambda params: loss(nnx.merge(graphdef, params, rest))  # noqa: E731
        plain = of(lrx.effective(params, adaptation))
        attached = lrx.adapted(of)(lrx.attach(params, adaptation))
        np.testing.assert_allclose(attached, plain, rtol=1e-5)
        values.append(float(plain))
        merged = lrx.merge(params, adaptation)
        unmerged = lrx.adapters.unmerge(merged, adaptation, base=params)
        kept = lrx.adapters.join(*lrx.adapters.partition(params, (r"up/.*",)))
        absorbed, _ = lrx.adapters.absorb(params, adaptation)
        for tree in (merged, unmerged, kept, absorbed):
            assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert_same(unmerged, params)
        assert_same(kept, params)
        assert sorted(lrx.to_lora(params, adaptation)[0].train["sites"]) == sorted(
            adaptation.train["sites"]
        )
    assert values[0] == values[1]


class Pair(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Param(jnp.eye(4, 2)), nnx.Param(jnp.eye(2, 6))
        self.bias = nnx.Param(jnp.zeros(6))


PAIRS = {
    "lora_plus": lrx.lora_plus(1e-2),
    "scaled_adamw": lrx.scaled_adamw(1e-2, weight_decay=0.1),
    "altlora": lrx.altlora(1e-2, scale=2.0),
    "altlora_plus": lrx.altlora_plus(1e-2, scale=2.0, alternate=None),
    "precondition": optax.chain(lrx.adapters.precondition_pairs(), optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "altlora_plus" else pytest.mark.slow) for x in PAIRS]
)
def test_pairs_of_variables(name):
    model = nnx.Dict(q=Pair())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, PAIRS[name], wrt=nnx.Param)
    state = PAIRS[name].init(params)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with jax.disable_jit():
        optimizer.update(model, grads)
    updates, _ = PAIRS[name].update(nnx.to_pure_dict(grads), state, params)
    assert_same(nnx.state(model, nnx.Param), optax.apply_updates(params, updates))
