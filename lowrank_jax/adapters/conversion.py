"""From any adapter to plain LoRA: exactly where it has factors, else by the SVD of what it adds.

Families with `factors` are pairs already (LoRA, Uni-LoRA, VeRA, ...); starts from the kernel
(PiSSA, OLoRA) have the offset as further factors, so they are pairs of rank 2 r against the kernel
as it was. All others change the kernel by a full matrix `effective(K) - K`, of which a truncated
SVD is kept. To a smaller rank a pair goes by LoRA-Squeeze (two QR factorisations and the SVD of the
core), without their product; the reported errors form it, one matrix at a time.

The singular values are split evenly over both factors; PEFT puts them on B, which is the same
product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lowrank_jax import linalg, sharding
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Site, check_positive
from lowrank_jax.adapters.families.lora import Lora
from lowrank_jax.adapters.rules import Matrices, chosen_rows
from lowrank_jax.adapters.tree import matrices_of
from lowrank_jax.reprs import Short
from lowrank_jax.trees import is_quantized, leaves_with_metadata, map_nodes, stored_like
from lowrank_jax.typing import Pytree

HOW = ("as it is", "SVD of the product", "SVD of the difference")


@dataclasses.dataclass(frozen=True)
class SiteFactors(Short):
    """Factors of the matrices of a site, `a diag(scale) b`, and which of their q components are of
    a matrix's own rank.

    Attributes:
      a, scale, b: `(batch..., n, q)`, `(batch..., q)`, `(batch..., q, m)`.
      own: `(batch..., q)`, known without any array.
    """

    a: jax.Array
    scale: jax.Array
    b: jax.Array
    own: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """`(batch...)`, the rank of each matrix."""
        return self.own.sum(axis=-1)

    def scaled(self) -> tuple[jax.Array, jax.Array]:
        """`a` and `diag(scale) b`."""
        return self.a, self.scale[..., None] * self.b

    def compact(self) -> SiteFactors:
        """The components of a matrix's own rank in front, and no more of the others than the
        largest rank wants."""
        cut = max(int(self.ranks.max()), 1)
        # own components first, in their order
        order = np.argsort(~self.own, axis=-1, kind="stable")[..., :cut]
        if (order == np.arange(cut)).all():
            return SiteFactors(
                self.a[..., :cut], self.scale[..., :cut], self.b[..., :cut, :], self.own[..., :cut]
            )
        return SiteFactors(
            jnp.take_along_axis(self.a, order[..., None, :], axis=-1),
            jnp.take_along_axis(self.scale, order, axis=-1),
            jnp.take_along_axis(self.b, order[..., None], axis=-2),
            np.take_along_axis(self.own, order, axis=-1),
        )


def factors_of(adaptation: Adaptation, path: str) -> SiteFactors | None:
    """The factors of a site, or None where its adapter has none."""
    adapter, site = adaptation.layout.by_path[path]
    arrays = adaptation.arrays(path)
    shared = arrays.pop("shared")
    rank_of: Any = None

    def one(own):
        nonlocal rank_of
        found = adapter.checked_factors(site, own | {"shared": shared})
        if found is None:
            return None
        rank_of = found.rank_of  # the same for all matrices, and no array that a map could carry
        return found.a, found.scale, found.b

    for _ in site.lead:
        one = jax.vmap(one)
    found = one(arrays)
    if found is None:
        return None
    a, scale, b = found
    ranks = np.reshape(dict(adaptation.matrices)[path].ranks, (*site.lead, 1))
    own = _checked_ranks(adapter, site, rank_of, a.shape[-1]) < ranks
    return SiteFactors(a, scale, b, np.broadcast_to(own, (*site.lead, a.shape[-1])))


def _checked_ranks(adapter: Adapter, site: Site, rank_of: Any, q: int) -> np.ndarray:
    """The rank that each of q components belongs to; all are of rank 0 where the family has
    none."""
    if rank_of is None and not adapter.ranked:
        return np.zeros(q, int)
    if rank_of is None:
        raise ValueError(
            f"{site.path!r}: {type(adapter).__name__}.factors gives {q} components and "
            f"rank_of={rank_of!r}; say for each of them to which of the ranks 0 .. {site.rank - 1} "
            "it belongs"
        )
    return np.asarray(rank_of)


def lora_of(
    like: Adaptation,
    parts: Mapping[str, tuple[Site, jax.Array, jax.Array, np.ndarray, float]],
    name: str,
) -> Adaptation:
    """Plain LoRA with scale 1 from `{path: (site, a (batch..., n, r), b (batch..., r, m), own
    ranks, dropout)}`."""
    sites, adapters, matrices = [], [], {}
    groups: dict[Lora, str] = {}
    train: dict[str, Pytree] = {
        "shared": {},
        "sites": {},
        "trainable": dict(like.train["trainable"]),
    }
    frozen: dict[str, Pytree] = {"shared": {}, "sites": {}}
    for path, (site, a, b, ranks, dropout) in parts.items():
        rank = a.shape[-1]
        adapter = Lora(rank=rank, alpha=float(rank), dropout=dropout)
        group = groups.setdefault(adapter, "lora" + (f"_{len(groups)}" if groups else ""))
        site = dataclasses.replace(site, rank=rank, group=group)
        own = tuple(int(r) for r in ranks.reshape(-1))
        matrices[path] = Matrices(ranks=own, alphas=tuple(float(r) for r in own))
        sites.append(site)
        adapters.append(adapter)
        train["sites"][path] = {"a": a.astype(jnp.float32), "b": b.astype(jnp.float32)}
        frozen["sites"][path] = {"scale": matrices[path].scale(adapter, site)}
    order = tuple((site.path, index) for site in sites for index in range(site.count))
    given = [entry for entry in like.layout.order if entry in set(order)]
    layout = dataclasses.replace(
        like.layout,
        name=name,
        sites=tuple(sites),
        adapters=tuple(adapters),
        trainable=tuple(train["trainable"]),
        order=tuple(given + [entry for entry in order if entry not in set(given)]),
        candidates=(),
    )
    return Adaptation(train, frozen, layout.banked(), tuple(matrices.items()))


def truncated(
    svd: tuple[jax.Array, jax.Array, jax.Array], limit: np.ndarray, energy: float | None
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """`(a, b, ranks)` of SVDs `(batch..., n, p)`, `(batch..., p)`, `(batch..., p, m)`.

    Args:
      svd: u, s, vt.
      limit: `(batch...)`, the largest rank of each matrix.
      energy: share of the squared singular values that is enough, or None.
    """
    u, s, vt = svd
    # the rank of each matrix: the limit, and what the energy wants of it
    ranks = np.minimum(limit, s.shape[-1])
    if energy is not None:
        if isinstance(s, jax.core.Tracer):
            raise ValueError(
                "energy: the ranks depend on values and fix shapes; call this outside jit, or give "
                "rank="
            )
        ranks = np.minimum(ranks, np.asarray(linalg.rank_for_energy(s, energy)))
    size = max(int(ranks.max()), 1)
    kept = np.arange(s.shape[-1]) < ranks[..., None]
    # U sqrt(S) and sqrt(S) Vᵀ, 0 beyond a matrix's own rank
    root = jnp.sqrt(jnp.where(kept, s, 0))[..., :size]
    a = u[..., :size] * root[..., None, :]
    b = root[..., None] * vt[..., :size, :]
    return a, b, ranks


@dataclasses.dataclass(frozen=True)
class Conversion(Short):
    """What `to_lora` did to each site: how, to which ranks, and the relative Frobenius error of
    each matrix's delta.

    Errors are measured: the product of the new factors is compared with the dense delta, one matrix
    at a time.

    Attributes:
      how: by path, one of "as it is", "SVD of the product", "SVD of the difference".
      ranks: by path, `(batch...)`.
      errors: by path, `(batch...)`.
    """

    how: dict[str, str]
    ranks: dict[str, np.ndarray]
    errors: dict[str, jax.Array]

    def __str__(self) -> str:
        rows = [("leaf", "how", "rank", "largest error")]
        for path, how in self.how.items():
            low, high = int(self.ranks[path].min()), int(self.ranks[path].max())
            rank = str(low) if low == high else f"{low} to {high}"
            rows.append((path, how, rank, f"{float(jnp.max(self.errors[path])):.3g}"))
        widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
        lines = [
            "".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) + row[3] for row in rows
        ]
        return "\n".join(lines)


def to_lora(
    params: Pytree, adaptation: Adaptation, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adaptation, Conversion]:
    """The adaptation as plain LoRA on the same `params`, with alpha = r, and what that cost.

    Adapters with factors are taken as they are, exactly, unless a smaller rank or an energy is
    asked for; the others by a truncated SVD of `effective(K) - K`. Starts from the kernel give rank
    2 r, against the kernel as it was. Weights and masks are worked in; leaves trained in full and a
    rate of dropout go along, other random mechanisms do not.

    Args:
      params: the tree that the adaptation belongs to; read where an adapter has no factors.
      adaptation: of any families.
      rank: at most this; a matrix whose delta has fewer components keeps those.
      energy: the smallest rank of each matrix that keeps this share of its squared singular values;
        ranks differ, and are padded within a stack. With `rank` the smaller counts.

    Raises:
      ValueError: for an adapter without factors when neither is given; for an energy outside (0, 1]
        or under tracing; for a leaf that is not there.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2, init="pissa"), jax.random.key(1))
    >>> lora, report = to_lora(params, adaptation)
    >>> print(report)
    leaf    how       rank  largest error
    kernel  as it is  4     0
    """
    chosen_rows([adaptation.layout], None)
    if rank is not None:
        check_positive("rank", rank)
    nodes = {path: node for path, node, _ in leaves_with_metadata(params)}
    parts, how, ranks, errors = {}, {}, {}, {}
    for path, (adapter, site) in adaptation.layout.by_path.items():
        found = factors_of(adaptation, path)
        delta, arrays = _delta_of(nodes, adaptation, path, found is not None)
        a, b, ranks[path], how[path] = _pair_of(
            adaptation, path, found, delta, arrays, rank, energy
        )
        errors[path] = _measured(site, a, b, ranks[path], delta, arrays)
        parts[path] = (site, a, b, ranks[path], adapter.dropout_rate)
    return lora_of(adaptation, parts, adaptation.layout.name), Conversion(how, ranks, errors)


def _pair_of(
    adaptation: Adaptation,
    path: str,
    found: SiteFactors | None,
    delta: Callable,
    arrays: Pytree,
    rank: Any,
    energy: Any,
) -> tuple[jax.Array, jax.Array, np.ndarray, str]:
    """`(a, b, ranks, how)` of one site."""
    adapter, site = adaptation.layout.by_path[path]
    if found is not None:
        found = found.compact()
        a, b = found.scaled()
        # pairs as they are, where nobody asks for a smaller rank
        if energy is None and (rank is None or found.ranks.max() <= rank):
            return a, b, found.ranks, HOW[0]
        limit = found.ranks if rank is None else np.minimum(found.ranks, rank)
        b = jnp.where(found.own[..., None], b, 0)
        return (*truncated(linalg.svd_of_product(a, b), limit, energy), HOW[1])
    if rank is None and energy is None:
        raise ValueError(
            f"{site.path!r}: {type(adapter).__name__} has no factors, so its delta has no rank of "
            "its own; give rank= or energy="
        )

    def decomposed(one):
        dense = delta(one)
        dense = sharding.reshard(dense, sharding.unsharded_spec(sharding.explicit_spec(dense)))
        return linalg.truncated_svd(dense, min(site.n, site.m))

    svd = over_matrices(decomposed, site, arrays)
    full = min(site.n, site.m) if rank is None else rank
    own = np.reshape(dict(adaptation.matrices)[path].ranks, site.lead) > 0
    return (*truncated(svd, np.where(own, full, 0), energy), HOW[2])


def _delta_of(
    nodes: Mapping[str, Any], adaptation: Adaptation, path: str, additive: bool
) -> tuple[Callable, Any]:
    """`(function, trees)`: what the adapter adds to one matrix is `function(trees of one matrix)`,
    dense.

    Of an adapter with factors the kernel is not read.
    """
    adapter, site = adaptation.layout.by_path[path]
    arrays = adaptation.arrays(path)
    shared = arrays.pop("shared")
    if additive:
        return lambda own: adapter.delta(site, own | {"shared": shared}), arrays
    if path not in nodes or tuple(nodes[path].shape) != site.shape:
        raise ValueError(
            f"adapted leaf {path!r}, {site.shape}, is not in params; give the tree that adapt saw"
        )

    def difference(one):
        kernel, own = one
        return adapter.effective(site, kernel, own | {"shared": shared}) - kernel

    return difference, (matrices_of(nodes[path], site), arrays)


def _measured(
    site: Site, a: jax.Array, b: jax.Array, ranks: np.ndarray, delta: Callable, arrays: Pytree
) -> jax.Array:
    """`|a b - delta| / |delta|` of each matrix, Frobenius norms; a difference within the product's
    rounding is 0.

    Rounding: a product of q components in float32 is within `q eps |a| |b|` of the exact one.
    """
    q = a.shape[-1]
    kept = jnp.asarray(np.arange(q) < ranks[..., None], a.dtype)
    bound = q * float(jnp.finfo(jnp.float32).eps)

    def one(trees):
        a, b, kept, own = trees
        a, wanted = a * kept, delta(own)
        off = jnp.linalg.norm(a @ b - wanted)
        size = jnp.linalg.norm(wanted)
        # what float32 makes of a product of q components
        rounding = bound * jnp.linalg.norm(a) * jnp.linalg.norm(b)
        return jnp.where(off <= rounding, 0, off / jnp.where(size == 0, 1, size))

    return over_matrices(one, site, (a, b, kept, arrays))


def over_matrices(function: Callable, site: Site, trees: Pytree) -> Any:
    """`function(trees of one matrix)` of every matrix of a site, one after the other, so that a
    large stack fits.

    A stack that an explicit mesh divides along its layers is gathered along them.
    """
    if not site.lead:
        return function(trees)
    batch = len(site.lead)

    def flat(x):
        spec = sharding.explicit_spec(x)
        x = x if spec is None else sharding.reshard(x, (*[None] * batch, *spec[batch:]))
        return x.reshape(site.count, *x.shape[batch:])

    found = jax.lax.map(function, jax.tree.map(flat, trees))
    return jax.tree.map(lambda x: x.reshape(*site.lead, *x.shape[1:]), found)


def absorb(params: Pytree, adaptation: Adaptation) -> tuple[Any, Adaptation]:
    """Writes the offsets of PiSSA-like starts into the kernels, `K - s a0 b0`, as the papers do,
    and drops them.

    The function stays as it was, and the adapter is then plain LoRA on *another* base: `merge`,
    `to_lora` and files made from the result refer to the parameters returned here, and `s` must be
    what it was (a weight of 0 is the base without its principal part). Computed in float32 and
    rounded to the leaf's dtype: a bfloat16 kernel loses what the offset kept as data, up to 2**-9
    of each entry, and int8 or NF4 kernels are quantised anew. The way back is the adaptation that
    was given here, which has the same layout: `before.replace(train=after.train)` is the trained
    state against the original parameters, and `to_lora` of that is the LoRA of rank 2 r that others
    can load.

    Raises:
      ValueError: if there is no offset; for a quantised leaf that cannot be requantised.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    >>> before = lrx.adapt(params, lrx.adapters.lora(rank=2, init="pissa"), jax.random.key(1))
    >>> residual, after = absorb(params, before)
    >>> jnp.linalg.matrix_rank(residual["kernel"]).item(), sorted(after.frozen["sites"]["kernel"])
    (4, ['scale'])
    """
    chosen_rows([adaptation.layout], None)
    adaptation.layout.check_uses("a kernel that takes up an offset serves all of them")
    sites = adaptation.frozen["sites"]
    offsets = {path: arrays for path, arrays in sites.items() if {"a0", "b0"} <= set(arrays)}
    if not offsets:
        raise ValueError(
            f"{adaptation.layout.name!r} has no offset a0, b0: there is nothing that could be "
            "absorbed"
        )

    def place(path, node):
        if path not in offsets:
            return node
        site, own = adaptation.layout.by_path[path][1], offsets[path]
        array = meta.unbox(node)
        if is_quantized(array) and not array.writable:
            raise ValueError(
                f"{path!r}: {type(array).__name__} has no requantize; keep the offset as data "
                "beside it"
            )
        rest = matrices_of(array, site) - jnp.matmul(
            own["a0"] * own["scale"][..., None, :], own["b0"]
        )
        whole = site.view.from_matrices(rest, tuple(array.shape))
        whole = stored_like(whole, array)
        return node.replace_boxed(whole) if isinstance(node, meta.AxisMetadata) else whole

    missing = set(offsets) - {path for path, _, _ in leaves_with_metadata(params)}
    if missing:
        raise ValueError(
            f"adapted leaves {sorted(missing)} are not in params; give the tree that adapt saw"
        )
    left = {
        path: {name: x for name, x in own.items() if name not in ("a0", "b0")}
        for path, own in sites.items()
    }
    return map_nodes(place, params), adaptation.replace(frozen=adaptation.frozen | {"sites": left})
