"""Reads a program equation by equation, with kernel nodes where its kernels were.

    env = {variables: values}
    for equation in program:        what no node reaches is evaluated as it is written
        structure                   the node moves on (`structure`)
        a product                   the node multiplies (`hosts`)
        a call                      its program is read (`calls`)
        anything else               an error at the user's line, or the matrix itself (`dense=`)

This is `jax.core.eval_jaxpr` with a choice in its middle, and no tracer of our own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from lowrank_jax import sharding
from lowrank_jax.functions import calls, hosts, structure
from lowrank_jax.functions.axes import AxesError
from lowrank_jax.functions.equations import bind
from lowrank_jax.functions.errors import ReadError, line_of
from lowrank_jax.functions.flow import Flow, is_flow
from lowrank_jax.functions.hosts import PRODUCTS
from lowrank_jax.functions.rules import registered
from lowrank_jax.kernel_node import KernelNode
from lowrank_jax.quantized import QuantizedKernel, as_node, with_path

Values = list[Any]


@dataclasses.dataclass
class Reader:
    """What one reading of a program is asked for, and what it found.

    Attributes:
      dense: patterns of leaves whose matrix may be formed where no product is.
      outer: the calls that are being read, for the lines of errors.
      used: paths of the leaves that a product has used.
      beside: values that nodes gave beside their products, by path.
      kept: what is compiled for calls of jit, and which leaves they use, from one reading to the
        next.
    """

    dense: tuple[str, ...] = ()
    outer: tuple[Any, ...] = ()
    used: set[str] = dataclasses.field(default_factory=set)
    beside: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    kept: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def read(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> Values:
        """The results of a program whose arguments may be flows."""
        env: dict[Any, Any] = {}
        last = _last_uses(jaxpr)
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))

        folded: dict[Any, int] = {}

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            given = [value(atom) for atom in eqn.invars]
            stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with (
                source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
                eqn.ctx.manager,
            ):
                made = self.equation(eqn, given, folded)
            if eqn.primitive.name == "reshape":
                _note_folding(eqn, folded)
            env.update(zip(eqn.outvars, made, strict=True))
            for variable in last.get(number, ()):
                env.pop(variable, None)
        return [value(atom) for atom in jaxpr.outvars]

    def within(self, eqn: Any, used: set[str] | None = None) -> Reader:
        """A reader of the program of a call, which hands out what is given beside its products."""
        noted = self.used if used is None else used
        return dataclasses.replace(self, outer=(*self.outer, eqn), used=noted, beside={})

    def equation(self, eqn: Any, given: Values, folded: dict[Any, int]) -> Values:
        """The results of one equation; `folded` are variables whose first axis was, see `Op.rows`."""
        flows = [one for one in given if is_flow(one)]
        if not flows:
            return bind(eqn, given)
        try:
            made = self._with_nodes(eqn, given, folded)
        except (ReadError, AxesError) as error:
            if getattr(error, "told", False):
                raise
            made = self._formed(eqn, given, str(error))
        return made

    def _with_nodes(self, eqn: Any, given: Values, folded: dict[Any, int]) -> Values:
        name = eqn.primitive.name
        if (equivalent := registered(eqn)) is not None:
            return calls.replaced(self, eqn, given, equivalent)
        if name in calls.RULES:
            return calls.RULES[name](self, eqn, given)
        if name in structure.RULES:
            flow = given[0]
            if name in structure.CUTS and is_flow(flow) and self._needs_all(eqn, flow):
                return self._formed(eqn, given, "reads whole rows and columns, and is sliced here")
            if not is_flow(flow) and name not in ("optimization_barrier", "device_put"):
                raise ReadError("is an index")
            made = structure.RULES[name](eqn, *given)
            if made is not None:
                return made
        if name in PRODUCTS:
            return self._product(eqn, given, folded)
        raise ReadError("is read by something that is no product")

    def _needs_all(self, eqn: Any, flow: Flow) -> bool:
        node = flow.node
        needs = isinstance(node, KernelNode) and node.whole_matrix
        return needs and structure.cuts_a_matrix(eqn, flow)

    def _product(self, eqn: Any, given: Values, folded: dict[Any, int]) -> Values:
        places = [i for i, one in enumerate(given) if is_flow(one)]
        if len(places) != 1:
            raise ReadError("is multiplied by another node")
        (place,) = places
        flow: Flow = given[place]
        for digit in flow.axes.batch:
            # a stack of one matrix
            flow = flow.indexed(digit, 0) if digit.size == 1 else flow
        name = eqn.primitive.name
        use = "dot_general" if name == "ragged_dot_general" else name
        node = as_node(flow.node)
        seen = flow.node if node is None else node.at(use)
        self.used.add(flow.path)
        if as_node(seen) is None:  # the node is for other products
            array = flow.array
            if array is None:
                array = flow.axes.from_leaf(seen).astype(flow.dtype)
            return bind(eqn, [array if i == place else one for i, one in enumerate(given)])
        host = PRODUCTS[name](eqn, place, flow.axes, flow.dtype, self.line(eqn))
        given = [one if is_flow(one) else jnp.asarray(one) for one in given]  # no literals
        x = eqn.invars[host.x_place]
        if not isinstance(x, jex.Literal) and x in folded:
            host = dataclasses.replace(host, rows=folded[x])
        rest = [one for i, one in enumerate(given) if i not in (place, host.x_place)]
        y, aux = hosts.times(
            host, with_path(seen, flow.path), flow.array, rest, given[host.x_place]
        )
        if aux is not None and jax.tree.leaves(aux):
            self.beside.setdefault(flow.path, []).append(aux)
        return [sharding.reshard(y.astype(host.y.dtype), sharding.explicit_spec(host.y))]

    # ------------------------------------------------------------------ errors

    def line(self, eqn: Any) -> str:
        return line_of(eqn, *reversed(self.outer))

    def _formed(self, eqn: Any, given: Values, reason: str) -> Values:
        """The equation with the matrices themselves, where `dense` allows it; else the error."""
        flows = [one for one in given if is_flow(one)]
        allowed = all(
            _forms_always(one.node) or any(re.fullmatch(p, one.path) for p in self.dense)
            for one in flows
        )
        arrays = [matrix_of(one) if allowed else None for one in flows]
        if not allowed or any(array is None for array in arrays):
            raise self.error(eqn, flows, reason, taps=allowed)
        made = iter(arrays)
        self.used.update(one.path for one in flows)
        return bind(eqn, [next(made) if is_flow(one) else one for one in given])

    def error(self, eqn: Any, flows: Sequence[Flow], reason: str, taps: bool = False) -> ReadError:
        """The error of an equation that reads a node."""
        one = flows[0]
        node = one.node
        remedy = node.remedy if isinstance(node, KernelNode) else _REMEDY
        more = " Its matrix may not be formed, and dense= cannot help." if taps else ""
        error = ReadError(
            f"{one.label}: {eqn.primitive.name} at {self.line(eqn)} reads the kernel "
            f"{tuple(one.shape)}: it {reason}.{more} {remedy}"
        )
        error.told = True  # type: ignore[attr-defined]
        return error


_REMEDY = "Decode it first, kernel.dequantize(dtype), or leave it out of what is quantised."


def matrix_of(flow: Flow) -> jax.Array | None:
    """The array that a node stands for, as the program sees it here; None where it may not be
    formed."""
    node = as_node(flow.node)
    axes = flow.axes
    if node is None:
        return flow.array
    return jax.checkpoint(lambda flow: _matrix(flow, axes))(flow) if _can(node) else None


def _forms_always(kernel: Any) -> bool:
    """Whether products form the matrix of this in any case: codes, and nodes without a product of
    their own."""
    node = as_node(kernel)
    if node is None:
        return True
    own = type(node).multiply is KernelNode.multiply or isinstance(node, QuantizedKernel)
    base = node.base()
    return own and (base is None or _forms_always(base))


def _can(node: KernelNode) -> bool:
    while node is not None:
        if not node.forms:
            return False
        base = node.base()
        node = None if base is None else as_node(base)  # type: ignore[assignment]
    return True


def _matrix(flow: Flow, axes: Any) -> jax.Array:
    def of(kernel: Any) -> jax.Array:
        node = as_node(kernel)
        if node is None:
            matrices = axes.to_matrices(flow.array)
            # what lies on it is of all rows and columns; those that were cut off are cut again
            return axes.padded(axes.padded(matrices, -2, "rows"), -1, "cols")
        base = node.base()
        made = None if base is None else node.matrices(lambda: of(base))
        if made is not None:
            return made
        matrices = axes.to_matrices(axes.from_leaf(node.dense(flow.dtype)))
        return axes.padded(axes.padded(matrices, -2, "rows"), -1, "cols")

    matrices = axes.taken(axes.taken(of(flow.node), -2, "rows"), -1, "cols")
    return axes.from_matrices(matrices).astype(flow.dtype)


def _note_folding(eqn: Any, folded: dict[Any, int]) -> None:
    """Of `(B, ..., n)` reshaped to `(B ..., n)`, B."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if len(after) == 2 and len(before) > 2 and before[-1] == after[-1]:
        folded[eqn.outvars[0]] = before[0]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """By the number of an equation, the variables that nothing reads behind it."""
    seen = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    found: dict[int, list[Any]] = {}
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[number]
        for variable in (*eqn.invars, *eqn.outvars):
            if not isinstance(variable, jex.Literal) and variable not in seen:
                seen.add(variable)
                found.setdefault(number, []).append(variable)
    return found
