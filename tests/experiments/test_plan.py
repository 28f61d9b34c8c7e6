"""The planner: the harness's program, the trees' bytes, a queue that resumes, advice that is
least."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import plans, training_step
from experiments.harness import tasks
from experiments.planning import advice, cases, hlo, program, queue, report, targets
from experiments.planning.cases import Case
from experiments.settings import configuration
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs

SECTIONS = {
    "model": {
        "width": 32,
        "hidden": 48,
        "heads": 2,
        "kv_heads": 2,
        "layers": 2,
        "sequence_length": 16,
    },
    "data": {"sequence_length": 16, "batch_size": 8},
}
GALORE = "galore:rank=8:projector=alternating:refresh_when=after"


def config_of(text="adamw", **sections):
    return cases.with_optimizer(configuration.from_dict(SECTIONS | sections), text)


@pytest.fixture(scope="module")
def rows():
    """Judged rows on one CPU device by optimizer."""
    found = {}
    for text in ("adamw", f"{GALORE}:backprop=projected"):
        case = Case(config=config_of(text), topology="cpu:1")
        found[case.config.optimizer.name] = queue.judged(queue.describe(case) | program.row(case))
    return found


def test_targets():
    assert (targets.parse("v5e:16x16").chips, targets.parse("v5p:2x2x1").kind) == (256, "tpu")
    assert targets.parse("h200").facts.hbm_bytes == 141 * 10**9
    assert targets.parse("cpu:8").facts is None
    assert targets.parse("cpu:8").environment()["XLA_FLAGS"].endswith("=8")
    assert targets.parse("v6e:4x4").environment()["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    for wrong, remedy in (
        ("v5e", "v5e:4x4"),
        ("h200:2", "one card"),
        ("v7:2", "Choose one of"),
        ("cpu:0", "cpu:8"),
    ):
        with pytest.raises(ConfigurationError, match=remedy):
            targets.parse(wrong)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(
        targets, "_has", lambda python, module: python == "elsewhere" and module == "libtpu"
    )
    assert targets.interpreter(targets.parse("v5e:2x2"), "elsewhere") == "elsewhere"
    assert targets.interpreter(targets.parse("cpu:1")) == sys.executable
    with pytest.raises(ConfigurationError, match=r"no libtpu there.*make test-tpu"):
        targets.interpreter(targets.parse("v5e:2x2"))
    with pytest.raises(ConfigurationError, match=rf"jax-cuda13-plugin=={jax.__version__}"):
        targets.interpreter(targets.parse("h200"))


def test_the_workspace_s_own_environment_is_found(monkeypatch):
    own = str(targets.ROOT / ".venv-tpu" / "bin" / "python")
    monkeypatch.setattr(targets, "_has", lambda python, module: python == own)
    assert targets.interpreter(targets.parse("v5e:2x2")) == own


@pytest.mark.slow
@pytest.mark.parametrize("text", ["adamw", f"{GALORE}:backprop=projected"])
def test_the_program_is_that_of_the_harness(tmp_path, text):
    runs.write_text(tmp_path / "text")
    config = cases.with_optimizer(runs.tiny(tmp_path), text.replace("rank=8", "rank=4"))
    task = tasks.Pretraining(config)
    planned = program.Planned(config, jax.devices()[:1])
    loaded = {
        name: jax.ShapeDtypeStruct((4, *array.shape[1:]), array.dtype, sharding=task.rows)
        for name, array in task.host_batch(0).items()
    }
    expected = jax.jit(task.update(), donate_argnums=0).lower(task.abstract, loaded).as_text()
    assert planned.lowered().as_text() == expected


@pytest.mark.slow
def test_components_are_the_arguments(rows):
    batch = 8 * 16 * 3 * 4
    for row in rows.values():
        assert row["argument_bytes"] == batch + sum(entry["bytes"] for entry in row["components"])
        own, share = report.state_bytes(row)
        assert own == share
        assert row["peak_bytes"] >= row["argument_bytes"] + row["temporary_bytes"]
        assert row["fits"] is None and row["limit_bytes"] is None and row["placed"]
    assert {entry["component"] for entry in rows["galore"]["components"]} >= {
        "parameters",
        "basis",
        "moments",
        "plain",
    }
    assert report.state_bytes(rows["galore"])[0] < report.state_bytes(rows["adamw"])[0]


@pytest.mark.slow
def test_gradients_by_formula(rows):
    full = rows["adamw"]["components"][0]["bytes"]
    assert rows["adamw"]["temporaries"]["gradients"] == full
    matrices = 4 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert rows["galore"]["temporaries"]["gradients"] == full - matrices * 3 // 4  # rank 8 of 32
    assert rows["galore"]["gradients_by"] == "sketch at a refresh"


@pytest.mark.slow
def test_operations_are_those_of_the_benchmark(rows):
    model = dataclasses.replace(config_of().model, sequence_length=16)
    count = lambda **kind: training_step.operations(model, 8 * 16, head=True, **kind)  # noqa: E731
    assert rows["adamw"]["flops"] == count()
    assert rows["galore"]["flops"] == count(rank=8, tapped=True)
    whole = program.Planned(config_of(f"{GALORE}:backprop=full"), jax.devices()[:1])
    assert program.operations(whole) == count(rank=8)


@pytest.mark.slow
def test_the_limit_decides(rows):
    peak = rows["adamw"]["peak_bytes"]
    assert queue.judged(rows["adamw"], peak)["fits"] is True
    assert queue.judged(rows["adamw"], peak - 1)["fits"] is False
    h200 = queue.judged(rows["adamw"] | {"topology": "h200"})
    assert h200["fits"] and h200["seconds_at_peak"] == rows["adamw"]["flops"] / 989e12
    refused = queue.judged(
        rows["adamw"] | {"placed": False, "usable_bytes": 5, "topology": "v5e:2x2"}
    )
    assert refused["fits"] is False and refused["limit_bytes"] == 5


def test_branches_of_a_refresh_are_left_out():
    text = """%refresh.1 (x: f32[]) -> f32[] {
  %a = f32[64,64]{1,0} all-reduce(%x), channel_id=1
}
%stand.1 (x: f32[]) -> f32[] {
  %b = f32[8,64]{1,0} all-reduce(%x), channel_id=2
}
ENTRY %main (x: f32[]) -> f32[] {
  %c = f32[] conditional(%p, %x, %x), branch_computations={%stand.1, %refresh.1}
  %d = f32[3]{0} all-gather(%c), channel_id=3
}"""
    found = hlo.moved(text, 259)
    assert (
        hlo.moved(text, 64)["block_reduced_bytes"]
        == hlo.moved(text, 259, (8, 64))["block_reduced_bytes"]
        == 0
    )
    assert found["normal"] == {"all-reduce": 4 * 8 * 64, "all-gather": 12}
    assert found["with_refresh"]["all-reduce"] == 4 * (8 * 64 + 64 * 64)
    assert found["block_reduced_bytes"] == 4 * 8 * 64
    named = text.replace(
        "branch_computations={%stand.1, %refresh.1}",
        "true_computation=%refresh.1, false_computation=%stand.1",
    )
    assert hlo.moved(named, 259) == found


def test_product_of_lists():
    config = config_of("galore:rank=8:projector=power")
    listed, notes = cases.product(
        config,
        ["v5e:2x2", "cpu:8"],
        meshes=["data=4", "fsdp=4"],
        optimizers=["adamw", "galore", "apollo_mini"],
        backprops=["full", "projected"],
    )
    names = [case.label for case in listed]
    assert len(names) == len(set(names)) == len({case.key for case in listed})
    assert sum("adamw" in name for name in names) == 3  # data=4 is not eight devices
    assert any("choose sizes whose product" in note for note in notes)
    assert any("apollo_mini" in note and "full gradients" in note for note in notes)
    assert not any("apollo_mini, projected" in name for name in names)
    assert {
        case.config.optimizer.projector for case in listed if case.config.optimizer.name == "galore"
    } == {"power"}
    assert Case.from_json(json.loads(json.dumps(listed[0].to_json()))) == listed[0]


def test_what_is_known_to_fail_is_refused():
    with pytest.raises(ConfigurationError, match=r"exact SVD.*projector=power"):
        cases.product(config_of("galore:rank=8"), ["v5e:2x2"])
    with pytest.raises(
        ConfigurationError, match=r"batch_size=8: does not divide over data \* fsdp = 16"
    ):
        cases.product(config_of(), ["v5e:4x4"])
    with pytest.raises(ConfigurationError, match="only cpu targets are run"):
        cases.product(config_of(), ["v5e:2x2"], execute=True)
    with pytest.raises(ConfigurationError, match="did you mean 'galore'"):
        cases.with_optimizer(config_of(), "galor")
    with pytest.raises(ConfigurationError, match="name:field=value"):
        cases.with_optimizer(config_of(), "galore:power")
    with pytest.raises(ConfigurationError, match="write them as"):
        cases.with_mesh(config_of(), "fsdp")


def test_apollo_mini_is_rank_one():
    mini = cases.optimizer_of(config_of("apollo_mini")).projection
    assert (mini.projector.rank, mini.residual.axis) == (1, "tensor")
    assert mini.residual.scale == pytest.approx(128**0.5)
    assert (
        cases.optimizer_of(
            config_of("apollo_mini:rank=2:refresh_every=7")
        ).projection.projector.rank
        == 2
    )
    assert (
        cases.optimizer_of(
            config_of("apollo_mini:rank=2:projector=power")
        ).projection.projector.rank
        == 2
    )
    with pytest.raises(ConfigurationError, match="needs a rank"):
        config_of("apollo_mini:projector=power")


def fake(peaks):
    """An evaluation by a function of the configuration, and the list of what it was asked."""
    asked = []

    def evaluate(case):
        asked.append(advice.flags(config_of(), case.config))
        peak = peaks(case.config)
        return {"peak_bytes": peak, "fits": peak <= 100, "limit_bytes": 100, "argument_bytes": 10}

    return evaluate, asked


START = {"peak_bytes": 200, "argument_bytes": 10, "limit_bytes": 100}


def test_advice_is_remat_first():
    evaluate, asked = fake(lambda config: 90 if config.model.remat else 200)
    found = advice.advise(Case(config=config_of(), topology="cpu:1"), START, evaluate)
    assert found.overrides == ("--config.model.remat=True",)
    assert found.row["peak_bytes"] == 90 and len(asked) == 1 == len(found.tried)


def test_advice_takes_back_what_it_does_not_need():
    evaluate, _ = fake(lambda config: 300 // config.schedule.accumulation)
    found = advice.advise(Case(config=config_of(), topology="cpu:1"), START, evaluate)
    assert found.overrides == ("--config.schedule.accumulation=4",)
    assert (("--config.model.remat=True",), 300) in found.tried


def test_advice_goes_on_to_optimizers_and_to_the_mesh():
    evaluate, asked = fake(lambda config: 90 if config.optimizer.name == "dct_adamw" else 200)
    hopeless = START | {"argument_bytes": 150}
    found = advice.advise(Case(config=config_of(), topology="cpu:1"), hopeless, evaluate)
    wanted = {"name=dct_adamw", "rank=0.25", "backprop=projected"}
    assert set(found.overrides) == {f"--config.optimizer.{word}" for word in wanted}
    assert all(
        any("optimizer.name" in word for word in words) for words in asked
    )  # nothing else could help
    evaluate, _ = fake(lambda config: 90 if config.mesh.fsdp == 8 else 200)
    found = advice.advise(Case(config=config_of(), topology="cpu:8"), hopeless, evaluate)
    assert "--config.mesh.fsdp=8" in found.overrides
    evaluate, _ = fake(lambda config: 200)
    found = advice.advise(Case(config=config_of(), topology="cpu:1"), START, evaluate)
    assert found.overrides is None and found.row is None and len(found.tried) > 4


@pytest.fixture
def compiled(monkeypatch, rows):
    """Compiling by a table: the list of what was compiled; topology cpu:3 fails, cpu:4 is
    interrupted."""
    done = []

    def compile_case(case, python=None, tick=None):
        if case.topology == "cpu:3":
            raise queue.CompileError("no such thing")
        if case.topology == "cpu:4":
            raise KeyboardInterrupt
        done.append(case.topology)
        return {
            name: rows["adamw"][name] for name in rows["adamw"] if name not in queue.describe(case)
        }

    monkeypatch.setattr(queue, "compile_case", compile_case)
    return done


@pytest.mark.slow
def test_the_queue_resumes(tmp_path, compiled):
    listed = [Case(config=config_of(), topology=f"cpu:{count}") for count in (1, 2, 3, 4, 8)]
    path, lines = tmp_path / "cache.jsonl", []
    found = queue.run(listed, queue.Cache(path, "a"), say=lines.append)
    assert [row.get("error") for row in found] == [None, None, "no such thing"]
    assert compiled == ["cpu:1", "cpu:2"] and "interrupted" in lines[-1]
    with open(path, "a") as file:
        file.write('{"key": "torn')  # killed in the middle of a line
    again = queue.run([listed[0], listed[1], listed[4]], queue.Cache(path, "a"), say=lines.append)
    assert compiled == ["cpu:1", "cpu:2", "cpu:8"] and again[:2] == found[:2]
    assert len(queue.Cache(path, "a").rows) == 3
    assert queue.Cache(path, "b").rows == {}  # other code
    queue.run(listed[:1], queue.Cache(path, "b"), say=lines.append, memory=1)
    assert compiled[-1] == "cpu:1" and "DOES NOT FIT" in lines[-1]


def test_source_digest_sees_the_library(tmp_path):
    (tmp_path / "lowrank_jax").mkdir()
    for name in queue.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a") if name.endswith(".py") else (tmp_path / name).mkdir(
            exist_ok=True
        )
    first = queue.source_digest(tmp_path)
    (tmp_path / "lowrank_jax" / "linalg.py").write_text("b")
    assert queue.source_digest(tmp_path) != first


@pytest.mark.slow
def test_tables_and_figure(rows):
    placed = queue.judged(rows["galore"] | {"topology": "v5e:1x1"})
    unknown = ("temporary_bytes", "code_bytes", "collectives", "compiler_flops")
    refused = {name: value for name, value in rows["adamw"].items() if name not in unknown}
    refused |= {"placed": False, "usable_bytes": 2**20, "peak_bytes": 2**30, "topology": "v5e:1x1"}
    refused = queue.judged(refused)
    text = report.table([placed, refused, {"error": "no compiler"}])
    assert "yes" in text and "NO" in text and ">1.00" in text and "failed: no compiler" in text
    told = report.details(refused)
    assert "at least" in told and "does NOT fit" in told and "gradients" in told
    assert "collectives of a chip" in report.details(placed)
    sums = report.parts(placed)
    assert sum(sums.values()) == pytest.approx(placed["peak_bytes"], rel=0.05)
    axes = report.figure([placed, refused]).axes[0]
    assert len(axes.get_yticks()) == 2 and "galore" in axes.get_yticklabels()[0].get_text()
    ran = rows["adamw"] | {
        "measured": {"argument_bytes": 1, "error_bytes": 0, "temporary_bytes": 2**21}
    }
    ran |= {"temporary_bytes": 2**20}
    aims = [{"aim": "low", "of": None, "value": 0.5, "bound": 1.0, "met": True}]
    markdown = report.plans(
        {
            "command": "c",
            "length": 16,
            "rows": [placed, refused],
            "wanted": 5,
            "aims": aims,
            "not_reached": ["x", "y", "z"],
            "reality": [ran],
        }
    )
    assert "+100.0%" in markdown and "| low | - | 0.5 | 1 | met |" in markdown
    assert "**no**" in markdown and "Not reached yet: 3 of 5" in markdown
    assert "galore (alternating), projected" in markdown


def test_the_evidence_queue():
    listed = plans.wanted()
    assert len({case.key for case in listed}) == len(listed)
    for case in [*listed, *plans.reality()]:
        case.check()
    assert listed[0].config.preset == "1B"
    first, second = listed[0], listed[1]
    base = {
        "mesh": {"fsdp": 16},
        "chips": 16,
        "placed": True,
        "topology": "v5e:4x4",
        "flops": 1.0,
        "peak_bytes": 1,
        "backprop": None,
        "collectives": {"block_reduced_bytes": 8},
    }
    kept = {
        plans.identity(first): base
        | {
            "preset": "1B",
            "name": "adamw",
            "optimizer": "adamw",
            "components": [{"component": "optimizer state", "bytes": 102, "share_bytes": 100}],
        },
        plans.identity(second): base
        | {
            "preset": "1B",
            "name": "galore",
            "optimizer": "galore",
            "components": [{"component": "moments", "bytes": 100, "share_bytes": 100}],
        },
    }
    found = plans.collect(kept, {plans.identity(listed[2]): "broken"})
    assert len(found["rows"]) == 2 and len(found["not_reached"]) == len(listed) - 3
    assert found["failed"] == [{"case": listed[2].label, "error": "broken"}]
    state, reduced = found["aims"]
    assert state["value"] == pytest.approx(0.02) and state["met"] is False
    assert reduced["met"] is None
    data = [
        base
        | {
            "mesh": {"data": 256},
            "chips": 256,
            "optimizer": name,
            "components": [{"component": "moments", "bytes": 1, "share_bytes": 1}],
            "collectives": {"block_reduced_bytes": size},
        }
        for name, size in (("adamw", 8), ("galore", 2))
    ]
    assert plans.aims(data)[1]["value"] == 4.0 and plans.aims(data)[1]["met"] is True


def command(tmp_path, *words, expect=0):
    """The command line as a user calls it."""
    sizes = [f"--config.model.{key}={value}" for key, value in SECTIONS["model"].items()]
    sizes += [f"--config.data.{key}={value}" for key, value in SECTIONS["data"].items()]
    configs = os.path.join(runs.ROOT, "experiments", "configs", "tiny.py")
    flags = [f"--config={configs}", *sizes, f"--cache={tmp_path / 'cache'}", *words]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", *flags],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == expect, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_eight_devices_that_are_there(tmp_path):
    """The whole command: compiled in another process, run there, and what it predicted held."""
    words = [
        "--topology=cpu:8",
        "--meshes=fsdp=8",
        "--optimizers=adamw",
        "--execute",
        f"--json={tmp_path / 'rows.json'}",
        f"--plot={tmp_path / 'plot.png'}",
    ]
    done = command(tmp_path, *words)
    assert "state in all" in done.stdout and "all-gather" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["measured"]["argument_bytes"] == 8 * row["argument_bytes"]
    own, share = report.state_bytes(row)
    assert own == pytest.approx(share, rel=0.05)  # norms and counts are whole
    assert 0 < row["measured"]["loss"] < 5.7  # log 259 is 5.56, and a few updates were made
    assert (tmp_path / "plot.png").stat().st_size > 10000
    again = command(tmp_path, *words, "--memory_gib=1e-6", "--noadvise", expect=1)
    assert "kept from before" in again.stderr and "does NOT fit" in again.stdout


@pytest.mark.slow
def test_wrong_words_end_with_a_message(tmp_path):
    assert "topology='h300'" in command(tmp_path, "--topology=h300", expect=2).stderr
    assert "name a target" in command(tmp_path, expect=2).stderr


@pytest.mark.slow
def test_thin_refreshes_are_planned_without_being_asked_for():
    """The same program as with refresh_when=after, which projected backprop takes without full
    gradients."""

    def text(optimizer):
        config = config_of(f"{optimizer}:backprop=projected")
        task = program.Planned(config, jax.devices()[:1])
        return cases.gradients_of(config), task.lowered().as_text()

    words = ("", ":refresh_when=after", ":refresh_when=before")
    by_itself, asked, before = (
        text(f"galore:rank=8:projector=alternating{when}") for when in words
    )
    assert by_itself == asked
    assert by_itself[0] == "sketch at a refresh"
    assert before[0] == "full at a refresh"
    assert before[1] != asked[1]
