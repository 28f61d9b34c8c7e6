"""To plain LoRA and back into the base: exactly where there are factors, else as near as a rank
allows."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import to_lora
from lowrank_jax.adapters import absorb, padded, weighted

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

VIEWS = lrx.Views(stacked=("layers/.*",))
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "layers": {"kernel": jnp.asarray(normal(0, 2, 8, 6))},
    "out": {"kernel": jnp.asarray(normal(1, 6, 4))},
}


def made(rules, params=PARAMS, spread=0.3, **options):
    adaptation = lrx.adapt(
        params, rules, KEY, views=VIEWS if "layers" in params else None, **options
    )
    leaves, treedef = jax.tree.flatten(adaptation.train)
    new = [leaf + jnp.asarray(spread * normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return adaptation.replace(train=jax.tree.unflatten(treedef, new))


def deltas(adaptation, params=PARAMS):
    """What an adaptation adds to each kernel, float64."""
    found = lrx.effective(params, adaptation)
    tops = {path: path.split("/")[0] for path in adaptation.layout.by_path}
    return {
        path: np.asarray(found[top]["kernel"], np.float64) - params[top]["kernel"]
        for path, top in tops.items()
    }


EXACT = {
    "lora": (lrx.adapters.lora(rank=2, alpha=5), 2),
    "rslora": (lrx.adapters.lora(rank=2, alpha=5, rank_stabilized=True), 2),
    "pissa": (lrx.adapters.lora(rank=2, alpha=3, init="pissa"), 4),
    "olora": (lrx.adapters.lora(rank=2, init="olora"), 4),
    "uni_lora": (lrx.adapters.uni_lora(rank=2, size=16), 2),
}


@pytest.mark.parametrize("name", EXACT)
def test_factors_convert_exactly(name):
    family, rank = EXACT[name]
    adaptation = made(family)
    found, report = to_lora(PARAMS, adaptation)
    for path, delta in deltas(adaptation).items():
        np.testing.assert_allclose(deltas(found)[path], delta, atol=1e-6)
        adapter, site = found.layout.by_path[path]
        assert (
            type(adapter) is lrx.adapters.lora
            and adapter.alpha == adapter.rank == site.rank == rank
        )
        assert (found.frozen["sites"][path]["scale"] == 1).all()
        assert report.how[path] == "as it is" and not report.errors[path].any()
    assert found.trained == rank * (2 * 14 + 10)


def test_the_offset_refers_to_the_kernel_as_it_was():
    """alpha' = 2 alpha at rank 2 r: the same s, against the original kernel."""
    adaptation = made(lrx.adapters.lora(rank=2, alpha=3, init="pissa"), spread=0.0)
    found, _ = to_lora(PARAMS, adaptation)
    assert max(np.abs(delta).max() for delta in deltas(found).values()) < 1e-6
    arrays = found.train["sites"]["out/kernel"]
    np.testing.assert_allclose(arrays["b"][:2], -arrays["b"][2:])


SMALLER = [
    lrx.adapters.lora(rank=4),
    lrx.adapters.dora(rank=2),
    lrx.adapters.oft(block=2),
    lrx.adapters.hira(rank=1),
]


@pytest.mark.parametrize("family", SMALLER, ids=lambda family: family.kind)
def test_a_smaller_rank_is_the_best_one_and_its_error_is_reported(family):
    adaptation = made(family)
    found, report = to_lora(PARAMS, adaptation, rank=2)
    squeezed = isinstance(family, lrx.adapters.lora) and not isinstance(family, lrx.adapters.dora)
    for path, delta in deltas(adaptation).items():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        np.testing.assert_allclose(deltas(found)[path], best, atol=5e-6)
        want = np.sqrt((s[..., 2:] ** 2).sum(-1) / (s**2).sum(-1))
        np.testing.assert_allclose(report.errors[path], want, atol=1e-5)
        assert report.how[path] == ("SVD of the product" if squeezed else "SVD of the difference")
        a, b = (np.asarray(found.train["sites"][path][side], np.float64) for side in "ab")
        np.testing.assert_allclose(
            np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-4
        )  # split evenly
    assert found.trained == 2 * (2 * 14 + 10)


def test_full_rank_is_exact_and_never_more_than_a_matrix_has():
    adaptation = made(lrx.adapters.oft(block=2))
    found, report = to_lora(PARAMS, adaptation, rank=64)
    assert [found.layout.by_path[path][1].rank for path in ("layers/kernel", "out/kernel")] == [
        6,
        4,
    ]
    for path, delta in deltas(adaptation).items():
        np.testing.assert_allclose(deltas(found)[path], delta, atol=5e-6)
        assert not report.errors[path].any()
    small, report = to_lora(PARAMS, made(lrx.adapters.lora(rank=2)), rank=5)
    assert (
        small.layout.by_path["out/kernel"][1].rank == 2 and report.how["out/kernel"] == "as it is"
    )


def spectrum(values, n=8, m=6):
    u, v = np.linalg.qr(normal(3, n, len(values)))[0], np.linalg.qr(normal(4, m, len(values)))[0]
    return jnp.asarray(u * values, jnp.float32), jnp.asarray(v.T, jnp.float32)


def test_energy_gives_each_matrix_its_rank_padded_in_a_stack():
    adaptation = made({"layers/kernel": lrx.adapters.lora(rank=3, alpha=3)})
    pairs = [spectrum([4.0, 2.0, 0.1]), spectrum([1.0, 0.01, 0.01])]
    a, b = (jnp.stack(side) for side in zip(*pairs, strict=True))
    sites = {"layers/kernel": {"a": a, "b": b}}
    adaptation = adaptation.replace(train=adaptation.train | {"sites": sites})
    found, report = to_lora(PARAMS, adaptation, energy=0.99)
    assert report.ranks["layers/kernel"].tolist() == [2, 1]
    assert dict(found.matrices)["layers/kernel"].alphas == (2.0, 1.0)
    np.testing.assert_array_equal(found.frozen["sites"]["layers/kernel"]["scale"], [[1, 1], [1, 0]])
    assert found.trained == 3 * 14
    np.testing.assert_allclose(
        report.errors["layers/kernel"], [0.1 / np.hypot(4, 2), 0.01 * np.sqrt(2)], rtol=0.01
    )
    assert "1 to 2" in str(report) and "SVD of the product" in str(report)
    assert to_lora(PARAMS, adaptation, energy=0.99, rank=1)[1].ranks["layers/kernel"].tolist() == [
        1,
        1,
    ]
    assert to_lora(PARAMS, adaptation, energy=1.0)[1].ranks["layers/kernel"].tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"energy: the ranks depend on values"):
        jax.jit(
            lambda train: to_lora(PARAMS, adaptation.replace(train=train), energy=0.9)[0].train
        )(adaptation.train)


def test_energy_of_a_family_without_factors():
    adaptation = made({"out/kernel": lrx.adapters.oft(block=2)})
    s = np.linalg.svd(deltas(adaptation)["out/kernel"], compute_uv=False)
    share = np.cumsum(s**2) / (s**2).sum()
    _, report = to_lora(PARAMS, adaptation, energy=float((share[0] + share[1]) / 2))
    assert report.ranks["out/kernel"] == 2
    np.testing.assert_allclose(report.errors["out/kernel"], np.sqrt(1 - share[1]), rtol=1e-3)


@pytest.mark.slow
def test_masks_weights_and_ranks_of_a_stack_are_worked_in():
    for family in (
        lrx.adapters.lora(rank=3, alpha=3),
        lrx.adapters.lora(rank=3, alpha=3, init="pissa"),
    ):
        adaptation = made(family, ranks={"layers/kernel": (1, 3)}, alphas={"layers/kernel": (2, 5)})
        wide = weighted(padded(adaptation, 4), 0.5)
        found, report = to_lora(PARAMS, wide)
        times = 2 if family.init == "pissa" else 1
        assert report.ranks["layers/kernel"].tolist() == [times, 3 * times]
        assert found.layout.by_path["layers/kernel"][1].rank == 3 * times
        for path, delta in deltas(wide).items():
            np.testing.assert_allclose(deltas(found)[path], delta, atol=2e-6)
        squeezed, report = to_lora(PARAMS, wide, rank=2)
        assert report.ranks["layers/kernel"].tolist() == [times, 2]
        np.testing.assert_allclose(
            deltas(squeezed)["layers/kernel"][0], deltas(wide)["layers/kernel"][0], atol=5e-6
        )


def test_layers_that_are_left_out_stay_out():
    for family in (lrx.adapters.lora(rank=2), lrx.adapters.oft(block=2)):
        adaptation = made({"layers/kernel": family}, layers=(1,))
        found, report = to_lora(PARAMS, adaptation, rank=2)
        assert report.ranks["layers/kernel"].tolist() == [0, 2]
        assert not found.frozen["sites"]["layers/kernel"]["scale"][0].any()
        assert not deltas(found)["layers/kernel"][0].any()


def test_what_is_trained_whole_and_dropout_go_along_and_bases_may_be_boxed():
    params = {"kernel": jnp.asarray(normal(1, 6, 4)), "bias": jnp.ones(4)}
    adaptation = made(
        {"kernel": lrx.adapters.lora(rank=2, dropout=0.25)}, params, trainable="bias", name="mine"
    )
    found, _ = to_lora(params, adaptation)
    assert found.layout.trainable == ("bias",) and found.layout.name == "mine"
    np.testing.assert_array_equal(
        found.train["trainable"]["bias"], adaptation.train["trainable"]["bias"]
    )
    assert found.layout.by_path["kernel"][0].dropout == 0.25


def test_conversion_errors():
    with pytest.raises(
        ValueError, match=r"'layers/kernel': Oft has no factors.*give rank= or energy="
    ):
        to_lora(PARAMS, made(lrx.adapters.oft(block=2)))
    with pytest.raises(ValueError, match="rank=0 must be a positive integer"):
        to_lora(PARAMS, made(lrx.adapters.oft(block=2)), rank=0)
    with pytest.raises(ValueError, match=r"energy=1.5 must lie in \(0, 1\]"):
        to_lora(PARAMS, made(lrx.adapters.lora(rank=2)), energy=1.5)
    with pytest.raises(ValueError, match="adapted leaf 'layers/kernel'.*is not in params"):
        to_lora({"out": PARAMS["out"]}, made(lrx.adapters.oft(block=2)), rank=1)
    one = made(lrx.adapters.lora(rank=2))
    with pytest.raises(ValueError, match="give one of the adaptations that they were made of"):
        to_lora(PARAMS, lrx.adapters.candidates({"one": one}))


@pytest.mark.parametrize("init", ["pissa", "milora", "olora"])
def test_absorbing_writes_the_offset_into_the_kernel(init):
    before = made(lrx.adapters.lora(rank=2, alpha=3, init=init))
    absorbed, after = absorb(PARAMS, before)
    for path in ("layers", "out"):
        own = before.frozen["sites"][f"{path}/kernel"]
        offset = np.asarray(own["a0"] * own["scale"][..., None, :], np.float64) @ np.asarray(
            own["b0"], np.float64
        )
        np.testing.assert_allclose(
            absorbed[path]["kernel"], PARAMS[path]["kernel"] - offset, atol=1e-6
        )
        if init == "pissa":  # what is left are the small singular values
            s = np.linalg.svd(np.asarray(PARAMS[path]["kernel"], np.float64), compute_uv=False)
            left = np.linalg.svd(np.asarray(absorbed[path]["kernel"], np.float64), compute_uv=False)
            np.testing.assert_allclose(left[..., : s.shape[-1] - 2], s[..., 2:], atol=1e-5)
    assert all(set(arrays) == {"scale"} for arrays in after.frozen["sites"].values())
    assert after.train is before.train
    for a, b in zip(
        jax.tree.leaves(lrx.merge(absorbed, after)),
        jax.tree.leaves(lrx.merge(PARAMS, before)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_what_was_trained_on_an_absorbed_base_goes_back_to_the_original():
    before = made(lrx.adapters.lora(rank=2, init="pissa"), spread=0.0)
    absorbed, after = absorb(PARAMS, before)
    moved = after.replace(train=jax.tree.map(lambda x: x + 0.1, after.train))
    found, _ = to_lora(absorbed, moved)  # refers to the absorbed base: rank r
    assert found.layout.by_path["out/kernel"][1].rank == 2
    other, _ = to_lora(
        PARAMS, before.replace(train=moved.train)
    )  # refers to the original: rank 2 r
    assert other.layout.by_path["out/kernel"][1].rank == 4
    want = lrx.merge(absorbed, moved)
    for got in (lrx.merge(absorbed, found), lrx.merge(PARAMS, other)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_absorbing_into_bfloat16_loses_what_data_would_keep():
    params = {"kernel": jnp.asarray(normal(5, 64, 64), jnp.bfloat16)}
    before = made({"kernel": lrx.adapters.lora(rank=16, init="pissa")}, params, spread=0.0)
    absorbed, after = absorb(params, before)
    assert absorbed["kernel"].dtype == jnp.bfloat16
    wide = params["kernel"].astype(jnp.float32)

    def error(base, adaptation):
        adapter, site = adaptation.layout.by_path["kernel"]
        arrays = adaptation.arrays("kernel")
        return float(
            jnp.abs(
                adapter.effective(site, base["kernel"].astype(jnp.float32), arrays) - wide
            ).max()
        )

    kept, lost = error(params, before), error(absorbed, after)
    assert kept < 1e-5 < 1e-3 < lost < 2**-8 * float(jnp.abs(wide).max())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Coded(lrx.linalg.Codes):
    """A quantised kernel in steps of 1/64."""

    codes: jax.Array

    @property
    def shape(self):
        return self.codes.shape

    def dequantize(self, dtype):
        return self.codes.astype(dtype) / 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Recoded(Coded):
    def requantize(self, kernel):
        return Recoded(jnp.round(kernel * 64).astype(jnp.int32))


def test_quantised_and_boxed_kernels_absorb():
    codes = jnp.round(64 * normal(1, 6, 4)).astype(jnp.int32)
    before = made(
        {"kernel": lrx.adapters.lora(rank=2, init="pissa")}, {"kernel": Recoded(codes)}, spread=0.0
    )
    absorbed, after = absorb({"kernel": Recoded(codes)}, before)
    assert isinstance(absorbed["kernel"], Recoded)
    merged = lrx.merge(absorbed, after)["kernel"].dequantize(jnp.float32)
    np.testing.assert_allclose(merged, codes / 64, atol=1 / 64 + 1e-5)
    with pytest.raises(
        ValueError, match="'kernel': Coded has no requantize; keep the offset as data"
    ):
        absorb({"kernel": Coded(codes)}, before)
    boxed = {"kernel": nn.Partitioned(codes / 64, names=("in", "out"))}
    found, _ = absorb(boxed, before)
    assert found["kernel"].names == ("in", "out")


def test_absorbing_errors():
    with pytest.raises(ValueError, match="'default' has no offset a0, b0: there is nothing"):
        absorb(PARAMS, made(lrx.adapters.lora(rank=2)))
    before = made(lrx.adapters.lora(rank=2, init="pissa"))
    with pytest.raises(ValueError, match=r"adapted leaves \['layers/kernel'\] are not in params"):
        absorb({"out": PARAMS["out"]}, before)
