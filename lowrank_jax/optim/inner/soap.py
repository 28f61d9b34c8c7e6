"""Adam in the eigenbasis of a matrix's own Gram matrices: SOAP."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax import linalg, sharding
from lowrank_jax.checks import check_integer, check_number, check_static
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.guard import where_finite
from lowrank_jax.optim.inner.adam import average, debias
from lowrank_jax.optim.inner.base import Inner, shape_of, size_of
from lowrank_jax.optim.inner.moments import register_moments
from lowrank_jax.reprs import show
from lowrank_jax.typing import Pytree, Scalar, Shape

TINY = 1e-30
STARTS = ("gradient", "identity")


class Sides(NamedTuple):
    """One square matrix for each side of a leaf `(..., m, n)`, or None where a side has none."""

    left: Any
    right: Any

    def __repr__(self) -> str:
        return show(self)


class SoapState(NamedTuple):
    """State of `soap`.

    Attributes:
      count: int32, steps that the moments have seen; -1 before the first call, which collects Gram
        matrices alone.
      mu: first moments, as the gradients lie.
      nu: second moments, in the bases.
      grams: averages of `G Gᵀ` and `GᵀG`, a `Sides` for each leaf.
      bases: their eigenvectors, nearly, by descending eigenvalue, likewise.
    """

    count: Any
    mu: Pytree
    nu: Pytree
    grams: Pytree
    bases: Pytree

    def __repr__(self) -> str:
        return show(self)


register_moments(SoapState, {"mu": "first", "nu": "second"}, "count")


class _Leaf(NamedTuple):
    """The state of one leaf."""

    mu: jax.Array
    nu: jax.Array
    grams: Sides
    bases: Sides


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Soap(Inner):
    """Adam on the gradient in the eigenbases of its Gram matrices (SOAP, arXiv 2409.11321).

    Of a matrix `G (m, n)` with bases `Q_L (m, m)`, `Q_R (n, n)`, at call t = 0, 1, ...:

        t = 0:  L = (1 - b3) G Gᵀ, R = (1 - b3) GᵀG, Q = their eigenvectors; nothing moves
        t > 0:  m <- b1 m + (1 - b1) G
                v <- b2 v + (1 - b2) (Q_Lᵀ G Q_R)²
                direction = Q_L (Q_Lᵀ m Q_R / (sqrt(v) + eps)) Q_Rᵀ
                scale = sqrt(1 - b2^t) / (1 - b1^t)
                L <- b3 L + (1 - b3) G Gᵀ, R <- b3 R + (1 - b3) GᵀG
                t mod refresh_every = 0: columns of Q and entries of v by descending diag(QᵀLQ),
                                         Q <- qr(L Q)

    so that no step uses a basis that its own gradient made. With a sampler of layers the state starts
    afresh at each draw, and the first step after it moves no matrix: draw rarely. `normalize` divides
    the direction by its root mean square. A side longer than `max_precond_dim` has neither Gram
    matrix nor basis, nor has a leaf of fewer than two axes, for which this is Adam. Leading axes are a stack.

    The bases of call 0 are those of one gradient, whose Gram matrices have no more rank than the
    shorter side: the rest of the longer side's eigenvectors is what LAPACK makes of rounding, and
    noise of 1e-7 moved the official result by 16 to 50 %. Runs that shall be compared with another
    implementation's, or between platforms, need `first`.

    Args:
      b1, b2, eps: (.95, .95), 1e-8.
      b3: decay of the Gram matrices; None for b2, as in the official code (`shampoo_beta`).
      refresh_every: calls between two steps of the bases, 10 (`precondition_frequency`).
      max_precond_dim: 10000, which leaves out vocabularies.
      normalize: off (`normalize_grads`; helps where refreshes are rare).
      first: "gradient" (official), "identity", or the bases themselves, of the kernel's rows and of
        its columns, as a pair of square arrays with None for a side that has none, or by path as
        `((pattern, (rows, cols)), ...)`. All matrices of a stack start with the same.

    State of m x n: `2 m n` moments, and `2 d²` for each side `d <= max_precond_dim`, in float32.

    Raises:
      ValueError: for decay rates outside [0, 1), a negative eps, an unknown `first`; at the first
        step for bases that do not fit.

    >>> import jax.numpy as jnp
    >>> soap, g = Soap(first="identity"), jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> direction, scale, state = soap.update(g, soap.init(g))
    >>> print(direction)
    [[0. 0.]
     [0. 0.]]
    >>> direction, scale, state = soap.update(g, state)
    >>> print((scale * direction).round(3) + 0)
    [[ 1.  0.]
     [ 0. -1.]]
    """

    b1: Scalar = 0.95
    b2: Scalar = 0.95
    b3: Scalar | None = None
    eps: Scalar = 1e-8
    refresh_every: int = 10
    max_precond_dim: int = 10000
    normalize: bool = False
    first: Any = "gradient"
    splits = True
    guards = True
    trees = True
    batched = True
    decomposes = True

    def __post_init__(self):
        for name in ("b1", "b2", "b3"):
            check_number(f"soap: {name}", getattr(self, name), at_least=0, below=1)
        check_number("soap: eps", self.eps, at_least=0)
        check_static("soap: max_precond_dim", self.max_precond_dim)
        for name in ("refresh_every", "max_precond_dim"):
            check_integer(f"soap: {name}", getattr(self, name), at_least=1)
        known = isinstance(self.first, str) and self.first in STARTS
        if not (known or isinstance(self.first, tuple)):
            raise ValueError(
                f"soap: first={self.first!r} must be one of {STARTS}, a pair of bases (rows, cols), "
                "or ((pattern, pair), ...)"
            )

    def init(self, tree, view=None):
        treedef: Any
        leaves, treedef = jax.tree.flatten(tree)
        grams, bases = ([self._sides(leaf) for leaf in leaves] for _ in range(2))
        batch = () if view is None else view.batch
        zeros = lambda x: jnp.zeros_like(x, jnp.float32)  # noqa: E731
        return SoapState(
            # the first call is number 0
            count=jnp.full(batch, -1, jnp.int32),
            mu=jax.tree.map(zeros, tree),
            nu=jax.tree.map(zeros, tree),
            grams=treedef.unflatten(grams),
            bases=treedef.unflatten(bases),
        )

    def _sides(self, leaf: jax.Array) -> Sides:
        """Zeros for the Gram matrices, or bases, of a leaf."""
        spec = sharding.unsharded_spec(sharding.explicit_spec(leaf))

        def square(size):
            return sharding.zeros((*leaf.shape[:-2], size, size), jnp.float32, spec)

        return Sides(*(square(size) if size else None for size in self._sizes(leaf.shape)))

    def _sizes(self, shape: Shape) -> tuple[int, int]:
        """The sizes of both sides of a leaf, 0 for one without a basis."""
        if len(shape) < 2:
            return 0, 0
        m, n = (size if size <= self.max_precond_dim else 0 for size in shape[-2:])
        return m, n

    def update(self, grads, state, *, view=None, params=None, ok=None, **extra):
        del params, extra
        treedef: Any
        leaves, treedef = jax.tree.flatten(grads)
        by_field = (state.mu, state.nu, state.grams, state.bases)
        columns = (treedef.flatten_up_to(field) for field in by_field)
        old = [_Leaf(*row) for row in zip(*columns, strict=True)]
        accepted = jnp.asarray(True) if ok is None else ok
        # t of this call; moments have seen nothing at t = 0, and their scale is then never used
        count = optax.safe_increment(state.count)
        seen = jnp.maximum(count, 1)
        scale = jnp.sqrt(debias(self.b2, seen)) / debias(self.b1, seen)
        directions, new = [], []
        for g, leaf in zip(leaves, old, strict=True):
            direction, leaf = self._leaf(g, leaf, count, accepted, view)
            directions.append(direction)
            new.append(leaf)
        count = jnp.where(accepted, count, state.count)
        # by field again, also where there is no leaf
        fields = range(len(_Leaf._fields))
        trees = (treedef.unflatten([leaf[field] for leaf in new]) for field in fields)
        return treedef.unflatten(directions), scale, SoapState(count, *trees)

    def _leaf(
        self, g: jax.Array, leaf: _Leaf, count: jax.Array, accepted: jax.Array, view: Any
    ) -> tuple[jax.Array, _Leaf]:
        """Direction and new state of one leaf or stack."""
        own = sharding.explicit_spec(g)
        wide = [x.astype(jnp.float32) for x in (g, leaf.mu, leaf.nu)]
        g, mu, nu = (_unsharded(x) for x in wide)
        # call 0 collects the first Gram matrices, and moves nothing
        collects = _per_matrix(count == 0, g.ndim)
        moves = accepted & ~collects

        def moved(old, new, decay, when):
            return jnp.where(when, average(old, new, decay), old)

        # the first moment stays as the gradients lie, the second one lives in the bases
        mu = moved(mu, g, self.b1, moves)
        rotated = _into(leaf.bases, g)
        nu = moved(nu, jnp.square(rotated), self.b2, moves)

        # Adam's direction in the bases, brought back: (..., m, n)
        mu_rotated = _into(leaf.bases, mu)
        steps = mu_rotated / (jnp.sqrt(nu) + self.eps)
        direction = _out_of(leaf.bases, steps)
        if self.normalize:
            axes = (-2, -1) if g.ndim > 1 else None
            mean_square = jnp.mean(jnp.square(direction), axis=axes, keepdims=True)
            root = jnp.sqrt(mean_square) + TINY
            direction = direction / root
        direction = jnp.where(collects, 0, direction)

        # Gram matrices see this gradient after the step, of the sides that have them
        decay = self.b2 if self.b3 is None else self.b3

        def averaged(old, x):
            return moved(old, _gram(x), decay, accepted)

        transposed = jnp.swapaxes(g, -1, -2) if g.ndim > 1 else g
        grams = _each_side(averaged, leaf.grams, Sides(g, transposed))

        # and so do the bases, which no step uses that their own gradient made
        bases, nu = self._refreshed(grams, leaf.bases, nu, count, accepted, view)
        direction, mu, nu = (sharding.reshard(x, own) for x in (direction, mu, nu))
        return direction, _Leaf(mu, nu, grams, bases)

    def _refreshed(
        self,
        grams: Sides,
        bases: Sides,
        nu: jax.Array,
        count: jax.Array,
        accepted: jax.Array,
        view: ResolvedView | None,
    ) -> tuple[Sides, jax.Array]:
        """Bases and second moment after the step: one condition on a scalar for the whole stack.

        The matrices of a stack may have counts of their own, after a reset of some of them: where
        one is due the work is done for all, and each takes its own share.
        """
        if bases.left is None and bases.right is None:
            return bases, nu
        # by matrix, (batch...)
        starts = count == 0
        due = ~starts & (count % self.refresh_every == 0)

        def chosen(when, new, old):
            return jax.tree.map(lambda a, b: jnp.where(_per_matrix(when, a.ndim), a, b), new, old)

        def stay():
            return bases, nu

        def rotate():
            new = _rotated(grams, bases, nu)
            sound = where_finite(new, (bases, nu), new[0], axes=nu.ndim - 2)
            return chosen(due, sound, (bases, nu))

        def start():
            rotated, second = rotate()
            first = self._first(grams, view)
            sound = where_finite(first, bases, first, axes=nu.ndim - 2)
            return chosen(starts, sound, rotated), second

        # a step that is not accepted decomposes nothing: its Gram matrices may not be finite
        branch = jnp.where(jnp.any(starts), 2, jnp.where(jnp.any(due), 1, 0))
        branch = jnp.where(accepted, branch, 0)
        return jax.lax.switch(branch, [stay, rotate, start])

    def _first(self, grams: Sides, view: ResolvedView | None) -> Sides:
        """The bases of the first call."""
        if self.first == "gradient":
            return _each_side(_eigenvectors, grams)

        def spread(gram, basis):
            return jnp.broadcast_to(jnp.asarray(basis, jnp.float32), gram.shape)

        if self.first == "identity":
            return _each_side(lambda gram: spread(gram, jnp.eye(gram.shape[-1])), grams)
        # an oriented matrix has the kernel's columns on the left where those are shrunk
        path = "" if view is None else view.path
        rows, cols = self._given(path)
        is_turned = view is not None and view.side == "cols"
        given = Sides(cols, rows) if is_turned else Sides(rows, cols)

        for name, gram, basis in zip(Sides._fields, grams, given, strict=True):
            shape = None if basis is None else np.shape(basis)
            want = None if gram is None else gram.shape[-2:]
            if shape != want:
                raise ValueError(
                    f"soap: first has a basis of shape {shape} for the {name} side of {path!r}, and "
                    f"{want} is needed"
                )
        return _each_side(spread, grams, given)

    def _given(self, path: str) -> tuple[Any, Any]:
        """`(rows, cols)` of a leaf."""
        by_path = all(isinstance(rule, tuple) and isinstance(rule[0], str) for rule in self.first)
        rules = self.first if by_path else ((".*", self.first),)
        for pattern, pair in rules:
            if re.fullmatch(pattern, path):
                return pair
        raise ValueError(
            f"soap: first: no pattern matches {path!r}; add ('.*', pair) as the last rule"
        )

    def state_bytes(self, shapes):
        """Formula: 4 bytes of count; of each matrix m x n, `8 m n`, and `8 d²` for each side that has
        a basis."""
        total = 4
        for shape in map(shape_of, shapes):
            matrices = size_of(shape[:-2])
            squares = sum(size**2 for size in self._sizes(shape))
            # two moments, and a Gram matrix and a basis a side
            total += 8 * size_of(shape) + 8 * matrices * squares
        return total

    def decays(self):
        return {"first": self.b1, "second": self.b2}


def _per_matrix(flag: jax.Array, ndim: int) -> jax.Array:
    """A flag `()` or `(batch...)`, broadcastable over arrays of `ndim` axes."""
    return flag.reshape(*flag.shape, *[1] * (ndim - flag.ndim)) if flag.ndim else flag


def _unsharded(x: jax.Array) -> jax.Array:
    """The last two axes gathered, on an explicit mesh: Gram matrices and bases mix them."""
    if x.ndim < 2:
        return x
    spec = sharding.explicit_spec(x)
    return sharding.reshard(x, sharding.unsharded_spec(spec))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _gram(x: jax.Array) -> jax.Array:
    """`x xᵀ`."""
    return _times(x, jnp.swapaxes(x, -1, -2))


def _into(bases: Sides, x: jax.Array) -> jax.Array:
    """`Q_Lᵀ x Q_R`."""
    # a side without a basis keeps the coordinates that it has
    if bases.left is not None:
        x = _times(jnp.swapaxes(bases.left, -1, -2), x)
    if bases.right is not None:
        x = _times(x, bases.right)
    return x


def _out_of(bases: Sides, x: jax.Array) -> jax.Array:
    """`Q_L x Q_Rᵀ`."""
    if bases.left is not None:
        x = _times(bases.left, x)
    if bases.right is not None:
        x = _times(x, jnp.swapaxes(bases.right, -1, -2))
    return x


def _each_side(function: Callable[..., jax.Array], *sides: Sides) -> Sides:
    """`function` of the matrices of each side that has them."""
    return Sides(*(None if x[0] is None else function(*x) for x in zip(*sides, strict=True)))


def _eigenvectors(gram: jax.Array) -> jax.Array:
    """By descending eigenvalue."""
    _, ascending = linalg.eigh(gram)
    return jnp.flip(ascending, axis=-1)


def _rotated(grams: Sides, bases: Sides, nu: jax.Array) -> tuple[Sides, jax.Array]:
    """One power iteration of each basis, its columns and the second moment's entries sorted first."""

    def order(gram, basis):
        # diag(Qᵀ gram Q), which the columns of a converged basis have as eigenvalues
        values = jnp.sum(basis * _times(gram, basis), axis=-2)
        return jnp.argsort(-values, axis=-1)

    # the entry (i, j) of nu belongs to column i of the left basis and j of the right one
    orders = _each_side(order, grams, bases)
    if orders.left is not None:
        nu = jnp.take_along_axis(nu, orders.left[..., :, None], axis=-2)
    if orders.right is not None:
        nu = jnp.take_along_axis(nu, orders.right[..., None, :], axis=-1)

    def turned(gram, basis, order):
        # Q <- qr(gram Q)
        columns = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
        return linalg.orthonormalize(_times(gram, columns))

    return _each_side(turned, grams, bases, orders), nu
