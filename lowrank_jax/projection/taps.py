"""Projected backprop: gradients that are low-rank from birth.

    taps = lrx.taps(opt_state)                                         bases, found anywhere in an optimizer state
    value, grads = lrx.projected_value_and_grad(loss, taps)(params, batch)     `Projected` leaves where a tap was
    updates, opt_state = tx.update(grads, opt_state, params, taps=taps)

The loss may be any JAX function of `params`: its program is read (`lrx.tapped`), and multiplies by a
`Tapped` in the place of each projected kernel.

The full gradient of a tapped kernel is never formed. What reads it (a residual rule, an exact SVD
at a refresh) needs `jax.value_and_grad` at that step; `lrx.train_step` chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax import sharding
from lowrank_jax.functions.adapted import adapted
from lowrank_jax.projection.state import Projected, ProjectionState, Sketch, matrix_states
from lowrank_jax.projection.tapped import Tap, Tapped
from lowrank_jax.serialization import serializable
from lowrank_jax.trees import dequantized, is_node, nodes_with_keys, path_of


def is_projected(x: Any) -> bool:
    """Whether a node of a gradient tree is a `Projected`."""
    return isinstance(x, Projected)


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of an optimizer state, by path.

    Attributes:
      taps: by path.
      refreshes: by path, `ProjectionState.refreshes` of the state whose bases they are.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> state = lrx.galore(1e-2, rank=2).init({"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)})
    >>> lrx.taps(state)
    Taps(kernel: rank 2, rows)
    """

    taps: dict[str, Tap]
    refreshes: dict[str, jax.Array]

    def __repr__(self) -> str:
        views = {path: tap.view for path, tap in self.taps.items()}
        shown = [f"{path}: rank {view.rank}, {view.side}" for path, view in views.items()]
        return f"Taps({', '.join(shown)})"


def projection_states(opt_state: Any) -> list[ProjectionState]:
    """Every `ProjectionState` in a nested optimizer state; ValueError where there is none."""
    is_ours = lambda x: isinstance(x, ProjectionState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(node)]
    if not found:
        raise ValueError(
            f"opt_state of type {type(opt_state).__name__} holds no ProjectionState: taps exist "
            "for optimizers of this library only, such as lrx.galore(...).init(params), alone or "
            "inside an optax chain"
        )
    return found


def taps(opt_state: Any, sketches: dict[str, Sketch] | None = None) -> Taps:
    """The taps of every projected kernel, found by type anywhere in a nested optimizer state.

    Args:
      opt_state: a state of `scale_by_projection` or a named optimizer, or one that contains it.
      sketches: `{path: sketch basis}` for a refresh through taps; see `Projection.sketch_bases`.

    Raises:
      ValueError: where there is no projection state, or two of them project the same leaf.

    >>> import jax.numpy as jnp, optax
    >>> import lowrank_jax as lrx
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), lrx.galore(1e-2, rank=2))
    >>> lrx.taps(tx.init({"kernel": jnp.ones((4, 8))})).taps["kernel"].basis.shape
    (4, 2)
    """
    states = projection_states(opt_state)
    found: dict[str, Tap] = {}
    refreshes: dict[str, jax.Array] = {}
    for state in states:
        if state.sampler != ():
            raise ValueError(
                "opt_state: a sampler says which layers are active, and taps are of all layers; "
                "take jax.value_and_grad(loss) and update"
            )
        for matrix in matrix_states(state):
            if matrix.view.path in found:
                raise ValueError(
                    f"leaf {matrix.view.path!r} is projected by two states in opt_state; pass the "
                    "one that is meant"
                )
            path = matrix.view.path
            sketch = None if sketches is None else sketches.get(path)
            found[path] = Tap(matrix.basis, None, sketch, None, matrix.view, matrix.projector)
            refreshes[path] = state.refreshes
    return Taps(found, refreshes)


def projected_value_and_grad(
    loss: Callable[..., Any], taps: Taps, *, accumulate: int = 1, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad(loss)`, with `Projected` leaves in the gradient where `taps` has a basis.

    Args:
      loss: `loss(params, *args) -> value`, or `(value, aux)` with `has_aux`.
      taps: of `lrx.taps(opt_state)`.
      accumulate: k; every array of `*args` then has a leading axis of k microbatches. Values and
        gradients are averaged over them in float32, low-rank ones in the subspace; `aux` is
        stacked. The basis is constant within the window.

    Returns:
      `f(params, *args) -> (value, grads)`; gradients of other leaves are in the parameters' dtypes.

    Raises:
      ValueError: if a tap has no leaf in `params`, no product of the loss uses it, or something else
        than a product does; if an argument has no leading axis of k.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params, x = {"kernel": jnp.ones((4, 6))}, jnp.arange(12.0).reshape(3, 4)
    >>> tx = lrx.scale_by_projection(lrx.projectors.columns(select=(1, 2)))
    >>> state = tx.init(params)
    >>> loss = lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"]))
    >>> _, grads = lrx.projected_value_and_grad(loss, lrx.taps(state))(params, x)
    >>> bool(jnp.all(grads["kernel"].low == jax.grad(loss)(params, x)["kernel"][1:3]))
    True
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1 microbatch")
    loss = adapted(loss)

    def run(params: Any, *args: Any) -> Any:
        nodes, treedef = nodes_with_keys(params), jax.tree.structure(params, is_leaf=is_node)
        found = [taps.taps.get(path_of(keys)) for keys, _ in nodes]
        missing = set(taps.taps) - {tap.view.path for tap in found if tap is not None}
        if missing:
            raise ValueError(
                f"taps {sorted(missing)} have no leaf in params; give the tree that init saw"
            )
        zeros = [
            None if tap is None else tap.zeros(node)
            for (_, node), tap in zip(nodes, found, strict=True)
        ]
        plain = [node if tap is None else None for (_, node), tap in zip(nodes, found, strict=True)]

        def of(free: Any, *args: Any) -> Any:
            merged = []
            for (_, node), tap, own, place in zip(nodes, found, *free, strict=True):
                if tap is None:
                    merged.append(own)
                else:
                    merged.append(
                        Tapped(node, dataclasses.replace(tap, low=place[0], sketch=place[1]))
                    )
            return loss(jax.tree.unflatten(treedef, merged), *args)

        def tree(free: Any) -> Any:
            leaves = [
                own if place is None else Projected(*place)
                for own, place in zip(*free, strict=True)
            ]
            return jax.tree.unflatten(treedef, leaves)

        free = (plain, zeros)
        if accumulate > 1:
            first_microbatch(args, accumulate)  # or an error
        function = jax.value_and_grad(of, has_aux=has_aux)
        if accumulate == 1:
            value, grads = function(free, *args)
        else:
            value, grads = accumulated(function, free, args, accumulate, has_aux)
        return value, tree(grads)

    return run


def first_microbatch(args: Any, accumulate: int) -> Any:
    """The first of k microbatches; ValueError where an argument has no such axis."""

    def one(x):
        if not getattr(x, "ndim", 0) or x.shape[0] != accumulate:
            raise ValueError(
                f"accumulate={accumulate}: an argument of shape {getattr(x, 'shape', ())} has no "
                f"leading axis of {accumulate} microbatches; reshape it to ({accumulate}, "
                "microbatch, ...)"
            )
        return x[0]

    return jax.tree.map(one, args)


def accumulated(function: Callable, free: Any, args: Any, accumulate: int, has_aux: bool) -> Any:
    """`function(free, *args) -> (value, gradients)` averaged over microbatches in float32; aux is
    stacked."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731

    def body(sums, part):
        value, grads = function(free, *part)
        value, aux = value if has_aux else (value, None)
        return jax.tree.map(jnp.add, sums, wide((value, grads))), aux

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (jnp.zeros(()), free))
    (value, grads), aux = sharding.scan(body, start, args)
    value, grads = jax.tree.map(lambda x: x / accumulate, (value, grads))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, free)
    return ((value, aux) if has_aux else value), grads


def check_taps(
    loss: Callable[..., Any], taps: Taps, params: Any, *args: Any, tolerance: float = 1e-3
) -> None:
    """Proves on a batch that taps give the projection of the full gradient, by one full gradient.

    Compares every `low` with the projection of the full gradient:
    `|low - PᵀG| <= tolerance |PᵀG| + tiny`.

    Args:
      loss, taps, params, *args: as for `projected_value_and_grad(loss, taps)(params, *args)`.
      tolerance: relative; losses in bfloat16 need about 2e-2.

    Raises:
      ValueError: naming each leaf that differs and by how much: a regulariser on the kernel, or a
        tied use.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> state = lrx.galore(1e-2, rank=2).init(params)
    >>> lrx.check_taps(
    ...     lambda p, x: jnp.sum(lrx.matmul(x, p["kernel"])),
    ...     lrx.taps(state),
    ...     params,
    ...     jnp.ones((3, 4)),
    ... )
    >>> decayed = lambda p, x: jnp.sum(x @ p["kernel"]) + jnp.sum(p["kernel"])
    >>> lrx.check_taps(decayed, lrx.taps(state), params, jnp.ones((3, 4)))
    Traceback (most recent call last):
        ...
    lowrank_jax.functions.errors.ReadError: tap 'kernel': reduce_sum at ... reads the kernel (4, 6): ...
    """

    def both(taps, params, *args):
        with sharding.mesh_of(params):
            return differences(taps, params, *args)

    def differences(taps, params, *args):
        _, projected = projected_value_and_grad(loss, taps)(params, *args)
        plain = jax.tree.map(dequantized, params, is_leaf=is_node)
        full, lows = _by_path(jax.grad(loss)(plain, *args)), _by_path(projected)
        errors = {}
        for path, tap in taps.taps.items():
            expected = tap.projector.down(tap.view, tap.basis, tap.view.orient(full[path]))
            error = jnp.linalg.norm(lows[path].low - expected)
            errors[path] = error / jnp.maximum(jnp.linalg.norm(expected), 1e-20)
        return errors

    errors = jax.device_get(jax.jit(both)(taps, params, *args))
    wrong = [
        f"{path!r} (by {error:.2g})" for path, error in errors.items() if not error <= tolerance
    ]
    if wrong:
        raise ValueError(
            f"the projected gradient differs from the full one for {', '.join(wrong)}: a product "
            "must be the kernel's only use. Move a regulariser on kernels to the optimizer's "
            "weight_decay, leave tied kernels out with Views(rules=((path, None),)), or raise "
            "tolerance for losses in low precision"
        )


def _by_path(tree: Any) -> dict[str, Any]:
    nodes = nodes_with_keys(tree, lambda x: is_node(x) or is_projected(x))
    return {path_of(keys): meta.unbox(node) for keys, node in nodes}
