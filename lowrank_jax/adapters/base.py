"""What an adapter is: a map from a linear operator to a linear operator.

An `Op` is what a host (dense, embedding, attend, convolution) does to its input, without bias, seen
as one matrix `K (n, m)`. An `Adapter` is a frozen description of pure functions of arrays; what it
trains and what it keeps frozen are dicts of arrays, one for each `Site` (a leaf of the parameter
tree, one matrix or a stack of them) and one for each group of sites that share. It works on three
levels, of which only the first is compulsory:

1. `effective(site, kernel, p)`, the adapted matrix; for additive adapters its delta,
   `delta(site, p)`;
2. `factors(site, p) -> Factors(a (n, q), scale (q,), b (q, m), rank_of (q,))`, whose thin products
   replace the dense delta on every host;
3. `wrap(op, site, p, key)`, for adapters that do better still (DoRA, OFT, MiSS).

`p` holds the arrays of one matrix by name, trained and frozen alike, `p["scale"]` among them, and
those of its group under `p["shared"]`. The kernel is asked for lazily: factors never read it, so a
quantised one stays quantised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import sharding
from lowrank_jax.checks import is_integer
from lowrank_jax.kernel_node import Op, product
from lowrank_jax.matrices import DENSE, MatrixView, Shape
from lowrank_jax.reprs import Short, show
from lowrank_jax.typing import Pytree

Arrays = dict[str, Any]
Axes = Mapping[str, tuple[str | None, ...]]


class Factors(NamedTuple):
    """The delta of one matrix as a sum of q components, `a diag(scale) b`.

    Attributes:
      a: `(n, q)`.
      scale: `(q,)`.
      b: `(q, m)`.
      rank_of: `(q,)` integers, known without any array: which entry of the rank's axis, 0 .. r-1, a
        component belongs to. A matrix of a smaller rank r' in a padded stack has the components
        with `rank_of < r'`. None where the family has no rank (`ranked` is False): then all
        components are every matrix's.
    """

    a: jax.Array
    scale: jax.Array
    b: jax.Array
    rank_of: np.ndarray | None

    def __repr__(self) -> str:
        return show(self)


def matrix_op(kernel: jax.Array) -> Op:
    """The operator of a bare matrix `(n, m)`: `x @ kernel`."""
    return Op(kernel.shape, product, lambda: kernel, lambda x: product(x, kernel), plain=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(Short):
    """One leaf that is adapted, with everything that fixes the shapes of its arrays.

    Attributes:
      path: "/"-joined path of the leaf.
      shape: its shape.
      view: which axes are rows (inputs), columns (outputs) and batch.
      rank: r; of several ranks in a stack the largest, the others are padded and masked by `scale`.
        0 without rank.
      lookup: the leaf is an embedding `(V, d)`, whose rows are looked up.
      uses: the products that see the adapter, out of `USES`; () is all. ("gather",) leaves a tied
        output layer alone.
      group: name of the sites that share what is shared.
      bank: the largest (n, m) of the group.

    >>> site = Site(
    ...     path="q/kernel",
    ...     shape=(3, 16, 4, 8),
    ...     view=MatrixView(batch=(0,), rows=(1,), cols=(2, 3)),
    ...     rank=2,
    ... )
    >>> site.lead, site.n, site.m, site.count
    ((3,), 16, 32, 3)
    """

    path: str = ""
    shape: Shape
    view: MatrixView = DENSE
    rank: int = 0
    lookup: bool = False
    uses: tuple[str, ...] = ()
    group: str = ""
    bank: tuple[int, int] = (0, 0)

    @property
    def lead(self) -> Shape:
        """Sizes of the batch axes."""
        return self.view.matrix_shape(self.shape)[:-2]

    @property
    def n(self) -> int:
        """Rows of one matrix: inputs."""
        return self.view.matrix_shape(self.shape)[-2]

    @property
    def m(self) -> int:
        """Columns of one matrix: outputs."""
        return self.view.matrix_shape(self.shape)[-1]

    @property
    def count(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.lead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Short):
    """The sites of one adaptation that share, in the order that is part of a checkpoint.

    Attributes:
      sites: by path.
      order: `((path, index along the flattened batch axes), ...)`.
      ranks: of those matrices whose rank is not that of their site, 0 for one that is left out.
    """

    sites: dict[str, Site]
    order: tuple[tuple[str, int], ...]
    ranks: Mapping[tuple[str, int], int] = dataclasses.field(default_factory=dict)

    @property
    def matrices(self) -> tuple[tuple[str, int, Site], ...]:
        """`((path, index, site with the matrix's own rank), ...)` in order, without those that are
        left out."""
        found = [(*entry, self.ranks.get(entry, self.sites[entry[0]].rank)) for entry in self.order]
        return tuple(
            (path, i, dataclasses.replace(self.sites[path], rank=r)) for path, i, r in found if r
        )

    @property
    def bank(self) -> tuple[int, int]:
        """The largest n and m."""
        return max(site.n for site in self.sites.values()), max(
            site.m for site in self.sites.values()
        )


class Transition(NamedTuple):
    """What a transition makes of the sites of a group; arrays keep their shapes and dtypes.

    Attributes:
      base: `{path: kernels (batch..., n, m)}` of those that change, {} where none does.
      train, frozen: `{"shared": arrays, "sites": {path: arrays}}`, as they were given.
      policy: what becomes of the moments, a tree like `train` of `lrx.surgery`'s policies; what is
        not named is kept.
    """

    base: Mapping[str, jax.Array]
    train: dict[str, Pytree]
    frozen: dict[str, Pytree]
    policy: dict[str, Any]

    def __repr__(self) -> str:
        return show(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Short):
    """Base of the adapters: frozen numbers, pure functions of one matrix.

    Class attributes, which a family sets:
      ranked: it has a rank, and its `scale` is a vector (r,); else a scalar ().
      reads_kernel: `init_site` wants the kernel.
      reads_bank: its product depends on the largest matrix of the group (`Site.bank`).
      whole_matrix: it means nothing for some rows or columns of the kernel alone.
      stochastic: `wrap` draws from its key, and every entry point gives it one of its own for each
        site and layer. A property where it depends on the options; by default it is whether there
        is a rate of `dropout`, which the `wrap` of this class knows. A family with another random
        mechanism sets it.
      common_draw: the key is a pair (2,), the adapter's own key and one that all sites and layers
        of the adaptation have, for what is drawn once for all of them.
      nested: the first components of a matrix stand alone at any rank, see `lrx.adapters.at_rank`.
      gives_aux: `wrap` gives a value beside the product (`Op.giving`), which `lrx.matmul(..., aux=True)`
        hands out; where nobody takes it, the product is an error.
      optional: arrays that `axes` names and only some starts make.
      in_arrays: options that change arrays alone, at the start, and not what the functions do with
        them; adaptations that differ in these stand in one program.

    Attributes:
      group: sites whose adapters are equal share what is shared; different groups keep it apart.
    """

    group: str = ""

    ranked: ClassVar[bool] = False
    reads_kernel: ClassVar[bool] = False
    reads_bank: ClassVar[bool] = False
    whole_matrix: ClassVar[bool] = False
    nested: ClassVar[bool] = False
    gives_aux: ClassVar[bool] = False
    optional: ClassVar[tuple[str, ...]] = ()
    in_arrays: ClassVar[tuple[str, ...]] = ("rank", "alpha", "init")

    @property
    def stochastic(self) -> bool:
        """Whether `wrap` draws from its key."""
        return self.dropout_rate > 0

    @property
    def common_draw(self) -> bool:
        """Whether `wrap` gets a second key that is the same at all sites and layers."""
        return False

    @property
    def dropout_rate(self) -> float:
        """The rate of dropout on the input of the factors, 0 for a family without."""
        return float(getattr(self, "dropout", 0.0))

    @property
    def kind(self) -> str:
        """The family's name, for reports and groups."""
        return type(self).__name__.lower()

    def validate(self, site: Site) -> None:
        """ValueError, naming path, value and remedy, where a site does not fit."""

    def largest_rank(self, site: Site) -> int | None:
        """The rank beyond which a matrix of a site gains nothing: of a pair of factors min(n, m).
        None without rank."""
        return min(site.n, site.m) if hasattr(self, "rank") else None

    def check_rank(self, site: Site) -> None:
        """ValueError where the rank exceeds the largest; files of others may hold such ranks, and
        are loaded."""
        bound, rank = self.largest_rank(site), getattr(self, "rank", 0)
        if bound is not None and rank > bound:
            smaller = (
                f"use at most {bound}, for this leaf alone by ranks=, or " if bound > 0 else ""
            )
            raise ValueError(
                f"{site.path!r}: rank={rank} exceeds {bound}, the largest of {self.kind} on a "
                f"{site.n} x {site.m} kernel; {smaller}leave it out by exclude="
            )

    def axes(self, site: Site) -> Axes:
        """What the own axes of each array of a site lie along, `{name: axes}`.

        An axis is "rows" or "cols" of the kernel, the "rank", or None. Shardings follow the first
        two, padding of ranks the third; axes of arrays that are not named are none of them. Shared
        arrays are named for their rank alone.
        """
        del site
        return {}

    def scaling(self, site: Site) -> float:
        """The number that `scale` starts from, alpha / r and its like, for a matrix of `site.rank`."""
        del site
        return 1.0

    def truncated(self, rank: int) -> Adapter:
        """The adapter of the first `rank` components of a matrix with `self.rank` of them."""
        return dataclasses.replace(self, rank=rank)  # type: ignore[call-arg]

    def init_shared(self, key: jax.Array, group: Group) -> tuple[Arrays, Arrays, dict[str, Arrays]]:
        """`(trained, frozen, {path: frozen arrays of that site, batch axes in front})` of a group.

        `ranks=` may give the matrices of a group several ranks: what they share is drawn for the
        largest of `group.matrices`, and each takes its part.
        """
        del key, group
        return {}, {}, {}

    def init_site(
        self, key: jax.Array, site: Site, kernel: jax.Array | None, given: Arrays
    ) -> tuple[Arrays, Arrays]:
        """`(trained, frozen)` arrays of one matrix.

        Args:
          key: of this matrix.
          site: which.
          kernel: `(n, m)` float32 where `reads_kernel`, else None.
          given: `scale`, `shared`, what `init_shared` made for this matrix, and statistics under
            "stats".
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its arrays start")

    def transition(
        self,
        group: Group,
        key: jax.Array,
        step: jax.Array,
        base: Mapping[str, jax.Array],
        train: dict[str, Pytree],
        frozen: dict[str, Pytree],
        stats: Mapping[str, Any],
    ) -> Transition | None:
        """What happens between two updates: merging, pruning, swapping; None for nothing.

        Pure and jitted once for all steps: what depends on `step` is a `jax.lax.cond` or a mask.

        Args:
          group: the sites, all that share a group name.
          key: of this step.
          step: int32 (), updates that were made.
          base: `{path: kernels (batch..., n, m)}`, float32, made when they are read.
          train, frozen: `{"shared": arrays, "sites": {path: arrays, batch axes in front}}`.
          stats: `{path: {name: array}}`, what the caller measured.
        """
        del group, key, step, base, train, frozen, stats
        return None

    def factors(self, site: Site, p: Arrays) -> Factors | None:
        """`Factors` with `delta = a diag(scale) b`; None where the delta is not thin."""
        del site, p
        return None

    def checked_factors(self, site: Site, p: Arrays) -> Any:
        """The `Factors` or None of `factors`, for all who use them; TypeError where a family gives
        anything else, ValueError where their shapes do not fit together."""
        found = self.factors(site, p)
        if found is None:
            return None
        if not isinstance(found, Factors):
            raise TypeError(
                f"{type(self).__name__}.factors gives a {type(found).__name__}; return None or "
                "lrx.adapters.Factors(a, scale, b, rank_of), rank_of np.arange(r) for r components in "
                "the order of the rank"
            )
        shapes = [tuple(np.shape(x)) for x in found[:3]]
        # a number broadcasts, and counts as the scale of each component
        q = shapes[0][-1] if shapes[0] else 0
        if shapes[0] != (site.n, q) or shapes[1] not in ((q,), ()) or shapes[2] != (q, site.m):
            raise ValueError(
                f"{site.path!r}: {type(self).__name__}.factors gives a, scale, b of shapes {shapes}; "
                f"return (n, q), (q,), (q, m) with n = {site.n}, m = {site.m}"
            )
        if found.rank_of is not None and np.shape(found.rank_of) != (q,):
            raise ValueError(
                f"{site.path!r}: {type(self).__name__}.factors gives {q} components and "
                f"rank_of={found.rank_of!r}; say for each of them to which of the ranks 0 .. "
                f"{site.rank - 1} it belongs"
            )
        return found

    def delta(self, site: Site, p: Arrays) -> jax.Array:
        """`(n, m)`, what is added to the kernel; by default the product of the factors."""
        found = self.checked_factors(site, p)
        if found is None:
            raise TypeError(
                f"{type(self).__name__} has no additive delta; effective() gives the whole matrix"
            )
        return (found.a * found.scale) @ found.b

    def effective(self, site: Site, kernel: jax.Array, p: Arrays) -> jax.Array:
        """`(n, m)`, the adapted matrix; by default `kernel + delta`."""
        return kernel + self.delta(site, p)

    def remove(self, site: Site, kernel: jax.Array, p: Arrays) -> jax.Array:
        """The inverse of `effective`: the kernel from the adapted matrix, up to rounding."""
        if type(self).effective is not Adapter.effective:
            raise ValueError(
                f"{site.path!r}: {type(self).__name__} cannot be taken out of a merged kernel by "
                "arithmetic; pass the parameters from before the merge as base="
            )
        return kernel - self.delta(site, p)

    def wrap(self, op: Op, site: Site, p: Arrays, key: jax.Array | None = None) -> Op:
        """The adapted operator. `key` draws what is random, here dropout of the input; None is
        deterministic."""
        found, rate = self.checked_factors(site, p), self.dropout_rate
        if found is None:
            return op.replaced(lambda: self.effective(site, op.kernel(), p))
        return op.plus(lambda x: op.thin(dropout(x, rate, key), found), lambda: self.delta(site, p))

    def apply(
        self, x: jax.Array, kernel: jax.Array, p: Arrays, key: jax.Array | None = None
    ) -> jax.Array:
        """`x (..., n)` times the adapted `kernel (n, m)`, for one bare matrix."""
        return self.wrap(matrix_op(kernel), self.site(kernel.shape), p, key)(x)

    def site(self, shape: Shape, path: str = "") -> Site:
        """The site of a bare `(n, m)` matrix."""
        return Site(
            shape=tuple(shape),
            path=path,
            rank=getattr(self, "rank", 0),
            bank=(shape[-2], shape[-1]),
        )

    def start(self, key: jax.Array, kernel: jax.Array, **stats: Any) -> Arrays:
        """All arrays of one bare `kernel (n, m)` as `apply` and `effective` want them, in one dict.

        >>> import jax, jax.numpy as jnp
        >>> import lowrank_jax as lrx
        >>> lora, kernel = lrx.adapters.lora(rank=2), jnp.ones((4, 6))
        >>> p = lora.start(jax.random.key(0), kernel)
        >>> lora.apply(jnp.ones((3, 4)), kernel, p).shape, p["a"].shape
        ((3, 6), (4, 2))
        """
        site = self.site(kernel.shape)
        self.validate(site)
        self.check_rank(site)
        # a group of this one matrix
        keys = jax.random.split(key)
        train, frozen, sites = self.init_shared(keys[0], Group(sites={"": site}, order=(("", 0),)))
        scale = jnp.full((site.rank,) if self.ranked else (), self.scaling(site), jnp.float32)
        given = {"scale": scale, "shared": train | frozen, **sites.get("", {})}
        train, frozen = self.init_site(
            keys[1], site, kernel.astype(jnp.float32), given | {"stats": stats}
        )
        return given | frozen | train

    def count(self, site: Site) -> int:
        """Trained numbers of one matrix of a site, the shared ones aside: by default those that
        `init_site` makes, of shapes alone."""

        def trained(key, kernel):
            alone = Group(sites={"": site}, order=(("", 0),))
            train, frozen, sites = self.init_shared(key, alone)
            scale = jnp.ones((site.rank,) if self.ranked else ())
            given = {"scale": scale, "shared": train | frozen, "stats": {}} | sites.get("", {})
            return self.init_site(key, site, kernel if self.reads_kernel else None, given)[0]

        kernel = jax.ShapeDtypeStruct((site.n, site.m), jnp.float32)
        made = jax.eval_shape(trained, jax.random.key(0), kernel)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))

    def shared_count(self, group: Group) -> int:
        """Trained numbers that the sites of a group share."""
        del group
        return 0


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; x itself without a key or a rate, and for indices."""
    if key is None or rate == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    # divided by what is left on average
    keep = sharding.reshard(jax.random.bernoulli(key, 1 - rate, x.shape), sharding.explicit_spec(x))
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def check_rate(rate: float, field: str = "dropout") -> None:
    """ValueError unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{field}={rate} must be at least 0 and below 1")


def check_positive(field: str, value: Any) -> None:
    """ValueError unless a positive integer."""
    if not is_integer(value) or value < 1:
        raise ValueError(
            f"{field}={value!r} must be a positive integer (put it in static_args under tracing)"
        )
