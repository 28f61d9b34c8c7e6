"""What a trace knows of the mesh that it is for, set by `meshes.use`."""

from __future__ import annotations

import contextvars
from typing import Any

import jax
from jax.sharding import AxisType

from lowrank_jax.typing import Spec as Spec

# The mesh of `meshes.use`: what an auto mesh's arrays do not say while they are traced.
current_mesh: contextvars.ContextVar[Any] = contextvars.ContextVar("current_mesh", default=None)


# Of `meshes.use(mesh, parameters=...)`: path -> partition entries of the parameter, one for each
# axis.
current_partition_specs: contextvars.ContextVar[dict[str, Spec] | None] = contextvars.ContextVar(
    "current_partition_specs", default=None
)


# Of the rules of `meshes.use`: partition entries of the first axes of activations.
current_rows: contextvars.ContextVar[Spec | None] = contextvars.ContextVar(
    "current_rows", default=None
)


def context_key() -> tuple[Any, ...]:
    """What `meshes.use` says here, to be compared: programs traced under another are other ones."""
    specs = current_partition_specs.get()
    named = None if specs is None else tuple(sorted(specs.items(), key=lambda item: item[0]))
    return current_mesh.get(), current_rows.get(), named


def divides() -> bool:
    """Whether the program is traced for several devices of an auto mesh, inside `meshes.use`."""
    mesh = current_mesh.get()
    return mesh is not None and mesh.size > 1 and AxisType.Explicit not in mesh.axis_types


def explicit_trace() -> bool:
    """Whether a program is traced for a mesh of explicit axes, which no kernel is divided over."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
