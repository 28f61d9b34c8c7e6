"""The fused step of a projected leaf by `lowrank_jax.kernels.low_rank_adam`, all matrices of a
stack in one call."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import kernels, sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import scales
from lowrank_jax.optim.guard import select
from lowrank_jax.projection import layout
from lowrank_jax.projection.matrix_step import MatrixStep
from lowrank_jax.projection.projectors.base import StoredProjector
from lowrank_jax.projection.residuals import Discard
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.step import Prepared
from lowrank_jax.projection.targets import Gradient
from lowrank_jax.projection.write import Write
from lowrank_jax.trees import is_quantized
from lowrank_jax.typing import Kernel


def check(config: Projection) -> None:
    """ValueError for a projection that the kernel does not compute."""
    adam, kind = config.inner.as_adam(), config.projector.structure()
    if adam is None:
        raise ValueError(
            f"implementation='pallas' runs Adam, and inner={config.inner!r} is another; give "
            "lrx.inner.adam(...), stored8 or not, or implementation='xla'"
        )
    for name in ("mu_dtype", "nu_dtype"):
        own = getattr(adam, name)
        if own is not None and jnp.dtype(own) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"implementation='pallas' keeps moments in float32 or bfloat16, not {name}={own}; change "
                "it"
            )
    for name, kind_of in (("residual", Discard), ("target", Gradient)):
        if type(getattr(config, name)) is not kind_of:
            raise ValueError(
                "implementation='pallas' drops the rest of the gradient, and "
                f"{name}={getattr(config, name)!r} does not; give implementation='xla'"
            )
    if config.projector.sees:
        raise ValueError(
            f"implementation='pallas' shows a step to no projector, and {config.projector!r} sees it; "
            "give implementation='xla'"
        )
    if type(kind) is not StoredProjector or jnp.dtype(kind.dtype) not in (
        jnp.float32,
        jnp.bfloat16,
    ):
        raise ValueError(
            "implementation='pallas' reads a stored basis in float32 or bfloat16, which "
            f"projector={config.projector!r} does not keep; give implementation='xla'"
        )


def _check_leaf(view: ResolvedView, param: Kernel) -> None:
    if is_quantized(param) or param.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"leaf {view.path!r}: implementation='pallas' writes float32 or bfloat16, not "
            f"{type(param).__name__ if is_quantized(param) else param.dtype}; give "
            "implementation='xla'"
        )
    if view.spec is not None:
        raise ValueError(
            f"leaf {view.path!r}: implementation='pallas' is not for a mesh of explicit axes; make the "
            "mesh with explicit=False, or give implementation='xla'"
        )
    if view.view.permutation != tuple(range(len(view.shape))):
        raise ValueError(
            f"leaf {view.path!r}: implementation='pallas' writes leaves with batch axes, rows and "
            f"columns in this order, and the view takes axes {view.view.permutation}; give "
            "implementation='xla'"
        )


def local(steps: dict[int, MatrixStep], params: list[Any]) -> frozenset[int]:
    """The leaves that the kernel writes; ValueError for one that it cannot, and a warning where it
    writes none."""
    for i, step in steps.items():
        _check_leaf(step.view, params[i])
    found = frozenset(i for i, step in steps.items() if _is_local(step))
    if steps and not found:
        warnings.warn(
            "lrx.fused(implementation='pallas'): on this mesh no leaf is written by the kernel; name the "
            "parameters in lrx.meshes.use(mesh, parameters=...), and keep the dimension whole that "
            "is shrunk (side=lrx.projection.sides_for(...))",
            stacklevel=2,
        )
    return found


def _is_local(step: MatrixStep) -> bool:
    """Whether each device can write its own block of the leaf: everywhere but on an auto mesh that
    divides more than k.

    There the layout must be known, s whole, and no block of moments cut; of several batch axes the
    first may be divided. XLA's form serves elsewhere: it adds up and gathers low-rank objects,
    layer by layer.
    """
    if not sharding.divides():
        return True
    own = layout.current(step.view)
    if own is None or any(sharding.dividing(entry, own.mesh) for entry in (own.s, *own.batch[1:])):
        return False
    count, block = sharding.parts(own.k, own.mesh), getattr(step.parts["inner"].mu, "block", 1)
    return count == 1 or step.view.kept // count % block == 0


def write_leaf(step: MatrixStep, param: Kernel, prepared: Prepared, write: Write) -> jax.Array:
    """The new parameter; leaves the new inner state in `step`."""
    view, state = step.view, step.parts["inner"]
    adam: Any = step.config.inner.as_adam()
    axes, total = len(view.batch), math.prod(view.batch)
    flat = lambda x: x.reshape(total, *x.shape[axes:])  # noqa: E731
    count = optax.safe_increment(state.count)
    eps, scale = adam.corrections(count.reshape(total))
    decay = write.rate * write.weight_decay
    rate = write.rate * (1 - decay) if write.decay == "after" else write.rate
    keys = None
    if write.rounding == "stochastic":
        keys = jax.vmap(lambda layer: jax.random.fold_in(write.key, layer))(jnp.arange(total))
    own = layout.current(view)
    w, mu, nu = kernels.low_rank_adam(
        flat(view.view.to_matrices(param)),
        *jax.tree.map(flat, (step.parts["basis"], step.low, state.mu, state.nu)),
        b1=adam.b1,
        b2=adam.b2,
        eps=eps,
        rate=rate * scale * scales.factor(step.config.scale, view),
        decay=decay,
        factor=1.0 if prepared.factor is None else prepared.factor,
        accepted=write.accepted,
        keys=keys,
        side=view.side,
        spec=None if own is None else (own.batch[0] if own.batch else None, own.k, own.basis[-2]),
    )
    mu, nu = jax.tree.map(lambda x: x.reshape(*view.batch, *x.shape[1:]), (mu, nu))
    new = state._replace(count=jnp.where(write.accepted, count, state.count), mu=mu, nu=nu)
    moved = prepared.ok is not None and state is not step.old.inner
    step.parts["inner"] = select(prepared.ok, new, step.old.inner) if moved else new
    return view.view.from_matrices(w.reshape(*view.batch, *w.shape[1:]), view.shape)
