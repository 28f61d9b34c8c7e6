"""Products of our models on one axis of rows: no gradient of a kernel contracts two axes, and
nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import lowrank_jax as lrx
from experiments.benchmarks.workload import VIEWS
from experiments.models import divided, llama, vit

TINY = llama.preset("nano", layers=2, width=32, hidden=48, heads=4, kv_heads=2, sequence_length=12)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 259, (2, 12)))
MODELS = {
    "llama": (llama, llama.Llama(TINY), TOKENS),
    "tied, unscanned": (llama, llama.Llama(llama.preset(
        "nano", layers=1, width=32, hidden=48, heads=4, kv_heads=4, sequence_length=12, tied_head=True, scan=False
    )), TOKENS),
    "vit": (vit, vit.Vit(vit.preset("digits", layers=2, width=32, hidden=48)), jnp.ones((2, 8, 8, 1))),
}  # fmt: skip


def start(model, x):
    params = model.init(jax.random.key(0), x)["params"]
    return params, lambda params, x: jnp.mean(jnp.sin(model.apply({"params": params}, x)))


def products(jaxpr):
    """Every dot_general of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from products(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x):
    return isinstance(x, (core.ClosedJaxpr, core.Jaxpr))


def contracted(function, *args):
    """How many axes each product of a function contracts."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [len(equation.params["dimension_numbers"][0][0]) for equation in products(jaxpr)]


def plain_gradient(params, loss, x):
    return contracted(jax.grad(loss), params, x)


def tapped_gradient(params, loss, x):
    tx = lrx.galore(1e-2, projector=lrx.projectors.alternating(rank=4), views=VIEWS)
    step = lrx.train_step(loss, tx)
    return contracted(step, params, tx.init(params), x)


def adapted_gradient(params, loss, x):
    adaptation = lrx.adapt(
        params, {".*_proj/kernel": lrx.adapters.dora(rank=2)}, jax.random.key(1), views=VIEWS
    )
    function = lrx.adapted(loss)
    train = lambda train: function(lrx.attach(params, adaptation.replace(train=train)), x)  # noqa: E731
    return contracted(jax.grad(train), adaptation.train)


GRADIENTS = {"plain": plain_gradient, "tapped": tapped_gradient, "adapted": adapted_gradient}


@pytest.mark.parametrize(
    ("model", "gradient"),
    [(model, "plain") for model in MODELS] + [("llama", "tapped"), ("llama", "adapted")],
)
def test_no_product_of_a_gradient_contracts_two_axes(model, gradient):
    _, module, x = MODELS[model]
    counts = GRADIENTS[gradient](*start(module, x), x)
    assert len(counts) > 20 and set(counts) == {1}


@pytest.fixture
def unflattened(monkeypatch):
    """`unflattened(module)`: its models multiply by `jax.lax.dot_general` from now on."""

    def patch(module):
        for own in (module, divided):
            monkeypatch.setattr(own, "dot_general", jax.lax.dot_general)

    return patch


@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_those_of_products_on_all_axes(model, unflattened):
    module, own, x = MODELS[model]
    params, loss = start(own, x)
    both = lambda params: jax.jit(jax.value_and_grad(loss))(params, x)  # noqa: E731
    found = both(params)
    unflattened(module)
    jax.clear_caches()
    assert max(contracted(jax.grad(loss), params, x)) == 2
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), found, both(params)
    )


@pytest.mark.parametrize("remat", [False, True, "dots_with_no_batch_dims_saveable"])
def test_a_scan_keeps_no_second_copy_of_an_input(remat, unflattened):
    """Queries, keys and values read one x, which the backward pass needs once."""
    model = llama.Llama(llama.preset("nano", sequence_length=64, remat=remat))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def temporaries():
        loss = lambda params, x: jnp.mean(jnp.sin(model.apply({"params": params}, x)))  # noqa: E731
        return (
            jax.jit(jax.grad(loss))
            .lower(params, tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    found = temporaries()
    unflattened(llama)
    jax.clear_caches()
    assert found <= 1.001 * temporaries()


def test_every_derivative_is_that_of_the_product():
    x, kernel = (
        jnp.asarray(np.random.default_rng(i).normal(size=size), jnp.float32)
        for i, size in enumerate([(2, 3, 4), (4, 5, 6)])
    )
    numbers = (((2,), (0,)), ((), ()))
    own = lambda x, kernel: jnp.sin(lrx.dot_general(x, kernel, numbers))  # noqa: E731
    reference = lambda x, kernel: jnp.sin(jax.lax.dot_general(x, kernel, numbers))  # noqa: E731
    assert own(x, kernel).shape == (2, 3, 5, 6)
    tangents = (jnp.cos(x), jnp.cos(kernel))
    for transform in (
        lambda f: f(x, kernel),
        lambda f: jax.jvp(f, (x, kernel), tangents),
        lambda f: jax.hessian(lambda *args: jnp.sum(f(*args)))(x, kernel),
        lambda f: jax.vmap(f, in_axes=(None, 0))(x, jnp.stack([kernel, 2 * kernel])),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            transform(own),
            transform(reference),
        )
