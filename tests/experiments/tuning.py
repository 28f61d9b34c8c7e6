"""Fine-tuning runs so small that a test can do them, on the base that `runs.tiny` pre-trains."""

import json
import random

from experiments.finetuning.task import Finetuning
from experiments.harness import training
from experiments.settings import finetuning_configuration
from tests.experiments import runs


def write_data(folder):
    """Text, instructions and labelled lines of another vocabulary than the base's; the same on
    every call."""
    generator = random.Random(1)
    words = [
        "".join(generator.choices("aeioubcdfgp", k=generator.randint(2, 5))) for _ in range(40)
    ]
    rows = []
    for i in range(240):
        label = "even" if i % 2 == 0 else "odd"
        first = "x" if label == "even" else "z"
        text = first + " ".join(generator.choices(words, k=6))
        rows.append(
            {"text": text, "label": label, "prompt": f"{i}? ", "response": generator.choice(words)}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrained(folder, **sections):
    """The base: (its folder, its summary); `sections` as in `runs.tiny`."""
    runs.write_text(folder / "text")
    write_data(folder)
    summary = training.run(runs.tiny(folder, **sections), folder / "base", verbose=False)
    return folder / "base", summary


def tiny(folder, **sections):
    """A configuration on `folder`/base and `folder`/rows.jsonl; `sections` are merged into it."""
    values = {
        "name": "tuned",
        "base": {"source": str(folder / "base")},
        "adapter": {"method": "lora(rank=2)"},
        "data": {
            "name": str(folder / "rows.jsonl"),
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
            "domain_tokens": 512,
            "log_every": 100,
            "compile_cache": False,
        },
    }
    for section, table in sections.items():
        values[section] = values[section] | table
    return finetuning_configuration.from_dict(values)


def run(config, workdir, **options):
    return training.run(config, workdir, task=Finetuning, verbose=False, **options)
