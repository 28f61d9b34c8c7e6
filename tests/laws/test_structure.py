"""A stack = its layers; transposition; full rank = inner optimizer; error feedback telescopes;
bytes; checkpoints."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.batches import count
from tests.laws import methods as m


def _steps(transformation, params, grads, steps):
    """Updates of the first steps, eagerly, and the last state."""
    state, updates = m.eager(transformation.init, params), []
    for step in range(steps):
        update, state = m.eager(transformation.update, m.at(grads, step), state, params)
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, state


ONE_BY_ONE = {
    "seeded": "keys depend on the path and the place in the stack",
    "staggered": "phases depend on the path",
} | m.COUPLED


@m.every_method(unless=lambda method: method.seeded or method.name in ONE_BY_ONE)
def test_a_stack_is_its_layers_one_by_one(method):
    def split(trees, axis):
        return {
            "stack": {
                str(i): {"kernel": x}
                for i, x in enumerate(jnp.moveaxis(trees["stack"]["kernel"], axis, 0))
            }
        }

    layers = method.build(views=lrx.Views())
    updates, _ = _steps(layers, split(m.params_like(), 0), split(m.gradients(), 1), 3)
    for step, update in enumerate(updates):
        stacked = jnp.stack([update["stack"][str(i)]["kernel"] for i in range(3)])
        m.assert_close(
            m.at(m.trajectory(method)[1][0], step)["stack"]["kernel"], stacked, method.tolerance
        )


def _knows_outputs(method):
    """Whether a step tells inputs from outputs, which a transpose swaps."""
    slots = lrx.projection.projection_of(method.build())
    own = isinstance(slots.residual, lrx.residuals.neuron_normalized)
    return own or isinstance(slots.inner, lrx.inner.adam_mini)


@m.every_method(unless=_knows_outputs)
def test_transposing_weight_and_gradient_transposes_the_update(method):
    other = {"rows": "cols", "cols": "rows"}
    slots = lrx.projection.projection_of(m.program(method)[0])
    flipped = method.build(side=other.get(slots.side, slots.side), tie=other[slots.tie])
    transpose = lambda trees: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, x: jnp.swapaxes(x, -1, -2) if path[-1].key == "kernel" else x, trees
    )
    updates, _ = _steps(flipped, transpose(m.params_like()), transpose(m.gradients()), 3)
    for step, update in enumerate(updates):
        m.assert_close(transpose(m.at(m.trajectory(method)[1][0], step)), update, method.tolerance)


SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (2, 8, 8)}
ROTATING = {
    "svd": lrx.projectors.svd(rank=1.0),
    "randomized": lrx.projectors.randomized(rank=1.0),
    "power": lrx.projectors.power(rank=1.0),
    "dct2": lrx.projectors.dct2(rank=1.0),
    "dct3": lrx.projectors.dct3(rank=1.0),
    "hadamard": lrx.projectors.hadamard(rank=1.0),
    "columns": lrx.projectors.columns(rank=1.0, select="l2"),
    "orthonormal": lrx.projectors.random(rank=1.0, kind="orthonormal"),
    "structured": lrx.projectors.random(rank=1.0, kind="structured"),
    "given": lrx.projectors.given(
        matrix=np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    ),
    "identity": lrx.projectors.identity(),
}
FULL_VIEWS = lrx.Views(rules=((".*", lrx.MatrixView()),), stacked=("square",))


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k == "svd" else pytest.mark.slow) for k in ROTATING]
)
@pytest.mark.parametrize("inner", ["sgd", "momentum"])
def test_full_rank_with_an_equivariant_inner_is_the_inner_optimizer(name, inner):
    inner = {"sgd": optax.identity(), "momentum": optax.trace(0.9)}[inner]
    low = lrx.scale_by_projection(
        ROTATING[name],
        inner=inner,
        refresh_schedule=lrx.refresh_schedules.every(period=2),
        transport=lrx.transports.rotate(),
        views=FULL_VIEWS,
    )
    params, grads = m.tree(0, shapes=SHAPES), m.tree(1, steps=4, shapes=SHAPES)
    m.assert_close(_steps(low, params, grads, 4)[0], _steps(inner, params, grads, 4)[0], 5e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k == "svd" else pytest.mark.slow) for k in ROTATING]
)
def test_error_feedback_telescopes(name):
    """`sum up(g_t) + E_T = sum G_t`, at a rank that loses something."""
    projector = ROTATING[name]
    if name == "given":
        projector = lrx.projectors.given(matrix=m.BASIS)
    elif name != "identity":
        projector = type(projector)(**{**vars(projector), "rank": 3})
    low = lrx.scale_by_projection(
        projector,
        inner=optax.identity(),
        refresh_schedule=lrx.refresh_schedules.every(period=2),
        views=FULL_VIEWS,
        target=lrx.targets.error_feedback(),
    )
    params, grads = m.tree(0, shapes=SHAPES), m.tree(1, steps=3, shapes=SHAPES)
    updates, state = _steps(low, params, grads, 3)
    for leaf in SHAPES:
        matrix = state.matrices[leaf]
        error = matrix.view.restore(matrix.target)
        assert np.any(np.abs(error) > 0.1) == (name != "identity")
        total = sum(update[leaf] for update in updates) + error
        np.testing.assert_allclose(total, np.sum(np.asarray(grads[leaf])[:3], axis=0), atol=2e-5)


def test_ldadam_error_feedback_telescopes():
    """`S = E + b1/(1-b1) up(m)` grows by `G - up(m)`: what momentum and projection lose is all in
    E."""
    method = next(row for row in m.METHODS if row.name == "ldadam")
    _, (_, states) = m.trajectory(method)
    b1, grads = 0.908, np.asarray(m.gradients()["dense"]["kernel"], np.float64)
    matrix = states.projection.matrices["dense"]["kernel"]
    basis, momentum, error = (
        np.asarray(x, np.float64) for x in (matrix.basis, matrix.inner.mu, matrix.target)
    )
    assert matrix.view.side == "rows"
    carried = basis @ momentum
    total = error + b1 / (1 - b1) * carried
    for step in range(1, m.STEPS):
        np.testing.assert_allclose(
            total[step] - total[step - 1], grads[step] - carried[step], atol=2e-4
        )


@m.every_method()
def test_state_bytes_are_the_formulas(method):
    projection = lrx.projection.projection_of(m.program(method)[0])
    state = m.projection_state(jax.eval_shape(m.program(method)[0].init, m.params_like()))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    for matrix in (state.matrices["dense"]["kernel"], state.matrices["stack"]["kernel"]):
        view = matrix.view
        assert size(matrix.basis) == projection.projector.basis_bytes(view)
        assert size(matrix.memory) == projection.projector.memory_bytes(view)
        assert size(matrix.target) == projection.target.state_bytes(view)
        assert size(matrix.residual) == projection.residual.state_bytes(view)
        shape = projection.projector.low_shape(view)
        assert size(matrix.inner) == count(view) * projection.inner.matrix_bytes(shape, view)


@m.every_method()
def test_init_of_shapes_is_that_of_arrays(method):
    """`jax.ShapeDtypeStruct` leaves, plain ones too, make the same arrays, as they do in optax."""
    transformation = method.build()
    assert m.same(
        transformation.init(jax.eval_shape(m.params_like)), transformation.init(m.params_like())
    )


@pytest.mark.slow
def test_every_state_survives_orbax(tmp_path):
    """One checkpoint of all rows, restored through abstract states: bitwise, same structure, no
    zero-size leaf."""
    final = {method.name: m.trajectory(method)[0][1] for method in m.METHODS}
    assert all(leaf.size for leaf in jax.tree.leaves(final))
    abstract = {
        method.name: jax.eval_shape(m.program(method)[0].init, m.params_like())
        for method in m.METHODS
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", final)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", abstract)
    assert m.same(restored, final)
    assert not [
        file
        for file in (tmp_path / "states").rglob("*")
        if "pickle" in file.name or file.suffix == ".pkl"
    ]


@pytest.mark.slow
def test_programs_do_not_depend_on_the_hash_seed():
    """`hash(str)` differs in every process; the traced programs of all rows, with their constants,
    do not."""
    root = Path(__file__).parents[2]
    code = "from tests.laws import methods; print(methods.fingerprint())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
        )
        for seed in ("1", "2")
    ]
    first, second = [process.communicate(timeout=500)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(first) == 8
    assert first == second
