"""SOAP against a short float64 NumPy reference, written from the paper and the released steps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.projection.test_golden import problem

STEPS = 8


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(size, seed):
    return np.linalg.qr(drawn(size, size, seed=seed))[0]


def eigenvectors(gram):
    return np.linalg.eigh(gram)[1][:, ::-1]


def soap(grads, first=None, b1=0.9, b2=0.8, b3=None, f=3, limit=100, normalize=False):
    """Updates `scale * direction` of every call on `(rows, cols)` matrices."""
    b3, size = b2 if b3 is None else b3, grads[0].shape
    has = [s <= limit for s in size]
    outer = lambda g: (g @ g.T, g.T @ g)  # noqa: E731
    into = lambda x: q[0].T @ x @ q[1]  # noqa: E731
    grams = [(1 - b3) * x for x in outer(grads[0])]
    q = [eigenvectors(x) for x in grams] if first is None else list(first)
    q = [x if own else np.eye(s) for x, own, s in zip(q, has, size, strict=True)]
    m = v = np.zeros(size)
    updates = [np.zeros(size)]
    for t, g in enumerate(grads[1:], 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * into(g) ** 2
        u = q[0] @ (into(m) / (np.sqrt(v) + 1e-8)) @ q[1].T
        if normalize:
            u = u / np.sqrt(np.mean(u**2))
        updates.append(u * np.sqrt(1 - b2**t) / (1 - b1**t))
        grams = [b3 * x + (1 - b3) * y for x, y in zip(grams, outer(g), strict=True)]
        if t % f == 0:
            for side in (0, 1):
                if has[side]:
                    order = np.argsort(-np.diag(q[side].T @ grams[side] @ q[side]))
                    v = np.take(v, order, axis=side)
                    q[side] = np.linalg.qr(grams[side] @ q[side][:, order])[0]
    return updates


def run(grads, **options):
    """Updates of every call through the projection transformation."""
    tx = lrx.scale_by_projection(lrx.projectors.identity(), inner=lrx.inner.soap(**options))
    params = {"kernel": jnp.zeros(grads.shape[1:])}

    def body(state, g):
        update, state = tx.update({"kernel": g}, state, params)
        return state, update["kernel"]

    state, updates = jax.lax.scan(body, tx.init(params), jnp.asarray(grads, jnp.float32))
    return np.asarray(updates), state.matrices["kernel"].inner


COMMON = {"b1": 0.9, "b2": 0.8, "refresh_every": 3}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_given_bases_in_both_orientations(shape):
    """The bases of the kernel's rows and columns, whichever side is shrunk; a decay of its own."""
    grads = drawn(STEPS, *shape)
    first = rotation(shape[0], 1), rotation(shape[1], 2)
    updates, _ = run(grads, first=(("kernel", first),), b3=0.7, **COMMON)
    np.testing.assert_allclose(updates, soap(grads, first, b3=0.7), atol=2e-3)


@pytest.mark.parametrize("orientation", ["6x4", "4x6"])
def test_the_released_code(golden, orientation):
    """Twelve calls with the bases that its first call made: four steps of the bases."""
    traces = golden("soap_traces")
    defaults = traces["defaults"]
    m, n = (int(size) for size in orientation.split("x"))
    weight, grads = problem(m, n, defaults["steps"])
    for row in traces["rows"]:
        want = row["traces"][orientation]
        first = np.asarray(want["first_right"]), np.asarray(want["first_left"])
        tx = lrx.soap(
            defaults["learning_rate"],
            weight_decay=defaults["weight_decay"],
            refresh_every=defaults["refresh_every"],
            normalize=row["configuration"]["normalize"],
            first=first,
        )
        params = {"kernel": jnp.asarray(weight.T)}
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = update({"kernel": jnp.asarray(grad.T)}, state, params)
            params = optax.apply_updates(params, updates)
        moved = np.asarray(params["kernel"]).T - weight
        got = {"norm": np.linalg.norm(moved), "entry_0_0": moved[0, 0], "entry_1_2": moved[1, 2]}
        for name, value in got.items():
            np.testing.assert_allclose(value, want[name], rtol=row["tolerance"], err_msg=name)


def test_the_first_gradient_gives_the_bases_of_a_square():
    grads = drawn(STEPS, 6, 6)
    updates, _ = run(grads, normalize=True, **COMMON)
    np.testing.assert_allclose(updates, soap(grads, normalize=True), atol=5e-3)
    assert not np.any(updates[0])


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_a_side_that_is_too_long_has_no_basis(shape):
    grads = drawn(STEPS, *shape)
    updates, state = run(grads, max_precond_dim=6, **COMMON)
    np.testing.assert_allclose(updates, soap(grads, limit=6), atol=2e-3)
    assert state.bases.left.shape == (4, 4)
    assert state.bases.right is None
    inner, g = lrx.inner.soap(max_precond_dim=6), jnp.ones(shape)
    assert "7,7" not in str(jax.make_jaxpr(inner.update)(g, inner.init(g)))


def test_without_bases_it_is_adam():
    """Where both sides are too long, and for vectors; the first call moves nothing."""
    tree = {"bias": drawn(STEPS, 5), "kernel": drawn(STEPS, 4, 7, seed=1)}
    inner = lrx.inner.soap(max_precond_dim=3)
    adam = optax.scale_by_adam(b1=0.95, b2=0.95, eps=0.0)
    at = lambda t: jax.tree.map(lambda x: jnp.asarray(x[t], jnp.float32), tree)  # noqa: E731
    state, peer = inner.init(at(0)), adam.init(at(0))
    direction, _, state = inner.update(at(0), state)
    assert not any(np.any(x) for x in jax.tree.leaves(direction))
    for t in range(1, STEPS):
        direction, scale, state = inner.update(at(t), state)
        expected, peer = adam.update(at(t), peer)
        jax.tree.map(
            lambda d, e, scale=scale: np.testing.assert_allclose(scale * d, e, rtol=1e-4),
            direction,
            expected,
        )


def test_a_stack_is_its_matrices_and_decomposes_one_at_a_time():
    """Equal to the matrices one by one; no LAPACK call of a CPU program has batch axes."""
    grads = drawn(STEPS, 3, 40, 40)
    inner = lrx.inner.soap(**COMMON)
    stacked = lrx.scale_by_projection(
        lrx.projectors.identity(), inner=inner, views=lrx.Views(stacked=("kernel",))
    )
    params = {"kernel": jnp.zeros((3, 40, 40))}
    state, update = stacked.init(params), jax.jit(stacked.update)
    for t in range(5):
        updates, state = update({"kernel": jnp.asarray(grads[t], jnp.float32)}, state, params)
    text = update.lower(params, state, params).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "lapack" in line]
    assert {"geqrf", "syevd"} <= set(re.findall("lapack_s([a-z]+)", "".join(calls)))
    assert not [line for line in calls if "[3,40,40]" in line]
    one, _ = run(grads[:5, 1], **COMMON)
    np.testing.assert_allclose(updates["kernel"][1], one[-1], atol=2e-2)


def test_a_matrix_that_starts_again_beside_others():
    """Counts of a stack may differ: each matrix refreshes by its own."""
    shape = (2, 5, 5)
    grads = jnp.asarray(drawn(9, *shape), jnp.float32)
    inner = lrx.inner.soap(**COMMON)
    view = lrx.resolution.resolve(jnp.zeros(shape), lrx.Views(stacked=(".*",)), rank=5).projected[0]
    state = inner.init(jnp.zeros(shape), view)
    single = [inner.init(jnp.zeros(shape[1:])) for _ in range(2)]
    update, update_stack = (
        jax.jit(inner.update),
        jax.jit(functools.partial(inner.update, view=view)),
    )
    for t, g in enumerate(grads):
        if t == 2:
            fresh = inner.init(jnp.zeros(shape), view)
            mask = lambda a, b: jnp.stack([a[0], b[1]])  # noqa: E731
            state = jax.tree.map(mask, state, fresh)
            single[1] = inner.init(jnp.zeros(shape[1:]))
        direction, scale, state = update_stack(g, state)
        for i in range(2):
            own, own_scale, single[i] = update(g[i], single[i])
            np.testing.assert_allclose(scale[i] * direction[i], own_scale * own, atol=2e-3)
    assert state.count.tolist() == [8, 6]


def test_a_step_that_is_not_accepted_changes_nothing():
    g = jnp.asarray(drawn(4, 4), jnp.float32)
    inner = lrx.inner.soap(refresh_every=1)
    _, _, state = inner.update(g, inner.init(g))
    _, _, state = inner.update(g + jnp.eye(4), state)
    _, _, kept = inner.guarded(g * jnp.nan, state, ok=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_what_is_refused():
    for options in ({"b1": 1.0}, {"refresh_every": 0}, {"first": "svd"}, {"max_precond_dim": 2.5}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"soap: {name}={value!r}"):
            lrx.inner.soap(**options)
    g = jnp.ones((4, 6))
    for first, match in [
        ((np.eye(4), np.eye(5)), r"\(5, 5\) for the right"),
        (((("q"), None),), "no pattern"),
    ]:
        inner = lrx.inner.soap(first=first)
        with pytest.raises(ValueError, match=match):
            inner.update(g, inner.init(g))
    tx = lrx.scale_by_projection(
        lrx.projectors.svd(rank=2), inner=lrx.inner.soap(), transport=lrx.transports.rotate()
    )
    with pytest.raises(ValueError, match="rotate does not know how to move .*grams"):
        tx.init({"kernel": g})


def test_state_bytes():
    inner, shapes = lrx.inner.soap(max_precond_dim=5), [(3, 8), (5,), (2, 4, 5)]
    state = inner.init([jnp.zeros(shape) for shape in shapes])
    assert inner.state_bytes(shapes) == sum(x.nbytes for x in jax.tree.leaves(state))
