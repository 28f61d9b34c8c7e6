"""optax's own tests of contributed optimizers, which its wheel ships, with this library's named
optimizers as rows.

`optax/contrib/_common_test.py` makes a method of each test and row when it is imported. Here the
test functions are taken from it again and called with our rows: extra arguments, no recompilation,
convergence on four targets after `tree_map_params`, `inject_hyperparams`, dtypes of updates and
states, `MultiSteps`, schedules of the learning rate.
"""

import importlib
import unittest

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_jax as lrx
from tests.adapters import pair_methods
from tests.laws import methods as laws

COMMON = importlib.import_module("optax.contrib._common_test")
METHODS = {
    function.__wrapped__.__name__: function.__wrapped__
    for name, function in vars(COMMON.ContribTest).items()
    if name.startswith("test_")
}

# What a row says beside a rate, a rank and its settings: constants that make small problems converge.
OPTIONS = {
    "galore": {"scale": 1.0},
    "golore": {"scale": 1.0},
    "frugal": {"rank": 2, "weight_decay": 0.0},
    "muon": {"weight_decay": 0.0},
    "normuon": {"weight_decay": 0.0},
    "soap": {"weight_decay": 0.0},
}
ROWS = {
    name: row.settings(rank=2, learning_rate=1e-2) | OPTIONS.get(name, {})
    for name, row in laws.NAMED.items()
}
FAST = ("dct_adamw", "frugal")
EXCLUDED = {  # (row, test): why
    (
        "dct_adamw",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
    ): "`kind` fixes the basis and is a number, which "
    "inject_hyperparams traces unless it is named in static_args; test_wrappers.py does",
}
# Named optimizers that cannot be rows: those of pairs train mappings with leaves a and b, and the
# targets are bare arrays; samplers draw among layers, and the targets have none.
NOT_ROWS = {*pair_methods.NAMED, *laws.SAMPLING}

INJECT = "test_optimizers_can_be_wrapped_in_inject_hyperparams"
STACK = lrx.Views(
    rules=(("1", lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))),)
)  # its second leaf has three axes
TARGETS = (
    "_setup_parabola",
    "_setup_rosenbrock",
    "_setup_matrix_parabola",
    "_setup_mixed_tensor_target",
)
CASES = {
    "test_optimizers_accept_extra_args": [{"wrap": False}],
    "test_optimizers": [{"target": getattr(COMMON, name), "dtype": "float32"} for name in TARGETS],
    INJECT: [{}],
    "test_preserve_dtype": [{"dtype": dtype} for dtype in ("bfloat16", "float32")],
    "test_gradient_accumulation": [{"dtype": dtype} for dtype in ("bfloat16", "float32")],
    "test_state_shape_dtype_shard_stability": [
        {"dtype": dtype} for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
    ],
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": [{}],
}


def test_every_test_of_optax_and_every_named_optimizer_is_here():
    assert set(CASES) == set(METHODS)
    named = {
        name
        for name in lrx.__all__
        if "learning_rate" in str(getattr(getattr(lrx, name), "__annotations__", ""))
    }
    assert named - {"Recipe", "RefreshInputs"} == set(ROWS) | NOT_ROWS | {"apply_learning_rate"}


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if row in FAST else pytest.mark.slow) for row in ROWS]
)
@pytest.mark.parametrize("test", CASES)
def test_as_optax_does(row, test, monkeypatch):
    monkeypatch.setattr(COMMON, "_get_opt_factory", lambda name: getattr(lrx, name))
    options = ROWS[row] | ({"views": STACK} if test == INJECT else {})
    if (row, test) in EXCLUDED:
        with pytest.raises(ValueError, match="static_args"):
            run(row, test, options, {})
        return
    for case in CASES[test]:
        run(row, test, options, case)


def run(row, test, options, case):
    """One call of optax's test; what it skips is a failure here."""
    own = next(name for name in vars(COMMON.ContribTest) if name.startswith("test_"))
    arguments = {
        "opt_name": row,
        "opt_kwargs": options,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    } | case
    try:
        METHODS[test](COMMON.ContribTest(own), **arguments)
    except unittest.SkipTest as skipped:
        raise AssertionError(f"optax skips {test} of {row}: {skipped}") from skipped
    assert not jax.config.jax_enable_x64


def test_a_row_that_does_not_converge_fails(monkeypatch):
    """The test functions do test, called this way."""
    monkeypatch.setattr(COMMON, "_get_opt_factory", lambda name: getattr(lrx, name))
    with pytest.raises(AssertionError):
        run(
            "frugal",
            "test_optimizers",
            ROWS["frugal"] | {"learning_rate": 1e-9},
            CASES["test_optimizers"][2],
        )


PARAMS = {"dense": {"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)}, "scale": jnp.ones(3)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("chained", [False, True])
def test_what_is_shaped_like_parameters_is_mapped_and_the_rest_apart(row, chained):
    """Moments of plain leaves are; counters are not, and the states of the projected leaves come as
    one tree."""
    tx = getattr(lrx, row)(**ROWS[row])
    tx = optax.chain(optax.clip(1.0), tx) if chained else tx
    state = jax.eval_shape(tx.init, PARAMS)
    labels = {"dense": {"kernel": "kernel", "bias": "bias"}, "scale": "scale"}
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    pair = lambda leaf, label: leaf if is_masked(leaf) else (label, leaf.shape)  # noqa: E731
    found = optax.tree_utils.tree_map_params(
        tx, pair, state, labels, transform_non_params=lambda _: "apart", is_leaf=is_masked
    )
    own = (found[1] if chained else found).projection
    assert own.plain.mu["dense"]["bias"] == ("bias", (10,))
    assert own.plain.nu["scale"] == ("scale", (3,))
    assert isinstance(own.plain.mu["dense"]["kernel"], optax.MaskedNode)
    assert own.plain.count == own.step == own.matrices == "apart"
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)


@pytest.mark.parametrize("row", ROWS)
def test_parameters_are_mapped_where_views_name_leaves(row):
    """`tree_map_params` shows `init` a tree without leaves; rules and stacked patterns match in
    every other one."""
    rules = (("dense/kernel", lrx.MatrixView(rows=(1,), cols=(0,))),)
    tx = getattr(lrx, row)(**ROWS[row], views=lrx.Views(rules=rules, stacked=("layers/.*",)))
    params = PARAMS | {"layers": {"kernel": jnp.ones((3, 6, 10))}}
    apart = optax.partition(
        {"low": tx, "plain": optax.sgd(1.0)}, {"dense": "low", "layers": "low", "scale": "plain"}
    )
    for transformation in (tx, apart):
        state = jax.eval_shape(transformation.init, params)
        same = optax.tree_utils.tree_map_params(transformation, lambda x: x, state)
        assert jax.tree.structure(same) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="'dense/kernel' matches no leaf"):
        tx.init({})


def test_lists_of_leaves_and_wide_and_narrow_floats():
    params = [jnp.ones((4, 6)), jnp.ones(3), (jnp.ones((6, 4)),)]
    tx = lrx.galore(1e-2, rank=2)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        own = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        updates, _ = jax.eval_shape(tx.update, own, jax.eval_shape(tx.init, own), own)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert [view.path for view in lrx.explain(tx, own).projected] == ["0", "2/0"]
