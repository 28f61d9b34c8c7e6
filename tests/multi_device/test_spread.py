"""`state_shardings(spread=True)`: what each device holds, for every row of the table of methods;
nothing runs."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lrx
from lowrank_jax.adapters.partition_specs import partition_specs
from lowrank_jax.projection.state import MatrixState
from lowrank_jax.sharding import meshes
from tests.laws.methods import METHODS

# as tests.laws.methods.SHAPES, in multiples that eight devices divide
PARAMS = {"dense": {"bias": (32,), "kernel": (16, 32)}, "stack": {"kernel": (3, 16, 16)}}
PARAMS = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), PARAMS, is_leaf=lambda x: isinstance(x, tuple)
)
TABLE = [(".*/bias", ("mlp",)), (".*/kernel", ("embed", "mlp"))]
# Given arrays and indices are of other sizes than these matrices.
OTHER = {"given-amsgrad"}
BITS8 = [
    lrx.galore(
        1e-2,
        rank=8,
        views=lrx.Views(stacked=("stack/.*",)),
        inner=lrx.inner.stored8(inner=lrx.inner.adam()),
    )
]
ROWS = [
    pytest.param(method.build, id=method.name) for method in METHODS if method.name not in OTHER
]
ROWS += [pytest.param(lambda: BITS8[0], id="8 bit")]


def nodes(tree):
    is_node = lambda x: isinstance(x, MatrixState)  # noqa: E731
    return [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]


def per_device(kind, leaf):
    return math.prod(kind.shard_shape(leaf.shape))


def entries(tree):
    """Partition entries without trailing Nones."""
    return [str(kind.spec).replace(", None)", ")") for kind in jax.tree.leaves(tree)]


@pytest.mark.parametrize("build", ROWS)
def test_each_device_holds_its_share_of_bases_and_low_rank_moments(build):
    tx, mesh = build(), meshes.make_mesh(fsdp=4, tensor=2)
    placed = meshes.shardings(PARAMS, TABLE, mesh)
    plain, spread = (
        lrx.state_shardings(tx, PARAMS, placed, spread=spread) for spread in (False, True)
    )
    state = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(spread) == jax.tree.structure(state)
    more = jax.tree.map(lambda a, b, x: per_device(b, x) <= per_device(a, x), plain, spread, state)
    assert all(jax.tree.leaves(more))
    for before, own, leaves in zip(nodes(plain), nodes(spread), nodes(state), strict=True):
        view = leaves.view
        for kind, leaf in zip(
            jax.tree.leaves(own.basis), jax.tree.leaves(leaves.basis), strict=True
        ):
            if leaf.shape == (*view.batch, view.shrunk, view.rank):
                assert per_device(kind, leaf) * 8 == leaf.size
        for kind, leaf in zip(
            jax.tree.leaves(own.inner), jax.tree.leaves(leaves.inner), strict=True
        ):
            if leaf.shape == (*view.batch, view.rank, view.kept):
                assert per_device(kind, leaf) * 8 == leaf.size
        assert entries(own.residual) == entries(before.residual)
        assert entries(own.target) == entries(before.target)


FAMILIES = {
    "lora": lrx.adapters.lora(rank=8),
    "dora": lrx.adapters.dora(rank=8),
    "oft": lrx.adapters.oft(block=4),
}
OPTIMIZERS = {"adamw": optax.adamw(1e-3), "altlora": lrx.altlora(1e-3, scale=1.0)}
# The moments of `a` lie like the kernel's rows; AltLoRA's are of its projected gradient.
ADAPTED = [("lora", "adamw"), ("dora", "adamw"), ("oft", "adamw"), ("lora", "altlora")]


@pytest.mark.parametrize(("family", "optimizer"), ADAPTED)
def test_adapters_and_their_state_follow_their_kernels(family, optimizer):
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    kernels = {"dense": {"kernel": jnp.ones((16, 32))}, "stack": {"kernel": jnp.ones((3, 16, 16))}}
    adaptation = lrx.adapt(
        kernels, FAMILIES[family], jax.random.key(0), views=lrx.Views(stacked=("stack/.*",))
    )
    trees = partition_specs(adaptation, meshes.partition_specs(kernels, TABLE, mesh))
    placed = jax.tree.map(
        lambda own: NamedSharding(mesh, own), trees, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    jax.tree.map(
        per_device, placed, (adaptation.train, adaptation.frozen)
    )  # raises where it cannot divide
    tx = OPTIMIZERS[optimizer]
    state = lrx.state_shardings(tx, adaptation.train, placed[0], spread=True)
    leaves = jax.eval_shape(tx.init, adaptation.train)
    found = dict(jax.tree_util.tree_leaves_with_path(state))
    like = [
        (kind, placed[0]["sites"]["dense/kernel"][path[-1].key])
        for (path, leaf), kind in zip(
            jax.tree_util.tree_leaves_with_path(leaves), found.values(), strict=True
        )
        if "dense/kernel" in jax.tree_util.keystr(path) and leaf.ndim > 1
    ]
    assert len(like) >= 2 and all(kind.spec == own.spec for kind, own in like)
    assert any(any(own.spec) for _, own in like)


def test_shardings_of_adapters_leave_whole_what_the_mesh_does_not_divide():
    mesh, params = meshes.make_mesh(fsdp=4, tensor=2), {"kernel": jnp.ones((8, 6))}
    adaptation = lrx.adapt(
        params, lrx.adapters.oft(block=4), jax.random.key(0)
    )  # two blocks for four devices
    placed = meshes.shardings(params, [("kernel", ("embed", "mlp"))], mesh)
    train, _ = lrx.adapters.shardings(adaptation, placed)
    (own,) = jax.tree.leaves(train["sites"]["kernel"])
    assert not any(own.spec) and any(
        jax.tree.leaves(partition_specs(adaptation, {"kernel": placed["kernel"].spec})[0])
    )
    with pytest.raises(
        ValueError, match="None at 'kernel' is no NamedSharding; give lrx.meshes.shardings"
    ):
        lrx.adapters.shardings(adaptation, {"kernel": None})
