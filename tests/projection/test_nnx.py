"""Projected backprop of nnx models against their full gradients."""

import functools
import importlib
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lrx
from lowrank_jax import linalg

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

HEADS = (
    (r".*heads/kernel", lrx.MatrixView(rows=(0,), cols=(1, 2))),
    (r".*out/kernel", lrx.MatrixView(rows=(0, 1), cols=(2,))),
)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)
RANDOM = lrx.projectors.random(rank=3, kind="orthonormal")


def setup(model, views, side="paper", pure=True):
    """(loss, parameters, taps)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params) if pure else params

    def loss(params, x):
        output = nnx.merge(graphdef, params, rest)(x).astype(jnp.float32)
        return jnp.mean(jnp.square(output - 1))

    taps = lrx.taps(lrx.scale_by_projection(RANDOM, views=views, side=side).init(params))
    return loss, params, taps


def run(function, *args):
    return jax.jit(function).lower(*args).compile(FAST_COMPILE)(*args)


def check(model, views, *, side="paper", pure=True, tolerance=1e-5):
    """Equal losses and plain gradients, and every tap the projection of the full gradient."""
    loss, params, taps = setup(model, views, side, pure)
    value, grads = run(lrx.projected_value_and_grad(loss, taps), params, X)
    expected, full = run(jax.value_and_grad(loss), params, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    is_projected = lambda leaf: isinstance(leaf, lrx.projection.Projected)  # noqa: E731
    seen = set()
    for (keys, leaf), got in zip(
        jax.tree_util.tree_leaves_with_path(nnx.as_pure(full)),
        jax.tree.leaves(grads, is_leaf=is_projected),
        strict=True,
    ):
        path = "/".join(str(getattr(key, "key", getattr(key, "name", None))) for key in keys)
        if is_projected(got):
            seen.add(path)
            tap = taps.taps[path]
            leaf, got = tap.projector.down(tap.view, tap.basis, tap.view.orient(leaf)), got.low
        bound = tolerance * float(jnp.max(jnp.abs(leaf))) + 1e-7
        np.testing.assert_allclose(np.float32(got), np.float32(leaf), atol=bound)
    assert seen == set(taps.taps)
    return taps


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 5), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 5), 8, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.out(jnp.sin(self.heads(self.norm(x))))
        return x + self.down(jnp.tanh(self.up(x)))


class Stack(nnx.Module):
    """Layers made by nnx.vmap, and run by nnx.scan with rematerialisation inside."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x, layer):
            return nnx.remat(lambda x, layer: layer(x))(x, layer)

        return self.head(layers(x, self.layers))


class Listed(nnx.Module):
    """Layers in a list, one of them used twice, inside nnx.jit."""

    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.jit(lambda layer, x: layer(x))(self.layers[0], x)
        return self.layers[1](self.layers[1](x))


@pytest.mark.slow
def test_stacked_layers():
    taps = check(Stack(nnx.Rngs(0)), lrx.Views(rules=HEADS, stacked=(r"layers/.*",)), side="rows")
    assert sorted(taps.taps) == [f"layers/{name}/kernel" for name in ("down", "heads", "out", "up")]


@pytest.mark.slow
def test_listed_layers_some_left_out():
    taps = check(
        Listed(nnx.Rngs(0)), lrx.Views(rules=((r"layers/0/up/kernel", None), *HEADS)), side="cols"
    )
    assert len(taps.taps) == 7


def test_experts_by_vmap():
    class Experts(nnx.Module):
        def __init__(self, rngs):
            self.experts = nnx.split_rngs(splits=4)(
                nnx.vmap(lambda rngs: nnx.Linear(8, 12, rngs=rngs), in_axes=0, out_axes=0)
            )(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda expert, x: expert(x), in_axes=(0, 0))(self.experts, x)

    check(Experts(nnx.Rngs(0)), lrx.Views(stacked=(r"experts/.*",)))


HIGHEST = functools.partial(jax.lax.dot_general, precision="highest")


@pytest.mark.parametrize(
    "make, rules",
    [
        (
            functools.partial(
                nnx.Linear, 8, 12, dtype=jnp.bfloat16, preferred_element_type=jnp.float32
            ),
            (),
        ),
        (functools.partial(nnx.Linear, 8, 12, dot_general=HIGHEST), ()),
        (functools.partial(nnx.LinearGeneral, 8, 12, dot_general_cls=lambda: HIGHEST), ()),
        (
            functools.partial(nnx.LinearGeneral, 8, 12, batch_axis={0: 4}),
            ((r"kernel", lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))),),
        ),
        (
            functools.partial(nnx.Einsum, "bsd,dhk->bhsk", (8, 3, 5), (3, 5)),
            ((r"kernel", HEADS[0][1]),),
        ),
        (functools.partial(nnx.Einsum, "...d,df->...f", (8, 12)), ()),
    ],
    ids=["bf16", "partial", "cls", "batch", "einsum", "einsum ellipsis"],
)
def test_layers(make, rules):
    bf16 = make.keywords.get("dtype") == jnp.bfloat16
    check(make(rngs=nnx.Rngs(0)), lrx.Views(rules=rules), tolerance=2e-2 if bf16 else 1e-5)


def test_a_state_in_place_of_a_dict():
    """The value of a Param is the leaf itself, under the path that it has in a dict of arrays."""
    assert list(check(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), lrx.Views(), pure=False).taps) == [
        "kernel"
    ]


def test_a_kernel_shared_by_two_modules():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 8, rngs=rngs)
            self.second = nnx.Linear(8, 8, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    assert list(check(Shared(nnx.Rngs(0)), lrx.Views()).taps) == ["first/kernel"]


class Custom(nnx.Module):
    """A product of one's own, by lrx.matmul."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (8, 12)))

    def __call__(self, x):
        return lrx.matmul(x, self.kernel[...])


class Product(nnx.Module):
    """A product of one's own, by jax."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (8, 12)))

    def __call__(self, x):
        return x @ self.kernel


class Adapted(nnx.LoRALinear):
    """A class derived from nnx.Linear."""


def test_modules_of_ones_own():
    check(Custom(nnx.Rngs(0)), lrx.Views())
    check(Product(nnx.Rngs(0)), lrx.Views())
    check(Adapted(8, 12, lora_rank=2, rngs=nnx.Rngs(0)), lrx.Views())


def test_check_taps_and_a_training_step():
    loss, params, taps = setup(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), lrx.Views())
    lrx.check_taps(loss, taps, params, X)
    tx = lrx.galore(
        1e-2, projector=RANDOM, refresh_schedule=lrx.refresh_schedules.every(period=9, when="after")
    )
    new, state, _ = jax.jit(lrx.train_step(loss, tx))(params, tx.init(params), X)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert int(state.projection.skipped) == 0
    assert not np.allclose(new["kernel"], params["kernel"])


@pytest.mark.parametrize("pure", [True, False])
def test_quantised_kernels(pure):
    """Forward passes and taps take int8 kernels as they would their decoded values."""
    model = Stack(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    tree = nnx.to_pure_dict(state) if pure else state

    def is_kernel(keys):
        return [str(getattr(keys[i], "key", "")) for i in (0, 2)] == ["layers", "kernel"]

    def quantize(keys, x):
        return linalg.quantize_blocks(x, "linear") if len(keys) > 2 and is_kernel(keys) else x

    small = jax.tree_util.tree_map_with_path(quantize, tree)
    is_small = lambda x: hasattr(x, "dequantize")  # noqa: E731
    decoded = jax.tree.map(lambda x: x.dequantize() if is_small(x) else x, small, is_leaf=is_small)
    before = jax.tree.structure(small)
    call = lrx.adapted(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(call(small, X), call(decoded, X), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(small) == before
    if pure:
        loss, _, taps = setup(model, lrx.Views(rules=HEADS, stacked=(r"layers/.*",)))
        got, expected = (
            run(lrx.projected_value_and_grad(loss, taps), tree, X)[1] for tree in (small, decoded)
        )
        low = lambda grads: grads["layers"]["heads"]["kernel"].low  # noqa: E731
        np.testing.assert_allclose(low(got), low(expected), rtol=1e-4, atol=1e-6)


def own_product(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


def test_a_custom_product_takes_quantised_kernels_and_taps():
    model = nnx.Linear(8, 12, dot_general=own_product, rngs=nnx.Rngs(0))
    check(model, lrx.Views())
    loss, params, _ = setup(model, lrx.Views())
    small = params | {"kernel": linalg.quantize_blocks(params["kernel"], "linear")}
    np.testing.assert_allclose(
        lrx.adapted(loss)(small, X),
        loss(params | {"kernel": small["kernel"].dequantize()}, X),
        rtol=1e-6,
    )


class Convolved(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class Tied(nnx.Module):
    """Soft look-ups by x, and a head that is the same table."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 8, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.embed(jnp.argmax(x, -1)))


class Attending(nnx.Module):
    """Flax's attention, with kernels of three axes."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.parametrize(
    "make, rules",
    [
        (Convolved, ((r"conv/kernel", lrx.MatrixView(rows=(0, 1), cols=(2,))),)),
        (Tied, ((r"embed/embedding", lrx.MatrixView()),)),
        (
            Attending,
            ((r".*/(query|key|value)/kernel", HEADS[0][1]), (r".*/out/kernel", HEADS[1][1])),
        ),
    ],
    ids=["convolution", "tied embedding", "attention"],
)
def test_layers_that_multiply_in_other_ways(make, rules):
    taps = check(make(nnx.Rngs(0)), lrx.Views(rules=rules))
    assert len(taps.taps) == (4 if make is Attending else 1)


def test_what_cannot_be_tapped_is_refused():
    _, params, taps = setup(Custom(nnx.Rngs(0)), lrx.Views())
    with pytest.raises(ValueError, match=r"tap 'kernel': no product of the function uses"):
        lrx.projected_value_and_grad(lambda params, x: jnp.sum(x), taps)(params, X)
    graphdef = nnx.graphdef(Custom(nnx.Rngs(0)))
    row = lambda params, x: jnp.sum(nnx.merge(graphdef, params).kernel[0] * x[0, 0, 0])  # noqa: E731
    with pytest.raises(ValueError, match=r"tap 'kernel': .* at .*test_nnx.py.*weight_decay"):
        lrx.projected_value_and_grad(row, taps)(params, X)


def test_a_flax_without_nnx_is_named(monkeypatch):
    """As flax 0.12.8 is on jax 0.11.1 and later."""
    monkeypatch.delattr(flax, "nnx")
    monkeypatch.setitem(sys.modules, "flax.nnx", None)
    monkeypatch.delitem(sys.modules, "lowrank_jax.nnx", raising=False)
    with pytest.raises(ImportError, match=r"flax 0.12.8 needs jax<0.11.1"):
        importlib.import_module("lowrank_jax.nnx")


def test_other_attributes_are_still_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lrx.nothing
