"""Where state lies, from outside: no computation, only abstract traces on eight devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lrx

KINDS = (AxisType.Auto, AxisType.Explicit)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "dense": {"kernel": shape(16, 32), "bias": shape(32)},
    "layers": {"kernel": shape(4, 16, 32)},
}
SPECS = {
    "dense": {"kernel": P("data", "model"), "bias": P("model")},
    "layers": {"kernel": P("data", None, "model")},
}
VIEWS = lrx.Views(stacked=(r"layers/.*",))


def shardings(kind=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def matrices(tx, kind=AxisType.Auto):
    """(basis, residual, count, mu) specs of the dense and the stacked kernel."""
    state = lrx.state_shardings(tx, PARAMS, shardings(kind)).projection.matrices
    both = []
    for name in ("dense", "layers"):
        node = state[name]["kernel"]
        # an error that is fed back, or norms
        beside = node.target if jax.tree.leaves(node.target) else node.residual
        kept = (node.basis, beside, node.inner.count, node.inner.mu)
        both.append(jax.tree.map(lambda x: tuple(x.spec), kept))
    return both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tx, dense, stack",
    [
        (
            lrx.galore(1e-2, rank=4, views=VIEWS),
            ((None, None), (), (), (None, "model")),
            (("data", None, None), (), ("data",), ("data", None, "model")),
        ),
        (
            lrx.dct_adamw(1e-2, rank=4, error_feedback=True, views=VIEWS),
            ((None,), ("data", "model"), (), (None, "model")),
            (("data", None), ("data", None, "model"), ("data",), ("data", None, "model")),
        ),
        (
            lrx.galore(1e-2, rank=4, proj_type="full", views=VIEWS),
            (((None, None), (None, None)), (), (), (None, None)),
            ((("data", None, None),) * 2, (), ("data",), ("data", None, None)),
        ),
        (
            lrx.galore(1e-2, rank=4, proj_type="reverse_std", views=VIEWS),
            ((None, None), (), (), (None, "data")),
            (("data", None, None), (), ("data",), ("data", None, None)),
        ),
        (
            lrx.apollo(1e-2, rank=4, views=VIEWS),
            ((None,), (), (), (None, "model")),
            (("data", None), ("data",), ("data",), ("data", None, "model")),
        ),
        (
            lrx.galore(1e-2, projector=lrx.projectors.identity(), views=VIEWS),
            ((), (), (), ("data", "model")),
            ((), (), ("data",), ("data", None, "model")),
        ),
    ],
    ids=["galore", "dct", "full", "larger", "apollo", "identity"],
)
def test_every_leaf_of_a_projected_kernel_has_the_promised_spec(tx, dense, stack, kind):
    pad = lambda spec, like: tuple(spec) + (None,) * (len(like) - len(spec))  # noqa: E731
    is_spec = lambda x: isinstance(x, tuple) and all(e is None or isinstance(e, str) for e in x)  # noqa: E731
    for got, want in zip(matrices(tx, kind), (dense, stack), strict=True):
        jax.tree.map(
            lambda w, g: (_ for _ in ()).throw(AssertionError((w, g))) if pad(g, w) != w else None,
            want,
            got,
            is_leaf=is_spec,
        )


def by_path(tree):
    return {
        jax.tree_util.keystr(path): tuple(x.spec)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3),
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.MultiSteps(
            optax.chain(optax.clip(1.0), lrx.galore(1e-2, rank=4, views=VIEWS)), 2
        ).gradient_transformation(),
        optax.masked(optax.sgd(1e-2, momentum=0.9), {"dense": True, "layers": {"kernel": False}}),
        optax.partition(
            {"a": lrx.galore(1e-2, rank=4), "b": optax.adam(1e-3)},
            {"dense": "a", "layers": {"kernel": "b"}},
        ),
    ],
    ids=["adamw", "inject", "multi_steps", "masked", "partition"],
)
def test_any_pipeline_covers_its_whole_state_and_keeps_parameter_like_leaves_with_their_parameter(
    tx,
):
    places = lrx.state_shardings(tx, PARAMS, shardings())
    abstract = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(places) == jax.tree.structure(abstract)
    jax.tree.map(
        lambda place, leaf: place.shard_shape(leaf.shape), places, abstract
    )  # raises where it cannot divide
    found = by_path(places)
    moments = {spec for path, spec in found.items() if path.endswith("['dense']['bias']")}
    assert moments == {("model",)}
    scalars = [
        spec
        for (_, spec), leaf in zip(found.items(), jax.tree.leaves(abstract), strict=True)
        if not leaf.shape
    ]
    assert all(spec == () for spec in scalars)


def test_state_made_without_the_parameters_sharding_is_placed_by_its_path():
    def init(params):
        return {
            "copy": jax.tree.map(lambda p: jnp.zeros(p.shape), params),
            "other": jnp.zeros((16, 32)),
        }

    places = lrx.state_shardings(
        optax.GradientTransformation(init, lambda *a: a), PARAMS, shardings()
    )
    assert tuple(places["copy"]["dense"]["kernel"].spec) == ("data", "model")
    assert tuple(places["other"].spec) == ()


def test_shardings_come_from_the_leaves_or_are_demanded_by_name():
    placed = jax.tree.map(
        lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind), PARAMS, shardings()
    )
    assert by_path(lrx.state_shardings(optax.adamw(1e-3), placed)) == by_path(
        lrx.state_shardings(optax.adamw(1e-3), PARAMS, shardings())
    )
    with pytest.raises(
        ValueError, match=r"leaf 'dense/bias' has None, not a NamedSharding.*pass shardings="
    ):
        lrx.state_shardings(optax.adamw(1e-3), PARAMS)
    with pytest.raises(ValueError, match="shardings has 2 leaves, params 3"):
        lrx.state_shardings(optax.adamw(1e-3), PARAMS, shardings()["dense"])
    mixed = shardings() | {"layers": shardings(AxisType.Explicit)["layers"]}
    with pytest.raises(
        ValueError, match="'layers/kernel' is placed on another mesh than 'dense/bias'"
    ):
        lrx.state_shardings(optax.adamw(1e-3), PARAMS, mixed)


@pytest.mark.parametrize(
    "spec, side",
    [(P("data"), "cols"), (P(None, "model"), "rows"), (P(), "rows"), (P("data", "model"), "rows")],
)
def test_sides_keep_the_sharded_dimension_whole(spec, side):
    params = {"kernel": shape(16, 32)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = {"kernel": NamedSharding(mesh, spec)}
    sides = lrx.projection.sides_for(params, places)
    assert sides == (("kernel", side),)
    tx = lrx.dct_adamw(1e-3, rank=4, side=sides)
    assert lrx.projection.resolved_sides(optax.chain(optax.clip(1.0), tx), params) == sides
    mu = lrx.state_shardings(tx, params, places).projection.matrices["kernel"].inner.mu
    kept = spec[0] if side == "cols" else (spec[1] if len(spec) > 1 else None)
    assert (tuple(mu.spec) + (None,) * 2)[:2] == (None, kept)


def test_an_explicit_mesh_resolves_sharding_sides_by_itself_and_an_auto_mesh_asks_for_them():
    tx = lrx.galore(1e-2, rank=4, side="sharding", views=VIEWS)
    with pytest.raises(ValueError, match="pass side=lrx.projection.sides_for"):
        tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape), PARAMS))
    placed = jax.tree.map(
        lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind),
        PARAMS,
        shardings(AxisType.Explicit),
    )
    assert lrx.projection.resolved_sides(tx, placed) == (
        ("dense/kernel", "rows"),
        ("layers/kernel", "rows"),
    )


def test_resolved_sides_of_a_pipeline_without_projection_are_empty():
    assert lrx.projection.resolved_sides(optax.adamw(1e-3), PARAMS) == ()
