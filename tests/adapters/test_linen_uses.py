"""Uses of a kernel in linen models other than by Flax's own layers: right, or an error at their line."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx
from tests.adapters.linen_models import (
    FAMILIES,
    KEY,
    A,
    X,
    adapted,
    close,
    initial,
    moved,
    on,
    total,
)

UNI = A.uni_lora(rank=2, size=16)
CONV = lrx.Views(rules={"kernel": lrx.MatrixView(rows=(0, 1), cols=(2,))})


class Own(nn.Module):
    """A product of the model's own: by jax, or by lrx.matmul."""

    multiply: object

    @nn.compact
    def __call__(self, x):
        return self.multiply(x, self.param("kernel", nn.initializers.normal(), (8, 6)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(9, 4, name="embed")
        return embed(ids) @ embed.embedding.T


def both(model, params, adaptation, *args):
    """`(value, gradients)` with adapters attached, and of effective parameters."""

    def of(function, work):
        def loss(train, *args):
            return total(function(work(params, adaptation.replace(train=train)), *args))

        return jax.value_and_grad(loss)(adaptation.train, *args)

    plain = lambda params, *args: model.apply({"params": params}, *args)  # noqa: E731
    return of(on(model), lrx.attach), of(plain, lrx.effective)


KERNEL = {"kernel": A.lora(rank=2)}
USES = {
    "matmul": (Own(lambda x, kernel: x @ kernel), X, KERNEL),
    "einsum": (Own(lambda x, kernel: jnp.einsum("bsd,df->bsf", x, kernel)), X, KERNEL),
    "astype": (Own(lambda x, kernel: x @ kernel.astype(x.dtype)), X, KERNEL),
    "rows": (Own(lambda x, kernel: x[..., :3] @ kernel[:3]), X, KERNEL),
    "lrx.matmul": (Own(lrx.matmul), X, KERNEL),
    "tied": (Tied(), jnp.arange(3), {"embed/embedding": A.lora(rank=2)}),
    "conv transpose": (nn.ConvTranspose(4, (3,)), X, KERNEL),
}


@pytest.mark.parametrize("use", USES)
def test_products_that_are_no_layer_of_flax(use):
    model, x, rules = USES[use]
    params = initial(model, x)
    adaptation = adapted(params, rules, views=CONV if use == "conv transpose" else None)
    got, expected = jax.jit(functools.partial(both, model))(params, adaptation, x)
    close(got, expected, rtol=1e-4, atol=1e-4)
    (value, _), (plain, _) = both(model, params, adaptation, x)
    close(value, plain, rtol=1e-4, atol=1e-4)
    if use != "lrx.matmul":
        with pytest.raises((ValueError, TypeError)):  # not adapted
            model.apply({"params": lrx.attach(params, adaptation)}, x)


REFUSED = {
    "row": (lambda x, kernel: x[..., :6] * kernel[0], "mul"),
    "norm": (lambda x, kernel: x @ (kernel / jnp.linalg.norm(kernel)), "mul|div|square"),
    "sine": (lambda x, kernel: x @ jnp.sin(kernel), "sin"),
}


@pytest.mark.parametrize("use", REFUSED)
def test_a_use_that_is_no_product_is_refused_at_its_line(use):
    multiply, primitive = REFUSED[use]
    model = Own(multiply)
    params = initial(model, X)
    attached = lrx.attach(params, adapted(params, {"kernel": A.lora(rank=2)}))
    message = rf"adapters of 'kernel': ({primitive}) at .*test_linen_uses.py.*lrx.effective"
    for program in (on(model), jax.jit(on(model))):
        with pytest.raises(ValueError, match=message):
            program(attached, X)
    # its matrix may be formed there, where that is asked for
    formed = on(model, dense="kernel")(attached, X)
    close(
        formed,
        model.apply({"params": lrx.effective(params, adapted(params, KERNEL))}, X),
        atol=1e-5,
    )


def test_a_kernel_that_nothing_uses_is_an_error():
    params = {"up": initial(nn.Dense(6), X), "down": initial(nn.Dense(6), X)}
    adaptation = adapted(params, A.lora(rank=2))
    attached = lrx.attach(params, adaptation)
    half = lambda params, x: nn.Dense(6).apply({"params": params["up"]}, x)  # noqa: E731
    for program in (lrx.adapted(half), jax.jit(lrx.adapted(half))):
        with pytest.raises(
            ValueError,
            match=r"adapters of 'down/kernel': no product .*\['down/kernel'\].* partial=True",
        ):
            program(attached, X)
    expected = half(lrx.effective(params, adaptation), X)
    close(lrx.adapted(half, partial=True)(attached, X), expected, atol=1e-4)
    with pytest.raises(ValueError, match="down/kernel"):  # reading it for nothing is no use
        lrx.adapted(lambda params, x: half(params, x) + 0 * params["down"]["kernel"].shape[0])(
            attached, X
        )


def test_an_inner_jit_that_was_traced_before_is_no_such_error():
    jitted, params = nn.jit(nn.Dense)(6), initial(nn.Dense(6), X)
    by_jax = jax.jit(lambda params, x: nn.Dense(6).apply({"params": params}, x))
    by_flax = lambda params, x: jitted.apply({"params": params}, x)  # noqa: E731
    for inner, adapter in (
        (by_jax, A.lora(rank=2)),
        (by_jax, UNI),
        (by_flax, A.lora(rank=2)),
        (by_flax, UNI),
    ):
        adaptation = adapted(params, adapter)
        for seed in range(3):  # the second and third time nothing runs but compiled programs
            other = moved(adaptation, seed)
            function = lrx.adapted(lambda params, x, inner=inner: inner(params, x))
            got = function(lrx.attach(params, other), X)
            close(got, nn.Dense(6).apply({"params": lrx.effective(params, other)}, X), atol=1e-4)


def test_wrapping_twice_is_wrapping_once():
    params = initial(nn.Dense(6), X)
    attached = lrx.attach(params, adapted(params, FAMILIES["dora"]))
    close(lrx.adapted(on(nn.Dense(6)))(attached, X), on(nn.Dense(6))(attached, X))


class Scaled(nn.Embed):
    """A class derived from a layer."""

    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


def test_derived_classes_and_named_arguments():
    layer, ids = Scaled(9, 4), jnp.array([[1, 2], [8, 0]])
    params = initial(layer, ids)
    adaptation = adapted(params, {"embedding": A.lora(rank=2)})
    plain, attached = lrx.effective(params, adaptation), lrx.attach(params, adaptation)
    close(on(layer)(attached, ids), 3 * plain["embedding"][ids], atol=1e-5)
    close(on(nn.Embed(9, 4))(attached, inputs=ids), plain["embedding"][ids], atol=1e-5)
    close(
        on(nn.Embed(9, 4))(attached, query=X[..., :4], method="attend"),
        X[..., :4] @ plain["embedding"].T,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "layer, what",
    [
        (
            nn.Conv(4, (3,), feature_group_count=2),
            "conv_general_dilated .*in groups \\(feature_group_count=2\\)",
        ),
        (nn.Conv(4, (3,), mask=jnp.ones((3, 8, 4))), "mul at .* is no product"),
    ],
    ids=["groups", "mask"],
)
def test_convolutions_that_are_not_one_matrix(layer, what):
    params = initial(layer, X)
    adaptation = lrx.adapt(params, A.lora(rank=2), KEY, views=CONV)
    with pytest.raises(ValueError, match=f"adapters of 'kernel': {what}.*lrx.effective"):
        on(layer)(lrx.attach(params, adaptation), X)


def test_a_convolution_with_weights_of_each_place():
    """`nn.ConvLocal`: every place is a matrix of a batch."""
    layer = nn.ConvLocal(4, (3,))
    params = initial(layer, X)
    views = lrx.Views(rules={"kernel": lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))})
    adaptation = adapted(params, KERNEL, views=views)
    got, expected = both(layer, params, adaptation, X)
    close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "CIRCULAR"},
        {"padding": "CAUSAL", "kernel_dilation": 2},
        {"padding": 1, "input_dilation": 2},
    ],
    ids=str,
)
def test_options_of_convolutions(options):
    layer = nn.Conv(4, (3,), **options)
    params = initial(layer, X)
    adaptation = adapted(params, A.lora(rank=2), views=CONV)
    expected = layer.apply({"params": lrx.effective(params, adaptation)}, X)
    close(on(layer)(lrx.attach(params, adaptation), X), expected, atol=1e-4)


TAPPED = {
    "look-up": (nn.Embed(9, 4), jnp.arange(3), (0,)),
    "conv": (nn.Conv(4, (3,)), X, (0, 1)),
    "tied": (Tied(), jnp.arange(3), (0,)),
    "own product": (Own(lambda x, kernel: x @ kernel), X, (0,)),
}


@pytest.mark.parametrize("use", TAPPED)
def test_taps_of_any_product(use):
    layer, x, rows = TAPPED[use]
    params = initial(layer, x)
    rules = ((".*(kernel|embedding)", lrx.MatrixView(rows=rows, cols=(len(rows),))),)
    projector = lrx.projectors.random(rank=2, kind="orthonormal")
    tx = lrx.scale_by_projection(projector, views=lrx.Views(rules=rules))
    taps = lrx.taps(tx.init(params))
    assert len(taps.taps) == 1
    loss = lambda params, x: total(layer.apply({"params": params}, x))  # noqa: E731
    value, _ = lrx.projected_value_and_grad(loss, taps)(params, x)
    close(value, loss(params, x), rtol=1e-6, atol=1e-6)
    lrx.check_taps(loss, taps, params, x, tolerance=1e-5)


def test_a_use_that_is_no_product_is_no_tap():
    model = Own(lambda x, kernel: x @ jnp.sin(kernel))
    params = initial(model, X)
    taps = lrx.taps(lrx.galore(1e-2, rank=2).init(params))
    loss = lambda params, x: total(model.apply({"params": params}, x))  # noqa: E731
    message = r"tap 'kernel': sin at .*test_linen_uses.py.*weight_decay"
    with pytest.raises(ValueError, match=message):
        lrx.projected_value_and_grad(loss, taps)(params, X)
