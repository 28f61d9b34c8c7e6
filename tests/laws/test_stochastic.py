"""A family that draws at random, by whatever mechanism, gets a key of its own for each site and
layer, everywhere."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lrx
from tests.adapters import linen_models as models
from tests.adapters.nnx_models import EveryNnx, inserted, merged

A = lrx.adapters
VIEWS = lrx.Views(rules=tuple(models.RULES.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy(A.lora):
    """LoRA whose scale is another one at each use: no rate, and no field named dropout that is not
    0."""

    stochastic: ClassVar[bool] = True

    def wrap(self, op, site, p, key=None):
        if key is not None:
            p = p | {"scale": p["scale"] * (1 + jax.random.normal(key, p["scale"].shape))}
        return super().wrap(op, site, p)


NOISY, PARAMS = Noisy(rank=2, init="pissa"), models.every_params()


def adapted(params, rules, **options):
    """An adaptation whose delta is not 0."""
    adaptation = lrx.adapt(params, rules, jax.random.key(0), **options)
    return adaptation.replace(train=jax.tree.map(lambda x: x + 0.3, adaptation.train))


ADAPTATION = adapted(PARAMS, {".*/(kernel|embedding)": NOISY}, views=VIEWS)


def bare(key):
    return models.every_bare(lrx.attach(PARAMS, ADAPTATION, key=key), *models.every_input())


def linen(key):
    function = lrx.adapted(
        lambda params, *inputs: models.Every().apply({"params": params}, *inputs)
    )
    return function(lrx.attach(PARAMS, ADAPTATION, key=key), *models.every_input())


def nnx_merged(key):
    model = EveryNnx(nnx.Rngs(0))
    return merged(model, lrx.attach(PARAMS, ADAPTATION, key=key))(*models.every_input())


def nnx_inserted(key):
    model = EveryNnx(nnx.Rngs(0))
    nnx.update(model, PARAMS)
    model, _ = inserted(model, ADAPTATION)
    if key is not None:
        model.train()
        lrx.nnx.seed_dropout(model, key)
    return model(*models.every_input())


def wrapped(key):
    """`WithAdapter` around one layer, whose parameters hold the arrays."""
    base, x = {name: PARAMS["dense"][name] for name in ("kernel", "bias")}, models.every_input()[0]
    model = lrx.linen.WithAdapter(nn.Dense(6), NOISY)
    declared = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = lrx.linen.insert(declared, base, adapted(base, {"kernel": NOISY}))
    return {
        "dense": model.apply({"params": params}, x, rngs={} if key is None else {"dropout": key})
    }


def by_rows(key):
    """Rows that choose among candidates."""
    both = A.candidates({"a": ADAPTATION, "b": ADAPTATION})
    params = lrx.attach(PARAMS, both, ids=jnp.zeros(4, int), key=key)
    return {"dense": lrx.matmul(jnp.ones((4, 8)), params["dense"]["kernel"])}


@pytest.mark.parametrize(
    "entry", [bare, linen, nnx_merged, nnx_inserted, wrapped, by_rows], ids=lambda x: x.__name__
)
def test_a_stochastic_family_draws_on_every_host_and_entry_point(entry):
    run = jax.jit(entry, compiler_options=models.FAST) if entry is not nnx_inserted else entry
    plain, drawn, again = entry(None), run(jax.random.key(1)), run(jax.random.key(1))
    for host, y in plain.items():
        assert not np.allclose(y, drawn[host], atol=1e-2), f"{host} got no key"
        np.testing.assert_array_equal(drawn[host], again[host])


def test_rows_that_choose_draw_each_for_itself():
    assert len(np.unique(np.asarray(by_rows(jax.random.key(1))["dense"][:, 0]))) == 4


def test_keys_differ_by_name_site_and_layer():
    params = {"a": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4, 4))}
    adaptation = lrx.adapt(
        params, {".*": NOISY}, jax.random.key(0), views=lrx.Views(stacked=(".*",))
    )
    attached = lrx.attach(params, {"one": adaptation, "two": adaptation}, key=jax.random.key(1))
    keys = [jax.random.key_data(bound.keys) for node in attached.values() for bound in node.bound]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 2 * 3


@pytest.mark.parametrize(
    "family, draws",
    [
        (A.lora(rank=2), False),
        (A.lora(rank=2, dropout=0.1), True),
        (A.dora(rank=2, dropout=0.1), True),
        (A.vera(rank=2, dropout=0.1), True),
        (A.miss(rank=2, dropout=0.1), True),
        (A.rand_lora(rank=2, dropout=0.1), True),
        (A.dylora(rank=2), True),
        (A.miss(rank=2), False),
        (A.oft(block=2), False),
        (NOISY, True),
    ],
    ids=repr,
)
def test_a_family_says_whether_it_draws(family, draws):
    assert family.stochastic is draws
    kernel = {"kernel": jnp.ones((4, 4))}
    attached = lrx.attach(
        kernel, lrx.adapt(kernel, {"kernel": family}, jax.random.key(0)), key=jax.random.key(1)
    )
    assert (attached["kernel"].bound[0].keys is not None) is draws
