"""Views read from a program: what multiplies by each leaf, and over which of its axes.

Every leaf is followed through the program as a kernel node is (`reader.Reader`), but for its view,
which nobody knows: a probe. At a product the axes of the leaf are found by their digits:

    y = einsum("bd,dhk->bhk", x, W)      axis 0 contracted, axes 1 and 2 kept
    scan over W[l], W[l], W[ids]         axis 0 taken apart: it is missing in the product
    W[ids], with vectors left            axis 0 looked up

What is contracted makes rows, what is kept columns, what is batched or taken apart a stack of
matrices. All of it is done under `jax.eval_shape`: nothing is computed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.functions import calls, structure
from lowrank_jax.functions.adapted import Program, is_special
from lowrank_jax.functions.axes import Axes, Digits
from lowrank_jax.functions.equations import bind
from lowrank_jax.functions.errors import ReadError
from lowrank_jax.functions.flow import Flow, is_flow
from lowrank_jax.functions.hosts import look_up_axis
from lowrank_jax.functions.reader import Reader
from lowrank_jax.functions.rules import registered
from lowrank_jax.matrices import MatrixView
from lowrank_jax.resolution import Use, ViewReport, ViewRow
from lowrank_jax.trees import is_node, nodes_with_keys, path_of
from lowrank_jax.typing import Shape


def uses(
    function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> dict[str, tuple[Use, ...]]:
    """What reads each leaf of `params` in `function(params, *args, **kwargs)`, and over which axes.

    Args:
      function: any JAX function, as of `lrx.adapted`. It is traced, not run.
      params: its first argument, arrays or `jax.ShapeDtypeStruct`s.
      args, kwargs: the others, likewise.

    Returns:
      By path the equations that read the leaf, in the order of the program; () for a leaf that it
      does not read. Slices, reshapes, transposes, casts, scans and the like are none: the leaf is
      followed through them. What is no product ends it, such as the product of entries in a norm.

    >>> import jax.numpy as jnp
    >>> def model(params, x):
    ...     return jnp.einsum("bd,dhk->bhk", x, params["query"]) * params["scale"]
    >>> params = {"query": jnp.ones((4, 2, 3)), "scale": jnp.ones(3)}
    >>> found = uses(model, params, jax.ShapeDtypeStruct((5, 4), jnp.float32))
    >>> found["query"][0].axes, found["scale"][0].primitive
    (('contracted', 'kept', 'kept'), 'mul')
    """
    return {path: found for path, _, _, found in _read(function, params, args, kwargs)}


def views_of(function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> ViewReport:
    """The matrices that a function multiplies by: a proposal, to be printed and pinned.

    Axes that are contracted with an input are rows, those that are kept are columns, those that are
    batched, scanned, indexed or gathered are a batch of matrices, and the axis of a look-up is the
    rows of an embedding. A product and its transpose are one matrix, oriented as the look-up is, or
    as most products are. A leaf has no view where nothing reads it, where what reads it is no product
    (norms, biases), and where it is read as different matrices; the report says so.

    It cannot know what is meant: embeddings and heads come out as matrices (`lrx.Views` leaves them
    out by their names), and a fused kernel as one.

    Args:
      function, params, args, kwargs: as of `uses`.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> def model(params, x):
    ...     layer = lambda x, own: (jnp.tanh(own["weight"] @ x) * own["scale"], None)
    ...     return jax.lax.scan(layer, x, params)[0]
    >>> params = {"weight": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}
    >>> report = views_of(model, params, jnp.ones(4))
    >>> report.at("weight").view, report.at("scale").reason[:18]
    (MatrixView(rows=(2,), batch=(0,)), 'no product: mul at')
    >>> lrx.resolution.resolve(params, lrx.Views(inferred=report), rank=2).sides
    (('weight', 'rows'),)
    """
    rows = []
    for path, shape, dtype, found in _read(function, params, args, kwargs):
        if not jnp.issubdtype(dtype, jnp.floating):
            rows.append(ViewRow(path, shape, None, f"entries of {dtype}"))
            continue
        view, reason = _summary(found)
        rows.append(ViewRow(path, shape, view, reason, found))
    return ViewReport(tuple(rows))


# ------------------------------------------------------------------------- summary


def _summary(found: tuple[Use, ...]) -> tuple[MatrixView | None, str]:
    """`(view, why there is none)` of the uses of a leaf."""
    if not found:
        return None, "not read"
    products = [use for use in found if use.axes]
    if not products:
        return None, f"no product: {_listed(found)}"
    split = [use for use in products if use.sides is None]
    if split:
        return None, f"parts of an axis are different things: {_listed(split)}"
    seen = [(use, use.view) for use in products if use.view is not None]
    # matrices that are chosen, as experts by their numbers, and multiplied: no look-up of rows
    batches = [set(view.batch) for use, view in seen if not use.looks_up]
    seen = [
        (use, view)
        for use, view in seen
        if not use.looks_up or not any(set(view.rows) <= batch for batch in batches)
    ]
    if not seen:
        return None, f"no matrix: {_listed(products)}"
    matrices = {(view.batch, frozenset((view.rows, view.cols))): use for use, view in seen}
    if len(matrices) > 1:
        return None, f"different matrices: {_listed(matrices.values())}"
    oriented = [view for use, view in seen if use.looks_up] or [view for _, view in seen]
    return collections.Counter(oriented).most_common(1)[0][0], ""


def _listed(found: Iterable[Use]) -> str:
    texts = list(dict.fromkeys(map(str, found)))
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


# ------------------------------------------------------------------------- reading


def _read(
    function: Any, params: Any, args: Any, kwargs: Any
) -> list[tuple[str, Shape, Any, tuple[Use, ...]]]:
    """`[(path, shape, dtype, uses), ...]` of the leaves of params."""
    nodes = nodes_with_keys(params, is_leaf=lambda x: is_node(x) or is_special(x))
    paths = [
        path_of(keys)
        for keys, node in nodes
        if not isinstance(node, optax.MaskedNode)
        for _ in jax.tree.leaves(node, is_leaf=is_special)
    ]
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_special)
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_special(leaf) else leaf
        for leaf in leaves
    ]
    reader = Inference(shapes=dict(zip(paths, map(np.shape, leaves), strict=False)))

    def run(values: list[Any]) -> None:
        own = iter(values)
        given = [next(own) if _is_dynamic(leaf) else leaf for leaf in leaves]
        for number, path in enumerate(paths):
            if _is_float(leaves[number]):
                given[number] = Flow.probe(given[number], path)
        program = Program(function, treedef, given)
        reader.read(
            program.jaxpr,
            program.consts,
            [one for one, leaf in zip(given, leaves, strict=True) if _is_dynamic(leaf)],
        )

    jax.eval_shape(run, [leaf for leaf in leaves if _is_dynamic(leaf)])
    return [
        (path, tuple(leaf.shape), leaf.dtype, reader.of(path))
        for path, leaf in zip(paths, leaves, strict=False)
        if _is_dynamic(leaf)
    ]


def _is_dynamic(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def _is_float(x: Any) -> bool:
    return _is_dynamic(x) and jnp.issubdtype(x.dtype, jnp.floating)


@dataclasses.dataclass
class Inference(Reader):
    """A reading of a program that notes what each probe meets, and evaluates that as it is.

    Attributes:
      shapes: of the leaves, by path.
      found: the uses, with the equations that they are, which are then kept.
    """

    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    found: dict[Any, tuple[Any, Use]] = dataclasses.field(default_factory=dict)

    def of(self, path: str) -> tuple[Use, ...]:
        """The uses of a leaf."""
        return tuple(use for (own, *_), (_, use) in self.found.items() if own == path)

    def equation(self, eqn: Any, given: list[Any], folded: dict[Any, int]) -> list[Any]:
        try:
            return super().equation(eqn, given, folded)
        except (TypeError, ValueError) as error:
            # a call out of which probes come as others than they went in
            if not any(map(is_flow, given)):
                raise
            return self._formed(eqn, given, str(error).partition("\n")[0])

    def _with_nodes(self, eqn: Any, given: list[Any], folded: dict[Any, int]) -> list[Any]:
        name = eqn.primitive.name
        if (equivalent := registered(eqn)) is not None:
            for place, flow in _flows(given):
                product, kernel, _, order = calls.one_product(eqn, equivalent, place)
                self._note(eqn, flow, WORDS[product.primitive.name], product, kernel, order)
            return bind(eqn, _arrays(given))
        if name == "gather" and is_flow(given[0]) and not is_flow(given[1]):
            return self._gathered(eqn, *given)
        if name in ("custom_vjp_call", "custom_vjp_call_jaxpr"):
            # whatever its derivative is, it multiplies as its program does
            return calls.custom_jvp(self, eqn, given)
        return super()._with_nodes(eqn, given, folded)

    def _gathered(self, eqn: Any, flow: Flow, indices: Any) -> list[Any]:
        axis = look_up_axis(eqn, flow.axes)
        if indices.ndim > 1:  # else one is chosen, by its number
            self._note(eqn, flow, WORDS["gather"], eqn, 0)
        others = (own for place, own in enumerate(flow.axes.value) if place != axis)
        left = {digit.name[0] for own in others for digit in own if digit.size > 1}
        # what is left of a matrix is multiplied further on; of a vector it is an activation
        made = structure.gather(eqn, flow, indices) if len(left - _none(left)) > 1 else None
        return bind(eqn, [flow.array, indices]) if made is None else made

    def _product(self, eqn: Any, given: list[Any], folded: dict[Any, int]) -> list[Any]:
        del folded
        for place, flow in _flows(given):
            self._note(eqn, flow, WORDS[eqn.primitive.name], eqn, place)
        return bind(eqn, _arrays(given))

    def _formed(self, eqn: Any, given: list[Any], reason: str) -> list[Any]:
        note = "" if reason.endswith("no product") else f"it {reason}"
        for _, flow in _flows(given):
            self._add(eqn, flow, Use(eqn.primitive.name, self.line(eqn), note=note))
        return bind(eqn, _arrays(given))

    def _note(
        self, eqn: Any, flow: Flow, words_of: Any, product: Any, place: int, order: Any = None
    ) -> None:
        """A product that multiplies by a probe."""
        axes = flow.axes if order is None else flow.axes.transpose(order)
        words = axes_of_leaf(self.shapes[flow.path], axes, words_of(product, place, axes))
        self._add(eqn, flow, Use(product.primitive.name, self.line(eqn), words))

    def _add(self, eqn: Any, flow: Flow, use: Use) -> None:
        self.found[flow.path, id(eqn), use.axes] = eqn, use


def _none(axes: set[int]) -> set[int]:
    """Those that are no axes of the leaf."""
    return {axis for axis in axes if axis < 0}


def _flows(given: list[Any]) -> list[tuple[int, Flow]]:
    return [(place, one) for place, one in enumerate(given) if is_flow(one)]


def _arrays(given: list[Any]) -> list[Any]:
    return [one.array if is_flow(one) else one for one in given]


def axes_of_leaf(shape: Shape, axes: Axes, words: list[str]) -> tuple[str, ...]:
    """What a product does with the axes of a leaf, of what it does with those of the value.

    >>> axes = Axes.of((6, 8), None).reshape((6, 2, 4))
    >>> axes_of_leaf((6, 8), axes, ["kept", "batched", "contracted"])
    ('kept', 'batched+contracted')
    """
    own: list[dict[str, None]] = [{} for _ in shape]
    there = [1] * len(shape)
    for digits, word in zip(axes.value, words, strict=True):
        for digit in digits:
            if digit.name[0] < 0 or _is_index(digit, digits):
                continue
            own[digit.name[0]][word] = None
            there[digit.name[0]] *= digit.full
    for axis, size in enumerate(shape):
        # a part that is not in the value was taken apart before
        if there[axis] < size or not own[axis]:
            own[axis]["taken apart"] = None
    return tuple("+".join(found) for found in own)


def _is_index(digit: Any, digits: Digits) -> bool:
    """One index of several, whose axis a reshape has dropped."""
    return digit.cut and digit.size == 1 and len(digits) > 1


# ---------------------------------------------------------------- words of products


def _dot_words(eqn: Any, place: int, axes: Axes) -> list[str]:
    contracted, batched = (own[place] for own in eqn.params["dimension_numbers"])
    return _words(axes, contracted=contracted, batched=batched)


def _ragged_words(eqn: Any, place: int, axes: Axes) -> list[str]:
    if place != 1:
        raise ReadError("is the input of a ragged product")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batched = (own[place] for own in numbers.dot_dimension_numbers)
    return _words(axes, contracted=contracted, batched=(*batched, *numbers.rhs_group_dimensions))


def _convolution_words(eqn: Any, place: int, axes: Axes) -> list[str]:
    if place != 1:
        raise ReadError("is convolved as an image")
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        raise ReadError("is a convolution in groups")
    out, *window = eqn.params["dimension_numbers"].rhs_spec
    del out
    return _words(axes, contracted=window)


def _look_up_words(eqn: Any, place: int, axes: Axes) -> list[str]:
    del place
    return _words(axes, **{"looked up": (look_up_axis(eqn, axes),)})


def _words(axes: Axes, **named: Iterable[int]) -> list[str]:
    """Of each axis of a value; an axis that nothing names is kept."""
    words = ["kept"] * len(axes.value)
    for word, own in named.items():
        for axis in own:
            words[axis] = word
    return words


WORDS: dict[str, Callable[[Any, int, Axes], list[str]]] = {
    "dot_general": _dot_words,
    "conv_general_dilated": _convolution_words,
    "ragged_dot_general": _ragged_words,
    "gather": _look_up_words,
}
