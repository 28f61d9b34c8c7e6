"""Tensor-GaLore against a float64 reference of a Tucker decomposition, for kernels of convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

STEPS, RATE, EVERY, DECAY = 7, 0.02, 3, 0.1
# a small eps amplifies rounding: the first core of a refresh has entries that are nearly zero
OWN = {"b1": 0.9, "b2": 0.999, "eps": 1e-2, "scale": 1.0}
ITERATIONS = 3


def unfolded(x, axis):
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def leading(x, axis, rank):
    """Left singular vectors; the largest entry of each is positive, as a convention."""
    u = np.linalg.svd(unfolded(x, axis))[0][:, :rank]
    return u * np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(rank)])


def products(x, factors):
    """`x` with each axis multiplied by the factor of it, (n, r), or left where that is None."""
    for axis, factor in enumerate(factors):
        if factor is not None:
            x = np.moveaxis(np.tensordot(x, factor, (axis, 0)), -1, axis)
    return x


def tucker(g, ranks):
    factors = [leading(g, axis, rank) for axis, rank in enumerate(ranks)]
    for _ in range(ITERATIONS):
        for axis, rank in enumerate(ranks):
            others = [None if j == axis else u for j, u in enumerate(factors)]
            factors[axis] = leading(products(g, others), axis, rank)
    return factors


def tensor_galore(w, grads, ranks, b1, b2, eps, scale):
    """The weight after all steps."""
    m = v = np.zeros(ranks)
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            factors = tucker(g, ranks)
        core = products(g, factors)
        m, v = b1 * m + (1 - b1) * core, b2 * v + (1 - b2) * core**2
        rate = RATE * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        w = w - rate * scale * products(m / (np.sqrt(v) + eps), [u.T for u in factors])
        w = w - RATE * DECAY * w
    return w


CONV = lrx.MatrixView(rows=(0, 1, 2), cols=(3,))
CASES = {
    "convolution": ((3, 2, 5, 6), CONV, 3, (3, 2, 3, 3)),
    "the other side": ((3, 2, 2, 14), CONV, 2, (2, 2, 2, 2)),
    "a stack": ((2, 3, 4, 5), lrx.MatrixView(batch=(0,), rows=(1,), cols=(2, 3)), 2, (2, 2, 2)),
    "fractions": ((4, 5, 6), lrx.MatrixView(rows=(1,), cols=(2, 0)), 0.5, (2, 2, 3)),
    "a matrix": ((6, 9), lrx.MatrixView(), 3, (3, 3)),
}


@pytest.mark.parametrize("options", [{}, {"b1": 0.5, "b2": 0.9, "eps": 0.1, "scale": 0.25}])
@pytest.mark.parametrize("name", CASES)
def test_tensor_galore_is_numpys(name, options):
    shape, view, rank, ranks = CASES[name]
    generator, own = np.random.default_rng(0), OWN | options
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    projector = lrx.projectors.tucker(rank=rank, iterations=ITERATIONS)
    tx = lrx.tensor_galore(
        RATE,
        projector=projector,
        refresh_every=EVERY,
        weight_decay=DECAY,
        views=lrx.Views(rules=(("kernel", view),)),
        **own,
    )
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    got = np.asarray(params["kernel"]) - weight
    layers = [slice(None)] if not view.batch else range(shape[0])
    for layer in layers:
        want = tensor_galore(weight[layer], [g[layer] for g in grads], ranks, **own)
        np.testing.assert_allclose(got[layer], want - weight[layer], rtol=1e-3, atol=5e-5)


def test_a_basis_of_a_matrix_is_that_of_both_sides():
    x = jax.random.normal(jax.random.key(0), (6, 9))
    inputs, found = lrx.projectors.RefreshInputs(target=x), []
    for make in (lrx.projectors.tucker, lrx.projectors.svd_two_sided):
        projector = make(rank=2)
        view = lrx.resolution.resolve(x, rank=projector.rank_for).projected[0]
        made = projector.init(view, jax.random.key(0))
        basis, _ = projector.refresh(view, *made, inputs)
        found.append(projector.up(view, basis, projector.down(view, basis, x)))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_moments_turn_with_the_factors():
    """`rotate` moves a first moment as its lifted tensor is projected anew."""
    shape = (3, 4, 5)
    projector = lrx.projectors.tucker(rank=2, iterations=0)
    rules = lrx.Views(rules=(("0", lrx.MatrixView(rows=(0, 1), cols=(2,))),))
    one, two = jax.random.normal(jax.random.key(0), (2, *shape))
    view = lrx.resolution.resolve([one], rules, rank=projector.rank_for).projected[0]
    made = projector.init(view, jax.random.key(0))
    bases = [
        projector.refresh(view, *made, lrx.projectors.RefreshInputs(target=view.orient(x)))[0]
        for x in (one, two)
    ]
    low = projector.down(view, bases[0], view.orient(one))
    change = projector.overlap(view, *bases)
    want = projector.down(view, bases[1], projector.up(view, bases[0], low))
    np.testing.assert_allclose(change.apply(low), want, atol=1e-5)
    squares = change.apply_squared(jnp.ones_like(low))
    assert bool(jnp.all(squares > 0)) and bool(jnp.all(squares <= 1 + 1e-5))


def test_a_tapped_convolution_gives_the_core():
    model, x = nn.Conv(6, (3, 3)), jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    params = model.init(jax.random.key(1), x)["params"]
    loss = lambda params, x: jnp.sum(jnp.sin(model.apply({"params": params}, x)))  # noqa: E731
    views = lrx.Views(rules=(("kernel", CONV),))
    tx = lrx.tensor_galore(1e-2, rank=3, views=views)
    full = jax.grad(loss)(params, x)
    _, state = jax.jit(tx.update)(full, tx.init(params), params)
    matrix = state.projection.matrices["kernel"]
    projector, view = tx.projection.projector, matrix.view
    _, grads = lrx.projected_value_and_grad(loss, lrx.taps(state))(params, x)
    want = projector.down(view, matrix.basis, view.orient(full["kernel"]))
    assert want.shape == (3, 27)
    np.testing.assert_allclose(grads["kernel"].low, want, atol=1e-4)


def test_its_adam_is_that_of_its_code():
    projection = lrx.tensor_galore(1e-2, rank=2).projection
    adam = projection.inner
    assert (adam.b1, adam.b2, adam.eps, adam.convention) == (0.9, 0.999, 1e-6, "hf")
    assert projection.projector.iterations == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refresh_every": 0}, "period=0"),
        ({"rank": None}, "rank=None"),
        ({"rank": (("other", 2),)}, "rank: no pattern matches 'kernel'"),
        ({"rank": 0}, "rank=0 must be a positive integer"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.tensor_galore(1e-2, **{"rank": 4} | options).init({"kernel": jnp.ones((6, 9))})


def test_negative_iterations_are_refused():
    with pytest.raises(ValueError, match="tucker: iterations=-1"):
        lrx.projectors.tucker(rank=2, iterations=-1)
