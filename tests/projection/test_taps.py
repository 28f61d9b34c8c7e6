"""Projected backprop against full gradients: products, the protocol, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.projection.taps import projection_states

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "layers": {
        "up": {"kernel": normal(3, 8, 12, scale=0.3)},
        "down": {"kernel": normal(3, 12, 8, scale=0.3)},
        "heads": {"kernel": normal(3, 8, 2, 5, scale=0.3)},
        "out": {"kernel": normal(3, 2, 5, 8, scale=0.3)},
    },
    "bias": normal(8),
}
VIEWS = lrx.Views(
    stacked=(r"layers/.*",),
    rules=(
        (r".*/heads/kernel", lrx.MatrixView(rows=(0,), cols=(1, 2))),
        (r".*/out/kernel", lrx.MatrixView(rows=(0, 1), cols=(2,))),
    ),
)
X = normal(4, 6, 8)


def loss(params, x):
    """Two kinds of product, both sides, inside a scan with rematerialisation."""

    @jax.checkpoint
    def layer(x, kernels):
        hidden = jnp.tanh(lrx.matmul(x, kernels["up"]["kernel"]))
        x = x + lrx.matmul(hidden, kernels["down"]["kernel"])
        heads = jnp.sin(lrx.einsum("bsd,dhk->bhsk", x, kernels["heads"]["kernel"]))
        return x + lrx.einsum("bhsk,hkd->bsd", heads, kernels["out"]["kernel"])

    x, _ = jax.lax.scan(
        lambda x, kernels: (layer(x, kernels), None), x + params["bias"], params["layers"]
    )
    return jnp.mean(jnp.square(x - 1))


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(loss))
PROJECTORS = {
    "svd": lrx.projectors.svd(rank=3),
    "svd of full rank": lrx.projectors.svd(rank=1.0),
    "tucker": lrx.projectors.tucker(rank=2, iterations=0),
    "ranked": lrx.projectors.ranked(
        projector=lrx.projectors.dct(rank=3), schedule=lrx.rank_schedules.by_layer(shares=(1, 0.4))
    ),
    "svd_two_sided": lrx.projectors.svd_two_sided(rank=3),
    "dct": lrx.projectors.dct(rank=3),
    "columns": lrx.projectors.columns(rank=3),
    "gaussian": lrx.projectors.random(rank=3),
    "structured": lrx.projectors.random(rank=3, kind="structured"),
    "orthonormal": lrx.projectors.random(rank=3, kind="orthonormal"),
    "power": lrx.projectors.power(rank=3),
    "alternating": lrx.projectors.alternating(rank=3),
    "given": lrx.projectors.given(matrix=np.linalg.qr(RNG.normal(size=(8, 3)))[0]),
    "identity": lrx.projectors.identity(),
}


CASES = [(name, "paper") for name in PROJECTORS] + [
    (name, "larger") for name in ("svd_two_sided", "dct", "columns")
]


@pytest.mark.parametrize(
    "name, side",
    [
        c
        if c[0] in ("svd", "svd of full rank", "columns")
        else pytest.param(*c, marks=pytest.mark.slow)
        for c in CASES
    ],
)
def test_cotangent_of_a_tap_is_the_projected_gradient(name, side):
    projector = PROJECTORS[name]
    tx = lrx.scale_by_projection(projector, views=VIEWS, side=side)
    state = tx.init(PARAMS)
    value, full = VALUE_AND_GRAD(PARAMS, X)
    _, state = jax.jit(tx.update)(full, state, PARAMS)
    taps = lrx.taps(state)
    got, grads = jax.jit(lambda taps: lrx.projected_value_and_grad(loss, taps)(PARAMS, X))(taps)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(grads["bias"], full["bias"], rtol=1e-5, atol=1e-6)
    for view in lrx.explain(tx, PARAMS).projected:
        _, kernel, _ = view.path.split("/")
        matrix = state.matrices["layers"][kernel]["kernel"]
        expected = projector.down(view, matrix.basis, view.orient(full["layers"][kernel]["kernel"]))
        low = grads["layers"][kernel]["kernel"].low
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(
            low, expected, atol=2e-6 * float(jnp.max(jnp.abs(expected))) + 1e-7
        )
    lrx.check_taps(loss, taps, PARAMS, X)


def test_no_full_gradient_is_formed():
    """No instruction of the compiled program has the shape of a tapped kernel's gradient, stacked
    or not, but slices of the kernel itself."""
    params = {"kernel": normal(24, 40)}
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=4, kind="orthonormal"))
    taps = lrx.taps(tx.init(params))
    small = lambda params, x: jnp.mean(jnp.square(jnp.tanh(lrx.matmul(x, params["kernel"]))))  # noqa: E731
    x = normal(16, 24)

    def texts(function):
        return jax.jit(function).lower(params, x).compile().as_text()

    def shaped(text):
        return [
            line
            for line in text.splitlines()
            if "= f32[24,40]" in line and "parameter(" not in line
        ]

    assert shaped(texts(jax.grad(small)))
    assert not shaped(
        texts(
            lambda params, x: lrx.projected_value_and_grad(small, taps)(params, x)[1]["kernel"].low
        )
    )


def test_rows_save_the_projected_input():
    """The forward pass keeps XP (N, r), not X (N, s), where the rows are shrunk."""
    params = {"kernel": normal(32, 64)}
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=2, kind="orthonormal"))
    tapped = lrx.projection.Tapped(
        params["kernel"], lrx.taps(tx.init(params)).taps["kernel"].placed()
    )

    def saved(function):
        _, pullback = jax.vjp(function, normal(10, 32))
        return {leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")}

    # of x only; the projected input rides along
    shapes = saved(lambda x: lrx.matmul(x, tapped))
    assert (10, 2) in shapes
    assert (10, 32) not in shapes


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation_averages_in_the_subspace(accumulate):
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=3, kind="orthonormal"), views=VIEWS)
    taps = lrx.taps(tx.init(PARAMS))
    parts = X.reshape(accumulate, -1, *X.shape[1:]) if accumulate > 1 else X
    value, grads = lrx.projected_value_and_grad(loss, taps, accumulate=accumulate)(PARAMS, parts)
    whole_value, whole = lrx.projected_value_and_grad(loss, taps)(PARAMS, X)
    np.testing.assert_allclose(value, whole_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), grads, whole)


def test_aux_is_returned_and_stacked():
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=3, kind="orthonormal"), views=VIEWS)
    taps = lrx.taps(tx.init(PARAMS))
    with_aux = lambda params, x: (loss(params, x), {"n": jnp.sum(x)})  # noqa: E731
    (_, aux), _ = lrx.projected_value_and_grad(with_aux, taps, has_aux=True)(PARAMS, X)
    np.testing.assert_allclose(aux["n"], jnp.sum(X), rtol=1e-5)
    (_, aux), _ = lrx.projected_value_and_grad(with_aux, taps, has_aux=True, accumulate=2)(
        PARAMS, X.reshape(2, 2, 6, 8)
    )
    np.testing.assert_allclose(aux["n"], X.reshape(2, -1).sum(axis=1), rtol=1e-5)


def test_bfloat16_sums_in_float32():
    """Against float64 products of the same bfloat16 operands: the error is that of rounding XP, not
    of summing."""
    x, kernel = normal(4096, 16).astype(jnp.bfloat16), normal(16, 24).astype(jnp.bfloat16)
    params = {"kernel": kernel}
    tx = lrx.scale_by_projection(lrx.projectors.columns(select=(0, 5, 7)))
    taps = lrx.taps(tx.init(params))
    total = lambda params, x: jnp.sum(lrx.matmul(x, params["kernel"]).astype(jnp.float32))  # noqa: E731
    low = lrx.projected_value_and_grad(total, taps)(params, x)[1]["kernel"].low
    expected = np.asarray(x, np.float64).sum(axis=0)[[0, 5, 7]]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, np.repeat(expected[:, None], 24, axis=1), rtol=1e-4, atol=1e-3)


def test_vmap_gives_a_gradient_for_each_example():
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=3, kind="orthonormal"), views=VIEWS)
    taps = lrx.taps(tx.init(PARAMS))
    one = lambda x: lrx.projected_value_and_grad(loss, taps)(PARAMS, x[None])[1]  # noqa: E731
    each = jax.vmap(one)(X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6), each, one(X[1])
    )


def test_batched_products():
    """Experts: the batch axis of the view is a batch axis of the product."""
    params = {"experts": {"kernel": normal(3, 8, 12)}}
    views = lrx.Views(stacked=(r"experts/.*",))
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=3, kind="orthonormal"), views=views)
    x = normal(3, 5, 8)

    def expert(params, x):
        return jnp.mean(jnp.sin(lrx.einsum("ecd,edf->ecf", x, params["experts"]["kernel"])))

    lrx.check_taps(expert, lrx.taps(tx.init(params)), params, x)


def test_an_unused_tap_is_an_error():
    params = {"a": {"kernel": normal(8, 12)}, "b": {"kernel": normal(8, 12)}}
    taps = lrx.taps(lrx.scale_by_projection(lrx.projectors.random(rank=2)).init(params))
    with pytest.raises(ValueError, match=r"tap 'b/kernel': no product .*uses the kernels"):
        lrx.projected_value_and_grad(lambda p, x: jnp.sum(lrx.matmul(x, p["a"]["kernel"])), taps)(
            params, X
        )


def test_a_second_use_is_found():
    params = {"kernel": normal(8, 12)}
    taps = lrx.taps(lrx.scale_by_projection(lrx.projectors.random(rank=2)).init(params))

    def decayed(params, x):
        kernel = params["kernel"]
        return jnp.sum(lrx.matmul(x, kernel)) + 10 * jnp.sum(jnp.square(kernel))

    with pytest.raises(ValueError, match=r"tap 'kernel': square at .*test_taps.py.*weight_decay"):
        lrx.check_taps(decayed, taps, params, X)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: jnp.einsum("bsd,fd->bsf", x, w),
        lambda x, w: jnp.einsum("bsd,df->bf", x, w),
        lambda x, w: jnp.einsum("bsd,dhk->bhsk", x, w.reshape(8, 2, 4)),
        lambda x, w: x @ w[:, 2:5] + jnp.tile(x @ w[:, :1], 3),
        lambda x, w: x[..., 1:4] @ w[1:4],
        lambda x, w: (jnp.sin(x @ w)) @ w.T,
        lambda x, w: w[jnp.array([3, 1, 1])] @ w,
    ],
)
@pytest.mark.parametrize("name", ["random", "columns"])
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_any_product_of_a_kernel_is_tapped(product, name, side):
    params = {"kernel": normal(8, 8)}
    tx = lrx.scale_by_projection(getattr(lrx.projectors, name)(rank=2), side=side)
    loss = lambda p, x: jnp.sum(jnp.sin(product(x, p["kernel"])))  # noqa: E731
    lrx.check_taps(loss, lrx.taps(tx.init(params)), params, X, tolerance=1e-5)


def test_finding_taps():
    tx = lrx.galore(1e-2, rank=2)
    params = {"kernel": normal(8, 12), "bias": normal(12)}
    state = optax.chain(optax.clip_by_global_norm(1.0), tx).init(params)
    assert list(lrx.taps(state).taps) == ["kernel"]
    with pytest.raises(ValueError, match="holds no ProjectionState"):
        lrx.taps(optax.adam(1e-3).init(params))
    with pytest.raises(ValueError, match="projected by two states"):
        lrx.taps((tx.init(params), tx.init(params)))
    with pytest.raises(ValueError, match=r"taps \['kernel'\] have no leaf"):
        lrx.projected_value_and_grad(loss, lrx.taps(state))({"weight": params["kernel"]}, X)


def simple():
    params = {"kernel": normal(8, 12), "bias": normal(12)}
    function = lambda p, x: jnp.mean(jnp.square(lrx.matmul(x, p["kernel"]) + p["bias"]))  # noqa: E731
    return params, function


def test_two_optimizers_in_one_partition_have_counters_of_their_own():
    """Their tapped steps are those of full gradients, also where one of them refreshed more often."""
    params = {name: {"kernel": normal(8, 8, scale=0.3)} for name in ("down", "up")}
    labels = {name: {"kernel": name} for name in params}

    def two_layers(params, x):
        hidden = jnp.tanh(lrx.matmul(x, params["up"]["kernel"]))
        return jnp.mean(jnp.square(lrx.matmul(hidden, params["down"]["kernel"]) - 1))

    keys = lrx.projectors.random(rank=3, kind="orthonormal")
    periods = {"up": 2, "down": 3}
    parts = {
        name: lrx.galore(
            1e-2,
            projector=keys,
            refresh_schedule=lrx.refresh_schedules.every(period=period, when="after"),
        )
        for name, period in periods.items()
    }
    tx = optax.partition(parts, labels)

    @jax.jit
    def full(params, state):
        updates, state = tx.update(jax.grad(two_layers)(params, X), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def tapped(params, state):
        taps = lrx.taps(state)
        _, grads = lrx.projected_value_and_grad(two_layers, taps)(params, X)
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    expected = found = (params, tx.init(params))
    for _ in range(5):
        expected, found = full(*expected), tapped(*found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    states = projection_states(found[1])
    assert {int(state.refreshes): int(state.skipped) for state in states} == {3: 0, 2: 0}
    taps = lrx.taps(found[1])
    _, grads = lrx.projected_value_and_grad(two_layers, taps)(params, X)
    one = lrx.taps(found[1].inner_states["up"])
    with pytest.raises(ValueError, match=r"taps: \['down/kernel'\] came projected and have no tap"):
        tx.update(grads, found[1], params, taps=one)


def test_stale_taps_skip_the_step():
    params, function = simple()
    tx = lrx.scale_by_projection(
        lrx.projectors.dct(rank=2), refresh_schedule=lrx.refresh_schedules.every(period=2)
    )
    state = tx.init(params)
    old = lrx.taps(state)
    _, state = tx.update(jax.grad(function)(params, X), state, params)
    _, grads = lrx.projected_value_and_grad(function, old)(params, X)
    updates, after = jax.jit(tx.update)(grads, state, params, taps=old)
    assert int(after.skipped) == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after._replace(skipped=state.skipped), state)
    fresh = lrx.taps(state)
    _, grads = lrx.projected_value_and_grad(function, fresh)(params, X)
    _, after = tx.update(grads, state, params, taps=fresh)
    assert (int(after.skipped), int(after.step), int(after.refreshes)) == (0, 2, 1)
    # a refresh is due now, and a projected gradient cannot serve it
    taps = lrx.taps(after)
    _, grads = lrx.projected_value_and_grad(function, taps)(params, X)
    _, refused = tx.update(grads, after, params, taps=taps)
    assert (int(refused.skipped), int(refused.step)) == (1, 2)


def test_errors_of_update():
    params, function = simple()
    tx = lrx.scale_by_projection(lrx.projectors.random(rank=2))
    state = tx.init(params)
    taps = lrx.taps(state)
    _, grads = lrx.projected_value_and_grad(function, taps)(params, X)
    with pytest.raises(ValueError, match="taps=taps"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="taps=taps"):
        tx.update(grads, state, taps=taps)
    signed = lrx.scale_by_projection(lrx.projectors.random(rank=2), residual=lrx.residuals.sign())
    with pytest.raises(ValueError, match="residual Sign reads the full gradient"):
        signed.update(grads, signed.init(params), params, taps=taps)
    every = lrx.scale_by_projection(
        lrx.projectors.svd(rank=2), refresh_schedule=lrx.refresh_schedules.every_step()
    )
    with pytest.raises(ValueError, match="at every step by full gradients"):
        every.update(grads, every.init(params), params, taps=taps)
    with pytest.raises(ValueError, match=r"shape \(1, 12\), not \(2, 12\)"):
        tx.update(
            grads | {"kernel": lrx.projection.Projected(grads["kernel"].low[:1])},
            state,
            params,
            taps=taps,
        )
    with pytest.raises(ValueError, match="leaf that this transformation does not project"):
        tx.update(
            grads | {"bias": lrx.projection.Projected(grads["bias"])}, state, params, taps=taps
        )
    with pytest.raises(ValueError, match="accumulate=3"):
        lrx.projected_value_and_grad(function, taps, accumulate=3)(params, X)
    with pytest.raises(ValueError, match="accumulate=0"):
        lrx.projected_value_and_grad(function, taps, accumulate=0)


def test_wrappers_shaped_like_the_parameters_fail():
    """MultiSteps accumulates full gradients: it must not broadcast a projected one silently."""
    params, function = simple()
    tx = optax.MultiSteps(lrx.scale_by_projection(lrx.projectors.random(rank=2)), 2)
    state = tx.init(params)
    taps = lrx.taps(state)
    _, grads = lrx.projected_value_and_grad(function, taps)(params, X)
    with pytest.raises((ValueError, TypeError)):
        tx.update(grads, state, params, taps=taps)


def test_mixed_tapped_and_full_leaves():
    """Leaves may come full though they are projected: the step is that of full gradients."""
    params = {"a": {"kernel": normal(8, 12)}, "b": {"kernel": normal(12, 8)}}

    def function(p, x):
        return jnp.mean(
            lrx.matmul(jnp.tanh(lrx.matmul(x, p["a"]["kernel"])), p["b"]["kernel"]) ** 2
        )

    tx = lrx.scale_by_projection(
        lrx.projectors.random(rank=2, kind="orthonormal"),
        refresh_schedule=lrx.refresh_schedules.every(period=3, first=False),
    )
    state = tx.init(params)
    state = state._replace(step=state.step + 1)
    taps, full = lrx.taps(state), jax.grad(function)(params, X)
    _, low = lrx.projected_value_and_grad(function, taps)(params, X)
    expected, _ = tx.update(full, state, params)
    got, after = tx.update({"a": low["a"], "b": full["b"]}, state, params, taps=taps)
    assert int(after.skipped) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)
