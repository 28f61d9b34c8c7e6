"""A step of the fused form on one matrix: Adam at rank 1024 (1B: 512).

Weight in bfloat16, basis in float32.

"projected" starts from the projected gradient, as a step between refreshes does, "full" from a
bfloat16 gradient. The guard reads the projected gradient before anything is written. On GPUs the
kernel copies a projected gradient that is its caller's, in "projected"; in "full" it takes its
memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx
from experiments.benchmarks.kernel_cases.base import Case
from lowrank_jax.kernels import _low_rank_adam_parts as parts
from lowrank_jax.kernels import _platform

MATRICES = {
    "7B up": ((4096, 11008), 1024),
    "7B down": ((11008, 4096), 1024),
    "1B up": ((2048, 5461), 512),
}
MOMENTS: dict[str, tuple[Any, int]] = {
    "float32": (lrx.inner.adam(), 4),
    "8 bits": (lrx.inner.stored8(), 1),
}


def program(transformation: Any, implementation: str) -> Callable[..., Any]:
    """`(params, grads, state) -> (params, state)`."""
    form = lrx.fused(transformation, implementation=implementation)

    def run(params, grads, state):
        projected = isinstance(grads["kernel"], lrx.projection.Projected)
        return form.step(params, grads, state, taps=lrx.taps(state) if projected else None)

    return run


def cases(kind: str, chip: str) -> Iterator[Case]:
    """Every matrix and kind of moments, from both kinds of gradients.

    The form takes the tiles of the smallest chip.
    """
    for matrix, (shape, rank) in MATRICES.items():
        s, k = min(shape), max(shape)
        params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        low: Any = {
            "kernel": jax.eval_shape(
                lrx.projection.Projected, jax.ShapeDtypeStruct((rank, k), jnp.float32)
            )
        }
        # the values are the state's; this one only says their shape
        basis = lrx.projectors.given(matrix=np.zeros((s, rank), np.float32))
        for moments, (inner, itemsize) in MOMENTS.items():
            transformation = lrx.galore(1e-3, projector=basis, inner=inner, weight_decay=0.1)
            block = inner.block if moments == "8 bits" else 0
            sizes = (2, 4, itemsize)
            tile = parts.tiles((s, rank, k), sizes, block, kind, None)
            fast = parts.fast_bytes((s, rank, k), sizes, kind, *tile)
            for part, grads in (("projected", low), ("full", params)):
                yield Case(
                    labels={"matrix": matrix, "moments": moments, "part": part},
                    operands=(params, grads, jax.eval_shape(transformation.init, params)),
                    xla=program(transformation, "xla"),
                    pallas=program(transformation, "pallas"),
                    donate=(0, 2),
                    facts={
                        "tile": tile,
                        "fast_bytes": fast,
                        "fast_limit": _platform.CHIPS[chip].bytes,
                    },
                )
