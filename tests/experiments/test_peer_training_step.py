"""The benchmark beside PyTorch: what it says without PyTorch, and what its table holds."""

import importlib.util

import pytest

from experiments.benchmarks import peer_training_step
from experiments.reporting import tables


def test_without_pytorch_it_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        peer_training_step.main([])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "needs torch and transformers" in message
    assert "-e '.[experiments,peer]'" in message


def test_rows_compare_with_the_faster_peer():
    steps = {"torch.optim.AdamW": 4.0, "torch.optim.AdamW, fused": 2.0, "optax.adamw": 3.0}
    rows = peer_training_step.rows_of(steps, dict.fromkeys(steps, 1.0))
    assert [row["of_peer"] for row in rows] == [2.0, 1.0, 1.5]
    (aim,) = peer_training_step.aims(rows)
    assert (aim["value"], aim["met"]) == (1.5, False)
    result = {
        "rows": rows,
        "aims": [aim],
        "command": "c",
        "preset": "60M",
        "tokens": 8,
        "length": 4,
        "repetitions": 1,
        "threads": 2,
        "loss_difference": 1e-6,
        "machine": {"versions": dict.fromkeys(("torch", "transformers", "jax"), "1")},
    }
    assert "**missed**" in tables.peer_training_step(result)
