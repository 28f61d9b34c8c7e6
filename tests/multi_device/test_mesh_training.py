"""Pre-training on meshes of data, fsdp, sequence and tensor axes: the losses of one device, and what is sent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
from experiments import collectives, configuration, updates
from experiments.benchmarks import collectives as refreshes
from experiments.benchmarks import workload
from experiments.models import axes, llama
from experiments.tasks import Pretraining
from lowrank_jax import meshes

MODEL = {"preset": "nano", "layers": 2, "width": 32, "hidden": 64, "heads": 4, "kv_heads": 4, "sequence_length": 16}
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "galore projected": {"name": "galore", "rank": 8, "projector": "alternating", "refresh_every": 2, "eps": 1e-4,
                         "refresh_when": "after", "backprop": "projected"},
    "dct_adamw": {"name": "dct_adamw", "rank": 8, "eps": 1e-4},
}  # fmt: skip
MESHES = {
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "fsdp x sequence": {"fsdp": 4, "sequence": 2},
}


def task_of(optimizer, mesh):
    return Pretraining(configuration.from_dict({
        "model": MODEL, "data": {"sequence_length": 16, "batch_size": 8}, "optimizer": OPTIMIZERS[optimizer],
        "schedule": {"steps": 4}, "mesh": mesh,
    }))  # fmt: skip


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
            update = jax.jit(make(task.model, task.optimizer, 1, *([projected] if projected else [])))
            state = jax.tree.map(np.asarray, task.initial())
            losses = []
            for batch in batches(task):
                state, measured = update(state, batch)
                losses.append(float(measured["loss"]))
            found[name] = losses
        return found[name]

    return run


# GaLore by full gradients is compared in test_mesh_resume
RUNS = [("galore projected", "fsdp x tensor"), ("dct_adamw", "data x fsdp"), ("adamw", "fsdp x sequence")]


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_losses_are_those_of_one_device(alone, name, mesh):
    task = task_of(name, MESHES[mesh])
    state = task.initial()
    kernel = state["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * task.mesh.shape["fsdp"] <= kernel.size
    assert (task.check(state) is not None) == ("backprop" in OPTIMIZERS[name])
    update = jax.jit(task.update(), donate_argnums=0)
    losses = []
    for batch in batches(task):
        batch = {key: jax.device_put(array, task.rows) for key, array in batch.items()}
        state, measured = update(state, batch)
        losses.append(float(measured["loss"]))
    np.testing.assert_allclose(losses, alone(name), atol=1e-5)


def test_a_mesh_of_another_size_is_an_error_before_any_work():
    with pytest.raises(configuration.ConfigurationError, match="data=1 x fsdp=3 x sequence=1 x tensor=1 is not 8"):
        task_of("adamw", {"data": 1, "fsdp": 3})


STRATEGIES = {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 8}, "fsdp x tensor": {"fsdp": 4, "tensor": 2}}
CONFIG = llama.preset("nano", layers=2, width=64, hidden=128, heads=8, kv_heads=8, sequence_length=16)
VIEWS = lr.Views(stacked=(r"layers/.*",))
AFTER = lr.clocks.every(period=5, when="after")
METHODS = {
    "galore, power": lr.galore(1e-2, projector=lr.projectors.power(rank=8), views=VIEWS),
    "galore, alternating": lr.galore(1e-2, projector=lr.projectors.alternating(rank=8), clock=AFTER, views=VIEWS),
    "galore, random": lr.galore(1e-2, projector=lr.projectors.random(rank=8, kind="orthonormal"), views=VIEWS),
    "dct_adamw": lr.dct_adamw(1e-2, rank=8, views=VIEWS),
    "frugal, columns": lr.frugal(1e-2, projector=lr.projectors.columns(rank=8), views=VIEWS),
    "apollo": lr.apollo(1e-2, rank=8, views=VIEWS),
}
# Methods that factor a whole matrix at a refresh, and gather it for that.
EXACT = {
    "galore, svd": lr.galore(1e-2, rank=8, views=VIEWS),
    "frugal, svd": lr.frugal(1e-2, rank=8, views=VIEWS),
    "ldadam": lr.ldadam(1e-2, rank=8, views=VIEWS),  # its first basis is an SVD's
}


def update_program(tx, sizes, spread):
    """The optimizer's update and its application, compiled for a mesh."""
    mesh = meshes.make_mesh(**sizes)
    params = jax.eval_shape(llama.Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    placed = meshes.shardings(params, axes.LLAMA, mesh)
    state = jax.eval_shape(tx.init, params)
    state_placed = lr.state_shardings(tx, params, placed, spread=spread)
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
    """Collectives of something as large as a block's matrix; the embedding and the head are vectors of rows."""
    found = collectives.read(program.as_text())
    return [one for one in found if math.prod(one.shape) >= 64 * 64 and 259 not in one.shape]


PROGRAMS = [(method, strategy, True) for method in METHODS for strategy in ("fsdp", "fsdp x tensor")]
PROGRAMS += [(method, "tensor", False) for method in METHODS if method != "galore, alternating"]


@pytest.mark.parametrize(("method", "strategy", "spread"), PROGRAMS)
def test_no_update_sends_a_whole_matrix(method, strategy, spread):
    assert not whole_matrices(update_program(METHODS[method], STRATEGIES[strategy], spread))


def test_low_rank_state_is_gathered_layer_by_layer():
    task = task_of("galore projected", {"fsdp": 8})
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=task.rows) for k, x in task.host_batch(0).items()}
    text = jax.jit(task.update(), donate_argnums=0).lower(task.abstract, batch).compile().as_text()
    shapes = {one.shape for one in collectives.read(text)}
    assert (8, 64) in shapes  # the direction of one layer, over the rank
    stacks = {shape for shape in shapes if shape[:1] == (2,) and len(shape) == 3}
    assert stacks and max(map(math.prod, stacks)) <= 2 * 8 * 8  # of all layers only Gram matrices
    assert "geqrf" not in text  # QR would gather what it factors on every device


@pytest.mark.parametrize("rows", ["full", "zero", "deficient"])
def test_rows_that_are_divided_become_orthonormal_by_gram_matrices(rows):
    mesh = meshes.make_mesh(fsdp=8)
    x = jax.random.normal(jax.random.key(0), (3, 64, 8))
    x = {"full": x, "zero": 0 * x, "deficient": x.at[..., 4:].set(x[..., :4])}[rows]

    def on_mesh(x):
        with meshes.use(mesh):
            return lr.linalg.orthonormalize(x)

    divided = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    compiled = jax.jit(on_mesh).lower(divided).compile()
    q = np.asarray(compiled(divided))
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(8), (3, 8, 8)), atol=2e-6)
    np.testing.assert_allclose(q @ (np.swapaxes(q, -1, -2) @ x), x, atol=1e-4)
    assert max(math.prod(one.shape) for one in collectives.read(compiled.as_text())) <= 3 * 8 * 8
    if rows == "full":
        np.testing.assert_allclose(q, lr.linalg.orthonormalize(x), atol=2e-5)


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
    params = jax.eval_shape(llama.Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    sides = lr.sides_for(params, meshes.shardings(params, axes.LLAMA, mesh), views=VIEWS)
    assert dict(sides) == {
        f"layers/{block}/{name}/kernel": "rows" if name in ("o_proj", "down_proj") else "cols"
        for block, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{short}_proj" for short in names)
    }
    largest = {}
    for side in (sides, "paper"):
        tx = lr.galore(1e-2, projector=lr.projectors.random(rank=8), views=VIEWS, side=side)
        found = collectives.read(update_program(tx, {"fsdp": 8}, False).as_text())
        largest[side] = max((math.prod(one.shape) for one in found), default=0)
    assert largest[sides] <= 1  # whether all is finite
    assert largest["paper"] >= 8 * 64  # `Pᵀ G`, summed over the devices
