"""Projected backprop of linen models, other people's included, against their full gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from experiments.models import llama
from lowrank_jax import linalg

HEADS = (
    (r".*heads/kernel", lrx.MatrixView(rows=(0,), cols=(1, 2))),
    (r".*out/kernel", lrx.MatrixView(rows=(0, 1), cols=(2,))),
)


def check(model, x, views, *, side="paper", tolerance=1e-3, loss=None):
    """Equal losses and plain gradients, and every tap the projection of the full gradient."""
    params = model.init(jax.random.key(0), x)["params"]
    plain = loss or (
        lambda params, x: jnp.mean(
            jnp.square(model.apply({"params": params}, x).astype(jnp.float32) - 1)
        )
    )
    tx = lrx.scale_by_projection(
        lrx.projectors.random(rank=3, kind="orthonormal"), views=views, side=side
    )
    taps = lrx.taps(tx.init(params))
    value, grads = jax.jit(lrx.projected_value_and_grad(plain, taps))(params, x)
    expected, full = jax.jit(jax.value_and_grad(plain))(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    lrx.check_taps(plain, taps, params, x, tolerance=tolerance)
    leaves = jax.tree.leaves(grads, is_leaf=lambda leaf: isinstance(leaf, lrx.projection.Projected))
    seen = 0
    for got, leaf in zip(leaves, jax.tree.leaves(full), strict=True):
        if isinstance(got, lrx.projection.Projected):
            seen += 1
            continue
        np.testing.assert_allclose(
            np.float32(got), np.float32(leaf), rtol=10 * tolerance, atol=tolerance
        )
    assert seen == len(taps.taps)
    return taps


class Layer(nn.Module):
    """A block as somebody else might have written it."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        heads = nn.DenseGeneral((2, 5), name="heads")(y)
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(jnp.sin(heads))
        return x + nn.Dense(x.shape[-1], name="down")(
            jnp.tanh(nn.Dense(12, use_bias=False, name="up")(x))
        ), None


class Foreign(nn.Module):
    """Its own scan and rematerialisation; `params` is the only collection that it lifts."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(4, name="head")(x)


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["paper", "larger"])
def test_a_foreign_model_with_its_own_scan(side):
    taps = check(Foreign(), X, lrx.Views(rules=HEADS, stacked=(r"layers/.*",)), side=side)
    assert sorted(taps.taps) == [f"layers/{name}/kernel" for name in ("down", "heads", "out", "up")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"scan": False}, {"remat": True}, {"dtype": "bfloat16"}], ids=str
)
def test_our_model(options):
    model = llama.Llama(
        llama.preset("nano", layers=2, width=32, hidden=48, heads=2, kv_heads=2, **options)
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 259)
    views = lrx.Views(stacked=() if options.get("scan") is False else (r"layers/.*",))

    def loss(params, tokens):
        return llama.loss_and_metrics(
            model.apply({"params": params}, tokens), tokens, jnp.ones(tokens.shape)
        )[0]

    check(model, tokens, views, loss=loss, tolerance=3e-2 if "dtype" in options else 1e-3)


@pytest.mark.parametrize(
    "model, rules",
    [
        (nn.Dense(12), ()),
        (
            nn.Dense(
                12,
                dtype=jnp.bfloat16,
                dot_general=functools.partial(jax.lax.dot_general, precision="highest"),
            ),
            (),
        ),
        (
            nn.Einsum((8, 3, 5), "bsd,dhk->bshk"),
            ((r"kernel", lrx.MatrixView(rows=(0,), cols=(1, 2))),),
        ),
        (nn.Einsum((8, 12), "...d,df->...f", use_bias=False), ()),
    ],
    ids=["dense", "dense bf16", "einsum", "einsum ellipsis"],
)
def test_layers(model, rules):
    check(
        model, X, lrx.Views(rules=rules), tolerance=3e-2 if getattr(model, "dtype", None) else 1e-3
    )


def test_experts_by_vmap():
    """`nn.vmap` slices the tap with the kernel."""

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
            return expert(12, name="experts")(x)

    check(Experts(), X, lrx.Views(stacked=(r"experts/.*",)))


def test_boxes_with_metadata():
    init = nn.with_partitioning(nn.initializers.normal(1.0), ("in", "out"))
    model = nn.Dense(12, kernel_init=init)
    params = model.init(jax.random.key(0), X)["params"]
    loss = lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x)))  # noqa: E731
    tx = lrx.galore(
        1e-2,
        projector=lrx.projectors.random(rank=3),
        refresh_schedule=lrx.refresh_schedules.every(period=9, when="after"),
    )
    step = lrx.train_step(loss, tx)
    new, state, _ = jax.jit(step)(params, tx.init(params), X)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert int(state.projection.skipped) == 0
    assert not np.allclose(new["kernel"].value, params["kernel"].value)


def test_a_product_of_the_layers_own():
    """It is what its program shows; here 2 x K, whose gradient has the 2 too."""
    model = nn.Dense(
        12, dot_general=lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs)
    )
    check(model, X, lrx.Views())


def test_a_loss_without_a_wrapper_is_that_with_one():
    model = nn.Dense(12)
    params = model.init(jax.random.key(0), X)["params"]
    taps = lrx.taps(lrx.galore(1e-2, rank=2).init(params))
    loss = lambda params, x: jnp.mean(model.apply({"params": params}, x))  # noqa: E731
    plain, wrapped = (
        lrx.projected_value_and_grad(own, taps)(params, X) for own in (loss, lrx.tapped(loss))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, wrapped)


@pytest.mark.parametrize("scanned", [False, True])
def test_quantised_kernels(scanned):
    """Forward passes and taps take int8 kernels as they would their decoded values."""
    model = Foreign() if scanned else nn.Dense(12)
    params = model.init(jax.random.key(0), X)["params"]
    views = lrx.Views(rules=HEADS, stacked=(r"layers/.*",)) if scanned else lrx.Views()
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=3, kind="orthonormal"), views=views)
    paths = [view.path for view in lrx.explain(tx, params).projected]
    path_of = lambda keys: "/".join(key.key for key in keys)  # noqa: E731
    quantize = lambda keys, x: linalg.quantize_blocks(x, "linear") if path_of(keys) in paths else x  # noqa: E731
    small = jax.tree_util.tree_map_with_path(quantize, params)
    is_leaf = lambda x: hasattr(x, "dequantize")  # noqa: E731
    decoded = jax.tree.map(lambda x: x.dequantize() if is_leaf(x) else x, small, is_leaf=is_leaf)
    loss = lrx.tapped(
        lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x) - 1))
    )
    np.testing.assert_allclose(loss(small, X), loss(decoded, X), rtol=1e-6)
    taps = lrx.taps(tx.init(small))
    assert sorted(taps.taps) == sorted(paths)
    got, expected = (
        lrx.projected_value_and_grad(loss, taps)(tree, X)[1] for tree in (small, decoded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)
    lrx.check_taps(loss, taps, small, X)
