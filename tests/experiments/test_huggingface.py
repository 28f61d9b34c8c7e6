"""config.json and folders without transformers: what is read, what is refused, and that nothing is
lost on the way.

tests/peer/test_huggingface_llama.py compares logits with transformers.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import huggingface
from experiments.models.llama import PROJECTIONS, LlamaConfig

pytest.importorskip("safetensors", reason="needs the safetensors package")

TINY = LlamaConfig(
    vocabulary_size=19,
    width=16,
    hidden=24,
    heads=4,
    kv_heads=2,
    layers=2,
    sequence_length=12,
    rope_theta=100.0,
)
QKV = PROJECTIONS[:3]
LLAMA3 = ("llama3", 8.0, 1.0, 4.0, 40)
VALUES = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 12,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
}


def draw(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), huggingface.shapes(config)
    )


def unstack(params, layers):
    rest = {name: part for name, part in params.items() if name != "layers"}
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: E731
    return rest | {f"layer_{i}": take(i) for i in range(layers)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (
            left.dtype == right.dtype and np.asarray(left).tobytes() == np.asarray(right).tobytes()
        )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"kv_heads": 4, "tied_head": True, "norm_eps": 1e-5, "init_std": 0.1},
        {"head_dim": 6, "rope_scaling": ("linear", 2.0), "biases": QKV},
        {"rope_scaling": LLAMA3, "biases": PROJECTIONS, "rope_theta": 5e5},
        {"biases": PROJECTIONS[:4], "param_dtype": "bfloat16", "dtype": "bfloat16"},
        {"biases": PROJECTIONS[4:]},
    ],
)
def test_folder_round_trip_is_exact(tmp_path, overrides):
    config = dataclasses.replace(TINY, **overrides)
    params = draw(config)
    files = huggingface.save(tmp_path, config, params, max_shard_bytes=2000)
    assert len(files) > 3
    found, again = huggingface.load(tmp_path)
    assert found == config
    assert_same(again, params)
    flat, unstacked = huggingface.load(tmp_path, scan=False)
    assert flat == dataclasses.replace(config, scan=False)
    assert_same(unstacked, unstack(params, 2))
    huggingface.save(tmp_path / "unscanned", flat, unstacked)
    assert_same(huggingface.load(tmp_path / "unscanned")[1], params)


def test_overrides_decide_length_and_dtypes(tmp_path):
    params = draw(TINY)
    huggingface.save(tmp_path, TINY, params)
    config, halved = huggingface.load(
        tmp_path, param_dtype="bfloat16", sequence_length=8, remat=True
    )
    assert config == dataclasses.replace(
        TINY, param_dtype="bfloat16", sequence_length=8, remat=True
    )
    assert_same(halved, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    huggingface.save(
        tmp_path, TINY, halved, overwrite=True
    )  # the dtype written is that of the parameters
    config, again = huggingface.load(tmp_path)
    assert (config.param_dtype, config.dtype) == ("bfloat16", "bfloat16")
    assert_same(again, halved)


def test_shardings_are_one_or_a_tree(tmp_path):
    huggingface.save(tmp_path, TINY, draw(TINY))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = jax.NamedSharding(mesh, jax.P())
    assert {
        leaf.sharding for leaf in jax.tree.leaves(huggingface.load(tmp_path, shardings=one)[1])
    } == {one}
    tree = jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, jax.P(*["data"][: leaf.ndim])),
        huggingface.shapes(TINY),
    )
    found = huggingface.load(tmp_path, shardings=tree)[1]
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == tree


def test_float16_is_read_as_float32(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), draw(TINY))
    huggingface.save(tmp_path, TINY, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    huggingface.safetensors.write(tmp_path, huggingface.names.to_torch(params))
    values = json.loads((tmp_path / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, found = huggingface.load(tmp_path)
    assert (config.dtype, config.param_dtype) == ("float32", "float32")
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_configuration_from_both_spellings():
    assert huggingface.config_from(VALUES) == TINY
    assert (
        huggingface.config_from(
            {k: v for k, v in VALUES.items() if k != "num_key_value_heads"}
        ).kv_heads
        == 4
    )
    assert huggingface.config_from(VALUES | {"tie_word_embeddings": True}).tied_head
    assert huggingface.config_from(VALUES | {"head_dim": 4}).head_dim is None
    assert huggingface.config_from(VALUES | {"head_dim": 8}).head_dim == 8
    for key in ("torch_dtype", "dtype"):
        config = huggingface.config_from(VALUES | {key: "bfloat16"})
        assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    }
    old = VALUES | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}}
    for values in (old, new):
        config = huggingface.config_from(values)
        assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)
    assert huggingface.config_to(config)["rope_scaling"] == {"rope_type": "llama3", **llama3}
    assert isinstance(
        huggingface.config_to(config)["rope_scaling"]["original_max_position_embeddings"], int
    )
    for scaling in (None, {"type": "default"}, {"rope_type": "default", "rope_theta": 100.0}):
        assert huggingface.config_from(VALUES | {"rope_scaling": scaling}) == TINY
    assert huggingface.config_from(
        VALUES | {"rope_scaling": {"type": "linear", "factor": 2}}
    ).rope_scaling == (
        "linear",
        2.0,
    )


def test_biases_of_the_families():
    def of(**values):
        return huggingface.config_from(VALUES | values).biases

    assert of() is None
    assert of(attention_bias=True) == PROJECTIONS[:4]
    assert of(mlp_bias=True) == PROJECTIONS[4:]
    assert of(attention_bias=True, mlp_bias=True) == PROJECTIONS
    assert of(model_type="qwen2") == QKV
    assert of(model_type="mistral", sliding_window=None) is None


def test_sliding_windows_matter_only_beyond_them():
    mistral = VALUES | {"model_type": "mistral", "sliding_window": 8}
    with pytest.raises(
        ValueError, match=r"sliding_window=8: .*sequences of 12 .* give sequence_length=8 or less"
    ):
        huggingface.config_from(mistral)
    assert huggingface.config_from(mistral, sequence_length=8).sequence_length == 8
    assert huggingface.config_from(mistral | {"sliding_window": None}) == TINY
    with pytest.raises(ValueError, match=r"sliding_window=4096"):  # Mistral's default
        huggingface.config_from(VALUES | {"model_type": "mistral", "max_position_embeddings": 8192})
    qwen = VALUES | {"model_type": "qwen2", "sliding_window": 8}
    assert huggingface.config_from(qwen).sequence_length == 12
    with pytest.raises(ValueError, match=r"sliding_window=8"):
        huggingface.config_from(qwen | {"use_sliding_window": True})
    assert (
        huggingface.config_from(VALUES | {"sliding_window": 8}).sequence_length == 12
    )  # LLaMA has none


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma': supported are llama, mistral, qwen2"),
        ({"model_type": None}, "model_type=None: supported are"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*: dequantise"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "no num_key_value_heads"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic': supported are default",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "rope_type='llama3' lacks low_freq_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "heads=3 does not divide width=16"),
    ],
)
def test_what_is_not_computed_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        huggingface.config_from(VALUES | values)


def test_errors_of_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist: give a folder that"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        huggingface.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pickled weights only: save it again"):
        huggingface.load(tmp_path)
    huggingface.save(tmp_path, TINY, draw(TINY), overwrite=True)
    (tmp_path / "config.json").write_text(json.dumps(VALUES | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 tensors: model.layers.2"):
        huggingface.load(tmp_path)


def test_errors_of_save(tmp_path):
    params = draw(TINY)
    with pytest.raises(
        ValueError, match=r"params\['lm_head/kernel'\] is of shape None, .* has \(16, 19\)"
    ):
        huggingface.save(
            tmp_path, TINY, {name: part for name, part in params.items() if name != "lm_head"}
        )
    with pytest.raises(
        ValueError, match=r"params\['embed/embedding'\] is of shape \(19, 16\), .* has \(20, 16\)"
    ):
        huggingface.save(tmp_path, dataclasses.replace(TINY, vocabulary_size=20), params)
    mixed = params | {"norm": {"scale": params["norm"]["scale"].astype(jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"params are of bfloat16, float32: give one"):
        huggingface.save(tmp_path, TINY, mixed)
    odd = dataclasses.replace(TINY, biases=("q_proj",))
    with pytest.raises(ValueError, match=r"biases=\('q_proj',\): no family has these"):
        huggingface.save(tmp_path, odd, draw(odd))
    assert not list(tmp_path.iterdir())
    huggingface.save(tmp_path, TINY, params, entries={"eos_token_id": 7})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    with pytest.raises(
        FileExistsError, match=r"holds config.json, model.safetensors: give another folder"
    ):
        huggingface.save(tmp_path, TINY, params)
    huggingface.save(tmp_path, TINY, draw(TINY, seed=1), overwrite=True)
    assert_same(huggingface.load(tmp_path)[1], draw(TINY, seed=1))
    (tmp_path / "config.json").write_text('{"name": "a run"}')
    with pytest.raises(
        FileExistsError, match=r"config.json is not that of a model of transformers: give another"
    ):
        huggingface.save(tmp_path, TINY, params, overwrite=True)
