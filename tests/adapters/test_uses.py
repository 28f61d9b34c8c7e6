"""Adapters that only some products of a leaf see: the look-up of a tied table, or its output
layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax as lrx
from experiments.models.llama import Llama, preset
from tests.adapters.nnx_models import inserted, merged

A = lrx.adapters
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 5)))
PARAMS = {
    "embed": {"embedding": jnp.asarray(np.random.default_rng(1).normal(size=(12, 8)), jnp.float32)}
}
EVERY = {"embed/embedding": ("gather",)}
FAMILIES = {
    "lora": A.lora(rank=2),
    "dora": A.dora(rank=2),
    "hira": A.hira(rank=2),
    "oft": A.oft(block=3),
}


def made(family=FAMILIES["lora"], params=PARAMS, **options):
    adaptation = lrx.adapt(params, {".*embedding": family}, jax.random.key(0), **options)
    return adaptation.replace(train=jax.tree.map(lambda x: x + 0.3, adaptation.train))


class Tied(nn.Module):
    """A look-up and its output layer; `transposed` multiplies by the table itself."""

    transposed: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, 8, name="embed")
        x = jnp.tanh(embed(ids))
        return x, lrx.einsum(
            "bsd,vd->bsv", x, embed.embedding
        ) if self.transposed else embed.attend(x)


class TiedNnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)

    def __call__(self, ids):
        x = jnp.tanh(self.embed(ids))
        return x, self.embed.attend(x)


def bare(params, adaptation):
    table = lrx.attach(params, adaptation)["embed"]["embedding"]
    x = jnp.tanh(A.embed(IDS, table))
    return x, A.attend(x, table)


def linen(params, adaptation, **options):
    apply = lambda params: Tied(**options).apply({"params": params}, IDS)  # noqa: E731
    return lrx.adapted(apply)(lrx.attach(params, adaptation))


def nnx_merged(params, adaptation):
    return merged(TiedNnx(nnx.Rngs(0)), lrx.attach(params, adaptation))(IDS)


def nnx_inserted(params, adaptation):
    model = TiedNnx(nnx.Rngs(0))
    nnx.update(model, params)
    return inserted(model, adaptation)[0](IDS)


def untied(look_up, output):
    x = jnp.tanh(look_up["embed"]["embedding"][IDS])
    return x, x @ output["embed"]["embedding"].T


HOSTS = {"bare": bare, "linen": linen, "nnx merged": nnx_merged, "nnx inserted": nnx_inserted}


CASES = [
    *((host, "lora") for host in HOSTS),
    *(("bare", family) for family in ("dora", "hira", "oft")),
]


@pytest.mark.parametrize("host, family", CASES)
def test_a_use_that_is_not_named_sees_the_base(host, family):
    effective = lrx.effective(PARAMS, made(FAMILIES[family]))
    both = HOSTS[host](PARAMS, made(FAMILIES[family]))
    for uses, wanted in (
        ("gather", untied(effective, PARAMS)),
        ("dot_general", untied(PARAMS, effective)),
    ):
        found = HOSTS[host](PARAMS, made(FAMILIES[family], uses={"embed/.*": (uses,)}))
        for y, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
        assert not np.allclose(found[1], both[1], atol=1e-2)


def test_a_product_by_the_table_itself_is_a_use_like_others():
    effective = lrx.effective(PARAMS, made())
    for uses, wanted in ((EVERY, untied(effective, PARAMS)), ({}, untied(effective, effective))):
        for y, want in zip(linen(PARAMS, made(uses=uses), transposed=True), wanted, strict=True):
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "quantised"])
def test_kernels_and_convolutions(coded):
    """Where no use of a dense kernel is named, its product is the base's."""
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(64, 6)), jnp.float32)
    params = {"kernel": lrx.linalg.quantize_nf4(kernel) if coded else kernel}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 64)), jnp.float32)
    adaptation = lrx.adapt(
        params,
        {"kernel": A.lora(rank=2, init="orthogonal")},
        jax.random.key(0),
        uses={"kernel": ("conv_general_dilated",)},
    )
    y = lrx.matmul(x, lrx.attach(params, adaptation)["kernel"])
    np.testing.assert_array_equal(y, lrx.matmul(x, params["kernel"]))


def test_what_a_plain_leaf_cannot_say_is_refused_by_name():
    one, base = made(uses=EVERY), made()
    assert "lora at gather" in str(one)
    for function in (lrx.effective, lrx.merge, lambda params, it: lrx.adapters.unmerge(params, it)):
        with pytest.raises(
            ValueError,
            match=r"\{'embed/embedding': \('gather',\)\}, and a plain leaf serves.*attach",
        ):
            function(PARAMS, one)
    with pytest.raises(ValueError, match=r"'embed/embedding': \('gather',\).*takes up an offset"):
        A.absorb(PARAMS, made(A.lora(rank=2, init="pissa"), uses=EVERY))
    for function in (A.hot_swap, lambda x, y: A.candidates({"x": x, "y": y})):
        with pytest.raises(ValueError, match=r"'embed/embedding': uses is \(\) and \('gather',\)"):
            function(base, one)
    with pytest.raises(ValueError, match=r"with MatrixView.* at all uses, 'y' .* at \('gather',\)"):
        A.combine({"x": base, "y": one}, [1.0, 1.0])


def test_a_conversion_keeps_the_uses():
    one = made(A.oft(block=3), uses=EVERY)
    lora, _ = lrx.to_lora(PARAMS, one, rank=8)
    assert lora.layout.sites[0].uses == ("gather",)
    for found, wanted in zip(bare(PARAMS, lora), bare(PARAMS, one), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "uses, error",
    [
        (
            {"embed/embedding": ("lookup",)},
            r"uses: 'embed/embedding' names \('lookup',\); give a tuple out of \('gather',",
        ),
        ({"embed/embedding": "gather"}, "names 'gather'; give a tuple"),
        ({"embed/embedding": ()}, r"names \(\); give a tuple"),
        ({"embed/kernel": ("gather",)}, "uses: 'embed/kernel' matches no leaf"),
        ({"(": ("gather",)}, "uses: '\\(' is not a regular expression"),
    ],
    ids=str,
)
def test_errors_of_uses(uses, error):
    with pytest.raises(ValueError, match=error):
        made(uses=uses)


@pytest.mark.slow
def test_our_model_with_a_tied_head():
    """Look-up alone, output layer alone and both are the untied model with the effective table at
    those places."""
    shape = {
        "layers": 1,
        "width": 16,
        "hidden": 24,
        "heads": 2,
        "kv_heads": 2,
        "vocabulary_size": 12,
    }
    model, other = (Llama(preset("nano", tied_head=tied, **shape)) for tied in (True, False))
    params = model.init(jax.random.key(0), IDS)["params"]
    params = params | {"embed": jax.tree.map(lambda x: 20 * x, params["embed"])}
    logits = lrx.adapted(lambda params: model.apply({"params": params}, IDS))
    effective = lrx.effective(params, made(params=params))
    for uses in ((), ("gather",), ("dot_general",)):
        table, head = (
            (effective if use in (uses or ("gather", "dot_general")) else params)["embed"][
                "embedding"
            ]
            for use in ("gather", "dot_general")
        )
        wanted = other.apply(
            {"params": params | {"embed": {"embedding": table}, "lm_head": {"kernel": head.T}}}, IDS
        )
        found = logits(
            lrx.attach(params, made(params=params, uses={".*embedding": uses} if uses else ()))
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(wanted, model.apply({"params": params}, IDS), atol=1e-2)
