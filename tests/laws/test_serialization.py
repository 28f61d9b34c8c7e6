"""The law of flax's bytes: every state and every node of ours comes back bitwise, inside a
`TrainState` too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lowrank_jax as lrx
from tests.adapters import pair_methods
from tests.laws import methods as m


def filled(shapes):
    """Numbers in place of shapes, so that every array is told from every other."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(100 * generator.random(x.shape), x.dtype), shapes)


def returned(node, target):
    return serialization.from_bytes(target, serialization.to_bytes(node))


def cleared(node):
    return jax.tree.map(jnp.zeros_like, node)


def test_states_of_every_method():
    states = {
        method.name: jax.eval_shape(method.build().init, m.params_like()) for method in m.METHODS
    }
    pairs = pair_methods.params_like()
    states |= {
        name: jax.eval_shape(pair_methods.build(name).init, pairs) for name in pair_methods.METHODS
    }
    states["stored"] = jax.eval_shape(
        lrx.galore(1e-2, rank=2, inner=lrx.inner.stored8(minimum=1)).init,
        {"kernel": jnp.ones((4, 8))},
    )
    for name, shapes in states.items():
        state = filled(shapes)
        assert m.same(returned(state, cleared(state)), state), name


def test_nodes():
    params, x = {"kernel": jnp.ones((4, 8))}, jnp.ones((3, 4))
    state = lrx.galore(1e-2, projector=lrx.projectors.alternating(rank=2)).init(params)
    _, grads = lrx.projected_value_and_grad(
        lambda p, x: jnp.sum(lrx.matmul(x, p["kernel"])), lrx.taps(state)
    )(params, x)
    adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    nodes = {
        "projected": grads,
        "taps": lrx.taps(state),
        "adaptation": adaptation,
        "attached": lrx.attach(params, adaptation),
        "blocks": lrx.linalg.quantize_blocks(jnp.arange(64.0).reshape(2, 32), "signed", 16),
        "nf4": lrx.linalg.quantize_nf4(jnp.arange(128.0).reshape(64, 2)),
    }
    for name, node in nodes.items():
        assert m.same(returned(node, cleared(node)), node), name


def test_a_train_state():
    model = nn.Dense(6)
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=lrx.galore(1e-2, rank=2))
    moved = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    back = returned(moved, state)
    assert back.step == 1
    assert m.same((back.params, back.opt_state), (moved.params, moved.opt_state))


def test_a_target_of_another_rank_or_kind():
    params = {"dense": {"kernel": jnp.ones((4, 8))}}
    state = lrx.galore(1e-2, rank=2).init(params)
    with pytest.raises(
        ValueError, match=r"MatrixState: basis was saved.*\(4, 2\).*'dense/kernel' has \[\(4, 3\)\]"
    ):
        returned(state, lrx.galore(1e-2, rank=3).init(params))
    with pytest.raises(
        ValueError, match=r"Projected: saved fields \['basis', .*are not \['low', 'sketch'\]"
    ):
        returned(
            state.projection.matrices["dense"]["kernel"], lrx.projection.Projected(jnp.ones(3))
        )
