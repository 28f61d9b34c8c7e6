"""Pre-training on meshes of data, fsdp, sequence and tensor axes: the losses of one device, and
what is sent."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from experiments.benchmarks import collectives as refreshes
from experiments.benchmarks import workload
from experiments.harness import collectives, optimizers, updates
from experiments.harness.tasks import Pretraining
from experiments.models import axes, llama
from experiments.planning import hlo
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from lowrank_jax import sharding
from lowrank_jax.projection import layout
from lowrank_jax.sharding import meshes

MODEL = {
    "preset": "nano",
    "layers": 2,
    "width": 32,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 4,
    "sequence_length": 16,
}
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "galore projected": {"name": "galore", "rank": 8, "projector": "alternating", "refresh_every": 2, "eps": 1e-4,
                         "refresh_when": "after", "backprop": "projected"},
    "dct_adamw": {"name": "dct_adamw", "rank": 8, "eps": 1e-4},
    "apollo_mini": {"name": "apollo_mini", "eps": 1e-4},  # a rank that no mesh divides
}  # fmt: skip
MESHES = {
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "fsdp x sequence": {"fsdp": 4, "sequence": 2},
}


def task_of(optimizer, mesh):
    return Pretraining(
        configuration.from_dict(
            {
                "model": MODEL,
                "data": {"sequence_length": 16, "batch_size": 8},
                "optimizer": OPTIMIZERS[optimizer],
                "schedule": {"steps": 4},
                "mesh": mesh,
            }
        )
    )


def batches(task):
    return [task.host_batch(step) for step in range(4)]


@pytest.fixture(scope="module")
def alone():
    """Losses on one device, by optimizer."""
    found = {}

    def run(name):
        if name not in found:
            task = task_of(name, {})
            projected = task.config.optimizer.backprop
            make = updates.train_step if projected is None else updates.fused_step
            update = jax.jit(
                make(task.model, task.optimizer, 1, *([projected] if projected else []))
            )
            state = jax.tree.map(np.asarray, task.initial())
            losses = []
            for batch in batches(task):
                state, measured = update(state, batch)
                losses.append(float(measured["loss"]))
            found[name] = losses
        return found[name]

    return run


# GaLore by full gradients is compared in test_mesh_resume
RUNS = [
    ("galore projected", "fsdp x tensor"),
    ("dct_adamw", "data x fsdp"),
    ("adamw", "fsdp x sequence"),
]
RUNS += [("apollo_mini", "fsdp x tensor")]


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_losses_are_those_of_one_device(alone, name, mesh):
    task = task_of(name, MESHES[mesh])
    state = task.initial()
    kernel = state["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (
        math.prod(kernel.sharding.shard_shape(kernel.shape)) * task.mesh.shape["fsdp"]
        <= kernel.size
    )
    assert (task.check(state) is not None) == ("backprop" in OPTIMIZERS[name])
    update = jax.jit(task.update(), donate_argnums=0)
    losses = []
    for batch in batches(task):
        batch = {key: jax.device_put(array, task.rows) for key, array in batch.items()}
        state, measured = update(state, batch)
        losses.append(float(measured["loss"]))
    np.testing.assert_allclose(losses, alone(name), atol=1e-5)


def test_a_mesh_of_another_size_is_an_error_before_any_work():
    with pytest.raises(
        ConfigurationError, match="data=1 x fsdp=3 x sequence=1 x tensor=1 is not 8"
    ):
        task_of("adamw", {"data": 1, "fsdp": 3})


STRATEGIES = {
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
}
CONFIG = llama.preset(
    "nano", layers=2, width=64, hidden=128, heads=8, kv_heads=8, sequence_length=16
)
DENSE = dataclasses.replace(CONFIG, layers=1, scan=False)
VIEWS = lrx.Views(stacked=(r"layers/.*",))
AFTER = lrx.refresh_schedules.every(period=5, when="after")
METHODS = {
    "galore, power": partial(lrx.galore, 1e-2, projector=lrx.projectors.power(rank=8)),
    "galore, alternating": partial(
        lrx.galore, 1e-2, projector=lrx.projectors.alternating(rank=8), refresh_schedule=AFTER
    ),
    "galore, random": partial(
        lrx.galore, 1e-2, projector=lrx.projectors.random(rank=8, kind="orthonormal")
    ),
    "dct_adamw": partial(lrx.dct_adamw, 1e-2, rank=8),
    "frugal, columns": partial(lrx.frugal, 1e-2, projector=lrx.projectors.columns(rank=8)),
    "apollo": partial(lrx.apollo, 1e-2, rank=8),
}
# Methods that factor a whole matrix at a refresh, and gather it for that.
EXACT = {
    "galore, svd": lrx.galore(1e-2, rank=8, views=VIEWS),
    "frugal, svd": lrx.frugal(1e-2, rank=8, views=VIEWS),
    "ldadam": lrx.ldadam(1e-2, rank=8, views=VIEWS),  # its first basis is an SVD's
}


def update_program(tx, sizes, spread, scan=True):
    """The optimizer's update and its application, compiled for a mesh."""
    mesh, model = meshes.make_mesh(**sizes), llama.Llama(CONFIG if scan else DENSE)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    placed = meshes.shardings(params, axes.LLAMA, mesh)
    state = jax.eval_shape(tx.init, params)
    state_placed = lrx.state_shardings(tx, params, placed, spread=spread)
    place = lambda tree, kinds: jax.tree.map(  # noqa: E731
        lambda x, kind: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind), tree, kinds
    )

    params = place(params, placed)

    def step(params, gradients, state, known=params if spread else None):
        with meshes.use(mesh, parameters=known):
            made, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, made), state

    jitted = jax.jit(step, out_shardings=(placed, state_placed), donate_argnums=(0, 2))
    return jitted.lower(params, params, place(state, state_placed)).compile()


def whole_matrices(program):
    """Collectives of something as large as a block's matrix; the embedding and the head are vectors
    of rows."""
    found = collectives.read(program.as_text())
    return [one for one in found if math.prod(one.shape) >= 64 * 64 and 259 not in one.shape]


# Stacks of layers, whose state is spread or follows the parameters, and layers that are matrices of
# their own.
PROGRAMS = [
    (method, strategy, True, True) for method in METHODS for strategy in ("fsdp", "fsdp x tensor")
]
PROGRAMS += [
    (method, "tensor", False, True) for method in METHODS if method != "galore, alternating"
]
PROGRAMS += [(method, "fsdp x tensor", True, False) for method in METHODS]
PROGRAMS += [
    (method, own, True, False)
    for method in ("galore, power", "dct_adamw")
    for own in ("fsdp", "tensor")
]
PROGRAMS += [(method, "data x fsdp", True, True) for method in ("galore, power", "dct_adamw")]


@pytest.mark.parametrize(("method", "strategy", "spread", "scan"), PROGRAMS)
def test_no_update_sends_a_whole_matrix(method, strategy, spread, scan):
    tx = METHODS[method](views=optimizers.views(scan))
    assert not whole_matrices(update_program(tx, STRATEGIES[strategy], spread, scan))


def step_program(task):
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=task.rows)
        for k, x in task.host_batch(0).items()
    }
    return jax.jit(task.update(), donate_argnums=0).lower(task.abstract, batch).compile().as_text()


def test_replicas_gather_nothing_between_refreshes():
    sent = hlo.moved(step_program(task_of("galore projected", {"data": 8})), 259)
    assert sent["normal"].keys() == {"all-reduce"}
    assert "all-gather" in sent["with_refresh"]  # rows of a basis, which the devices share out


def test_no_device_holds_a_whole_stack_of_gradients():
    text = step_program(task_of("dct_adamw", {"fsdp": 8}))
    assert "f32[2,4,32]" in text or "f32[2,32,4]" in text  # a device's share of a square stack
    assert not any(f"f32[{shape}]" in text for shape in ("2,32,32", "2,32,64", "2,64,32"))


def test_low_rank_state_is_gathered_layer_by_layer():
    text = step_program(task_of("galore projected", {"fsdp": 8}))
    shapes = {one.shape for one in collectives.read(text)}
    assert (8, 64) in shapes  # the direction of one layer, over the rank
    stacks = {shape for shape in shapes if shape[:1] == (2,) and len(shape) == 3}
    assert stacks and max(map(math.prod, stacks)) <= 2 * 8 * 8  # of all layers only Gram matrices
    assert "geqrf" not in text  # QR would gather what it factors on every device


@pytest.mark.parametrize("rows", ["full", "zero", "deficient", "one direction"])
def test_rows_that_are_divided_become_orthonormal_by_gram_matrices(rows):
    mesh = meshes.make_mesh(fsdp=8)
    x = jax.random.normal(jax.random.key(0), (3, 64, 8))
    x = {"full": x, "zero": 0 * x, "deficient": x.at[..., 4:].set(x[..., :4])}.get(rows, x)
    if (
        rows == "one direction"
    ):  # rounding of its Gram matrices exceeds a shift that heeds the columns alone
        x = (
            jnp.broadcast_to(jax.random.normal(jax.random.key(0), (16, 4096, 1)), (16, 4096, 2))
            .at[0]
            .set(0)
        )

    def on_mesh(x):
        with meshes.use(mesh):
            return lrx.linalg.orthonormalize(x)

    divided = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    compiled = jax.jit(on_mesh).lower(divided).compile()
    q = np.asarray(compiled(divided))
    gram = np.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=2e-6)
    np.testing.assert_allclose(q @ (np.swapaxes(q, -1, -2) @ x), x, atol=3e-4)
    assert max(math.prod(one.shape) for one in collectives.read(compiled.as_text())) <= gram.size
    if rows == "full":
        np.testing.assert_allclose(q, lrx.linalg.orthonormalize(x), atol=2e-5)


@pytest.mark.parametrize("method", EXACT)
def test_exact_refreshes_gather_their_matrix(method):
    found = whole_matrices(update_program(EXACT[method], STRATEGIES["fsdp"], False))
    assert {one.kind for one in found} == {"all-gather"}
    assert sum(one.times for one in found) == 7 * CONFIG.layers  # each matrix once


def test_a_refresh_on_whole_rows_receives_less_than_on_matrices_as_they_lie():
    found = {way: refreshes.refresh("nano", "dct", 32, way) for way in refreshes.WAYS}
    kernels = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(workload.matrices("nano")))
    lie, whole = (refreshes.received(found[way]) for way in ("as they lie", "rows whole"))
    assert whole < kernels / 8 < lie


def test_a_side_that_keeps_the_divided_dimension_whole_sends_nothing_of_the_matrix():
    mesh = meshes.make_mesh(fsdp=8)
    params = jax.eval_shape(
        llama.Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )["params"]
    sides = lrx.projection.sides_for(
        params, meshes.shardings(params, axes.LLAMA, mesh), views=VIEWS
    )
    assert dict(sides) == {
        f"layers/{block}/{name}/kernel": "rows" if name in ("o_proj", "down_proj") else "cols"
        for block, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{short}_proj" for short in names)
    }
    largest = {}
    for side in (sides, "paper"):
        tx = lrx.galore(1e-2, projector=lrx.projectors.random(rank=8), views=VIEWS, side=side)
        found = collectives.read(update_program(tx, {"fsdp": 8}, False).as_text())
        largest[side] = max((math.prod(one.shape) for one in found), default=0)
    assert largest[sides] <= 1  # whether all is finite
    assert largest["paper"] >= 8 * 64  # `Pᵀ G`, summed over the devices


def test_a_mesh_that_does_not_divide_k_pads_a_refresh_of_rows():
    mesh, x = meshes.make_mesh(fsdp=8), jax.random.normal(jax.random.key(0), (2, 16, 13))
    with meshes.use(mesh):
        assert sharding.unshard_rows(x).shape == x.shape
        padded = jax.jit(lambda x: sharding.unshard_rows(x, pad=True))(x)
    assert padded.sharding.shard_shape(padded.shape) == (2, 16, 2)
    np.testing.assert_array_equal(padded, np.pad(x, [(0, 0), (0, 0), (0, 3)]))


@pytest.mark.parametrize("k", [24, 20])
def test_replicas_take_their_part_of_rows_and_gather_no_matrix(k):
    """k over the replicas first: at once, the partitioner gathers the whole matrix on each
    device."""
    mesh = meshes.make_mesh(data=2, fsdp=4)
    x = jax.device_put(jnp.ones((2, 16, k)), jax.NamedSharding(mesh, jax.P(None, "fsdp")))

    def rows(x):
        with meshes.use(mesh, parameters={"kernel": x_lies}):
            return sharding.unshard_rows(x, pad=True)

    x_lies = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    compiled = jax.jit(rows).lower(x).compile()
    kinds = {one.kind for one in collectives.read(compiled.as_text())}
    assert "all-to-all" in kinds and "all-gather" not in kinds
    assert compiled(x).sharding.shard_shape((2, 16, 24)) == (2, 16, 3)


def test_replicas_take_their_part_of_columns_that_are_divided_without_sending_any():
    mesh = meshes.make_mesh(data=2, tensor=4)
    x = jax.device_put(jnp.ones((2, 16, 24)), jax.NamedSharding(mesh, jax.P(None, None, "tensor")))
    view = lrx.resolution.resolve(
        {"kernel": x}, lrx.Views(stacked=("kernel",)), rank=4, side="rows"
    ).projected[0]

    def rows(x):
        with meshes.use(mesh, parameters={"kernel": x_lies}):
            return layout.rows(view, x)

    x_lies = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    compiled = jax.jit(rows).lower(x).compile()
    assert not collectives.read(compiled.as_text())
    assert compiled(x).sharding.shard_shape(x.shape) == (2, 16, 3)


def test_parameters_that_lie_elsewhere_are_refused_by_name():
    mesh = meshes.make_mesh(fsdp=8)
    with (
        pytest.raises(ValueError, match="at 'kernel', not a NamedSharding on this mesh"),
        meshes.use(mesh, parameters={"kernel": jnp.ones((8, 8))}),
    ):
        pass
    params = {"kernel": jax.device_put(jnp.ones((16, 24)), jax.NamedSharding(mesh, jax.P("fsdp")))}
    scalars = params | {
        "temperature": jax.device_put(jnp.ones(()), jax.NamedSharding(mesh, jax.P()))
    }
    tx = lrx.galore(1e-2, rank=4)

    def update(params, state):
        with meshes.use(mesh, parameters=scalars):
            return tx.update(params, state, params)

    jax.jit(update)(scalars, tx.init(scalars))
    other = {"temperature": jnp.ones(()), "kernel": scalars["kernel"], "more": jnp.ones(())}
    jax.jit(update)(other, tx.init(other))  # a leaf that `parameters` does not name
