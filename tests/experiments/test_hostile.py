"""What nobody means to happen: 200 random damages of a checkpoint, and 100 malformed inputs to each
program.

Whatever it is, no wrong result comes silently, no traceback reaches the user, and no step that is
sound is lost.
"""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import app

from experiments import finetune
from experiments.benchmarks import study
from experiments.finetuning.task import Finetuning
from experiments.harness import checkpoint, command, export, outputs, training
from experiments.harness.checkpoint import Checkpoints
from experiments.harness.runs import sealed
from experiments.harness.tasks import Pretraining
from experiments.planning import command as planning_command
from experiments.planning import queue
from experiments.reporting import page
from experiments.settings import arguments, configuration, finetuning_configuration
from tests.experiments import commands, hostile, runs, test_bases, tuning
from tests.experiments.test_outputs import REFUSED

pytestmark = pytest.mark.slow

DAMAGES, INPUTS = 200, 100


def tree(step):
    params = {
        "layers": {
            "kernel": jnp.full((6, 4), float(step)),
            "half": jnp.full((5,), step, jnp.bfloat16),
        }
    }
    state = optax.adam(1e-3).init(params)
    return {
        "params": params,
        "opt_state": (state[0]._replace(count=jnp.asarray(step, jnp.int32)), state[1]),
    }


def counted(restored):
    done = int(restored.tree["opt_state"][0].count)
    return None if done == restored.step else f"its state has seen {done} updates"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two steps, 4 and 8, and what they hold."""
    folder = tmp_path_factory.mktemp("sound")
    store = Checkpoints(folder, keep=2)
    for step in (4, 8):
        store.save(step, tree(step), {"tokens": 7 * step})
    store.close()
    return folder


def same(left, right):
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in leaves
    )


def test_damage_of_the_newest_step_gives_it_whole_or_the_one_before_with_a_line(sound, tmp_path):
    kinds = {}
    for seed in range(DAMAGES):
        folder = tmp_path / str(seed)
        shutil.copytree(sound, folder)
        kind = hostile.damage_checkpoint(random.Random(seed), folder / "8")
        lines = []
        store = Checkpoints(folder, say=lines.append)
        try:
            restored = store.restore(jax.eval_shape(lambda: tree(0)), check=counted)
            assert restored is not None and same(restored.tree, tree(restored.step))
            assert restored.extra == {"tokens": 7 * restored.step}
            if restored.step == 4 and kind != "a file for the step":
                assert len(lines) == 1 and "passed over" in lines[0] and str(folder) in lines[0]
            assert checkpoint.stored_sides(folder) == {}
        except Exception as error:
            raise AssertionError(f"seed {seed}: {kind}") from error
        finally:
            store.close()
        kinds.setdefault(kind, set()).add(restored.step)
        shutil.rmtree(folder)
    assert kinds.keys() == hostile.CHECKPOINT.keys()
    whole = {kind for kind, steps in kinds.items() if 8 in steps}
    assert whole <= {"bit", "cut", "longer", "copied", "manifest"}, (
        whole
    )  # white space, or a file copied to itself


def test_damage_of_both_steps_is_an_error_that_names_them(sound, tmp_path):
    for seed in range(10):
        folder = tmp_path / str(seed)
        shutil.copytree(sound, folder)
        generator = random.Random(seed)
        for step in ("4", "8"):
            hostile.CHECKPOINT["forged manifest"](generator, folder / step)
        store = Checkpoints(folder, say=lambda line: None)
        with pytest.raises(checkpoint.CheckpointError, match=r"verifies \(damaged: \[8, 4\]\)"):
            store.restore(jax.eval_shape(lambda: tree(0)), check=counted)
        store.close()
        assert json.loads((folder / "8" / checkpoint.MANIFEST).read_text())["digest"]


VALUES = {
    "optimizer.name": ("galroe", "", "3"),
    "optimizer.learning_rate": ("-1", "0", "nan", "inf", "x"),
    "optimizer.weight_decay": ("-1", "nan"),
    "optimizer.clip_norm": ("0", "-1", "nan"),
    "schedule.steps": ("0", "-1", "1.5", "x"),
    "schedule.accumulation": ("0", "3"),
    "schedule.warmup_steps": ("-1", "1000000"),
    "schedule.final_fraction": ("2", "-1", "nan"),
    "checkpoint.every": ("-1", "x"),
    "checkpoint.keep": ("0",),
    "run.seed": ("-1",),
    "run.log_every": ("0",),
    "run.temperature": ("-1", "nan"),
    "run.evaluation_tokens": ("0", "-5"),
    "run.evaluation_batch_size": ("0",),
    "data.batch_size": ("0", "-4", "x"),
    "data.sequence_length": ("0", "-1"),
    "mesh.data": ("0", "7"),
    "mesh.tensor": ("0", "-3"),
}
PRETRAINED = {
    "optimizer.rank": ("0", "-3", "1.5", "x"),
    "data.packing": ("pakc",),
    "model.width": ("0", "-1", "x"),
    "model.heads": ("0", "3"),
    "model.layers": ("0",),
    "model.dtype": ("float31",),
}
TUNED = {
    "adapter.method": (
        "lora(rank=0)",
        "lora(",
        "lara(rank=2)",
        "__import__('os')",
        "lora(rank=99999)",
        "3",
    ),
    "adapter.targets": ("(", "nothing/at/all"),
    "adapter.bias": ("some",),
    "base.source": ("nowhere", "/dev/null", ""),
    "base.dtype": ("float31",),
    "base.domain": ("nowhere",),
    "data.task": ("talking",),
}
FILES = {
    "missing.py": None,
    "binary.py": b"\x00\xff\xfe",
    "syntax.py": b"def get_config(:\n",
    "raises.py": b"def get_config():\n    raise KeyError('x')\n",
    "empty.py": b"",
    "none.py": b"def get_config():\n    return None\n",
    "number.py": b"def get_config():\n    return 3\n",
}
FLAGS = ("--wrokdir=x", "more")
TRAINING_FLAGS = (
    *FLAGS,
    "--report=maybe",
    "--processes=0",
    "--processes=x",
    "--coordinator=x",
    "--process=1",
)
TOPOLOGIES = ("", "v9z:2x2", "cpu:0", "cpu:x", "v5e:", "²", "h200:3x")
MESHES = ("data", "data=0", "dta=1", "data=2", "data=²", "data=1=2")
OPTIMIZERS = ("galroe", "galore:rnak=3", "galore:rank=x", ":")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command lines name: texts, configuration files, a run, and a base in each of its
    forms."""
    folder = tmp_path_factory.mktemp("hostile")
    runs.write_text(folder / "text", files=12, words=60)
    tuning.write_data(folder)
    for make in (test_bases.run_folder, test_bases.transformers, test_bases.exported):
        make(folder / make.__name__, test_bases.parameters(1.0))
    row = {
        "kind": "train",
        "step": 1,
        "loss": 1.0,
        "tokens": 3,
        "seconds": 1.0,
        "step_seconds": 1.0,
    }
    (folder / "run_folder" / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    summary = {
        "status": "finished",
        "steps": 20,
        "tokens": 60,
        "total_seconds": 1.0,
        "validation_loss": 1.0,
    }
    outputs.write_json(folder / "run_folder" / "summary.json", sealed(summary))
    outputs.write_json(
        folder / "run_folder" / "ledger.json", [{"component": "parameters", "bytes_formula": 4}]
    )
    started = {"started_from": str(folder / "another"), "step": 8, "with": "parameters"}
    outputs.write_json(folder / "run_folder" / "history.json", [started])
    for name, module in (("pretrain", configuration), ("finetune", finetuning_configuration)):
        base = {"base": {"source": str(folder / "transformers")}}
        config = runs.tiny(folder) if name == "pretrain" else tuning.tiny(folder, **base)
        (folder / name).mkdir()
        commands.write(folder / name, module.__name__.split(".")[-1], module.to_dict(config))
    for name, text in FILES.items():
        if text is not None:
            (folder / name).write_bytes(text)
    (folder / "garbage.model").write_bytes(random.Random(0).randbytes(500))
    (folder / "nothing").mkdir()
    return folder


def BASE(folder):
    return {"base": {"source": str(folder / "transformers")}}


def configured(generator, folder, values, program, flags=TRAINING_FLAGS):
    """A malformed command line of a program with a configuration."""
    own = f"--config={folder / program / 'config.py'}"
    key = generator.choice([*values])
    kinds = {
        "value": lambda: [own, f"--config.{key}={generator.choice(values[key])}"],
        "key": lambda: [own, f"--config.{wrong_key(generator, key)}=1"],
        "section": lambda: [own, f"--config.{key.split('.')[0]}=1"],
        "file": lambda: [f"--config={folder / generator.choice([*FILES])}"],
        "flag": lambda: [own, generator.choice(flags)],
    }
    return kinds[generator.choice([*kinds])]()


def wrong_key(generator, key):
    section, _, name = key.partition(".")
    return f"{section}.{hostile.misspelt(generator, name)}"


def damaged_copy(generator, folder, name, target):
    shutil.copytree(folder / name, target)
    hostile.damaged_run(generator, target)
    return target


def pretraining(generator, folder, target):
    own = f"--config={folder / 'pretrain' / 'config.py'}"
    place = hostile.place(generator, folder, is_folder=True)
    kinds = {
        "configuration": lambda: configured(generator, folder, VALUES | PRETRAINED, "pretrain"),
        "workdir": lambda: [own, f"--workdir={place}"],
        "another run": lambda: [
            own,
            f"--workdir={damaged_copy(generator, folder, 'run_folder', target)}",
        ],
        "data": lambda: [
            own,
            f"--config.data.name={folder / generator.choice(['none', 'nothing', 'garbage.model'])}",
        ],
        "tokenizer": lambda: [
            own,
            f"--config.data.tokenizer={folder / generator.choice(['none', 'garbage.model'])}",
        ],
    }
    flags = kinds[generator.choice(["configuration", *kinds])]()
    return flags if any("workdir" in flag for flag in flags) else [*flags, f"--workdir={target}"]


def tuned(generator, folder, target):
    own = f"--config={folder / 'finetune' / 'config.py'}"
    place = hostile.place(generator, folder, is_folder=True)
    kinds = {
        "configuration": lambda: configured(generator, folder, VALUES | TUNED, "finetune"),
        "workdir": lambda: [own, f"--workdir={place}"],
        "export": lambda: [own, f"--export={generator.choice([place, str(folder)])}"],
        "base": lambda: [
            own,
            f"--config.base.source={damaged_base(generator, folder, target.with_suffix('.base'))}",
        ],
        "data": lambda: [
            own,
            f"--config.data.name={damaged_rows(generator, folder, target.with_suffix('.jsonl'))}",
        ],
    }
    flags = kinds[generator.choice(["configuration", *kinds])]()
    return flags if any("workdir" in flag for flag in flags) else [*flags, f"--workdir={target}"]


def damaged_base(generator, folder, target):
    name, keys = generator.choice(
        [
            (
                "transformers",
                ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"),
            ),
            ("exported", ("format", "architecture", "model", "tokenizer", "classes", "domain")),
            ("run_folder", ("name", "model", "data", "optimizer")),
        ]
    )
    shutil.copytree(folder / name, target)
    path = target / "config.json"
    if name == "transformers" and generator.random() < 0.5:
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])
    else:
        path.write_bytes(hostile.damaged_json(generator, path.read_text(), keys))
    return target


def damaged_rows(generator, folder, target):
    lines = (folder / "rows.jsonl").read_bytes().splitlines()
    lines.insert(
        generator.randrange(len(lines)),
        hostile.damaged_json(generator, lines[0].decode(), ("text",)),
    )
    target.write_bytes(b"\n".join(lines) + b"\n")
    return target


def exported(generator, folder, target):
    run = folder / "run_folder"
    place = hostile.place(generator, folder, is_folder=True)
    out = f"--output={target}"
    kinds = {
        "output": lambda: [f"--workdir={run}", f"--output={place}"],
        "files there": lambda: [f"--workdir={run}", f"--output={folder / 'transformers'}"],
        "no run": lambda: [
            f"--workdir={generator.choice([folder, place, folder / 'transformers'])}",
            out,
        ],
        "damage": lambda: [
            f"--workdir={damaged_config(generator, run, target.with_suffix('.run'))}",
            out,
        ],
        "checkpoints": lambda: [
            f"--workdir={without_steps(generator, run, target.with_suffix('.run'))}",
            out,
        ],
        "flags": lambda: generator.choice(
            [[], [out], [f"--workdir={run}"], ["--nonsense"], [out, "more"]]
        ),
    }
    return kinds[generator.choice([*kinds])]()


def damaged_config(generator, run, target):
    shutil.copytree(run, target)
    path = target / "config.json"
    path.write_bytes(
        hostile.damaged_json(
            generator, path.read_text(), ("name", "model", "data", "optimizer", "run")
        )
    )
    return target


def without_steps(generator, run, target):
    shutil.copytree(run, target)
    hostile.CHECKPOINT["forged manifest"](generator, target / "checkpoints" / "3")
    return target


def reported(generator, folder, target):
    run = folder / "run_folder"
    place = hostile.place(generator, folder, is_folder=True)
    kinds = {
        "output": lambda: [str(run), f"--output={place}"],
        "no run": lambda: [
            str(generator.choice([folder / "none", folder / "nothing", place])),
            out,
        ],
        "none": lambda: generator.choice([[], [out], ["--nonsense"]]),
        "damage": lambda: [
            str(run),
            str(damaged_copy(generator, folder, run.name, target.with_suffix(".run"))),
            out,
        ],
    }
    out = f"--output={target.with_suffix('.html')}"
    return kinds[generator.choice([*kinds, "damage"])]()


def planned(generator, folder, target):
    own = f"--config={folder / 'pretrain' / 'config.py'}"
    cpu = [own, "--topology=cpu:1", f"--cache={target}"]
    place = hostile.place(generator, folder, is_folder=False)
    kinds = {
        "configuration": lambda: [
            *configured(generator, folder, PRETRAINED, "pretrain", FLAGS),
            *cpu[1:],
        ],
        "place": lambda: [
            *cpu[: generator.choice([2, 3])],
            f"--{generator.choice(['json', 'plot', 'cache'])}={place}",
        ],
        "topology": lambda: [own, f"--topology={generator.choice(TOPOLOGIES)}"],
        "meshes": lambda: [*cpu, f"--meshes={generator.choice(MESHES)}"],
        "optimizers": lambda: [*cpu, f"--optimizers={generator.choice(OPTIMIZERS)}"],
        "memory": lambda: [*cpu, f"--memory_gib={generator.choice(['0', '-1', 'nan', 'x'])}"],
        "backprop": lambda: [*cpu, "--backprop=some"],
    }
    return kinds[generator.choice([*kinds])]()


def studied(generator, folder, target):
    root, results = f"--root={target}", f"--results={target.with_suffix('.json')}"
    known = target.with_suffix(".known")
    known.write_bytes(
        hostile.damaged_json(generator, '{"finished": {}, "rows": []}', ("finished",))
    )
    number = generator.choice(["0", "-1", "nan", "inf", "x", ""])
    kinds = {
        "number": lambda: [
            root,
            results,
            f"--{generator.choice(['budget-hours', 'workers', 'steps'])}={number}",
        ],
        "root": lambda: [results, f"--root={hostile.place(generator, folder, is_folder=True)}"],
        "results": lambda: [root, f"--results={hostile.place(generator, folder, is_folder=False)}"],
        "known": lambda: [
            root,
            results,
            f"--known={generator.choice([known, folder, '/dev/null'])}",
        ],
        "refresh_schedule": lambda: [f"--root={spoilt(generator, target, 'spent_hours')}", results],
        "times": lambda: [f"--root={spoilt(generator, target, 'steps.json')}", results],
        "flags": lambda: [root, results, generator.choice(["--nonsense", "more", "--run"])],
    }
    return kinds[generator.choice([*kinds])]()


def spoilt(generator, root, name):
    root.mkdir()
    (root / name).write_bytes(
        generator.choice([b"", b"x", b"[]", b"\xff", b'{"AdamW": "fast"}', b"NaN", b"[" * 5000])
    )
    return root


def measured(generator, folder, target):
    """One of the benchmarks, whose names stand first."""
    program, flag, values = generator.choice([row for row in REFUSED if row[0] is not study])
    place = hostile.place(generator, folder, is_folder=False)
    wrong = [
        f"{flag}={generator.choice(values)}",
        f"--output={place}",
        "--nonsense",
        "more",
        f"--{flag[3:]}",
    ]
    return program, [generator.choice(wrong)]


DEFAULT = runs.ROOT / "experiments" / "configs" / "default.py"


def pretrain_main():
    command.run("experiments.pretrain", configuration, Pretraining, print, default=DEFAULT)


def finetune_main():
    own = {"default": DEFAULT, "before": finetune.check_export}
    command.run("experiments.finetune", finetuning_configuration, Finetuning, print, **own)


def plan_main():
    app.run(planning_command.main, flags_parser=arguments.parser(configuration, DEFAULT))


# What makes a malformed command line, the program, and its exit codes.
PROGRAMS = {
    "pretrain": (pretraining, pretrain_main, (2,)),
    "finetune": (tuned, finetune_main, (2,)),
    "export": (exported, export.main, (1, 2)),
    "report": (reported, page.main, (2,)),
    "plan": (planned, plan_main, (2,)),
    "study": (studied, study.main, (2,)),
    "benchmarks": (measured, None, (2,)),
}


@pytest.fixture
def no_work(monkeypatch):
    """A command line that was let through would begin to compute."""

    def begun(*args, **kwargs):
        raise AssertionError("it was let through")

    monkeypatch.setattr(training._Training, "run", begun)
    monkeypatch.setattr(queue, "compile_case", begun)
    monkeypatch.setattr(study.subprocess, "Popen", begun)
    monkeypatch.setattr(study.signal, "signal", lambda *args: None)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_malformed_input_is_one_message(program, folder, tmp_path, monkeypatch, no_work):
    make, main, codes = PROGRAMS[program]
    absl = program in ("pretrain", "finetune", "plan")
    wrong = []
    for seed in range(INPUTS):
        made = make(random.Random(seed), folder, tmp_path / str(seed))
        main, words = (made[0].main, made[1]) if program == "benchmarks" else (main, made)
        try:
            code, _, said = hostile.ended(main, words, monkeypatch if absl else None)
        except BaseException as error:
            wrong.append((seed, words, repr(error)))
            continue
        lines = said.strip().splitlines()
        if (
            code not in codes
            or "Traceback" in said
            or not lines
            or ("error" not in lines[-1] and ":" not in lines[-1])
        ):
            wrong.append((seed, words, code, said[-300:]))
        assert not (folder / "file").exists() or (folder / "file").read_text() == "mine"
    assert not wrong, f"{len(wrong)} of {INPUTS}:\n" + "\n".join(map(str, wrong))
