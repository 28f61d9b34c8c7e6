"""linalg and the inner AdamW against PyTorch."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: run `make test-peer`")

from lowrank_jax import linalg  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(params=[(6, 4), (4, 6), (5, 5), (3, 16, 24)], ids=str)
def x(request):
    return np.random.default_rng(sum(request.param)).normal(size=request.param).astype(np.float32)


def test_version_is_the_one_the_tier_names():
    assert torch.__version__.split("+")[0] == "2.13.0"


def test_truncated_svd(x):
    rank = 3
    u, s, vt = (np.asarray(part) for part in linalg.truncated_svd(x, rank))
    theirs = torch.linalg.svd(torch.from_numpy(x), full_matrices=False)
    np.testing.assert_allclose(s, theirs.S[..., :rank], rtol=2e-5)
    best = (theirs.U[..., :rank] * theirs.S[..., None, :rank]) @ theirs.Vh[..., :rank, :]
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, best, atol=2e-5)


def test_orthonormal_basis_spans_what_theirs_spans(x):
    tall = x if x.shape[-2] >= x.shape[-1] else np.swapaxes(x, -1, -2)
    tall = tall[..., :3]
    ours = np.asarray(linalg.orthonormalize(tall))
    theirs = torch.linalg.qr(torch.from_numpy(tall)).Q.numpy()
    np.testing.assert_allclose(
        ours @ np.swapaxes(ours, -1, -2), theirs @ np.swapaxes(theirs, -1, -2), atol=2e-5
    )


def test_power_step_spans_what_theirs_spans(x):
    basis = np.linalg.qr(x[..., :2])[0]
    ours = np.asarray(linalg.power_step(x, basis))
    product = torch.from_numpy(x) @ (torch.from_numpy(x).mT @ torch.from_numpy(basis))
    theirs = torch.linalg.qr(product).Q.numpy()
    np.testing.assert_allclose(
        ours @ np.swapaxes(ours, -1, -2), theirs @ np.swapaxes(theirs, -1, -2), atol=1e-4
    )


def test_dct_by_torch_fft(x):
    """The orthonormal DCT-II is the real part of a phase-shifted FFT of the mirrored signal."""
    rows = x.shape[-2]
    signal = torch.from_numpy(x).double().transpose(-1, -2)
    spectrum = torch.fft.fft(torch.cat([signal, signal.flip(-1)], -1))[..., :rows]
    k = torch.arange(rows, dtype=torch.float64)
    values = (spectrum * torch.exp(-1j * torch.pi * k / (2 * rows))).real / 2
    scale = torch.where(k == 0, (1 / rows) ** 0.5, (2 / rows) ** 0.5)
    expected = (values * scale).transpose(-1, -2).numpy()
    for method in ("fft", "matmul"):
        np.testing.assert_allclose(linalg.dct(x, kind=2, method=method), expected, atol=1e-5)
        np.testing.assert_allclose(
            linalg.dct(expected.astype(np.float32), kind=3, method=method), x, atol=1e-5
        )


def problem(shape, t):
    i, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    gradient = np.sin(0.5 + 1.3 * i * (j + 1) + 0.9 * t) + 0.5 * np.cos(0.2 * t * (i + 1) + 1.1 * j)
    return (0.1 * np.sin(1 + 0.7 * i + 0.3 * j**2)).astype(np.float32), gradient.astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_adamw_is_theirs_and_the_recorded_one(golden, shape):
    row = next(row for row in golden("projection_traces")["rows"] if row["name"] == "adamw_b")
    first, _ = problem(shape, 0)
    settings = {"eps": row["configuration"]["eps"], "weight_decay": 0.1}
    weight = torch.nn.Parameter(torch.from_numpy(first.copy()))
    peer = torch.optim.AdamW([weight], lr=0.01, **settings)
    ours = optax.adamw(0.01, **settings)
    kernel = jnp.asarray(first)
    state = ours.init(kernel)
    for t in range(5):
        _, gradient = problem(shape, t)
        weight.grad = torch.from_numpy(gradient)
        peer.step()
        updates, state = ours.update(jnp.asarray(gradient), state, kernel)
        kernel = optax.apply_updates(kernel, updates)
    np.testing.assert_allclose(kernel, weight.detach().numpy(), rtol=2e-5, atol=1e-7)
    moved = weight.detach().numpy() - first
    trace = row["traces"][f"{shape[0]}x{shape[1]}"]
    found = [np.linalg.norm(moved), moved[0, 0], moved[1, 2]]
    np.testing.assert_allclose(
        found, [trace["norm"], trace["entry_0_0"], trace["entry_1_2"]], rtol=row["tolerance"]
    )
