"""Runnable programs around lowrank_jax: pre-training, reports, benchmarks and the study of optimizers.

Commands stand here; what they share stands in the rooms. A file imports what is below it:

    settings/, harness/outputs.py    configurations and their checks; files that are written whole
    models/, data/                   what is trained, and on what
    harness/                         one training loop and everything around it
    finetuning/, planning/           fine-tuning as a task; programs that are compiled and not run
    reporting/, benchmarks/          pages and tables of finished runs; measurements
    pretrain, finetune, ...          the commands: `python -m experiments.pretrain --help`
"""

import importlib
import importlib.util
import warnings
from typing import Any

# What every program here imports; the library alone, and so an installed lowrank_jax, does without.
NEEDED = ("absl", "ml_collections", "orbax", "tensorflow_datasets")


def _check_installed() -> None:
    """ImportError that names the extra, before a program stops somewhere in its imports."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the programs in experiments/ need {', '.join(missing)}: run make train, or pip "
            "install -e '.[experiments]' in the checkout"
        )


_check_installed()

# Names that configuration files of older versions import: until the next minor version.
MOVED = {
    "configuration": "experiments.settings.configuration",
    "tuning_configuration": "experiments.settings.finetuning_configuration",
}


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"experiments.{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=2)
    return importlib.import_module(MOVED[name])
