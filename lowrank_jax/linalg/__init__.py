"""Matrices in, matrices out: orthogonalisation, decompositions, fast transforms, row selection,
quantisation and spectra.

Nothing here knows of trees, optimizers or Flax. Every function takes one matrix or a stack (...,
rows, cols), treats leading axes as batch, and works in and out of jit, under vmap and
``jax.eval_shape``.

One dtype rule: arithmetic is done, and results are returned, in float32 (float64 for float64
input), whatever the input, so bfloat16 gradients give float32 factors. The exceptions say so:
``gather_rows`` and ``scatter_rows`` only move numbers and keep their dtype; functions that make a
basis from integers take ``dtype=``; indices are int32.

Ranks, sizes and choices are static and checked by name. Values are not checked: a non-finite input
gives a non-finite result, a finite one (zero and rank-deficient included) a finite result unless
its products overflow.

>>> import jax, jax.numpy as jnp
>>> gradients = jax.random.normal(jax.random.key(0), (2, 8, 16), jnp.bfloat16)
>>> basis = range_finder(gradients, rank=3, key=jax.random.key(1))
>>> basis.shape, basis.dtype.name
((2, 8, 3), 'float32')
"""

import functools

from lowrank_jax.codes import Codes
from lowrank_jax.linalg._lapack import eigh, solve
from lowrank_jax.linalg.affine import Affine4, quantize_affine
from lowrank_jax.linalg.cayley import cayley
from lowrank_jax.linalg.decompositions import (
    canonical_signs,
    power_step,
    randomized_svd,
    range_finder,
    svd_of_product,
    truncated_svd,
)
from lowrank_jax.linalg.normal_float import NormalFloat4, normal_float_book, quantize_nf4
from lowrank_jax.linalg.orthogonal import (
    MUON,
    POLAR_EXPRESS,
    cholesky_qr2,
    newton_schulz,
    orthonormalize,
    qr_orthonormal,
)
from lowrank_jax.linalg.quantization import (
    QuantizedBlocks,
    dynamic_code_book,
    quantize_blocks,
    stochastic_round,
)
from lowrank_jax.linalg.selection import (
    gather_rows,
    random_rows,
    row_scores,
    scatter_rows,
    top_rows,
    top_scores,
)
from lowrank_jax.linalg.spectra import (
    effective_rank,
    explained_variance,
    principal_angles,
    rank_for_energy,
    stable_rank,
)
from lowrank_jax.linalg.transforms import (
    dct,
    dct_columns,
    dct_matrix,
    hadamard_columns,
    hadamard_matrix,
    hadamard_transform,
    idct,
)

__all__ = [
    "MUON",
    "POLAR_EXPRESS",
    "Affine4",
    "Codes",
    "NormalFloat4",
    "QuantizedBlocks",
    "canonical_signs",
    "cayley",
    "cholesky_qr2",
    "dct",
    "dct_columns",
    "dct_matrix",
    "dynamic_code_book",
    "effective_rank",
    "eigh",
    "explained_variance",
    "gather_rows",
    "hadamard_columns",
    "hadamard_matrix",
    "hadamard_transform",
    "idct",
    "newton_schulz",
    "normal_float_book",
    "orthonormalize",
    "power_step",
    "principal_angles",
    "qr_orthonormal",
    "quantize_affine",
    "quantize_blocks",
    "quantize_nf4",
    "random_rows",
    "randomized_svd",
    "range_finder",
    "rank_for_energy",
    "row_scores",
    "scatter_rows",
    "solve",
    "stable_rank",
    "stochastic_round",
    "svd_of_product",
    "top_rows",
    "top_scores",
    "truncated_svd",
]
__dir__ = functools.partial(sorted, __all__)
