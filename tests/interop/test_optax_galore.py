"""A run of optax.contrib.galore goes on here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

GAP, RANK, SCALE, DECAY = 5, 3, 0.5, 0.1
SHAPES = {"wide": (4, 9), "tall": (9, 4), "square": (6, 6), "attention": (6, 2, 5), "bias": (7,)}
RATE = optax.linear_schedule(0.1, 0.01, 20)
NUMBERS = {
    name: optax.contrib.GaLoreDimensionNumbers(0, (1, 2) if len(shape) == 3 else 1)
    if len(shape) > 1
    else None
    for name, shape in SHAPES.items()
}
VIEWS = lrx.Views(
    rules=(
        ("attention", lrx.MatrixView(rows=(0,), cols=(1, 2))),
        ("wide|tall|square", lrx.MatrixView()),
        ("bias", None),
    )
)
ADAM = lrx.inner.adam(b1=0.8, b2=0.95, eps=1e-3)


def trees(steps):
    generator = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def ours(**options):
    given = {
        "rank": RANK,
        "scale": SCALE,
        "refresh_every": GAP,
        "side": "larger",
        "tie": "rows",
        "inner": ADAM,
        "weight_decay": DECAY,
        "views": VIEWS,
    }
    tx = lrx.galore(RATE, **given | options)
    return dataclasses.replace(tx.recipe, decay="before").optax()


@pytest.fixture(scope="module")
def run():
    """Parameters, state and the rest of the gradients after two steps of the second period."""
    params, *grads = trees(GAP + 2 + 3)
    theirs = optax.contrib.galore(
        RATE,
        RANK,
        GAP,
        SCALE,
        optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-3),
        weight_decay=DECAY,
        weight_dimension_numbers=NUMBERS,
    )
    state, update = theirs.init(params), jax.jit(theirs.update)
    for grad in grads[: GAP + 1]:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return update, params, state, grads[GAP + 1 :]


def test_training_goes_on_the_same(run):
    theirs, params, state, grads = run
    tx = ours()
    own = lrx.interop.optax_galore.load(state, tx, params)
    fresh = tx.init(params)
    assert jax.tree.structure(own) == jax.tree.structure(fresh)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, own, fresh))
    assert (int(own.projection.step), int(own.projection.refreshes)) == (GAP + 1, 2)
    expected, update = params, jax.jit(tx.update)
    for grad in grads:
        updates, state = theirs(grad, state, expected)
        expected = optax.apply_updates(expected, updates)
        updates, own = update(grad, own, params)
        params = optax.apply_updates(params, updates)
    assert len(grads) == 3
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-5, err_msg=name)


def test_the_next_refresh_comes_when_optaxs_would(run):
    """To the same subspace, whose vectors may have other signs."""
    theirs, params, state, grads = run
    tx = ours()
    own, update = lrx.interop.optax_galore.load(state, tx, params), jax.jit(tx.update)
    for grad in [*grads, *grads[:2]]:
        _, state = theirs(grad, state, params)
        _, own = update(grad, own, params)
    assert int(own.projection.refreshes) == 3
    for name in ("wide", "tall", "square", "attention"):
        basis, other = own.projection.matrices[name].basis, state[0].projector[name]
        np.testing.assert_allclose(basis @ basis.T, other @ other.T, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2}, r"leaf 'attention': optax keeps a basis \(10, 3\).*\(10, 2\).*rank"),
        ({"side": "paper"}, r"leaf 'attention'.*side=\"larger\", tie=\"rows\""),
        ({"inner": lrx.inner.adam(convention="hf")}, "inner=.* is not optax.scale_by_adam"),
        ({"plain": optax.identity()}, "plain=.* is not optax.scale_by_adam"),
        ({"projector": lrx.projectors.dct(rank=3), "rank": None}, "is not what optax does"),
        (
            {"views": lrx.Views(rules=(("wide|tall|square", lrx.MatrixView()), (".*", None)))},
            r"leaf \['attention'\]: optax projected it and optimizer does not",
        ),
    ],
)
def test_what_does_not_map_is_refused(run, options, message):
    _, params, state, _ = run
    with pytest.raises(ValueError, match=message):
        lrx.interop.optax_galore.load(state, ours(**options), params)


def test_other_states_are_refused(run):
    _, params, state, _ = run
    load = lrx.interop.optax_galore.load
    with pytest.raises(ValueError, match="state holds 0 states"):
        load(optax.adam(1e-2).init(params), ours(), params)
    with pytest.raises(ValueError, match="state holds 2 states"):
        load((state, state), ours(), params)
    lion = optax.contrib.scale_by_galore(RANK, base_optimizer=optax.scale_by_lion())
    with pytest.raises(ValueError, match="base_optimizer: ScaleByLionState has no counterpart"):
        load(lion.init(params), ours(), params)
    with pytest.raises(ValueError, match=r"must be lrx.galore"):
        load(state, optax.adam(1e-2), params)
    with pytest.raises(ValueError, match="decay='after' with weight_decay=0.1"):
        load(state, lrx.galore(1e-2, rank=3, inner=ADAM, weight_decay=0.1), params)
    with pytest.raises(ValueError, match=r"params: \[\"\['bias'\]\"\] stand in one"):
        load(state, ours(), {name: leaf for name, leaf in params.items() if name != "bias"})
    some = optax.contrib.scale_by_galore(
        RANK, weight_dimension_numbers=NUMBERS | {"wide": None}
    ).init(params)
    with pytest.raises(ValueError, match="leaf 'wide': optimizer projects it and optax did not"):
        load(some, ours(), params)
