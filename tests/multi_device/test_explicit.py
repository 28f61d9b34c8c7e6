"""Models and training on meshes of explicit axes: the losses of one device, types that say where
arrays lie."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.harness import collectives, updates
from experiments.harness.tasks import Pretraining
from experiments.models import axes, vit
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from lowrank_jax import sharding
from lowrank_jax.sharding import meshes

# unlike in test_mesh_training the vocabulary is divided, and two query heads share a key
MODEL = {
    "preset": "nano",
    "layers": 2,
    "width": 32,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "sequence_length": 16,
    "vocabulary_size": 264,
}
GALORE = {"name": "galore", "rank": 8, "refresh_every": 2, "eps": 1e-4}
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "galore": GALORE | {"projector": "power"},
    "galore projected": GALORE
    | {"projector": "alternating", "refresh_when": "after", "backprop": "projected"},
    "dct_adamw": {"name": "dct_adamw", "rank": 8, "eps": 1e-4},
}
MESHES = {
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "fsdp x sequence x tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "two keys, four parts": {"fsdp": 2, "tensor": 4},
}
SCANNED = {"scan": True}
UNSCANNED = {
    "scan": False,
    "remat": True,
    "tied_head": True,
    "attention_chunk": 8,
    "biases": ["q_proj", "o_proj"],
}
RUNS = [
    ("adamw", "fsdp x tensor", SCANNED, 1),
    ("adamw", "fsdp x sequence x tensor", UNSCANNED, 2),
    ("adamw", "two keys, four parts", SCANNED, 1),
    ("galore", "data x fsdp", SCANNED, 1),
    ("galore projected", "fsdp x tensor", SCANNED, 1),
    ("dct_adamw", "fsdp x tensor", SCANNED, 1),
]


def task_of(optimizer, mesh, model, accumulation):
    return Pretraining(
        configuration.from_dict(
            {
                "model": MODEL | model,
                "data": {"sequence_length": 16, "batch_size": 8 * accumulation},
                "optimizer": OPTIMIZERS[optimizer],
                "schedule": {"steps": 3, "accumulation": accumulation},
                "mesh": mesh | {"explicit": True},
            }
        )
    )


def losses(update, task, state, place=lambda x: x):
    found = []
    for step in range(3):
        state, measured = update(state, jax.tree.map(place, task.host_batch(step)))
        found.append(float(measured["loss"]))
    return found


@functools.cache
def alone(name, scanned):
    """Losses on one device."""
    task = task_of(name, {"data": 8}, *((SCANNED, 1) if scanned else (UNSCANNED, 2)))
    backprop, accumulation = task.config.optimizer.backprop, task.config.schedule.accumulation
    make = (
        updates.train_step
        if backprop is None
        else functools.partial(updates.fused_step, backprop=backprop)
    )
    update = jax.jit(make(task.model, task.optimizer, accumulation))
    return losses(update, task, jax.tree.map(np.asarray, task.initial()))


@pytest.mark.parametrize(("name", "mesh", "model", "accumulation"), RUNS)
def test_losses_are_those_of_one_device(name, mesh, model, accumulation):
    task, seen = task_of(name, MESHES[mesh], model, accumulation), []
    own, layer = task.sums, "layers" if model["scan"] else "layer_0"

    def sums(params, batch, rest):
        kernel = params[layer]["mlp"]["up_proj"]["kernel"]
        seen.append(sharding.explicit_spec(getattr(kernel, "kernel", kernel)))
        return own(params, batch, rest)

    task.sums = sums
    state = task.initial()
    assert (task.check(state) is not None) == (OPTIMIZERS[name].get("backprop") == "projected")
    update = jax.jit(task.update(), donate_argnums=0)
    rows = lambda x: jax.device_put(x, task.rows)  # noqa: E731
    np.testing.assert_allclose(
        losses(update, task, state, rows), alone(name, model["scan"]), atol=1e-5
    )
    assert update._cache_size() == 1  # a step gives the types that it takes
    # while a step is traced, types say that kernels are divided
    assert set(seen) == {(None, "fsdp", "tensor") if model["scan"] else ("fsdp", "tensor")}


def test_a_gathered_kernel_is_not_kept_for_the_backward_pass():
    task = task_of("adamw", {"fsdp": 8}, SCANNED, 1)
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=task.rows)
        for k, x in task.host_batch(0).items()
    }
    program = jax.jit(task.update(), donate_argnums=0).lower(task.abstract, batch).compile()
    gathers = [one for one in collectives.read(program.as_text()) if one.kind == "all-gather"]
    # gate_proj and up_proj of two layers, for both passes
    assert [one.times for one in gathers if one.shape == (32, 64)] == [2 * 2 * 2]
    assert all(len(one.shape) == 2 for one in gathers)  # and never a stack of layers


def test_what_an_explicit_mesh_cannot_do_is_an_error_before_any_work():
    mesh = {"fsdp": 8, "explicit": True}
    with pytest.raises(ConfigurationError, match=r"mesh.spread=True.*set mesh.explicit=False"):
        configuration.from_dict({"mesh": mesh | {"spread": True}})
    values = {
        "model": {"scan": False},
        "optimizer": {"name": "optax_galore", "rank": 8},
        "mesh": mesh,
    }
    with pytest.raises(ConfigurationError, match=r"mesh.explicit=True.*set mesh.explicit=False"):
        configuration.from_dict(values)


def test_a_kernel_is_gathered_for_its_input_and_its_gradient_goes_back():
    mesh = meshes.make_mesh(fsdp=4, tensor=2, explicit=True)
    put = lambda shape, *spec: jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    x, h = (
        put((8, 6, 16), ("data", "fsdp"), None, None),
        put((8, 6, 32), ("data", "fsdp"), None, "tensor"),
    )
    up, down = put((16, 32), "fsdp", "tensor"), put((32, 16), "tensor", "fsdp")
    typed = lambda *args, **options: sharding.explicit_spec(meshes.at_input(*args, **options))  # noqa: E731
    with jax.set_mesh(mesh), meshes.use(mesh):
        assert typed(up, x) == (None, "tensor")
        assert typed(down, h) == ("tensor", None)
        assert typed(put((64, 16), "tensor", "fsdp"), x, rows=-1) == ("tensor", None)
        assert typed(put((2, 2, 16, 32), None, None, None, "fsdp"), x) == (None,) * 4
        gradient = jax.jit(jax.grad(lambda up, x: jnp.sum(x @ meshes.at_input(up, x))))(up, x)
        assert sharding.explicit_spec(gradient) == ("fsdp", "tensor")
        with pytest.raises(Exception, match="it is ambiguous how the output should be sharded"):
            h @ meshes.at_input(down, h)
        place = meshes.out_sharding((8, 6, 16), "batch", None, None)
        assert sharding.explicit_spec(
            jnp.einsum("bsf,fd->bsd", h, down, out_sharding=place)
        ) == tuple(place)
        with pytest.raises(ValueError, match="name every axis"):
            meshes.out_sharding((8, 6), "batch")
    with meshes.use(meshes.make_mesh(fsdp=8)):
        assert meshes.out_sharding((8, 6), "batch", None) is None


@functools.cache
def vit_alone():
    model = vit.Vit(vit.preset("digits", layers=2))
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    function = jax.value_and_grad(
        lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    )
    return function, params, images, jax.jit(function)(params, images)


IMAGES = [
    ({"fsdp": 4, "tensor": 2}, False),
    ({"fsdp": 4, "tensor": 2}, True),
    ({"data": 4, "sequence": 2}, True),
]


@pytest.mark.parametrize(("sizes", "explicit"), IMAGES, ids=str)
def test_a_vision_transformer_has_the_gradients_of_one_device(sizes, explicit):
    function, params, images, want = vit_alone()
    mesh = meshes.make_mesh(**sizes, explicit=explicit)

    def run(params, x):
        with meshes.use(mesh):
            return function(params, x)

    placed = jax.device_put(params, meshes.shardings(params, axes.VIT, mesh))
    rows = jax.device_put(images, jax.NamedSharding(mesh, meshes.spec(("batch",), mesh)))
    got = jax.jit(run)(placed, rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=2e-5), got, want
    )
    if explicit:
        types = lambda tree: jax.tree.map(sharding.explicit_spec, tree)  # noqa: E731
        assert types(got[1]) == types(placed)


def test_a_divided_vision_transformer_gathers_kernels_and_no_activations():
    """Without its constraints the compiler kept kernels in place, and moved activations of the
    whole batch."""
    model = vit.Vit(vit.preset("digits", layers=2))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    mesh = meshes.make_mesh(fsdp=8)
    place = lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)  # noqa: E731
    placed = jax.tree.map(place, params, meshes.shardings(params, axes.VIT, mesh))
    rows = place(jnp.zeros((256, 8, 8, 1)), jax.NamedSharding(mesh, meshes.spec(("batch",), mesh)))

    def run(params, x):
        with meshes.use(mesh):
            return jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2))(params)

    found = collectives.read(jax.jit(run).lower(placed, rows).compile().as_text())
    assert max(math.prod(one.shape) for one in found) <= 64 * 128
