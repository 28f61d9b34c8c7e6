"""Run folders that older versions wrote, in `tests/checkpoints`: how they are written and resumed.

    python -m tests.experiments.old_checkpoints tests/checkpoints/state_N

writes those of the present version N of the optimizers' state, which stay as they are ever after.
Every run is made by the command, in a folder of its own below one that also holds the data; what
the command leaves when it is killed right after update SAVED, resumed by the command, says what is
expected of the later versions.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

import numpy as np

from experiments.finetuning.task import Finetuning
from experiments.harness import training, workdir
from experiments.settings import configuration, finetuning_configuration
from tests.experiments import commands, runs, tuning

ARCHIVE, EXPECTED = "runs.tar.xz", "runs.json"
STEPS, SAVED = 8, 4

_MODEL = {
    "width": 12,
    "hidden": 20,
    "heads": 2,
    "kv_heads": 1,
    "layers": 2,
    "sequence_length": 16,
    "tied_head": True,
}
_DATA = {"name": "./text", "directory": "./cache", "sequence_length": 16, "batch_size": 4}
_SCHEDULE = {"steps": STEPS, "warmup_steps": 1, "final_fraction": 0.5}
_SAVING = {"every": SAVED, "keep": 2}
_LOOP = {"evaluate_every": 0, "evaluation_tokens": 64, "sample_tokens": 0, "compile_cache": False}
_OPTIMIZER = {"learning_rate": 1e-3}
_LOWRANK = _OPTIMIZER | {"rank": 3, "refresh_every": 3}
_UNSCANNED = {
    "scan": False,
    "tied_head": False,
    "param_dtype": "bfloat16",
    "vocabulary_size": 259,
    "biases": ("q_proj",),
}


def _pretrained(optimizer, **sections):
    """Values of `settings.configuration`; `sections` are merged into them."""
    values = {
        "name": "pretrained",
        "model": _MODEL,
        "data": _DATA,
        "optimizer": optimizer,
        "schedule": _SCHEDULE,
        "checkpoint": _SAVING,
        "run": _LOOP,
    }
    return values | {section: values[section] | table for section, table in sections.items()}


def _tuned(adapter, optimizer=None, **sections):
    """Values of `settings.finetuning_configuration`; `sections` are merged into them."""
    values = {
        "name": "tuned",
        "base": {"source": "base"},
        "adapter": adapter,
        "data": _DATA | {"name": "./rows.jsonl", "task": "instruction"},
        "optimizer": _OPTIMIZER | (optimizer or {"name": "adamw"}),
        "schedule": _SCHEDULE,
        "checkpoint": _SAVING,
        "run": _LOOP | {"forgetting": False},
    }
    return values | {section: values[section] | table for section, table in sections.items()}


# The runs that others start from: finished, with the last checkpoint alone.
BASES = {"base": _pretrained(_OPTIMIZER | {"name": "adamw"}, checkpoint={"keep": 1})}
EXPORTED = ("lora", "exported")  # the run that is exported for `base.source`, and where to

PRETRAINED = {
    "adamw": _pretrained(_OPTIMIZER | {"name": "adamw", "weight_decay": 0.1}),
    "galore": _pretrained(_LOWRANK | {"name": "galore"}),
    "galore_unscanned": _pretrained(
        _LOWRANK | {"name": "galore", "projector": "power", "side": "larger"},
        model=_UNSCANNED,
        schedule={"accumulation": 2},
    ),
    "galore_projected": _pretrained(
        _LOWRANK
        | {
            "name": "galore",
            "projector": "alternating",
            "backprop": "projected",
            "refresh_when": "after",
        }
    ),
    "dct_adamw": _pretrained(_LOWRANK | {"name": "dct_adamw", "rank": 0.25, "clip_norm": None}),
    "frugal": _pretrained(_LOWRANK | {"name": "frugal"}),
    "ldadam": _pretrained(_OPTIMIZER | {"name": "ldadam", "rank": 3}),
    "apollo": _pretrained(_LOWRANK | {"name": "apollo"}, model={"scan": False}),
    "apollo_mini": _pretrained(_OPTIMIZER | {"name": "apollo_mini", "refresh_every": 3}),
}

TUNED = {
    "lora": _tuned(
        {"method": "lora(rank=2, dropout=0.1, init='pissa')", "whole": ("norm/scale",)},
        run={"forgetting": True},
    ),
    "dora": _tuned({"method": "dora(rank=2)", "layers": (1,)}, {"name": "lora_plus", "ratio": 4.0}),
    "uni_lora": _tuned({"method": "uni_lora(rank=2, size=30)"}),
    "vera": _tuned({"method": "vera(rank=4)"}),
    "oft": _tuned({"method": "oft(block=4)", "targets": ".*/(q|v|gate|down)_proj/kernel"}),
    "pairs": _tuned({"method": "lora(rank=2)"}, {"name": "altlora_plus", "damping": 1e-3}),
    "rules": _tuned(
        {
            "method": "lora(rank=2)",
            "rules": ((".*/mlp/up_proj/kernel", "hira(rank=2)"), (".*/down_proj/.*", "")),
            "bias": "all",
        },
        {"name": "scaled_adamw"},
    ),
    "whole": _tuned(
        {"method": ""},
        _LOWRANK | {"name": "frugal"},
        base={"source": "exported"},
        data={"task": "classification"},
    ),
}


# Reading what is stored.


def versions():
    """The folders of stored runs, the oldest first."""
    return sorted((pathlib.Path(__file__).parents[1] / "checkpoints").glob("state_*"))


def expected(version):
    """{run: what its old version gave} of a folder of `versions()`."""
    return json.loads((version / EXPECTED).read_text())


def unpack(version, folder):
    """The runs of a version into a folder that is there, in which they also want to be started."""
    with tarfile.open(version / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def resume(folder, name):
    """Go on with a run in `folder`, under the configuration that it was written with."""
    values = workdir.read_config(folder / name)
    with contextlib.chdir(folder):  # sources are named relative to it
        if "adapter" in values:
            config = finetuning_configuration.from_dict(values)
            return training.run(config, folder / name, task=Finetuning, verbose=False)
        return training.run(configuration.from_dict(values), folder / name, verbose=False)


def figures(workdir):
    """What a finished run gave after update SAVED, and two numbers of each last parameter."""
    train, evaluations = runs.losses(workdir)
    step, arrays = runs.final_arrays(workdir)
    return {
        "step": step,
        "losses": {str(step): loss for step, (loss, _, _) in train.items() if step > SAVED},
        "evaluations": {str(step): loss for step, loss in evaluations.items() if step > SAVED},
        "parameters": {
            path: _digest(array) for path, array in arrays.items() if path.startswith("params/")
        },
    }


def _digest(array):
    """The norm, and the sum under weights of unequal entries."""
    flat = np.asarray(array, np.float64).ravel()
    return [float(np.linalg.norm(flat)), float(flat @ np.cos(np.arange(flat.size)))]


# Writing.


def write(version):
    """All runs, into a folder of `versions()`."""
    version = pathlib.Path(version).absolute()
    version.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        runs.write_text(folder / "text", words=12)
        tuning.write_data(folder)
        for run, values in BASES.items():
            _command(folder, "pretrain", run, values)
            _forget(folder / run)
        for run, values in PRETRAINED.items():
            _command(folder, "pretrain", run, values)
        for run, values in TUNED.items():
            source, target = EXPORTED
            _command(
                folder, "finetune", run, values, *((f"--export={target}",) if run == source else ())
            )
        for run in (*PRETRAINED, *TUNED):
            _kill(folder / run)
        _pack(folder, version / ARCHIVE)
    expect(version)


def expect(version):
    """What the present code gives from the runs of one of `versions()`, by the command."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        unpack(version, folder)
        for program, table in (("pretrain", PRETRAINED), ("finetune", TUNED)):
            for run, values in table.items():
                _command(folder, program, run, values)
                found[run] = figures(folder / run)
    (version / EXPECTED).write_text(json.dumps(found, indent=1) + "\n")


def _command(folder, program, run, values, *flags):
    module = {"pretrain": "configuration", "finetune": "finetuning_configuration"}[program]
    commands.write(folder, module, values)
    command = [
        sys.executable,
        "-m",
        f"experiments.{program}",
        "--config=config.py",
        f"--workdir={run}",
        "--noreport",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    print(run, flush=True)
    subprocess.run(
        [*command, *flags], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
    )


def _kill(workdir):
    """The run right after update SAVED was saved: no later checkpoint, line or summary."""
    _forget(workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > SAVED:
            shutil.rmtree(path)
    for name in ("summary.json", "ledger.json"):
        (workdir / name).unlink()
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= SAVED))


def _forget(workdir):
    """What is no part of a run."""
    (workdir / ".lock").unlink()


def _pack(folder, path):
    """Everything but the cached tokens and the configuration file; equal bytes for equal files."""

    def plain(member):
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(path, "w:xz", preset=9) as archive:
        for entry in sorted(folder.iterdir()):
            if entry.name not in ("cache", "config.py"):
                archive.add(entry, entry.name, filter=plain)


if __name__ == "__main__":
    write(sys.argv[1])
