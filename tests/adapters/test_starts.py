"""How every family starts: which numbers, of which distribution; and what is drawn once for all
sites."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters.base import Group, Site
from lowrank_jax.adapters.positions import keyed_positions, torch_permutation

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

A = lrx.adapters
N, M = 12, 8


def as64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def start_of(adapter, seed=0, shape=(N, M), **site):
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    made = dataclasses.replace(adapter.site(shape, "here"), **site)
    scale = jnp.full(adapter.rank, adapter.scaling(made), jnp.float32)
    train, fixed = adapter.init_site(
        jax.random.key(seed), made, kernel, {"scale": scale, "shared": {}}
    )
    return as64(kernel), as64(train | fixed)


def uniform(x, bound):
    """Within ±bound, with the standard deviation of a uniform distribution."""
    return np.abs(x).max() <= bound and abs(x.std() / (bound / np.sqrt(3)) - 1) < 0.1


def test_start_of_lora_is_uniform_of_its_inputs_and_of_embeddings_normal():
    _, p = start_of(A.lora(rank=16), shape=(64, 32))
    assert uniform(p["a"], 1 / np.sqrt(64)) and not p["b"].any()
    for init in ("kaiming", "gaussian"):
        _, p = start_of(A.lora(rank=16, init=init), shape=(64, 32), lookup=True)
        assert not p["a"].any() and abs(p["b"].std() - 1) < 0.1
    _, p = start_of(A.hira(rank=16), shape=(64, 32), lookup=True)
    assert not p["a"].any() and abs(p["b"].std() - 1) < 0.1


def test_start_gaussian_has_deviation_one_over_r():
    _, p = start_of(A.lora(rank=16, init="gaussian"), shape=(64, 32))
    assert abs(p["a"].std() * 16 - 1) < 0.1 and not p["b"].any()


def test_start_orthogonal_is_two_factors_whose_product_is_zero():
    _, p = start_of(A.lora(rank=6, init="orthogonal"))
    assert np.abs(p["a"] @ p["b"]).max() < 1e-6
    # a = G Q / 10 with a 12 x 3 normal G and three orthonormal rows Q: of rank 3, and of its size
    assert np.linalg.matrix_rank(p["a"], 1e-5) == np.linalg.matrix_rank(p["b"], 1e-5) == 3
    assert 0.5 < np.linalg.norm(p["a"]) / (np.sqrt(N * 3) / 10) < 1.5


def test_start_pissa_is_the_best_approximation_and_milora_the_rest():
    kernel, p = start_of(A.lora(rank=3, alpha=6.0, init="pissa"))
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(2 * p["a"] @ p["b"], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["a"], axis=0), np.sqrt(s[:3] / 2), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["b"], axis=1), np.sqrt(s[:3] / 2), rtol=1e-5)
    assert all(np.array_equal(p[name], p[name + "0"]) for name in "ab")
    kernel, p = start_of(A.lora(rank=3, alpha=6.0, init="milora"))
    np.testing.assert_allclose(2 * p["a"] @ p["b"], (u[:, -3:] * s[-3:]) @ vt[-3:], atol=1e-5)


@pytest.mark.slow
def test_start_pissa_by_subspace_iteration_comes_close():
    kernel, p = start_of(A.lora(rank=3, alpha=6.0, init=A.pissa(iterations=8)), shape=(40, 30))
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    best = np.linalg.norm(kernel - (u[:, :3] * s[:3]) @ vt[:3])
    assert best <= np.linalg.norm(kernel - 2 * p["a"] @ p["b"]) < 1.02 * best
    _, once = start_of(A.lora(rank=3, alpha=6.0, init=A.pissa(iterations=0)), shape=(40, 30))
    assert np.linalg.norm(kernel - 2 * once["a"] @ once["b"]) > 1.02 * best


def test_start_olora_is_the_qr_factorisation_of_the_torch_weight():
    kernel, p = start_of(A.lora(rank=3, alpha=6.0, init="olora"))
    q, r = np.linalg.qr(kernel.T)
    np.testing.assert_allclose(p["b"].T @ p["a"].T, q[:, :3] @ r[:3], atol=1e-5)
    np.testing.assert_allclose(p["b"] @ p["b"].T, np.eye(3), atol=1e-5)


def test_a_smaller_rank_in_a_stack_starts_as_if_it_were_alone():
    """Of padded ranks the start is masked: PiSSA keeps its largest, MiLoRA its smallest triplets,
    orthogonal 0."""
    kernel = np.random.default_rng(3).normal(size=(2, N, M))
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    for init, take in (("pissa", np.arange(M)), ("milora", np.arange(M)[::-1])):
        adaptation = lrx.adapt(
            params,
            A.lora(rank=4, alpha=4.0, init=init),
            jax.random.key(0),
            views=lrx.Views(stacked="kernel"),
            ranks={"kernel": (4, 2)},
        )
        p = as64(adaptation.train["sites"]["kernel"]) | as64(adaptation.frozen["sites"]["kernel"])
        for layer, rank in enumerate((4, 2)):
            own = take[:rank]
            best = (u[layer][:, own] * s[layer][own]) @ vt[layer][own]
            np.testing.assert_allclose(
                (p["a"][layer] * p["scale"][layer]) @ p["b"][layer], best, atol=1e-5
            )
    adaptation = lrx.adapt(
        params,
        A.lora(rank=4, init="orthogonal"),
        jax.random.key(0),
        views=lrx.Views(stacked="kernel"),
        ranks={"kernel": (4, 2)},
    )
    p = as64(adaptation.train["sites"]["kernel"]) | as64(adaptation.frozen["sites"]["kernel"])
    products = (p["a"] * p["scale"][:, None]) @ p["b"]
    assert (
        np.abs(products).max() < 1e-6
        and min(np.abs(p["a"][1, :, :2]).max(), np.abs(p["b"][1, :2]).max()) > 1e-3
    )


def test_start_dora_is_the_norm_of_each_column():
    kernel, p = start_of(A.dora(rank=2))
    np.testing.assert_allclose(p["magnitude"], np.linalg.norm(kernel, axis=0), rtol=1e-6)


def test_start_loha_is_that_of_peft():
    _, p = start_of(A.loha(rank=16), shape=(64, 32))
    assert (
        uniform(p["a1"], 1 / 8)
        and uniform(p["b1"], 1 / 4)
        and uniform(p["b2"], 1 / 4)
        and not p["a2"].any()
    )
    assert np.abs(p["b1"] - p["b2"]).max() > 0.1


def test_start_vera_is_a_number_and_zero():
    for adapter, value in ((A.vera(rank=3), 0.1), (A.vera(rank=3, initial=0.5), 0.5)):
        p = adapter.start(jax.random.key(0), jnp.ones((N, M)))
        np.testing.assert_allclose(p["lambda_d"], [value] * 3, rtol=1e-6)
        assert not p["lambda_b"].any() and p["lambda_b"].shape == (M,)


def test_start_fourierft_is_zero_or_normal():
    kernel = jnp.ones((64, 32))
    assert not A.fourierft(frequencies=500).start(jax.random.key(0), kernel)["spectrum"].any()
    spectrum = A.fourierft(frequencies=500, init="normal").start(jax.random.key(0), kernel)[
        "spectrum"
    ]
    assert abs(float(spectrum.std()) - 1) < 0.1


# shared arrays and positions


def test_uni_lora_draws_the_indices_of_peft():
    """All factors of all modules in order, torch's A (r, n) before B (m, r), are one shuffled
    array."""
    rank, size = 3, 20
    params = {
        "layers_0": {"q": {"kernel": jnp.ones((12, 8))}, "v": {"kernel": jnp.ones((12, 4))}},
        "layers_1": {"q": {"kernel": jnp.ones((12, 8))}, "v": {"kernel": jnp.ones((12, 4))}},
    }
    adaptation = lrx.adapt(
        params, A.uni_lora(rank=rank, size=size, seed=7, bound=0.5), jax.random.key(0)
    )
    order = [(f"layers_{i}/{name}/kernel", m) for i in range(2) for name, m in (("q", 8), ("v", 4))]
    total = sum(rank * (12 + m) for _, m in order)
    generator = np.random.default_rng(7)
    data = np.repeat(np.arange(size), total // size)
    data = np.concatenate([data, generator.choice(size, size=total % size, replace=False)])
    generator.shuffle(data)
    counts = np.bincount(data, minlength=size)
    for path, m in order:
        a, data = data[: rank * 12].reshape(rank, 12), data[rank * 12 :]
        b, data = data[: m * rank].reshape(m, rank), data[m * rank :]
        fixed = adaptation.frozen["sites"][path]
        assert np.array_equal(fixed["ia"], a.T) and np.array_equal(fixed["ib"], b.T)
    assert not data.size
    np.testing.assert_allclose(
        adaptation.frozen["shared"]["unilora"]["norm"], 1 / np.sqrt(counts), rtol=1e-6
    )
    theta = adaptation.train["shared"]["unilora"]["theta"]
    assert theta.shape == (20,) and 0.3 < np.abs(theta).max() <= 0.5


@pytest.mark.parametrize("stacked", [False, True])
def test_uni_lora_counts_only_what_is_adapted(stacked):
    """Layers that are left out and the padding of smaller ranks use no entry: the map from theta is
    an isometry."""
    adapter, options = (
        A.uni_lora(rank=3, size=9),
        {"ranks": {"q/kernel": (3, 1, 2)}, "layers": (0, 1)},
    )
    params, options["views"] = {"q": {"kernel": jnp.ones((3, 6, 4))}}, lrx.Views(stacked="q/.*")
    if not stacked:
        params = {
            "layer_0": {"q": {"kernel": jnp.ones((6, 4))}},
            "layer_1": {"q": {"kernel": jnp.ones((6, 4))}},
        }
        options = {"ranks": {"layer_1/.*": 1}}
    adaptation = lrx.adapt(params, adapter, jax.random.key(0), **options)
    assert set(adaptation.frozen["shared"]) == {"unilora"} and adaptation.trained == 9
    norm, uses = np.asarray(adaptation.frozen["shared"]["unilora"]["norm"], np.float64), np.zeros(9)
    for p in adaptation.frozen["sites"].values():
        flat = lambda name, axes, p=p: np.reshape(p[name], (-1, *p[name].shape[-axes:]))  # noqa: E731
        for ia, ib, scale in zip(flat("ia", 2), flat("ib", 2), flat("scale", 1), strict=True):
            own = scale != 0
            uses += np.bincount(ia[:, own].reshape(-1), minlength=9) + np.bincount(
                ib[own].reshape(-1), minlength=9
            )
    assert uses.sum() == (3 + 1) * 10
    np.testing.assert_allclose(norm**2 * uses, 1, rtol=1e-6)


def test_uni_lora_follows_a_given_order_within_a_stack():
    params, views = {"kernel": jnp.ones((2, 6, 4))}, lrx.Views(stacked="kernel")

    def adapt(order):
        return lrx.adapt(
            params, A.uni_lora(rank=2, size=8), jax.random.key(0), views=views, order=order
        )

    there, back = (
        adapt(order).frozen["sites"]["kernel"] for order in (None, (("kernel", 1), ("kernel", 0)))
    )
    assert np.array_equal(there["ia"], back["ia"][::-1]) and np.array_equal(
        there["ib"], back["ib"][::-1]
    )


def test_vera_draws_the_banks_of_peft():
    """torch's uniform_ on the CPU, `x (hi - lo) + lo` of the low 24 bits of MT19937, vera_A before
    vera_B."""
    sites = {"q": Site(path="q", shape=(7, 4), rank=3), "v": Site(path="v", shape=(5, 9), rank=3)}
    found = A.vera(rank=3, seed=4).init_shared(
        jax.random.key(0), Group(sites=sites, order=(("q", 0), ("v", 0)))
    )[1]
    raw = np.random.RandomState(4).randint(0, 2**32, 3 * (7 + 9), dtype=np.uint32) % 2**24 / 2.0**24
    a, b = (
        np.sqrt(6 / 7) * (2 * raw[:21] - 1).reshape(3, 7),
        np.sqrt(6 / 3) * (2 * raw[21:] - 1).reshape(9, 3),
    )
    np.testing.assert_allclose(found["bank_a"], a.T, atol=1e-6)
    np.testing.assert_allclose(found["bank_b"], b.T, atol=1e-6)
    # recorded from torch 2.13.0: torch.empty(3, 7).uniform_(-bound, bound,
    # generator=Generator().manual_seed(4))
    np.testing.assert_array_equal(
        np.asarray(found["bank_a"])[:3, 0], np.asarray(RECORDED_BANK, np.float32)
    )


RECORDED_BANK = (0.11042926460504532, 0.1094178706407547, -0.7564749717712402)


def test_rand_lora_draws_the_bases_of_peft():
    """The largest sides of the group together, as many bases as the shorter one needs."""
    sites = {"q": Site(path="q", shape=(7, 4), rank=0), "v": Site(path="v", shape=(3, 5), rank=0)}
    ranks = {("q", 0): 2, ("v", 0): 2}
    group = Group(sites=sites, order=tuple(ranks), ranks=ranks)
    for bases, (first, last) in RECORDED_BASES.items():
        found = A.rand_lora(rank=2, seed=5, bases=bases).init_shared(None, group)[1]
        assert found["bank_a"].shape == (2, 5) and found["bank_b"].shape == (7, 3, 2)
        assert found["bank_a"][1].tolist() == first and found["bank_b"][6, 2].tolist() == last


# recorded from PEFT 0.21.2: randlora_A[1, 0] and randlora_B[6, 2] of the seed 5
RECORDED_BASES = {
    "uniform": (
        [-0.9609375, -0.83984375, 0.59375, -1.171875, 1.234375],
        [1.3125, -0.138671875],
    ),
    "sparse": (
        [-1.1420804262161255, -1.1420804262161255, 0.0, -1.1420804262161255, 1.1420804262161255],
        [1.5132393836975098, 0.0],
    ),
    "very_sparse": (
        [-1.005602240562439, -1.005602240562439, 0.0, -1.005602240562439, 1.005602240562439],
        [1.4456161260604858, 0.0],
    ),
}


def test_rand_lora_starts_at_zero_with_even_gammas():
    for shape, gamma in (((6, 4), (2, 4)), ((4, 12), (2, 4)), ((2, 2), (1, 2))):
        _, p = start_of(A.rand_lora(rank=min(3, min(shape))), shape=shape)
        assert not p["lambda"].any() and p["gamma"].shape == gamma
        np.testing.assert_allclose(p["gamma"], 1 / max(gamma))


def test_leaves_of_several_ranks_share_bases_of_the_largest():
    params = {"q": jnp.ones((6, 8)), "v": jnp.ones((4, 4))}
    adaptation = lrx.adapt(params, {".*": A.rand_lora(rank=4)}, jax.random.key(0), ranks={"v": 3})
    shared = adaptation.frozen["shared"]["randlora"]
    assert shared["bank_a"].shape == (4, 6) and shared["bank_b"].shape == (8, 2, 4)
    assert adaptation.trained == 2 * (4 + 6) + 2 * (3 + 4)
    assert lrx.attach(params, adaptation)["v"].shape == (4, 4)
    assert jnp.isfinite(lrx.matmul(jnp.ones((2, 4)), lrx.attach(params, adaptation)["v"])).all()


def test_rand_lora_regenerates_the_same_bases_for_all_sites():
    adapter = A.rand_lora(rank=4, seed=4, stored=False)
    shared = adapter.init_shared(None, None)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(shared)) == 2  # nothing large is kept
    q, v = (Site(shape=shape, bank=(48, 64)) for shape in ((48, 40), (32, 64)))
    (a, b), (a_v, b_v) = (adapter.banks(site, {"shared": shared}) for site in (q, v))
    assert np.array_equal(a[:, :32], a_v) and np.array_equal(b[:, :8], b_v[:48])
    assert uniform(as64(a), np.sqrt(3)) and uniform(as64(b_v), np.sqrt(3))


def test_vera_regenerates_one_bank_for_all_sites():
    sites = {
        "q": Site(path="q", shape=(48, 40), rank=16, bank=(48, 64)),
        "v": Site(path="v", shape=(32, 64), rank=12, bank=(48, 64)),
    }
    group = Group(sites=sites, order=(("q", 0), ("v", 0)))
    adapter = A.vera(rank=16, seed=4, stored=False)
    shared = adapter.init_shared(jax.random.key(0), group)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(shared)) == 4  # nothing large is kept
    (a, b), (a_v, b_v) = (adapter.banks(site, {"shared": shared}) for site in sites.values())
    assert np.array_equal(a[:32, :12], a_v) and np.array_equal(b[:12], b_v[:, :40])
    assert uniform(as64(a), np.sqrt(6 / 48)) and uniform(as64(b_v), np.sqrt(6 / 16))
    other = A.vera(rank=16, seed=5, stored=False)
    assert not np.array_equal(
        a, other.banks(sites["q"], {"shared": other.init_shared(None, group)[1]})[0]
    )


def test_positions_are_those_of_torch_randperm():
    # recorded from torch 2.13.0: randperm(size, generator=Generator().manual_seed(seed))[:6]
    for size, seed, wanted in RECORDED_POSITIONS:
        assert torch_permutation(size, 6, seed).tolist() == list(wanted)
    assert sorted(torch_permutation(50, 50, 1).tolist()) == list(range(50))
    for options, seed in (({}, 777), ({"seed": 3}, 3)):
        p = A.fourierft(frequencies=6, **options).start(jax.random.key(0), jnp.ones((40, 30)))
        flat = torch_permutation(1200, 6, seed)
        assert (
            p["rows"].tolist() == (flat % 40).tolist()
            and p["cols"].tolist() == (flat // 40).tolist()
        )
    p = A.shira(rank=1, seed=3).start(jax.random.key(0), jnp.ones((4, 6)))
    assert (p["cols"] * 4 + p["rows"]).tolist() == sorted(torch_permutation(24, 10, 3).tolist())


RECORDED_POSITIONS = (
    (1200, 777, (935, 623, 139, 962, 695, 37)),
    (24, 3, (10, 3, 9, 21, 4, 20)),
    (50_000_000, 0, (7136044, 46248290, 21715057, 26093979, 38849171, 34848749)),
)


def test_keyed_positions_are_distinct_sorted_and_everywhere():
    draw = jax.vmap(lambda key: keyed_positions(key, 24, 10))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert bool(jnp.all(draw[:, 1:] > draw[:, :-1])) and int(draw.max()) == 23
    share = np.bincount(np.asarray(draw).reshape(-1), minlength=24) / 2000
    np.testing.assert_allclose(share, 10 / 24, atol=5 * np.sqrt(10 / 24 * 14 / 24 / 2000))
    large = np.asarray(keyed_positions(jax.random.key(1), 2**32 - 5, 4096), np.float64)
    assert len(set(large)) == 4096 and abs(large.mean() / 2**32 - 0.5) < 5 / np.sqrt(12 * 4096)
