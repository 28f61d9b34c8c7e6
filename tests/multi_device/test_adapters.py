"""Adapters whose arrays lie as their kernels do: one training step on eight devices equals that of
one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lrx
from lowrank_jax.adapters import candidates
from lowrank_jax.adapters.partition_specs import partition_specs

SHAPES = {"layers": {"up": (2, 16, 32), "down": (2, 32, 16)}, "heads": {"kernel": (16, 4, 8)}}
SPECS = {
    "layers": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
    "heads": {"kernel": P("fsdp", "tensor", None)},
}
VIEWS = lrx.Views(
    rules=((r"heads/.*", lrx.MatrixView(rows=(0,), cols=(1, 2))),), stacked=(r"layers/.*",)
)
# without FourierFT, whose gradient fails in XLA's transform for CPUs where a mesh brings it
# transposed
FAMILIES = {
    "lora": lrx.adapters.lora(rank=4),
    "pissa": lrx.adapters.lora(rank=4, init="pissa"),
    "dora": lrx.adapters.dora(rank=4),
    "hira": lrx.adapters.hira(rank=4),
    "miss": lrx.adapters.miss(rank=4),
    "oft": lrx.adapters.oft(block=4),
    "shira": lrx.adapters.shira(rank=2),
    "uni_lora": lrx.adapters.uni_lora(rank=2, size=32),
    "vera": lrx.adapters.vera(rank=4),
    "rand_lora": lrx.adapters.rand_lora(rank=4, alpha=8),
    "loha": lrx.adapters.loha(rank=2),
}


def tree(seed):
    random = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(0.3 * random.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


X = jnp.asarray(np.random.default_rng(9).normal(size=(8, 16)), jnp.float32)


def made(family, seed=0):
    shares = family.kind in (
        "unilora",
        "vera",
        "randlora",
    )  # and a bare scan would slice what is shared
    adaptation = lrx.adapt(
        tree(0), {"heads/.*" if shares else ".*": family}, jax.random.key(seed), views=VIEWS
    )
    leaves, treedef = jax.tree.flatten(adaptation.train)
    random = np.random.default_rng(seed + 1)
    new = [leaf + jnp.asarray(0.1 * random.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return adaptation.replace(train=jax.tree.unflatten(treedef, new))


def forward(params, x, place):
    def layer(x, kernels):
        hidden = jnp.tanh(lrx.matmul(x, kernels["up"]))
        return x + lrx.dot_general(hidden, kernels["down"], (((1,), (0,)), ((), ())), **place), None

    return lrx.einsum(
        "bd,dhk->bhk", jax.lax.scan(layer, x, params["layers"])[0], params["heads"]["kernel"]
    )


def step(params, train, fixed, x, adaptation, **place):
    """One step of gradient descent of the adapters; Adam's first step would only see signs."""

    def loss(train):
        return jnp.mean(
            forward(lrx.attach(params, adaptation.replace(train=train, frozen=fixed)), x, place)
            ** 2
        )

    value, grads = jax.value_and_grad(loss)(train)
    return optax.apply_updates(train, jax.tree.map(lambda g: -0.5 * g, grads)), value


def placed(mesh, tree, tree_specs):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, tree_specs
    )


@functools.cache
def on_one_device(name):
    adaptation = made(FAMILIES[name])
    return adaptation, jax.jit(functools.partial(step, adaptation=adaptation))(
        tree(0), adaptation.train, adaptation.frozen, X
    )


CASES = [(name, kind) for kind in (AxisType.Auto, AxisType.Explicit) for name in FAMILIES]


@pytest.mark.parametrize("name, kind", CASES, ids=str)
def test_a_step_on_eight_devices_is_that_of_one(name, kind):
    adaptation, (want, value) = on_one_device(name)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    train, fixed = partition_specs(adaptation, SPECS)
    # the model's own business: on an explicit mesh a sum over a sharded axis must be told where it
    # goes
    place = {"out_sharding": P("fsdp", None)} if kind == AxisType.Explicit else {}
    shardings = (
        None if place else (jax.tree.map(lambda spec: NamedSharding(mesh, spec), train), None)
    )
    with jax.set_mesh(mesh):
        got, loss = jax.jit(
            functools.partial(step, adaptation=adaptation, **place), out_shardings=shardings
        )(
            placed(mesh, tree(0), SPECS),
            placed(mesh, adaptation.train, train),
            placed(mesh, adaptation.frozen, fixed),
            jax.device_put(X, NamedSharding(mesh, P("fsdp", None))),
        )
    for x, spec in zip(*map(jax.tree.leaves, (got, train)), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for (path, a), b, old in zip(
        jax.tree.flatten_with_path(got)[0],
        jax.tree.leaves(want),
        jax.tree.leaves(adaptation.train),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(path))
        assert float(jnp.abs(b - old).max()) > 1e-4, path


@pytest.mark.parametrize("family", ["lora", "dora", "shira"])
def test_look_ups_and_products_on_an_explicit_mesh_lie_where_they_are_told(family):
    """Rows of a table whose columns lie over the axis of the batch, and a product whose columns the
    model gathers."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params = {
        "table": jnp.asarray(tree(1)["heads"]["kernel"][..., 0]),
        "up": tree(2)["layers"]["up"][0],
    }
    own = {"table": P(None, "fsdp"), "up": P("fsdp", "tensor")}
    adaptation = lrx.adapt(params, {".*": FAMILIES[family]}, jax.random.key(0))
    random = np.random.default_rng(5)
    moved = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(x.dtype), adaptation.train
    )
    adaptation, ids = adaptation.replace(train=moved), jnp.arange(8)

    def products(params, train, fixed, ids, x, place=None, spread=None):
        attached = lrx.attach(params, adaptation.replace(train=train, frozen=fixed))
        rows = lambda ids, table: table.at[ids].get(out_sharding=place) if place else table[ids]  # noqa: E731
        told = lrx.dot_general(x, attached["up"], (((1,), (0,)), ((), ())), out_sharding=spread)
        return lrx.adapters.embed(ids, attached["table"], rows), told, lrx.matmul(x, attached["up"])

    want = products(params, adaptation.train, adaptation.frozen, ids, X)
    train, fixed = partition_specs(adaptation, own)
    given = (
        placed(mesh, params, own),
        placed(mesh, adaptation.train, train),
        placed(mesh, adaptation.frozen, fixed),
    )
    with jax.set_mesh(mesh):
        batch = jax.device_put((ids, X), (P("fsdp"), P("fsdp", None)))
        places = {"place": P("fsdp", None), "spread": P(("fsdp", "tensor"), None)}
        got = jax.jit(functools.partial(products, **places))(*given, *batch)
    assert [y.sharding.spec for y in got] == [*places.values(), P("fsdp", "tensor")]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_adapters_of_adapted_kernels_and_of_divided_rows_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params, spec = (
        {"down": tree(2)["layers"]["down"][0], "up": tree(2)["layers"]["up"][0]},
        P("tensor", None),
    )
    one, two = (
        lrx.adapt(params, {".*": FAMILIES[name]}, jax.random.key(0)) for name in ("oft", "dora")
    )
    one = one.replace(train=jax.tree.map(lambda x: x + 0.1, one.train))
    place = lambda x, own: jax.device_put(x, NamedSharding(mesh, own))  # noqa: E731
    x, given = tree(3)["layers"]["down"][0].T, jax.tree.map(lambda x: place(x, spec), params)
    arrays = lambda both: [(own.train, own.frozen) for own in both]  # noqa: E731
    lie = [tuple(partition_specs(own, {"down": spec, "up": spec})) for own in (one, two)]

    def run(params, arrays, x, ids, **place):
        pairs = zip(("one", "two"), (one, two), arrays, strict=True)
        both = {name: own.replace(train=train, frozen=fixed) for name, own, (train, fixed) in pairs}
        y = lrx.dot_general(x, lrx.attach(params, both)["down"], (((1,), (0,)), ((), ())), **place)
        return y, lrx.effective(params, both)["down"], lrx.adapters.embed(ids, params["up"])

    want = run(params, arrays((one, two)), x, jnp.arange(4))
    with jax.set_mesh(mesh):
        run_there = jax.jit(functools.partial(run, out_sharding=P("fsdp", None)))
        lying = placed(mesh, arrays((one, two)), lie)
        got = run_there(
            given, lying, place(x, P("fsdp", "tensor")), place(jnp.arange(4), P("fsdp"))
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        alone = lambda x, params: lrx.matmul(x, lrx.attach(params, one)["down"])  # noqa: E731
        manual = jax.shard_map(
            alone, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), axis_names={"fsdp"}
        )
        got = jax.jit(manual)(
            place(x, P("fsdp", None)), jax.tree.map(lambda x: place(x, P()), params)
        )
        np.testing.assert_allclose(got, alone(x, params), rtol=1e-5, atol=1e-5)
    choice = candidates({"a": two, "b": two})

    def chosen(params, x):
        return lrx.matmul(x, lrx.attach(params, choice, ids=jnp.zeros(16, int))["down"])

    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="'down': ids choose for rows that an explicit mesh"),
    ):
        jax.jit(chosen)(given, place(x, P("fsdp", None)))


def test_a_product_keeps_the_columns_divided_that_its_input_leaves_free():
    mesh = jax.sharding.AbstractMesh(
        (2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )

    def at(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    x = at((8, 16), "fsdp", None)
    with jax.sharding.use_abstract_mesh(mesh):
        for cols, kept in (("tensor", "tensor"), ("fsdp", None)):
            y = jax.eval_shape(lrx.adapters.base.product, x, at((16, 8), None, cols))
            assert y.sharding.spec == P("fsdp", kept)


@pytest.mark.parametrize("name", ["pissa", "oft"])
def test_stacks_that_an_explicit_mesh_divides_along_their_layers_convert(name):
    """A pair as it is, with its error, and by the SVD of matrices that are gathered for it."""
    mesh = jax.make_mesh((2, 4), ("layers", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    kernels, views = {"up": tree(0)["layers"]["up"]}, lrx.Views(stacked=("up",))
    adaptation = lrx.adapt(kernels, {"up": FAMILIES[name]}, jax.random.key(0), views=views)
    adaptation = adaptation.replace(train=jax.tree.map(lambda x: x + 0.1, adaptation.train))
    train, fixed = partition_specs(adaptation, {"up": P("layers", "tensor", None)})
    given = adaptation.replace(
        train=placed(mesh, adaptation.train, train), frozen=placed(mesh, adaptation.frozen, fixed)
    )
    with jax.set_mesh(mesh):
        found, report = lrx.to_lora(
            placed(mesh, kernels, {"up": P("layers", "tensor", None)}), given, rank=16
        )
    assert report.ranks["up"].tolist() == [8, 8] if name == "pissa" else [16, 16]
    assert float(report.errors["up"].max()) < 1e-6
    wanted = lrx.effective(kernels, adaptation)["up"]
    here = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(lrx.effective(kernels, here)["up"], wanted, rtol=1e-5, atol=1e-6)


def test_arrays_follow_their_kernels():
    shapes = {
        name: jax.eval_shape(lambda family=family: made(family))
        for name, family in FAMILIES.items()
    }
    found = {name: partition_specs(adaptation, SPECS) for name, adaptation in shapes.items()}
    train, fixed = found["pissa"]
    assert train["sites"]["layers/up"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor")}
    assert fixed["sites"]["layers/down"] == {
        "scale": P(None, None),
        "a0": P(None, "tensor", None),
        "b0": P(None, None, "fsdp"),
    }
    assert train["sites"]["heads/kernel"] == {"a": P("fsdp", None), "b": P(None, "tensor")}
    assert found["dora"][0]["sites"]["layers/up"]["magnitude"] == P(None, "tensor")
    assert found["oft"][0]["sites"]["layers/down"]["skew"] == P(None, "tensor", None)
    both = jax.eval_shape(candidates, {"one": shapes["lora"], "two": shapes["lora"]})
    assert partition_specs(both, SPECS)[0]["sites"]["layers/up"]["a"] == P(None, None, "fsdp", None)
    for name, adaptation in shapes.items():
        for tree_specs, arrays in zip(
            found[name], (adaptation.train, adaptation.frozen), strict=True
        ):
            assert jax.tree.structure(tree_specs) == jax.tree.structure(arrays)


def test_stacks_folds_shared_and_whole_leaves():
    params = {"layers": jnp.ones((4, 8, 2, 6)), "head": jnp.ones((8, 3))}
    views = lrx.Views(rules=(("layers", lrx.MatrixView(batch=(0,), rows=(1,), cols=(2, 3))),))
    rules = {"layers": lrx.adapters.uni_lora(rank=2, size=8)}
    adaptation = lrx.adapt(params, rules, jax.random.key(0), views=views, trainable="head")
    train, fixed = partition_specs(
        adaptation, {"layers": P("stage", "fsdp", None, "tensor"), "head": P("fsdp")}
    )
    assert fixed["sites"]["layers"] == {
        "scale": P("stage", None),
        "ia": P("stage", "fsdp", None),
        "ib": P("stage", None, None),
    }
    assert train["shared"]["unilora"] == {"theta": P()} and train["trainable"] == {
        "head": P("fsdp")
    }
    assert partition_specs(adaptation, {"layers": None, "head": P()})[1]["sites"]["layers"][
        "ia"
    ] == P(None, None, None)


def test_errors():
    adaptation = made(FAMILIES["lora"])
    coded = {"up": lrx.linalg.quantize_nf4(jnp.ones((64, 4)))}
    whole = lrx.adapt(coded, {"up": FAMILIES["lora"]}, jax.random.key(0))
    assert partition_specs(whole, jax.tree.map(lambda _: None, coded))[0]["sites"]["up"]["a"] == P(
        None, None
    )
    with pytest.raises(ValueError, match=r"no spec for \['heads/kernel'\]"):
        partition_specs(adaptation, {"layers": SPECS["layers"]})
    with pytest.raises(
        ValueError, match=r"'heads/kernel' of shape \(16, 4, 8\) has fewer axes than its spec"
    ):
        partition_specs(adaptation, SPECS | {"heads": {"kernel": P("fsdp", None, None, None)}})
