"""Kernels of more than two axes: what the defaults read from names and neighbours, and the error
where nothing says."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax as lrx
from lowrank_jax import resolution
from lowrank_jax.resolution import leaves_with_metadata

X, IMAGE = jnp.ones((2, 5, 12)), jnp.ones((2, 8, 8, 3))
SPLIT = lrx.MatrixView(rows=(0,), cols=(1, 2))  # query, key, value: (D, H, K)
JOIN = lrx.MatrixView(rows=(0, 1), cols=(2,))  # out: (H, K, D)
WINDOW = lrx.MatrixView(rows=(0, 1, 2), cols=(3,))


def shapes(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def views(tree, given=None):
    report = lrx.resolution.resolve(tree, given, rank=lambda path, shrunk: 1)
    return {view.path: view.view for view in report.projected}


def attention(prefix=""):
    names = [f"{prefix}{name}/kernel" for name in ("query", "key", "value")]
    return dict.fromkeys(names, SPLIT) | {f"{prefix}out/kernel": JOIN}


class Convolutions(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=self.bias)(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=self.bias, name="depthwise_conv")(x)
        return nn.Dense(4, use_bias=self.bias)(nn.ConvTranspose(4, (2, 2), use_bias=self.bias)(x))


CONVOLUTIONS = {
    "Conv_0/kernel": WINDOW,
    "depthwise_conv/kernel": WINDOW,
    "ConvTranspose_0/kernel": WINDOW,
    "Dense_0/kernel": lrx.MatrixView(),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [3, 12])  # as many heads as channels: shapes alone do not tell
def test_attention_of_linen_and_nnx(bias, heads):
    linen = nn.MultiHeadDotProductAttention(num_heads=heads, qkv_features=24, use_bias=bias)

    def make():
        return nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=12,
            qkv_features=24,
            use_bias=bias,
            decode=False,
            rngs=nnx.Rngs(0),
        )

    for tree in (shapes(linen, X, X), nnx.state(nnx.eval_shape(make), nnx.Param)):
        if bias or heads == 3:
            assert views(tree) == attention()
        else:  # stacked Dense layers, as many as they are wide, would have these shapes
            with pytest.raises(ValueError, match="no rule, name or bias says"):
                views(tree)


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(bias):
    tree = shapes(Convolutions(bias=bias), IMAGE)
    assert views(tree) == CONVOLUTIONS
    model = nnx.eval_shape(
        lambda: nnx.Dict(conv=nnx.Conv(3, 8, (3, 3), use_bias=bias, rngs=nnx.Rngs(0)))
    )
    assert views(nnx.state(model, nnx.Param)) == {"conv/kernel": WINDOW}


def test_any_layer_whose_bias_tells():
    tree = shapes(nn.DenseGeneral((3, 2, 5)), X)
    assert views(tree) == {"kernel": lrx.MatrixView(rows=(0,), cols=(1, 2, 3))}
    assert views(shapes(nn.DenseGeneral(7, axis=(-2, -1)), X)) == {"kernel": JOIN}


def test_names_of_axes():
    box = lambda shape, *names: nn.Partitioned(jnp.ones(shape), names)  # noqa: E731
    tree = {
        "a": {"kernel": box((8, 2, 4), "embed", "heads", "kv")},
        "b": {"kernel": box((2, 4, 8), "heads", "kv", "embed")},
        "c": {"kernel": box((3, 8, 2, 4), "layers", "embed", "kv_heads", "head_dim")},
    }
    assert views(tree) == {"a/kernel": SPLIT, "b/kernel": JOIN, "c/kernel": SPLIT.stacked()}


def test_axes_that_are_named_by_mesh_axes_are_undecided():
    """`nn.with_partitioning` takes several mesh axes for one axis of a kernel."""
    names = (("data", "fsdp"), "tensor", "x")
    kernel = nn.Partitioned(jnp.ones((16, 4, 8)), names)
    with pytest.raises(ValueError, match="no rule, name or bias says"):
        views({"qkv": {"kernel": kernel}})
    assert views({"qkv": {"kernel": kernel, "bias": jnp.ones((4, 8))}}) == {"qkv/kernel": SPLIT}


class Block(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        x = nn.MultiHeadDotProductAttention(
            num_heads=3, qkv_features=12, use_bias=self.bias, name="attention"
        )(x)
        return nn.Dense(12, use_bias=self.bias)(nn.Conv(12, (3,), use_bias=self.bias)(x)), None


def scanned(length, bias=True):
    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
    return {"decoder": {"layers": shapes(layers(bias=bias), X, None)}}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [4, 12])
def test_scanned_layers_are_read_once_they_are_declared_and_never_before(length, bias):
    tree, root = scanned(length, bias), "decoder/layers"
    with pytest.raises(ValueError, match=r"stacked=\('decoder/layers/\.\*',\)"):
        views(tree)
    expected = attention(f"{root}/attention/") | {
        f"{root}/Dense_0/kernel": lrx.MatrixView(),
        f"{root}/Conv_0/kernel": JOIN,
    }
    if not bias:  # a convolution under layers might be one of two axes
        expected.pop(f"{root}/Conv_0/kernel")
        tree["decoder"]["layers"].pop("Conv_0")
    found = views(tree, lrx.Views(stacked=f"{root}/.*"))
    assert found == {path: view.stacked() for path, view in expected.items()}


def test_dense_layers_named_as_attention_are_not_read_as_heads():
    """Stacked (L, D, D) kernels of Dense layers named query and out, with and without biases, even
    where L = D."""
    for length in (4, 8):
        for bias in ({}, {"bias": jnp.ones((length, 8))}):
            layer = {"kernel": jnp.ones((length, 8, 8))} | bias
            with pytest.raises(ValueError, match="no rule, name or bias says"):
                views({"self": {"query": layer, "key": layer, "value": layer, "out": layer}})


HARD = {
    "decoder": scanned(4), "mix": {"kernel": jnp.ones((4, 8, 16))}, "moe": {"up": {"kernel": jnp.ones((4, 8, 16))}},
    "a+b": {"kernel": jnp.ones((4, 5, 6))}, "o_proj": {"kernel": jnp.ones((2, 3, 4))},
    "dense": {"kernel": jnp.ones((4, 4))},
    "stem": {"kernel": jnp.ones((3, 3, 8, 6))}, "batched": {"kernel": jnp.ones((5, 8, 6)), "bias": jnp.ones((5, 6))},
    "conv_stem": {"kernel": jnp.ones((2, 2, 3, 4))},
}  # fmt: skip


def remedy(error):
    """The expression that the message says to paste."""
    return str(error.value).split("pass views=")[1].split(". Where the first axis")[0]


def test_the_error_shows_every_leaf_and_a_remedy_that_can_be_pasted():
    with pytest.raises(ValueError, match="A proposal") as error:
        lrx.galore(1e-2, rank=1).init(HARD)
    undecided = [
        "a+b/kernel",
        "batched/kernel",
        "decoder/decoder/layers/Dense_0/kernel",
        "mix/kernel",
        "moe/up/kernel",
    ]
    for path in [
        *undecided,
        "o_proj/kernel",
        "stem/kernel",
        "decoder/decoder/layers/Conv_0/kernel",
    ]:
        assert f"\n{path}  " in str(error.value)
    assert "conv_stem" not in str(error.value)
    pasted = eval(remedy(error), {"lrx": lrx})
    found = views(HARD, pasted)
    experts = lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))
    assert {found[path] for path in ("moe/up/kernel", "batched/kernel")} == {experts}
    assert found["o_proj/kernel"] == JOIN
    assert found["stem/kernel"] == found["conv_stem/kernel"] == WINDOW
    assert found["mix/kernel"] == found["a+b/kernel"] == SPLIT
    assert found["decoder/decoder/layers/attention/out/kernel"] == JOIN.stacked()


def test_the_remedy_keeps_the_rules_that_were_given():
    given = lrx.Views(
        rules=(("mix/kernel", None), ("dense/kernel", lrx.MatrixView(rows=(1,), cols=(0,)))),
        stacked="moe/.*",
    )
    with pytest.raises(ValueError, match="A proposal") as error:
        lrx.resolution.resolve(HARD, given, rank=1)
    pasted = eval(remedy(error), {"lrx": lrx})
    assert pasted.rules[:2] == given.rules
    assert "mix/kernel" not in views(HARD, pasted)


def test_every_leaf_is_compared_with_the_stacked_patterns_once(monkeypatch):
    """The work of a report grows with the leaves, not with the leaves times the kernels of three or
    more axes."""
    compared, own = [], resolution.is_stacked
    monkeypatch.setattr(
        resolution, "is_stacked", lambda path, *rest: compared.append(path) or own(path, *rest)
    )
    tree = {f"conv_{i}": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)} for i in range(5)}
    assert len(views(tree)) == 5
    assert sorted(compared) == sorted(path for path, *_ in leaves_with_metadata(tree))


def kernels_of(tree):
    """The tree as `optax.partition` shows it to the optimizer that has only the kernels."""
    own = lambda keys, x: x if keys[-1].key == "kernel" else optax.MaskedNode()  # noqa: E731
    return jax.tree_util.tree_map_with_path(own, tree)


HIDDEN = {
    "stacked convolution": {
        "tower": {"conv": {"kernel": jnp.ones((12, 3, 8, 8)), "bias": jnp.ones((12, 8))}}
    },
    "convolution": {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}},
    "DenseGeneral": {"qkv": {"kernel": jnp.ones((16, 4, 8)), "bias": jnp.ones((4, 8))}},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_masked_bias_is_not_an_absent_one(name):
    """Of a stack of convolutions the bias shows the stack; where a mask hides it nothing is
    guessed."""
    tree = HIDDEN[name]
    if name == "stacked convolution":
        with pytest.raises(ValueError, match="no rule, name or bias says"):
            views(tree)
    else:
        assert len(views(tree)) == 1
    hidden = r"The biases beside \['(tower/conv|conv|qkv)/kernel'\] are masked here"
    with pytest.raises(ValueError, match=hidden) as error:
        views(kernels_of(tree))
    pasted = eval(remedy(error), {"lrx": lrx})
    assert len(views(kernels_of(tree), pasted)) == 1
    if name != "stacked convolution":
        assert views(kernels_of(tree), pasted) == views(tree)
    labels = lambda tree: jax.tree.map(lambda x: "low" if x.ndim > 2 else "plain", tree)  # noqa: E731
    with pytest.raises(ValueError, match=hidden):
        optax.partition({"low": lrx.galore(1e-2, rank=1), "plain": optax.sgd(1.0)}, labels).init(
            tree
        )


def test_masked_biases_of_kernels_that_other_things_decide_are_not_missed():
    box = nn.Partitioned(jnp.ones((8, 2, 4)), ("embed", "heads", "kv"))
    tree = {
        "a": {"kernel": box, "bias": optax.MaskedNode()},
        "d": {"kernel": jnp.ones((4, 4)), "bias": optax.MaskedNode()},
        "self": kernels_of(
            shapes(nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), X, X)
        ),
        "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
    }
    expected = {"a/kernel": SPLIT, "d/kernel": lrx.MatrixView(), "conv/kernel": WINDOW}
    assert views(tree) == expected | attention("self/")


def test_adapters_read_the_same_axes_and_raise_the_same_error():
    tree = shapes(nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), X, X)
    tree = jax.tree.map(
        lambda x: jnp.ones(x.shape), {"attention": tree, "net": shapes(Convolutions(), IMAGE)}
    )
    adaptation = lrx.adapt(tree, lrx.adapters.lora(rank=2), jax.random.key(0))
    assert {site.path: site.view for site in adaptation.layout.sites} == views(tree)
    with pytest.raises(ValueError, match="A proposal") as error:
        lrx.adapt(HARD, {".*/kernel": lrx.adapters.lora(rank=1)}, jax.random.key(0))
    made = lrx.adapt(
        jax.tree.map(lambda x: jnp.ones(x.shape), HARD),
        {".*/kernel": lrx.adapters.lora(rank=1)},
        jax.random.key(0),
        views=eval(remedy(error), {"lrx": lrx}),
    )
    assert len(made.layout.sites) == sum(
        path.endswith("kernel") for path, *_ in leaves_with_metadata(HARD)
    )


def test_a_model_of_flax_trains_without_any_view():
    """Attention and convolutions under `lrx.galore`: the low-rank state has the shapes of the
    matrices."""
    tree = shapes(nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12), X, X)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), tree)
    tx = lrx.galore(1e-2, rank=4)
    state = jax.eval_shape(tx.init, params)
    updates, state = jax.eval_shape(tx.update, params, state, params)
    assert state.projection.matrices["out"]["kernel"].basis.shape == (12, 4)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    inside = optax.partition(
        {"low": tx, "plain": optax.adam(1e-2)},
        lambda tree: jax.tree.map(lambda x: "low" if x.ndim == 3 else "plain", tree),
    )
    assert jax.eval_shape(inside.init, params)
