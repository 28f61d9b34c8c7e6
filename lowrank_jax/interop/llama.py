"""Parameters of LLaMA-family models (LLaMA, Mistral, Qwen2), from Hugging Face's names and layouts
to Flax and back.

    torch                                           Flax, scanned                      Flax, unscanned
    model.embed_tokens.weight            (V, D)     embed/embedding          (V, D)    the same
    model.layers.3.self_attn.q_proj.weight (m, n)   layers/attention/q_proj/kernel     layer_3/attention/q_proj/kernel
                                                    (L, n, m)                          (n, m)
    ...               {q,k,v,o}_proj.bias  (m,)     .../bias                 (L, m)    (m,)
    model.layers.3.mlp.{gate,up,down}_proj.weight   layers/mlp/{gate,up,down}_proj/kernel
    model.layers.3.input_layernorm.weight  (D,)     layers/attention_norm/scale (L, D)
    model.layers.3.post_attention_layernorm.weight  layers/mlp_norm/scale
    model.norm.weight                      (D,)     norm/scale
    lm_head.weight                       (V, D)     lm_head/kernel           (D, V)    absent when the head is tied

Kernels are transposed, everything else is kept as it is: both sides split rotary pairs in halves
and order heads alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.interop import safetensors
from lowrank_jax.typing import DTypeLike, Kernel, Pytree

_OUTSIDE = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "lm_head"}
_INSIDE = {
    "input_layernorm": "attention_norm",
    **{
        f"self_attn.{name}": f"attention/{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    },
    "post_attention_layernorm": "mlp_norm",
    **{f"mlp.{name}": f"mlp/{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
_TO_FLAX = _OUTSIDE | _INSIDE
_TO_TORCH = {flax: torch for torch, flax in _TO_FLAX.items()}
_BIASED = {flax for flax in _TO_TORCH if flax.endswith("_proj")}
# buffers that old checkpoints carry; the frequencies follow from the configuration
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def torch_name(path: str, layer: int | None = None) -> str:
    """Hugging Face's name of a Flax path, of one layer where the path is that of a stack.

    Raises:
      ValueError: for a path that no LLaMA has, with the nearest one it has, or a stack without a
        layer.

    >>> torch_name("layers/attention/q_proj/kernel", 3), torch_name("layer_0/mlp_norm/scale")
    ('model.layers.3.self_attn.q_proj.weight', 'model.layers.0.post_attention_layernorm.weight')
    """
    root, _, rest = path.partition("/")
    if number := re.fullmatch(r"layer_(\d+)", root):
        layer = int(number[1])
    inside = root == "layers" or number is not None
    module, _, leaf = (rest if inside else path).rpartition("/")
    table = _INSIDE if inside else _OUTSIDE
    if _TO_TORCH.get(module) not in table or leaf not in _leaves(module):
        known = (
            [f"{root}/{m}/{leaf}" for m in _INSIDE.values() for leaf in _leaves(m)]
            if inside
            else []
        )
        known += [f"{m}/{leaf}" for m in _OUTSIDE.values() for leaf in _leaves(m)]
        near = difflib.get_close_matches(path, known, n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else "paths begin with embed, layers, layer_<i>, norm or lm_head"
        )
        raise ValueError(f"{path!r} is no parameter of a LLaMA: {hint}")
    if inside and layer is None:
        raise ValueError(f"{path!r} is a stack: say which layer")
    prefix = f"model.layers.{layer}." if inside else ""
    return f"{prefix}{_TO_TORCH[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def flax_path(name: str, *, stacked: bool = True) -> tuple[str, int | None]:
    """The Flax path of one of Hugging Face's names, and the layer it has there (None where the path
    says all).

    Args:
      stacked: layers are scanned, "layers/..." with a leading axis; else "layer_<i>/...".

    Raises:
      ValueError: for a name that no LLaMA has, with the nearest one it has.

    >>> flax_path("model.layers.3.self_attn.q_proj.weight")
    ('layers/attention/q_proj/kernel', 3)
    >>> flax_path("model.layers.3.self_attn.q_proj.weight", stacked=False)
    ('layer_3/attention/q_proj/kernel', None)
    """
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    module, _, leaf = (inside[2] if inside else name).rpartition(".")
    flax = (_INSIDE if inside else _OUTSIDE).get(module)
    if flax is None or leaf not in (("weight", "bias") if flax in _BIASED else ("weight",)):
        prefix = f"model.layers.{inside[1]}." if inside else ""
        known = [f"{prefix}{m}.weight" for m in (_INSIDE if inside else _OUTSIDE)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is no parameter of a LLaMA{hint}")
    path = f"{flax}/{'bias' if leaf == 'bias' else _leaves(flax)[0]}"
    if not inside:
        return path, None
    return (f"layers/{path}", int(inside[1])) if stacked else (f"layer_{inside[1]}/{path}", None)


def _leaves(module: str) -> tuple[str, ...]:
    """Names of the leaves that a Flax module may have, its weight first."""
    if module == "embed":
        return ("embedding",)
    if module.endswith("norm"):
        return ("scale",)
    return ("kernel", "bias") if module in _BIASED else ("kernel",)


def from_torch(tensors: Mapping[str, Any], like: Pytree) -> Any:
    """Parameters in the structure of `like`, read from `tensors` one by one and one leaf at a time.

    A layer's tensor goes straight to its place in the stacked leaf, in the dtype of `like`; beyond
    `tensors` and the finished leaves only one leaf and one tensor are in memory.

    Args:
      tensors: {Hugging Face's name: array}, such as a `safetensors.Reader`. Rotary buffers are
        passed over, and so is an `lm_head.weight` that equals the embedding where `like` has no
        head of its own.
      like: nested dictionaries of `jax.ShapeDtypeStruct` or arrays, scanned or not, such as
        `jax.eval_shape(model.init, ...)["params"]`; leaves with a sharding are put there.

    Raises:
      ValueError: names are missing or not expected (listed, with the nearest), or a tensor has
        another shape, is not of floating point, or is a head that differs from the embedding it
        should be tied to.

    >>> like = {
    ...     "embed": {"embedding": jax.ShapeDtypeStruct((7, 2), jnp.bfloat16)},
    ...     "layers": {
    ...         "mlp": {"up_proj": {"kernel": jax.ShapeDtypeStruct((2, 2, 3), jnp.float32)}}
    ...     },
    ... }
    >>> up = np.arange(6.0).reshape(3, 2)
    >>> tensors = {
    ...     "model.embed_tokens.weight": np.ones((7, 2)),
    ...     "model.layers.0.mlp.up_proj.weight": up,
    ...     "model.layers.1.mlp.up_proj.weight": -up,
    ... }
    >>> params = from_torch(tensors, like)
    >>> params["embed"]["embedding"].dtype, params["layers"]["mlp"]["up_proj"]["kernel"][1]
    (dtype(bfloat16), Array([[-0., -2., -4.],
                             [-1., -3., -5.]], dtype=float32))
    """
    leaves = jax.tree_util.tree_leaves_with_path(like)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    names = [_names(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    expected = [name for group in names for name in group]
    where = str(getattr(tensors, "path", "tensors"))
    found = [name for name in tensors if not _BUFFERS.fullmatch(name)]
    if _HEAD in found and _HEAD not in expected and _EMBEDDING in found:
        if not np.array_equal(tensors[_HEAD], tensors[_EMBEDDING]):
            raise ValueError(
                f"{where}: the head is tied, but {_HEAD} differs from {_EMBEDDING}: untie the head"
            )
        found.remove(_HEAD)
    safetensors.check_names(found, expected, where)
    filled = [
        _fill(tensors, group, path, leaf)
        for path, group, (_, leaf) in zip(paths, names, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), filled)


def _names(path: str, leaf: Kernel) -> list[str]:
    if path.startswith("layers/"):
        return [torch_name(path, layer) for layer in range(leaf.shape[0])]
    return [torch_name(path)]


def _fill(tensors: Mapping[str, Any], names: list[str], path: str, leaf: Kernel) -> jax.Array:
    buffer = np.empty(leaf.shape, leaf.dtype)
    for place, name in zip(
        buffer if path.startswith("layers/") else buffer[None], names, strict=True
    ):
        value = np.asarray(tensors[name])
        shape = place.shape[::-1] if path.endswith("/kernel") else place.shape
        if value.shape != shape:
            raise ValueError(
                f"{name} is {value.shape}, but {path} of shape {leaf.shape} needs {shape}"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} is of dtype {value.dtype}: dequantise it first")
        place[...] = value.T if path.endswith("/kernel") else value
    return jax.device_put(buffer, getattr(leaf, "sharding", None))


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTensor:
    """A Flax leaf, or one layer of it, in torch's layout; `np.asarray` fetches and transposes
    it."""

    leaf: Kernel
    layer: int | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.leaf.shape[self.layer is not None :])
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.leaf.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        value = np.asarray(self.leaf if self.layer is None else self.leaf[self.layer])
        return np.array(value.T if self.transposed else value, dtype, copy=copy)


def to_torch(params: Pytree) -> dict[str, TorchTensor]:
    """{Hugging Face's name: tensor} of a Flax tree, scanned or not, in Hugging Face's order.

    Nothing is computed or copied until a tensor is asked for as a NumPy array, which
    `safetensors.write` does one by one.

    Args:
      params: nested dictionaries of arrays, every one whole or addressable from this process.

    Raises:
      ValueError: for a path that no LLaMA has.

    >>> tensors = to_torch({"layers": {"mlp": {"up_proj": {"kernel": np.ones((2, 4, 3))}}}})
    >>> {name: tensor.shape for name, tensor in tensors.items()}
    {'model.layers.0.mlp.up_proj.weight': (3, 4), 'model.layers.1.mlp.up_proj.weight': (3, 4)}
    """
    tensors = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        layers = range(leaf.shape[0]) if path.startswith("layers/") else [None]
        for layer in layers:
            tensors[torch_name(path, layer)] = TorchTensor(leaf, layer, path.endswith("/kernel"))
    return dict(sorted(tensors.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, int, int, str]:
    path, layer = flax_path(name)
    if layer is None:
        return (("embed", "layers", "norm", "lm_head").index(path.partition("/")[0]), 0, 0, name)
    module = name.split(".", 3)[3].rpartition(".")[0]
    return (1, layer, list(_INSIDE).index(module), name)


__all__ = ["TorchTensor", "flax_path", "from_torch", "to_torch", "torch_name"]
__dir__ = functools.partial(sorted, __all__)
