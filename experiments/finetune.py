"""Fine-tune a model: an adapter, or all of it; the same command again resumes.

    python -m experiments.finetune --config=experiments/configs/finetune/documentation.py \\
        --config.base.source=runs/default --config.adapter.method='dora(rank=8)' --workdir=runs/dora
        --export=exported

With `--export` the tuned model is also written as plain parameters: a folder that
`--config.base.source` reads, or, with `--export_format=huggingface`, one that transformers reads;
`--export_format=peft` writes the adapters alone. Of a run that is over, too. SIGTERM or Ctrl-C
saves and exits with 0. Exit codes: 0 done or stopped on request, 1 failed, 2 wrong configuration.
"""

import pathlib

from absl import flags

from experiments.finetuning import export, task
from experiments.harness import command
from experiments.settings import finetuning_configuration

_EXPORT = flags.DEFINE_string(
    "export", None, "folder for what was tuned, written when the run is over"
)
_FORMAT = flags.DEFINE_enum("export_format", "run", export.FORMATS, "who is to read it")


def conclude(summary, workdir):
    """The last lines of a run that is over, and its export."""
    print(task.conclusion(summary))
    if _EXPORT.value and summary["status"] == "finished":
        print(f"exported to {export.export(workdir, _EXPORT.value, _FORMAT.value)}")


def check_export(config):
    """Before any work: there is room for what `--export` asks for, and this run makes it."""
    if _EXPORT.value:
        export.check(_EXPORT.value, _FORMAT.value, config)


if __name__ == "__main__":
    command.run(
        "experiments.finetune",
        finetuning_configuration,
        task.Finetuning,
        conclude,
        default=pathlib.Path(__file__).parent / "configs" / "finetune" / "documentation.py",
        alone=("export",),
        before=check_export,
    )
