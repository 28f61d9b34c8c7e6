"""TSR-Adam against a float64 reference written from its rule, given the Gaussian numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.batches import layer_numbers
from lowrank_jax.projection.projectors.random import normal

STEPS, RATE, RANK, EVERY, DECAY = 7, 0.02, 3, 3, 0.1
# the first core of a refresh is diagonal, and a small eps amplifies its rounding
OWN = {"b1": 0.9, "b2": 0.999, "eps": 1e-2, "scale": 0.75, "iterations": 1, "oversample": 5}
SVD = ("iterations", "oversample")


def randomized_svd(g, omega, iterations):
    """Left and right vectors, signs as a convention: the largest entry of a left one is positive."""
    q, _ = np.linalg.qr(g @ omega)
    for _ in range(iterations):
        q, _ = np.linalg.qr(g @ np.linalg.qr(g.T @ q)[0])
    u, _, vt = np.linalg.svd(q.T @ g, full_matrices=False)
    u, v = (q @ u)[:, :RANK], vt[:RANK].T
    signs = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(RANK)])
    return u * signs, v * signs


def tsr(w, grads, omegas, b1, b2, eps, scale, iterations, oversample):
    """The weight `(s, k)`, s the smaller, after all steps."""
    m = n = np.zeros((RANK, RANK))
    for t, g in enumerate(grads):
        if t % EVERY == 0:
            u, v = randomized_svd(g, omegas[t], iterations)
        core = u.T @ g @ v
        m, n = b1 * m + (1 - b1) * core, b2 * n + (1 - b2) * core**2
        rate = RATE * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        w = w - rate * scale * u @ (m / (np.sqrt(n) + eps)) @ v.T
        w = w - RATE * DECAY * w
    return w


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (2, 9, 14)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"iterations": 0, "oversample": 2, "scale": 0.5},
        {"b1": 0.5, "b2": 0.9, "eps": 0.1, "oversample": 20, "iterations": 2},
    ],
)
def test_tsr_adam_is_numpys(shape, options):
    generator, own = np.random.default_rng(0), OWN | options
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    views = lrx.Views(stacked=("kernel",) if len(shape) == 3 else ())
    given = {
        name: value for name, value in ({"eps": own["eps"]} | options).items() if name not in SVD
    }
    sketch = {name: value for name, value in options.items() if name in SVD}
    if sketch:
        given["projector"] = lrx.projectors.randomized_two_sided(rank=RANK, **sketch)
    else:
        given["rank"] = RANK
    tx = lrx.tsr_adam(RATE, refresh_every=EVERY, weight_decay=DECAY, views=views, **given)
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state, update, omegas = tx.init(params), jax.jit(tx.update), []
    view = state.projection.matrices["kernel"].view
    width = min(RANK + own["oversample"], view.shrunk, view.kept)
    for step, grad in enumerate(grads):
        keys = tx.projection.keys(view, step, layer_numbers(view))
        omegas.append(np.asarray(normal(keys, (view.kept, width)), np.float64))
        updates, state = update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    flip = np.transpose if view.side == "cols" else lambda x: x
    stack = lambda x: x if len(shape) == 3 else x[None]  # noqa: E731
    # (layers, steps, ...)
    grads, omegas = (stack(np.moveaxis(np.asarray(x), 0, -3)) for x in (grads, omegas))
    for layer, w in enumerate(stack(weight)):
        want = tsr(flip(w), [flip(g) for g in grads[layer]], omegas[layer], **own)
        got = flip(stack(np.asarray(params["kernel"]))[layer])
        np.testing.assert_allclose(got - flip(w), want - flip(w), rtol=1e-3, atol=5e-5)


def test_with_power_enough_it_is_the_singular_vectors():
    x = jax.random.normal(jax.random.key(0), (9, 14))
    inputs = lrx.projectors.RefreshInputs(target=x, key=jax.random.key(1))
    found = []
    for projector in (
        lrx.projectors.randomized_two_sided(rank=3, iterations=30),
        lrx.projectors.svd_two_sided(rank=3),
    ):
        view = lrx.resolution.resolve(x, rank=projector.rank_for).projected[0]
        made = projector.init(view, jax.random.key(2))
        found.append(projector.refresh(view, *made, inputs)[0])
    for own, exact in zip(*found, strict=True):
        np.testing.assert_allclose(own, exact, atol=1e-4)


def along(new, old):
    return new * np.where(np.sum(new * old, axis=0) < 0, -1, 1)


def tsr_by_sketches(w, grads, bases, drawn, b1, b2, eps, scale):
    """The weight after all steps, whose bases move after a step, by two thin products."""
    m = n = np.zeros((RANK, RANK))
    u, v = bases
    for t, g in enumerate(grads):
        core = u.T @ g @ v
        m, n = b1 * m + (1 - b1) * core, b2 * n + (1 - b2) * core**2
        rate = RATE * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        w = w - rate * scale * u @ (m / (np.sqrt(n) + eps)) @ v.T
        if t % EVERY == 0:
            left, right = drawn if t == 0 else (u, v)
            u, v = (
                along(np.linalg.qr(g @ right)[0], u),
                along(np.linalg.qr(g.T @ left)[0], v),
            )
    return w


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (2, 9, 14)])
@pytest.mark.parametrize("projected", [False, True])
def test_a_refresh_by_thin_products_is_numpys(shape, projected):
    """Of full gradients and of taps: the loss is linear, so that G is what is given."""
    generator = np.random.default_rng(0)
    weight, grads = generator.normal(size=shape), generator.normal(size=(STEPS, *shape))
    views = lrx.Views(stacked=("kernel",) if len(shape) == 3 else ())
    projector = lrx.projectors.alternating_two_sided(rank=RANK)
    tx = lrx.tsr_adam(RATE, projector=projector, refresh_every=EVERY, views=views, eps=OWN["eps"])
    assert lrx.projection.gradient_mode(tx.projection) == "sketch at a refresh"

    def loss(params, grad):
        kernel = params["kernel"]
        eye = jnp.eye(kernel.shape[-2])
        if kernel.ndim == 2:
            return jnp.sum(lrx.matmul(eye, kernel) * grad)
        products = jax.lax.scan(lambda _, one: (None, lrx.matmul(eye, one)), None, kernel)[1]
        return jnp.sum(products * grad)

    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    if projected:
        state = lrx.fused(tx).init(params)
        step = jax.jit(lrx.train_step(loss, tx))
    else:
        state, update = tx.init(params), jax.jit(tx.update)
    matrix = state.projection.matrices["kernel"]
    view, bases = matrix.view, [np.asarray(side, np.float64) for side in matrix.basis]
    keys = tx.projection.keys(view, 0, layer_numbers(view))
    drawn = np.asarray(normal(keys, (view.shrunk + view.kept, RANK)), np.float64)
    for grad in grads:
        grad = jnp.asarray(grad, jnp.float32)
        if projected:
            params, state, _ = step(params, state, grad)
        else:
            updates, state = update({"kernel": grad}, state, params)
            params = optax.apply_updates(params, updates)
    flip = np.transpose if view.side == "cols" else lambda x: x
    stack = lambda x: x if len(shape) == 3 else x[None]  # noqa: E731
    numbers = {name: OWN[name] for name in ("b1", "b2", "eps", "scale")}
    for layer, w in enumerate(stack(weight)):
        own = [flip(g) for g in stack(np.moveaxis(grads, 0, -3))[layer]]
        pair = stack(drawn)[layer][: view.shrunk], stack(drawn)[layer][view.shrunk :]
        of_layer = [stack(side)[layer] for side in bases]
        want = tsr_by_sketches(flip(w), own, of_layer, pair, **numbers)
        got = flip(stack(np.asarray(params["kernel"]))[layer])
        np.testing.assert_allclose(got - flip(w), want - flip(w), rtol=1e-3, atol=5e-5)


def test_sketches_of_both_sides_find_the_singular_vectors():
    x = jnp.asarray(np.diag(0.5 ** np.arange(9.0)) @ np.eye(9, 14), jnp.float32)
    tx = lrx.scale_by_projection(
        lrx.projectors.alternating_two_sided(rank=3),
        refresh_schedule=lrx.refresh_schedules.every_step(),
    )
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in range(30):
        _, state = update(x, state)
    left, right = state.matrices.basis
    np.testing.assert_allclose(np.abs(left), np.eye(9, 3), atol=1e-3)
    np.testing.assert_allclose(np.abs(right), np.eye(14, 3), atol=1e-3)


def test_its_adam_is_that_of_its_code():
    adam = lrx.tsr_adam(1e-2, rank=2).projection.inner
    assert (adam.b1, adam.b2, adam.eps, adam.convention) == (0.9, 0.999, 1e-6, "hf")


def test_steps_between_refreshes_read_the_core_alone():
    tx = lrx.tsr_adam(1e-2, rank=2)
    assert lrx.projection.gradient_mode(tx.projection) == "full at a refresh"
    params, x = {"kernel": jnp.ones((6, 10))}, jnp.ones((4, 6))
    loss = lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"]) ** 2)  # noqa: E731
    taps = lrx.taps(tx.init(params))
    _, grads = lrx.projected_value_and_grad(loss, taps)(params, x)
    assert grads["kernel"].low.shape == (2, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refresh_every": 0}, "period=0"),
        ({"rank": None}, "rank=None"),
        ({"projector": lrx.projectors.svd_two_sided(rank=2)}, "both fix the rank"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrx.tsr_adam(1e-2, **{"rank": 4} | options)


@pytest.mark.parametrize("name", SVD)
def test_negative_counts_are_refused(name):
    with pytest.raises(ValueError, match=f"randomized_two_sided: {name}=-1"):
        lrx.projectors.randomized_two_sided(rank=2, **{name: -1})
