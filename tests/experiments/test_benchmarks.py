"""The optimizer benchmark on small shapes: its bookkeeping, not its times."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import optimizer_step, timing, tpu_programs, training_step, workload
from experiments.models import llama

pytestmark = pytest.mark.slow


def test_medians_are_taken_over_interleaved_rounds():
    order = []

    def case(name, values):
        def run():
            order.append(name)
            return next(values)

        return run

    cases = {"a": case("a", iter([5.0, 1.0, 2.0])), "b": case("b", iter([1.0, 1.0, 7.0]))}
    assert timing.interleave(cases, 3) == {"a": 2.0, "b": 1.0}
    assert order == ["a", "b"] * 3
    with pytest.raises(ValueError, match="repetitions=0"):
        timing.interleave({}, 0)


def test_seconds_wait_for_the_result():
    assert timing.seconds(lambda: jnp.ones(3)) > 0
    assert set(timing.machine()) == {
        "processor",
        "cores",
        "device",
        "platform",
        "python",
        "versions",
    }


def test_the_matrices_are_those_of_the_60M_preset():
    shapes = workload.matrices("60M")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8 * (
        4 * 512 * 512 + 3 * 512 * 1376
    )
    assert workload.rank("60M") == 128
    layers = workload.unstacked(shapes)["layers"]["mlp"]["down_proj"]["kernel"]
    assert [layer.shape for layer in layers] == [(1376, 512)] * 8


def test_thin_products_count_their_operations():
    shapes = workload.matrices("nano", layers=2)
    run, operations = workload.thin_products(shapes, 32)
    assert operations == 2 * 2 * sum(2 * s * k * 32 for s, k in [(128, 128)] * 4 + [(128, 352)] * 3)
    assert [low.shape for low, _ in run()] == [(2, 32, 128)] * 4 + [(2, 32, 352)] * 3


def test_traffic_adds_the_gradient_to_parameters_and_moments():
    run = workload.adamw_traffic(workload.matrices("nano", layers=2))
    run()
    params, mu, nu = (jax.tree.leaves(tree)[0] for tree in run())
    expected = 2 * np.asarray(
        jax.tree.leaves(workload.gradients(workload.matrices("nano", layers=2)))[0]
    )
    for tree in (params, mu, nu):
        np.testing.assert_allclose(tree, expected, rtol=1e-6)


def test_staggered_steps_are_those_of_the_clock():
    shapes = workload.matrices("nano")
    case = next(case for case in workload.cases(32) if case.name == "galore (svd, staggered)")
    working = case.working_steps(shapes)
    projection = case.tx.projection
    total = sum(
        int(projection.refresh_schedule.start(t, projection.phase(view), view.batch[0]))
        < view.batch[0]
        for view in projection.report(shapes).projected
        for t in range(1, workload.PERIOD + 1)
    )
    assert total == 7 * 4  # every layer of seven stacks once a period
    assert 4 <= len(working) <= total


@pytest.fixture(scope="module")
def result():
    chosen = "columns|power, stagg"
    return optimizer_step.benchmark(
        "nano", repetitions=1, refreshes=1, only=chosen, tpu=False, width=32, hidden=48, layers=1
    )


def test_rows_hold_what_the_table_prints(result):
    rows = {row["optimizer"]: row for row in result["rows"]}
    assert list(rows) == [
        "optax.adamw",
        "optax.contrib.galore",
        "galore (power, staggered)",
        "frugal (columns)",
    ]
    elements = 4 * 32 * 32 + 3 * 32 * 48
    assert rows["optax.adamw"]["state_bytes"] == 8 * elements + 4
    assert rows["optax.adamw"]["normal_over_adamw"] == 1.0
    low = 8 * (4 * 32 + 3 * 48)  # rank 8: a quarter of the width
    assert (
        rows["galore (power, staggered)"]["state_bytes"]
        == 4 * 7 * 32 * 8 + 8 * low + 4 * 7 + 4 + 24
    )
    for row in rows.values():
        assert row["normal_seconds"] > 0
        mean = (row["worst_seconds"] + 199 * row["normal_seconds"]) / 200
        if "stagger" not in row["optimizer"] and row["worst_seconds"] != row["normal_seconds"]:
            assert row["amortised_seconds"] == pytest.approx(mean)
    text = optimizer_step.table(result)
    assert all(name in text for name in rows)
    assert "not measured" in text


def test_aims_compare_with_the_references_of_the_same_run(result):
    reference, aims = result["reference"], result["aims"]
    bound = 1.2 * (reference["own_arithmetic_seconds"] + reference["adamw_traffic_seconds"])
    assert reference["normal_step_bound_seconds"] == pytest.approx(bound)
    first = next(aim for aim in aims if aim["of"] == "frugal (columns)")
    assert first["bound"] == reference["normal_step_bound_seconds"]
    assert first["met"] == (first["value"] < first["bound"])
    programs = [aim for aim in aims if aim["aim"].startswith("TPU")]
    assert len(programs) == 7
    assert all(aim["met"] is None for aim in programs)


def test_the_program_writes_json_with_its_command(tmp_path, monkeypatch, capsys, result):
    monkeypatch.setattr(optimizer_step, "benchmark", lambda *args, **kwargs: result)
    output = tmp_path / "deep" / "step.json"
    optimizer_step.main(["--preset", "nano", "--notpu", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written["command"].startswith(
        "python -m experiments.benchmarks.optimizer_step --preset nano --notpu"
    )
    assert written["rows"] == result["rows"]
    assert "optax.adamw" in capsys.readouterr().out


def test_without_a_tpu_compiler_the_reason_is_given(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert "no libtpu" in tpu_programs.measure("60M", str(python))["reason"]
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\necho \'{"projector": "power"}\'\necho \'{"projector": '
        '"dct2"}\'\n'
    )
    assert [row["projector"] for row in tpu_programs.measure("60M", str(python))["rows"]] == [
        "power",
        "dct2",
    ]
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho broken >&2\nexit 3\n')
    assert tpu_programs.measure("60M", str(python))["reason"] == "not measured: broken"


def test_operations_of_a_training_step():
    """By hand for one square model: the head and attention stay, taps trade 2 N m n for 2 N r (m +
    n)."""
    config = llama.preset(
        "nano", layers=3, width=32, hidden=48, heads=2, kv_heads=2, sequence_length=16
    )
    tokens, rank = 64, 8
    blocks = 3 * (4 * 32 * 32 + 3 * 32 * 48)
    attention, head = 12 * 3 * 32 * 16 * tokens, 6 * tokens * 259 * 32
    count = functools.partial(training_step.operations, config, tokens)
    assert count(head=True) == 6 * tokens * blocks + attention + head
    assert count(head=False) == 6 * tokens * blocks + attention
    assert count(head=False, rank=rank) == 6 * tokens * blocks + attention + 4 * blocks * rank
    thin = 2 * tokens * rank * 3 * (4 * 64 + 3 * 80)
    own = thin + attention + 2 * blocks * rank
    assert count(head=False, rank=rank, tapped=True) == 4 * tokens * blocks + own
    thin_head = 2 * tokens * rank * (259 + 32) + 2 * 259 * 32 * rank
    expected = 4 * tokens * (blocks + 259 * 32) + own + thin_head
    assert count(head=True, rank=rank, tapped=True, head_tapped=True) == expected


@pytest.mark.parametrize("head", [True, False])
def test_the_table_of_training_steps(head, monkeypatch):
    small = llama.preset("nano", layers=1, width=64, hidden=96, heads=2, kv_heads=2)
    monkeypatch.setitem(llama.PRESETS, "nano", small)
    found = training_step.table("nano", 1, 16, 1, head=head, contrib=head, parts=(8,))
    names = [row["case"] for row in found["rows"]]
    assert names[0] == "optax.adamw"
    assert ("optax.contrib.galore" in names) == head
    tapped = [row for row in found["rows"] if row["tapped"]]
    kinds = 3 if head else 2  # exact SVD, alternating, alternating and head too
    assert [row["rank"] for row in tapped] == [8] * kinds
    assert [row["head_tapped"] for row in tapped] == [False, False, True][:kinds]
    assert all(
        row["seconds"] > 0 and row["refresh_seconds"] > 0 and row["bytes"] > 0
        for row in found["rows"][-1:]
    )
    aims = training_step.aims("nano", [found])
    assert len(aims) == 2 * len(tapped)
    assert all(aim["met"] == (aim["value"] <= aim["bound"]) for aim in aims)


def test_projected_losses_follow_full_ones():
    found = training_step.losses(3)
    assert found["largest_difference"] < 1e-4
    assert found["projected_last"] == pytest.approx(found["full_last"], abs=1e-4)
