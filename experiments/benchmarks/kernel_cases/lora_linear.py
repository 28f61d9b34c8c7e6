"""LoRA's linear layer: 4096 tokens, rank 16, bfloat16, matrices of LLaMA 7B and 1B.

"forward" is y, "training" y and the gradients of x, A and B.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernel_cases.base import Case
from lowrank_jax import adapters
from lowrank_jax.kernels import _lora_linear, _platform

TOKENS, RANK = 4096, 16
MATRICES = {"7B up": (4096, 11008), "7B down": (11008, 4096), "1B up": (2048, 5461)}


def xla(x, w, a, b):
    """LoRA as `lrx.adapters.lora` applies it."""
    adapter = adapters.lora(rank=RANK)
    op = dataclasses.replace(adapters.matrix_op(w), own=lambda x: x @ w)
    factors = {"a": a, "b": b, "scale": jnp.ones(RANK, x.dtype)}
    return adapter.wrap(op, adapter.site(w.shape), factors)(x).astype(x.dtype)


def training(function: Callable) -> Callable:
    """y and the gradients of x, A and B."""

    def run(x, w, a, b, dy):
        y, pull = jax.vjp(lambda x, a, b: function(x, w, a, b), x, a, b)
        return y, *pull(dy)

    return run


def reread(kind: str, chip: str, n: int, m: int, train: bool) -> int:
    """Bytes of W and B that the TPU kernel reads again for each further tile of rows."""
    if kind != "tpu":
        return 0
    total = 0
    for inputs, outputs in ((n, m), (m, n))[: 1 + train]:
        rows, _ = _lora_linear.tiles((TOKENS, inputs, outputs, RANK), 2, "tpu", chip)
        total += 2 * (-(-TOKENS // rows) - 1) * (n * m + RANK * outputs)
    return total


def cases(kind: str, chip: str) -> Iterator[Case]:
    """Every matrix, forward and training."""
    kernel = functools.partial(_lora_linear.lora_linear, implementation=kind, chip=chip)
    for matrix, (n, m) in MATRICES.items():
        tile = _lora_linear.tiles((TOKENS, n, m, RANK), 2, kind, chip)
        fast = _lora_linear.fast_bytes((TOKENS, n, m, RANK), 2, kind, *tile)
        facts = {"tile": tile, "fast_bytes": fast, "fast_limit": _platform.CHIPS[chip].bytes}
        for part in ("forward", "training"):
            train = part == "training"
            shapes = [(TOKENS, n), (n, m), (n, RANK), (RANK, m)] + [(TOKENS, m)] * train
            yield Case(
                labels={"matrix": matrix, "part": part},
                operands=tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
                xla=training(xla) if train else xla,
                pallas=training(kernel) if train else kernel,
                reread=reread(kind, chip, n, m, train),
                facts=facts,
            )
