"""The training loop: `run(config, workdir)` trains, evaluates, saves and resumes any `Task`.

`experiments.pretrain` and `experiments.finetune` call it. The run folder:

    config.json      the configuration; a resumed run must agree with it
    tokenizer.*      the tokenizer, where it is not bytes: whoever starts from this run finds it
                     here
    metrics.jsonl    one line per update ("train"), evaluation ("eval") and event ("note")
    checkpoints/     experiments.harness.checkpoint
    ledger.json      bytes per component, by formula and measured
    summary.json     final numbers; written last, so its presence means the run is over
    history.json     extensions of the run and the run that it started from, if any:
                     `experiments.harness.history`

A batch is a pure function of (seed, step) and everything random derives from the seed, so a resumed
run repeats the uninterrupted one bit for bit (same program, versions, device kind and count, number
of processes).

Several processes (`experiments.harness.distributed`) all call `run`, on a folder that they share; process 0
writes the files.
"""

import contextlib
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import checkpoint, distributed, history, metrics, optimizers, outputs, runs
from experiments.harness import workdir as folder
from experiments.harness.tasks import Pretraining, Task
from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents
from lowrank_jax.interop.documents import DocumentError
from lowrank_jax.typing import Pytree

# After so many updates in a row that were skipped, or whose loss is not finite, the run ends as
# "diverged".
PATIENCE = 10


def run(
    config,
    workdir,
    *,
    task: Callable[[Any], Task] = Pretraining,
    handle_signals: bool = False,
    verbose: bool = True,
    extend: bool = False,
) -> dict:
    """Train until `config.schedule.steps`, resuming from the newest good checkpoint; the summary.

    The summary's `status` is "finished", "diverged", or "stopped" (a signal arrived; call again to
    go on). A run that is over is not repeated: its summary is read back.

    Args:
      config: a `RunConfig`, or the configuration of another task.
      workdir: the run folder; made when missing, locked while the run lasts.
      task: what is trained, made from the configuration.
      handle_signals: on SIGTERM or SIGINT, finish the update or the batch of an evaluation, save
        and return; what has nothing to save yet (data that are prepared, a base that is read) is
        left at once, where the run is one process (main thread only; a second signal kills).
      verbose: progress on standard error.
      extend: go on with a run of another schedule, rate or refresh period; see
        `experiments.harness.history`.

    Raises:
      ConfigurationError: before any work.
      CheckpointError: damage that has no good step to fall back to, or a final save that failed.
    """
    workdir = pathlib.Path(workdir).absolute()
    with contextlib.ExitStack() as held:
        stored = distributed.by_lead(
            lambda: folder.over(config, workdir, extend), ConfigurationError
        )
        if stored is not None:  # nothing is written: the folder may be one that can only be read
            return stored
        # one writer a folder, until the process ends
        with distributed.together(ConfigurationError):
            outputs.check("workdir", workdir, is_folder=True)
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder.locked(workdir))
        asked = held.enter_context(folder.stop_flag(handle_signals))
        # whose run it is: only now nobody else can change what the folder says
        folder.check_processes(config, workdir)
        stored, changed = distributed.by_lead(
            lambda: folder.claim(config, workdir, extend), ConfigurationError
        )
        if stored is not None and not changed:
            return stored
        if config.run.compile_cache:
            folder.use_compile_cache()
        folder.check_devices(config)
        # a resumed run keeps the sides that its matrices were projected from
        sides = distributed.by_lead(
            lambda: checkpoint.stored_sides(workdir / "checkpoints"), ConfigurationError
        )
        try:
            with asked.at_once(), distributed.together(ConfigurationError):
                trained = task(config)
                trained.keep_sides(sides)
                made = _Training(trained, workdir, asked, verbose and distributed.leads(), changed)
            return made.run()
        except distributed.Stopped:  # while there was nothing to save
            return {"status": "stopped", "step": None, "steps": config.schedule.steps}


def _problem(restored: checkpoint.Restored, noted) -> str | None:
    """What is wrong with a step beyond what its manifest tells: counters, and what lies beside."""
    shape = {"tokens": int, "seconds": float, "skipped": int} | dict.fromkeys(noted, object)
    try:
        documents.check(restored.extra, shape, where="what was saved beside the arrays")
    except DocumentError as error:
        return str(error)
    # the state counts its updates itself, unless its optimizer keeps no schedule
    done = optimizers.done(restored.tree["opt_state"])
    return None if done in (None, restored.step) else f"its state has seen {done} updates"


def _all_finite(params: Pytree) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


class _Training:
    """One run from start (or resumption) to end: the pieces that the loop shares."""

    def __init__(
        self, task: Task, workdir: pathlib.Path, asked: folder.Wish, verbose: bool, changed: dict
    ):
        self.task, self.config, self.changed = task, task.config, changed
        self.workdir, self.verbose = workdir, verbose
        self.asked, self.stop = asked, distributed.Stop(asked)
        folder.check_disk(workdir, task.abstract, self.config.checkpoint.keep)
        # what a checkpoint notes beside the arrays
        self.step, self.tokens, self.seconds, self.skipped = 0, 0, 0.0, 0
        self.owed = task.evaluates_first  # an evaluation before the next update
        self.not_finite = 0  # updates in a row
        self.pending: tuple[int, dict] | None = None  # the update in flight, and its metrics
        self.lines: list[str] = []  # what was said before metrics.jsonl was open

    def run(self) -> dict:
        """Restore or initialise, compile, loop, and sum up."""
        config, workdir = self.config, self.workdir
        self.checkpoints = checkpoint.Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            verify=config.checkpoint.verify,
            config_digest=checkpoint.digest(folder.as_json(config)),
            sides=optimizers.sides(self.task.abstract["opt_state"]),
            meaning=self.task.meaning(),
            say=self._announce,
        )
        writer = None
        try:
            with self.asked.at_once():
                state = self._restore_or_initialise()
            if self.changed:
                history.extend(
                    workdir, self.changed, self.step, config.schedule.steps, self._announce
                )
            self.writer = writer = self._written()
            self._introduce()
            with self.asked.at_once():
                step_function = self._compile()
                checked = self.task.check(state)
                # reads all that is evaluated, which can take minutes; process 0 alone writes it
                self.evaluated = distributed.by_lead(self.task.evaluated, RuntimeError)
            if checked is not None:
                self._note(checked)
            state, status = self._loop(step_function, state)
            summary = self._finish(state, status)
        except BaseException:
            # of several processes a save in flight would wait for those that may be lost
            if not distributed.joined():
                try:
                    self.checkpoints.close()
                except checkpoint.CheckpointError as error:  # what ended the run is told last
                    self._announce(str(error))
            raise
        finally:
            if writer is not None:
                writer.close()
                self.progress.close()
        self.checkpoints.close()
        return summary

    def _introduce(self) -> None:
        """The progress line begins, with what is known before the first update."""
        config = self.config
        self.progress = metrics.Progress(
            config.schedule.steps, self.step, every=config.run.log_every, enabled=self.verbose
        )
        for line in self.lines:
            self.writer.write("note", step=self.step, text=line)
        self._note(self.task.headline())
        held = optimizers.full_gradients(config.optimizer)
        if held is not None:
            self._note(held)

    def _written(self) -> metrics.Metrics:
        """The run's files, which process 0 alone writes, and where its metrics go."""
        if not distributed.leads():
            return metrics.Metrics(os.devnull, None)
        folder.write_files(
            self.workdir, {"config.json": folder.as_json(self.config)} | self.task.files()
        )
        board = self.workdir / "tensorboard" if self.config.run.tensorboard else None
        return metrics.Metrics(self.workdir / "metrics.jsonl", board)

    def _restore_or_initialise(self):
        # surroundings are read before the state needs memory, and only where they are compared
        noted = self.task.record() if distributed.joined() or self.checkpoints.steps() else {}
        own = {key: value for key, (value, _, _) in noted.items()}
        self._compare(own, noted, "from process 0 to this one")
        with history.fitting(self.changed, self.workdir):
            restored = self.checkpoints.restore(
                self.task.abstract, check=lambda restored: _problem(restored, noted)
            )
        if restored is None:
            if distributed.leads():
                metrics.truncate(self.workdir / "metrics.jsonl", -1)
            return history.initial(self.task, self.workdir, self._announce)
        self._compare(
            restored.extra, noted, f"since the checkpoint of step {restored.step} was written"
        )
        self.step = restored.step
        self.tokens, self.seconds = restored.extra["tokens"], restored.extra["seconds"]
        self.skipped = restored.extra["skipped"]
        # the lines of later updates are written again as these are repeated
        path = self.workdir / "metrics.jsonl"
        dropped = metrics.truncate(path, self.step) if distributed.leads() else 0
        # an evaluation that was stopped left no line
        has_evaluation = distributed.by_lead(
            lambda: metrics.holds(path, "eval", self.step), ConfigurationError
        )
        self.owed = self._is_evaluated(self.step) and not has_evaluation
        self._announce(
            f"resumed from the checkpoint of step {self.step}; {dropped} later lines of "
            "metrics.jsonl are repeated"
        )
        return restored.tree

    @staticmethod
    def _compare(lead, noted, where: str) -> None:
        """ConfigurationError in all processes when one has other surroundings than process 0."""
        there = distributed.by_lead(lambda: {key: lead[key] for key in noted}, ConfigurationError)
        with distributed.together(ConfigurationError):
            for key, (value, subject, remedy) in noted.items():
                if there[key] != value:
                    raise ConfigurationError(f"{subject} {where}; {remedy}")

    def _compile(self):
        """Compile before the first update, so that no compilation is counted as training."""
        begin = time.perf_counter()
        task = self.task
        update = jax.jit(task.update(), donate_argnums=0)
        self.compiled = update.lower(task.abstract, task.batch_shapes(), *task.frozen).compile()
        self.finite = jax.jit(_all_finite)
        # what the utilisation is a share of
        self.peak, source = metrics.peak_flops()
        self._note(
            f"compiled in {time.perf_counter() - begin:.1f} s; peak {self.peak:.3g} FLOP/s "
            f"({source})"
        )
        return self.compiled

    def _loop(self, step_function, state):
        """Dispatch update t, then read the metrics of t - 1, so that no device waits for the host."""
        config, steps = self.config, self.config.schedule.steps
        first, last = config.run.profile_steps or (0, 0)
        if self.stop.before():
            return state, "stopped"
        # nor is the wait for another process's compilation counted
        distributed.exchange("compiled")
        self.mark = time.perf_counter()
        if self.owed and not self._evaluate(state):
            return state, "stopped"
        for step in range(self.step + 1, steps + 1):
            if step == first:
                jax.profiler.start_trace(str(self.workdir / "profile"))
            # the batch is a function of the step: a resumed run repeats it
            batch = self.task.on_devices(self.task.host_batch(step - 1))
            state, measured = step_function(state, batch, *self.task.frozen)
            self._collect()
            self.pending = (step, measured)
            self.step = step
            if step == last:
                self._collect()
                jax.profiler.stop_trace()
                self._note(
                    f"profile of steps {first} to {last} written to {self.workdir / 'profile'}"
                )
            complete = not self._is_evaluated(step) or self._evaluate(state)
            stopping = not complete or self.stop.poll()
            is_last, every = step == steps, config.checkpoint.every
            is_due = bool(every) and step % every == 0
            if stopping or is_last or is_due:
                self._save(state, final=stopping or is_last)
            if stopping and (step < steps or not complete):
                return state, "stopped"
            if self.not_finite >= PATIENCE:
                self._note(
                    f"{PATIENCE} updates in a row were skipped, or their loss was not finite: "
                    "stopped"
                )
                return state, "diverged"
        return state, "finished"

    def _collect(self) -> None:
        """Read and record the metrics of the update in flight, if any; blocks until it is done."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        measured = {name: value.item() for name, value in jax.device_get(measured).items()}
        # from one update read to the next: with several in flight no single one can be timed
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds += elapsed
        tokens = int(measured.pop("tokens"))
        self.tokens += tokens
        # model FLOPs utilisation: the formula's operations over what the devices could have done
        mfu = self.task.work / elapsed / (self.peak * jax.device_count())
        moved = step - 1 - measured["skipped"]  # skipped updates do not move the schedule
        self.writer.write(
            "train",
            step=step,
            loss=measured["loss"],
            tokens=self.tokens,
            seconds=self.seconds,
            step_seconds=elapsed,
            tokens_per_second=tokens / elapsed,
            learning_rate=float(self.task.rate(moved)),
            grad_norm=measured["grad_norm"],
            mfu=mfu,
            skipped=measured["skipped"],
        )
        is_skipped = measured["skipped"] > self.skipped
        if is_skipped:
            why = "a gradient was not finite, or its norm above 1e12"
            self._note(f"update {step} was skipped: {why} ({measured['skipped']} so far)", step)
            self.skipped = measured["skipped"]
        is_lost = is_skipped or not math.isfinite(measured["loss"])
        self.not_finite = self.not_finite + 1 if is_lost else 0
        self.progress.update(
            step, loss=measured["loss"], tokens_per_second=tokens / elapsed, mfu=mfu
        )

    @contextlib.contextmanager
    def _paused(self):
        """The training clock stands still inside."""
        self._collect()
        yield
        self.mark = time.perf_counter()

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.run.evaluate_every
        return step == self.config.schedule.steps or bool(every and step % every == 0)

    def _evaluate(self, state) -> bool:
        """Evaluate; whether it came to its end.

        One that is stopped leaves nothing; the resumed run begins with it.
        """
        with self._paused():
            begin = time.perf_counter()
            try:
                found, line = self.task.evaluate(state, self._watched)
            except distributed.Stopped:
                self.progress.say(
                    f"step {self.step}: the evaluation was stopped; the resumed run repeats it"
                )
                return False
            self.writer.write(
                "eval", step=self.step, **found, **self.evaluated, seconds=self.seconds
            )
            self.progress.say(f"step {self.step}: {line} ({time.perf_counter() - begin:.1f} s)")
            return True

    def _watched(self, title: str, total: int, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an evaluation, between which it tells how far it is and can be stopped.

        Whoever takes a batch has read what the one before gave.
        """
        for done, batch in enumerate(batches):
            self.progress.part(f"step {self.step}: {title}", done, total)
            if done and self.stop.poll():
                raise distributed.Stopped
            yield batch

    def _save(self, state, *, final: bool) -> None:
        """Start a save; a failed one is tried again at the next interval.

        Only the final one raises.
        """
        with self._paused():
            if not bool(self.finite(state["params"])):
                self._note(
                    f"parameters are not finite after update {self.step}: not saved, the last good "
                    "checkpoint stays"
                )
                return
            # what a resumed run needs beside the arrays, and the surroundings that it must share
            extra = {"tokens": self.tokens, "seconds": self.seconds, "skipped": self.skipped}
            extra |= {key: value for key, (value, _, _) in self.task.record().items()}
            try:  # the save before this one
                self.checkpoints.wait()
            except checkpoint.CheckpointError as error:
                self._note(f"{error}. Training goes on")
            try:
                self.checkpoints.save(self.step, state, extra)
                if final:
                    self.checkpoints.wait()
            except checkpoint.CheckpointError as error:
                if final:
                    raise
                self._note(f"{error}. Training goes on")

    def _finish(self, state, status: str) -> dict:
        """The summary of a run that is over, written; of a stopped one, how far it came."""
        self._collect()
        config, task = self.config, self.task
        stopped = {"status": "stopped", "step": self.step, "steps": config.schedule.steps}
        if status == "stopped":
            return stopped
        self.checkpoints.wait()
        lead = distributed.leads()
        # all of the run, not only of this process's life
        rows = metrics.read(self.workdir / "metrics.jsonl") if lead else []
        times = [row["step_seconds"] for row in rows if row["kind"] == "train"]
        evaluations = [row for row in rows if row["kind"] == "eval"]
        if lead:
            checkpoint.write_json(self.workdir / "ledger.json", task.memory(self.compiled))
        try:
            with self.asked.at_once():  # all is saved, and a resumed run begins here
                told = task.summary(state if status == "finished" else None, evaluations)
        except distributed.Stopped:
            return stopped
        summary = {
            "status": status,
            "name": config.name,
            "optimizer": config.optimizer.name,
            "steps": self.step,
            "tokens": self.tokens,
            "state_bytes": folder.tree_bytes(task.abstract["opt_state"]),
            "median_step_seconds": statistics.median(times) if times else None,
            "total_seconds": self.seconds,
            "skipped": self.skipped,
            "peak_memory_bytes": metrics.peak_memory(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": folder.versions(),
        } | told
        if "sample" in summary:
            self.progress.say(f"sample:\n{summary['sample']}")
        # what the last evaluation was of, by which runs are compared
        last = evaluations[-1] if evaluations else {}
        summary |= {"evaluated": last.get("evaluated"), "validation_bytes": last.get("bytes")}
        summary["bits_per_byte"] = runs.bits_per_byte(last)
        # JSON has no infinity
        summary = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in summary.items()
        }
        if lead:
            checkpoint.write_json(self.workdir / "summary.json", runs.sealed(summary))
        return distributed.by_lead(lambda: summary, RuntimeError)

    def _announce(self, line: str) -> None:
        """A line from before metrics.jsonl is open."""
        self.lines.append(line)
        if self.verbose:
            print(line, file=sys.stderr, flush=True)

    def _note(self, line: str, step: int | None = None) -> None:
        """A line of metrics.jsonl and of the terminal."""
        self.writer.write("note", step=self.step if step is None else step, text=line)
        self.progress.say(line)
