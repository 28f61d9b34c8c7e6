"""What the adapters draw by a seed is what PyTorch draws: positions, and the banks of VeRA, bit for
bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters.base import Group, Site
from lowrank_jax.adapters.families.rand_lora import torch_banks
from lowrank_jax.adapters.positions import torch_permutation

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "size, count, seed", [(100, 100, 777), (4096 * 32, 1000, 777), (50_000_000, 2000, 0)]
)
def test_permutations_are_those_of_randperm(size, count, seed):
    wanted = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    assert np.array_equal(torch_permutation(size, count, seed), wanted.numpy())


def test_fourierft_is_ifft2_of_a_sparse_spectrum():
    adapter, kernel = lrx.adapters.fourierft(frequencies=30), jnp.zeros((20, 12))
    spectrum = np.random.default_rng(0).normal(size=30).astype(np.float32)
    flat = torch.randperm(20 * 12, generator=torch.Generator().manual_seed(777))[:30]
    dense = torch.zeros(12, 20)
    dense[flat // 20, flat % 20] = torch.tensor(spectrum)
    wanted = 150 * torch.fft.ifft2(dense).real
    p = adapter.start(jax.random.key(0), kernel) | {"spectrum": jnp.asarray(spectrum)}
    np.testing.assert_allclose(
        adapter.effective(adapter.site((20, 12)), kernel, p).T, wanted.numpy(), atol=1e-5
    )


def test_banks_of_vera_are_uniform_of_one_generator():
    generator = torch.Generator().manual_seed(5)
    bound = lambda fan: math.sqrt(3.0) * math.sqrt(2) / math.sqrt(fan)  # noqa: E731
    a = torch.empty(7, 33).uniform_(-bound(33), bound(33), generator=generator)
    b = torch.empty(41, 7).uniform_(-bound(7), bound(7), generator=generator)
    sites = {
        "q": Site(path="q", shape=(33, 20), rank=7),
        "v": Site(path="v", shape=(20, 41), rank=7),
    }
    found = lrx.adapters.vera(rank=7, seed=5).init_shared(
        None, Group(sites=sites, order=(("q", 0), ("v", 0)))
    )[1]
    assert np.array_equal(found["bank_a"], a.numpy().T) and np.array_equal(
        found["bank_b"], b.numpy().T
    )


@pytest.mark.parametrize("bases", ["uniform", "sparse", "very_sparse"])
def test_bases_of_rand_lora_are_drawn_in_torchs_order_and_rounding(bases):
    rank, count, shorter, longer = 3, 4, 10, 33
    generator = torch.Generator().manual_seed(5)
    if bases == "uniform":

        def kaiming(*shape):
            empty = torch.empty(*shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        a = kaiming(rank, 1, shorter)
        b = torch.cat([kaiming(longer, 1, rank) for _ in range(count)], dim=1)
    else:
        share = 1 / 6 if bases == "sparse" else 1 / (2 * math.sqrt(shorter))
        a, b = (
            torch.rand(shape, generator=generator)
            for shape in ((rank, 1, shorter), (longer, count, rank))
        )
        a, b = ((x > 1 - share).float() - (x < share).float() for x in (a, b))
    found = torch_banks(bases, 5, rank, count, shorter, longer)
    for mine, theirs in zip(found, (a[:, 0] / a.std(), b / b.std()), strict=True):
        assert np.array_equal(mine, theirs.float().numpy())
