"""Timing on a machine that does other things too: interleaved repetitions and medians."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleave(cases: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """The median of what each case returns, over rounds in which every case runs once.

    Slow drifts of the machine then hit all cases alike. Cases return their own seconds, so that
    what prepares a step is not timed.

    >>> interleave({"a": lambda: 1.0, "b": iter([3.0, 2.0, 9.0]).__next__}, repetitions=3)
    {'a': 1.0, 'b': 3.0}
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1")
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            times[name].append(case())
    return {name: statistics.median(values) for name, values in times.items()}


def processor_name() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    """What a time was measured on, without names of hosts."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "optax", "lowrank_jax")
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
