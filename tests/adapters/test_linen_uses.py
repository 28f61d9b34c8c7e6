"""Uses that would pass the adapters of a linen model by, and what only looks like one."""

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


@pytest.mark.parametrize(
    "model, x, rules",
    [
        (Own(lambda x, kernel: x @ kernel), X, {"kernel": A.lora(rank=2)}),
        (
            Own(lambda x, kernel: jnp.einsum("bsd,df->bsf", x, kernel)),
            X,
            {"kernel": A.lora(rank=2)},
        ),
        (Own(lambda x, kernel: x @ kernel.astype(x.dtype)), X, {"kernel": A.lora(rank=2)}),
        (Own(lambda x, kernel: x[..., :6] * kernel[0]), X, {"kernel": A.lora(rank=2)}),
        (Tied(), jnp.arange(3), {"embed/embedding": A.lora(rank=2)}),
        (nn.ConvTranspose(4, (3,)), X, {"kernel": A.lora(rank=2)}),
    ],
    ids=["matmul", "einsum", "astype", "index", "tied", "conv transpose"],
)
def test_a_use_that_passes_adapters_by_is_refused(model, x, rules):
    params = initial(model, x)
    adaptation = adapted(params, rules, views=CONV if isinstance(model, nn.ConvTranspose) else None)
    (path,) = adaptation.layout.by_path
    for program in (
        on(model),
        jax.jit(on(model)),
        lambda params, x: model.apply({"params": params}, x),
    ):
        with pytest.raises(
            ValueError, match=rf"adapters of '{path}': the kernel is .*lrx.effective"
        ):
            program(lrx.attach(params, adaptation), x)


def test_a_product_by_lr_matmul_is_no_such_use():
    model = Own(lrx.matmul)
    params = initial(model, X)
    adaptation = adapted(params, {"kernel": A.lora(rank=2)})
    expected = model.apply({"params": lrx.effective(params, adaptation)}, X)
    close(on(model)(lrx.attach(params, adaptation), X), expected, atol=1e-5)
    close(jax.jit(on(model))(lrx.attach(params, adaptation), X), expected, atol=1e-5)


def test_a_kernel_that_nothing_uses_is_an_error():
    params = {"up": initial(nn.Dense(6), X), "down": initial(nn.Dense(6), X)}
    adaptation = adapted(params, A.lora(rank=2))
    attached = lrx.attach(params, adaptation)
    half = lambda params, x: nn.Dense(6).apply({"params": params["up"]}, x)  # noqa: E731
    for program in (lrx.linen.adapted(half), jax.jit(lrx.linen.adapted(half))):
        with pytest.raises(
            ValueError, match=r"adapters of \['down/kernel'\]: no layer .* partial=True"
        ):
            program(attached, X)
    expected = half(lrx.effective(params, adaptation), X)
    close(lrx.linen.adapted(half, partial=True)(attached, X), expected, atol=1e-4)
    with pytest.raises(ValueError, match="down/kernel"):  # reading it for nothing is no use
        lrx.linen.adapted(
            lambda params, x: half(params, x) + 0 * params["down"]["kernel"].shape[0]
        )(attached, X)


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
            function = lrx.linen.adapted(lambda params, x, inner=inner: inner(params, x))
            got = function(lrx.attach(params, other), X)
            close(got, nn.Dense(6).apply({"params": lrx.effective(params, other)}, X), atol=1e-4)


def test_wrapping_twice_is_wrapping_once():
    params = initial(nn.Dense(6), X)
    attached = lrx.attach(params, adapted(params, FAMILIES["dora"]))
    close(lrx.linen.adapted(on(nn.Dense(6)))(attached, X), on(nn.Dense(6))(attached, X))


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
        (nn.Conv(4, (3,), feature_group_count=2), "feature_group_count=2"),
        (nn.Conv(4, (3,), mask=jnp.ones((3, 8, 4))), "a mask"),
        (nn.ConvLocal(4, (3,)), "weights that differ"),
    ],
    ids=["groups", "mask", "local"],
)
def test_convolutions_that_are_not_one_matrix(layer, what):
    params = initial(layer, X)
    adaptation = lrx.adapt(params, A.lora(rank=2), KEY, views=CONV)
    with pytest.raises(
        ValueError, match=f"{type(layer).__name__}: a convolution with {what}.*lrx.effective"
    ):
        on(layer)(lrx.attach(params, adaptation), X)


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


def test_taps_of_layers_that_only_take_adapters():
    for layer, x, shape in ((nn.Embed(9, 4), jnp.arange(3), (0,)), (nn.Conv(4, (3,)), X, (0, 1))):
        params = initial(layer, x)
        rules = ((".*(kernel|embedding)", lrx.MatrixView(rows=shape, cols=(len(shape),))),)
        taps = lrx.taps(lrx.galore(1e-2, rank=2, views=lrx.Views(rules=rules)).init(params))
        loss = lrx.linen.tapped(
            lambda params, x, layer=layer: total(layer.apply({"params": params}, x))
        )
        with pytest.raises(ValueError, match="taps|cannot be tapped"):
            lrx.projected_value_and_grad(loss, taps)(params, x)


def test_a_use_that_passes_a_tap_by_is_refused():
    model = Own(lambda x, kernel: x @ kernel)
    params = initial(model, X)
    taps = lrx.taps(lrx.galore(1e-2, rank=2).init(params))
    with pytest.raises(ValueError, match="tap 'kernel': the kernel is read as an array"):
        lrx.projected_value_and_grad(lambda *args: total(on(model)(*args)), taps)(params, X)
