"""`lrx.adapted`: any JAX function, made to understand kernel nodes in its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.functions.errors import Here, ReadError
from lowrank_jax.functions.flow import Flow, is_flow
from lowrank_jax.functions.reader import Reader
from lowrank_jax.kernel_node import KernelNode
from lowrank_jax.quantized import as_node
from lowrank_jax.trees import path_of

_KEPT = 32  # programs of eager calls, by arguments' shapes


def adapted(
    function: Callable[..., Any],
    *,
    aux: bool = False,
    dense: str | tuple[str, ...] = (),
    partial: bool = False,
) -> Callable[..., Any]:
    """A function that takes kernel nodes wherever it takes kernels: adapters, taps, codes, factors.

        adapted(fn)(attach(params, a), *args) = fn(effective(params, a), *args)

    in values and all derivatives, up to rounding, and without forming the effective kernels. `fn`
    may be any JAX function: of linen, nnx, equinox, haiku, or written by hand. It is traced with plain
    arrays in the kernels' place, and its program is evaluated equation by equation: a node is
    followed through casts, transposes, reshapes, slices, scans, jits and remats to the products that
    multiply by it, and multiplies there by its thin factors. What no node reaches is the program as it
    is. Without nodes the function is called as it is. `lrx.tapped` is another name for it.

    Args:
      function: of arrays, and of whatever else, which then is static. Bools, numbers and strings of
        Python are static, as are concrete values to Python's control flow under `jax.jit`.
      aux: return `(result, {path: value})`, with what nodes give beside their products, such as a
        router's loss: stacked by scans, a list where a leaf is used more than once.
      dense: patterns of paths of leaves whose effective matrix may be formed at an equation that is
        no product, such as a weight norm. Taps form none.
      partial: allow nodes that no product of the function uses, such as the decoder's while it
        encodes.

    Returns:
      The function. A node that it returns as it came, it returns as a node.

    Raises:
      ValueError: when called, with the leaf, the primitive, the line of the function and a remedy: for
        what reads a kernel and is no product; naming the leaves, for nodes that nothing used; for
        values beside products that nobody takes.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> def model(params, x):
    ...     hidden = jnp.einsum("bd,dhk->bhk", x, params["query"])
    ...     return jnp.sin(hidden).reshape(len(x), -1) @ params["out"]
    >>> params = {"query": jnp.ones((4, 2, 3)), "out": jnp.ones((6, 5))}
    >>> views = lrx.Views(rules={"query": lrx.MatrixView(rows=(0,), cols=(1, 2))})
    >>> rules = {".*": lrx.adapters.lora(rank=2)}
    >>> adaptation = lrx.adapt(params, rules, jax.random.key(0), views=views)
    >>> run = lambda train, x: lrx.adapted(model)(
    ...     lrx.attach(params, adaptation.replace(train=train)), x
    ... )
    >>> run(adaptation.train, jnp.ones((2, 4))).shape
    (2, 5)
    """
    if getattr(function, "_reads_nodes", None) is function:
        if aux or dense or partial:
            raise ValueError(
                "function is lrx.adapted already, and its options are those that it was given; give "
                f"aux={aux}, dense={dense!r}, partial={partial} there"
            )
        return function
    patterns = (dense,) if isinstance(dense, str) else tuple(dense)
    kept: dict[Any, Any] = {}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        paths, treedef = jax.tree_util.tree_flatten_with_path(
            jax.tree.map(_boxed, (args, kwargs), is_leaf=is_special), is_leaf=is_special
        )
        leaves = [leaf for _, leaf in paths]
        if not any(map(is_special, leaves)):
            result = function(*args, **kwargs)
            return (result, {}) if aux else result
        given = [Flow.of(leaf, _path(keys)) if is_special(leaf) else leaf for keys, leaf in paths]
        program = _program(function, treedef, given, kept)
        reader = Reader(dense=patterns, kept=program.kept, outer=(Here.now(),))
        values = [one for one in given if _is_array(one)]
        made = reader.read(program.jaxpr, program.consts, values)
        if not partial:
            _check_used([one for one in given if is_flow(one)], reader.used)
        result = program.result([_handed_out(one) for one in made])
        beside = {path: own[0] if len(own) == 1 else own for path, own in reader.beside.items()}
        if aux:
            return result, beside
        if beside:
            labels = sorted({one.label for one in given if is_flow(one) and one.path in beside})
            raise ReadError(
                f"{', '.join(labels)}: it gives a value beside the product, such as "
                "a router's loss, and nobody takes it; write lrx.adapted(function, aux=True), which "
                "returns (result, {path: value}), or lrx.matmul(x, kernel, aux=True)"
            )
        return result

    # itself, since wrappers such as jax.jit copy a function's attributes
    run._reads_nodes = run  # type: ignore[attr-defined]
    return run


tapped = adapted


def is_special(x: Any) -> bool:
    """Whether a leaf is more than an array."""
    return as_node(x) is not None


def _boxed(leaf: Any) -> Any:
    """A node of boxes, as one in the box of its kernel."""
    if not isinstance(leaf, KernelNode):
        return leaf
    is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
    boxes = [box for box in jax.tree.leaves(leaf, is_leaf=is_box) if is_box(box)]
    return boxes[0].replace_boxed(meta.unbox(leaf)) if boxes else leaf


def _is_array(x: Any) -> bool:
    return is_flow(x) or isinstance(x, jax.Array | np.ndarray | np.generic)


def _path(keys: Any) -> str:
    """Of a leaf of `(args, kwargs)`: within its argument, where that is a tree."""
    return path_of(keys[2:] or keys[1:])


class Program:
    """A function traced with arrays in the kernels' place."""

    def __init__(self, function: Callable[..., Any], treedef: Any, given: list[Any]):
        arrays = [one for one in given if _is_array(one)]
        tree: list[Any] = []

        def flat(*values):
            own = iter(values)
            leaves = [next(own) if _is_array(one) else one for one in given]
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            made = function(*args, **kwargs)
            found, structure = jax.tree.flatten(made)
            tree.append((structure, [(None, x) if not _dynamic(x) else (0, None) for x in found]))
            return [x for x in found if _dynamic(x)]

        closed = jax.make_jaxpr(flat)(*map(_abstract, arrays))
        self.jaxpr, self.consts = closed.jaxpr, closed.consts
        self.structure, self.static = tree[-1]
        self.kept: dict[Any, Any] = {}

    def result(self, made: list[Any]) -> Any:
        """What the function returns, of the results of its program."""
        own = iter(made)
        leaves = [next(own) if kind == 0 else value for kind, value in self.static]
        return jax.tree.unflatten(self.structure, leaves)


def _dynamic(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _abstract(x: Any) -> Any:
    if not is_flow(x):
        return x
    if x.array is not None:
        return x.array
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _program(function: Any, treedef: Any, given: list[Any], kept: dict[Any, Any]) -> Program:
    """The program of a call; that of the last one with these shapes, where its constants are
    numbers."""
    values = [_abstract(one) if _is_array(one) else one for one in given]
    kinds = tuple(
        (jax.typeof(v) if not isinstance(v, jax.ShapeDtypeStruct) else (v.shape, v.dtype))
        if _is_array(one) else _Static(v)
        for one, v in zip(given, values, strict=True)
    )  # fmt: skip
    key = (treedef, kinds, _context())
    try:
        hash(key)
    except TypeError:
        return Program(function, treedef, given)
    if key in kept:
        return kept[key]
    program = Program(function, treedef, given)
    if not any(isinstance(const, jax.core.Tracer) for const in program.consts):
        if len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = program
    return program


def _context() -> tuple[Any, ...]:
    """What a trace depends on beside its arguments."""
    config: Any = jax.config
    names = ("enable_x64", "default_matmul_precision", "numpy_dtype_promotion")
    return (
        jax.sharding.get_abstract_mesh(),
        sharding.context_key(),
        *(getattr(config, f"jax_{name}") for name in names),
    )


class _Static:
    """A static argument, equal to one of its type and value."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and type(self.value) is type(other.value)
            and self.value == other.value
        )


def _handed_out(value: Any) -> Any:
    """What the function returns: a node that is untouched is one again."""
    if not is_flow(value):
        return value
    if not value.axes.untouched:
        raise ReadError(
            f"{value.label}: the function returns the kernel, transposed, reshaped or sliced to "
            f"{tuple(value.shape)}; return it as it came, or leave it out"
        )
    return value.value()


def _check_used(flows: list[Flow], used: set[str]) -> None:
    missing = sorted({flow.path for flow in flows} - used)
    if missing:
        node = next(flow.node for flow in flows if flow.path == missing[0])
        what = node.label if isinstance(node, KernelNode) else repr(missing[0])
        raise ReadError(
            f"{what}: no product of the function uses the kernels {missing}, so what stands in their "
            "place does nothing. Leave them out with exclude= or Views(rules=((path, None),)), or, "
            "where this function needs only a part of the model, write lrx.adapted(function, "
            "partial=True)"
        )
