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

from experiments.finetuning import export
from experiments.finetuning.task import Finetuning
from experiments.harness import command
from experiments.settings import finetuning_configuration
from experiments.settings.configuration import ConfigurationError

_EXPORT = flags.DEFINE_string(
    "export", None, "folder for what was tuned, written when the run is over"
)
_FORMAT = flags.DEFINE_enum("export_format", "run", export.FORMATS, "who is to read it")


def conclude(summary, workdir):
    """The last lines of a run that is over."""
    share = summary["trainable_parameters"] / summary["parameters"]
    print(
        f"trained {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters "
        f"({share:.3%})"
    )

    def line(title, key, show):
        before, after = summary[f"{key}_before"], summary[key]
        if before is not None and after is not None:
            print(f"{title:<24} {show(before)} before, {show(after)} after")

    line("validation loss", "validation_loss", "{:.4f}".format)
    if summary["trigram_loss"] is not None:
        print(f"{'trigram loss':<24} {summary['trigram_loss']:.4f}")
    line("validation accuracy", "validation_accuracy", "{:.2%}".format)
    line("loss on base's domain", "domain_loss", "{:.4f}".format)
    line("accuracy there", "domain_accuracy", "{:.2%}".format)
    if _EXPORT.value and summary["status"] == "finished":
        print(f"exported to {export.export(workdir, _EXPORT.value, _FORMAT.value)}")


def check_export(config):
    """Before any work: there is room for what `--export` asks for, and this run makes it."""
    if _EXPORT.value:
        export.check_output(_EXPORT.value)
        if _FORMAT.value == "peft" and not config.adapter.method:
            raise ConfigurationError(
                "export_format='peft': the whole model is trained; give 'huggingface' or 'run'"
            )


if __name__ == "__main__":
    default = pathlib.Path(__file__).parent / "configs" / "finetune" / "documentation.py"
    alone = ("export",)
    command.run(
        "experiments.finetune",
        finetuning_configuration,
        Finetuning,
        conclude,
        default=default,
        alone=alone,
        before=check_export,
    )
