"""Adapters as parameters of a linen model."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lowrank_jax as lrx
from tests.adapters.linen_models import (
    FAMILIES,
    RULES,
    A,
    Every,
    close,
    every_input,
    every_params,
    moved,
    run,
    total,
)

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)), jnp.float32)
KEY = jax.random.key(0)


class EveryWrapped(nn.Module):
    """`Every`, by an author who wants adapters in it."""

    adapter: object

    @nn.compact
    def __call__(self, x, image, ids):
        own = functools.partial(lrx.linen.WithAdapter, adapter=self.adapter)
        embed = own(nn.Embed(12, 8, name="embed"))
        return {
            "dense": own(nn.Dense(6, name="dense"))(x),
            "heads": own(nn.DenseGeneral((2, 5), name="heads"))(x),
            "out": own(nn.DenseGeneral(8, axis=(-2, -1), name="out"))(
                jnp.stack([x, x[..., ::-1]], -2)[..., :5]
            ),
            "mix": own(nn.Einsum((3, 8, 4), name="mix"))(x, "bsd,sdf->bsf"),
            "conv": own(nn.Conv(6, (2, 2), strides=2, padding="VALID", name="conv"))(image),
            "embed": embed(ids),
            "attend": embed.attend(x),
        }


@pytest.mark.parametrize("family", ["lora", "dora", "oft", "pissa"])
def test_zeros_are_off_and_an_adaptation_goes_in_and_out(family):
    base, inputs, adapter = every_params(), every_input(), FAMILIES[family]
    model = EveryWrapped(adapter)
    declared = jax.eval_shape(model.init, KEY, *inputs)["params"]
    slots = {f"kernel_{adapter.kind}", f"embedding_{adapter.kind}"}
    assert {name: set(node) - slots for name, node in declared.items()} == {
        name: set(base[name]) for name in base
    }
    rules = {".*/(kernel|embedding)": adapter}
    adaptation = moved(lrx.adapt(base, rules, KEY, views=lrx.Views(rules=RULES)))
    params = lrx.linen.insert(declared, base, adaptation)
    chex.assert_trees_all_equal_structs(params, declared)
    off = lrx.linen.insert(declared, base, lrx.adapt(base, {"dense/kernel": adapter}, KEY))

    def outputs(params, off, base):
        of = lambda tree: model.apply({"params": tree}, *inputs)  # noqa: E731
        on = lrx.adapted(lambda params: Every().apply({"params": params}, *inputs))
        return (
            of(params),
            on(lrx.attach(base, adaptation)),
            of(base),
            of(off),
            Every().apply({"params": base}, *inputs),
        )

    got, expected, without, at_zero, plain = run(outputs, params, off, base)
    close(got, expected)
    close(without, plain, rtol=0, atol=0)
    close(at_zero, plain, atol=1e-4 if family == "pissa" else 1e-5)
    again, back = lrx.linen.extract(params, adaptation)
    close(again, base, rtol=0, atol=0)
    close(back, adaptation, rtol=0, atol=0)


class Block(nn.Module):
    adapter: object

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        up = lrx.linen.WithAdapter(nn.Dense(12, kernel_init=init), self.adapter)
        return nn.Dense(8)(jnp.tanh(up(x))), None


class Stack(nn.Module):
    """The author's own scan over the author's own blocks."""

    adapter: object
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0},
            length=2,
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.adapter, name="layers")(x, None)[0]


def test_a_scan_with_partitioning_dropout_and_gradients():
    lora = A.lora(rank=2, dropout=0.5)
    model = Stack(lora)
    params = model.init(KEY, X)["params"]
    specs = nn.get_partition_spec(params)["layers"]["Dense_0"]
    assert specs["kernel"] == PartitionSpec("layers", "embed", "mlp")
    assert specs["kernel_lora"] == {
        "a": PartitionSpec("layers", "embed", None),
        "b": PartitionSpec("layers", None, "mlp"),
        "scale": PartitionSpec("layers", None),
    }
    base, _ = lrx.linen.extract(params, lrx.adapt(params, {".*/Dense_0/kernel": lora}, KEY))
    adaptation = moved(
        lrx.adapt(base, {".*/Dense_0/kernel": lora}, KEY, trainable=".*/Dense_1/bias")
    )
    adaptation.train["trainable"]["layers/Dense_1/bias"] = jnp.ones((2, 8))

    def loss(train, key, model=model):
        inserted = lrx.linen.insert(params, base, adaptation.replace(train=train))
        rngs = {} if key is None else {"dropout": key}
        return total(model.apply({"params": inserted}, X, rngs=rngs))

    def expected(train):
        on = lrx.adapted(lambda params: model.apply({"params": params}, X))
        return total(on(lrx.attach(base, adaptation.replace(train=train))))

    key = jax.random.key(3)
    without = lambda train: loss(train, None)  # noqa: E731
    dropped, remat = (lambda train, m=m: loss(train, key, m) for m in (model, Stack(lora, True)))
    of = lambda train: [jax.value_and_grad(f)(train) for f in (without, expected, dropped, remat)]  # noqa: E731
    got, with_attached, with_dropout, with_remat = run(of, adaptation.train)
    close(got, with_attached, rtol=1e-3)
    close(with_dropout, with_remat, rtol=1e-4, atol=1e-5)
    assert abs(got[0] - with_dropout[0]) > 1e-3
    assert (
        lrx.linen.extract(lrx.linen.insert(params, base, adaptation), adaptation)[1]
        .train["trainable"]
        .keys()
    )


def test_it_composes_with_attached_adapters():
    lora = A.lora(rank=2)
    model = lrx.linen.WithAdapter(nn.Dense(6), lora)
    base = nn.Dense(6).init(KEY, X)["params"]
    own, more = (
        moved(lrx.adapt(base, lora, KEY, name=name), seed) for seed, name in enumerate("ab")
    )
    params = lrx.linen.insert(model.init(KEY, X)["params"], base, own)
    got = lrx.adapted(lambda params: model.apply({"params": params}, X))(lrx.attach(params, more))
    plain = lrx.effective(base, {"a": own, "b": more})
    close(got, nn.Dense(6).apply({"params": plain}, X), atol=1e-4)


def test_a_lifted_layer_is_its_layer():
    lora = A.lora(rank=2)
    base = nn.Dense(6).init(KEY, X)["params"]
    adaptation = moved(lrx.adapt(base, lora, KEY))
    model = lrx.linen.WithAdapter(nn.remat(nn.Dense)(6), lora)
    params = lrx.linen.insert(model.init(KEY, X)["params"], base, adaptation)
    expected = nn.Dense(6).apply({"params": lrx.effective(base, adaptation)}, X)
    close(model.apply({"params": params}, X), expected, atol=1e-4)


class Noisy(nn.Dense):
    """A derived layer that draws, counts its calls and sows what it has seen."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counts", "calls", jnp.zeros, ())
        if not self.is_initializing():
            calls.value += 1
        self.sow("intermediates", "seen", jnp.mean(x))
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense.__call__(self, x)


def test_what_a_derived_layer_draws_and_writes():
    lora, keys = A.lora(rank=2), {"params": KEY, "noise": jax.random.key(1)}
    layer, model = Noisy(6), lrx.linen.WithAdapter(Noisy(6), lora)
    base, started = layer.init(keys, X)["params"], model.init(keys, X)
    adaptation = moved(lrx.adapt(base, lora, KEY))
    params = lrx.linen.insert(started["params"], base, adaptation)
    run = lambda layer, params: layer.apply(  # noqa: E731
        {"params": params, "counts": started["counts"]}, X,
        rngs={"noise": keys["noise"]}, mutable=["counts", "intermediates"],
    )  # fmt: skip
    got, expected = run(model, params), run(layer, lrx.effective(base, adaptation))
    close(got, expected, atol=1e-4)
    assert got[1]["counts"]["calls"] == 1


def test_names_that_look_like_adapters_are_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lrx.linen.WithAdapter(nn.Dense(6, name="kernel_net"), A.lora(rank=2))(x)

    base = {"kernel_net": nn.Dense(6).init(KEY, X)["params"]}
    declared = Model().init(KEY, X)["params"]
    params = lrx.linen.insert(declared, base, lrx.adapt(base, A.lora(rank=2), KEY))
    close(params["kernel_net"]["kernel"], base["kernel_net"]["kernel"], rtol=0, atol=0)
    close(lrx.linen.extract(params, lrx.adapt(base, A.lora(rank=2), KEY))[0], base, rtol=0, atol=0)


def test_errors():
    lora, x = A.lora(rank=2), X
    wrap = functools.partial(lrx.linen.WithAdapter, adapter=lora)
    base = nn.Dense(6).init(KEY, x)["params"]
    model = wrap(nn.Dense(6))
    declared = jax.eval_shape(model.init, KEY, x)["params"]
    adaptation = lrx.adapt(base, lora, KEY)
    with pytest.raises(ValueError, match="wrapped=LayerNorm: an adapter belongs to one layer"):
        wrap(nn.LayerNorm()).init(KEY, x)
    with pytest.raises(ValueError, match="'kernel': unilora shares arrays.*lrx.adapted"):
        lrx.linen.WithAdapter(nn.Dense(6), A.uni_lora(rank=2, size=16)).init(KEY, x)
    with pytest.raises(ValueError, match="rank=9 exceeds the 6 singular values"):
        lrx.linen.WithAdapter(nn.Dense(6), A.lora(rank=9, init="pissa")).init(KEY, x)
    with pytest.raises(ValueError, match="base: 'bias', which the model declares, is missing"):
        lrx.linen.insert(declared, {"kernel": base["kernel"]}, adaptation)
    with pytest.raises(
        ValueError, match=r"'kernel_lora/a': shape \(8, 3\), and the model declares \(8, 2\)"
    ):
        lrx.linen.insert(declared, base, lrx.adapt(base, A.lora(rank=3), KEY))
    with pytest.raises(ValueError, match=r"declares no \['kernel_dora/a'"):
        lrx.linen.insert(declared, base, lrx.adapt(base, A.dora(rank=2), KEY))
    with pytest.raises(ValueError, match="'kernel_lora/a' is missing"):
        lrx.linen.extract(base, adaptation)
