"""What a plan compiles for: chips with their figures, names of targets, their compilers.

A target is a TPU slice as libtpu names it ("v5e:4x4"), one GPU ("h200"), or fake CPU devices
("cpu:8").
"""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.harness.metrics import PEAK_FLOPS
from experiments.settings.sections import ConfigurationError, one_of

ROOT = Path(__file__).parents[2]
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip by its vendor's public figures.

    Attributes:
      hbm_bytes: memory of one chip.
      peak_flops: dense bf16 FLOP/s of one chip.
      source: where both stand.
    """

    hbm_bytes: int
    peak_flops: float
    source: str


_CLOUD = "Google Cloud, Cloud TPU documentation, system architecture of"
CHIPS = {
    "v4": Chip(hbm_bytes=32 * GIB, peak_flops=PEAK_FLOPS["TPU v4"], source=f"{_CLOUD} TPU v4"),
    "v5e": Chip(hbm_bytes=16 * GIB, peak_flops=PEAK_FLOPS["TPU v5e"], source=f"{_CLOUD} TPU v5e"),
    "v5p": Chip(hbm_bytes=95 * GIB, peak_flops=PEAK_FLOPS["TPU v5p"], source=f"{_CLOUD} TPU v5p"),
    "v6e": Chip(hbm_bytes=32 * GIB, peak_flops=PEAK_FLOPS["TPU v6e"], source=f"{_CLOUD} TPU v6e"),
    "h100": Chip(
        hbm_bytes=80 * 10**9,
        peak_flops=PEAK_FLOPS["NVIDIA H100"],
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM",
    ),
    "h200": Chip(
        hbm_bytes=141 * 10**9,
        peak_flops=PEAK_FLOPS["NVIDIA H200"],
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "rtx4090": Chip(
        hbm_bytes=25393692672,  # 24 GB less what the driver reports as not usable
        peak_flops=165.2e12,
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
}

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth} device_memory_size: {memory} cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
# What XLA's GPU compiler asks of a device; public figures of the cards.
RTX_4090 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536 core_count: 128 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 75497472 clock_rate_ghz: 2.52
  memory_bandwidth: 1008000000000 device_memory_size: 25393692672 cuda_compute_capability { major: 8 minor: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA GeForce RTX 4090"
"""
GPUS = {
    "h100": _HOPPER.format(bandwidth=3352 * 10**9, memory=80 * 10**9, name="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4800 * 10**9, memory=141 * 10**9, name="NVIDIA H200"),
    "rtx4090": RTX_4090,
}

TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
COMPILERS = {
    "tpu": (
        "libtpu",
        ".venv-tpu",
        "`make test-tpu` makes .venv-tpu, which has it (pip install -e '.[tpu]')",
    ),
    "cuda": (
        "jax_cuda13_plugin",
        ".venv-cuda",
        "python -m venv .venv-cuda; .venv-cuda/bin/pip install -e '.[experiments]' "
        "jax-cuda13-plugin=={jax} jax-cuda13-pjrt=={jax}",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One target, taken apart by `parse`.

    Attributes:
      name: as it was given.
      kind: "tpu", "cuda" or "cpu".
      chip: key of CHIPS; "" on CPU.
      chips: how many devices.
    """

    name: str
    kind: str
    chip: str
    chips: int

    @property
    def facts(self) -> Chip | None:
        """The chip's figures; a CPU has none."""
        return CHIPS.get(self.chip)

    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for it."""
        if self.kind == "tpu":
            return TPU_ENVIRONMENT
        found = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        if self.kind == "cpu":
            found["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.chips}"
        return found

    def devices(self) -> list[Any]:
        """The devices, in a process that has the environment and the compiler."""
        import jax
        from jax.experimental import topologies

        if self.kind == "cpu":
            return jax.devices()
        if self.kind == "tpu":
            return list(
                topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices
            )
        return list(
            topologies.get_topology_desc(
                platform="cuda", topology_name="x", target_config=GPUS[self.name], topology="1x1x1"
            ).devices
        )


def parse(name: str) -> Target:
    """The target that a name stands for.

    Raises:
      ConfigurationError: for a name that is none.

    >>> parse("v5e:4x4").chips, parse("h200").kind, parse("cpu:8").chips
    (16, 'cuda', 8)
    """
    chip, _, shape = name.partition(":")
    if name in GPUS:
        return Target(name=name, kind="cuda", chip=name, chips=1)
    if chip == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return Target(name=name, kind="cpu", chip="", chips=int(shape))
    if chip in CHIPS and chip not in GPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return Target(name=name, kind="tpu", chip=chip, chips=math.prod(map(int, shape.split("x"))))
    if chip in CHIPS or chip == "cpu":
        example = "h200 (one card)" if chip in GPUS else "cpu:8" if chip == "cpu" else f"{chip}:4x4"
        raise ConfigurationError(f"topology={name!r}: write it like {example}")
    one_of("topology", chip, ("cpu", *CHIPS))
    raise AssertionError(name)


def interpreter(target: Target, python: str | None = None) -> str:
    """A Python that has the target's compiler: `python`, this one, or the workspace's own.

    Raises:
      ConfigurationError: if there is none; says how to make one.
    """
    if target.kind == "cpu":
        return python or sys.executable
    module, folder, remedy = COMPILERS[target.kind]
    candidates = [python] if python else [sys.executable, str(ROOT / folder / "bin" / "python")]
    for candidate in candidates:
        if _has(candidate, module):
            return candidate
    if "{jax}" in remedy:
        import jax

        remedy = remedy.format(jax=jax.__version__)
    where = f"python={python!r}" if python else f"topology={target.name!r}"
    raise ConfigurationError(
        f"{where}: no {module} there, which has the compiler for {target.name}; {remedy}"
    )


@functools.cache
def _has(python: str, module: str) -> bool:
    if not os.path.exists(python):
        return False
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
