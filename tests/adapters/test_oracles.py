"""Every family against a float64 NumPy reference, written from the papers and PEFT's documentation
of its tensors.

References are in PyTorch's orientation where the sources are: `W (m, n)`, `y = x Wᵀ`, and compared
transposed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

A = lrx.adapters
N, M, TOKENS = 12, 8, 5
KERNEL = np.random.default_rng(0).normal(size=(N, M)) / np.sqrt(N)
INPUTS = np.random.default_rng(1).normal(size=(TOKENS, N))


def as64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def fourier(p, alpha):
    """`alpha Re(ifft2(S))` entry by entry: the sum of k plane waves over torch's (m, n)."""
    out, inp = np.arange(M)[:, None, None], np.arange(N)[None, :, None]
    wave = np.exp(2j * np.pi * (out * p["cols"] / M + inp * p["rows"] / N))
    return alpha * (wave * p["spectrum"]).sum(-1).real / (M * N)


def oft(p, block, neumann):
    rotation = np.zeros((N, N))
    for g in range(N // block):
        q = np.zeros((block, block))
        q[np.triu_indices(block, 1)] = p["skew"][g]
        q, eye = q - q.T, np.eye(block)
        series = eye + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q
        own = series if neumann else (eye - q) @ np.linalg.inv(eye + q)
        rotation[g * block : (g + 1) * block, g * block : (g + 1) * block] = own
    return KERNEL.T @ rotation.T  # y = (x R) K


def bone(p, r):
    changed = KERNEL.T.copy()
    for j in range(M // r):
        for i in range(N // r):
            w = KERNEL.T[j * r : (j + 1) * r, i * r : (i + 1) * r]
            changed[j * r : (j + 1) * r, i * r : (i + 1) * r] = (
                w + w @ p["block"][j] + p["block"][j]
            )
    return changed


def dora(p, s):
    direction = KERNEL.T + s * (p["a"] @ p["b"]).T
    return p["magnitude"][:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)


def shira(p):
    changed = KERNEL.T.copy()
    for row, col, value in zip(
        p["rows"].astype(int), p["cols"].astype(int), p["values"], strict=True
    ):
        changed[col, row] += value
    return changed


def pair(p, s):
    return KERNEL.T + s * (p["a"] @ p["b"]).T


def residual(p, s):
    return pair(p, s) - s * (p["a0"] @ p["b0"]).T


def vera(p):
    shared = p["shared"]
    a, b = shared["bank_a"].T, shared["bank_b"].T  # torch's vera_A (r, n), vera_B (m, r)
    return KERNEL.T + np.diag(p["lambda_b"]) @ b[:M] @ np.diag(p["lambda_d"]) @ a[:, :N]


def rand_lora(p, s, rank):
    """Term by term: k and j of the small factor, k' and j' of the large one, counted apart."""
    shared, (count, shorter) = p["shared"], p["gamma"].shape
    assert shorter == M < N  # n > m: the longer side is the input
    change = np.zeros((N, M))
    for term in range(rank * count):
        k, j = divmod(term, count)
        small = p["lambda"][k, j] * shared["bank_a"][k, :M] * p["gamma"][j]
        large = shared["bank_b"][:N, term // rank, term % rank]
        change += s * np.outer(large, small)
    return KERNEL.T + change.T


def uni(p):
    theta = p["shared"]["theta"]
    uses = np.bincount(np.concatenate([p[name].reshape(-1).astype(int) for name in ("ia", "ib")]))
    a, b = ((theta / np.sqrt(uses))[p[name].astype(int)] for name in ("ia", "ib"))
    return KERNEL.T + (a @ b).T


def miss(p, r, width=None):
    block = p["block"] if width is None else np.tile(p["block"], (1, M // width))
    return KERNEL.T + np.stack([block[i % r] for i in range(N)]).T


# (adapter, its W' (m, n) in float64)
REFERENCES = {
    "lora": (A.lora(rank=4, alpha=6.0), lambda p: pair(p, 6 / 4)),
    "lora-rs": (A.lora(rank=4, alpha=6.0, rank_stabilized=True), lambda p: pair(p, 6 / 2)),
    "lora-pissa": (A.lora(rank=4, alpha=6.0, init="pissa"), lambda p: residual(p, 6 / 4)),
    "lora-olora": (
        A.lora(rank=4, alpha=6.0, init="olora", rank_stabilized=True),
        lambda p: residual(p, 6 / 2),
    ),
    "dora": (A.dora(rank=4, alpha=6.0), lambda p: dora(p, 6 / 4)),
    "dora-rs": (A.dora(rank=4, alpha=6.0, rank_stabilized=True), lambda p: dora(p, 6 / 2)),
    "hira": (A.hira(rank=4), lambda p: KERNEL.T * (1 + (p["a"] @ p["b"]).T)),
    "oft": (A.oft(block=4), lambda p: oft(p, 4, False)),
    "oft-neumann": (A.oft(block=6, cayley="neumann"), lambda p: oft(p, 6, True)),
    "uni_lora": (A.uni_lora(rank=2, size=16), uni),
    "vera": (A.vera(rank=6), vera),
    "rand_lora": (A.rand_lora(rank=3, alpha=6.0), lambda p: rand_lora(p, 6 / 3, 3)),
    "rand_lora-normalized": (
        A.rand_lora(rank=3, alpha=6.0, basis_normalized=True, bases="very_sparse"),
        lambda p: rand_lora(p, 6 / (3 * np.sqrt(3)), 3),
    ),
    "miss": (A.miss(rank=4), lambda p: miss(p, 4)),
    "miss-padded": (A.miss(rank=5), lambda p: miss(p, 5)),
    "miss-wide": (A.miss(rank=12), lambda p: miss(p, 12)),
    "miss-mini": (A.miss(rank=3, mode="mini", mini_rank=2), lambda p: miss(p, 3, 2)),
    "miss-bat": (A.miss(rank=4, mode="bat"), lambda p: bone(p, 4)),
    "loha": (
        A.loha(rank=2, alpha=6.0),
        lambda p: KERNEL.T + 3 * (p["a1"] @ p["b1"]).T * (p["a2"] @ p["b2"]).T,
    ),
    "fourierft": (A.fourierft(frequencies=20), lambda p: KERNEL.T + fourier(p, 150)),
    "fourierft-alpha": (A.fourierft(frequencies=96, alpha=2.0), lambda p: KERNEL.T + fourier(p, 2)),
    "shira": (A.shira(rank=2), shira),
}


def draw(adapter, scale=0.3):
    """Arrays somewhere else than at the start."""
    generator = np.random.default_rng(2)
    kernel = jnp.asarray(KERNEL, jnp.float32)
    train = {
        "a",
        "b",
        "magnitude",
        "skew",
        "lambda_d",
        "lambda_b",
        "block",
        "a1",
        "b1",
        "a2",
        "b2",
        "spectrum",
        "values",
        "theta",
        "lambda",
        "gamma",
    }
    move = lambda x: x + scale * jnp.asarray(generator.normal(size=x.shape), x.dtype)  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: move(x) if keys[-1].key in train else x,
        adapter.start(jax.random.key(0), kernel),
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_kernel_and_product_are_those_of_the_reference(name):
    adapter, reference = REFERENCES[name]
    p, kernel = draw(adapter), jnp.asarray(KERNEL, jnp.float32)
    wanted = reference(as64(p)).T
    assert np.abs(wanted - KERNEL).max() > 0.05
    effective = adapter.effective(adapter.site((N, M)), kernel, p)
    np.testing.assert_allclose(effective, wanted, atol=2e-6 * np.abs(wanted).max())
    output = adapter.apply(jnp.asarray(INPUTS, jnp.float32), kernel, p)
    np.testing.assert_allclose(output, INPUTS @ wanted, atol=3e-6 * np.abs(INPUTS @ wanted).max())


# gradients that are not those of autodiff


def test_gradient_of_dora_takes_the_norm_as_a_constant():
    adapter, kernel = A.dora(rank=4, alpha=6.0), jnp.asarray(KERNEL, jnp.float32)
    p, x = draw(adapter), jnp.asarray(INPUTS, jnp.float32)
    change = np.random.default_rng(5).normal(size=(TOKENS, M))
    trained = {name: p[name] for name in ("a", "b", "magnitude")}
    found = jax.grad(
        lambda t: jnp.sum(adapter.apply(x, kernel, p | t) * jnp.asarray(change, jnp.float32))
    )(trained)
    p, g, s = as64(p), INPUTS.T @ change, 6 / 4
    direction = KERNEL + s * p["a"] @ p["b"]
    norm = np.linalg.norm(direction, axis=0)
    through = g * p["magnitude"] / norm
    wanted = {
        "a": s * through @ p["b"].T,
        "b": s * p["a"].T @ through,
        "magnitude": (g * direction / norm).sum(0),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * np.abs(value).max())


def test_gradients_of_shira_are_entries_of_the_outer_product():
    adapter, kernel = A.shira(rank=2), jnp.asarray(KERNEL, jnp.float32)
    p, x = draw(adapter), jnp.asarray(INPUTS, jnp.float32)
    change = np.random.default_rng(5).normal(size=(TOKENS, M))
    objective = lambda values, x, kernel: jnp.sum(  # noqa: E731
        adapter.apply(x, kernel, p | {"values": values}) * jnp.asarray(change, jnp.float32)
    )
    dvalues, dx, dkernel = jax.grad(objective, (0, 1, 2))(p["values"], x, kernel)
    outer = INPUTS.T @ change
    np.testing.assert_allclose(dvalues, outer[p["rows"], p["cols"]], atol=1e-5)
    np.testing.assert_allclose(dx, change @ shira(as64(p)), atol=1e-5)
    np.testing.assert_allclose(dkernel, outer, atol=1e-5)


# what cannot be

REFUSED = {
    "rank": (lambda: A.vera(rank=0), "rank=0 must be a positive integer"),
    "initial": (lambda: A.vera(initial=0), "initial=0 leaves both vectors 0"),
    "vera dropout": (lambda: A.vera(dropout=1.0), r"dropout=1.0 must be at least 0 and below 1"),
    "mode": (lambda: A.miss(mode="bone"), r"mode='bone' must be one of"),
    "mini_rank": (lambda: A.miss(mini_rank=2), "mini_rank=2 belongs to mode='mini'"),
    "mini": (lambda: A.miss(mode="mini"), "mini_rank=None belongs to mode='mini'"),
    "bat dropout": (
        lambda: A.miss(mode="bat", dropout=0.1),
        "dropout=0.1: mode='bat' has no branch",
    ),
    "fourier init": (lambda: A.fourierft(init="randn"), "init='randn' must be 'zeros' or 'normal'"),
    "lora trains": (lambda: A.lora(rank=2, trains="c"), "trains='c' must be 'both', 'a' or 'b'"),
    "lora init": (lambda: A.lora(rank=2, init="svd"), "init='svd' must be one of"),
    "dora init": (lambda: A.dora(rank=2, init="pissa"), "DoRA starts from 'kaiming'"),
    "pissa part": (lambda: A.pissa(part="middle"), "part='middle' must be 'largest'"),
    "pissa iterations": (lambda: A.pissa(part="smallest", iterations=2), "needs the exact SVD"),
    "oft block": (lambda: A.oft(block=1), "block=1 must be at least 2"),
    "oft cayley": (lambda: A.oft(cayley="series"), "cayley='series' must be 'exact' or 'neumann'"),
    "rand_lora bases": (lambda: A.rand_lora(bases="dense"), "bases='dense' must be one of"),
    "rand_lora seed": (lambda: A.rand_lora(seed=-1), "seed=-1 must be an integer from 0"),
    "rand_lora stored": (
        lambda: A.rand_lora(bases="sparse", stored=False),
        "bases='sparse' are drawn once; set stored=True, or bases='uniform'",
    ),
    "uni bound": (lambda: A.uni_lora(bound=0.0), "bound=0.0 must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_options_are_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


UNFIT = {
    "bat": (
        A.miss(rank=5, mode="bat"),
        "'here': rank=5 does not divide its 12 x 8 kernel into square blocks",
    ),
    "mini": (
        A.miss(rank=5, mode="mini", mini_rank=3),
        "'here': mini_rank=3 does not divide its 8 outputs",
    ),
    "fourierft": (A.fourierft(), "'here': frequencies=1000 exceeds the 96 entries"),
    "shira": (A.shira(rank=5), "'here': rank=5 exceeds 4, the largest of shira on a 12 x 8 kernel"),
    "oft": (A.oft(block=5), "'here': block=5 does not divide its 12 inputs"),
    "pissa": (A.lora(rank=9, init="pissa"), "'here': rank=9 exceeds the 8 singular values"),
    "orthogonal": (A.lora(rank=3, init="orthogonal"), "'here': rank=3 must be even"),
    "dora orthogonal": (A.dora(rank=3, init="orthogonal"), "'here': rank=3 must be even"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_sites_that_do_not_fit_are_refused_by_path(name):
    adapter, message = UNFIT[name]
    with pytest.raises(ValueError, match=message):
        lrx.adapt({"here": jnp.ones((N, M))}, {"here": adapter}, jax.random.key(0))


def test_a_frozen_factor_of_zero_is_refused():
    for path, options in (
        ("kernel", {"trains": "a"}),
        ("kernel", {"trains": "a", "init": "gaussian"}),
        ("embedding", {"trains": "b"}),
    ):
        with pytest.raises(
            ValueError, match=rf"'{path}': trains=.* starts at 0, so no gradient would ever differ"
        ):
            lrx.adapt(
                {path: jnp.ones((N, M))}, {path: A.lora(rank=2, **options)}, jax.random.key(0)
            )
    lrx.adapt(
        {"embedding": jnp.ones((N, M))},
        {"embedding": A.lora(rank=2, trains="a")},
        jax.random.key(0),
    )


def test_uni_lora_of_more_numbers_than_entries_is_refused():
    with pytest.raises(ValueError, match="size=81 exceeds the 80 entries of all factors"):
        lrx.adapt(
            {"here": jnp.ones((N, M))}, {"here": A.uni_lora(rank=4, size=81)}, jax.random.key(0)
        )
