"""Slots of somebody's own that break their contract: each is named at `init`, with the remedy."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.projectors.base import Projector
from lowrank_jax.projection.projectors.wrapped import Wrapped

PARAMS = {"kernel": jnp.ones((3, 8, 12)), "dense": {"kernel": jnp.ones((8, 12))}}
VIEWS = lrx.Views(stacked=("kernel",))


class Svd(type(lrx.projectors.svd(rank=2))):
    """A projector to get wrong."""


class Both(lrx.projectors.alternating_two_sided):
    """A projector that reads a sketch of both sides, to get wrong."""


class Rule(lrx.residuals.Residual):
    """A residual rule to get wrong."""

    def combine(self, c):
        return c.step(), c.state


class Goal(lrx.targets.Target):
    """A target to get wrong."""


class Direction(lrx.inner.Inner):
    """An inner transformation to get wrong."""

    def init(self, tree, view=None):
        return jnp.zeros(())

    def update(self, grads, state, *, view=None, params=None, **extra):
        return grads, 1.0, state


class Times(lrx.refresh_schedules.RefreshSchedule):
    """A refresh schedule to get wrong."""

    def init(self, batch):
        return jnp.zeros(batch, jnp.int32)

    def due(self, state, step):
        return step == state


class Move(lrx.transports.Transport):
    """A transport to get wrong."""

    def move(self, inner, state, fresh, change):
        return state


class Wrong(NamedTuple):
    """A slot, what is wrong with it, and what the error must say."""

    slot: str
    base: type
    methods: dict[str, Any]
    message: str


def reads(name):
    def refresh(self, view, basis, memory, inputs):
        return basis * 1.0 + 0 * jnp.sum(getattr(inputs, name)), memory

    return refresh


def field(name):
    return lambda self, c: (c.step() + 0 * getattr(c, name), c.state)


WRONG = {
    f"reads-{name}": Wrong(
        "projector", Svd, {"refresh": reads(name)}, f"Svd.refresh reads inputs.{name}.*name it in"
    )
    for name in ("momentum", "param", "sketch", "low", "learning_rate", "refreshes", "step")
} | {
    "init-alone": Wrong(
        "projector",
        Svd,
        {"init": lambda self, view, keys: jnp.zeros((*view.batch, view.shrunk, view.rank))},
        r"Svd.init returned float32\[.*return \(basis, memory\)",
    ),
    "init-batch": Wrong(
        "projector",
        Svd,
        {"init": lambda self, view, keys: (jnp.zeros((view.shrunk, view.rank)), ())},
        "Svd.init returned.*batch axes",
    ),
    "refresh-alone": Wrong(
        "projector",
        Svd,
        {"refresh": lambda self, view, basis, memory, inputs: basis},
        r"Svd.refresh returned float32\[.*return \(basis, memory\)",
    ),
    "refresh-memory": Wrong(
        "projector",
        Svd,
        {"refresh": lambda self, view, basis, memory, inputs: (basis, basis)},
        "Svd.refresh returned.*as init makes it",
    ),
    "refresh-shape": Wrong(
        "projector",
        Svd,
        {"refresh": lambda self, view, basis, memory, inputs: (basis[..., :1], memory)},
        "Svd.refresh returned.*as init makes it",
    ),
    "refresh-kind": Wrong(
        "projector",
        Svd,
        {"refresh": lambda self, view, basis, memory, i: (basis.astype(jnp.int32), memory)},
        r"Svd.refresh returned \(int32.*as init makes it",
    ),
    "sketch-pair": Wrong(
        "projector",
        Both,
        {
            "sketch_basis": lambda self, view, basis, memory, inputs: (
                basis[1],
                basis[1][..., :1, :],
            )
        },
        "Both.sketch_basis returned.*return a matrix of s rows",
    ),
    "start": Wrong(
        "projector",
        Svd,
        {"start": lambda self, view, inputs: (inputs.target, ())},
        "Svd.start returned.*as init makes it",
    ),
    "start-reads": Wrong(
        "projector",
        Svd,
        {"start": lambda self, view, inputs: (inputs.param, ())},
        "Svd.start reads inputs.param.*name it in reads",
    ),
    "seen-uncalled": Wrong(
        "projector",
        Svd,
        {"seen": lambda self, view, basis, memory, low, target: memory},
        "Svd implements seen.*name what it looks at in sees",
    ),
    "seen-target": Wrong(
        "projector",
        Svd,
        {
            "sees": frozenset({"low"}),
            "seen": lambda self, view, basis, memory, low, target: target * 1.0,
        },
        "Svd.seen fails on.*unless sees names 'target'",
    ),
    "seen-shape": Wrong(
        "projector",
        Svd,
        {
            "sees": frozenset({"low"}),
            "seen": lambda self, view, basis, memory, low, target: low,
        },
        "Svd.seen returned.*the memory as init makes it",
    ),
    "down": Wrong(
        "projector",
        Svd,
        {"down": lambda self, view, basis, x: x},
        "Svd.down returned.*the low-rank object, as low_shape says",
    ),
    "up": Wrong("projector", Svd, {"up": lambda self, view, basis, low: low}, "Svd.up returned"),
    "rest": Wrong(
        "projector",
        Svd,
        {"rest": lambda self, view, basis, target, low: low},
        "Svd.rest returned",
    ),
    "rounding": Wrong(
        "projector",
        Svd,
        {"rounding": lambda self, view, target: jnp.zeros((5, 1, 1, 1))},
        "Svd.rounding returned",
    ),
    "overlap": Wrong(
        "projector",
        Svd,
        {"overlap": lambda self, view, old, new: old},
        "Svd.overlap fails on",
    ),
    "combine-target": Wrong(
        "residual",
        Rule,
        {"combine": field("target")},
        "Rule.combine reads its target.*reads_target",
    ),
    "combine-rest": Wrong(
        "residual",
        Rule,
        {"combine": lambda self, c: (c.step() + c.rest(), c.state)},
        "Rule.combine reads its rest.*set reads_target = True",
    ),
    "combine-rounding": Wrong(
        "residual",
        Rule,
        {"combine": lambda self, c: (c.step() + c.rounding(), c.state)},
        "Rule.combine reads its rounding.*set reads_target = True",
    ),
    "combine-alone": Wrong(
        "residual", Rule, {"combine": lambda self, c: c.step()}, r"return \(update, state\)"
    ),
    "combine-low": Wrong(
        "residual",
        Rule,
        {"combine": lambda self, c: (c.direction, c.state)},
        r"Rule.combine returned.*like the target, float32 \(.*8, 12\)",
    ),
    "combine-state": Wrong(
        "residual",
        Rule,
        {"combine": lambda self, c: (c.step(), c.low)},
        "Rule.combine returned.*a state as init makes it",
    ),
    "residual-moved": Wrong(
        "residual",
        Rule,
        {"follows_basis": True, "moved": lambda self, state, m: m.before},
        "Rule.moved returned.*the state as init makes it",
    ),
    "take": Wrong(
        "target", Goal, {"take": lambda self, state, g: g}, r"Goal.take returned.*\(K, state\)"
    ),
    "kept-target": Wrong(
        "target",
        Goal,
        {"init": lambda self, view: jnp.zeros(view.oriented), "kept": lambda self, s, k: k.target},
        "Goal.kept reads its target.*set reads_gradient = True",
    ),
    "kept-rest": Wrong(
        "target",
        Goal,
        {"init": lambda self, view: jnp.zeros(view.oriented), "kept": lambda self, s, k: k.rest()},
        "Goal.kept reads its rest.*set reads_gradient = True",
    ),
    "kept-state": Wrong(
        "target", Goal, {"kept": lambda self, s, k: k.low}, "Goal.kept returned.*as init makes it"
    ),
    "inner-params": Wrong(
        "inner",
        Direction,
        {"update": lambda self, g, state, *, view=None, params=None: (g + params, 1.0, state)},
        "Direction.update fails on.*reads_params",
    ),
    "inner-pair": Wrong(
        "inner",
        Direction,
        {"update": lambda self, g, state, *, view=None, params=None: (g, state)},
        r"Direction.update fails on.*it returns \(direction, scale, state\)",
    ),
    "inner-state": Wrong(
        "inner",
        Direction,
        {"update": lambda self, g, state, *, view=None, params=None: (g, 1.0, g)},
        "Direction.update returned.*with a state as init makes it",
    ),
    "inner-scale": Wrong(
        "inner",
        Direction,
        {"update": lambda self, g, state, *, view=None, params=None: (g, g, state)},
        "Direction.update returned.*one number as scale",
    ),
    "due": Wrong(
        "refresh_schedule",
        Times,
        {"due": lambda self, state, step: step},
        r"Times.due returned int32\[\]; return a bool",
    ),
    "refreshed": Wrong(
        "refresh_schedule",
        Times,
        {"refreshed": lambda self, state, *, step, change: (state, change)},
        "Times.refreshed returned.*as init makes it",
    ),
    "refreshed-reads": Wrong(
        "refresh_schedule",
        Times,
        {"refreshed": lambda self, state, *, step, change: state + change.size},
        "Times.refreshed fails on.*unless reads names 'change'",
    ),
    "advance": Wrong(
        "refresh_schedule",
        Times,
        {"advance": lambda self, state, *, step, captured: state + captured.size},
        "Times.advance fails on.*unless reads names 'captured'",
    ),
    "move": Wrong(
        "transport",
        Move,
        {"move": lambda self, inner, state, fresh, change: change.apply(state.mu)},
        "Move.move returned.*the inner state as init makes it",
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_declaration_is_told_at_init(wrong):
    name = wrong.base.__name__
    own = type(name, (wrong.base,), wrong.methods)
    slots = {"projector": lrx.projectors.svd(rank=2), "plain": lrx.inner.adam()}
    slots |= {"transport": lrx.transports.rotate()} if wrong.slot == "projector" else {}
    slots[wrong.slot] = own(rank=2) if wrong.slot == "projector" else own()
    tx = lrx.scale_by_projection(views=VIEWS, **slots)
    with pytest.raises(ValueError, match=f"(?s){wrong.slot} .*{wrong.message}"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    "slot, base", list(dict.fromkeys((x.slot, x.base) for x in WRONG.values()))
)
def test_what_the_wrong_ones_are_made_of_is_right(slot, base):
    slots = {"projector": lrx.projectors.svd(rank=2), "plain": lrx.inner.adam()}
    slots[slot] = base(rank=2) if slot == "projector" else base()
    tx = lrx.scale_by_projection(views=VIEWS, **slots)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_sampled_layers_and_optax_arguments_are_no_broken_contract():
    """What the caller of the optimizer passes on is not known at `init`."""

    def update(updates, state, params=None, *, loss, **extra):
        return jax.tree.map(lambda u: u * loss, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = lrx.scale_by_projection(lrx.projectors.svd(rank=2), inner=tx, views=VIEWS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=2.0)
    assert bool(jnp.all(jnp.isfinite(updates["kernel"])))


@dataclasses.dataclass(frozen=True)
class Matrices(lrx.inner.Inner):
    """Asks its view, as one for single matrices may."""

    def init(self, tree, view=None):
        return jnp.zeros((view.fan_in,))

    def update(self, grads, state, *, view=None, params=None, **extra):
        return jnp.sign(grads), 1 / view.fan_in, state


def test_an_inner_for_matrices_is_never_called_on_other_leaves():
    tx = lrx.scale_by_projection(lrx.projectors.svd(rank=2), inner=Matrices(), views=VIEWS)
    state = tx.init(PARAMS)
    assert state.plain == ()
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert state.plain == () and bool(jnp.any(updates["kernel"] != 0))
    with pytest.raises(ValueError, match=r"inner Matrices .* 1 leaves .*plain=lrx.inner.adam"):
        tx.init(PARAMS | {"bias": jnp.ones(3)})


def test_a_wrapped_projector_leaves_no_verb_to_its_default():
    public = {name for name in vars(Projector) if not name.startswith("_")}
    assert public - {"rank"} <= vars(Wrapped).keys()


def test_what_a_switch_does_with_a_basis_is_what_its_projectors_do():
    hat = lrx.projectors.dct(rank=3)
    switch = lrx.projectors.switch(at=2, first=hat, then=hat)
    x = jax.random.normal(jax.random.key(0), (8, 12))
    view = lrx.resolution.resolve({"kernel": x}, rank=switch.rank_for).projected[0]
    basis, _ = hat.init(view, jax.random.key(0))
    low = hat.down(view, basis, x)
    for verb, given in {
        "down": (basis, x),
        "up": (basis, low),
        "rest": (basis, x, low),
        "measure": (basis, x),
    }.items():
        ours, own = (getattr(p, verb)(view, *given) for p in (switch, hat))
        assert bool(jnp.all(ours == own)), verb
    assert bool(jnp.all(switch.rounding(view, x) == hat.rounding(view, x)))
    assert switch.of_range == hat.of_range and switch.basis_bytes(view) == hat.basis_bytes(view)


class Norms(lrx.residuals.Residual):
    """A rule with a state, whose bytes nobody writes by hand."""

    def init(self, view):
        return {"norm": jnp.zeros(view.batch), "seen": jnp.zeros((*view.batch, 2), jnp.bfloat16)}

    def combine(self, c):
        return c.step(), c.state


class Remembers(Svd):
    """A projector with a memory."""

    def init(self, view, keys):
        return super().init(view, keys)[0], jnp.zeros((*view.batch, view.shrunk))


def test_bytes_of_a_state_follow_from_what_init_makes():
    tx = lrx.scale_by_projection(Remembers(rank=2), residual=Norms(), views=VIEWS)
    for matrix in tx.init(PARAMS).matrices["kernel"], tx.init(PARAMS).matrices["dense"]["kernel"]:
        count = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
        assert Norms().state_bytes(matrix.view) == count(matrix.residual)
        assert Remembers(rank=2).memory_bytes(matrix.view) == count(matrix.memory)
