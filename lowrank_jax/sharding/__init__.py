"""Shardings of optimizer state follow from those of the parameters, on explicit and auto meshes.

An explicit mesh carries shardings in array types: state is born with the right one, and
decompositions see unsharded matrices because their input is resharded first. An auto mesh leaves
them to the compiler, and `state_shardings` gives `jax.jit` the same answer from outside. Where
other libraries say pjit, this is `jax.jit` with shardings.

One rule places everything: batch axes keep their sharding, the kept dimension `k` keeps its own,
the rank `r` and the shrunk dimension of a basis are unsharded.
"""

from lowrank_jax.sharding.auto import all_axes, constrained, for_product, matrix_spec, unshard_rows
from lowrank_jax.sharding.context import (
    Spec,
    context_key,
    current_mesh,
    current_partition_specs,
    current_rows,
    divides,
    explicit_trace,
)
from lowrank_jax.sharding.entries import (
    axis_names_of,
    batch_axes,
    codes_of,
    divides_any,
    dividing,
    even,
    explicit_spec,
    fold_spec,
    is_explicit,
    low_spec,
    parts,
    spec_of,
    unsharded_spec,
)
from lowrank_jax.sharding.explicit import (
    match_sharding,
    mesh_of,
    over_batch,
    product_spec,
    replicate_rest,
    reshape,
    reshard,
    sharded_like,
    with_out_sharding,
    zeros,
    zeros_like,
)
from lowrank_jax.sharding.manual import alike, everywhere, scan, vary, varying, varying_alike

__all__ = [
    "Spec",
    "alike",
    "all_axes",
    "axis_names_of",
    "batch_axes",
    "codes_of",
    "constrained",
    "context_key",
    "current_mesh",
    "current_partition_specs",
    "current_rows",
    "divides",
    "divides_any",
    "dividing",
    "even",
    "everywhere",
    "explicit_spec",
    "explicit_trace",
    "fold_spec",
    "for_product",
    "is_explicit",
    "low_spec",
    "match_sharding",
    "matrix_spec",
    "mesh_of",
    "over_batch",
    "parts",
    "product_spec",
    "replicate_rest",
    "reshape",
    "reshard",
    "scan",
    "sharded_like",
    "spec_of",
    "unshard_rows",
    "unsharded_spec",
    "vary",
    "varying",
    "varying_alike",
    "with_out_sharding",
    "zeros",
    "zeros_like",
]
