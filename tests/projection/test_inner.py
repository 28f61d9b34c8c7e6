"""Adam in its two conventions, optax transformations inside, and the moments protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax import linalg
from lowrank_jax.optim import inner as inner_lib

GRADS = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("convention", ["torch", "hf"])
def test_adam_is_numpys(convention):
    b1, b2, eps = 0.8, 0.95, 0.3
    adam = lrx.inner.adam(b1=b1, b2=b2, eps=eps, convention=convention)
    state = adam.init(jnp.zeros((3, 5)))
    m = v = np.zeros((3, 5))
    for t, g in enumerate(GRADS, 1):
        direction, scale, state = adam.update(jnp.asarray(g), state)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        if convention == "torch":
            expected = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        else:
            expected = np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        np.testing.assert_allclose(scale * direction, expected, rtol=2e-5)
        np.testing.assert_allclose(scale, np.sqrt(1 - b2**t) / (1 - b1**t), rtol=1e-5)
    assert int(state.count) == 4


def test_adam_is_optaxs_and_stores_what_it_is_told():
    adam, reference = lrx.inner.adam(b2=0.9999), optax.scale_by_adam(b2=0.9999)
    state, expected_state = adam.init(jnp.zeros((3, 5))), reference.init(jnp.zeros((3, 5)))
    for g in GRADS:
        direction, scale, state = adam.update(jnp.asarray(g), state)
        expected, expected_state = reference.update(jnp.asarray(g), expected_state)
    np.testing.assert_allclose(scale * direction, expected, rtol=1e-3)
    low = lrx.inner.adam(mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16)
    _, _, state = low.update(jnp.asarray(GRADS[0]), low.init(jnp.zeros((3, 5))))
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float16)
    assert low.state_bytes([15, 2]) == 4 + 17 * 4


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.0, 1 - 1e-7])
def test_debias_does_not_cancel(decay):
    for count in (1, 10, 1000):
        expected = -np.expm1(count * np.log(decay)) if decay else 1.0
        np.testing.assert_allclose(inner_lib.debias(decay, jnp.int32(count)), expected, rtol=1e-5)
    np.testing.assert_allclose(
        inner_lib.debias(jnp.float32(0.9), jnp.int32(5)), 1 - 0.9**5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "transformation, kinds",
    [
        (optax.scale_by_adam(), ["first", "second"]), (optax.scale_by_amsgrad(), ["first", "second", "max"]),
        (optax.scale_by_lion(), ["first"]), (optax.trace(0.9), ["first"]), (optax.scale_by_rms(), ["second"]),
        (optax.scale_by_factored_rms(), ["factored", "factored", "second"]), (optax.identity(), []),
        (optax.chain(optax.clip(1.0), optax.scale_by_adam()), ["first", "second"]),
        (optax.masked(optax.scale_by_lion(), True), ["first"]),
    ],
)  # fmt: skip
def test_moments_of_optax_states(transformation, kinds):
    inner = inner_lib.as_inner(transformation)
    state = inner.init(jnp.ones((3, 5)))
    assert [moment.kind for moment in inner.moments(state)] == kinds
    doubled = inner_lib.map_moments(inner, state, lambda moment, value: value + 1)
    changed = [
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(state), strict=True)
    ]
    assert sum(changed) == len(kinds)


def test_register_moments_teaches_a_new_state():

    from typing import Any, NamedTuple

    class OwnState(NamedTuple):
        average: Any

    own = optax.GradientTransformation(
        lambda params: OwnState(jnp.zeros_like(params)),
        lambda g, state, params=None: (g, OwnState(state.average + g)),
    )
    build = lambda: lrx.scale_by_projection(  # noqa: E731
        lrx.projectors.svd(rank=2),
        inner=own,
        plain=optax.identity(),
        transport=lrx.transports.rotate(),
    )
    with pytest.raises(ValueError, match="unregistered"):
        build().init({"kernel": jnp.ones((4, 6))})
    inner_lib.register_moments(OwnState, {"average": "first"})
    build().init({"kernel": jnp.ones((4, 6))})


def test_an_inner_of_ones_own_sees_one_matrix_or_the_stack():
    """What `view` and the gradient are, with and without `batched`, on a stack with head axes."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Own(lrx.inner.Inner):
        batched: bool = False

        def init(self, tree, view=None):
            seen.append((tree.shape, view.batch, view.fan_in, view.cols_shape))
            return ()

        def update(self, grads, state, *, view=None, params=None, **extra):
            seen.append((grads.shape, view.batch, view.fan_out, extra))
            return grads, jnp.ones(view.batch), state

    views = lrx.Views(rules=(("q/kernel", lrx.MatrixView(batch=(1,), rows=(0,), cols=(2, 3))),))
    params = {"q": {"kernel": jnp.ones((4, 2, 3, 5))}}
    for batched, shape, batch in ((False, (2, 15), ()), (True, (2, 2, 15), (2,))):
        tx = lrx.scale_by_projection(
            lrx.projectors.svd(rank=2), inner=Own(batched), plain=optax.identity(), views=views
        )
        state = tx.init(params)
        assert seen.pop() == (shape, batch, 15, {})  # its contract is asked once, of shapes
        tx.update(params, state, params, value=1.0)
        assert set(map(str, seen)) == {
            str((shape, batch, 4, (3, 5))),
            str((shape, batch, 15, {"value": 1.0})),
        }
        seen.clear()


def test_what_is_no_inner_is_refused_by_the_name_of_the_class():
    with pytest.raises(ValueError, match="an lrx.inner.Inner of your own"):
        inner_lib.as_inner(object())
    with pytest.raises(TypeError, match="Inner does not implement init"):
        lrx.inner.Inner().init(jnp.ones(3))
    with pytest.raises(TypeError, match="state tuple is not registered.*register_moments"):
        lrx.inner.Inner().by_leaf(())


@pytest.mark.parametrize(
    "inner",
    [lrx.inner.adam(mu_dtype=jnp.bfloat16), lrx.inner.stored8(minimum=16, block=4), optax.scale_by_lion()],
)  # fmt: skip
def test_state_bytes_of_several_leaves(inner):
    inner, shapes = inner_lib.as_inner(inner), [(3, 8), (5,), 7]
    state = inner.init([jnp.zeros(shape) for shape in shapes])
    assert inner.state_bytes(shapes) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_params_are_projected_for_an_inner_that_wants_them():
    """`PᵀW` reaches weight decay inside the subspace."""
    w, g = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    indices = (0, 2)
    build = lambda inner: lrx.scale_by_projection(  # noqa: E731
        lrx.projectors.columns(select=indices),
        inner=inner,
        refresh_schedule=lrx.refresh_schedules.never(),
    )
    decay = optax.add_decayed_weights(0.5)
    told = build(lrx.inner.from_optax(decay, params=True))
    updates, _ = told.update(jnp.asarray(g), told.init(jnp.asarray(w)), jnp.asarray(w))
    expected = np.zeros_like(g)
    expected[list(indices)] = (g + 0.5 * w)[list(indices)]
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="from_optax.*params=True"):
        build(decay).update(jnp.asarray(g), build(decay).init(jnp.asarray(w)), jnp.asarray(w))
    with pytest.raises(ValueError, match="needs params"):
        told.update(jnp.asarray(g), told.init(jnp.asarray(w)))


def test_a_decomposition_that_fails_leaves_soap_the_bases_it_had(monkeypatch):
    """Of the first call and of a later one; the next one that does not fail goes on."""
    soap = lrx.inner.soap(refresh_every=2)
    states = [soap.init(jnp.zeros((3, 5)))]
    nan = lambda x: jnp.full_like(x, jnp.nan)  # noqa: E731
    for step, name in enumerate(("eigh", None, "orthonormalize", None, None, None)):
        with monkeypatch.context() as patch:
            patch.setattr(linalg, "eigh", lambda x: (nan(x[..., 0]), nan(x)))
            patch.setattr(linalg, "orthonormalize", nan)
            if name is None:
                patch.undo()
            _, _, state = soap.update(jnp.asarray(GRADS[step % 4]), states[-1])
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
        states.append(state)
    assert all(_same(states[0].bases, state.bases) for state in states[:5])
    for basis in states[5].bases:  # of call 4
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)
    direction, _, _ = soap.update(jnp.asarray(GRADS[0]), states[-1])
    assert np.any(direction)


def _same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)
