"""What a run says while it runs: JSON lines, a progress line, TensorBoard."""

import contextlib
import functools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.interop import documents

# What every line of metrics.jsonl holds, by its kind; a number that was not finite is null.
_NUMBER = (float, None)
_FIGURES = {
    f"{name}?": _NUMBER for name in ("step_seconds", "perplexity", "accuracy", "domain_loss")
}
_ROW = {"loss": _NUMBER, "seconds": float, "tokens?": int} | _FIGURES
_OF = {"evaluated?": str, "bytes?": (int, None), "text?": (str, None), "domain_tokens?": int}
SHAPES = {"train": _ROW, "eval": _ROW | _OF, "note": {"text": str}}

# Dense bf16 peaks in FLOP/s per device, from the vendors' data sheets; matched by the start of
# `device_kind`.
PEAK_FLOPS = {
    "TPU v2": 46e12,
    "TPU v3": 123e12,
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA V100": 125e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


class Metrics:
    """Appends `metrics.jsonl`, one object per line, and TensorBoard scalars when asked for.

    A number that is not finite is written as null, so that every line is strict JSON.

    Args:
      path: the file; its folder exists.
      tensorboard: folder of the event files, or None.
    """

    def __init__(self, path, tensorboard=None):
        self.path = pathlib.Path(path)
        self._file = open(self.path, "a")  # noqa: SIM115 - lives as long as the run
        self._board = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(tensorboard))

    def write(self, kind: str, **values: Any) -> None:
        """Append one line; it has left the process when this returns."""
        values = {key: _plain(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: metrics cannot be written, free space and resume",
                str(self.path),
            ) from error
        if self._board is not None and kind in ("train", "eval"):
            for key, value in values.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{key}", value, values["step"])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that could not be written has said so
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path) -> list[dict]:
    """The lines of metrics.jsonl; a last one cut short by a kill is left out.

    Raises documents.DocumentError, which names the line, for one that a run does not write.
    """
    rows, remedy = [], "correct or remove the line"
    for number, row in documents.lines(path, {"kind": str, "step": int}, remedy=remedy, torn=True):
        documents.check(
            row, SHAPES.get(row["kind"], dict), where=f"{path}, line {number}", remedy=remedy
        )
        rows.append(row)
    return rows


def holds(path, kind: str, step: int) -> bool:
    """Whether the file, which may be absent, has a line of this kind and step."""
    rows = read(path) if pathlib.Path(path).exists() else []
    return any(row["kind"] == kind and row["step"] == step for row in rows)


def truncate(path, step: int) -> int:
    """Drop the lines of steps after `step`, which a resumed run repeats; returns how many.

    The new file replaces the old one at once, so that a kill here loses nothing.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    rows = read(path)
    kept = [row for row in rows if row["step"] <= step]
    documents.write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return len(rows) - len(kept)


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Seconds between two lines that tell how far an evaluation is.
PART_EVERY = 10.0


class Progress:
    """A progress bar on a terminal (when tqdm is there), otherwise one line every `every` steps."""

    def __init__(self, total: int, start: int, *, every: int, enabled: bool = True):
        self.total, self.every, self.enabled = total, every, enabled
        self._bar = None
        self._begin: float | None = None
        self._start = start
        self._told = time.perf_counter()
        if enabled and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, *, loss: float, tokens_per_second: float, mfu: float) -> None:
        """Show step `step`, counted from 1."""
        if not self.enabled:
            return
        if self._begin is None:  # the first update has just ended
            self._begin, self._start = time.perf_counter(), step
        figures = (
            f"loss {loss:.4f}  {tokens_per_second:.0f} tokens/s  MFU {mfu:.1%}  "
            f"{format_bytes(memory_in_use())}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.every == 0 or step == self.total:
            elapsed, done = time.perf_counter() - self._begin, max(step - self._start, 1)
            eta = elapsed / done * (self.total - step)
            self.say(f"step {step}/{self.total}  {figures}  ETA {format_seconds(eta)}")

    def part(self, title: str, done: int, total: int) -> None:
        """How far a longer piece of work between two steps is, every `PART_EVERY` seconds."""
        now = time.perf_counter()
        if done and now - self._told >= PART_EVERY:
            self.say(f"{title}: batch {done} of {total}")
        if not done or now - self._told >= PART_EVERY:
            self._told = now

    def say(self, line: str) -> None:
        """One line beside the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_bytes(count: float) -> str:
    """Bytes in a unit of their size.

    >>> format_bytes(1536 * 2**20)
    '1.50 GiB'
    """
    power = 0 if count < 1 else min(int(math.log2(count)) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:.{2 if power else 0}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> format_seconds(3725)
    '1:02:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_in_use() -> int:
    """Bytes in use on the first local device, or, on CPU, the resident bytes of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics["bytes_in_use"]
    import resource

    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak is what the system tells
        return _peak_resident()


def peak_memory() -> int:
    """Most bytes ever in use on the first local device, or, on CPU, resident in this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics["peak_bytes_in_use"]
    return _peak_resident()


def _peak_resident() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of one device, and whose figure it is: the data sheet's, or a measured rate.

    The devices of a simulated CPU mesh share one processor, so the measured rate is divided among
    them.
    """
    device = jax.devices()[0]
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak, f"{kind}, dense bf16, data sheet"
    # no data sheet: the best of some products of square matrices
    size = 1024 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    shared = jax.local_device_count() if device.platform == "cpu" else 1
    rate = 2 * size**3 / min(seconds) / shared
    return rate, f"{device.device_kind}, float32 matmul of {size}, measured"
