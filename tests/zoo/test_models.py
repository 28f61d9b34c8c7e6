"""Models that others wrote: adapters, taps, optimizers and files, and nothing written for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tunix", reason="needs the packages of the zoo: run `make test-zoo`")

import lowrank_jax as lrx
from experiments.models.foreign import MODELS

FAMILIES = {"lora": lrx.adapters.lora(rank=2), "dora": lrx.adapters.dora(rank=2)}
OPTIMIZERS = {
    "galore": functools.partial(lrx.galore, 2e-3, scale=1.0),
    "frugal": functools.partial(lrx.frugal, 2e-3),
    "dct_adamw": functools.partial(lrx.dct_adamw, 2e-3),
}


@functools.cache
def made(name):
    return MODELS[name]()


def adaptation_of(model, family):
    views = model.rules()
    rules = {path: FAMILIES[family] for path, view in views.rules if view is not None}
    adaptation = lrx.adapt(model.params, rules, jax.random.key(0), views=views)
    leaves, treedef = jax.tree.flatten(adaptation.train)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return adaptation.replace(train=jax.tree.unflatten(treedef, moved))


@pytest.mark.parametrize("name", MODELS)
def test_views_are_read_from_the_program(name):
    model = made(name)
    report = lrx.functions.views_of(model.loss, model.params, model.batch)
    print(report)
    got = {row.path: row.view for row in report.rows}
    assert got == model.table(model.views | model.fused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MODELS)
def test_thin_products_give_what_effective_kernels_give(name, family):
    model = made(name)
    adaptation = adaptation_of(model, family)

    def of(run, make):
        loss = lambda train: run(  # noqa: E731
            make(model.params, adaptation.replace(train=train)), model.batch
        )
        return jax.jit(jax.value_and_grad(loss))(adaptation.train)

    got, grads = of(lrx.adapted(model.loss), lrx.attach)
    want, expected = of(model.loss, lrx.effective)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=model.tolerance * largest)
    plain = model.logits(model.params, model.batch)
    moved = model.logits(lrx.effective(model.params, adaptation), model.batch)
    assert float(jnp.abs(moved - plain).max()) > 0.01 * float(jnp.abs(plain).max())


@pytest.mark.parametrize("name", MODELS)
def test_taps_give_the_projected_gradient_of_every_kernel(name):
    model = made(name)
    state = lrx.scale_by_projection(
        lrx.projectors.random(rank=2), views=model.rules(everything=True)
    ).init(model.params)
    lrx.check_taps(model.loss, lrx.taps(state), model.params, model.batch)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_trains_it(name, optimizer):
    model = made(name)
    tx = OPTIMIZERS[optimizer](rank=4, views=model.rules())
    params, state = model.params, tx.init(model.params)
    step = jax.jit(lrx.train_step(model.loss, tx))
    losses = []
    for _ in range(20):
        params, state, loss = step(params, state, model.batch)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01, losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_the_model_itself_with_other_numbers(name, family):
    model = made(name)
    adaptation = adaptation_of(model, family)
    merged = lrx.merge(model.params, adaptation)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    want = lrx.adapted(model.logits)(lrx.attach(model.params, adaptation), model.batch)
    np.testing.assert_allclose(model.logits(merged, model.batch), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_written_as_peft_reads_it(name, tmp_path):
    model = made(name)
    if model.hugging_face is None:
        pytest.skip("Hugging Face has no such model, or adapts parameters of it, not modules")
    adaptation = adaptation_of(model, "lora")
    options = {"names": model.hugging_face, "views": model.rules(), "head": None}
    lrx.interop.peft.save(tmp_path, adaptation, model.params, **options)
    again = lrx.interop.peft.load(tmp_path, model.params, **options)
    got, want = (lrx.merge(model.params, one) for one in (again, adaptation))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
