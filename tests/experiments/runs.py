"""A run so small that a test can do it: two layers of width 16 on a folder of made-up text."""

import json
import os
import pathlib
import random
import signal

import jax
import numpy as np

from experiments.harness import methods, metrics, training
from experiments.settings import configuration

ROOT = pathlib.Path(configuration.__file__).parents[2]


def settings_of(name, rank=4):
    """What the section optimizer must say of a method: its name, a rank, and the options that have
    no default, all of which are steps."""
    method = methods.METHODS[name]
    given = {"name": name, "rank": rank} if method.takes("rank") else {"name": name}
    options = ", ".join(f"{option}=3" for option in method.required)
    return given | ({"options": options} if options else {})


def write_text(folder, files=60, words=400):
    """Sentences over a small vocabulary, the same on every call; the loader splits them by file
    name."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    vocabulary = [
        "".join(generator.choices("aeioulmnrst", k=generator.randint(2, 6))) for _ in range(50)
    ]
    for number in range(files):
        (folder / f"{number}.txt").write_text(" ".join(generator.choices(vocabulary, k=words)))
    return folder


def tiny(folder, **sections):
    """A configuration on the text in `folder`/text; `sections` are merged into it."""
    values = {
        "name": "tiny",
        "model": {
            "width": 16,
            "hidden": 32,
            "heads": 2,
            "kv_heads": 1,
            "layers": 2,
            "sequence_length": 16,
        },
        "data": {
            "name": str(folder / "text"),
            "directory": str(folder / "cache"),
            "sequence_length": 16,
            "batch_size": 4,
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "schedule": {"steps": 12},
        "checkpoint": {"every": 4},
        "run": {
            "evaluate_every": 6,
            "evaluation_tokens": 512,
            "sample_tokens": 0,
            "log_every": 100,
            "compile_cache": False,
        },
    }
    for section, table in sections.items():
        values[section] = values[section] | table
    return configuration.from_dict(values)


def losses(workdir):
    """{step: (loss, grad_norm)} and {step: validation loss}; a step that occurs twice is an
    error."""
    rows = metrics.read(workdir / "metrics.jsonl")
    train = [
        (row["step"], (row["loss"], row["grad_norm"], row["tokens"]))
        for row in rows
        if row["kind"] == "train"
    ]
    evaluations = [(row["step"], row["loss"]) for row in rows if row["kind"] == "eval"]
    assert len(dict(train)) == len(train)
    assert len(dict(evaluations)) == len(evaluations)
    assert [step for step, _ in train] == sorted(step for step, _ in train)
    return dict(train), dict(evaluations)


def notes(workdir):
    return [row["text"] for row in metrics.read(workdir / "metrics.jsonl") if row["kind"] == "note"]


def terminate_in_evaluation(monkeypatch, step, title, batch):
    """A real SIGTERM once the evaluation at `step` takes its batch number `batch`; the batches that
    are taken then."""
    watched, after = training._Training._watched, []

    def sending(self, own, total, batches):
        def signalling():
            for number, content in enumerate(batches):
                if (self.step, own) == (step, title):
                    if number == batch:
                        os.kill(os.getpid(), signal.SIGTERM)
                    if number >= batch:
                        after.append(number)
                yield content

        return watched(self, own, total, signalling())

    monkeypatch.setattr(training._Training, "_watched", sending)
    return after


def final_arrays(workdir):
    """(step, {path: array}) of the newest checkpoint, read with plain orbax onto one device."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    manifest = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())
    key, own = jax.random.key(0).dtype, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(shape, key if dtype == str(key) else dtype, sharding=own)
        for path, (shape, dtype) in manifest["leaves"].items()
    }
    restorer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    restored = restorer.restore(
        workdir / "checkpoints" / str(step) / "state", args=ocp.args.StandardRestore(target)
    )
    plain = lambda array: jax.random.key_data(array) if array.dtype == key else array  # noqa: E731
    return step, {path: np.asarray(plain(array)) for path, array in restored.items()}


def assert_bitwise_equal(left, right):
    """Losses, evaluations and every array of the newest checkpoints of two run folders agree in
    every bit."""
    assert losses(left) == losses(right)
    (step, arrays), (other_step, others) = final_arrays(left), final_arrays(right)
    assert step == other_step
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.tobytes() == others[path].tobytes(), path
