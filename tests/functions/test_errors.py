"""Every refusal names the leaf, the primitive, the user's line and the remedy."""

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx
from lowrank_jax.matrices import MatrixView
from tests.functions.cases import DENSE, HEADS, STACK, normal

X = normal(3, 6)


@jax.custom_vjp
def unregistered(w, x):
    return x @ w


unregistered.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, dy: (r[1].T @ dy, dy @ r[0].T))


def layered(w, x):
    return jax.lax.scan(lambda c, row: (c + row, None), x, w)[0]


# what a function does with its kernel, the primitive that is named, and the reason
REFUSED = {
    "weight norm": (lambda w, x: x @ (w / jnp.linalg.norm(w)), DENSE, (6, 8), "is no product"),
    "a mask": (lambda w, x: x @ (w * (w > 0)), DENSE, (6, 8), "is no product"),
    "a sum": (lambda w, x: x @ w + jnp.sum(w), DENSE, (6, 8), "reduce_sum at .*is no product"),
    "a stride": (lambda w, x: x @ w[:, ::2], DENSE, (6, 8), "slice at .*with a stride"),
    "a computed place": (
        lambda w, x: x @ jax.lax.dynamic_slice(w, (0, jnp.argmax(x[0])), (6, 2)),
        DENSE,
        (6, 8),
        "dynamic_slice at .*at a place that the program computes",
    ),
    "joined kernels": (
        lambda w, x: x @ jnp.concatenate([w, w], 1),
        DENSE,
        (6, 8),
        "concatenate at",
    ),
    "integers": (lambda w, x: x @ w.astype(jnp.int32), DENSE, (6, 8), "is cast to int32"),
    "rows and columns": (
        lambda w, x: jnp.einsum("bd,dd->b", x, w),
        DENSE,
        (6, 6),
        "is no product",
    ),
    "a part of both": (
        lambda w, x: jnp.einsum("bdk,dhk->bh", jnp.stack([x] * 4, -1), w),
        HEADS,
        (6, 2, 4),
        "a part of the rows and a part of the columns",
    ),
    "scanned rows": (layered, DENSE, (4, 6), "scan at .*no batch axis of its view.*stacked="),
    "custom_vjp": (
        lambda w, x: unregistered(w, x),
        DENSE,
        (6, 8),
        "custom_vjp_call at .*lrx.adapters.rule",
    ),
    "groups": (
        lambda w, x: jax.lax.conv_general_dilated(
            normal(2, 7, 8),
            w,
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        ),
        MatrixView(rows=(0, 1), cols=(2,)),
        (3, 4, 6),
        "conv_general_dilated at .*feature_group_count=2",
    ),
    "an image": (
        lambda w, x: jax.lax.conv_general_dilated(
            w, normal(3, 4, 6), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        STACK,
        (3, 5, 4),
        "convolved as an image",
    ),
    "groups that are no batch": (
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([1, 2])),
        MatrixView(rows=(0, 1), cols=(2,)),
        (2, 6, 8),
        r"MatrixView\(batch=\(0,\)\)",
    ),
    "handed back changed": (
        lambda w, x: jax.lax.scan(lambda c, w: (c @ w, w.T), x, w)[1].sum(),
        STACK,
        (2, 6, 6),
        "returned from a scan, changed",
    ),
}


def attached(view, shape):
    params = {"layer": {"kernel": normal(*shape)}}
    views = lrx.Views(rules={"layer/kernel": view})
    adaptation = lrx.adapt(
        params, {".*": lrx.adapters.lora(rank=1)}, jax.random.key(0), views=views
    )
    return params, lrx.attach(params, adaptation), views


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_is_refused_where_it_stands(name):
    function, view, shape, reason = REFUSED[name]
    params, node, views = attached(view, shape)
    run = lambda params, x: jnp.sum(function(params["layer"]["kernel"], x))  # noqa: E731
    line = r"'layer/kernel': \w+ at .*test_errors.py:\d+"
    with pytest.raises(ValueError, match=line) as adapters:
        lrx.adapted(run)(node, X)
    assert adapters.match(reason)
    assert adapters.match("exclude=.*dense=path.*lrx.effective")
    # a tap's remedy is another
    state = lrx.scale_by_projection(lrx.projectors.random(rank=1), views=views).init(params)
    with pytest.raises(ValueError, match=line) as taps:
        lrx.projected_value_and_grad(run, lrx.taps(state))(params, X)
    assert taps.match(reason) and taps.match(r"Views\(rules=\(\(path, None\),\)\)")


@pytest.mark.parametrize(
    "name", ["weight norm", "a mask", "joined kernels", "groups", "custom_vjp"]
)
def test_dense_forms_the_matrix_at_that_equation_and_never_a_taps(name):
    function, view, shape, _ = REFUSED[name]
    params, node, views = attached(view, shape)
    run = lambda params, x: jnp.sum(jnp.sin(function(params["layer"]["kernel"], x)))  # noqa: E731
    grads = jax.grad(lambda node, x: lrx.adapted(run, dense=".*/kernel")(node, x), allow_int=True)
    got = lrx.adapted(run, dense=".*/kernel")(node, X)
    effective = {"layer": {"kernel": node["layer"]["kernel"].dense()}}
    assert abs(float(got - run(effective, X))) < 1e-5
    found = grads(node, X)["layer"]["kernel"].bound[0].arrays["b"]
    assert float(jnp.abs(found).max()) > 0
    state = lrx.scale_by_projection(lrx.projectors.random(rank=1), views=views).init(params)
    loss = lrx.adapted(run, dense=".*")
    with pytest.raises(ValueError, match="dense= cannot help"):
        lrx.projected_value_and_grad(loss, lrx.taps(state))(params, X)


def test_a_line_is_found_where_jax_jits_its_own_functions():
    _, node, _ = attached(DENSE, (6, 8))
    with pytest.raises(ValueError, match=r"'layer/kernel': \w+ at .*test_errors.py"):
        lrx.adapted(lambda p, x: x @ jnp.pad(p["layer"]["kernel"], ((0, 0), (0, 1))))(node, X)


def test_two_nodes_in_one_product():
    _, node, _ = attached(DENSE, (6, 6))
    with pytest.raises(ValueError, match="dot_general at .*multiplied by another node"):
        lrx.adapted(lambda p: p["layer"]["kernel"] @ p["layer"]["kernel"])(node)
    both = lambda p: p["layer"]["kernel"] @ p["layer"]["kernel"]  # noqa: E731
    found = lrx.adapted(both, dense=".*")(node)
    effective = node["layer"]["kernel"].dense()
    assert float(jnp.abs(found - effective @ effective).max()) < 1e-5


def test_what_nothing_uses():
    _, node, _ = attached(DENSE, (6, 6))
    with pytest.raises(
        ValueError, match=r"no product .*uses the kernels \['layer/kernel'\].*partial"
    ):
        lrx.adapted(lambda p, x: x)(node, X)
    assert lrx.adapted(lambda p, x: x, partial=True)(node, X) is not None
