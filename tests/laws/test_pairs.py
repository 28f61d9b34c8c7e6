"""Every pair of slot values: those that fit run and stay finite, those that do not raise a named
error."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax import linalg
from lowrank_jax.optim.pairs import damped_inverse
from tests.laws import methods as m

P, C, T, R, A = lrx.projectors, lrx.refresh_schedules, lrx.transports, lrx.residuals, lrx.inner
SLOTS = {
    "projector": {
        "svd": P.svd(rank=4), "two_sided": P.svd_two_sided(rank=4), "power": P.power(rank=4),
        "power_mix": P.power(rank=4, mix=0.9, first="svd"), "online_pca": P.online_pca(rank=4),
        "randomized": P.randomized(rank=4), "dct2": P.dct2(rank=4),
        "dct3": P.dct3(rank=4), "hadamard": P.hadamard(rank=4), "columns_norm": P.columns(rank=4, select="l1"),
        "columns_random": P.columns(rank=4), "columns_given": P.columns(select=(0, 2, 5, 7)),
        "gaussian": P.random(rank=4), "structured": P.random(rank=4, kind="structured"),
        "orthonormal": P.random(rank=4, kind="orthonormal"), "given": P.given(matrix=m.BASIS), "identity": P.identity(),
    },
    "refresh_schedule": {
        "every": C.every(period=2), "after": C.every(period=2, when="after"),
        "not_first": C.every(period=2, first=False), "every_step": C.every_step(), "never": C.never(),
        "staggered": C.staggered(period=2),
    },
    "transport": {
        "keep": T.keep(), "reset": T.reset(), "reset_moments": T.reset(count=False), "rotate": T.rotate(),
        "ldadam": T.ldadam(),
    },
    "inner": {
        "adam": A.adam(), "adam_hf": A.adam(convention="hf"), "lion": optax.scale_by_lion(), "trace": optax.trace(0.9),
        "rms": optax.scale_by_rms(), "identity": optax.identity(),
        "factored": A.from_optax(optax.scale_by_factored_rms(), params=True),
    },
    "residual": {
        "discard": R.discard(), "sign": R.sign(), "sgd": R.sgd(), "rescale_channel": R.gradient_rescale(),
        "rescale_tensor": R.gradient_rescale(axis="tensor"), "norm_scaled": R.norm_scaled(),
    },
    "target": {
        "gradient": lrx.targets.gradient(), "error_feedback": lrx.targets.error_feedback(),
        "ldadam_error_feedback": lrx.targets.ldadam_error_feedback(), "momentum": lrx.targets.momentum(),
    },
    "side": {side: side for side in ("paper", "larger", "rows", "cols")},
}  # fmt: skip

_FROM_DATA = (
    "svd",
    "two_sided",
    "power",
    "power_mix",
    "online_pca",
    "randomized",
    "dct2",
    "dct3",
    "hadamard",
    "columns_norm",
)
_NOT_ADAM = ("lion", "trace", "rms", "factored", "identity")
EXCLUDED = {
    ("projector", _FROM_DATA, "refresh_schedule", ("not_first",)): "first=False",
    ("projector", ("hadamard",), "side", ("larger", "cols")): "not a power of two",
    ("projector", ("given",), "side", ("larger", "cols")): "cannot shrink dimension 12",
    (
        "projector",
        ("two_sided",),
        "residual",
        ("rescale_channel", "norm_scaled"),
    ): "axis='tensor' or a one-sided",
    ("projector", ("power_mix",), "inner", _NOT_ADAM): "registered first moments",
    (
        "transport",
        ("rotate", "reset_moments", "ldadam"),
        "inner",
        ("factored",),
    ): "does not know how to move",
    (
        "transport",
        ("ldadam",),
        "inner",
        ("lion", "trace", "rms", "identity"),
    ): "registered first moments",
    (
        "inner",
        _NOT_ADAM,
        "residual",
        ("rescale_channel", "rescale_tensor", "norm_scaled"),
    ): "without bias correction",
    ("inner", _NOT_ADAM, "target", ("ldadam_error_feedback",)): "registered first moments",
}


def _message(left, right):
    """The error of a pair `((slot, value), (slot, value))`, or None if it fits."""
    for (slot, values, other, others), message in EXCLUDED.items():
        for a, b in ((left, right), (right, left)):
            if a[0] == slot and a[1] in values and b[0] == other and b[1] in others:
                return message
    return None


def _pairs():
    for one, two in itertools.combinations(SLOTS, 2):
        for pair in itertools.product(SLOTS[one], SLOTS[two]):
            yield (one, pair[0]), (two, pair[1])


def all_pairs() -> list[dict[str, str]]:
    """Rows that cover every pair that fits: greedy, each new row grown around a pair that is still
    missing."""
    missing = dict.fromkeys(pair for pair in _pairs() if _message(*pair) is None)
    table = []
    while missing:
        row = dict(next(iter(missing)))
        for slot in SLOTS:
            if slot in row:
                continue
            fits = [
                v
                for v in SLOTS[slot]
                if all(_message((slot, v), item) is None for item in row.items())
            ]
            new = lambda v: sum(_pair((slot, v), item) in missing for item in row.items())  # noqa: B023, E731
            row[slot] = max(fits, key=new)
        for pair in itertools.combinations([(slot, row[slot]) for slot in SLOTS], 2):
            missing.pop(pair, None)
        table.append(row)
    return table


def _pair(one, two):
    order = list(SLOTS)
    return (one, two) if order.index(one[0]) < order.index(two[0]) else (two, one)


def _build(row):
    return lrx.scale_by_projection(
        **{slot: SLOTS[slot][value] for slot, value in row.items()}, views=m.VIEWS
    )


CHUNKS = 8


def test_the_table_covers_every_pair_that_fits():
    table = all_pairs()
    seen = {
        pair
        for row in table
        for pair in itertools.combinations([(slot, row[slot]) for slot in SLOTS], 2)
    }
    wanted = [pair for pair in _pairs() if _message(*pair) is None]
    assert all(pair in seen for pair in wanted)
    assert not any(_message(*pair) for pair in seen)
    assert len(table) < 160


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_pairs_that_fit_run_and_stay_finite(chunk):
    params, grads = m.params_like(jnp.bfloat16), m.gradients()
    for row in all_pairs()[chunk::CHUNKS]:
        transformation = _build(row)
        state = start = m.eager(transformation.init, params)
        for step in range(2):
            updates, state = m.eager(transformation.update, m.at(grads, step), state, params)
            m.assert_finite((updates, state))
        describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert describe(updates) == describe(params), row
        assert describe(state) == describe(start), row
        assert np.any(np.asarray(updates["dense"]["kernel"], np.float32)), row
        assert int(state.step) == 2, row


@pytest.mark.parametrize("excluded", EXCLUDED, ids=lambda key: f"{key[0]}-{key[2]}-{key[3][0]}")
def test_pairs_that_do_not_fit_raise_a_named_error(excluded):
    slot, values, other, others = excluded
    for value, second in itertools.product(values, others):
        row = {"projector": "orthonormal", "refresh_schedule": "every"} | {
            slot: value,
            other: second,
        }
        with pytest.raises(ValueError, match=EXCLUDED[excluded]):
            _build(row).init(m.params_like())


def test_a_decomposition_that_fails_makes_no_step(monkeypatch):
    """Of that pair alone: the others go on."""
    grams = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])

    def failing(gram):
        values, vectors = jnp.linalg.eigh(gram)
        return values.at[0].set(jnp.nan), vectors.at[0].set(jnp.nan)

    monkeypatch.setattr(linalg, "eigh", failing)
    first, second = damped_inverse(grams, 0.0)
    assert not np.any(first)
    np.testing.assert_allclose(second, np.eye(3) / 2, rtol=1e-6)
