"""Do the slots keep their contracts? Asked once, at `init`, of shapes alone.

Each verb of a slot is traced with what its class says that it reads, and with nothing else. So a
forgotten declaration, or a result of another shape or structure, is told in the slot's own words
before any step, and costs nothing at a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim import inner as inner_lib
from lowrank_jax.projection.batches import layer_numbers
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.residuals import Combine
from lowrank_jax.projection.slots import Projection
from lowrank_jax.projection.state import READABLE, RefreshInputs, sketch_of
from lowrank_jax.projection.targets import Kept, Moved
from lowrank_jax.typing import Pytree, Shape

Struct = jax.ShapeDtypeStruct


class UndeclaredError(ValueError):
    """A verb read what its class does not say that it reads."""


class Verb:
    """A verb of a slot, as errors name it."""

    def __init__(self, slot: str, thing: Any, name: str, hint: str = ""):
        self.name = f"{slot} {type(thing).__name__}.{name}"
        self.hint = hint

    def __call__(self, function: Callable, *given: Any) -> Any:
        """The shapes of what `function` makes of these shapes."""
        try:
            return jax.eval_shape(function, *given)
        except UndeclaredError:
            raise
        except Exception as error:
            hint = f"; {self.hint}" if self.hint else ""
            raise ValueError(f"{self.name} fails on {shown(given)}: {error}{hint}") from error

    def refuse(self, found: Any, expected: str) -> NoReturn:
        raise ValueError(f"{self.name} returned {shown(found)}; return {expected}")

    def pair(self, found: Any, expected: str) -> tuple[Any, Any]:
        """`found`, which must be a pair."""
        if not isinstance(found, tuple) or len(found) != 2:
            self.refuse(found, expected)
        return found

    def shape(self, found: Any, *shapes: Shape, what: str) -> None:
        """Refuses anything but one floating-point array of one of these shapes."""
        is_floating = isinstance(found, Struct) and jnp.issubdtype(found.dtype, jnp.floating)
        if not is_floating or tuple(found.shape) not in shapes:
            self.refuse(found, f"{what}, float32 {' or '.join(map(str, shapes))}")

    def like(self, found: Pytree, old: Pytree, what: str) -> None:
        """Refuses a state that is not of the structure, the shapes and the kinds of the old one."""
        structures: list[Any] = [jax.tree.structure(tree) for tree in (found, old)]
        same = structures[0] == structures[1]
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(old), strict=False)
        if not same or not all(x.shape == y.shape and _kind(x) == _kind(y) for x, y in pairs):
            self.refuse(found, f"{what} as init makes it, {shown(old)}")

    def undeclared(self, name: str, remedy: str) -> Callable[..., NoReturn]:
        """What stands for an input that the class did not declare."""

        def refuse(*_: Any) -> NoReturn:
            raise UndeclaredError(f"{self.name} reads {name}, which is not there; {remedy}")

        return refuse


def _kind(x: Struct) -> Any:
    """Numbers of one kind are cast to the stored dtype; others must have it."""
    return "floating" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def shown(tree: Pytree) -> str:
    """Shapes and dtypes of a tree, in the structure that it has."""
    short = jax.tree.map(lambda x: _Text(f"{x.dtype}{list(x.shape)}"), tree)
    return str(short)


class _Text(str):
    __repr__ = str.__str__


class DeclaredInputs(RefreshInputs):
    """`RefreshInputs` that refuse a field which `reads` does not name."""

    def __getattribute__(self, name: str) -> Any:
        if name in READABLE and name not in object.__getattribute__(self, "_given"):
            object.__getattribute__(self, "_refuse")(name)
        return object.__getattribute__(self, name)


def inputs_for(verb: Verb, given: dict[str, Any], projector: Projector) -> RefreshInputs:
    """The inputs of a refresh, of which only `given` may be read."""
    inputs = DeclaredInputs(**given)

    def refuse(name: str) -> NoReturn:
        remedy = f"name it in reads, which is {sorted(projector.reads)}"
        if name in projector.reads:
            remedy = "this verb runs before it is made"
        verb.undeclared(f"inputs.{name}", remedy)()

    object.__setattr__(inputs, "_given", frozenset(given))
    object.__setattr__(inputs, "_refuse", refuse)
    return inputs


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The shapes of one leaf: what is projected, its low-rank object, and a basis."""

    config: Projection
    view: ResolvedView

    @property
    def matrix(self) -> Struct:
        return Struct(self.view.oriented, jnp.float32)

    @property
    def low(self) -> Struct:
        shape = (*self.view.batch, *self.config.projector.low_shape(self.view))
        return Struct(shape, jnp.float32)

    @property
    def keys(self) -> Struct:
        layers = layer_numbers(self.view)
        return jax.eval_shape(lambda: self.config.keys(self.view, jnp.int32(0), layers))

    def made(self) -> tuple[Pytree, Pytree]:
        """Basis and memory."""
        return jax.eval_shape(lambda keys: self.config.projector.init(self.view, keys), self.keys)


def different(config: Projection, views: list[ResolvedView | None]) -> Iterator[Leaf]:
    """The leaves whose shapes differ: one of each kind is asked."""
    kinds: dict[ResolvedView, ResolvedView] = {}
    for view in views:
        if view is not None:
            kinds.setdefault(dataclasses.replace(view, path="", spec=None), view)
    for view in kinds.values():
        yield Leaf(config, dataclasses.replace(view, spec=None))


def check_projector(leaf: Leaf) -> None:
    """ValueError where a verb of the projector does not keep its contract."""
    view, projector = leaf.view, leaf.config.projector
    projector.check(view)
    init = Verb("projector", projector, "init")
    made = init(lambda keys: projector.init(view, keys), leaf.keys)
    both = "(basis, memory), with () for no memory"
    basis, memory = init.pair(made, both)
    axes = len(view.batch)
    if any(x.shape[:axes] != view.batch for x in jax.tree.leaves(made)):
        init.refuse(made, f"arrays with the batch axes {view.batch} in front")
    _check_maps(leaf, basis)
    if projector.remembers and not projector.sees:
        raise ValueError(
            f"projector {type(projector).__name__} implements seen, which nobody calls: name what it "
            "looks at in sees, {'low'} or {'low', 'target'}"
        )
    if projector.sees:
        seen = Verb("projector", projector, "seen", "its target is None unless sees names 'target'")
        target = leaf.matrix if "target" in projector.sees else None
        found = seen(lambda *xs: projector.seen(view, *xs), basis, memory, leaf.low, target)
        seen.like(found, memory, "the memory")
    _check_moves(leaf, basis, memory)
    _check_overlap(leaf, basis)


def _check_maps(leaf: Leaf, basis: Pytree) -> None:
    """`down`, `up`, `rest` and `rounding`."""
    view, projector, matrix, low = leaf.view, leaf.config.projector, leaf.matrix, leaf.low
    down, up = Verb("projector", projector, "down"), Verb("projector", projector, "up")
    found = down(lambda *xs: projector.down(view, *xs), basis, matrix)
    down.shape(found, low.shape, what="the low-rank object, as low_shape says")
    found = up(lambda *xs: projector.up(view, *xs), basis, low)
    up.shape(found, matrix.shape, what="a matrix like the target")
    rest = Verb("projector", projector, "rest")
    found = rest(lambda *xs: projector.rest(view, *xs), basis, matrix, low)
    rest.shape(found, matrix.shape, what="a matrix like the target")
    rounding = Verb("projector", projector, "rounding")
    found = rounding(lambda x: x + projector.rounding(view, x), matrix)
    rounding.shape(found, matrix.shape, what="sizes that broadcast over the target")


def _check_moves(leaf: Leaf, basis: Pytree, memory: Pytree) -> None:
    """`sketch_basis`, `start` and `refresh`, each with the fields that are there."""
    view, projector = leaf.view, leaf.config.projector
    number, low = Struct((), jnp.int32), leaf.low
    there = {"target": leaf.matrix, "param": leaf.matrix, "momentum": low, "low": low}
    there |= {"step": number, "refreshes": number, "key": leaf.keys}
    there |= {"learning_rate": Struct((), jnp.float32)}
    given = {name: x for name, x in there.items() if name in projector.reads}
    if "sketch" in projector.reads:
        sketch_basis = Verb("projector", projector, "sketch_basis")
        early = {x: given[x] for x in given if x not in ("target", "param", "low")}

        def contracted(basis, memory, early):
            inputs = inputs_for(sketch_basis, early, projector)
            return projector.sketch_basis(view, basis, memory, inputs)

        found = sketch_basis(contracted, basis, memory, early)
        parts = found if isinstance(found, tuple) and len(found) == 2 else (found,)
        for part, size, name in zip(parts, (view.kept, view.shrunk), "ks", strict=False):
            width = part.shape[-1] if isinstance(part, Struct) and part.ndim else view.rank
            sketch_basis.shape(part, (*view.batch, size, width), what=f"a matrix of {name} rows")
        given["sketch"] = jax.eval_shape(sketch_of, leaf.matrix, found)
    if projector.starts:  # otherwise a first basis is a refresh of the one that init made
        start = Verb("projector", projector, "start")
        found = start(lambda g: projector.start(view, inputs_for(start, g, projector)), given)
        start.like(start.pair(found, "(basis, memory)"), (basis, memory), "basis and memory")
    if projector.moves:
        refresh = Verb("projector", projector, "refresh")

        def moved(basis, memory, given):
            inputs = inputs_for(refresh, given, projector)
            return projector.refresh(view, basis, memory, inputs)

        found = refresh(moved, basis, memory, given)
        refresh.like(refresh.pair(found, "(basis, memory)"), (basis, memory), "basis and memory")


def _change(leaf: Leaf, old: Pytree, new: Pytree) -> Any:
    """The overlap of two bases, inside a trace; None where nobody reads it."""
    config = leaf.config
    reads = (
        config.transport.moves or config.follows_basis or "change" in config.refresh_schedule.reads
    )
    return config.projector.overlap(leaf.view, old, new) if reads else None


def _check_overlap(leaf: Leaf, basis: Pytree) -> None:
    projector, schedule = leaf.config.projector, leaf.config.refresh_schedule
    overlap = Verb("projector", projector, "overlap")

    def applied(old, new, low):
        change = _change(leaf, old, new)
        cosines = change.cosines if "change" in schedule.reads and projector.moves else None
        return low if change is None else change.apply(low), cosines

    found, cosines = overlap(applied, basis, basis, leaf.low)
    overlap.shape(found, leaf.low.shape, what="a change whose apply(low) is like low")
    if cosines is not None:
        shape = (*leaf.view.batch, leaf.view.rank)
        overlap.shape(cosines, shape, what="a change whose cosines are (batch..., r)")


def check_other_slots(leaf: Leaf) -> None:
    """ValueError where a verb of any other slot does not keep its contract."""
    basis, _ = leaf.made()
    _check_inner(leaf)
    _check_target(leaf, basis)
    _check_residual(leaf, basis)
    _check_transport(leaf, basis)
    _check_schedule(leaf)


def _inner_state(leaf: Leaf) -> Pytree:
    inner, view = leaf.config.inner, leaf.view
    return jax.eval_shape(lambda low: inner.init_stack(low, view), leaf.low)


def _check_inner(leaf: Leaf) -> None:
    inner, view = leaf.config.inner, leaf.view
    if inner.takes_extra:  # what the caller of the optimizer passes is not known here
        return
    returns = "(direction, scale, state)"
    hint = f"it returns {returns}, and its params are None unless it says reads_params"
    update = Verb("inner", inner, "update", hint)
    state, params = _inner_state(leaf), leaf.low if inner.reads_params else None

    def step(low, state, params):
        return inner.update_stack(low, state, view, params)

    found = update(step, leaf.low, state, params)
    direction, scale, new = found
    update.shape(direction, leaf.low.shape, what=f"{returns} with a direction like the gradient")
    if getattr(scale, "shape", ()) not in ((), view.batch):
        update.refuse(found, f"{returns} with one number as scale")
    update.like(new, state, f"{returns} with a state")


def _first(leaf: Leaf, state: Pytree) -> tuple[Any, Any, Any]:
    """First moment, once before and once after a refresh, and its decay, inside a trace."""
    inner = leaf.config.inner
    firsts = [moment for moment in inner.moments(state) if moment.kind == "first"]
    if len(firsts) != 1 or firsts[0].decay is None:
        return None, None, None
    moment, value = inner_lib.first_moment(inner, state)
    return value, value, moment.decay


def _moved(leaf: Leaf, basis: Pytree, inner: Pytree) -> Moved:
    """What a state that follows the basis is told, inside a trace."""
    view, projector = leaf.view, leaf.config.projector
    lift = lambda low: projector.up(view, basis, low)  # noqa: E731
    change = _change(leaf, basis, basis)
    return Moved(view, lift, lift, change, *_first(leaf, leaf.config.inner.decoded(inner)))


def _check_moved(leaf: Leaf, slot: str, thing: Any, basis: Pytree, state: Pytree) -> None:
    """`moved` of a target or a residual rule that follows the basis."""
    if not thing.follows_basis:
        return
    moved = Verb(slot, thing, "moved")

    def move(state, basis, inner):
        return thing.moved(state, _moved(leaf, basis, inner))

    moved.like(moved(move, state, basis, _inner_state(leaf)), state, "the state")


def _check_target(leaf: Leaf, basis: Pytree) -> None:
    view, target, projector = leaf.view, leaf.config.target, leaf.config.projector
    state = jax.eval_shape(lambda: target.init(view))
    take, kept = Verb("target", target, "take"), Verb("target", target, "kept")
    matrix, left = take.pair(take(target.take, state, leaf.matrix), "(K, state)")
    take.shape(matrix, leaf.matrix.shape, what="(K, state) with K like the gradient")
    take.like(left, state, "(K, state) with a state")

    def keep(state, matrix, low, basis):
        lift = lambda low: projector.up(view, basis, low)  # noqa: E731
        rest = lambda: projector.rest(view, basis, matrix, low)  # noqa: E731
        if target.reads_gradient:
            return target.kept(state, Kept(view, matrix, low, lift, rest))
        return target.kept(
            state,
            _without_target(kept, Kept, "reads_gradient")(
                view, None, low, lift, _refused(kept, "rest", "reads_gradient")
            ),
        )

    kept.like(kept(keep, left, leaf.matrix, leaf.low, basis), state, "the state")
    _check_moved(leaf, "target", target, basis, state)


def _refused(verb: Verb, name: str, declaration: str) -> Callable[..., NoReturn]:
    return verb.undeclared(f"its {name}", f"set {declaration} = True in the class")


def _without_target(verb: Verb, record: type, declaration: str) -> type:
    """A record whose `target` may not be read."""
    return type(
        record.__name__,
        (record,),
        {"target": property(_refused(verb, "target", declaration))},
    )


def _check_residual(leaf: Leaf, basis: Pytree) -> None:
    config, view, rule = leaf.config, leaf.view, leaf.config.residual
    projector = config.projector
    state = jax.eval_shape(lambda: rule.init(view))
    combine = Verb("residual", rule, "combine")
    scale = Struct(view.batch, jnp.float32)

    def combined(state, matrix, low, scale, basis):
        made = {
            "rest": lambda: projector.rest(view, basis, matrix, low),
            "rounding": lambda: projector.rounding(view, matrix),
        }
        record: type = Combine
        if not rule.reads_target:
            matrix, record = None, _without_target(combine, Combine, "reads_target")
            made = {name: _refused(combine, name, "reads_target") for name in made}
        lift = lambda low: projector.up(view, basis, low)  # noqa: E731
        return rule.combine(
            record(
                view=view, lift=lift, **made, target=matrix, low=low, direction=low,
                inner_scale=scale, scale=1.0, state=state,
            )
        )  # fmt: skip

    found = combine(combined, state, leaf.matrix, leaf.low, scale, basis)
    update, new = combine.pair(found, "(update, state)")
    combine.shape(update, leaf.matrix.shape, what="(update, state) with an update like the target")
    combine.like(new, state, "(update, state) with a state")
    _check_moved(leaf, "residual", rule, basis, state)


def _check_transport(leaf: Leaf, basis: Pytree) -> None:
    transport, inner = leaf.config.transport, leaf.config.inner
    if not transport.moves:
        return
    move = Verb("transport", transport, "move")
    decoded = jax.eval_shape(inner.decoded, _inner_state(leaf))

    def moved(state, basis):
        return transport.move(inner, state, state, _change(leaf, basis, basis))

    move.like(move(moved, decoded, basis), decoded, "the inner state")


def _check_schedule(leaf: Leaf) -> None:
    schedule, view = leaf.config.refresh_schedule, leaf.view
    batch = view.batch if schedule.per_layer else ()
    low_shape = leaf.low.shape[len(view.batch) :]
    state = jax.eval_shape(lambda: schedule.state_for(batch, low_shape))
    step = Struct((), jnp.int32)
    due = Verb("refresh_schedule", schedule, "due")
    found = due(lambda *xs: jnp.asarray(schedule.due(*xs)), state, step)
    if found.dtype != jnp.bool_ or found.shape not in ((), batch):
        due.refuse(found, f"a bool of shape {batch}")
    vector = Struct((*batch, view.rank), jnp.float32) if "change" in schedule.reads else None
    number = Struct(batch, jnp.float32) if "captured" in schedule.reads else None
    refreshed = Verb(
        "refresh_schedule", schedule, "refreshed", "change is None unless reads names 'change'"
    )
    found = refreshed(lambda s, n, x: schedule.refreshed(s, step=n, change=x), state, step, vector)
    refreshed.like(found, state, "the state")
    advance = Verb(
        "refresh_schedule", schedule, "advance", "captured is None unless reads names 'captured'"
    )
    given = {"captured": number} | ({"low": leaf.low} if "low" in schedule.reads else {})
    found = advance(lambda s, n, xs: schedule.advance(s, step=n, **xs), state, step, given)
    advance.like(found, state, "the state")
