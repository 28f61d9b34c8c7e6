"""Names and layouts between Hugging Face and Flax: a torch-side model written down by hand is the
reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.interop import llama, safetensors

L, D, F, H, G, K, V = 3, 8, 12, 4, 2, 4, 11
WIDTHS = {"q_proj": (H * K, D), "k_proj": (G * K, D), "v_proj": (G * K, D), "o_proj": (D, H * K)}
WIDTHS |= {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}


def torch_model(biases=(), tied=False, seed=0):
    """{name: array} as `state_dict()` of a LLaMA gives it: weights (out, in), float32."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    state = {"model.embed_tokens.weight": draw(V, D)}
    for i in range(L):
        for name, shape in WIDTHS.items():
            module = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            state[f"model.layers.{i}.{module}.{name}.weight"] = draw(*shape)
            if name in biases:
                state[f"model.layers.{i}.{module}.{name}.bias"] = draw(shape[0])
        state[f"model.layers.{i}.input_layernorm.weight"] = draw(D)
        state[f"model.layers.{i}.post_attention_layernorm.weight"] = draw(D)
    state["model.norm.weight"] = draw(D)
    return state if tied else state | {"lm_head.weight": draw(V, D)}


def flax_model(state, stacked):
    """The Flax tree of a torch-side model, leaf by leaf, spelled out."""

    def layer(i):
        weight = lambda name: state[f"model.layers.{i}.{name}.weight"]  # noqa: E731

        def dense(name):
            bias = state.get(f"model.layers.{i}.{name}.bias")
            return {"kernel": weight(name).T} | ({} if bias is None else {"bias": bias})

        return {
            "attention": {
                name: dense(f"self_attn.{name}")
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            },
            "attention_norm": {"scale": weight("input_layernorm")},
            "mlp": {name: dense(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
            "mlp_norm": {"scale": weight("post_attention_layernorm")},
        }

    layers = [layer(i) for i in range(L)]
    tree = {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)} if stacked else {}
    tree |= {} if stacked else {f"layer_{i}": layer for i, layer in enumerate(layers)}
    tree |= {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "norm": {"scale": state["model.norm.weight"]},
    }
    return tree | (
        {"lm_head": {"kernel": state["lm_head.weight"].T}} if "lm_head.weight" in state else {}
    )


def shapes(tree, dtype=jnp.float32):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("biases", "tied"),
    [((), False), (("q_proj", "k_proj", "v_proj"), True), (tuple(WIDTHS), False)],
)
def test_both_directions(tmp_path, biases, tied, stacked):
    state = torch_model(biases, tied)
    expected = flax_model(state, stacked)
    assert_same(llama.from_torch(state, shapes(expected)), expected)
    tensors = llama.to_torch(expected)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        name: (array.shape, array.dtype) for name, array in state.items()
    }
    for name, array in state.items():
        np.testing.assert_array_equal(tensors[name], array)
    safetensors.write(tmp_path, tensors, max_shard_bytes=1000)
    assert_same(llama.from_torch(safetensors.read(tmp_path), shapes(expected)), expected)


def test_order_is_that_of_the_model():
    names = list(llama.to_torch(flax_model(torch_model(), stacked=True)))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [int(name.split(".")[2]) for name in names[1:-2]] == sorted(9 * [0, 1, 2])
    first = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")
    assert names[1:4] == [f"model.layers.0.{module}.weight" for module in first]
    assert names == list(llama.to_torch(flax_model(torch_model(), stacked=False)))


def test_names_invert_paths():
    for name in torch_model(biases=tuple(WIDTHS)):
        for stacked in (True, False):
            path, layer = llama.flax_path(name, stacked=stacked)
            assert llama.torch_name(path, layer) == name
            assert (layer is not None) == (stacked and ".layers." in name)


def test_target_dtype_and_sharding():
    state = {name: array.astype(jnp.bfloat16) for name, array in torch_model().items()}
    expected = flax_model(state, stacked=True)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding), expected
    )
    params = llama.from_torch(state, like)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(np.float32), expected))
    halved = llama.from_torch(torch_model(), shapes(expected, jnp.bfloat16))
    assert_same(halved, expected)


def test_a_tensor_is_read_once_and_one_at_a_time():
    import weakref

    state, alive, reads, most = torch_model(), [], [], 0

    class Source(dict):
        path = "source"

        def __getitem__(self, name):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            array = np.array(state[name])
            alive.append(weakref.ref(array))
            reads.append(name)
            return array

    llama.from_torch(Source(state), shapes(flax_model(state, stacked=True)))
    assert sorted(reads) == sorted(state)
    assert most <= 1


def test_missing_and_unexpected_tensors_are_listed():
    state = torch_model()
    like = shapes(flax_model(state, stacked=True))
    renamed = dict(state)
    renamed["layers.1.self_attn.q_proj.weight"] = renamed.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )
    with pytest.raises(
        ValueError,
        match=r"lacks 1 tensor: model.layers.1.self_attn.q_proj.weight \(near: "
        r"layers.1.self_attn.q_proj.weight\); 1 is not expected: layers.1.self_attn.q_proj.weight",
    ):
        llama.from_torch(renamed, like)
    deeper = state | {"model.layers.3.input_layernorm.weight": np.ones(D)}
    with pytest.raises(
        ValueError, match=r"1 is not expected: model.layers.3.input_layernorm.weight"
    ):
        llama.from_torch(deeper, like)
    with pytest.raises(ValueError, match=r"21 are not expected: .*q_proj.bias.*, and 1 more"):
        llama.from_torch(torch_model(biases=tuple(WIDTHS)), like)


def test_tied_heads_and_old_buffers():
    state = torch_model(tied=True) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    expected = flax_model(torch_model(tied=True), stacked=True)
    assert_same(llama.from_torch(state, shapes(expected)), expected)
    embedding = state["model.embed_tokens.weight"]
    assert_same(
        llama.from_torch(state | {"lm_head.weight": embedding.copy()}, shapes(expected)), expected
    )
    with pytest.raises(
        ValueError, match=r"head is tied, but lm_head.weight differs .*: untie the head"
    ):
        llama.from_torch(state | {"lm_head.weight": embedding + 1}, shapes(expected))
    with pytest.raises(ValueError, match=r"lacks 1 tensor: lm_head.weight"):
        llama.from_torch(state, shapes(flax_model(torch_model(), stacked=True)))


def test_other_errors():
    state = torch_model()
    like = shapes(flax_model(state, stacked=True))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(
        ValueError, match=rf"{name} is \(8, 12\), but layers/mlp/up_proj/kernel .* needs \(12, 8\)"
    ):
        llama.from_torch(state | {name: state[name].T}, like)
    with pytest.raises(ValueError, match=rf"{name} is of dtype int8: dequantise it first"):
        llama.from_torch(state | {name: state[name].astype(np.int8)}, like)
    with pytest.raises(
        ValueError,
        match=r"'params/norm/scale' is no parameter of a LLaMA: did you mean 'norm/scale'",
    ):
        llama.to_torch({"params": {"norm": {"scale": np.ones(2)}}})
    with pytest.raises(
        ValueError,
        match=r"'layers/attention/qproj/kernel'.*did you mean 'layers/attention/q_proj/ker",
    ):
        llama.torch_name("layers/attention/qproj/kernel", 0)
    with pytest.raises(ValueError, match=r"'norm/bias'"):
        llama.torch_name("norm/bias")
    with pytest.raises(ValueError, match=r"'layers/mlp_norm/scale' is a stack: say which layer"):
        llama.torch_name("layers/mlp_norm/scale")
    with pytest.raises(
        ValueError, match=r"self_attn.q_norm.weight' is no parameter of a LLaMA; did you mean"
    ):
        llama.flax_path("model.layers.0.self_attn.q_norm.weight")
    with pytest.raises(ValueError, match=r"'lm_head.bias' is no parameter"):
        llama.flax_path("lm_head.bias")
