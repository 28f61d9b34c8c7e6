"""What the training commands share: flags, signals, exit codes, and the last lines that they print.

SIGTERM or Ctrl-C, to any one process of a run, saves and exits with 0. Exit codes: 0 done or
stopped on request, 1 failed, 2 wrong configuration.
"""

import os
import pathlib
import shlex
import sys
import types
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from experiments.harness import checkpoint, distributed, outputs, runs, training
from experiments.harness.tasks import Task
from experiments.settings import arguments
from experiments.settings.arguments import refuse
from experiments.settings.sections import ConfigurationError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "run folder; by default runs/<name of the configuration>"
)
EXTEND = flags.DEFINE_bool(
    "extend",
    False,
    "go on with the run in workdir under other steps, another rate or refresh period, and note it",
)
REPORT = flags.DEFINE_bool("report", True, "write <workdir>/report at the end")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other processes of a TPU pod, SLURM or Open MPI job"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port where process 0 of several listens"
)
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes train together")
PROCESS = flags.DEFINE_integer("process", None, "which one this is, from 0")
JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds to wait for the other processes at the start"
)
SILENCE_TIMEOUT = flags.DEFINE_integer(
    "silence_timeout", 100, "seconds of silence after which a process is lost"
)
flags.declare_key_flag("workdir")
flags.declare_key_flag("extend")
flags.declare_key_flag("report")
flags.declare_key_flag("distributed")
for _name in ("coordinator", "processes", "process", "join_timeout", "silence_timeout"):
    flags.declare_key_flag(_name)


def run(
    program: str,
    settings: types.ModuleType,
    task: Callable[[Any], Task],
    conclude: Callable[[dict, pathlib.Path], None],
    *,
    default: pathlib.Path,
    alone: tuple[str, ...] = (),
    before: Callable[[Any], None] = lambda config: None,
) -> None:
    """The whole command: parse, train, report, conclude.

    Args:
      program: the module, for the line that says how to resume.
      settings: the module `configuration` or `finetuning_configuration`.
      task: makes the task of the configuration.
      conclude: `(summary, workdir)` prints the last lines of a run that is over.
      default: the configuration file where none is named.
      alone: flags that need the run to be one process.
      before: checks the program's own flags against the configuration; raises ConfigurationError.
    """

    def main(argv) -> int:
        _quieten()
        if len(argv) > 1:
            return refuse(
                f"unexpected arguments {argv[1:]}: flags are written --config.section.key=value"
            )
        try:  # before jax is used: processes join first
            hosts = _hosts(alone)
        except ConfigurationError as error:
            return refuse(str(error))
        try:
            distributed.join(hosts)
        except ConfigurationError as error:
            code = refuse(str(error))
            sys.stderr.flush()
            os._exit(code)  # what was joined by half does not end in order
        try:
            summary = _trained(program, settings, task, before)
            # one process says what all of them did
            if distributed.leads() and summary["status"] != "stopped":
                workdir = pathlib.Path(summary["workdir"])
                if REPORT.value:
                    _report(workdir)
                size = f"{summary['steps']} updates, {summary['tokens']:,} tokens"
                print(f"{summary['status']} after {size}, {summary['total_seconds']:.0f} s")
                conclude(summary, workdir)
        except ConfigurationError as error:
            return refuse(str(error))
        except checkpoint.CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        # a disk that filled up, a share that is gone: what it says is all there is to say
        except OSError as error:
            if distributed.joined():
                distributed.end(error)
            print(f"error: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            if not distributed.joined():
                raise
            distributed.end(error)
        return 1 if summary["status"] == "diverged" else 0

    app.run(main, flags_parser=arguments.parser(settings, default))


def _quieten() -> None:
    """Only warnings of other packages are shown, and each failure of a checkpoint once."""
    # orbax and TFDS tell their steps at INFO, which absl shows
    logging.set_verbosity(logging.WARNING)
    # what orbax fails at is raised, and told once, in place of a traceback from each of its threads
    logging.get_absl_handler().addFilter(
        lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname
    )


def _trained(
    program: str,
    settings: types.ModuleType,
    task: Callable[[Any], Task],
    before: Callable[[Any], None],
) -> dict:
    """The summary of the run, with its `workdir`; says how to resume one that was stopped."""
    with distributed.together(ConfigurationError):
        config, notes = arguments.configured(settings)
    for note in notes if distributed.leads() else ():
        print(f"note: {note}", file=sys.stderr)
    workdir = pathlib.Path(WORKDIR.value or f"runs/{config.name}")
    with distributed.together(ConfigurationError):
        before(config)
    summary = training.run(config, workdir, task=task, handle_signals=True, extend=EXTEND.value)
    if summary["status"] == "stopped":
        step, steps = summary["step"], summary["steps"]
        done = f"stopped after update {step} of {steps}, saved in {workdir}"
        if step is None:
            done = "stopped while the run was prepared"
        elif step == 0:
            done = "stopped before update 1"
        again = shlex.join([sys.executable, "-m", program, *sys.argv[1:]])
        print(f"{done}; to resume:\n  {again}")
    return summary | {"workdir": str(workdir)}


def _report(workdir: pathlib.Path) -> None:
    """Write the report, or say why there is none: a folder that is read only, a damaged file."""
    from experiments.reporting import page  # with matplotlib, which a run does not need

    problem = outputs.problem(workdir / "report", is_folder=True)
    if problem is not None:
        again = f"python -m experiments.report {shlex.quote(str(workdir))} --output=report.html"
        print(
            f"no report: {workdir / 'report'} {problem}; write it elsewhere by {again}",
            file=sys.stderr,
        )
        return
    try:
        page.write([workdir], workdir / "report")
    except (runs.RunError, ConfigurationError) as error:
        print(f"no report: {error}", file=sys.stderr)


def _hosts(alone: tuple[str, ...]) -> distributed.Hosts:
    hosts = distributed.Hosts(
        coordinator=COORDINATOR.value,
        processes=PROCESSES.value,
        process=PROCESS.value,
        automatic=DISTRIBUTED.value,
        join_timeout=JOIN_TIMEOUT.value,
        silence_timeout=SILENCE_TIMEOUT.value,
    )
    for name in alone if hosts.are_several else ():
        value = flags.FLAGS[name].value
        if value is not None:
            raise ConfigurationError(
                f"{name}={value!r}: is for one process; when the run is over, start one without "
                "coordinator and distributed, which trains nothing again"
            )
    return hosts
