"""Folders of Hugging Face's transformers as a `LlamaConfig` and parameters, and back.

    config.json                                        hidden_size, num_hidden_layers, ...
    model.safetensors, or shards and their index       lowrank_jax.interop.safetensors

Three families compute what `experiments.models.llama` computes: LLaMA (1 to 3), Mistral and Qwen2
(1.5 to 2.5). Mistral's sliding window is not implemented: sequences that fit into it do not meet
it, longer ones are refused. What `config.json` says about dropout, tokens and generation is not
read.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import checkpoint, outputs
from experiments.models import llama
from lowrank_jax.interop import documents, safetensors
from lowrank_jax.interop import llama as names
from lowrank_jax.typing import Pytree

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_QKV, _ATTENTION, _MLP = llama.PROJECTIONS[:3], llama.PROJECTIONS[:4], llama.PROJECTIONS[4:]
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)
_WORDS = ("model_type", "dtype", "torch_dtype", "hidden_act")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE = {
    f"{name}?": (float, None)
    for name in (
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
}
# Of the keys that are read; `documents` says what the words mean.
SHAPE = {
    **{f"{name}?": (int, None) for name in _SIZES},
    **{f"{name}?": (str, None) for name in _WORDS},
    **{f"{name}?": (bool, None) for name in _FLAGS},
    **{f"{name}?": (_ROPE, None) for name in ("rope_parameters", "rope_scaling")},
    **{f"{name}?": (float, None) for name in ("rope_theta", "partial_rotary_factor")},
    **{f"{name}?": float for name in ("rms_norm_eps", "initializer_range")},
    "quantization_config?": (dict, None),
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load(folder, *, shardings: Pytree = None, **overrides) -> tuple[llama.LlamaConfig, Any]:
    """The configuration and the parameters of a model that transformers saved.

    Weights are read tensor by tensor into the leaves of `Llama(config)`, one leaf at a time.

    Args:
      folder: with config.json and safetensors files.
      shardings: where the leaves go: a tree of shardings like the parameters, one sharding for all,
        or None for the default device.
      **overrides: fields of `LlamaConfig` that the folder does not decide: `sequence_length` (a
        shorter one than max_position_embeddings), `scan`, `remat`, `dtype` and `param_dtype`. The
        dtypes are those of the file, with float16 read as float32.

    Raises:
      FileNotFoundError: config.json, the weights or a shard of them is missing.
      ValueError: the model is none of FAMILIES, computes something `Llama` does not, or its tensors
        do not match its configuration; the message names key or tensors.
      ImportError: the safetensors package is missing.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a folder that transformers' save_pretrained wrote"
        )
    config = config_from(read_config(path), **overrides)
    try:
        tensors = safetensors.read(folder)
    except FileNotFoundError as error:
        if any(folder.glob("pytorch_model*.bin")):
            message = (
                f"{folder} holds pickled weights only: save it again by transformers' "
                "save_pretrained"
            )
            raise FileNotFoundError(message) from error
        raise
    like = shapes(config)
    if shardings is not None:
        # one sharding may stand for a whole part of the tree
        like = jax.tree.map(
            lambda sharding, part: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
            ),
            shardings,
            like,
            is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
        )
    return config, names.from_torch(tensors, like)


def save(
    folder,
    config: llama.LlamaConfig,
    params: Pytree,
    *,
    overwrite: bool = False,
    entries: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> list[pathlib.Path]:
    """Write a folder that transformers' `from_pretrained` and `load` read; returns its files.

    Mistral has become LLaMA by then, which computes the same. Weights keep their dtype and are
    copied one tensor at a time; config.json is written last.

    Args:
      overwrite: replace a model that the folder holds.
      entries: further entries of config.json, such as eos_token_id.
      max_shard_bytes: as in `safetensors.write`.

    Raises:
      FileExistsError: the folder holds a model and `overwrite` is not set, or a config.json that is
        no model's.
      ValueError: `params` are not the parameters of `config`, or no family has such biases.
    """
    folder = pathlib.Path(folder)
    path = check_folder(folder, overwrite=overwrite)
    # config.json last: a folder without it holds no model
    values = config_to(config) | {"torch_dtype": _dtype_of(config, params)} | dict(entries or {})
    files = safetensors.write(folder, names.to_torch(params), max_shard_bytes=max_shard_bytes)
    outputs.write_json(path, values)
    return [path, *files]


def check_folder(folder: pathlib.Path, *, overwrite: bool) -> pathlib.Path:
    """The path of config.json in a folder that `save` may write to.

    Raises FileExistsError as `save` does.
    """
    path = folder / "config.json"
    present = [
        found.name for found in (path, *folder.glob("model*.safetensors*")) if found.exists()
    ]
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} holds {', '.join(sorted(present))}: give another folder, or overwrite it"
        )
    if path.exists() and "model_type" not in read_config(path):
        raise FileExistsError(f"{path} is not that of a model of transformers: give another folder")
    return path


def shapes(config: llama.LlamaConfig) -> Any:
    """The parameters of `Llama(config)` as a tree of `jax.ShapeDtypeStruct`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)["params"]


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """What config.json of a folder of transformers says. Raises documents.DocumentError."""
    return documents.read(path, SHAPE, remedy="copy or download it again")


def config_from(values: Mapping[str, Any], **overrides) -> llama.LlamaConfig:
    """The configuration that a config.json describes, with fields replaced by `overrides`.

    Both spellings of rotary positions are read, `rope_theta` with `rope_scaling` and transformers
    5's `rope_parameters`; of scalings, "default", "linear" and "llama3".

    Raises:
      ValueError: an unknown model_type, a missing key, or one that asks for what `Llama` does not
        compute.

    >>> values = {
    ...     "model_type": "llama",
    ...     "hidden_size": 64,
    ...     "intermediate_size": 172,
    ...     "num_attention_heads": 4,
    ...     "num_hidden_layers": 2,
    ...     "vocab_size": 259,
    ...     "max_position_embeddings": 128,
    ...     "head_dim": 32,
    ... }
    >>> config = config_from(values, sequence_length=64)
    >>> config.width, config.kv_heads, config.head_size, config.sequence_length, config.param_dtype
    (64, 4, 32, 64, 'float32')
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r}: supported are {', '.join(FAMILIES)}")
    # what `Llama` does not compute is refused, never left out in silence
    for key, only in (("hidden_act", ("silu", "swish")), ("quantization_config", ())):
        if values.get(key) is not None and values[key] not in only:
            remedy = f"only {only[0]} is supported" if only else "dequantise the weights first"
            raise ValueError(f"{key}={values[key]!r}: {remedy}")
    width, heads = _required(values, "hidden_size"), _required(values, "num_attention_heads")
    # the first LLaMA knew no grouped queries
    kv_heads = heads if family == "llama" and values.get("num_key_value_heads") is None else None
    head_dim = values.get("head_dim")
    theta, scaling = _rope(values)
    stored = values.get("dtype") or values.get("torch_dtype")
    precision = "bfloat16" if stored == "bfloat16" else "float32"
    fields: dict[str, Any] = {
        "vocabulary_size": _required(values, "vocab_size"),
        "width": width,
        "hidden": _required(values, "intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads or _required(values, "num_key_value_heads"),
        "layers": _required(values, "num_hidden_layers"),
        "rope_theta": theta,
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "tied_head": bool(values.get("tie_word_embeddings", False)),
        "dtype": precision,
        "param_dtype": precision,
        "init_std": float(values.get("initializer_range", 0.02)),
        "head_dim": None if head_dim is None or head_dim * heads == width else head_dim,
        "rope_scaling": scaling,
        "biases": _biases(values, family),
    } | overrides
    if "sequence_length" not in fields:
        fields["sequence_length"] = _required(values, "max_position_embeddings")
    window, length = _window(values, family), fields["sequence_length"]
    if window is not None and length > window:
        raise ValueError(
            f"sliding_window={window}: attention over more tokens is not implemented and sequences "
            f"of {length} would meet it; give sequence_length={window} or less"
        )
    return llama.LlamaConfig(**fields)


def config_to(config: llama.LlamaConfig) -> dict[str, Any]:
    """config.json of a configuration, in the spelling that transformers 4 and 5 both read.

    Raises ValueError for biases that neither LLaMA (attention_bias, mlp_bias) nor Qwen2 (q, k, v)
    has.

    >>> config_to(llama.preset("60M"))["architectures"]
    ['LlamaForCausalLM']
    """
    biases = tuple(name for name in llama.PROJECTIONS if name in (config.biases or ()))
    family = "qwen2" if biases == _QKV else "llama"
    if biases not in ((), _QKV, _ATTENTION, _MLP, _ATTENTION + _MLP):
        known = (
            "LLaMA has those of attention, of the MLP, or both, Qwen2 has those of q_proj, k_proj "
            "and v_proj"
        )
        raise ValueError(f"biases={config.biases!r}: no family has these; {known}")
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        kind, *numbers = config.rope_scaling
        scaling = {"rope_type": kind, **dict(zip(_LLAMA3, numbers, strict=False))}
        if kind == "llama3":
            scaling[_LLAMA3[-1]] = int(scaling[_LLAMA3[-1]])  # transformers warns of another type
    own = {}
    if family == "llama":  # Qwen2 has its biases without saying so
        own = {"attention_bias": "q_proj" in biases, "mlp_bias": "up_proj" in biases}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": config.param_dtype,
    } | own


def _required(values: Mapping[str, Any], key: str) -> int:
    if values.get(key) is None:
        raise ValueError(
            f"config.json has no {key}, and its default differs between families: add it"
        )
    return int(values[key])


def _rope(values: Mapping[str, Any]) -> tuple[float, tuple[str | float, ...] | None]:
    """(theta, rope_scaling) of either spelling."""
    stated = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(stated.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = stated.get("rope_type", stated.get("type", "default"))
    if any(isinstance(value, Mapping) for value in stated.values()):
        raise ValueError(
            f"rope_parameters={stated!r}: rotary positions that differ by layer are not supported"
        )
    share = stated.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if share not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={share}: only whole heads are rotated")
    if kind == "default":
        return theta, None
    keys = {"linear": _LLAMA3[:1], "llama3": _LLAMA3}.get(kind)
    if keys is None:
        raise ValueError(f"rope_type={kind!r}: supported are default, linear and llama3")
    for key in keys:
        if stated.get(key) is None:
            raise ValueError(f"rope_type={kind!r} lacks {key}: add it to rope_scaling")
    return theta, (kind, *(float(stated[key]) for key in keys))


def _biases(values: Mapping[str, Any], family: str) -> tuple[str, ...] | None:
    if family == "qwen2":
        return _QKV
    attention, mlp = (
        family == "llama" and bool(values.get(key)) for key in ("attention_bias", "mlp_bias")
    )
    return (_ATTENTION if attention else ()) + (_MLP if mlp else ()) or None


def _window(values: Mapping[str, Any], family: str) -> int | None:
    """The sliding window, where any layer has one (4096: the default of Mistral and Qwen2)."""
    if family == "llama" or (family == "qwen2" and not values.get("use_sliding_window", False)):
        return None
    return values.get("sliding_window", 4096)


def _dtype_of(config: llama.LlamaConfig, params: Pytree) -> str:
    """The dtype of the parameters, whose shapes and paths are compared with the model's."""
    found, expected = checkpoint.leaf_table(params), checkpoint.leaf_table(shapes(config))
    for path in [*expected, *found]:
        there, here = found.get(path, (None, ""))[0], expected.get(path, (None, ""))[0]
        if there != here:
            raise ValueError(
                f"params[{path!r}] is of shape {there}, but the model of this configuration has "
                f"{here}"
            )
    dtypes = {dtype for _, dtype in found.values()}
    if len(dtypes) > 1 or not dtypes <= set(llama.DTYPES):
        raise ValueError(
            f"params are of {', '.join(sorted(dtypes))}: give one of {', '.join(llama.DTYPES)} "
            "throughout"
        )
    return dtypes.pop()
