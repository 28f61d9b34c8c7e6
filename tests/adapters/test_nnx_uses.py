"""Layers of nnx derived and shared, uses that would pass adapters by, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lowrank_jax as lrx
from tests.adapters.linen_models import KEY, A, X, adapted, close, moved
from tests.adapters.nnx_models import inserted, merged, parameters, plainly

IDS = jnp.array([[1, 2, 0], [8, 3, 3]])


class Scaled(nnx.Embed):
    """A class derived from a layer."""

    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


def test_derived_classes():
    model = Scaled(9, 4, rngs=nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"embedding": A.lora(rank=2)})
    plain = lrx.effective(params, adaptation)["embedding"]
    for made in (
        merged(model, lrx.attach(params, adaptation)),
        inserted(nnx.clone(model), adaptation)[0],
    ):
        assert isinstance(made, Scaled)
        close(made(IDS), 3 * plain[IDS], atol=1e-5)
        close(made.attend(X[..., :4]), X[..., :4] @ plain.T, atol=1e-5)
    product = functools.partial(jax.lax.dot_general)
    general = nnx.LinearGeneral(8, 12, dot_general_cls=lambda: product, rngs=nnx.Rngs(0))
    params = parameters(general)
    adaptation = adapted(params, A.lora(rank=2))
    expected = plainly(general, lrx.effective(params, adaptation))(X)
    close(inserted(nnx.clone(general), adaptation)[0](X), expected, atol=1e-5)


class Tied(nnx.Module):
    """A head that uses the table in a way of its own."""

    def __init__(self, use, rngs):
        self.embed = nnx.Embed(9, 4, rngs=rngs)
        self.use = use

    def __call__(self, ids):
        return self.use(self.embed(ids), self.embed.embedding)


USES = {
    "value": lambda x, table: x @ table[...].T,
    "transposed": lambda x, table: x @ table.T,
    "operand": lambda x, table: table @ x[0, 0],
    "array": lambda x, table: jnp.einsum("bsd,vd->bsv", x, table),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_that_passes_adapters_by_is_refused(use):
    model = Tied(USES[use], nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"embed/embedding": A.lora(rank=2)})
    message = r"adapters of 'embed/embedding': the kernel is .*lrx.effective"
    with pytest.raises(ValueError, match=message):
        inserted(nnx.clone(model), adaptation)[0](IDS)
    error, message = (AttributeError, "__matmul__") if use == "operand" else (ValueError, message)
    with pytest.raises(error, match=message):
        merged(model, lrx.attach(params, adaptation))(IDS)
    held, _ = inserted(model, adaptation)
    close(held.embed.embedding.get_value(), params["embed"]["embedding"], rtol=0, atol=0)
    held.embed.embedding[...] = jnp.ones((9, 4))
    close(
        lrx.nnx.extract(held, adaptation)[0]["embed"]["embedding"], jnp.ones((9, 4)), rtol=0, atol=0
    )


def test_a_kernel_of_two_layers():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    model = Shared(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"first/kernel": A.lora(rank=2)})
    expected = plainly(model, lrx.effective(params, adaptation))(X)
    close(merged(model, lrx.attach(params, adaptation))(X), expected, atol=1e-4)
    close(inserted(model, adaptation)[0](X), expected, atol=1e-4)


class Held(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.own = nnx.Param(jnp.ones((6, 4)))
        self.mixed = nnx.Einsum("...d,df->...f", (4, 4), einsum_op=own_einsum, rngs=rngs)
        self.grouped = nnx.Conv(8, 4, (3,), feature_group_count=2, rngs=rngs)
        self.back = nnx.ConvTranspose(8, 4, (3,), rngs=rngs)


def own_einsum(*args, **kwargs):
    return jnp.einsum(*args, **kwargs)


@pytest.mark.parametrize(
    "path, message, when_merged",
    [
        ("own", "'own': it belongs to Held, which multiplies in its own way.*lrx.effective", None),
        ("mixed/kernel", "mixed has its own einsum, .*own_einsum.*cannot be adapted", None),
        ("grouped/kernel", "grouped: a convolution with feature_group_count=2", None),
        (
            "back/kernel",
            "'back/kernel': it belongs to ConvTranspose",
            "back: kernel of nnx.ConvTranspose is adapted",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(path, message, when_merged):
    model = Held(nnx.Rngs(0))
    params = parameters(model)
    folded = path in ("grouped/kernel", "back/kernel")
    views = lrx.Views(rules={path: lrx.MatrixView(rows=(0, 1), cols=(2,))}) if folded else None
    adaptation = lrx.adapt(params, {path: A.lora(rank=2)}, KEY, views=views)
    with pytest.raises(ValueError, match=message):
        lrx.nnx.insert(model, adaptation)
    assert jax.tree.leaves(nnx.state(model, nnx.Param))  # nothing was changed
    if path != "own":  # a module of one's own may call lrx.matmul
        with pytest.raises(ValueError, match=when_merged or message):
            merged(model, lrx.attach(params, adaptation))


def test_errors():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    params = parameters(model)
    adaptation = lrx.adapt(params, A.lora(rank=2), KEY)
    with pytest.raises(
        ValueError,
        match="adaptation 'default': the model has no adapters of it at .*insert it first",
    ):
        lrx.nnx.extract(model, adaptation)
    with pytest.raises(
        ValueError, match=r"leaves \['kernel'\] are no parameters of the model, .* \['embedding'\]"
    ):
        lrx.nnx.insert(nnx.Embed(9, 4, rngs=nnx.Rngs(0)), adaptation)
    with pytest.raises(
        ValueError, match=r"adapted leaf 'kernel', \(8, 6\), is of shape \(8, 5\) in the model"
    ):
        lrx.nnx.insert(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), adaptation)
    lrx.nnx.insert(model, adaptation)
    with pytest.raises(
        ValueError, match="has an adaptation 'default' already; give lrx.adapt another name="
    ):
        lrx.nnx.insert(model, adaptation)

    class Plain(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
            self.free = nnx.data({"scale": nnx.Param(jnp.ones(3))})

    plain = Plain()
    with pytest.raises(
        ValueError, match=r"parameters \['free/scale'\] are in containers .* nnx.Dict"
    ):
        lrx.nnx.insert(plain, lrx.adapt(parameters(plain), A.lora(rank=2), KEY))


def test_an_inner_jit_that_was_traced_before():
    """What a group shares is no argument of it, and is new all the same."""

    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            return jitted(self.up, x)

    jitted = nnx.jit(lambda layer, x: layer(x))
    model = Inner(nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, A.uni_lora(rank=2, size=16))
    held, _ = inserted(nnx.clone(model), adaptation)
    for seed in range(2):
        other = moved(adaptation, seed)
        theta = held.adapter_groups["default"]["unilora"]["trained"]["theta"]
        theta[...] = other.train["shared"]["unilora"]["theta"]
        expected = plainly(model, lrx.effective(params, other))(X)
        close(held(X), expected, atol=1e-4)
        close(merged(model, lrx.attach(params, other))(X), expected, atol=1e-4)
