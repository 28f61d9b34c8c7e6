"""Finite whatever the gradients; the NaN guard; dtypes of parameters and gradients; orthonormal
bases; the clock."""

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx
from lowrank_jax.projection.projectors.base import BasisProjector
from tests.laws import methods as m

BAD = (0, 2, 3, 5)  # on and off refreshes; step 0 is the first one


def _bad_gradients():
    """NaN in a leaf that is not projected, infinity in a matrix, NaN in one layer, and squares that
    overflow."""
    grads = m.gradients()
    dense, stack = grads["dense"], grads["stack"]
    dense["bias"] = dense["bias"].at[0, 3].set(jnp.nan)
    dense["kernel"] = dense["kernel"].at[2].set(jnp.inf)
    stack["kernel"] = stack["kernel"].at[3, 1].set(jnp.nan)
    stack["kernel"] = stack["kernel"].at[5, 2].set(1e30)
    return grads


@m.every_method()
def test_a_skipped_step_is_a_step_that_was_never_made(method):
    """Bitwise: updates zero, no decay, no schedule advanced, a due refresh still due; only
    `skipped` counts."""
    live = np.array([step not in BAD for step in range(m.STEPS)])
    (_, _), (updates, states) = m.run(method, _bad_gradients())
    (_, _), (expected, never) = m.run(method, m.gradients(), live)
    assert m.same(updates, expected) or _same_up_to_zero_sign(updates, expected)
    skipped = m.projection_state(states).skipped
    assert skipped.tolist() == np.cumsum(~live).tolist()
    assert m.same(_with_skipped(states, skipped * 0), never)
    for leaf in jax.tree.leaves(updates):
        assert not np.any(np.asarray(leaf)[list(BAD)])


def _same_up_to_zero_sign(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _with_skipped(state, skipped):
    if isinstance(state, lrx.projection.ProjectionState):
        return state._replace(skipped=skipped)
    return state._replace(projection=state.projection._replace(skipped=skipped))


def _degenerate_gradients():
    """Zero, zero, rank one, one column, tiny, ordinary."""

    def degrade(g):
        row = g[:, ..., :1, :] if g.ndim > 2 else g
        one = jnp.ones_like(g[2])
        return jnp.stack(
            [0 * g[0], 0 * g[1], row[2] * one, one.at[..., 1:].set(0), 1e-20 * g[4], g[5]]
        )

    return jax.tree.map(degrade, m.gradients())


@m.every_method()
def test_degenerate_gradients_leave_everything_finite_and_bases_orthonormal(method):
    _, (updates, states) = m.run(method, _degenerate_gradients())
    m.assert_finite((updates, states))
    assert int(m.projection_state(states).skipped[-1]) == 0
    _assert_orthonormal(method, states)
    _assert_orthonormal(method, m.trajectory(method)[1][1])


def _failing(refresh):
    """A refresh whose decomposition fails: of a finite gradient it makes no number."""

    def run(*args):
        nan = lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        return jax.tree.map(nan, refresh(*args))

    return run


@m.every_method(unless=lambda method: not method.due or not m.stores_floats(method))
def test_a_refresh_that_fails_leaves_the_matrix_as_it_was(method, monkeypatch):
    """Bases are those of before, bitwise, and all else goes on with them."""
    transformation = method.build()
    projector = type(lrx.projection.projection_of(transformation).projector)
    params, state = m.params_like(), m.eager(transformation.init, m.params_like())
    for verb in ("refresh", "start"):
        if verb in vars(projector):
            monkeypatch.setattr(projector, verb, _failing(getattr(projector, verb)))
    update = jax.jit(transformation.update, compiler_options=m.FAST_COMPILE)
    before = [matrix.basis for matrix in _matrices(state)]
    for step in range(2):
        updates, state = update(m.at(m.gradients(), step), state, params)
        m.assert_finite((updates, state))
        assert m.same([matrix.basis for matrix in _matrices(state)], before)
    assert int(m.projection_state(state).step) == 2


def _assert_orthonormal(method, states):
    projector = lrx.projection.projection_of(m.program(method)[0]).projector
    for matrix in _matrices(states):
        basis = matrix.basis
        if (
            isinstance(projector, BasisProjector)
            and projector.orthonormal
            and not isinstance(basis, tuple)
        ):
            basis = m.eager(projector.columns, matrix.view, basis)
        for one in jax.tree.leaves(basis) if projector.orthonormal else []:
            if jnp.issubdtype(one.dtype, jnp.integer):  # sorted and distinct coordinates
                assert np.all(np.diff(one, axis=-1) > 0)
                continue
            one = np.asarray(one, np.float32)
            gram = np.swapaxes(one, -1, -2) @ one
            # eight entries of steps up to 2 / 15 in 4 bits
            coarse = {jnp.dtype(jnp.bfloat16): 2e-2, jnp.dtype(jnp.int4): 0.3}
            stored = jnp.dtype(getattr(projector, "dtype", jnp.float32))
            tolerance = coarse.get(stored, 2e-4)
            np.testing.assert_allclose(
                gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=tolerance
            )


def _matrices(states):
    is_matrix = lambda x: isinstance(x, lrx.projection.MatrixState)  # noqa: E731
    return [
        x
        for x in jax.tree.leaves(m.projection_state(states).matrices, is_leaf=is_matrix)
        if is_matrix(x)
    ]


@m.every_method()
def test_refreshes_come_exactly_when_due(method):
    """From step 1 on; a random basis of step 0 is the one `init` drew."""
    bases = [
        np.asarray(x, np.float64)
        for matrix in _matrices(m.trajectory(method)[1][1])
        for x in jax.tree.leaves(matrix.basis)
    ]
    moved = {
        step for step in range(1, m.STEPS) if any(np.any(b[step] != b[step - 1]) for b in bases)
    }
    assert moved == set(method.due) - {0}


DTYPES = [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.float16, jnp.float32)]


@m.every_method()
def test_gradient_dtype_may_differ_from_parameter_dtype(method):
    """The update has the parameters' dtype, and is that of float32 arithmetic; state stays what
    `init` made it."""
    transformation, _, _ = m.program(method)
    for param_dtype, grad_dtype in DTYPES:
        params, grads = m.params_like(param_dtype), m.at(m.gradients(), 0)
        grads = jax.tree.map(lambda x: x.astype(grad_dtype), grads)  # noqa: B023
        state = m.eager(transformation.init, params)
        updates, after = m.eager(transformation.update, grads, state, params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(param_dtype)}
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
        expected, _ = m.eager(
            transformation.update, wide[0], m.eager(transformation.init, wide[1]), wide[1]
        )
        m.assert_close(updates, expected, 1e-6 if param_dtype == jnp.float32 else 1e-2)


def test_without_the_guard_nan_goes_through():
    for name in ("galore", "ldadam"):
        method = next(row for row in m.METHODS if row.name == name)
        transformation = method.build(guard=False)
        params, grads = m.params_like(), m.at(m.gradients(), 0)
        grads["dense"]["bias"] = grads["dense"]["bias"].at[0].set(jnp.nan)
        updates, state = m.eager(
            transformation.update, grads, m.eager(transformation.init, params), params
        )
        assert np.isnan(updates["dense"]["bias"][0])
        m.assert_finite(updates["dense"]["kernel"])
        assert int(state.projection.skipped) == 0


@m.every_method(unless=lambda method: not method.named)
def test_schedule_and_decay_are_the_named_optimizers_own(method):
    """The update at rate 0.2 is twice that at 0.1, decay aside; a schedule sees the 0-based
    step."""
    params, grads = m.params_like(), m.at(m.gradients(), 0)
    results = []
    for rate in (0.1, lambda count: 0.2 + count):
        transformation = method.build(learning_rate=rate, weight_decay=0.0)
        results.append(
            m.eager(transformation.update, grads, m.eager(transformation.init, params), params)[0]
        )
    m.assert_close(jax.tree.map(lambda x: 2 * x, results[0]), results[1])
    if not method.fast:
        return
    rate, decay = 0.1, 0.3
    transformation = method.build(learning_rate=rate, weight_decay=decay)
    decayed = m.eager(transformation.update, grads, m.eager(transformation.init, params), params)[0]
    when = (
        lrx.galore(0.1, rank=1).recipe.decay
        if method.factory in (lrx.galore, lrx.apollo)
        else "before"
    )
    shrink = 1 - rate * decay if when == "after" else 1
    m.assert_close(
        decayed, jax.tree.map(lambda u, p: shrink * u - rate * decay * p, results[0], params)
    )
