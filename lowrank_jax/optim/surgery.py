"""What becomes of an optimizer's state when its parameters are changed between two updates.

A method that merges, prunes, swaps or turns parameters while it trains leaves the optimizer with
moments of parameters that are no longer there. What should happen to them is part of the method: it
says so by a tree of policies like the parameters, and `apply_policy` carries it out in any
optimizer's state, which it knows by the moments protocol alone (`lrx.inner.register_moments`).

    policy              first moment m           second and maximal moment v
    Keep()              m                        v
    Zero()              0                        0
    Mask(mask)          mask ⊙ m                 mask ⊙ v
    LinearMap(T, axis)  T m along the axis       (T ⊙ T) v, exact where T is a permutation

Counts, rates and keys stay: bias corrections go on, as ReLoRA's and SwitchLoRA's do.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.optim.inner.moments import kinds_of
from lowrank_jax.reprs import Short
from lowrank_jax.typing import Kernel, Pytree, Shape

Names = tuple[str, ...]


class Policy(Short):
    """What becomes of the moments of one parameter."""

    def moved(self, moment: jax.Array, kind: str, where: str) -> jax.Array:
        """The moment after the change; ValueError where it has a shape of its own and the policy
        speaks of entries."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keep(Policy):
    """The moments stay as they are."""

    def moved(self, moment, kind, where):
        return moment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero(Policy):
    """The moments start again."""

    def moved(self, moment, kind, where):
        return jnp.zeros_like(moment)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask(Policy):
    """Single moments start again, or fade.

    Attributes:
      mask: factors that broadcast to the parameter, 0 for what starts again; a number, which may be
        traced, for all of it: `Mask(jnp.where(restart, 0.0, 1.0))`.
    """

    mask: Pytree

    def moved(self, moment, kind, where):
        shape = jnp.shape(self.mask)
        if shape and (kind in ("factored", "projected") or not _fits(shape, moment.shape)):
            raise ValueError(
                f"{where}: a mask of shape {shape} does not fit a {kind} moment of shape "
                f"{moment.shape}; give a number for all of it, Keep() or Zero()"
            )
        # also of a moment that is not finite nothing is left
        return jnp.where(jnp.equal(self.mask, 0), 0, moment * self.mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearMap(Policy):
    """The moments turn with the parameter: `matrix` along one axis.

    Of parameters that move by `x <- A x` the gradient moves by the inverse of Aᵀ, and so should its
    average: give that as the matrix. The second moment is mapped as if entries were independent.

    Attributes:
      matrix: `(new, old)`, or with the leading axes of the parameter in front.
      axis: of the parameter, counted from behind: -1 or -2.
    """

    matrix: jax.Array
    axis: int = dataclasses.field(default=-1, metadata={"static": True})

    def __post_init__(self):
        if self.axis not in (-1, -2):
            raise ValueError(f"axis={self.axis} must be -1 or -2, an axis of one matrix")

    def moved(self, moment, kind, where):
        if kind not in ("first", "second", "max") or moment.ndim < 2:
            raise ValueError(
                f"{where}: a {kind} moment of shape {moment.shape} cannot be mapped along an axis; "
                "give Keep() or Zero()"
            )
        matrix = self.matrix if kind == "first" else jnp.square(self.matrix)
        if self.axis == -2:
            return jnp.matmul(matrix, moment)
        return jnp.matmul(moment, jnp.swapaxes(matrix, -1, -2))


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a type of state says of fields that are no moments of an inner transformation.

    Attributes:
      kinds: `{field: kind}` of a moment's kind, or "kept", which no policy changes.
      of_parameter: it stands at the place of one parameter, whose moments it holds in another
        shape.
    """

    kinds: dict[str, str]
    of_parameter: bool = False


_FIELDS: dict[type, Fields] = {optax.MultiStepsState: Fields({"acc_grads": "first"})}


def register_fields(state_type: type, kinds: dict[str, str], *, of_parameter: bool = False) -> None:
    """Tells `apply_policy` what the fields of an optimizer's state are, beside registered moments."""
    _FIELDS[state_type] = Fields(kinds, of_parameter)


def apply_policy(policy: Pytree, opt_state: Pytree) -> Pytree:
    """The state of any optimizer after its parameters were changed as the policy says; to be jitted.

    Args:
      policy: a tree like the parameters of `Keep`, `Zero`, `Mask` and `LinearMap`; one of them may
        stand for a whole subtree.
      opt_state: what `tx.init` made of the parameters: of optax's Adam and its kin, in chains,
        masks, partitions, `MultiSteps` and `inject_hyperparams`; of `lrx`'s optimizers; with
        moments of any dtype, or in blocks of 8 bits.

    Raises:
      ValueError: a moment whose parameter has no policy; a policy that speaks of entries where the
        moment has a shape of its own (factored, projected); arrays of a state that is not
        registered.

    >>> import jax.numpy as jnp, optax
    >>> from lowrank_jax.optim.surgery import Keep, Zero, apply_policy
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> tx = optax.adam(1e-3)
    >>> _, state = tx.update(params, tx.init(params))
    >>> mu = apply_policy({"a": Zero(), "b": Keep()}, state)[0].mu
    >>> print(mu["a"], mu["b"])
    [0. 0.] [0.1 0.1]
    """
    is_policy = lambda node: isinstance(node, Policy)  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(policy, is_leaf=is_policy)
    by_path = {_names(keys): own for keys, own in flat}
    wrong = ["/".join(path) for path, own in by_path.items() if not is_policy(own)]
    if wrong:
        raise ValueError(f"policy: {wrong} are none of Keep, Zero, Mask, LinearMap")
    if all(isinstance(own, Keep) for own in by_path.values()):
        return opt_state
    return _Surgery(by_path).visited(opt_state, (), (), None)


@dataclasses.dataclass(frozen=True)
class _Surgery:
    """One walk through a state.

    Attributes:
      by_path: the policy of each parameter, by the names on the way to it.
    """

    by_path: dict[Names, Policy]

    def policy(self, path: Names) -> Policy:
        for end in range(len(path), -1, -1):
            if path[:end] in self.by_path:
                return self.by_path[path[:end]]
        known = ["/".join(own) for own in list(self.by_path)[:6]]
        raise ValueError(
            f"policy: {'/'.join(path)!r}, of which the optimizer has moments, has none; it names "
            f"{known}"
        )

    def visited(self, node: Kernel, where: Names, at: Names, own: Policy | None) -> Any:
        """The node after the change.

        Args:
          node: a part of the state.
          where: names on the way to it.
          at: the last of them that are keys of mappings, where a parameter's own state stands.
          own: the policy of the parameter whose own state this is part of.
        """
        if isinstance(node, optax.MaskedNode):
            return node
        fields = _FIELDS.get(type(node), Fields({}))
        kinds = fields.kinds | (kinds_of(node) or {})
        if fields.of_parameter:
            own = self.policy(at)
        below = lambda x: x is not node  # noqa: E731
        flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=below)
        children = []
        for keys, child in flat:
            if child is node:
                return self._leaf(node, where, own)
            names = _names(keys)
            kind = kinds.get(names[0])
            here = (*where, *names)
            if kind == "kept":
                children.append(child)
            elif kind is not None:
                children.append(self._moments(child, kind, here, own))
            else:
                is_key = isinstance(keys[-1], jax.tree_util.DictKey)
                children.append(self.visited(child, here, (*at, *names) if is_key else (), own))
        return jax.tree_util.tree_unflatten(treedef, children)

    def _moments(self, tree: Pytree, kind: str, where: Names, own: Policy | None) -> Any:
        """A tree of moments, like the parameters, or all of one parameter."""

        def one(keys, moment):
            policy = self.policy(_names(keys)) if own is None else own
            place = "/".join((*where, *_names(keys)))
            if isinstance(policy, Keep):
                return moment
            # what lies in another space has no entries of the parameter
            kind_there = kind if own is None else "projected"
            if _quantized(moment):
                return moment.requantize(policy.moved(moment.dequantize(), kind_there, place))
            return policy.moved(moment, kind_there, place).astype(moment.dtype)

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_quantized)

    def _leaf(self, leaf: Kernel, where: Names, own: Policy | None) -> Any:
        """An array that is no registered moment: a count, a key, a rate."""
        numbers = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if numbers and leaf.ndim and not isinstance(own, Keep):
            raise ValueError(
                f"the optimizer's state holds an array of shape {leaf.shape} at "
                f"{'/'.join(where)!r} that is no registered moment; say what its type's fields are "
                "with lrx.inner.register_moments"
            )
        return leaf


def _fits(shape: Shape, of: Shape) -> bool:
    """Whether an array of one shape broadcasts to another."""
    pairs = zip(reversed(shape), reversed(of), strict=False)
    return len(shape) <= len(of) and all(size in (1, other) for size, other in pairs)


def _names(keys: tuple) -> Names:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _quantized(node: Kernel) -> bool:
    return isinstance(node, linalg.QuantizedBlocks)


__all__ = ["Keep", "LinearMap", "Mask", "Policy", "Zero", "apply_policy", "register_fields"]
__dir__ = functools.partial(sorted, __all__)
