"""Pairs of factors in a tree of trained adapter parameters, and the algebra of one pair.

A pair is a mapping with leaves `a (..., n, r)` and `b (..., r, m)`; the delta of its kernel is
`a diag(scale) b`, and leading axes are layers or experts. The kernel sees `â = a diag(scale)` and
`b̂ = diag(scale) b`: with `G` the gradient of the kernel, the factors have gradients `G b̂ᵀ` and
`âᵀ G`. The step of one factor that comes nearest to `-G` while the other stays is a least-squares
problem whose solution needs no `G`:

    argmin_X |X b̂ - G|² + damping |X|² = (G b̂ᵀ) (b̂ b̂ᵀ + damping I)⁻¹        likewise (âᵀâ + damping I)⁻¹ (âᵀ G)

For one number s as scale and no damping these are `s⁻² ∇a (b bᵀ)⁻¹` and `s⁻² (aᵀa)⁻¹ ∇b`. A vector
may hold zeros, which mask the ranks that a shorter adapter of a stack does not have: nothing moves
there, and nothing is seen of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from jax.sharding import PartitionSpec

from lowrank_jax import linalg, sharding
from lowrank_jax.matrices import Shape
from lowrank_jax.reprs import Short
from lowrank_jax.trees import nodes_with_keys, path_of
from lowrank_jax.typing import Kernel, Pytree, Scalar

SIDES = ("a", "b")
OTHER = {"a": "b", "b": "a"}
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Pair(Short):
    """Two leaves of a flattened tree.

    Attributes:
      names: keys on the way to the mapping that holds them.
      leaf: `{"a": number, "b": number}` of the leaves.
    """

    names: tuple[str, ...]
    leaf: dict[str, int]

    @property
    def path(self) -> str:
        return "/".join(self.names)


@dataclasses.dataclass(frozen=True)
class FactorLeaves:
    """What the leaves of a tree are.

    Attributes:
      paths: of every leaf.
      sides: of every leaf "a", "b", or None where it is no factor.
      pairs: factors that stand together.
    """

    paths: tuple[str, ...]
    sides: tuple[str | None, ...]
    pairs: tuple[Pair, ...]

    def of(self, side: str | None) -> list[int]:
        """Numbers of the leaves of one side."""
        return [i for i, own in enumerate(self.sides) if own == side]


def find_factors(tree: Pytree, method: str, *, both: bool = True) -> FactorLeaves:
    """The factors of a tree: leaves named `a` and `b` with two or more axes.

    Args:
      tree: arrays, or anything with a shape.
      method: who asks, for messages.
      both: whether a factor without its partner is an error.

    Raises:
      ValueError: if there is none, if one stands alone where `both` are wanted, or if two do not
        fit together.

    >>> import jax.numpy as jnp
    >>> tree = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6)), "magnitude": jnp.ones(6)}}
    >>> factors = find_factors(tree, "altlora")
    >>> factors.sides, factors.pairs[0].path
    (('a', 'b', None), 'q')
    """
    paths: list[str] = []
    shapes: list[Shape] = []
    sides: list[str | None] = []
    # by the mapping that holds them, the leaf of each side
    nodes: dict[tuple[str, ...], dict[str, int]] = {}
    for keys, node in nodes_with_keys(tree):
        leaf = meta.unbox(node)
        if isinstance(leaf, optax.MaskedNode):
            continue
        names = tuple(path_of([key]) for key in keys)
        is_factor = bool(names) and names[-1] in SIDES and len(leaf.shape) >= 2
        side = names[-1] if is_factor else None
        if side is not None:
            nodes.setdefault(names[:-1], {})[side] = len(paths)
        paths.append("/".join(names))
        shapes.append(tuple(leaf.shape))
        sides.append(side)
    if paths and not nodes:
        raise ValueError(
            f"{method}: none of the {len(paths)} leaves ({', '.join(paths[:3])}, ...) is a factor "
            "a (..., n, r) or b (..., r, m) inside a mapping; give the tree of trained adapter "
            "parameters, or take optax.adamw"
        )
    pairs = tuple(Pair(names, leaf) for names, leaf in nodes.items() if len(leaf) == 2)
    for pair in pairs:
        _check_fit(method, pair, *(shapes[pair.leaf[side]] for side in SIDES))
    if both:
        _check_complete(method, nodes)
    return FactorLeaves(tuple(paths), tuple(sides), pairs)


def _check_complete(method: str, nodes: dict[tuple[str, ...], dict[str, int]]) -> None:
    for names, leaf in nodes.items():
        if len(leaf) == 1:
            (have,) = leaf
            raise ValueError(
                f"{method}: {'/'.join(names)!r} holds {have!r} and no {OTHER[have]!r}, by which "
                "its gradient is preconditioned. Train both factors, or give this site another "
                "optimizer with optax.partition; lrx.lora_plus takes a factor whose partner is "
                "frozen, as in LoRA-FA"
            )


def _check_fit(method: str, pair: Pair, a: Shape, b: Shape) -> None:
    if a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(
            f"{method}: {pair.path!r} holds a of shape {a} and b of shape {b}, which are no pair "
            "(..., n, r), (..., r, m); give this site another optimizer with optax.partition"
        )


def scale_of(scale: Scalar, pair: Pair, shape: Shape) -> jax.Array:
    """The scale of one pair, `()` or broadcastable to `(..., r)`, float32.

    Args:
      scale: a number or array for all pairs; or a tree of mappings along the pairs' own paths,
        which ends in the value or in a mapping that holds it as "scale", such as the frozen tree of
        the adapters.
      pair: which.
      shape: of its factor a.

    Raises:
      ValueError: if the tree lacks the pair, or the value does not fit.

    >>> import jax.numpy as jnp
    >>> pair = Pair(("sites", "q"), {"a": 0, "b": 1})
    >>> scale_of({"sites": {"q": {"scale": jnp.array([2.0, 0.0])}}}, pair, (4, 2)).tolist()
    [2.0, 0.0]
    """
    value = scale
    for name in (*pair.names, "scale"):
        if not isinstance(value, Mapping):
            break
        if name not in value:
            raise ValueError(
                f"scale: the tree has no {name!r} on the way to the pair {pair.path!r}; give a "
                "number, or a tree that holds 'scale' at the path of every pair, such as the "
                "frozen tree of the adapters"
            )
        value = value[name]
    value = jnp.asarray(value, jnp.float32)
    want = (*shape[:-2], shape[-1])
    sizes = zip(value.shape[::-1], want[::-1], strict=False)
    broadcasts = value.ndim <= len(want) and all(size in (1, other) for size, other in sizes)
    if not broadcasts:
        raise ValueError(
            f"scale: shape {value.shape} at the pair {pair.path!r} does not fit (..., r) = {want}"
        )
    return value


def effective(side: str, factor: jax.Array, scale: jax.Array) -> jax.Array:
    """`â (..., n, r)` or `b̂ (..., r, m)`, float32."""
    if scale.ndim:
        scale = scale[..., None, :] if side == "a" else scale[..., :, None]
    return scale * factor.astype(jnp.float32)


def cross(side: str, old: jax.Array, new: jax.Array) -> jax.Array:
    """`oldᵀ new` of two factors a, `old newᵀ` of two factors b: `(..., r, r)`, unsharded."""
    spec = sharding.unsharded_spec(sharding.explicit_spec(new))
    place = None if spec is None else PartitionSpec(*spec)
    equation = "...nr,...ns->...rs" if side == "a" else "...rm,...sm->...rs"
    return jnp.einsum(equation, old, new, precision=HIGHEST, out_sharding=place)


def times(side: str, factor: jax.Array, matrix: jax.Array) -> jax.Array:
    """`a matrix`, or `matrixᵀ b`: a change of the r coordinates of one factor."""
    if side == "a":
        return jnp.matmul(factor, matrix, precision=HIGHEST)
    return jnp.matmul(_transposed(matrix), factor, precision=HIGHEST)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def damped_inverse(gram: jax.Array, damping: Scalar) -> jax.Array:
    """`(gram + damping I)⁻¹` of Gram matrices `(..., r, r)`, and 0 on the directions that the
    factor does not have.

    Those are eigenvalues below `10 r eps` of the largest, as in `jnp.linalg.pinv`: the gradient of
    the other factor has nothing but rounding there, which the inverse would magnify. So without
    damping this is the pseudo-inverse, and of a zero factor it is zero. Rows and columns of ranks
    that are masked are exactly zero.

    >>> import jax.numpy as jnp
    >>> damped_inverse(jnp.diag(jnp.array([4.0, 0.0])), 0.0).tolist()
    [[0.25, 0.0], [0.0, 0.0]]
    """
    rank = gram.shape[-1]
    values, vectors = linalg.eigh(gram)
    tolerance = 10 * rank * float(jnp.finfo(gram.dtype).eps)
    # of directions that are not there the eigenvalue is rounding, and the weight 0
    kept = values > tolerance * values[..., -1:]
    safe = jnp.where(kept, values, 1)
    weights = jnp.where(kept, 1 / (safe + damping), 0)
    # V diag(weights) Vᵀ
    weighted = vectors * weights[..., None, :]
    inverse = times("a", weighted, _transposed(vectors))
    # ranks that are masked
    live = jnp.diagonal(gram, axis1=-2, axis2=-1) > 0
    # a decomposition that failed makes no step, where it would end the run
    sound = jnp.all(jnp.isfinite(inverse), axis=(-2, -1), keepdims=True)
    return jnp.where(sound & live[..., :, None] & live[..., None, :], inverse, 0)


def _unsharded(x: jax.Array) -> jax.Array:
    return sharding.reshard(x, None if sharding.explicit_spec(x) is None else (None,) * x.ndim)


def partners(
    side: str,
    pairs: tuple[Pair, ...],
    leaves: list[Kernel],
    scales: list[jax.Array],
    damping: Scalar,
) -> list[tuple[jax.Array, jax.Array]]:
    """What preconditions one side of every pair: the other factor as the kernel sees it, its damped
    inverse Gram.

    Gram matrices of one rank are decomposed by one call: a TPU compiler takes longer over one call
    of `eigh` than over the rest of the program.
    """
    other = OTHER[side]
    found = zip(pairs, scales, strict=True)
    bases = [effective(other, leaves[pair.leaf[other]], scale) for pair, scale in found]
    # b̂ b̂ᵀ or âᵀâ, (..., r, r)
    grams = [cross(other, basis, basis) for basis in bases]
    inverses: dict[int, jax.Array] = {}
    for rank in sorted({gram.shape[-1] for gram in grams}):
        own = [i for i, gram in enumerate(grams) if gram.shape[-1] == rank]
        flat = [_unsharded(grams[i]).reshape(-1, rank, rank) for i in own]
        made = damped_inverse(jnp.concatenate(flat), damping)
        # back to the matrices of each pair
        ends = np.cumsum([len(x) for x in flat])
        for i, part in zip(own, jnp.split(made, ends[:-1]), strict=True):
            gram = grams[i]
            shaped = part.reshape(gram.shape)
            inverses[i] = sharding.reshard(shaped, sharding.explicit_spec(gram))
    return [(basis, inverses[i]) for i, basis in enumerate(bases)]
