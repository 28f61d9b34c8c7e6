"""Logits of tiny random models equal those of transformers, whichever of the two wrote the
folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: run `make test-peer`"
)

from experiments.models import huggingface, llama  # noqa: E402
from experiments.models.sampling import sample  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# family, and what it changes
CASES = {
    "plain": ("Llama", {}),
    "grouped queries": (
        "Llama",
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    ),
    "tied head": ("Llama", {"tie_word_embeddings": True}),
    "llama3 scaling": (
        "Llama",
        {"head_dim": 16, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "linear scaling": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "explicit head size": ("Llama", {"head_dim": 6, "num_key_value_heads": 1}),
    "all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 64, "head_dim": 10}),
}
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 40))


@functools.partial(jax.jit, static_argnums=0)
def ours(config, params):
    return llama.Llama(config).apply({"params": params}, jnp.asarray(TOKENS, jnp.int32))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def peer(family, changes):
    """A random model of transformers; norms around one, and biases that are not zero as its own
    would be."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SHAPE | changes, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def read_by_transformers(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    return model.eval()


def assert_close(found, expected):
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_both_directions(tmp_path, case):
    model = peer(*CASES[case])
    expected = theirs(model)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config, params = huggingface.load(tmp_path / "theirs")
    assert llama.parameter_count(config) == sum(p.numel() for p in model.parameters())
    assert_close(ours(config, params), expected)

    huggingface.save(tmp_path / "ours", config, params, max_shard_bytes=20_000)
    again = read_by_transformers(tmp_path / "ours")
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    np.testing.assert_array_equal(theirs(again), expected)
    assert huggingface.load(tmp_path / "ours")[0] == config


def test_versions_are_those_the_tier_names():
    assert transformers.__version__ == "5.24.0"


def test_bfloat16_keeps_its_bits(tmp_path):
    model = peer("Llama", {"num_key_value_heads": 2}).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs", scan=False)
    assert config.param_dtype == "bfloat16"
    huggingface.save(tmp_path / "ours", config, params)
    again = read_by_transformers(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for (name, found), (_, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_a_model_of_ours_generates_the_same_text(tmp_path):
    config = llama.LlamaConfig(
        vocabulary_size=67,
        width=32,
        hidden=48,
        heads=4,
        kv_heads=2,
        layers=2,
        sequence_length=64,
        rope_theta=100.0,
    )
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype),
        huggingface.shapes(config),
    )
    huggingface.save(tmp_path, config, params, entries={"bos_token_id": None, "eos_token_id": None})
    model = read_by_transformers(tmp_path)
    prompt = TOKENS[:, :5]
    expected = model.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False)[:, 5:]
    found = sample(
        llama.Llama(config),
        params,
        jnp.asarray(prompt, jnp.int32),
        12,
        jax.random.key(0),
        temperature=0,
    )
    np.testing.assert_array_equal(found, expected.numpy())
    assert len(set(expected[0].tolist())) > 5


def test_longer_sequences_than_the_window_are_refused(tmp_path):
    """Transformers itself computes something else there, so refusing is right, and up to the window
    nothing is."""
    model = peer("Mistral", {"sliding_window": 16})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window=16"):
        huggingface.load(tmp_path)
    config, params = huggingface.load(tmp_path, sequence_length=16)
    whole = ours(dataclasses.replace(config, sequence_length=64), params)
    expected = theirs(model)
    np.testing.assert_allclose(whole[:, :16], expected[:, :16], rtol=1e-5, atol=1e-5)
    assert np.abs(whole[:, 20:] - expected[:, 20:]).max() > 1e-2
