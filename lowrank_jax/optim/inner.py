"""What runs inside the subspace, and how others reach the moments it keeps.

An inner transformation works on one matrix (or on the group of plain leaves, as a tree) and returns
a direction and a scale apart: the step is `scale * direction`. `adam` keeps its bias correction in
the scale, because rules that rescale gradients by the inner direction need the uncorrected one. Any
optax transformation serves too, with scale 1.

The moments protocol lets transports and error feedback reach the state of any inner transformation
without knowing its fields: `moments(inner, state)` lists `Moment(path, kind, decay, count)`,
registered by state type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.checks import check_number, is_integer, is_number


class Moment(NamedTuple):
    """One moment inside an inner state.

    Attributes:
      path: key path of the leaf inside the state.
      kind: "first", "second", "max", "factored" or "other".
      decay: its decay rate, or None where the state does not know.
      count: steps it has seen, or None.
    """

    path: tuple
    kind: str
    decay: Any
    count: Any


@runtime_checkable
class Inner(Protocol):
    """An inner transformation: pure functions on one matrix, or on a tree of plain leaves.

    Optional attributes: `guards`, see `guarded`; `elementwise`, where an entry moves by its own
    gradients alone and all state but registered moments is shared, so that a leaf may be updated in
    parts.
    """

    splits: bool

    def init(self, tree: Any) -> Any: ...

    def update(
        self, grads: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any, Any]: ...


def debias(decay: Any, count: jax.Array) -> jax.Array:
    """`1 - decay^count` in float32, without the cancellation that rounding the decay first would
    bring."""
    if is_number(decay):
        log: Any = math.log(decay) if decay > 0 else -math.inf
    else:
        log = jnp.log(decay)
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    return decay * old.astype(jnp.float32) + (1 - decay) * new


class AdamState(NamedTuple):
    """State of `adam`: int32 count, first and second moments shaped like the low-rank object."""

    count: Any
    mu: Any
    nu: Any


_EPSILON = ("torch", "hf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, with its bias correction apart from its direction.

    `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g²`, `scale = sqrt(1 - b2^t) / (1 - b1^t)`, and

    * `convention="torch"`: `direction = m / (sqrt(v) + eps sqrt(1 - b2^t))`, so that
      `scale * direction` is `m̂ / (sqrt(v̂) + eps)` (torch, optax; FRUGAL, LDAdam, DCT-AdamW; eps
      1e-8);
    * `convention="hf"`: `direction = m / (sqrt(v) + eps)` (GaLore, Fira, APOLLO; eps 1e-6).

    Args:
      b1, b2, eps: decay rates and the epsilon of the convention.
      mu_dtype, nu_dtype: dtypes of the stored moments; the arithmetic is float32.

    Raises:
      ValueError: for a decay rate outside [0, 1), a negative eps or an unknown convention.

    >>> import jax.numpy as jnp
    >>> adam = Adam(eps=0.0)
    >>> direction, scale, state = adam.update(jnp.array([3.0, -4.0]), adam.init(jnp.zeros(2)))
    >>> print(scale * direction)
    [ 1. -1.]
    """

    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    convention: str = "torch"
    mu_dtype: Any = jnp.float32
    nu_dtype: Any = jnp.float32
    splits = True
    guards = True
    elementwise = True

    def __post_init__(self):
        for name in ("b1", "b2"):
            check_number(f"adam: {name}", getattr(self, name), at_least=0, below=1)
        check_number("adam: eps", self.eps, at_least=0)
        if self.convention not in _EPSILON:
            raise ValueError(f"adam: convention={self.convention!r} must be one of {_EPSILON}")

    def init(self, tree):
        return AdamState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda x: jnp.zeros_like(x, self.mu_dtype), tree),
            jax.tree.map(lambda x: jnp.zeros_like(x, self.nu_dtype), tree),
        )

    def update(self, grads, state, params=None, *, ok=None, **extra):
        del params, extra

        def average(old, new, decay):
            moved = _average(old, new, decay)
            return moved if ok is None else jnp.where(ok, moved, old.astype(jnp.float32))

        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: average(m, g.astype(jnp.float32), self.b1), state.mu, grads)
        nu = jax.tree.map(
            lambda v, g: average(v, jnp.square(g.astype(jnp.float32)), self.b2), state.nu, grads
        )
        eps, scale = self.corrections(count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        mu = jax.tree.map(lambda m: m.astype(self.mu_dtype), mu)
        nu = jax.tree.map(lambda v: v.astype(self.nu_dtype), nu)
        kept = count if ok is None else jnp.where(ok, count, state.count)
        return direction, scale, AdamState(kept, mu, nu)

    def corrections(self, count: jax.Array) -> tuple[Any, jax.Array]:
        """`(eps, scale)` of the update that makes the count this one."""
        correction = jnp.sqrt(debias(self.b2, count))
        return self.eps * (correction if self.convention == "torch" else 1), correction / debias(
            self.b1, count
        )

    def state_bytes(self, sizes: list[int]) -> int:
        """Formula: 4 bytes of count, and each element once in `mu_dtype` and once in `nu_dtype`."""
        return 4 + sum(sizes) * (
            jnp.dtype(self.mu_dtype).itemsize + jnp.dtype(self.nu_dtype).itemsize
        )

    def decays(self) -> dict[str, Any]:
        return {"first": self.b1, "second": self.b2}


@dataclasses.dataclass(frozen=True)
class FromOptax:
    """Any optax transformation as an inner one: scale 1, state as optax made it.

    Args:
      transformation: gradient-only, or told `params=True`. It is initialised for each matrix and
        may not couple leaves.
      params: hand it the parameter, projected as the gradient is (`PᵀW`).
      decay: decay rates by kind of moment, for transports that need them, for instance
        `(("first", 0.9),)`.

    >>> import optax, jax.numpy as jnp
    >>> lion = FromOptax(optax.scale_by_lion())
    >>> direction, scale, state = lion.update(jnp.array([0.5, -2.0]), lion.init(jnp.zeros(2)))
    >>> print(direction, scale)
    [ 1. -1.] 1.0
    """

    transformation: Any
    params: bool = False
    decay: tuple[tuple[str, float], ...] = ()
    splits = False

    def init(self, tree):
        return self.transformation.init(tree)

    def update(self, grads, state, params=None, **extra):
        update = optax.with_extra_args_support(self.transformation).update
        if params is None and self.params:
            raise ValueError("inner: params=True needs params; call update(grads, state, params)")
        try:
            direction, state = update(grads, state, params if self.params else None, **extra)
        except ValueError as error:
            if "params" in str(error) and not self.params:
                raise ValueError(
                    "inner: this optax transformation demands params; wrap it as "
                    "lrx.inner.from_optax(tx, params=True), which hands it the projected "
                    "parameter, or chain it outside scale_by_projection"
                ) from error
            raise
        return direction, jnp.ones((), jnp.float32), state

    def decays(self) -> dict[str, Any]:
        return dict(self.decay)


def guarded(inner: Inner, grads: Any, state: Any, params: Any, ok: Any, extra: dict[str, Any]):
    """`inner.update`, whose state stays where not `ok`.

    An inner that `guards` takes `ok` itself and derives its direction from the moments that it
    keeps: each moment is then read and written by one pass, in place, where a selection afterwards
    would need a copy of the old ones.
    """
    if ok is None:
        return inner.update(grads, state, params, **extra)
    if getattr(inner, "guards", False):
        return inner.update(grads, state, params, ok=ok, **extra)
    direction, scale, new = inner.update(grads, state, params, **extra)
    return direction, scale, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)


def as_inner(inner: Any) -> Inner:
    """`inner` itself, or an optax transformation wrapped."""
    if isinstance(inner, optax.GradientTransformation):
        return FromOptax(inner)
    if not isinstance(inner, Inner):
        raise ValueError(
            f"inner={inner!r} must be lrx.inner.adam(...) or an optax GradientTransformation"
        )
    return inner


def _quantized(x: Any) -> bool:
    return isinstance(x, linalg.QuantizedBlocks)


def _stored_like(old: Any, new: Any) -> Any:
    return old.requantize(new) if _quantized(old) else new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored8:
    """An inner transformation whose moments are stored in blocks of 8 bits, and computed in float32
    (8-bit Adam).

    First moments take the signed dynamic code, second and maximal ones the unsigned one; other
    leaves stay.

    Args:
      inner: what is stored, `lrx.inner.adam(...)` or another with registered moments.
      block: entries of a block along the last axis (256: bitsandbytes).
      minimum: moments of fewer entries stay as they are (4096: bitsandbytes).

    >>> import jax.numpy as jnp
    >>> state = Stored8(minimum=1).init(jnp.ones((4, 512)))
    >>> state.mu.codes.dtype.name, state.mu.scales.shape
    ('uint8', (4, 2))
    """

    inner: Any = dataclasses.field(default_factory=Adam)
    block: int = 256
    minimum: int = 4096
    guards = False

    def __post_init__(self):
        object.__setattr__(self, "inner", as_inner(self.inner))
        if isinstance(self.inner, Stored8):
            raise ValueError("stored8: inner is stored in 8 bits already; wrap it once")
        for name, least in (("block", 1), ("minimum", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(
                    f"stored8: {name}={value!r} must be an integer of at least {least}"
                )

    @property
    def splits(self) -> bool:
        return self.inner.splits

    @property
    def elementwise(self) -> bool:
        return getattr(self.inner, "elementwise", False)

    @property
    def params(self) -> bool:
        return getattr(self.inner, "params", False)

    def init(self, tree):
        return self.encode(self.inner.init(tree))

    def update(self, grads, state, params=None, **extra):
        direction, scale, new = self.inner.update(grads, self.decode(state), params, **extra)
        return direction, scale, jax.tree.map(_stored_like, state, new, is_leaf=_quantized)

    def encode(self, state: Any) -> Any:
        """Registered moments as `linalg.QuantizedBlocks`."""
        kinds = {moment.path: moment.kind for moment in moments(self.inner, state)}
        codes = {"first": "signed", "second": "unsigned", "max": "unsigned"}

        def one(path, value):
            code = codes.get(kinds.get(tuple(path), ""))
            small = math.prod(value.shape[-2:]) < self.minimum
            return (
                value if code is None or small else linalg.quantize_blocks(value, code, self.block)
            )

        return jax.tree_util.tree_map_with_path(one, state)

    def decode(self, state: Any) -> Any:
        """The state of `inner`."""
        return jax.tree.map(
            lambda x: x.dequantize() if _quantized(x) else x, state, is_leaf=_quantized
        )


def core(inner: Any) -> Inner:
    """The inner transformation without its storage."""
    return inner.inner if isinstance(inner, Stored8) else inner


def decoded(inner: Any, state: Any) -> tuple[Inner, Any]:
    """The inner transformation and its state without their storage."""
    return (inner.inner, inner.decode(state)) if isinstance(inner, Stored8) else (inner, state)


def encoded(inner: Any, state: Any) -> Any:
    """A decoded state as it is stored."""
    return inner.encode(state) if isinstance(inner, Stored8) else state


_REGISTRY: dict[type, tuple[dict[str, str], str | None]] = {}


def register_moments(state_type: type, kinds: dict[str, str], count: str | None = None) -> None:
    """Tells the moments protocol which fields of a state type are moments, and of which kind."""
    _REGISTRY[state_type] = (kinds, count)


register_moments(AdamState, {"mu": "first", "nu": "second"}, "count")
register_moments(optax.ScaleByAdamState, {"mu": "first", "nu": "second"}, "count")
register_moments(
    optax.ScaleByAmsgradState, {"mu": "first", "nu": "second", "nu_max": "max"}, "count"
)
register_moments(optax.ScaleByLionState, {"mu": "first"}, "count")
register_moments(optax.TraceState, {"trace": "first"})
register_moments(optax.ScaleByRmsState, {"nu": "second"})
register_moments(
    optax.FactoredState, {"v_row": "factored", "v_col": "factored", "v": "second"}, "count"
)


def moments(inner: Inner, state: Any) -> list[Moment]:
    """The registered moments inside a state of `inner`, in the order of its leaves."""
    decays = inner.decays() if hasattr(inner, "decays") else {}
    found: list[Moment] = []

    def visit(node, path):
        entry = _REGISTRY.get(type(node))
        if entry is not None:
            kinds, count = entry
            for field, kind in kinds.items():
                for inner_path, _ in jax.tree_util.tree_flatten_with_path(getattr(node, field))[0]:
                    where = (*path, jax.tree_util.GetAttrKey(field), *inner_path)
                    found.append(
                        Moment(
                            where, kind, decays.get(kind), getattr(node, count) if count else None
                        )
                    )
            return
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        for child_path, child in children:
            if child is not node:
                visit(child, (*path, *child_path))

    visit(state, ())
    return found


def by_leaf(state: Any) -> list[Any]:
    """The states of the single leaves of a tree, from the state of an `elementwise` inner
    transformation."""
    fields = tuple(_REGISTRY[type(state)][0])
    columns = [jax.tree.leaves(getattr(state, field), is_leaf=_quantized) for field in fields]
    return [
        state._replace(**dict(zip(fields, row, strict=True))) for row in zip(*columns, strict=True)
    ]


def of_leaves(inner: Inner, state: Any, parts: list[Any], ok: Any, extra: dict[str, Any]) -> Any:
    """State whose leaves moved to `parts`: the inverse of `by_leaf`. What they share, such as a
    count, moves too."""
    fields = _REGISTRY[type(state)][0]
    shared = guarded(inner, (), state._replace(**dict.fromkeys(fields, ())), None, ok, extra)[2]
    trees = {
        field: jax.tree.structure(getattr(state, field), is_leaf=_quantized) for field in fields
    }
    return shared._replace(
        **{
            field: jax.tree.unflatten(tree, [getattr(part, field) for part in parts])
            for field, tree in trees.items()
        }
    )


def map_moments(
    inner: Inner, state: Any, function: Callable[[Moment, jax.Array], jax.Array]
) -> Any:
    """`state` with every registered moment replaced by `function(moment, value)`."""
    by_path = {moment.path: moment for moment in moments(inner, state)}

    def visit(path, value):
        moment = by_path.get(tuple(path))
        return value if moment is None else function(moment, value).astype(value.dtype)

    return jax.tree_util.tree_map_with_path(visit, state)


def first_moment(inner: Inner, state: Any) -> tuple[Moment, jax.Array]:
    """The one first moment inside a state, for rules that need it; ValueError where there is none,
    or no count."""
    firsts = [moment for moment in moments(inner, state) if moment.kind == "first"]
    if len(firsts) != 1 or firsts[0].decay is None:
        raise ValueError(
            f"inner {type(inner).__name__} has {len(firsts)} registered first moments with a known "
            "decay; this rule needs exactly one: use lrx.inner.adam, or from_optax(tx, "
            "decay=(('first', 0.9),)) and register_moments"
        )
    values = {tuple(p): v for p, v in jax.tree_util.tree_flatten_with_path(state)[0]}
    return firsts[0], values[firsts[0].path]


adam = Adam
stored8 = Stored8
from_optax = FromOptax
