"""One LoRA out of several: PEFT's `add_weighted_adapter`, method by method.

With delta_i = a_i diag(s_i) b_i and weights w_i, a new pair of scale 1:

    cat                  [w_1 s_1 a_1, ...], [b_1; ...]: exactly sum_i w_i delta_i, of rank sum_i
                         r_i
    svd                  its best approximation of a smaller rank, from the factors (LoRA-Squeeze)
    linear               (sum_i g_i v_i a_i) (sum_i v_i b_i), v_i = sqrt |w_i s_i|, g_i the sign of
                         w_i s_i
    magnitude_prune      linear, of factors that keep their largest entries
    ties                 the same with signs elected: entries of the losing sign count neither in
                         sum nor in number
    dare_linear, _ties   linear or ties, of factors with random entries dropped and the others
                         divided by the density
    *_svd                the same of the dense deltas with weights w_i, then a truncated SVD

The methods without svd work on a and b apart, as in PEFT: their product has cross terms a_i b_j
that no task trained, and only with one adaptation, or equal ones, is `linear` the sum of the
deltas. `cat` and `svd` have none: prefer them.

Also PEFT's, and kept: signs are elected before weights, so a subtracted task votes as if it were
added; a vote of 0 is positive (TIES' own code takes the majority of all entries); entries are
counted for each tensor (TIES: over the whole model). Not kept: one adaptation alone is always taken
as `linear` there, and `svd_clamp`, which depends on how the SVD is split. Up to 0.20 its dense
methods multiplied by s_i twice.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg
from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Site, check_positive
from lowrank_jax.adapters.conversion import (
    SiteFactors,
    factors_of,
    lora_of,
    over_matrices,
    truncated,
)
from lowrank_jax.adapters.rules import chosen_rows
from lowrank_jax.typing import Key, Scalar

PRUNED = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
METHODS = ("cat", "svd", "linear", *PRUNED, *(f"{method}_svd" for method in PRUNED))


@dataclasses.dataclass(frozen=True)
class Rule:
    """How stacked tensors `(k, ..., rows, cols)` of k tasks become one.

    Attributes:
      method: without "_svd".
      density: share of the entries that is kept.
      majority_sign: what elects a sign, "total" or "frequency".
    """

    method: str
    density: float
    majority_sign: str

    def __call__(
        self, tasks: jax.Array, weights: jax.Array, own: np.ndarray | bool, keys: Key | None
    ) -> jax.Array:
        """`(..., rows, cols)`.

        Args:
          tasks: the tensors.
          weights: broadcastable to them.
          own: `(..., rows, cols)`, which entries belong to a matrix's own rank.
          keys: one for each tensor, `(k,)`, where entries are drawn.
        """
        own = np.broadcast_to(own, tasks.shape[1:])
        tasks = jnp.where(own, tasks, 0)
        # entries are dropped first
        if self.density < 1 and self.method in ("magnitude_prune", "ties"):
            tasks = jax.vmap(lambda x: largest(x, self.density, own))(tasks)
        elif self.density < 1 and self.method.startswith("dare"):
            shape = tasks.shape[1:]
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, self.density, shape))(keys)
            tasks = jnp.where(kept, tasks / self.density, 0)
        if self.method not in ("ties", "dare_ties"):
            return jnp.sum(tasks * weights, axis=0)
        # each entry elects a sign, 0 votes for plus
        ballots = tasks if self.majority_sign == "total" else jnp.sign(tasks)
        votes = jnp.sum(ballots, axis=0)
        agree = jnp.sign(tasks) == jnp.where(votes >= 0, 1, -1)
        # the mean over the tasks that agree, of which a subtracted one is one
        total = jnp.sum(tasks * weights * agree, axis=0)
        return total / jnp.maximum(jnp.sum(agree, axis=0), 1)


def largest(x: jax.Array, density: float, own: np.ndarray) -> jax.Array:
    """`x (..., rows, cols)` with the `int(density * count)` largest entries of each matrix, the
    first of equal ones.

    >>> import jax.numpy as jnp, numpy as np
    >>> largest(jnp.array([[3.0, -4.0], [1.0, 0.0]]), 0.5, np.ones((2, 2), bool)).tolist()
    [[3.0, -4.0], [0.0, 0.0]]
    """
    lead = x.shape[:-2]
    # how many entries of each matrix are kept, (batch..., 1)
    counts = own.reshape(*lead, -1).sum(axis=-1, keepdims=True)
    keep = np.floor(density * counts).astype(int)
    # the place of each entry in descending order; padding comes last
    size = jnp.where(own, jnp.abs(x), -1).reshape(*lead, -1)
    order = jnp.argsort(-size, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)
    return jnp.where((place < keep).reshape(x.shape), x, 0)


def combine(
    adaptations: Mapping[str, Adaptation],
    weights: Any,
    *,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    key: jax.Array | None = None,
    name: str = "combined",
) -> Adaptation:
    """A plain LoRA with scale 1 out of several adaptations that have factors; negative weights
    subtract.

    Leaves that only some adapt take what those have. Leaves trained in full go along where one
    adaptation trains them.

    Args:
      adaptations: by name; families without factors go through `lrx.to_lora` first.
      weights: `{name: weight}`, or one for each in the order of the dict.
      method: see the module; "cat" is the sum itself (PEFT's default is "svd").
      rank: of methods with svd; by default the largest of the given ones.
      energy: of methods with svd: the smallest rank of each matrix that keeps this share of its
        squared singular values, at most `rank` if both are given. Outside jit.
      density: share of entries that ties, dare and magnitude_prune keep, in (0, 1].
      majority_sign: what elects the sign in ties: "total", the sum of the entries, or "frequency",
        of their signs.
      key: draws what dare drops, of its own for each name, site, layer and factor.
      name: of the result.

    Raises:
      ValueError: for an option that the method lacks or does not use; for ranks that differ, where
        factors are added entry by entry; for adapters without factors; for a leaf that two
        adaptations train in full.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {"kernel": jnp.ones((8, 6))}
    >>> start = lambda seed: lrx.adapt(
    ...     params, lrx.adapters.lora(rank=2, init="orthogonal"), jax.random.key(seed)
    ... )
    >>> one, two = start(0), start(1)
    >>> print(combine({"one": one, "two": two}, {"one": 1.0, "two": -0.5}))
    leaf    shape   adapter  rank  trained
    kernel  (8, 6)  lora     4     56
    1 leaf adapted, 0 trained in full: 56 trained, 48 frozen of the model's 48 parameters (117 %)
    """
    values = _weights(adaptations, weights)
    rule = _rule(method, rank, energy, density, majority_sign, key)
    chosen_rows((one.layout for one in adaptations.values()), None)
    paths = dict.fromkeys(path for one in adaptations.values() for path in one.layout.by_path)
    parts = {}
    for path in paths:
        having = {n: one for n, one in adaptations.items() if path in one.layout.by_path}
        site = _site(having, path)
        thin = {n: _thin(one, path, n) for n, one in having.items()}
        weight = [values[n] for n in having]
        keys = None
        if key is not None:
            keys = jnp.stack(
                [jax.random.fold_in(key, zlib.crc32(f"{n}/{path}".encode())) for n in having]
            )
        if method == "cat" or method.endswith("svd"):
            a, b, ranks = _sum(site, list(thin.values()), weight, method, rule, keys, rank, energy)
        else:
            a, b, ranks = _by_factor(site, thin, weight, method, rule, keys)
        parts[path] = (site, a, b, ranks, 0.0)
    return lora_of(_with_whole(adaptations), parts, name)


def _weights(adaptations: Mapping[str, Adaptation], weights: Any) -> dict[str, Any]:
    if not adaptations:
        raise ValueError("combine: there is no adaptation")
    if not isinstance(weights, Mapping):
        weights = list(weights)
        if len(weights) != len(adaptations):
            raise ValueError(
                f"weights: {len(weights)} for the {len(adaptations)} adaptations "
                f"{list(adaptations)}"
            )
        return dict(zip(adaptations, weights, strict=True))
    if set(weights) != set(adaptations):
        raise ValueError(
            f"weights: given for {sorted(weights)}, the adaptations are {sorted(adaptations)}"
        )
    return dict(weights)


def _rule(method: str, rank: Any, energy: Any, density: Any, majority_sign: str, key: Any) -> Rule:
    """The rule for entries; ValueError for options that do not belong together."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}")
    bare = method.removesuffix("_svd")
    unused = {
        "rank": rank is not None and not method.endswith("svd"),
        "energy": energy is not None and not method.endswith("svd"),
        "density": density is not None and bare not in PRUNED,
        "majority_sign": majority_sign != "total" and not bare.endswith("ties"),
        "key": key is not None and not bare.startswith("dare"),
    }
    if any(unused.values()):
        raise ValueError(
            f"method={method!r} does not use {[name for name, wrong in unused.items() if wrong]}"
        )
    if bare in PRUNED and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"density={density} must lie in (0, 1] for method={method!r}: the share of entries kept"
        )
    if bare.startswith("dare") and key is None:
        raise ValueError(f"method={method!r} drops entries at random: pass key=")
    if majority_sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign={majority_sign!r} must be 'total' or 'frequency'")
    if rank is not None:
        check_positive("rank", rank)
    return Rule(bare, 1.0 if density is None else density, majority_sign)


def _site(having: Mapping[str, Adaptation], path: str) -> Site:
    """The site that they share; ValueError where shape or view differ."""
    (name, first), *rest = ((n, one.layout.by_path[path][1]) for n, one in having.items())
    for other, site in rest:
        seen, others = ((one.shape, one.view, one.lookup, one.uses) for one in (first, site))
        if seen != others:
            raise ValueError(
                f"{path!r}: {name!r} sees {first.shape} with {first.view} at "
                f"{first.uses or 'all uses'}, {other!r} {site.shape} with {site.view} at "
                f"{site.uses or 'all uses'}"
            )
    return first


def _thin(adaptation: Adaptation, path: str, name: str) -> SiteFactors:
    thin = factors_of(adaptation, path)
    if thin is None:
        kind = type(adaptation.layout.by_path[path][0]).__name__
        raise ValueError(
            f"{name!r}: {kind} at {path!r} has no factors; lrx.to_lora(params, adaptation, rank=) "
            "first"
        )
    return thin.compact()


def _with_whole(adaptations: Mapping[str, Adaptation]) -> Adaptation:
    """The first adaptation with the leaves that any of them trains in full."""
    whole: dict[str, Any] = {}
    for one in adaptations.values():
        twice = sorted(set(whole) & set(one.layout.trainable))
        if twice:
            raise ValueError(
                f"leaves {twice} are trained in full by two adaptations, and whole leaves are not "
                "combined"
            )
        whole |= one.train["trainable"]
    first = next(iter(adaptations.values()))
    return first.replace(train=first.train | {"trainable": whole})


def _by_factor(
    site: Site,
    thin: Mapping[str, SiteFactors],
    weights: list[Scalar],
    method: str,
    rule: Rule,
    keys: Key | None,
):
    """`(a, b, ranks)` of a rule that works on factors: `(k, batch..., n, q)` and
    `(k, batch..., q, m)` apart."""
    first, *rest = thin.values()
    if any(other.own.shape != first.own.shape or (other.own != first.own).any() for other in rest):
        ranks = {name: sorted(set(one.ranks.reshape(-1).tolist())) for name, one in thin.items()}
        raise ValueError(
            f"method={method!r} adds factors entry by entry, and at {site.path!r} the ranks are "
            f"{ranks}; take 'cat' or 'svd', or bring them to one rank by lrx.to_lora"
        )
    # w_i s_i, (k, batch..., q): its root goes to both factors, its sign to a
    pairs = zip(weights, thin.values(), strict=True)
    strength = jnp.stack([_times(weight, one) for weight, one in pairs])
    root = jnp.sqrt(jnp.abs(strength))
    signed = jnp.where(strength >= 0, root, -root)
    stack_a = jnp.stack([one.a for one in thin.values()])
    stack_b = jnp.stack([one.b for one in thin.values()])
    # what is dropped of a and of b is drawn apart
    key_a = key_b = None
    if keys is not None:
        key_a, key_b = jax.vmap(jax.random.split, out_axes=1)(keys)
    own = first.own
    a = rule(stack_a, signed[..., None, :], own[..., None, :], key_a)
    b = rule(stack_b, root[..., None], own[..., None], key_b)
    return a, b, first.ranks


def _sum(
    site: Site,
    thin: list[SiteFactors],
    weights: list[Scalar],
    method: str,
    rule: Rule,
    keys: Key | None,
    rank: int | None,
    energy: float | None,
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """`(a, b, ranks)` of the weighted sum of deltas, or of what a rule makes of them."""
    own = np.concatenate([one.own for one in thin], axis=-1)
    top = max(one.own.shape[-1] for one in thin) if rank is None else rank
    if method in ("cat", "svd"):
        every = _concatenated(thin, weights, own)
        a, b = every.scaled()
        if method == "cat":
            return a, b, every.ranks
        limit = np.minimum(every.ranks, top)
        return truncated(linalg.svd_of_product(a, b), limit, energy)

    # (k, 1, 1), over dense deltas
    stacked = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    column = stacked[:, None, None]

    def one(trees):
        pairs, own_keys = trees
        # dense, (k, n, m)
        deltas = jnp.stack([a @ b for a, b in pairs])
        made = rule(deltas, column, True, own_keys)
        return linalg.truncated_svd(made, min(site.n, site.m))

    pairs = [(x.a, _times(1, x)[..., None] * x.b) for x in thin]
    # each matrix of a stack draws for itself
    each = keys
    if keys is not None and site.lead:
        each = jax.vmap(lambda key: jax.random.split(key, site.lead), out_axes=-1)(keys)
    svd = over_matrices(one, site, (pairs, each))
    return truncated(svd, np.where(own.any(axis=-1), top, 0), energy)


def _concatenated(thin: list[SiteFactors], weights: list[Scalar], own: np.ndarray) -> SiteFactors:
    """`[w_1 s_1 a_1, w_2 s_2 a_2, ...] [b_1; b_2; ...]`."""
    scales = [_times(weight, one) for weight, one in zip(weights, thin, strict=True)]
    scale = jnp.concatenate(scales, -1)
    a = jnp.concatenate([one.a for one in thin], -1)
    b = jnp.concatenate([one.b for one in thin], -2)
    return SiteFactors(a, scale, b, own).compact()


def _times(weight: Scalar, thin: SiteFactors) -> jax.Array:
    """`weight scale` of each component, 0 beyond a matrix's own rank."""
    return jnp.where(thin.own, jnp.asarray(weight, jnp.float32) * thin.scale, 0)
