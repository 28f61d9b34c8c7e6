"""Slots that a user writes: a memory, a schedule that decides by layers, a rate that is read."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax import linalg
from lowrank_jax.projection import placement
from lowrank_jax.projection.projectors.base import StoredProjector

VIEWS = lrx.Views(stacked=("layers/.*",))
RNG = np.random.default_rng(0)
PARAMS = {"layers": {"kernel": jnp.asarray(RNG.normal(size=(3, 6, 6)) / 3, jnp.float32)}}
BATCHES = [jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32) for _ in range(5)]
STACK = lrx.projection.Stack(
    before=lambda rest, x: x,
    layer=lambda layer, x: x + jnp.tanh(lrx.matmul(x, layer["kernel"])),
    after=lambda rest, x, _: jnp.mean(x**2),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByLayer(lrx.refresh_schedules.RefreshSchedule):
    """After a refresh the next one of a layer comes later the more its first vector stayed."""

    per_layer: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"change", "captured"})

    def init(self, batch):
        return {"next": jnp.zeros(batch, jnp.int32), "captured": jnp.zeros(batch)}

    def due(self, state, step):
        return step >= state["next"]

    def refreshed(self, state, *, step, change=None):
        wait = 1 + (change[..., 0] > 0.5).astype(jnp.int32)
        return state | {"next": step + wait}

    def advance(self, state, *, step, captured=None):
        return state | {"captured": captured}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(StoredProjector):
    """A power step from what the last accepted step saw; the first basis is the range of the rows."""

    starts_before: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"target", "learning_rate", "refreshes"})
    sees: ClassVar[frozenset[str]] = frozenset({"low"})
    rate: Any = None

    def init(self, view, keys):
        basis, _ = super().init(view, keys)
        return basis, jnp.ones((*view.batch, view.kept, view.rank))

    def start(self, view, inputs):
        basis = linalg.orthonormalize(inputs.target[..., : view.rank])
        return self.store(view, basis), 2 * jnp.ones((*view.batch, view.kept, view.rank))

    def refresh(self, view, basis, memory, inputs):
        made = inputs.target @ memory + inputs.learning_rate * self.columns(view, basis)
        return self.store(view, linalg.orthonormalize(made)), memory

    def seen(self, view, basis, memory, low, target):
        assert target is None  # it is not named in `sees`
        return jnp.swapaxes(low, -1, -2) + 0.5 * memory


def remembering(when, **options):
    return lrx.galore(
        0.1,
        projector=Remembering(rank=2),
        refresh_schedule=lrx.refresh_schedules.every(period=2, when=when),
        views=VIEWS,
        **options,
    )


def by_layer(**options):
    return lrx.galore(0.1, rank=2, refresh_schedule=ByLayer(), views=VIEWS, eps=1e-3, **options)


# Projectors of the library whose first basis is made before the first update, and that have no
# `start` of their own: of the gradient, of a sketch of it, and of keys alone.
@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlySvd(type(lrx.projectors.svd(rank=2))):
    starts_before: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlySketch(type(lrx.projectors.alternating(rank=2))):
    starts_before: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyKeys(type(lrx.projectors.random(rank=2))):
    starts_before: ClassVar[bool] = True


EARLY = {
    "svd": EarlySvd(rank=2),
    "sketch": EarlySketch(rank=2),
    "keys": EarlyKeys(rank=2, kind="orthonormal"),
}
AFTER = lrx.refresh_schedules.every(period=2, when="after", phase=1)


def early(name, schedule=AFTER, **options):
    return lrx.galore(
        0.1, projector=EARLY[name], refresh_schedule=schedule, views=VIEWS, eps=1e-3, **options
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTurn(lrx.refresh_schedules.RefreshSchedule):
    """One layer a step, and all of them where the state of the tree says so."""

    def init(self, batch):
        return jnp.zeros(batch, jnp.int32)

    def due(self, state, step):
        return state % 4 == 0

    def slice(self, step, phase, layers):
        return step % layers, 1

    def refreshed(self, state, *, step, change=None):
        return state + 1


OWN = {
    "lazy": lambda **options: lrx.galore(
        0.1,
        rank=2,
        refresh_schedule=lrx.refresh_schedules.lazy(period=1, threshold=0.0, queue=1),
        views=VIEWS,
        eps=1e-3,
        **options,
    ),
    "in turn": lambda **options: lrx.galore(
        0.1, rank=2, refresh_schedule=InTurn(), views=VIEWS, eps=1e-3, **options
    ),
    "early svd": lambda **options: early("svd", **options),
    "early svd, lazy": lambda **options: early(
        "svd", lrx.refresh_schedules.lazy(period=2, when="after"), **options
    ),
    "early sketch": lambda **options: early("sketch", **options),
    "early keys": lambda **options: early("keys", **options),
    "early keys, clipped": lambda **options: early("keys", clip_norm=0.05, **options),
    "by layer": by_layer,
    "by layer, clipped": lambda **options: by_layer(clip_norm=0.05, **options),
    "memory before": lambda **options: remembering("before", **options),
    "memory after": lambda **options: remembering("after", **options),
    "momentum": lambda **options: lrx.galore(
        0.1, rank=2, target=lrx.targets.momentum(), views=VIEWS, eps=1e-3, **options
    ),
}


def run(step, tx):
    step, params, state = jax.jit(step), PARAMS, tx.init(PARAMS)
    for batch in BATCHES:
        params, state, _ = step(params, state, batch)
    return params, state


def optax_step(tx):
    def step(params, state, batch):
        value, grads = jax.value_and_grad(STACK.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


@pytest.mark.parametrize("name", OWN)
def test_all_forms_are_one(name):
    tx = OWN[name]()
    expected = run(optax_step(tx), tx)
    for step in (lrx.train_step(STACK.loss, tx), lrx.layerwise_step(STACK, tx)):
        found = run(step, tx)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), found, expected)


@pytest.mark.parametrize("name", OWN)
def test_a_skipped_step_leaves_memories_and_schedules(name):
    tx = OWN[name]()
    _, state = run(optax_step(tx), tx)
    bad = {"layers": {"kernel": jnp.full((3, 6, 6), jnp.nan)}}
    _, after = jax.jit(tx.update)(bad, state, PARAMS)
    assert int(after.projection.skipped) == 1
    same = after._replace(projection=after.projection._replace(skipped=jnp.int32(0)))
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_each_layer_moves_when_its_own_state_says_so():
    tx = by_layer()
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    still = np.stack([np.diag([6.0, 5, 4, 3, 2, 1])] * 3)
    moved = []
    for step in range(5):  # the last layer's first vector is another axis at each step
        grads = still.copy()
        grads[2] = np.roll(grads[2], (step, step), axis=(0, 1))
        before = state.projection.matrices["layers"]["kernel"]
        _, state = update({"layers": {"kernel": jnp.asarray(grads, jnp.float32)}}, state, PARAMS)
        own = state.projection.matrices["layers"]["kernel"]
        moved.append(np.asarray(own.refresh_schedule["next"] != before.refresh_schedule["next"]))
    first, last = np.stack(moved)[:, 0], np.stack(moved)[:, 2]
    assert first.tolist() == [True, False, True, False, True]
    assert last.tolist() == [True, False, True, True, True]
    captured = own.refresh_schedule["captured"]
    assert captured.shape == (3,) and np.all((captured > 0) & (captured <= 1))


def test_the_first_basis_is_made_before_the_first_update():
    tx = remembering("after")
    assert lrx.projection.gradient_mode(tx.projection) == "full at a refresh"
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    own = state.projection.matrices["layers"]["kernel"]
    view = own.view
    expected = linalg.orthonormalize(view.orient(PARAMS["layers"]["kernel"])[..., :2])
    np.testing.assert_allclose(own.basis, expected, atol=1e-5)


def test_a_rate_that_is_read_must_be_passed():
    tx = lrx.scale_by_projection(Remembering(rank=2), views=VIEWS)
    with pytest.raises(ValueError, match="Remembering reads the learning rate.*learning_rate=rate"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, learning_rate=0.1)


@pytest.mark.parametrize(
    "name, mode",
    [("svd", "full at a refresh"), ("sketch", "sketch at a refresh"), ("keys", "taps")],
)
def test_after_the_first_step_gradients_come_projected(name, mode):
    """And a step whose first basis has no gradient to be made of is skipped."""
    tx = early(name)
    assert lrx.projection.gradient_mode(tx.projection) == mode
    state = tx.init(PARAMS)
    low = lrx.projected_value_and_grad(STACK.loss, lrx.taps(state))
    _, grads = low(PARAMS, BATCHES[0])
    _, after = tx.update(grads, state, PARAMS, taps=lrx.taps(state))
    assert (int(after.projection.skipped), int(after.projection.step)) == (1, 0)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert int(state.projection.refreshes) == 1  # though the schedule is not due at step 0
    state = state._replace(projection=state.projection._replace(step=jnp.int32(2)))
    low = lrx.projected_value_and_grad(STACK.loss, lrx.taps(state))
    _, grads = low(PARAMS, BATCHES[0])
    _, after = tx.update(grads, state, PARAMS, taps=lrx.taps(state))
    assert int(after.projection.skipped) == 0


def test_a_first_basis_counts_for_the_schedule_of_its_layer():
    tx = early("svd", lrx.refresh_schedules.lazy(period=3, when="after"))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    own = state.projection.matrices["layers"]["kernel"].refresh_schedule
    assert own["refreshes"].tolist() == [1, 1, 1] and own["next"].tolist() == [3, 3, 3]


def test_a_schedule_of_the_tree_with_a_state_moves_slices():
    tx = OWN["in turn"]()
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    moved = []
    for batch in BATCHES:
        old = state.projection.matrices["layers"]["kernel"].basis
        grads = jax.grad(STACK.loss)(PARAMS, batch)
        _, state = update(grads, state, PARAMS)
        new = state.projection.matrices["layers"]["kernel"].basis
        moved.append(np.any(np.asarray(old != new), axis=(1, 2)).tolist())
    assert state.projection.refresh_schedule.dtype == jnp.int32
    layer = lambda i: [i == number for number in range(3)]  # noqa: E731
    assert moved == [[True] * 3, layer(1), layer(2), layer(0), [True] * 3]


def test_a_schedule_decides_by_layers_or_by_slices():
    wrong = type("Both", (InTurn,), {"per_layer": True})
    with pytest.raises(ValueError, match="Both: per_layer .* slice .* implement one"):
        lrx.galore(0.1, rank=2, refresh_schedule=wrong())


def test_clipping_is_by_what_the_step_is_made_of():
    """A memory or a schedule that looks at the full gradient changes nothing of it."""
    grads = {"layers": {"kernel": 3 * PARAMS["layers"]["kernel"]}}

    class Looks(type(lrx.projectors.dct(rank=2))):
        sees: ClassVar[frozenset[str]] = frozenset({"target"})

    for projector in (lrx.projectors.dct(rank=2), Looks(rank=2)):
        tx = lrx.scale_by_projection(
            projector, inner=optax.identity(), clip_norm=0.5, views=VIEWS, residual=None
        )
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


@pytest.mark.parametrize("field", ["reads", "sees"])
def test_what_a_projector_reads_has_a_name_of_the_inputs(field):
    wrong = type("Wrong", (Remembering,), {field: frozenset({"grad"})})
    with pytest.raises(ValueError, match="projector Wrong: reads=.*must name fields"):
        lrx.scale_by_projection(wrong(rank=2))


def test_a_schedule_of_the_tree_reads_no_matrices():
    wrong = type("Wrong", (ByLayer,), {"per_layer": False})
    with pytest.raises(ValueError, match="Wrong: reads=.*set per_layer"):
        lrx.galore(0.1, rank=2, refresh_schedule=wrong())


def test_every_option_is_in_the_signature():
    import inspect

    for name in ("galore", "dct_adamw", "frugal", "ldadam", "apollo", "apollo_mini"):
        parameters = inspect.signature(getattr(lrx, name)).parameters
        assert {"inner", "refresh_schedule", "target", "mask", "clip_norm", "seed"} <= set(
            parameters
        )
        assert not any(x.kind is x.VAR_KEYWORD for x in parameters.values())
    with pytest.raises(TypeError, match="unknown options.*rnak"):
        lrx.galore(0.1, rank=2, rnak=3)


@pytest.mark.parametrize("recipe", [lrx.lisa, lrx.badam])
def test_a_sampler_that_finds_no_layer_is_an_error(recipe):
    params = {f"stage{i}": {"kernel": jnp.ones((4, 6))} for i in range(2)}
    with pytest.raises(ValueError, match=r"no matrix belongs to a layer.*stage0/kernel"):
        recipe(1e-2).init(params)


def test_a_schedule_by_layers_may_keep_one_array():
    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class OnceMore(lrx.refresh_schedules.RefreshSchedule):
        per_layer = True

        def init(self, batch):
            return jnp.zeros(batch, jnp.int32)

        def due(self, state, step):
            return state == 0

        def refreshed(self, state, *, step, change=None):
            return state + 1

        def advance(self, state, *, step, captured=None):
            return state

    tx = lrx.scale_by_projection(lrx.projectors.svd(rank=2), refresh_schedule=OnceMore())
    params = {"kernel": jnp.ones((4, 6))}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert int(state.matrices["kernel"].refresh_schedule) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: lrx.projectors.identity(rank=2),
        lambda: lrx.projectors.given(matrix=jnp.eye(4, 2), rank=3),
        lambda: lrx.projectors.switch(
            at=1, first=lrx.projectors.svd(rank=2), then=lrx.projectors.svd(rank=2), rank=3
        ),
    ],
)
def test_a_rank_that_nothing_reads_is_refused(build):
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        build()


class HalfOfTheShorter(type(lrx.projectors.svd(rank=2))):
    """A rank that depends on both dimensions."""

    def rank_for(self, path, shrunk, kept):
        return min(shrunk, kept) // 2


def test_a_rank_may_depend_on_both_dimensions():
    params = {"kernel": jnp.ones((12, 8))}
    for side in ("rows", "cols"):
        tx = lrx.scale_by_projection(HalfOfTheShorter(rank=1), side=side)
        assert tx.init(params).matrices["kernel"].view.rank == 4
    report = lrx.resolution.resolve(
        params, rank=lambda path, shrunk: shrunk // 4
    )  # as much as it takes
    assert report.projected[0].rank == 2


class Decayed(type(lrx.inner.adam())):
    """Adam that adds a part of the parameter to the gradient, entry by entry."""

    reads_params = True

    def update(self, grads, state, *, view=None, params=None, **extra):
        grads = jax.tree.map(lambda g, w: g + 0.1 * w, grads, params)
        return super().update(grads, state, view=view, params=params, **extra)


def test_blocks_of_plain_leaves_give_parameters_to_those_that_read_them():
    params = {"kernel": jnp.ones((6, 10)), "embed": {"embedding": jnp.arange(74.0).reshape(37, 2)}}
    tx = lrx.galore(1e-2, projector=lrx.projectors.dct(rank=2), plain=Decayed())
    whole, blocks = lrx.fused(tx), lrx.fused(tx, plain_block=24)
    expected, _ = jax.jit(whole.step)(params, params, whole.init(params))
    found, _ = jax.jit(blocks.step)(params, params, blocks.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_numbers_of_a_configuration_are_found_in_rules_by_path_too():
    scale = lrx.scales.by_path((("a/.*", jnp.float32(2.0)), (".*", jnp.float32(3.0))))
    slots = lrx.projection.Projection(projector=lrx.projectors.svd(rank=2), scale=scale)
    found = placement._numbers(slots)
    assert [float(x) for x in found] == [2.0, 3.0]
    new = placement._with_numbers(slots, iter([x + 1 for x in found]))
    assert placement._numbers(new) == [3.0, 4.0] and type(new.scale) is type(scale)


class Counting(type(lrx.projectors.svd(rank=2))):
    """Remembers the number of refreshes that it was told last."""

    reads = frozenset({"target", "refreshes"})

    def init(self, view, keys):
        return super().init(view, keys)[0], jnp.full(view.batch, -1.0)

    def refresh(self, view, basis, memory, inputs):
        new, _ = super().refresh(view, basis, (), inputs)
        return new, jnp.broadcast_to(inputs.refreshes * 1.0, view.batch)


def test_refreshes_are_counted_from_the_draw_at_which_states_start_afresh():
    params = {"layers": {"kernel": jnp.ones((4, 6, 10))}}
    tx = lrx.scale_by_projection(
        Counting(rank=2),
        sampler=lrx.samplers.lisa(active=2, period=3),
        refresh_schedule=lrx.refresh_schedules.every(period=2),
        views=lrx.Views(stacked=("layers/.*",)),
    )
    state, update, told = tx.init(params), jax.jit(tx.update), []
    for _ in range(6):
        _, state = update(params, state, params)
        told.append(float(state.matrices["layers"]["kernel"].memory[0]))
    assert told == [0, 0, 1, 0, 0, 1]
