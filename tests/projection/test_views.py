"""Which leaf is which matrix: axes, rules, sides, ranks and the report."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_jax as lrx

VIEWS = [
    (lrx.MatrixView(), (4, 6), (4, 6)),
    (lrx.MatrixView(rows=(0,), cols=(1, 2)), (4, 2, 3), (4, 6)),
    (lrx.MatrixView(rows=(0, 1), cols=(2,)), (2, 3, 4), (6, 4)),
    (lrx.MatrixView(rows=(2, 0), cols=(1,)), (2, 3, 4), (8, 3)),
    (lrx.MatrixView(batch=(1,), rows=(2,), cols=(0, 3)), (2, 3, 4, 5), (3, 4, 10)),
    (lrx.MatrixView(rows=(0,), cols=(1, 2)).stacked(), (5, 4, 2, 3), (5, 4, 6)),
]


@pytest.mark.parametrize("view, shape, matrices", VIEWS)
def test_matrices_are_numpys_transpose_and_reshape(view, shape, matrices):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    expected = np.transpose(x, view.batch + view.rows + view.cols).reshape(matrices)
    assert view.matrix_shape(shape) == matrices
    np.testing.assert_array_equal(view.to_matrices(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(view.from_matrices(jnp.asarray(expected), shape), x)
    for side in ("rows", "cols"):
        resolved = lrx.resolution.ResolvedView(
            path="w", shape=shape, view=view, rank=1, side=side, batch=matrices[:-2]
        )
        oriented = resolved.orient(jnp.asarray(x))
        np.testing.assert_array_equal(
            oriented, expected if side == "rows" else np.swapaxes(expected, -1, -2)
        )
        assert (
            oriented.shape == resolved.oriented == (*matrices[:-2], resolved.shrunk, resolved.kept)
        )
        np.testing.assert_array_equal(resolved.restore(oriented), x)


@pytest.mark.parametrize(
    "shape, side, tie, shrinks",
    [
        ((4, 6), "paper", "rows", "rows"), ((6, 4), "paper", "rows", "cols"), ((4, 6), "larger", "rows", "cols"),
        ((6, 4), "larger", "cols", "rows"), ((4, 4), "paper", "rows", "rows"), ((4, 4), "paper", "cols", "cols"),
        ((4, 4), "larger", "cols", "cols"), ((4, 6), "rows", "cols", "rows"), ((6, 4), "cols", "rows", "cols"),
        ((6, 4), (("kernel", "rows"),), "cols", "rows"),
    ],
)  # fmt: skip
def test_side(shape, side, tie, shrinks):
    report = lrx.resolution.resolve(
        {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, rank=2, side=side, tie=tie
    )
    assert report.sides == (("kernel", shrinks),)
    assert (
        lrx.resolution.resolve(
            {"kernel": jnp.ones(shape)}, rank=2, side=report.sides, tie="rows"
        ).sides
        == report.sides
    )


def test_the_first_rule_that_matches_wins_and_defaults_leave_out_what_the_papers_do():
    params = {
        "embed": {"embedding": jnp.ones((9, 4)), "kernel": jnp.ones((9, 4))},
        "lm_head": {"kernel": jnp.ones((4, 9))},
        "mlp": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "final_norm": {"kernel": jnp.ones((4, 4))},
        "out": {"w": jnp.ones((2, 2, 4))},
        "skip": {"kernel": jnp.ones((4, 4))},
    }
    rules = (
        (r"skip/.*", None),
        (r".*/w", lrx.MatrixView(rows=(0, 1), cols=(2,))),
        (r"(skip|out)/.*", lrx.MatrixView()),
    )
    views = lrx.Views(rules=rules[:2])
    report = lrx.resolution.resolve(params, views, rank=2)
    assert [view.path for view in report.projected] == ["mlp/kernel", "out/w"]
    assert "2 of 8 leaves projected: 48 of" in str(report)
    assert lrx.resolution.resolve(params, lrx.Views(rules=dict(rules[:2])), rank=2) == report
    with pytest.raises(ValueError, match="matches no leaf"):  # shadowed by the rules before it
        lrx.resolution.resolve(params, lrx.Views(rules=rules), rank=2)
    assert lrx.resolution.resolve((jnp.ones((4, 8)), jnp.ones(3)), rank=2).projected[0].path == "0"
    assert lrx.resolution.resolve(jnp.ones((4, 8)), rank=2).projected[0].path == ""


def test_stacks_are_named_or_boxed_never_guessed():
    stack = jnp.ones((3, 4, 8))
    with pytest.raises(ValueError, match=r"views=lrx.Views\(stacked=\('layers/.\*',\)\)"):
        lrx.resolution.resolve({"layers": {"kernel": stack}}, rank=2)
    named = lrx.resolution.resolve(
        {"layers": {"kernel": stack}}, lrx.Views(stacked="layers/.*"), rank=2
    )
    boxed = lrx.resolution.resolve(
        {"layers": {"kernel": nn.Partitioned(stack, ("layers", "embed", "mlp"))}}, rank=2
    )
    assert named.projected == boxed.projected
    assert named.projected[0].oriented == (3, 4, 8)
    bias = lrx.resolution.resolve(
        {"layers": {"kernel": stack, "bias": jnp.ones((3, 8))}},
        lrx.Views(stacked="layers/.*"),
        rank=2,
    )
    assert len(bias.projected) == 1


def test_masked_leaves_are_absent_and_excuse_only_rules_that_match_them():
    params = {"a": {"kernel": optax.MaskedNode()}, "b": {"kernel": jnp.ones((4, 8))}}
    assert (
        len(
            lrx.resolution.resolve(
                params, lrx.Views(rules=(("a/.*", lrx.MatrixView()),)), rank=2
            ).projected
        )
        == 1
    )
    with pytest.raises(ValueError, match="'c/.*' matches no leaf"):
        lrx.resolution.resolve(params, lrx.Views(rules=(("c/.*", lrx.MatrixView()),)), rank=2)
    below = {
        "a": optax.MaskedNode(),
        "b": {"kernel": jnp.ones((4, 8))},
    }  # a mask may take whole subtrees
    assert (
        len(
            lrx.resolution.resolve(
                below, lrx.Views(rules=(("a/kernel", lrx.MatrixView()),)), rank=2
            ).projected
        )
        == 1
    )
    for pattern in (".*/w", "b/.*/w", "[ab]/w"):  # their heads match what is here too
        with pytest.raises(
            ValueError, match="matches no leaf .* leave it out of the views of this optimizer"
        ):
            lrx.resolution.resolve(below, lrx.Views(rules=((pattern, lrx.MatrixView()),)), rank=2)
    all_masked = {"a": {"kernel": optax.MaskedNode()}}
    assert (
        lrx.resolution.resolve(
            all_masked, lrx.Views(rules=(("c/.*", lrx.MatrixView()),)), rank=2
        ).projected
        == ()
    )


def test_one_views_for_groups_that_are_masked_whole():
    """Labels may be prefixes of the tree: each optimizer sees the other's subtree as one masked
    node."""
    tree = {
        name: {"block": {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}}
        for name in ("encoder", "decoder", "a+b")
    }
    rules = tuple(
        (pattern, lrx.MatrixView())
        for pattern in (r".*enc[^/]*/.*/w", r".*dec[^/]*/.*/w", r"a\+b/.*/w")
    )
    one = lrx.galore(1e-2, rank=2, views=lrx.Views(rules=rules))
    tx = optax.partition({"x": one, "y": one}, {"encoder": "x", "decoder": "y", "a+b": "y"})
    assert jax.eval_shape(tx.init, tree)
    mistaken = lrx.galore(1e-2, rank=2, views=lrx.Views(rules=(*rules, (".*encdr/w", None))))
    tx = optax.partition({"x": mistaken, "y": one}, {"encoder": "x", "decoder": "y", "a+b": "y"})
    with pytest.raises(ValueError, match=r"'.\*encdr/w' matches no leaf"):
        tx.init(tree)


@pytest.mark.parametrize(
    "rank, expected",
    [(3, 3), (0.5, 4), (0.3125, 2), (0.01, 1), (1.0, 8), (((".*/q/.*", 2), (".*", 0.25)), 2)],
)
def test_rank(rank, expected):
    """Fractions round half to even: .3125 x 8 = 2.5 -> 2."""
    transformation = lrx.scale_by_projection(lrx.projectors.svd(rank=rank))
    params = {"layer": {"q": {"kernel": jnp.ones((8, 16))}}}
    assert lrx.explain(transformation, params).projected[0].rank == expected


def test_columns_round_down():
    transformation = lrx.scale_by_projection(lrx.projectors.columns(rank=0.47))
    assert lrx.explain(transformation, {"kernel": jnp.ones((8, 16))}).projected[0].rank == 3


MATRIX, VECTOR, TABLE = jnp.ones((4, 8)), jnp.ones(8), jnp.ones((9, 4))
TREES = [  # (tree, whether it is an error that nothing is projected)
    ({"kernel": MATRIX, "bias": VECTOR}, False),
    ({"bias": VECTOR}, False),
    ({}, False),
    ({"kernel": jnp.ones((0, 8)), "layers": {"kernel": jnp.ones((0, 4, 8))}}, False),
    ({"w": MATRIX, "bias": VECTOR}, True),
    ({"embedding": TABLE}, True),
    ({"w": jnp.ones((2, 2, 2))}, True),
]


@pytest.mark.parametrize(
    "tree, wrong", TREES, ids=[str(jax.tree.map(jnp.shape, tree)) for tree, _ in TREES]
)
def test_nothing_projected_is_an_error_exactly_where_there_are_matrices(tree, wrong):
    """Bare, and beside leaves that a mask or another optimizer takes."""
    inner = lrx.galore(1e-2, rank=2)
    other = {"head": {"kernel": MATRIX}}
    mask = {"own": jax.tree.map(lambda _: True, tree), "other": False}
    labels = {"own": jax.tree.map(lambda _: "low", tree), "other": "plain"}
    rest = optax.partition({"low": inner, "plain": optax.sgd(1.0)}, labels)
    for transformation, params in (
        (inner, tree),
        (optax.masked(inner, mask), {"own": tree, "other": other}),
        (rest, {"own": tree, "other": other}),
    ):
        if wrong:
            with pytest.raises(
                ValueError, match="no leaf is projected, and 1 have two or more axes"
            ):
                transformation.init(params)
        else:
            assert jax.tree.leaves(jax.eval_shape(transformation.init, params))


def test_a_tree_without_matrices_is_trained_as_by_the_inner_optimizer():
    params, grads = (
        {"bias": jnp.arange(4.0), "empty": {"kernel": jnp.ones((0, 3))}},
        {"bias": jnp.ones(4)},
    )
    grads |= {"empty": {"kernel": jnp.ones((0, 3))}}
    clocks = (
        lrx.refresh_schedules.staggered(period=2),
        lrx.refresh_schedules.every_step(),
        lrx.refresh_schedules.every(period=2, when="after"),
    )
    expected, _ = optax.adam(1e-2).update(grads, optax.adam(1e-2).init(params))
    for clock in clocks:
        inner = lrx.scale_by_projection(lrx.projectors.svd(rank=2), refresh_schedule=clock)
        transformation = optax.chain(inner, optax.scale_by_learning_rate(1e-2))
        updates, state = transformation.update(grads, transformation.init(params), params)
        np.testing.assert_allclose(
            updates["bias"], expected["bias"], rtol=1e-5
        )  # optax rounds 1 - b2
        assert updates["empty"]["kernel"].shape == (0, 3)
        assert int(state[0].step) == 1
        assert int(state[0].refreshes) == 0


def test_no_entries_are_no_matrix():
    report = lrx.resolution.resolve(
        {"kernel": jnp.ones((0, 4)), "stack": {"kernel": jnp.ones((0, 4, 4))}},
        lrx.Views(stacked="stack/.*"),
        rank=2,
    )
    assert [leaf.note for leaf in report.leaves] == ["no entries", "no entries"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "projector", [lrx.projectors.svd(rank=2), lrx.projectors.alternating(rank=2)]
)
def test_a_training_step_without_matrices(projector):
    params, x = {"bias": jnp.ones(4), "empty": {"kernel": jnp.ones((0, 4))}}, jnp.ones((3, 4))
    tx = lrx.galore(1e-2, projector=projector, clip_norm=1.0)
    step = lrx.train_step(lambda params, x: jnp.mean((x + params["bias"]) ** 2), tx)
    new, state, value = jax.jit(step)(params, tx.init(params), x)
    assert (float(value), int(state.projection.step)) == (4.0, 1)
    assert np.all(new["bias"] < params["bias"])
