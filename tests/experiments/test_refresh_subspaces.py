"""The study of refreshes: its measures against SciPy, its queue, and its claims about what a
refresh computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import lowrank_jax as lrx
from experiments.benchmarks import refresh_subspaces
from experiments.reporting import tables
from tests.experiments.runs import tiny, write_text

RNG = np.random.default_rng(11)


def orthonormal(*shape):
    return np.linalg.qr(RNG.normal(size=shape))[0].astype(np.float32)


def test_angles_are_those_of_scipy():
    first, second = orthonormal(3, 12, 4), orthonormal(3, 12, 4)
    found = refresh_subspaces.principal_angles(jnp.asarray(first), jnp.asarray(second))
    for own, a, b in zip(found, first, second, strict=True):
        np.testing.assert_allclose(
            own, np.degrees(scipy.linalg.subspace_angles(a, b))[::-1], atol=1e-3
        )


def test_alternating_is_a_power_step_where_the_moment_is_the_projected_gradient():
    """The docstring's identity: `range(G qr((PᵀG)ᵀ)) = range(G GᵀP)`."""
    gradient = jnp.asarray(RNG.normal(size=(10, 16)), jnp.float32)
    basis = jnp.asarray(orthonormal(10, 3))
    view = lrx.resolution.resolve(gradient, rank=3).projected[0]
    alternating, power = lrx.projectors.alternating(rank=3), lrx.projectors.power(rank=3)
    inputs = lrx.projectors.RefreshInputs(
        target=gradient, momentum=basis.T @ gradient, step=jnp.asarray(5), key=jax.random.key(0)
    )
    sketch = gradient @ alternating.sketch_basis(view, basis, (), inputs)
    own, _ = alternating.refresh(view, basis, (), lrx.projectors.RefreshInputs(sketch=sketch))
    stepped, _ = power.refresh(view, basis, (), inputs)
    angles = refresh_subspaces.principal_angles(own, stepped)
    assert float(angles.max()) < 0.1


def test_energies_are_averaged_over_matrices_and_windows():
    angles = [np.array([[1.0, 2.0, 9.0]]), np.array([[3.0, 4.0, 5.0], [1.0, 1.0, 7.0]])]
    own = [[0.2, 0.4, 0.3], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]
    exact = [[0.4, 0.4, 0.6], [0.4, 0.4, 0.4], [0.4, 0.4, 0.4]]
    found = refresh_subspaces.summary(7, angles, own, exact)
    assert found["step"] == 7
    assert (found["largest_angle"], found["median_angle"]) == (7.0, 2.0)
    assert found["step_share"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert found["window_share"] == pytest.approx(0.5)
    assert (found["step_energy_svd"], found["window_energy_svd"]) == pytest.approx((1.4 / 3, 0.4))


@pytest.mark.slow
def test_a_run_is_measured_by_its_own_gradients(tmp_path):
    """An exact SVD is its own measure, so that bases and gradients must belong to the same
    steps."""
    write_text(tmp_path / "text")
    sections = {
        "name": "galore",
        "rank": 4,
        "projector": "svd",
        "refresh_every": 4,
        "refresh_when": "after",
        "backprop": "projected",
    }
    said = []
    config = tiny(tmp_path, optimizer=sections, schedule={"steps": 100})
    result = refresh_subspaces.train(config, apart=8, say=said.append)
    assert len(said) == 1
    assert [entry["step"] for entry in result["measured"]] == list(range(0, 97, 8))
    assert 0 < result["validation_loss"] < 6
    for entry in result["measured"]:
        assert 0 < entry["window_energy_svd"] < 1
        assert entry["largest_angle"] < 0.2
        assert entry["step_share"] == pytest.approx(1, abs=1e-4)
        assert entry["window_share"] == pytest.approx(1, abs=1e-4)


def test_the_queue_goes_on_where_it_stopped(tmp_path, capsys):
    made = []

    def run(config):
        made.append((config.run.seed, config.optimizer.refresh_every, config.optimizer.projector))
        entry = dict.fromkeys(refresh_subspaces.SHARES, float(len(made)))
        return {
            "validation_loss": 2.0,
            "skipped": 0,
            "measured": [{"step": 0} | entry, {"step": 10} | entry],
        }

    keys = [(0, 10, "svd"), (0, 10, "alternating"), (1, 10, "svd")]
    refresh_subspaces.queue(tmp_path, keys[:2], 50, 10.0, run)
    refresh_subspaces.queue(tmp_path, keys, 50, 10.0, run)
    assert made == keys
    refresh_subspaces.queue(tmp_path, [(2, 10, "svd")], 50, -1.0, run)
    assert made == keys
    assert "1 runs left" in capsys.readouterr().out
    rows = refresh_subspaces.collect(tmp_path, [*keys, (2, 10, "svd")], 50)
    assert [(row["refresh"], row["runs"], row["wanted"]) for row in rows] == [
        ("svd", 2, 3),
        ("alternating", 1, 1),
    ]
    assert (
        rows[0]["window_share"] == 2.0
    )  # of the first and the third run, at the refreshes after the first
    assert refresh_subspaces.collect(tmp_path, keys, 51) == []
    refresh_subspaces.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    result = {
        "command": "c",
        "preset": "nano",
        "rank": 32,
        "steps": 50,
        "tokens_per_update": 512,
        "cpu_minutes": 1.0,
        "machine": {"cores": 1},
        "rows": json.loads(json.dumps(rows)),
    }
    text = tables.TABLES["refresh_subspaces"](result)
    assert "| svd | 10 | full | 2.0° |" in text
    assert "2.0000, 2.0000 (unfinished)" in text
