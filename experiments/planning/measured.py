"""What a compiled program takes when it runs on the CPU, which keeps no statistics of its devices.

Arguments are counted exactly: the shards of the arrays that are alive. Temporaries are the rise of
the process's resident memory to its peak during one call (`VmHWM`, reset before it, less `VmRSS`),
on a heap that gives freed memory back at once. The rise while a program without temporaries runs is
the error of that figure; what the matrix products of XLA's CPU runtime pack outside of the
program's own buffers is in it too.
"""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.typing import Pytree

# glibc: freed blocks of 64 KiB and more go back to the system.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def rise(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises at most while `call` runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    jax.block_until_ready(call())
    return _status("VmHWM") - before


def held(tree: Pytree) -> int:
    """Bytes of the arrays' shards, on all devices together."""
    return sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
    )


def run(task: Any, compiled: Any, calls: int = 2) -> dict[str, Any]:
    """Measures calls of the step on real arrays, after one that is not measured.

    Returns:
      argument_bytes and temporary_bytes of all devices together; error_bytes, what the method shows
      where there are no temporaries; loss, so that it is seen that it ran.
    """
    place = lambda x: jax.jit(lambda: jnp.ones(x.shape, x.dtype), out_shardings=x.sharding)()  # noqa: E731
    batch = jax.tree.map(place, task.batch_shapes())
    state = task.initial()
    arguments = held((state, batch))
    nothing = jax.jit(lambda x: x + 1)
    number = nothing(jnp.zeros(()))
    error = [rise(lambda: nothing(number)) for _ in range(calls)]
    rises: list[int] = []
    metrics: Any = None
    for call in range(calls + 1):
        holder = [state, None]

        def step(holder=holder):
            holder[0], holder[1] = compiled(holder[0], batch)
            return holder[0]

        found = rise(step)
        state, metrics = holder
        rises += [found] if call else []
    return {
        "argument_bytes": arguments,
        "temporary_bytes": max(rises),
        "error_bytes": max(error),
        "loss": float(metrics["loss"]),
    }
