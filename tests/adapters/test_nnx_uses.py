"""Layers of nnx derived and shared, uses other than by a layer, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lowrank_jax as lrx
from tests.adapters.linen_models import KEY, A, X, adapted, close, moved, total
from tests.adapters.nnx_models import inserted, merged, parameters, plainly

IDS = jnp.array([[1, 2, 0], [8, 3, 3]])
TRAINED = nnx.DiffState(0, lrx.nnx.AdapterParam)


class Scaled(nnx.Embed):
    """A class derived from a layer."""

    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


def test_derived_classes():
    model = Scaled(9, 4, rngs=nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"embedding": A.lora(rank=2)})
    plain = lrx.effective(params, adaptation)["embedding"]
    attached = lrx.attach(params, adaptation)
    close(merged(model, attached)(IDS), 3 * plain[IDS], atol=1e-5)
    graphdef = nnx.graphdef(model)
    attend = lrx.adapted(lambda params, x: nnx.merge(graphdef, params).attend(x))
    close(attend(attached, X[..., :4]), X[..., :4] @ plain.T, atol=1e-5)
    held, _ = inserted(nnx.clone(model), adaptation)
    assert isinstance(held, Scaled)
    close(held(IDS), 3 * plain[IDS], atol=1e-5)
    close(lrx.nnx.adapted(Scaled.attend)(held, X[..., :4]), X[..., :4] @ plain.T, atol=1e-5)
    with pytest.raises(ValueError, match=r"'embedding': .*lrx.nnx.adapted\(nnx.Embed.attend\)"):
        held.attend(X[..., :4])
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
def test_a_table_that_the_model_multiplies_by_itself(use):
    model = Tied(USES[use], nnx.Rngs(0))
    params = parameters(model)
    adaptation = adapted(params, {"embed/embedding": A.lora(rank=2)})
    held, before = inserted(nnx.clone(model), adaptation)

    def of(work, call):
        loss = lambda train: total(call(work(params, adaptation.replace(train=train)))(IDS))  # noqa: E731
        return jax.value_and_grad(loss)(adaptation.train)

    expected = of(lrx.effective, before)
    close(of(lrx.attach, functools.partial(merged, model)), expected, atol=1e-4)
    close(total(held(IDS)), expected[0], atol=1e-4)
    held_grads = nnx.grad(lambda model: total(model(IDS)), argnums=TRAINED)(held)
    got = nnx.to_pure_dict(held_grads)["embed"]["embedding_adapters"][0]["trained"]
    close(got, expected[1]["sites"]["embed/embedding"], atol=1e-4)
    # outside of the call it passes them by
    message = r"adapters of 'embed/embedding': the kernel is .*lrx.nnx.adapted"
    with pytest.raises(ValueError, match=message):
        USES[use](jnp.ones((2, 3, 4)), held.embed.embedding)
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


WINDOW = lrx.MatrixView(rows=(0, 1), cols=(2,))
INPUTS = {"own": jnp.ones((2, 6)), "mixed": jnp.ones((2, 4))}


@pytest.mark.parametrize("path", ["own", "mixed/kernel", "back/kernel"])
def test_any_parameter_can_be_adapted(path):
    """A product of one's own, a layer with one, and a transposed convolution."""
    model = Held(nnx.Rngs(0))
    params = parameters(model)
    views = lrx.Views(rules={path: WINDOW if path == "back/kernel" else lrx.MatrixView()})
    adaptation = adapted(params, {path: A.lora(rank=2)}, views=views)
    name = path.partition("/")[0]
    x = INPUTS.get(name, X)
    use = lambda model, x: x @ model.own if name == "own" else getattr(model, name)(x)  # noqa: E731
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    run = lambda params, x: use(nnx.merge(graphdef, params, rest), x)  # noqa: E731
    expected = run(lrx.effective(params, adaptation), x)
    close(lrx.adapted(run)(lrx.attach(params, adaptation), x), expected, atol=1e-4)
    lrx.nnx.insert(model, adaptation)
    close(lrx.nnx.adapted(use)(model, x), expected, atol=1e-4)
    assert (path + "_adapters") in {
        "/".join(map(str, keys[:-3])) for keys, _ in nnx.to_flat_state(nnx.state(model))
    }


def test_what_cannot_be_adapted_is_refused():
    model = Held(nnx.Rngs(0))
    params = parameters(model)
    views = lrx.Views(rules={"grouped/kernel": WINDOW})
    adaptation = lrx.adapt(params, {"grouped/kernel": A.lora(rank=2)}, KEY, views=views)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    run = lambda params, x: nnx.merge(graphdef, params, rest).grouped(x)  # noqa: E731
    message = r"adapters of 'grouped/kernel': conv_general_dilated at .*feature_group_count=2"
    with pytest.raises(ValueError, match=message):
        lrx.adapted(run)(lrx.attach(params, adaptation), X)
    lrx.nnx.insert(model, adaptation)
    with pytest.raises(ValueError, match=message):
        lrx.nnx.adapted(lambda model, x: model.grouped(x))(model, X)


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
