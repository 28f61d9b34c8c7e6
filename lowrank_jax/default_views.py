"""What names and neighbours say about the axes of a kernel that no rule names.

A kernel of two axes is `(inputs, outputs)`. One of more axes is read where something says how, and
never where the first axis might as well count layers:

* a bias beside it has the shape of the outputs: (H, K) beside a kernel (D, H, K), (M,) beside (3,
  3, N, M). A stack of layers has a stack of biases, so a bias with another first axis than the
  kernel shows that there is no stack;
* names of its axes (`nn.Partitioned`) say which are heads;
* Flax's attention has `query`, `key`, `value` (D, H, K) and `out` (H, K, D), whose shapes fit
  together;
* a layer named as a convolution contracts all axes but the last, unless a mask hides its bias.

All shapes here are those of one layer: an axis that was declared to count layers is taken off
before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lowrank_jax.matrices import MatrixView, Shape

_ATTENTION = ("query", "key", "value", "out")
_CONVOLUTION = r"(.*_)?conv(transpose)?(_?\d+)?(_.*)?"
_OUTPUT = r"(.*_)?(o|wo|out|output)(_.*)?|c_proj|attn_vec.*"
_HEADS = r"(.*_)?(heads?|kv|head_dim)"
_STACK = r"((?:.*/)?(?:(?:.*_)?(?:layers?|blocks?|experts?|stack)|h|(?:Scan|Vmap)[^/]*))/(?!\d+/).*"


def read(
    path: str,
    shape: Shape,
    names: tuple | None,
    shapes: Mapping[str, Shape],
    masked: Collection[str] = (),
) -> tuple[MatrixView, str] | None:
    """The view of a kernel of three or more axes and what said so, or None where nothing does.

    Args:
      path, shape, names: of the kernel; `names` are those of its axes, or None.
      shapes: of the leaves of the tree, by path.
      masked: paths of leaves whose shapes a mask hides. A convolution whose bias is hidden is not
        read by its name: of a stack of layers the bias would have shown it.

    >>> shapes = {"heads/kernel": (16, 4, 8), "heads/bias": (4, 8)}
    >>> read("heads/kernel", (16, 4, 8), None, shapes)
    (MatrixView(cols=(1, 2)), 'bias')
    """
    bias = _beside(path, "bias", shapes)
    outputs = _outputs_by_bias(shape, bias)
    if outputs:
        return split(shape, outputs), "bias"
    outputs = _outputs_by_names(names)
    if outputs:
        return split(shape, outputs), "names of axes"
    outputs = _outputs_in_attention(path, shape, shapes)
    if outputs:
        return split(shape, outputs), "attention"
    without_bias = bias is None and path_beside(path, "bias") not in masked
    # one to three window axes, and two of channels
    is_kernel = is_convolution(path) and 3 <= len(shape) <= 5
    if without_bias and is_kernel and stack_root(path) is None:
        return split(shape, 1), "convolution"
    return None


def split(shape: Shape, outputs: int) -> MatrixView:
    """The view whose columns are the last axes, and whose rows are all before them."""
    axes = tuple(range(len(shape)))
    return MatrixView(rows=axes[:-outputs], cols=axes[-outputs:])


def guess(path: str, shape: Shape, shapes: Mapping[str, Shape]) -> MatrixView:
    """A likely view of a kernel that `read` cannot decide, to be proposed and checked; arguments as
    of `read`.

    >>> guess("moe/experts_up/kernel", (4, 8, 16), {}), guess("o_proj/kernel", (4, 8, 16), {})
    (MatrixView(rows=(1,), cols=(2,), batch=(0,)), MatrixView(rows=(0, 1), cols=(2,)))
    """
    *_, layer, _ = ("", *path.split("/"))
    bias = _beside(path, "bias", shapes)
    # a bias for each matrix of a stack
    is_stack = bias is not None and len(bias) == 2 and bias == (shape[0], shape[-1])
    is_experts = re.search("expert|moe", path, re.IGNORECASE)
    if len(shape) == 3 and (is_stack or is_experts):
        return MatrixView(batch=(0,), rows=(1,), cols=(2,))
    # a window of a convolution is small
    has_window = len(shape) > 3 and max(shape[:-2]) <= 16
    contracts = has_window or is_convolution(path) or re.fullmatch(_OUTPUT, layer)
    return split(shape, 1 if contracts else len(shape) - 1)


def stack_root(path: str) -> str | None:
    """The module above a leaf whose name suggests a stack: `layers/up/kernel`, but not
    `layers/3/up/kernel`.

    >>> (
    ...     stack_root("decoder/layers/up/kernel"),
    ...     stack_root("layers/3/up/kernel"),
    ...     stack_root("layers_3/up/kernel"),
    ... )
    ('decoder/layers', None, None)
    """
    found = re.fullmatch(_STACK, path)
    return found.group(1) if found else None


def is_convolution(path: str) -> bool:
    """Whether the layer of a kernel is named as a convolution: `Conv_0`, `conv1`, `stem_conv`,
    `ConvTranspose_2`."""
    *_, layer, _ = ("", *path.split("/"))
    return bool(re.fullmatch(_CONVOLUTION, layer, re.IGNORECASE))


def path_beside(path: str, name: str) -> str:
    """The path of the leaf `name` in the module that holds `path`."""
    return "/".join([*path.split("/")[:-1], name])


def _beside(path: str, name: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the leaf `name` in the module that holds `path`."""
    return shapes.get(path_beside(path, name))


def _outputs_by_bias(shape: Shape, bias: Shape | None) -> int:
    """How many of the last axes are outputs, 0 where the bias does not tell."""
    if not bias or len(bias) >= len(shape) or shape[-len(bias) :] != bias:
        return 0
    stack_possible = len(bias) > 1 and bias[0] == shape[0]
    return 0 if stack_possible else len(bias)


def _outputs_by_names(names: tuple | None) -> int:
    """Where exactly one axis is no part of heads, it is the model's: the others are outputs if it
    comes first."""
    if names is None or len(names) < 3 or not all(isinstance(name, str) for name in names):
        # an axis without a name, or one with several: those of mesh axes, which say nothing of the
        # model
        return 0
    heads = [bool(re.fullmatch(_HEADS, name)) for name in names]
    first, *after = heads
    *before, last = heads
    if all(after) and not first:
        return len(names) - 1
    return 1 if all(before) and not last else 0


def _outputs_in_attention(path: str, shape: Shape, shapes: Mapping[str, Shape]) -> int:
    """2 for query, key and value, 1 for out, 0 unless the four fit together as those of one
    attention layer do."""
    module, _, _ = path.rpartition("/")
    _, _, layer = module.rpartition("/")
    query = _beside(module, "query/kernel", shapes)
    out = _beside(module, "out/kernel", shapes)
    if layer not in _ATTENTION or query is None or out is None:
        return 0
    if not len(query) == len(out) == len(shape) == 3:
        return 0
    # query (d, heads, head_dim), out (heads, head_dim, d)
    fits = query[1:] == out[:2] and (layer == "out" or shape[2] == query[2])
    # of stacked Dense layers both would begin with the number of layers, and out would have a stack
    # of biases
    stack_possible = query[0] == out[0] and _beside(module, "out/bias", shapes) != out[2:]
    if not fits or stack_possible:
        return 0
    return 1 if layer == "out" else 2
