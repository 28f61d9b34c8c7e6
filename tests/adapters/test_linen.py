"""Adapters in linen models: the numbers of bare functions, in other people's models too."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lowrank_jax as lrx
from experiments.models import llama
from lowrank_jax import linalg
from tests.adapters.linen_models import (
    FAMILIES,
    KEY,
    RULES,
    A,
    Every,
    X,
    adapted,
    close,
    every_adaptation,
    every_bare,
    every_input,
    every_params,
    initial,
    on,
    run,
    total,
)

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation


def gradients(function, params, adaptation, *args, work=lrx.attach):
    """Of `total(function)` for what trains."""
    loss = lambda train: total(function(work(params, adaptation.replace(train=train)), *args))  # noqa: E731
    return jax.grad(loss)(adaptation.train)


def some(*slow):
    """Every family; those of which the fast tests learn nothing more are slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in FAMILIES
    ]


@pytest.mark.parametrize("family", some("pissa", "hira"))
def test_every_layer_computes_what_a_bare_function_does(family):
    params, adaptation, inputs = every_params(), every_adaptation(family), every_input()

    def outputs(params):
        attached, plain = lrx.attach(params, adaptation), lrx.effective(params, adaptation)
        return (
            on(Every())(attached, *inputs),
            every_bare(attached, *inputs),
            Every().apply({"params": plain}, *inputs),
        )

    got, bare, effective = run(outputs, params)
    close(got, bare)
    close(got, effective, rtol=1e-4, atol=1e-4)
    base = Every().apply({"params": params}, *inputs)
    assert all(not np.allclose(got[name], base[name], atol=1e-3) for name in base)


@pytest.mark.parametrize("family", some("lora", "pissa", "dora", "oft", "hira"))
def test_gradients_are_those_through_effective(family):
    params, adaptation, inputs = every_params(), every_adaptation(family), every_input()
    plain = lambda params, *args: Every().apply({"params": params}, *args)  # noqa: E731

    def both(params):
        of = lambda function, work: gradients(function, params, adaptation, *inputs, work=work)  # noqa: E731
        return of(on(Every()), lrx.attach), of(plain, lrx.effective)

    got, expected = run(both, params)
    close(got, expected, 1e-3, 1e-3)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(got))


class Layer(nn.Module):
    """A block as somebody else might have written it."""

    @nn.compact
    def __call__(self, x, _=None):
        init = functools.partial(nn.with_partitioning, nn.initializers.lecun_normal())
        y = nn.LayerNorm()(x)
        y = nn.DenseGeneral((2, 5), kernel_init=init(("embed", "heads", None)), name="heads")(y)
        x = x + nn.DenseGeneral(
            8, axis=(-2, -1), kernel_init=init(("heads", None, "embed")), name="out"
        )(jnp.sin(y))
        up = nn.Dense(12, use_bias=False, kernel_init=init(("embed", "mlp")), name="up")
        return x + nn.Dense(8, kernel_init=init(("mlp", "embed")), name="down")(
            jnp.tanh(up(x))
        ), None


class Foreign(nn.Module):
    """Its own scan, rematerialisation and partitioning; `params` is the only collection that it
    lifts."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return nn.Dense(4, name="head")(layers(name="layers")(x, None)[0])


FOREIGN = {
    f"layers/{name}": view
    for name, view in RULES.items()
    if name.partition("/")[0] in ("heads", "out")
}


@functools.cache
def foreign():
    """(parameters in boxes, an adaptation of three families, a leaf trained in full)."""
    params = initial(Foreign(), X)
    rules = {"(.*/heads|.*/down)/kernel": A.lora(rank=2), ".*/up/kernel": FAMILIES["uni_lora"]}
    rules |= {".*/out/kernel": A.oft(block=2)}
    return params, adapted(params, rules, views=lrx.Views(rules=FOREIGN), trainable="head/.*")


def test_a_foreign_model_with_its_own_scan():
    params, adaptation = foreign()
    attached = lrx.attach(params, adaptation)
    assert jax.tree.structure(nn.unbox(params)) == jax.tree.structure(
        jax.tree.map(
            lambda x: x.kernel if isinstance(x, lrx.adapters.AdaptedKernel) else x,
            nn.unbox(attached),
            is_leaf=lambda x: isinstance(x, lrx.adapters.AdaptedKernel),
        )
    )
    plain = lambda params, x: Foreign().apply({"params": params}, x)  # noqa: E731

    def both(params, x):
        of = lambda function, work: (  # noqa: E731
            function(work(params, adaptation), x),
            gradients(function, params, adaptation, x, work=work),
        )
        return of(on(Foreign()), lrx.attach), of(plain, lrx.effective)

    got, expected = run(both, params, X)
    close(got, expected, rtol=1e-3, atol=1e-4)


def test_partitioning_is_inherited():
    params, adaptation = foreign()
    specs = nn.get_partition_spec(lrx.attach(params, adaptation))["layers"]
    arrays = lambda name: specs[name]["kernel"].bound[0].arrays  # noqa: E731
    assert specs["heads"]["kernel"].kernel == PartitionSpec("layers", "embed", "heads", None)
    assert arrays("heads") == {
        "a": PartitionSpec("layers", "embed", None),
        "b": PartitionSpec("layers", None, "heads"),
        "scale": PartitionSpec("layers", None),
    }
    assert arrays("down")["a"] == PartitionSpec("layers", "mlp", None)
    assert arrays("up")["ib"] == PartitionSpec("layers", None, "mlp")
    assert arrays("out") == {
        "skew": PartitionSpec("layers", "heads", None),
        "scale": PartitionSpec("layers"),
    }


def test_experts_by_vmap():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            expert = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                out_axes=0,
            )
            return expert(6, name="experts")(x)

    params = initial(Experts(), X)
    adaptation = adapted(params, FAMILIES["dora"], views=lrx.Views(stacked=("experts/.*",)))
    expected = Experts().apply({"params": lrx.effective(params, adaptation)}, X)
    close(on(Experts())(lrx.attach(params, adaptation), X), expected, atol=1e-4)


def test_several_adapters_act_in_their_order():
    params = initial(nn.Dense(6), X)
    both = {
        name: adapted(params, FAMILIES[name], seed, name=name)
        for seed, name in enumerate(("oft", "dora"))
    }
    results = {}
    for active in (("oft", "dora"), ("dora", "oft"), ("oft",)):
        results[active] = on(nn.Dense(6))(lrx.attach(params, both, active=active), X)
        plain = lrx.effective(params, both, active=active)
        close(results[active], nn.Dense(6).apply({"params": plain}, X), atol=1e-4)
    assert not np.allclose(*list(results.values())[:2], atol=1e-3)


class Stack(nn.Module):
    """Linear layers in a scan, with or without rematerialisation."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        class One(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(8, use_bias=False, name="dense")(x), None

        one = nn.remat(One) if self.remat else One
        layers = nn.scan(one, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


STACKED = lrx.Views(stacked=("layers/.*",))


def test_rows_choose_among_candidates():
    params = initial(Stack(), X)
    own = {
        name: adapted(params, A.lora(rank=2), seed, views=STACKED) for seed, name in enumerate("ab")
    }
    some = A.candidates(own)
    got = on(Stack())(lrx.attach(params, some, ids=A.candidate_ids(some, ["b", None, "a"])), X)
    for row, name in enumerate(["b", None, "a"]):
        plain = params if name is None else lrx.effective(params, own[name])
        close(got[row], Stack().apply({"params": plain}, X[row]), atol=1e-4)


def test_dropout_differs_by_layer_and_is_the_same_when_recomputed():
    params = initial(Stack(), X)
    adaptation = adapted(params, A.lora(rank=2, dropout=0.5), views=STACKED)
    attach = functools.partial(lrx.attach, key=jax.random.key(5))

    def by_hand(attached, x, one_key=False):
        node = attached["layers"]["dense"]["kernel"]
        for layer in range(3):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], node)
            if one_key:
                one = dataclasses.replace(
                    one, bound=(dataclasses.replace(one.bound[0], keys=node.bound[0].keys[0]),)
                )
            x = lrx.matmul(x, one)
        return x

    def outputs(params):
        attached = attach(params, adaptation)
        of = lambda function: gradients(function, params, adaptation, X, work=attach)  # noqa: E731
        return (
            on(Stack(remat=True))(attached, X),
            by_hand(attached, X),
            of(on(Stack(remat=True))),
            of(by_hand),
            by_hand(attached, X, one_key=True),
            on(Stack())(lrx.attach(params, adaptation), X),
        )

    got, expected, grads, expected_grads, one_key, without = run(outputs, params)
    close(got, expected)
    close(grads, expected_grads)
    assert not np.allclose(expected, one_key, atol=1e-3)
    assert not np.allclose(expected, without, atol=1e-3)


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

    def outputs(small, decoded):
        of = lambda tree: on(Every())(tree, *inputs)  # noqa: E731
        return (
            of(small),
            of(decoded),
            of(lrx.attach(small, adaptation)),
            of(lrx.attach(decoded, adaptation)),
        )

    got, expected, with_adapters, expected_with = run(outputs, small, decoded)
    close(got, expected)
    close(with_adapters, expected_with)


def test_dtypes_are_those_of_the_layer():
    for layer, x in (
        (nn.Dense(6, dtype=jnp.bfloat16), X),
        (nn.Embed(9, 4, dtype=jnp.bfloat16), jnp.arange(3)),
    ):
        params = initial(layer, x)
        adaptation = adapted(params, {"kernel|embedding": A.lora(rank=2)})
        got = on(layer)(lrx.attach(params, adaptation), x)
        assert got.dtype == jnp.bfloat16
        close(
            got, layer.apply({"params": lrx.effective(params, adaptation)}, x), rtol=2e-2, atol=2e-2
        )


def test_a_product_of_the_layers_own():
    """It multiplies by the kernel and the thin products go through it: 2 x (K + delta)."""
    calls = []

    def own(x, kernel, dimension_numbers, precision=None):
        calls.append(precision)
        return 2 * jax.lax.dot_general(x, kernel, dimension_numbers)

    layer = nn.Dense(6, use_bias=False, precision="highest", dot_general=own)
    params = initial(layer, X)
    adaptation = adapted(params, A.lora(rank=2))
    expected = 2 * X @ lrx.effective(params, adaptation)["kernel"]
    close(on(layer)(lrx.attach(params, adaptation), X), expected, atol=1e-4)
    assert calls
    assert set(calls) == {"highest"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": True}, {"scan": False}], ids=str)
def test_our_model(options):
    sizes = {
        "layers": 2,
        "width": 16,
        "hidden": 24,
        "heads": 2,
        "kv_heads": 1,
        "vocabulary_size": 31,
    }
    model = llama.Llama(llama.preset("nano", **sizes, **options))
    tokens = jax.random.randint(KEY, (2, 6), 0, 31)
    params = initial(model, tokens)
    views = lrx.Views(stacked=() if options.get("scan") is False else ("layers/.*",))
    rules = {"all-linear": A.lora(rank=2), "embed/.*": A.lora(rank=2)}
    adaptation = adapted(params, rules, views=views, trainable="norm/.*")

    def loss(params):
        return llama.loss_and_metrics(
            model.apply({"params": params}, tokens), tokens, jnp.ones(tokens.shape)
        )[0]

    def both(train, params):
        def of(loss, work):
            return jax.value_and_grad(
                lambda train: loss(work(params, adaptation.replace(train=train)))
            )(train)

        return of(lrx.adapted(loss), lrx.attach), of(loss, lrx.effective)

    got, expected = run(both, adaptation.train, params)
    close(got, expected, rtol=1e-3, atol=1e-5)
