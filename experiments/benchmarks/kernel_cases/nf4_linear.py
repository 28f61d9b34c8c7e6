"""The frozen base of QLoRA: NF4 matrices of LLaMA 7B and 1B in bfloat16.

4096 tokens, and the 16 of a decoding batch.

"forward" is y, "backward" the gradient of x. XLA's program is the best of those that were tried,
which is the library's own `NormalFloat4.dequantize`: bytes unpacked by shifts, 15 selects, one
fusion behind a barrier.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernel_cases.base import Case
from lowrank_jax import linalg
from lowrank_jax.kernels import _nf4, _platform

MATRICES = {"7B up": (4096, 11008), "7B square": (4096, 4096), "1B up": (2048, 5461)}


def program(n: int, train: bool, implementation: str, chip: str) -> Callable:
    """`(x or dy, codes, scales) -> y or dx`."""

    def run(x, codes, scales):
        w = linalg.NormalFloat4(codes, scales, None, n, "xla")
        own = lambda x: _nf4.nf4_linear(x, w, implementation=implementation, chip=chip)  # noqa: E731
        if not train:
            return own(x)
        # the product of the forward pass is not used, and XLA drops it
        _, pull = jax.vjp(own, jnp.zeros((x.shape[0], n), x.dtype))
        return pull(x)[0]

    return run


def cases(kind: str, chip: str) -> Iterator[Case]:
    """Every matrix, many tokens and few, forward and backward."""
    for matrix, (n, m) in MATRICES.items():
        blocks = -(-n // 64)
        for tokens in (4096, 16):
            for part in ("forward", "backward"):
                train = part == "backward"
                tile = _nf4.tiles((tokens, n, m), 2, kind, chip, train)
                again = -(-tokens // tile[0]) - 1 if kind == "tpu" else 0
                yield Case(
                    labels={"matrix": matrix, "part": part, "tokens": str(tokens)},
                    operands=(
                        jax.ShapeDtypeStruct((tokens, m if train else n), jnp.bfloat16),
                        jax.ShapeDtypeStruct((32 * blocks, m), jnp.uint8),
                        jax.ShapeDtypeStruct((blocks, m), jnp.float32),
                    ),
                    xla=program(n, train, "reference", chip),
                    pallas=program(n, train, kind, chip),
                    reread=again * (32 + 4) * blocks * m,
                    facts={
                        "tile": tile,
                        "fast_bytes": _nf4.fast_bytes((tokens, n, m), 2, kind, train, *tile),
                        "fast_limit": _platform.CHIPS[chip].bytes,
                    },
                )
