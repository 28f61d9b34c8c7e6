"""What `flax.serialization` needs to know of this library's own nodes of pytrees.

`to_bytes` and `from_bytes`, and so `flax.training.train_state` and flax's checkpoints, ask each
type how it is saved. Of ours the arrays are: what is static, such as views and plans, is that of
the target which is restored into.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import numpy as np
from flax import serialization

from lowrank_jax.typing import Kernel, Pytree

T = TypeVar("T", bound=type)


def serializable(kind: T) -> T:
    """Registers a dataclass that is a pytree; its fields that are not static are saved by name.

    Restoring raises a ValueError that names the field and both shapes where the target holds other
    fields or shapes.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> gradient = lrx.projection.Projected(jnp.ones((2, 3)))
    >>> saved = serialization.to_bytes(gradient)
    >>> serialization.from_bytes(gradient, saved).low.shape
    (2, 3)
    """
    fields_of = dataclasses.fields(kind)
    names = [field.name for field in fields_of if not field.metadata.get("static", False)]

    def save(node: Kernel) -> dict[str, Pytree]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

    def restore(target: Pytree, saved: dict[str, Pytree]) -> Pytree:
        if not isinstance(saved, dict) or set(saved) != set(names):
            found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(
                f"{kind.__name__}: saved fields {found} are not {sorted(names)}; give from_bytes a "
                "target of the kind that was saved"
            )
        # static fields stay those of the target
        fields = {}
        for name in names:
            own = getattr(target, name)
            fields[name] = serialization.from_state_dict(own, saved[name], name=name)
            _check_alike(kind, name, target, own, fields[name])
        return dataclasses.replace(target, **fields)

    serialization.register_serialization_state(kind, save, restore)
    return kind


def _check_alike(kind: type, name: str, target: Pytree, own: Pytree, restored: Pytree) -> None:
    """ValueError where the arrays of a field have other shapes than the target's: they would mean
    something else."""
    want, found = ([np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (own, restored))
    if found != want:
        leaf = f" of {target.view.path!r}" if hasattr(target, "view") else ""
        raise ValueError(
            f"{kind.__name__}: {name} was saved with arrays of shapes {found}, the "
            f"target{leaf} has {want}; give from_bytes a target made with the same "
            "parameters, views and ranks"
        )
