"""The memory ledger: bytes of parameters, gradients and optimizer state, by formula and as the
compiler lays them out.

State of one projected leaf of `L` matrices that shrinks s and keeps k, at rank r:

    basis      projector.basis_bytes(view)     L s r words if stored; 4 L r for indices, 8 L for keys; and its memory
    moments    L inner.matrix_bytes((r, k), view)   two moments of r k elements and a 4-byte count, for `inner.adam`
    residual   residual and target             L s k words of error or momentum, 4 L of norms, or nothing
    plain      plain.state_bytes(shapes)       of the leaves that are not projected, as one group
    scalars    20 (+ 4)                        format version, step, skipped, partly skipped, refreshes (and a rate's
                                               count), the state of a refresh schedule, and 4 a slot of a sampler

Formulas are arithmetic over shapes. Measured bytes are what a compiled program takes as arguments;
on one device and without padding both agree exactly. With sharded parameters a formula counts whole
arrays and a measurement one device.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import optax

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner import Inner
from lowrank_jax.projection.active import Layers
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import MatrixState, ProjectionState
from lowrank_jax.reprs import Short
from lowrank_jax.resolution import Report
from lowrank_jax.typing import Pytree

STATE = ("basis", "moments", "residual", "plain", "scalars", "other", "optimizer state")


def _bytes(tree: Pytree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _abstract(tree: Pytree) -> Pytree:
    """Shapes, dtypes and shardings of a tree, without its values."""

    def one(x):
        own = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    return jax.tree.map(one, tree)


def _inner_bytes(inner: Inner, leaves: list[jax.ShapeDtypeStruct]) -> int:
    """Bytes of one inner state."""
    return inner.state_bytes([leaf.shape for leaf in leaves])


def _matrix_bytes(projection: Projection, view: ResolvedView) -> dict[str, int]:
    projector = projection.projector
    of_matrix = projection.inner.matrix_bytes(projector.low_shape(view), view.matrix)
    return {
        "basis": projector.basis_bytes(view) + projector.memory_bytes(view),
        "moments": count(view) * of_matrix,
        "residual": projection.residual.state_bytes(view) + projection.target.state_bytes(view),
    }


def _plain_leaves(report: Report, params: Pytree) -> list[jax.ShapeDtypeStruct]:
    rows = zip(report.leaves, jax.tree.leaves(params), strict=True)
    plain = [leaf for row, leaf in rows if row.view is None]
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in plain]


def _active(projection: Projection, params: Pytree) -> tuple[Pytree, int]:
    """What has state, of shapes alone: all parameters, or those of the active layers; and the bytes
    of the sampler's map."""
    if not projection.sampler.samples:
        return params, 0
    layers = Layers.of(projection, params)
    maps = jax.eval_shape(lambda: layers.draw(0))
    # every draw has as many layers, and so the shapes of the first one
    active = jax.eval_shape(lambda params: layers.take(params, layers.draw(0)), params)
    return active, _bytes(maps)


def formula(tx: optax.GradientTransformation, params: Pytree) -> list[dict[str, Any]]:
    """Bytes by component, `[{"component", "bytes_formula"}, ...]`, computed from shapes alone.

    Gradients have the parameters' dtypes. A transformation that this library did not make has no
    formula: its one row "optimizer state" carries None. That includes an `optax.chain` around ours,
    inside which nothing can look: pass ours.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> rows = formula(
    ...     lrx.galore(1e-2, rank=4), {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}
    ... )
    >>> {row["component"]: row["bytes_formula"] for row in rows}
    {'parameters': 576, 'gradients': 576, 'basis': 128, 'moments': 516, 'residual': 0, 'plain': 132, 'scalars': 24}
    """
    rows: dict[str, int | None] = {"parameters": _bytes(params), "gradients": _bytes(params)}
    projection = getattr(tx, "projection", None)
    if projection is None:
        rows["optimizer state"] = None
    else:
        of_state = _state_bytes(projection, params)
        # a rate has a count of its own
        of_state["scalars"] += 4 if hasattr(tx, "recipe") else 0
        rows |= of_state
    return [{"component": name, "bytes_formula": size} for name, size in rows.items()]


def _state_bytes(projection: Projection, params: Pytree) -> dict[str, int]:
    """Bytes by component of the state of a projection."""
    params, maps = _active(projection, params)
    report = projection.report(params)
    matrices = [_matrix_bytes(projection, view) for view in report.projected]
    names = ("basis", "moments", "residual")
    rows = {name: sum(matrix[name] for matrix in matrices) for name in names}
    rows["plain"] = _inner_bytes(projection.plain, _plain_leaves(report, params))
    # the state of a refresh schedule, of each layer or of all
    schedule = projection.refresh_schedule
    shapes: list[Any] = [((), ())]
    if schedule.per_layer:
        shapes = [(view.batch, projection.projector.low_shape(view)) for view in report.projected]
    schedules = [jax.eval_shape(functools.partial(schedule.state_for, *shape)) for shape in shapes]
    # five counts and numbers of 4 bytes, see `ProjectionState`
    return rows | {"scalars": 20 + _bytes(schedules) + maps}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Bytes of one compiled program on one device.

    Attributes:
      arguments, outputs: its inputs and results; a table of 8 bytes for each result is counted by
        some backends.
      aliased: results that reuse a donated argument.
      temporaries: scratch memory while it runs.
      code: the program itself (0 on CPU, which does not say).
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """An upper estimate of the memory while it runs: arguments + outputs - aliased +
        temporaries + code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_update(
    tx: optax.GradientTransformation, params: Pytree, *, donate: bool = True
) -> jax.stages.Compiled:
    """`(params, gradients, state) -> (params, state)`: one update and its application, compiled but
    not run."""
    tx = optax.with_extra_args_support(tx)

    def step(params, gradients, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = _abstract(params)
    state = jax.eval_shape(tx.init, params)
    jitted = jax.jit(step, donate_argnums=(0, 2) if donate else (), keep_unused=True)
    return jitted.lower(params, params, state).compile()


def measure(step: Any, *arguments: Any) -> Program:
    """Bytes of a compiled program.

    Args:
      step: a `jax.stages.Compiled`; a function, jitted or not, which is compiled for `arguments`;
        or an optax transformation, whose donated update is compiled for `arguments = (params,)`.
      *arguments: arrays or ShapeDtypeStructs; nothing is run.

    >>> import jax.numpy as jnp, optax
    >>> program = measure(optax.adam(1e-3), {"w": jnp.ones((8, 16))})
    >>> (
    ...     program.arguments,
    ...     program.aliased,
    ... )  # 512 of each: parameters, gradients, two moments; and a step count
    (2052, 1540)
    """
    if isinstance(step, optax.GradientTransformation):
        step = compile_update(step, *arguments)
    elif not isinstance(step, jax.stages.Compiled):
        jitted = step if hasattr(step, "lower") else jax.jit(step)
        step = jitted.lower(*_abstract(arguments)).compile()
    memory = step.memory_analysis()
    if memory is None:
        raise ValueError(
            f"step: the backend {jax.default_backend()!r} does not report the memory of its "
            "programs"
        )
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _scalars(node: ProjectionState) -> dict[str, Any]:
    """What a state has beside its matrices and plain leaves."""
    return {name: x for name, x in node._asdict().items() if name not in ("matrices", "plain")}


def components(state: Pytree) -> dict[str, Any]:
    """The parts of an optimizer state by component, wherever in it a `ProjectionState` lies;
    "other" is not ours."""
    is_ours = lambda x: isinstance(x, (ProjectionState, MatrixState))  # noqa: E731
    nodes = jax.tree.leaves(state, is_leaf=is_ours)
    ours = [node for node in nodes if isinstance(node, ProjectionState)]
    # of other transformations in a chain: their scalars count as ours, their arrays do not
    rest = [node for node in nodes if not isinstance(node, ProjectionState)]
    if not ours:
        return {"optimizer state": rest}
    matrices = [x for node in ours for x in jax.tree.leaves(node.matrices, is_leaf=is_ours)]
    parts = {
        "basis": [(matrix.basis, matrix.memory) for matrix in matrices],
        "moments": [matrix.inner for matrix in matrices],
        "residual": [(matrix.residual, matrix.target) for matrix in matrices],
        "plain": [node.plain for node in ours],
        "scalars": [
            *(_scalars(node) for node in ours),
            *(matrix.refresh_schedule for matrix in matrices),
            *(x for x in rest if not x.shape),
        ],
    }
    other = [x for x in rest if x.shape]
    return parts | {"other": other} if other else parts


def _as_arguments(tree: Pytree) -> int:
    """Bytes that a compiled program takes for a tree of arguments."""
    return measure(jax.jit(lambda tree: (), keep_unused=True), tree).arguments


@dataclasses.dataclass(frozen=True)
class Ledger(Short):
    """Rows `{"component", "bytes_formula", "bytes_measured"}`, None where a number does not exist.

    Attributes:
      rows: parameters, gradients, the components of the state, and of a step its temporaries and
        program.
      program: the step's memory, or None without a step. `str()` gives the table in MiB.
    """

    rows: tuple[dict[str, Any], ...]
    program: Program | None = None

    @property
    def state_bytes(self) -> int:
        """Measured bytes of the optimizer state."""
        return sum(row["bytes_measured"] for row in self.rows if row["component"] in STATE)

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps(list(self.rows), indent=2)

    def __str__(self) -> str:
        def mebibytes(size):
            return "-" if size is None else f"{size / 2**20:,.3f}"

        state = [row for row in self.rows if row["component"] in STATE]
        sums = [[row[name] for row in state] for name in ("bytes_formula", "bytes_measured")]
        total = [None if None in sizes else sum(sizes) for sizes in sums]
        lines = [("component", "formula (MiB)", "measured (MiB)")]
        lines += [
            (r["component"], mebibytes(r["bytes_formula"]), mebibytes(r["bytes_measured"]))
            for r in self.rows
        ]
        lines.append(("state in all", *map(mebibytes, total)))
        if self.program is not None:
            lines.append(("step at its peak", "-", mebibytes(self.program.peak)))
        return "\n".join(
            f"{name:<17}{by_formula:>14}{measured:>16}" for name, by_formula, measured in lines
        )


def ledger(
    tx: optax.GradientTransformation, params: Pytree, step: Any = None, *arguments: Any
) -> Ledger:
    """The memory of an optimizer on these parameters, and of a training step if one is given.

    Args:
      tx: an optimizer of this library, or any other (measured only).
      params: arrays or ShapeDtypeStructs; nothing is allocated or run.
      step, *arguments: see `measure`. With a step, gradients are no argument and are measured as 0:
        their bytes are among its temporaries.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> print(ledger(lrx.galore(1e-2, rank=64), {"kernel": jnp.ones((256, 1024))}))
    component         formula (MiB)  measured (MiB)
    parameters                1.000           1.000
    gradients                 1.000           1.000
    basis                     0.062           0.062
    moments                   0.500           0.500
    residual                  0.000           0.000
    plain                     0.000           0.000
    scalars                   0.000           0.000
    state in all              0.563           0.563
    """
    params = _abstract(params)
    with sharding.mesh_of(params):
        parts = {"parameters": params, "gradients": params} | components(
            jax.eval_shape(tx.init, params)
        )
        measured = {name: _as_arguments(part) for name, part in parts.items()}
    by_formula = {row["component"]: row["bytes_formula"] for row in formula(tx, params)}
    program = None if step is None else measure(step, *arguments)
    if program is not None:
        measured["gradients"] = 0
        measured |= {"temporaries": program.temporaries, "program": program.code}
    rows = [
        {"component": name, "bytes_formula": by_formula.get(name), "bytes_measured": size}
        for name, size in measured.items()
    ]
    return Ledger(tuple(rows), program)


__all__ = ["Ledger", "Program", "compile_update", "components", "formula", "ledger", "measure"]
__dir__ = functools.partial(sorted, __all__)
