"""The scores that a refresh of DCT-AdamW ranks.

Float32 gradients of LLaMA 7B and 1B matrices, the smaller side shrunk.

The kernel against the product with Q, which `lrx.linalg.dct` takes on TPUs ("product", kind 3, the
default), and against its own two stages written in jnp, which take as few operations as the kernel
("two stages", kind 2). Operations are those of the products, each counted once; at
`Precision.HIGHEST` a TPU makes six passes of each. There is no program for GPUs, which take the
FFT; the verdict in `experiments/results/kernels.json` has what that moves.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernel_cases.base import Case
from lowrank_jax import kernels, linalg
from lowrank_jax.kernels import _dct, _platform

MATRICES = {
    "7B up": (4096, 11008),
    "7B down": (11008, 4096),
    "7B square": (4096, 4096),
    "1B up": (2048, 5461),
}


def product(x):
    """As `lrx.projectors.dct(implementation="xla")` scores a gradient."""
    return linalg.row_scores(linalg.dct(x, 3), "l1")


def two_stages(x):
    """The kernel's stages as products of XLA, kind 2."""
    d, k = x.shape
    a, b = _dct.split(d)
    turns, waves = _dct.factors(a, b)
    low = jnp.einsum("pj,jlk->plk", waves, x.reshape(a, b, k), precision=jax.lax.Precision.HIGHEST)
    rows = jnp.einsum(
        "plm,pmk->plk", turns, low.reshape(a, 2 * b, k), precision=jax.lax.Precision.HIGHEST
    )
    scores = jnp.sum(jnp.abs(rows), axis=-1).reshape(d)
    return scores[jnp.argsort(jnp.asarray(_dct.frequencies(a, b).ravel()))]


def cases(kind: str, chip: str) -> Iterator[Case]:
    """Every matrix against the product; the largest against both."""
    if kind != "tpu":
        return
    for matrix, shape in MATRICES.items():
        d, k = sorted(shape)
        for form in ("product", "two stages") if matrix == "7B up" else ("product",):
            axis = -2 if shape[0] == d else -1
            own = lambda x, axis=axis: x if axis == -2 else x.T  # noqa: E731
            xla, number = (product, 3) if form == "product" else (two_stages, 2)
            done = 2 * d * d * k if form == "product" else _dct.operations(d, k)
            facts = {"xla_operations": done, "pallas_operations": _dct.operations(d, k)}
            facts |= {"fast_bytes": _dct.fast_bytes(d, 4, axis == -1 or k % 128 != 0)}
            yield Case(
                labels={"matrix": matrix, "part": form},
                operands=(jax.ShapeDtypeStruct(shape, jnp.float32),),
                xla=lambda x, xla=xla, own=own: xla(own(x)),
                pallas=lambda x, axis=axis, number=number: kernels.dct_scores(
                    x, number, axis=axis, implementation=kind, chip=chip
                ),
                facts=facts | {"fast_limit": _platform.CHIPS[chip].bytes},
            )
