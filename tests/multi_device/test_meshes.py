"""Eight devices equal one, on explicit and on auto meshes, and state stays where `init` put it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_jax as lrx
from tests.laws import methods as laws

from .conftest import SPECS, mesh_of, put, tree

VIEWS = lrx.Views(
    rules=((r"heads/kernel", lrx.MatrixView(rows=(0,), cols=(1, 2))),), stacked=(r"layers/.*",)
)
GALORE = {
    "power": {"projector": lrx.projectors.power(rank=4)},
    "full": {"rank": 4, "proj_type": "full"},
    "hadamard": {"projector": lrx.projectors.hadamard(rank=4)},
    "structured": {"projector": lrx.projectors.random(rank=4, kind="structured")},
    "orthonormal": {"projector": lrx.projectors.random(rank=4, kind="orthonormal")},
    "alternating two-sided": {
        "projector": lrx.projectors.alternating_two_sided(rank=4),
        "eps": 1e-2,
    },
    "ranked": {
        "projector": lrx.projectors.ranked(
            projector=lrx.projectors.dct(rank=4), schedule=lrx.rank_schedules.energy(share=0.4)
        ),
        "refresh_schedule": lrx.refresh_schedules.piecewise(periods={0: 2}),
    },
    "ranked by layer": {
        "projector": lrx.projectors.ranked(
            projector=lrx.projectors.power(rank=4),
            schedule=lrx.rank_schedules.by_layer(shares=(1, 0.5)),
        ),
    },
    "staggered": {
        "projector": lrx.projectors.dct(rank=4),
        "refresh_schedule": lrx.refresh_schedules.staggered(period=2),
        "transport": lrx.transports.rotate(),
    },
}
FRUGAL = {
    "columns": {"projection": "columns"},
    "columns by norm": {"projector": lrx.projectors.columns(rank=4, select="l2")},
}
# What a named optimizer has beside a rate, a rank and its row's period.
OPTIONS = {
    "dct_adamw": {
        "refresh_every": 2,
        "error_feedback": True,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    },
    # a small eps amplifies rounding, and eigenvectors of one gradient are not determined; sides of
    # 16 have bases, and those of 32 none
    "soap": {"refresh_every": 1, "eps": 1e-2, "max_precond_dim": 16},
}


def named(name):
    options = laws.NAMED[name].settings("refresh_every", rank=4, learning_rate=1e-2, views=VIEWS)
    return laws.NAMED[name].factory(**options | OPTIONS.get(name, {}))


def injected():
    inject = optax.inject_hyperparams(lrx.galore, static_args=("rank", "refresh_every"))
    return inject(1e-2, projector=lrx.projectors.dct(rank=4), b1=0.8, views=VIEWS)


make = functools.partial
periodic = {"learning_rate": 1e-2, "refresh_every": 2, "views": VIEWS}
METHODS = (
    {name: make(named, name) for name in laws.NAMED}
    | {name: make(lrx.galore, **periodic | slots) for name, slots in GALORE.items()}
    | {name: make(lrx.frugal, **periodic | slots) for name, slots in FRUGAL.items()}
    | {"injected": injected}
)
SAMPLED = {name: make(laws.SAMPLED[name], 1e-2, views=VIEWS) for name in sorted(laws.SAMPLING)}
STEPS = 3  # the first and the third refresh


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


@functools.cache
def on_one_device(method: str):
    tx = (METHODS | SAMPLED)[method]()
    params = jax.tree.map(jnp.asarray, tree(0))
    state, step = jax.jit(tx.init)(params), jax.jit(step_of(tx))
    for i in range(STEPS):
        params, state, _ = step(params, state, jax.tree.map(jnp.asarray, tree(i + 1)))
    return jax.device_get(params)


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5)


def specs_of(arrays):
    """Partition entries by path, without the trailing Nones."""
    flat, _ = jax.tree_util.tree_flatten_with_path(arrays)

    def strip(spec):
        return tuple(spec[: max((i + 1 for i, e in enumerate(spec) if e is not None), default=0)])

    return {jax.tree_util.keystr(path): strip(getattr(x, "sharding", x).spec) for path, x in flat}


@pytest.mark.parametrize("method", METHODS)
def test_explicit_mesh(method):
    mesh, tx = mesh_of(AxisType.Explicit), METHODS[method]()
    with jax.set_mesh(mesh):
        params = put(tree(0), mesh)
        promised = specs_of(lrx.state_shardings(tx, params))
        state, step = jax.jit(tx.init)(params), jax.jit(step_of(tx), donate_argnums=(0, 1))
        assert specs_of(jax.tree.map(jax.typeof, state)) == promised
        for i in range(STEPS):
            before = (params, state)
            params, state, updates = step(params, state, put(tree(i + 1), mesh))
            assert specs_of(jax.tree.map(jax.typeof, state)) == promised
            assert specs_of(updates) == specs_of(params) == specs_of(put(tree(0), mesh))
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert step._cache_size() == 1
    assert_close(params, on_one_device(method))


@pytest.mark.parametrize("method", METHODS)
def test_auto_mesh(method):
    mesh, tx = mesh_of(AxisType.Auto), METHODS[method]()
    params = put(tree(0), mesh)
    kinds = jax.tree.map(lambda x: x.sharding, params)
    places = lrx.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=places)(params)
    step = jax.jit(
        step_of(tx),
        in_shardings=(kinds, places, kinds),
        out_shardings=(kinds, places, kinds),
        donate_argnums=(0, 1),
    )
    for i in range(STEPS):
        before = (params, state)
        params, state, _ = step(params, state, put(tree(i + 1), mesh))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert specs_of(state) == specs_of(places)
    assert step._cache_size() == 1
    assert_close(params, on_one_device(method))


UNIFORM = {
    "replicated": (P(), P(), P()),
    "rows": (P("data"), P(None, "data"), P("data")),
    "cols": (P(None, "model"), P(None, None, "model"), P(None, "model")),
    "both axes on one dimension": (
        P(("data", "model")),
        P(None, ("data", "model")),
        P(("data", "model")),
    ),
    "stack": (P("data", "model"), P(("data",), "model"), P("data", "model")),
}


def assert_explicit_is_one_device(method, specs):
    """Parameters after all steps, whose state lies where it was promised, without a mesh in use."""
    mesh, tx = mesh_of(AxisType.Explicit), (METHODS | SAMPLED)[method]()
    params = put(tree(0), mesh, specs)
    with jax.set_mesh(
        mesh
    ):  # a jitted init reads no array, so that jax knows its devices only from here
        state = jax.jit(tx.init)(params)
    step = jax.jit(step_of(tx))
    for i in range(STEPS):
        params, state, _ = step(params, state, put(tree(i + 1), mesh, specs))
    assert specs_of(state) == specs_of(lrx.state_shardings(tx, params))
    assert_close(params, on_one_device(method))


@pytest.mark.parametrize("layout", UNIFORM)
def test_every_layout_on_an_explicit_mesh_and_updates_without_a_mesh_context(layout):
    dense, stack, heads = UNIFORM[layout]
    specs = {name: {"kernel": dense} for name in SPECS} | {
        "layers": {"kernel": stack},
        "heads": {"kernel": heads},
    }
    specs["fsdp"]["bias"] = P()
    assert_explicit_is_one_device("dct_adamw", specs)


@pytest.mark.parametrize("method", SAMPLED)
def test_a_sampler_takes_layers_of_a_divided_stack(method):
    """Each of which lies on all devices: whole layers on some devices are refused."""
    specs = SPECS | {"layers": {"kernel": P(None, "data", "model")}}
    assert_explicit_is_one_device(method, specs)
    with pytest.raises(ValueError, match="'layers/kernel': a sampler takes single layers"):
        assert_explicit_is_one_device(method, SPECS)


def test_an_eager_init_on_an_explicit_mesh_gives_the_state_that_update_returns():
    mesh, views = mesh_of(AxisType.Explicit), lrx.Views(stacked=(".*",))
    tx = lrx.frugal(1e-2, rank=4, projection="columns", views=views)
    params = put(
        {"kernel": tree(0)["layers"]["kernel"]}, mesh, {"kernel": P("data", None, "model")}
    )
    state, update = tx.init(params), jax.jit(tx.update)
    updates, after = update(params, state, params)
    assert specs_of(state) == specs_of(after)
    assert specs_of(updates) == specs_of(params)
    update(params, after, params)
    assert update._cache_size() == 1
