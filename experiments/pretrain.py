"""Pre-train a model; the same command again resumes.

    python -m experiments.pretrain --config=experiments/configs/tiny.py --config.optimizer.rank=32 --workdir=runs/tiny

SIGTERM or Ctrl-C saves and exits with 0. Exit codes: 0 done or stopped on request, 1 failed, 2
wrong configuration.
"""

import pathlib

from experiments.harness import command
from experiments.harness.tasks import Pretraining
from experiments.settings import configuration


def conclude(summary, workdir):
    """The last lines of a run that is over."""
    del workdir
    if summary["validation_loss"] is None:
        return
    print(
        f"validation loss {summary['validation_loss']:.4f}   perplexity {summary['perplexity']:.2f}"
    )
    if summary["trigram_loss"] is not None:
        met = summary["validation_loss"] < summary["trigram_loss"]
        verdict = "below it: the aim is met" if met else "NOT below it: the aim is missed"
        print(f"trigram loss    {summary['trigram_loss']:.4f}   the model ends {verdict}")


if __name__ == "__main__":
    default = pathlib.Path(__file__).parent / "configs" / "default.py"
    command.run("experiments.pretrain", configuration, Pretraining, conclude, default=default)
