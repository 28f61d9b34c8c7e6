"""The training loop: `run(config, workdir)` trains, evaluates, saves and resumes; `experiments.pretrain` calls it.

The run folder:

    config.json      the configuration; a resumed run must agree with it
    metrics.jsonl    one line per update ("train"), evaluation ("eval") and event ("note")
    checkpoints/     experiments.checkpoint
    ledger.json      bytes per component, by formula and measured
    summary.json     final numbers; written last, so its presence means the run is over

A batch is a pure function of (seed, step) and everything random derives from the seed, so a resumed run repeats the
uninterrupted one bit for bit (same program, versions, device kind and count).
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import lowrank_jax as lr
from experiments import checkpoint, metrics, optimizers, updates
from experiments import workdir as folder
from experiments.configuration import ConfigurationError, RunConfig
from experiments.data import ngram
from experiments.models import llama
from experiments.models.sampling import sample

# After so many updates in a row with a loss that is not finite, the run ends as "diverged".
PATIENCE = 10


def run(config: RunConfig, workdir, *, handle_signals: bool = False, verbose: bool = True) -> dict:
    """Train until `config.schedule.steps`, resuming from the newest good checkpoint in `workdir`; returns the summary.

    The summary's `status` is "finished", "diverged", or "stopped" (a signal arrived; call again to go on). A run that
    is over is not repeated: its summary is read back.

    Args:
      workdir: the run folder; made when missing, locked while the run lasts.
      handle_signals: on SIGTERM or SIGINT, finish the update, save and return (main thread only; a second one kills).
      verbose: progress on standard error.

    Raises:
      ConfigurationError: before any work.
      experiments.checkpoint.CheckpointError: damage that has no good step to fall back to, or a final save that failed.
    """
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    with folder.locked(workdir), folder.stop_flag(handle_signals) as stop:
        stored = folder.claim(config, workdir)
        if stored is not None:
            return stored
        if config.run.compile_cache:
            folder.use_compile_cache()
        return _Training(config, workdir, stop, verbose).run()


class _Training:
    """One run from start (or resumption) to end: the pieces that the loop shares."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path, stop: threading.Event, verbose: bool):
        self.config, self.workdir, self.stop, self.verbose = config, workdir, stop, verbose
        folder.check_devices(config)
        self.dataset = folder.open_dataset(config)
        self.model = llama.Llama(config.model)
        self.rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate)
        seed = config.run.seed
        self.optimizer = optimizers.build(config.optimizer, self.rate, stacked=config.model.scan, seed=seed)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        self.rows, self.whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.whole),
            jax.eval_shape(self._initial, jax.random.key(0)),
        )
        folder.check_disk(workdir, self.abstract, config.checkpoint.keep)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.skipped, self.not_finite = 0, 0
        self.pending: tuple[int, dict] | None = None
        self.lines: list[str] = []
        self.evaluation: dict = {}

    def run(self) -> dict:
        config, workdir = self.config, self.workdir
        self.checkpoints = checkpoint.Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            verify=config.checkpoint.verify,
            config_digest=checkpoint.digest(folder.as_json(config)),
            sides=optimizers.sides(self.abstract["opt_state"]),
            say=self._announce,
        )
        writer = None
        try:
            state = self._restore_or_initialise()
            board = workdir / "tensorboard" if config.run.tensorboard else None
            lead = jax.process_index() == 0
            self.writer = writer = metrics.Metrics(
                workdir / "metrics.jsonl" if lead else os.devnull, board if lead else None
            )
            steps = config.schedule.steps
            self.progress = metrics.Progress(
                steps, self.step, every=config.run.log_every, enabled=self.verbose and lead
            )
            for line in self.lines:
                self.writer.write("note", step=self.step, text=line)
            parameters = llama.parameter_count(config.model)
            self._note(
                f"{config.preset}: {parameters:,} parameters; {config.optimizer.name}; {self.dataset.description}"
            )
            step_function = self._compile()
            self._check_taps(state)
            state, status = self._loop(step_function, state)
            summary = self._finish(state, status)
        finally:
            if writer is not None:
                writer.close()
                self.progress.close()
            self.checkpoints.close()
        return summary

    def _initial(self, key):
        """Parameters and optimizer state, without weak types, which a restored state cannot have."""
        tokens = jnp.zeros((1, self.config.data.sequence_length), jnp.int32)
        params = self.model.init(key, tokens)["params"]
        state = {"params": params, "opt_state": self.optimizer.init(params)}
        is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
        return jax.tree.map(
            lambda leaf: leaf if is_key(leaf) else jax.lax.convert_element_type(leaf, leaf.dtype), state
        )

    def _restore_or_initialise(self):
        restored = self.checkpoints.restore(self.abstract)
        if restored is None:
            if jax.process_index() == 0:
                metrics.truncate(self.workdir / "metrics.jsonl", -1)
            initial = jax.jit(self._initial, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract))
            return initial(jax.random.key(self.config.run.seed))
        if restored.extra["data"] != self.dataset.fingerprint:
            raise ConfigurationError(
                f"data.name={self.config.data.name!r}: its tokens changed since the checkpoint of step {restored.step} "
                "was written; restore them, or give another workdir"
            )
        self.step = restored.step
        self.tokens, self.seconds = restored.extra["tokens"], restored.extra["seconds"]
        self.skipped = restored.extra["skipped"]
        dropped = metrics.truncate(self.workdir / "metrics.jsonl", self.step) if jax.process_index() == 0 else 0
        self._announce(
            f"resumed from the checkpoint of step {self.step}; {dropped} later lines of metrics.jsonl are repeated"
        )
        return restored.tree

    def _compile(self):
        """Compile before the first update, so that no compilation is counted as training."""
        begin = time.perf_counter()
        accumulation, backprop = self.config.schedule.accumulation, self.config.optimizer.backprop
        if backprop is None:
            update = updates.train_step(self.model, self.optimizer, accumulation)
        else:
            update = updates.fused_step(self.model, self.optimizer, accumulation, backprop)
        shape = (self.config.data.batch_size, self.config.data.sequence_length)
        kinds = {name: array.dtype for name, array in self._host_batch(0).items()}
        batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=self.rows) for name, kind in kinds.items()}
        self.compiled = jax.jit(update, donate_argnums=0).lower(self.abstract, batch).compile()
        self.evaluation_step = jax.jit(lambda params, batch: updates.loss_sums(self.model, params, batch))
        self.finite = jax.jit(
            lambda params: jnp.all(jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]))
        )
        self.peak, source = metrics.peak_flops()
        self._note(f"compiled in {time.perf_counter() - begin:.1f} s; peak {self.peak:.3g} FLOP/s ({source})")
        return self.compiled

    def _check_taps(self, state) -> None:
        """One sequence, once: the projected gradient is the projection of the full one."""
        config = self.config.optimizer
        if config.backprop != "projected" or lr.plan(self.optimizer.projection) == "full":
            return
        begin = time.perf_counter()
        batch = {name: array[:1] for name, array in self._host_batch(0).items()}
        share = 1.0 / max(float(batch["weights"].sum()), 1.0)
        tolerance = 1e-3 if self.config.model.dtype == "float32" else 5e-2
        loss = updates.projected_loss(self.model)
        lr.check_taps(loss, lr.taps(state["opt_state"]), state["params"], batch, share, tolerance=tolerance)
        self._note(f"projected gradients agree with the full ones ({time.perf_counter() - begin:.1f} s)")

    def _loop(self, step_function, state):
        """Dispatch update t, then read the metrics of t - 1, so that the device never waits for the host."""
        config, steps = self.config, self.config.schedule.steps
        first, last = config.run.profile_steps or (0, 0)
        if self.stop.is_set() and jax.process_count() == 1:
            return state, "stopped"
        self.mark = time.perf_counter()
        for step in range(self.step + 1, steps + 1):
            if step == first:
                jax.profiler.start_trace(str(self.workdir / "profile"))
            state, measured = step_function(state, self._on_devices(self._host_batch(step - 1)))
            self._collect()
            self.pending = (step, measured)
            self.step = step
            if step == last:
                self._collect()
                jax.profiler.stop_trace()
                self._note(f"profile of steps {first} to {last} written to {self.workdir / 'profile'}")
            if step == steps or (config.run.evaluate_every and step % config.run.evaluate_every == 0):
                self._evaluate(state)
            stopping = self._should_stop(step)
            if stopping or step == steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._save(state, final=stopping or step == steps)
            if stopping and step < steps:
                return state, "stopped"
            if self.not_finite >= PATIENCE:
                self._note(f"the loss was not finite for {PATIENCE} updates in a row: stopped")
                return state, "diverged"
        return state, "finished"

    def _should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop.is_set()

    def _host_batch(self, step: int) -> dict[str, np.ndarray]:
        return self.dataset.train.batch(step, jax.process_index(), jax.process_count())

    def _on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(self.rows, array) for name, array in batch.items()}

    def _collect(self) -> None:
        """Read and record the metrics of the update in flight, if any; blocks until it is done."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        measured = {name: value.item() for name, value in jax.device_get(measured).items()}
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds += elapsed
        tokens = int(measured.pop("tokens"))
        self.tokens += tokens
        data = self.config.data
        work = llama.flops_per_token(self.config.model, data.sequence_length) * data.batch_size * data.sequence_length
        mfu = work / elapsed / (self.peak * jax.device_count())
        self.writer.write(
            "train",
            step=step,
            loss=measured["loss"],
            tokens=self.tokens,
            seconds=self.seconds,
            step_seconds=elapsed,
            tokens_per_second=tokens / elapsed,
            learning_rate=float(self.rate(step - 1 - measured["skipped"])),  # skipped updates do not move the schedule
            grad_norm=measured["grad_norm"],
            mfu=mfu,
            skipped=measured["skipped"],
        )
        if measured["skipped"] > self.skipped:
            self._note(f"update {step} was skipped: a gradient was not finite ({measured['skipped']} so far)", step)
            self.skipped = measured["skipped"]
        self.not_finite = 0 if math.isfinite(measured["loss"]) else self.not_finite + 1
        self.progress.update(step, loss=measured["loss"], tokens_per_second=tokens / elapsed, mfu=mfu)

    @contextlib.contextmanager
    def _paused(self):
        """The training clock stands still inside."""
        self._collect()
        yield
        self.mark = time.perf_counter()

    def _evaluate(self, state) -> None:
        with self._paused():
            begin = time.perf_counter()
            size = self.config.run.evaluation_batch_size or self.config.data.batch_size
            limit = self.config.run.evaluation_tokens
            batches = self.dataset.validation.evaluation(size, limit, jax.process_index(), jax.process_count())
            self.evaluation = updates.evaluate(self.evaluation_step, state["params"], map(self._on_devices, batches))
            self.writer.write("eval", step=self.step, **self.evaluation, seconds=self.seconds)
            figures = f"validation loss {self.evaluation['loss']:.4f}, perplexity {self.evaluation['perplexity']:.2f}"
            self.progress.say(f"step {self.step}: {figures} ({time.perf_counter() - begin:.1f} s)")

    def _save(self, state, *, final: bool) -> None:
        """Start a save; a failed one is reported and tried again at the next interval, only the final one raises."""
        with self._paused():
            if not bool(self.finite(state["params"])):
                self._note(
                    f"parameters are not finite after update {self.step}: not saved, the last good checkpoint stays"
                )
                return
            extra = {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "data": self.dataset.fingerprint,
            }
            try:
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
        self._collect()
        if status == "stopped":
            return {"status": status, "step": self.step, "steps": self.config.schedule.steps}
        self.checkpoints.wait()
        config = self.config
        rows = [row for row in metrics.read(self.workdir / "metrics.jsonl") if row["kind"] == "train"]
        if jax.process_index() == 0:
            checkpoint.write_json(self.workdir / "ledger.json", self._ledger())
        summary = {
            "status": status,
            "name": config.name,
            "optimizer": config.optimizer.name,
            "preset": config.preset,
            "parameters": llama.parameter_count(config.model),
            "steps": self.step,
            "tokens": self.tokens,
            "validation_loss": self.evaluation.get("loss"),
            "perplexity": self.evaluation.get("perplexity"),
            "script_perplexity": self.evaluation.get("script_perplexity"),
            "trigram_loss": self._trigram() if config.run.trigram else None,
            "state_bytes": folder.tree_bytes(self.abstract["opt_state"]),
            "median_step_seconds": statistics.median(row["step_seconds"] for row in rows),
            "total_seconds": self.seconds,
            "skipped": self.skipped,
            "peak_memory_bytes": metrics.peak_memory(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": folder.versions(),
        }
        if status == "finished" and config.run.sample_tokens:
            summary["sample"] = self._sample(state["params"])
        summary = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in summary.items()
        }
        if jax.process_index() == 0:
            checkpoint.write_json(self.workdir / "summary.json", summary)
        return summary

    def _announce(self, line: str) -> None:
        """A line from before metrics.jsonl is open."""
        self.lines.append(line)
        if self.verbose:
            print(line, file=sys.stderr, flush=True)

    def _note(self, line: str, step: int | None = None) -> None:
        self.writer.write("note", step=self.step if step is None else step, text=line)
        self.progress.say(line)

    def _ledger(self) -> list[dict]:
        """Rows {"component", "bytes_formula", "bytes_measured"}; clipping has no state."""
        config = self.config
        settings = dataclasses.replace(config.optimizer, clip_norm=None)
        method = optimizers.build(settings, self.rate, stacked=config.model.scan, seed=config.run.seed)
        return list(lr.memory.ledger(method, self.abstract["params"], self.compiled).rows)

    def _trigram(self) -> float:
        """Loss of a trigram model of the training text on the tokens that the evaluation sees."""
        validation, limit = self.dataset.validation, self.config.run.evaluation_tokens
        length = self.config.data.sequence_length
        tokens = validation.tokens if limit is None else validation.tokens[: max(1, limit // length) * length + 1]
        return ngram.trigram_loss(self.dataset.train.tokens, tokens, self.dataset.vocabulary_size)

    def _sample(self, params) -> str:
        """Text drawn from the model after `run.sample_prompt`, also printed."""
        settings, tokenizer = self.config.run, self.dataset.tokenizer
        prompt = tokenizer.encode(settings.sample_prompt)[-self.config.model.sequence_length :]
        key = jax.random.key(settings.seed)
        tokens = sample(
            self.model, params, jnp.asarray(prompt, jnp.int32)[None], settings.sample_tokens, key, settings.temperature
        )
        known = np.asarray(tokens[0])
        text = settings.sample_prompt + tokenizer.decode(known[known < tokenizer.vocabulary_size])
        self.progress.say(f"sample:\n{text}")
        return text
