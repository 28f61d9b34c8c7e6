"""The laws of samplers: few layers move, the others keep no state, and all forms of a tree agree."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import lowrank_jax as lrx
from tests.laws import methods as m

LAYERS, STEPS = 4, 7
SHAPES = {
    "embed": {"embedding": (5, 8)},
    "layers": {"kernel": (LAYERS, 8, 12), "scale": (LAYERS, 8)},
    "lm_head": {"kernel": (8, 5)},
}
VIEWS = lrx.Views(stacked=("layers/.*",))
COUNTED = {"views": lrx.Views()}
ROWS = m.SAMPLED
every_row = pytest.mark.parametrize("name", ROWS)


def build(name, **options):
    return ROWS[name](0.1, **{"views": VIEWS} | options)


def params_like():
    return m.tree(0, shapes=SHAPES)


def grads_at(step):
    return m.at(m.tree(1, steps=STEPS, shapes=SHAPES), step)


@functools.cache
def program(name):
    tx = build(name)
    return tx, jax.jit(tx.update)


def walk(update, state, params, steps=range(STEPS), convert=lambda tree: tree):
    """`[(updates, state)]` of the steps."""
    found = []
    for step in steps:
        updates, state = update(convert(grads_at(step)), state, params)
        params = optax.apply_updates(params, updates)
        found.append((updates, state))
    return found


@functools.cache
def trajectory(name):
    tx, update = program(name)
    return walk(update, tx.init(params_like()), params_like())


def chosen(state):
    return [int(x) for x in state.projection.sampler[str(LAYERS)]]


def separate(tree):
    """The layers as leaves that count."""
    layers = [{k: x[i] for k, x in tree["layers"].items()} for i in range(LAYERS)]
    rest = {name: part for name, part in tree.items() if name != "layers"}
    return rest | {f"layers_{i}": layer for i, layer in enumerate(layers)}


@every_row
def test_only_the_layers_in_the_slots_move(name):
    for updates, state in trajectory(name):
        moves = np.any(np.asarray(updates["layers"]["kernel"]) != 0, axis=(1, 2))
        assert sorted(np.flatnonzero(moves)) == sorted(chosen(state))
        assert np.all(np.any(np.asarray(updates["layers"]["scale"]) != 0, axis=1))
        assert np.any(updates["lm_head"]["kernel"]) and np.any(updates["embed"]["embedding"])


def test_the_order_of_turns():
    turns = lambda name: [chosen(state) for _, state in trajectory(name)]  # noqa: E731
    assert turns("badam") == [[0], [0], [1], [1], [2], [2], [3]]
    first = [turns("badam-random")[step] for step in (0, 1, 3, 5)]  # the first turn has one step
    assert sorted(first) == [[0], [1], [2], [3]]
    lisa = turns("lisa")
    assert lisa[0] == lisa[2] and lisa[3] == lisa[5]
    assert all(len(set(slots)) == 2 for slots in lisa)


@pytest.mark.slow
@every_row
def test_a_draw_starts_the_ordinary_optimizer_on_the_active_layers(name):
    """Kernels alone: from a draw to the next they move as by the same recipe without a sampler."""
    tx, found = program(name)[0], trajectory(name)
    plain = tx.projection.sampler
    alone = build(name, sampler=lrx.samplers.all())
    begins = [step for step in range(STEPS) if int(plain.begun(jnp.asarray(step))[1]) == 0]
    params = params_like()
    for step, (updates, state) in enumerate(found):
        slots = np.asarray(chosen(state))
        cut = lambda tree, slots=slots: {"layers": {"kernel": tree["layers"]["kernel"][slots]}}  # noqa: E731
        if step in begins:
            own = alone.init(cut(params))
        expected, own = alone.update(cut(grads_at(step)), own, cut(params))
        m.assert_close(cut(updates), expected)
        params = optax.apply_updates(params, updates)
    assert begins[0] == 0 and len(begins) > 2


@pytest.mark.slow
@every_row
def test_jit_scan_and_eager_are_one(name):
    tx, _ = program(name)
    stacked = m.tree(1, steps=STEPS, shapes=SHAPES)

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    start = (params_like(), tx.init(params_like()))
    (_, state), updates = jax.jit(lambda start: jax.lax.scan(body, start, stacked))(start)
    m.assert_close(state, trajectory(name)[-1][1])
    for step, (own, _) in enumerate(trajectory(name)):
        m.assert_close(m.at(updates, step), own)
    eager = functools.partial(m.eager, tx.update)
    start = tx.init(params_like())
    begun = walk(eager, start, params_like(), range(2))
    for own, found in zip(begun, trajectory(name), strict=False):
        m.assert_close(own, found)


@every_row
def test_a_stack_is_its_layers_as_separate_leaves(name):
    tx = build(name, views=lrx.Views())
    params = separate(params_like())
    found = walk(jax.jit(tx.update), tx.init(params), params, convert=separate)
    for (updates, state), (own, own_state) in zip(found, trajectory(name), strict=True):
        assert chosen(state) == chosen(own_state)
        m.assert_close(updates, separate(own))
    sizes = lambda state: sum(x.nbytes for x in jax.tree.leaves(state.projection.matrices))  # noqa: E731
    assert sizes(found[-1][1]) == sizes(trajectory(name)[-1][1])


@every_row
def test_a_skipped_step_changes_its_count_alone(name):
    """The map and the states of the old layers stay, and a due draw stays due."""
    tx, update = program(name)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads_at(0))
    state, params = tx.init(params_like()), params_like()
    for step in range(4):
        updates, after = update(bad, state, params)
        assert all(not np.any(x) for x in jax.tree.leaves(updates))
        assert int(after.projection.skipped) == int(state.projection.skipped) + 1
        unskipped = after.projection._replace(skipped=state.projection.skipped)
        assert m.same(after._replace(projection=unskipped), state)
        updates, state = update(grads_at(step), after, params)
        m.assert_close(updates, trajectory(name)[step][0])
        params = optax.apply_updates(params, updates)


def test_gradients_of_inactive_layers_are_not_read():
    tx, update = program("badam")
    grads = grads_at(0)
    kernel = grads["layers"]["kernel"].at[1:].set(jnp.nan)
    grads = grads | {"layers": grads["layers"] | {"kernel": kernel}}
    updates, state = update(grads, tx.init(params_like()), params_like())
    assert int(state.projection.skipped) == 0
    m.assert_close(updates, trajectory("badam")[0][0])


@every_row
def test_state_bytes_are_the_formula_and_a_share_of_all(name):
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    tx, params = program(name)[0], params_like()
    state = jax.eval_shape(tx.init, params)
    rows = {row["component"]: row["bytes_formula"] for row in lrx.memory.formula(tx, params)}
    rows.pop("parameters"), rows.pop("gradients")
    assert sum(rows.values()) == size(state)
    everything = build(name, sampler=lrx.samplers.all())
    full = jax.eval_shape(everything.init, {"layers": {"kernel": params["layers"]["kernel"]}})
    active = len(state.projection.sampler[str(LAYERS)])
    assert size(state.projection.matrices) * LAYERS == size(full.projection.matrices) * active


@every_row
def test_a_saved_state_goes_on(name):
    tx, update = program(name)
    cut, found = 4, trajectory(name)
    saved = serialization.to_bytes(found[cut - 1][1])
    state = serialization.from_bytes(tx.init(params_like()), saved)
    params = params_like()
    for updates, _ in found[:cut]:
        params = optax.apply_updates(params, updates)
    again = walk(update, state, params, range(cut, STEPS))
    assert m.same(again[-1], found[-1])
    assert m.same(tx.init(jax.eval_shape(params_like)), tx.init(params_like()))


def test_wrappers():
    """optax's own around a sampler: a mask, injected numbers, a chain."""
    masks = {"embed": False, "layers": True, "lm_head": False}
    masked = optax.masked(build("badam"), masks)
    params = params_like()
    updates, _ = masked.update(grads_at(0), masked.init(params), params)
    m.assert_close(updates["layers"], trajectory("badam")[0][0]["layers"])
    inject = optax.inject_hyperparams(lrx.badam, static_args=("order",))
    options = {"period": 2, "order": "ascending", "weight_decay": 0.1, "views": VIEWS}
    injected = optax.chain(inject(0.1, **options))
    found = walk(jax.jit(injected.update), injected.init(params), params, range(3))
    for (updates, _), (own, _) in zip(found, trajectory("badam"), strict=False):
        m.assert_close(updates, own)


def test_refusals():
    tx, params = build("badam"), params_like()
    with pytest.raises(ValueError, match="no fused form"):
        lrx.train_step(lambda params: 0.0, tx)
    stack = lrx.projection.Stack(before=None, layer=None, after=None)
    with pytest.raises(ValueError, match="no fused form"):
        lrx.layerwise_step(stack, tx)
    with pytest.raises(ValueError, match="a sampler says which layers are active"):
        lrx.taps(tx.init(params))
    with pytest.raises(ValueError, match=r"'layers_\*/kernel' are of layers \[0, 2\]"):
        build("badam", **COUNTED).init(
            {f"layers_{i}": {"kernel": jnp.ones((4, 8))} for i in (0, 2)}
        )
    leaves = {f"layers_{i}": {"kernel": jnp.ones((4 + i, 8))} for i in (0, 1)}
    with pytest.raises(ValueError, match="differ in shape"):
        build("badam", **COUNTED).init(leaves)
    with pytest.raises(ValueError, match="active=2.0 must be a Python integer"):
        lrx.samplers.lisa(active=2.0)
    with pytest.raises(ValueError, match="order='up' must be one of"):
        lrx.samplers.badam(order="up")
    with pytest.raises(ValueError, match="leave taps out"):
        tx.update(params, tx.init(params), params, taps=object())
    with pytest.raises(ValueError, match="samplers"):
        lrx.scale_by_projection(lrx.projectors.identity(), sampler=2)


def _galore_of(**options):
    sampler = lrx.samplers.lisa(active=2, period=3)
    return lrx.galore(0.1, sampler=sampler, **{"rank": 3} | options)


BASES = tuple((f"layers_{i}/.*", np.eye(8, 3) * (i + 1)) for i in range(LAYERS))
SIDES = (np.eye(8), np.eye(12))
DIFFERENT = {
    "mask": lambda: _galore_of(
        weight_decay=0.1, mask=lambda p: {name: name != "layers_2" for name in p}
    ),
    "rules": lambda: lrx.muon(
        0.1,
        scale=lrx.scales.by_path((("layers_1/.*", 2.0),)),
        sampler=lrx.samplers.lisa(active=2, period=3),
    ),
    "matrix": lambda: _galore_of(rank=None, projector=lrx.projectors.given(matrix=BASES)),
    "first": lambda: lrx.soap(
        0.1,
        sampler=lrx.samplers.lisa(active=2, period=3),
        first=(("layers_3/.*", SIDES), (".*", tuple(np.flip(x, 0) for x in SIDES))),
    ),
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_layers_that_share_their_slots_have_one_rule(field):
    """At init, and at a step of a state that another optimizer made."""
    params = separate(params_like())
    with pytest.raises(
        ValueError, match=rf"{field} says one thing of 'layers_0/kernel' and another"
    ):
        DIFFERENT[field]().init(params)
    state = ROWS["galore"](0.1).init(params)
    with pytest.raises(ValueError, match=rf"{field} says one thing"):
        DIFFERENT[field]().update(params, state, params)


def test_rules_that_say_the_same_of_all_layers_are_taken():
    params = separate(params_like())
    rules = ((r"layers_[01]/.*", 2.0), (r"layers_\d+/.*", 2.0))
    lrx.muon(
        0.1,
        scale=lrx.scales.by_path(rules),
        sampler=lrx.samplers.lisa(active=2, period=3),
        mask=lambda p: {name: name.startswith("layers") for name in p},
        weight_decay=0.1,
    ).init(params)


def test_a_new_state_is_made_at_a_draw_alone():
    """Bases of `init` are dear where they are random: they stand inside a branch."""
    tx = _galore_of(
        projector=lrx.projectors.random(rank=3, kind="orthonormal"), rank=None, views=VIEWS
    )
    params = params_like()
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(grads_at(0), state, params)
    outside = [str(eqn) for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name != "cond"]
    assert "erf_inv" in str(jaxpr) and not any("erf_inv" in text for text in outside)
