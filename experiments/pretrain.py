"""Pre-train a model; the same command again resumes.

    python -m experiments.pretrain --config=experiments/configs/tiny.py --config.optimizer.rank=32 --workdir=runs/tiny

SIGTERM or Ctrl-C saves and exits with 0. Exit codes: 0 done or stopped on request, 1 failed, 2 wrong configuration.
"""

import pathlib
import shlex
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import checkpoint, configuration, training

_DEFAULT = str(pathlib.Path(__file__).parent / "configs" / "default.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder; by default runs/<name of the configuration>")
_REPORT = flags.DEFINE_bool("report", True, "write <workdir>/report at the end")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other hosts with jax.distributed.initialize()")


def main(argv):
    """Run what the flags say; returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # orbax and TFDS tell their steps at INFO, which absl shows
    if len(argv) > 1:
        return _refuse(f"unexpected arguments {argv[1:]}: flags are written --config.section.key=value")
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    try:
        config = configuration.from_dict(flags.FLAGS.config)
        workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name}")
        summary = training.run(config, workdir, handle_signals=True)
    except configuration.ConfigurationError as error:
        return _refuse(str(error))
    except checkpoint.CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if summary["status"] == "stopped":
        command = shlex.join([sys.executable, "-m", "experiments.pretrain", *sys.argv[1:]])
        print(
            f"stopped after update {summary['step']} of {summary['steps']}, saved in {workdir}; to resume:\n  {command}"
        )
        return 0
    if jax.process_index() == 0:
        _conclude(summary, workdir)
    return 1 if summary["status"] == "diverged" else 0


def _conclude(summary, workdir):
    if _REPORT.value:
        from experiments import report

        report.write([workdir], workdir / "report")
    size = f"{summary['steps']} updates, {summary['tokens']:,} tokens"
    print(f"{summary['status']} after {size}, {summary['total_seconds']:.0f} s")
    if summary["validation_loss"] is None:
        return
    print(f"validation loss {summary['validation_loss']:.4f}   perplexity {summary['perplexity']:.2f}")
    if summary["trigram_loss"] is not None:
        met = summary["validation_loss"] < summary["trigram_loss"]
        verdict = "below it: the aim is met" if met else "NOT below it: the aim is missed"
        print(f"trigram loss    {summary['trigram_loss']:.4f}   the model ends {verdict}")


def _refuse(message):
    print(f"configuration error: {message}", file=sys.stderr)
    return 2


def _parse(argv):
    """absl's parser; a key that the configuration lacks is a message in place of a traceback."""
    try:
        config_flags.DEFINE_config_file(
            "config", _DEFAULT, "Python file; a flag --config.section.key=value changes a key"
        )
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(_refuse(str(error).strip("'\"").replace("\\n", " ")))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
