"""Adapters in nnx models: the numbers of linen, as functions of a state and held by the model, and
what trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_jax as lrx
from lowrank_jax import linalg
from tests.adapters.linen_models import (
    FAMILIES,
    KEY,
    A,
    Every,
    X,
    adapted,
    close,
    every_adaptation,
    every_input,
    every_params,
    run,
    total,
)
from tests.adapters.nnx_models import EveryNnx, inserted, merged, parameters, plainly

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

TRAINED = nnx.DiffState(0, lrx.nnx.AdapterParam)
STACKED = lrx.Views(stacked=("layers/.*",))


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("oft", "uni_lora") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_every_layer_computes_what_linen_does(family):
    params, adaptation, inputs = every_params(), every_adaptation(family), every_input()
    model = EveryNnx(nnx.Rngs(0))
    nnx.update(model, params)
    held = nnx.clone(model)
    lrx.nnx.insert(held, adaptation)
    held_graphdef, held_state = nnx.split(held)

    def outputs(params, held_state):
        attached = lrx.attach(params, adaptation)
        linen = lrx.adapted(lambda params: Every().apply({"params": params}, *inputs))(attached)
        return (
            linen,
            merged(model, attached)(*inputs),
            nnx.merge(held_graphdef, held_state)(*inputs),
        )

    linen, functional, stateful = run(outputs, params, held_state)
    close(functional, linen)
    close(stateful, linen)
    base, back = lrx.nnx.extract(held, adaptation)
    close(base, params, rtol=0, atol=0)
    close(back, adaptation, rtol=0, atol=0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Stack(nnx.Module):
    """Layers made by nnx.vmap, and run by nnx.scan with rematerialisation inside; a look-up with a
    tied head."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)
        self.embed = nnx.Embed(9, 8, rngs=rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x, layer):
            return nnx.remat(lambda x, layer: layer(x))(x, layer)

        return self.embed.attend(layers(self.embed(ids), self.layers))


IDS = jnp.array([[1, 2, 0], [8, 3, 3]])
RULES = {
    ".*/up/kernel|embed/.*": A.lora(rank=2),
    ".*/down/kernel": A.uni_lora(rank=2, size=32, bound=0.5),
}


def test_stacked_layers_that_share():
    """Outputs and gradients as functions of a state, held by the model, and through effective
    parameters."""
    model = Stack(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, RULES, views=STACKED, trainable=".*/norm/.*")
    held, before = inserted(nnx.clone(model), adaptation)
    graphdef, state = nnx.split(held)

    def outputs(params, train, state):
        def of(work, merge):
            loss = lambda train: total(merge(work(params, adaptation.replace(train=train)))(IDS))  # noqa: E731
            return jax.value_and_grad(loss)(train)

        loss = lambda model: total(model(IDS))  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=TRAINED)(nnx.merge(graphdef, state))
        return (
            of(lrx.attach, functools.partial(merged, model)),
            of(lrx.effective, before),
            value,
            nnx.to_pure_dict(grads),
        )

    (value, grads), expected, held_value, held_grads = run(outputs, params, adaptation.train, state)
    close((value, grads), expected, rtol=1e-3, atol=1e-4)
    close(held_value, value)
    assert sorted(held_grads) == ["adapter_groups", "embed", "layers"]
    theta = held_grads["adapter_groups"]["default"]["unilora"]["trained"]["theta"]
    close(theta, grads["shared"]["unilora"]["theta"], atol=1e-4)
    close(
        held_grads["layers"]["up"]["kernel_adapters"][0]["trained"],
        grads["sites"]["layers/up/kernel"],
        atol=1e-4,
    )
    close(held_grads["layers"]["norm"]["scale"], grads["trainable"]["layers/norm/scale"], atol=1e-4)


def test_nothing_trains_that_is_not_named():
    model = nnx.Sequential(
        nnx.Linear(8, 6, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(6, 4, rngs=nnx.Rngs(1))
    )
    params = parameters(model)
    kernel = "layers/0/kernel"

    def paths(model):
        return {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model))}

    before = paths(model)
    lrx.nnx.insert(model, lrx.adapt(params, {kernel: A.lora(rank=2)}, KEY))
    assert before < paths(model)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    loss = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    first = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    for wrt, argnums, moves in ((nnx.Param, 0, False), (lrx.nnx.AdapterParam, TRAINED, True)):
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=wrt)
        assert len(jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))) == (
            2 + 4 if moves else 2
        )

        @nnx.jit
        def step(model, optimizer, x, argnums=argnums):
            optimizer.update(model, nnx.grad(loss, argnums=argnums)(model, x))

        step(model, optimizer, X)
        step(model, optimizer, X)
        now = nnx.to_pure_dict(nnx.state(model))
        trained = now["layers"][0]["kernel_adapters"][0].pop("trained")
        old = jax.tree.map(lambda x: x, first)
        start = old["layers"][0]["kernel_adapters"][0].pop("trained")
        close(now, old, rtol=0, atol=0)
        assert all(
            (float(jnp.max(jnp.abs(trained[name] - start[name]))) > 0.01) == moves
            for name in trained
        )


def test_several_adapters_act_in_their_order():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    params = parameters(model)
    both = {
        name: adapted(params, FAMILIES[name], seed, name=name)
        for seed, name in enumerate(("oft", "dora"))
    }
    for active in (("oft", "dora"), ("dora", "oft")):
        expected = plainly(model, lrx.effective(params, both, active=active))(X)
        close(merged(model, lrx.attach(params, both, active=active))(X), expected, atol=1e-4)
        held, _ = inserted(nnx.clone(model), *(both[name] for name in active))
        close(held(X), expected, atol=1e-4)
        # and one that is held, one that is attached
        half, _ = inserted(nnx.clone(model), both[active[1]])
        graphdef, state = nnx.split(half)
        pure = nnx.to_pure_dict(state)
        pure["kernel"] = lrx.attach(params, both, active=active[:1])["kernel"]
        close(nnx.merge(graphdef, pure)(X), expected, atol=1e-4)


def test_rows_choose_among_candidates():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    params = parameters(model)
    own = {name: adapted(params, A.lora(rank=2), seed) for seed, name in enumerate("ab")}
    some = A.candidates(own)
    got = merged(model, lrx.attach(params, some, ids=A.candidate_ids(some, ["b", None, "a"])))(X)
    for row, name in enumerate(["b", None, "a"]):
        plain = params if name is None else lrx.effective(params, own[name])
        close(got[row], plainly(model, plain)(X[row]), atol=1e-5)
    with pytest.raises(ValueError, match="holds candidates .* lrx.attach, and call lrx.adapted"):
        lrx.nnx.insert(model, some)


def test_dropout_draws_the_masks_of_attach():
    model = Stack(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {".*/up/kernel": A.lora(rank=2, dropout=0.5)}, views=STACKED)
    held, _ = inserted(nnx.clone(model), adaptation)
    apply = nnx.jit(lambda model: model(IDS))
    of = lambda **options: jax.jit(merged(model, lrx.attach(params, adaptation, **options)))(IDS)  # noqa: E731
    expected = of()
    close(apply(held), expected)
    held.train()
    with pytest.raises(
        ValueError,
        match=r"'layers/up/kernel': the model trains .* lrx.nnx.seed_dropout\(model, key\)",
    ):
        apply(held)
    for seed in (1, 2):
        lrx.nnx.seed_dropout(held, jax.random.key(seed))
        dropped = of(key=jax.random.key(seed))
        close(apply(held), dropped)
        assert not np.allclose(dropped, expected, atol=1e-3)
    held.eval()
    close(apply(held), expected)
    with pytest.raises(ValueError, match="no adapter of the model has dropout"):
        lrx.nnx.seed_dropout(model, KEY)


@pytest.mark.slow
def test_a_quantised_base():
    params, adaptation, inputs = every_params(), every_adaptation("lora"), every_input()
    is_site = lambda keys: keys[-1].key in ("kernel", "embedding")  # noqa: E731
    small = jax.tree_util.tree_map_with_path(
        lambda keys, x: linalg.quantize_blocks(x, "linear") if is_site(keys) else x, params
    )
    decoded = jax.tree.map(
        lambda x: x.dequantize() if hasattr(x, "dequantize") else x,
        small,
        is_leaf=lambda x: hasattr(x, "dequantize"),
    )
    model = EveryNnx(nnx.Rngs(0))
    of = lambda params: merged(model, params)(*inputs)  # noqa: E731
    both = lambda tree: [of(tree), of(lrx.attach(tree, adaptation))]  # noqa: E731
    got, expected = run(lambda *trees: [both(tree) for tree in trees], small, decoded)
    close(got, expected)


def test_metadata_of_shardings_is_inherited():
    with jax.set_mesh(
        jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    ):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        model = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
        lrx.nnx.insert(model, adapted(parameters(model), A.dora(rank=2)))
        names = {
            keys[-1]: variable.get_metadata("out_sharding", None)
            for keys, variable in nnx.to_flat_state(nnx.state(model))
            if keys[0] == "kernel_adapters"
        }
    assert names == {
        "a": ("data", None),
        "b": (None, "model"),
        "magnitude": ("model",),
        "scale": (None,),
    }
    assert model.kernel.get_metadata("out_sharding") == ("data", "model")


def test_what_is_shared_is_lent_by_the_model():
    model = Stack(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, RULES, views=STACKED)
    held, _ = inserted(model, adaptation)
    layer = lambda layers, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)  # noqa: E731
    alone = lrx.nnx.adapted(layer)
    with pytest.raises(
        ValueError, match=r"'layers/down/kernel': unilora shares .* `with lrx.nnx.sharing\(model\)"
    ):
        alone(held.layers, X)
    with lrx.nnx.sharing(held):
        got = nnx.jit(alone)(held.layers, X)
        held(IDS)  # its own call takes nothing away
        close(alone(held.layers, X), got)
    plain = lrx.effective(params, adaptation)
    expected = layer(plainly(Stack(nnx.Rngs(0)), plain).layers, X)
    close(got, expected, atol=1e-4)
    close(lrx.nnx.adapted(lambda model, x: layer(model.layers, x))(held, X), expected, atol=1e-4)
    with pytest.raises(ValueError, match="shares arrays"):
        alone(held.layers, X)
    again = nnx.merge(*nnx.split(held))
    close(again(IDS), held(IDS))


class Writing(nnx.Module):
    """Draws, keeps statistics, counts in a Variable and in Python, and makes a new Variable."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.count, self.calls = nnx.BatchStat(jnp.zeros(())), 0

    def __call__(self, x, rngs):
        self.count[...] += 1
        self.calls += 1
        x = self.drop(self.norm(self.up(x))) + jax.random.normal(rngs.noise(), (6,))
        self.seen = nnx.Intermediate(jnp.mean(x))
        return x

    def twice(self, x):
        return 2 * self.up(x)


@pytest.mark.parametrize("jit", [False, True])
def test_what_a_call_writes_is_written(jit):
    model = Writing(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"up/kernel": A.lora(rank=2)})
    plain = plainly(nnx.clone(model), lrx.effective(params, adaptation))
    held, _ = inserted(model, adaptation)
    call = (
        nnx.jit(lambda model, x, rngs: model(x, rngs)) if jit else lambda *args: args[0](*args[1:])
    )
    streams = [nnx.Rngs(noise=3), nnx.Rngs(noise=3)]
    for _ in range(2):
        got, expected = (
            call(one, X, rngs) for one, rngs in zip((held, plain), streams, strict=True)
        )
        close(got, expected, atol=1e-4)
    assert streams[0].noise.count[...] == 2
    assert held.calls == 2 and held.count[...] == 2
    for kind in (nnx.BatchStat, nnx.Intermediate):
        found, wanted = (nnx.to_pure_dict(nnx.state(one, kind)) for one in (held, plain))
        close(found, wanted, atol=1e-4)
        assert jax.tree.leaves(found)
    close(lrx.nnx.adapted(Writing.twice)(held, X), plain.twice(X), atol=1e-4)
    with pytest.raises(ValueError, match=r"'up/kernel': the kernel is read.*lrx.nnx.adapted"):
        held.twice(X)
    close(lrx.nnx.extract(held, adaptation)[0], params, rtol=0, atol=0)


def test_a_call_that_writes_nothing_is_taken_within_a_gradient():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, A.lora(rank=2))
    held, before = inserted(model, adaptation)
    got = jax.grad(lambda x: total(held(x)))(X)
    close(
        got, jax.grad(lambda x: total(before(lrx.effective(params, adaptation))(x)))(X), atol=1e-4
    )


class Attending(nnx.Module):
    """Flax's attention, with kernels of three axes, and a cache."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x, decode=False)


HEADS = lrx.MatrixView(rows=(0,), cols=(1, 2))
ATTENTION = {
    ".*/(query|key|value)/kernel": HEADS,
    ".*/out/kernel": lrx.MatrixView(rows=(0, 1), cols=(2,)),
}


@pytest.mark.parametrize("family", ["lora", "dora"])
def test_kernels_of_attention(family):
    model = Attending(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, FAMILIES[family], views=lrx.Views(rules=ATTENTION))
    assert len(adaptation.layout.sites) == 4
    held, before = inserted(nnx.clone(model), adaptation)

    def of(work, call):
        loss = lambda train: total(call(work(params, adaptation.replace(train=train)))(X))  # noqa: E731
        return jax.value_and_grad(loss)(adaptation.train)

    got = of(lrx.attach, functools.partial(merged, model))
    close(got, of(lrx.effective, before), rtol=1e-3, atol=1e-4)
    close(total(held(X)), got[0])


def test_the_former_merge():
    """It warns, its call is right and is told what the one before wrote; more of it is an error."""
    model = Writing(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"up/kernel": A.lora(rank=2)})
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    with pytest.warns(DeprecationWarning, match=r"lrx.nnx.merge is deprecated.*lrx.adapted"):
        got = lrx.nnx.merge(graphdef, lrx.attach(params, adaptation), rest)
    with pytest.warns(DeprecationWarning, match="lrx.nnx.merge is deprecated"):
        plain = lrx.nnx.merge(graphdef, lrx.effective(params, adaptation), rest)
    assert type(plain) is Writing
    streams = [nnx.Rngs(noise=3), nnx.Rngs(noise=3)]
    for _ in range(2):
        outputs = (one(X, rngs) for one, rngs in zip((got, plain), streams, strict=True))
        close(*outputs, atol=1e-4)
        streams = [nnx.Rngs(noise=4), nnx.Rngs(noise=4)]
    with pytest.raises(AttributeError, match=r".twice of a model with kernel nodes.*lrx.adapted"):
        got.twice(X)
