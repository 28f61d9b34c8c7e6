"""jit = eager; scan = loop; no second trace; donation; state dtype and shape are stable."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.laws import methods as m


@m.every_method()
def test_compiled_scan_equals_eager_loop(method):
    transformation, _, _ = m.program(method)
    _, (updates, states) = m.trajectory(method)
    params, grads = m.params_like(), m.gradients()
    state = m.eager(transformation.init, params)
    for step in range(3):
        update, state = m.eager(transformation.update, m.at(grads, step), state, params)
        m.assert_close(m.at(updates, step), update, method.tolerance)
        params = optax.apply_updates(params, update)
    m.assert_close(m.at(states, 2), state, method.tolerance)


@m.every_method()
def test_second_call_does_not_trace_again(method):
    _, run, traces = m.program(method)
    (params, state), _ = m.run(method, m.gradients())
    run(
        params, state, m.gradients(), jnp.ones(m.STEPS, bool)
    )  # the state that update made, donated
    assert len(traces) == 1


@m.every_method(unless=lambda method: method.name != "ldadam")
def test_step_equals_eager_step(method):
    """The form most users write, `jit(tx.update)`; the scan stands for it in the other rows."""
    transformation, _, _ = m.program(method)
    params, grads, traces = m.params_like(), m.gradients(), []

    def update(*args):
        traces.append(1)
        return transformation.update(*args)

    step = jax.jit(update, donate_argnums=(1, 2), compiler_options=m.FAST_COMPILE)
    updates, state = step(m.at(grads, 0), jax.jit(transformation.init)(params), m.copy(params))
    m.assert_close(updates, m.at(m.trajectory(method)[1][0], 0), method.tolerance)
    step(m.at(grads, 1), state, m.copy(params))
    assert len(traces) == 1


@m.every_method()
def test_init(method):
    """Works on shapes alone, traced, and with distinct buffers; update keeps every dtype and
    shape."""
    transformation, _, _ = m.program(method)
    params = m.params_like()
    state = transformation.init(params)
    shapes = jax.eval_shape(transformation.init, params)
    without_arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    from_shapes = jax.eval_shape(transformation.init, without_arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(from_shapes, state)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params))]
    assert len(set(pointers)) == len(pointers)
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.size == 0]
    updates, after = jax.eval_shape(transformation.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, after)))
    m.assert_close(state, m.eager(transformation.init, params))


@m.every_method()
def test_every_step_moves_parameters(method):
    _, (updates, states) = m.trajectory(method)
    m.assert_finite((updates, states))
    for leaf in jax.tree.leaves(updates):
        moves = np.any(np.asarray(leaf).reshape(m.STEPS, -1), axis=1)
        assert moves.tolist() == [step >= method.idle for step in range(m.STEPS)]
    assert int(m.projection_state(states).step[-1]) == m.STEPS
