"""DCT scores as a TPU program: Mosaic takes both kinds, dtypes and layouts for every chip, and x is
not copied."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import kernels

TOPOLOGIES = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p"}
CALL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind", "axis"),
    [
        ("v5e:2x2", (1024, 1408), "float32", 3, -2),
        ("v6e:2x2", (1152, 1400), "float32", 2, -2),  # XLA lays it out with the 1152 last
        ("v5p:2x2x1", (1408, 1024), "bfloat16", 3, -1),
    ],
)
def test_dct_scores_are_taken_and_x_is_read_where_it_lies(
    compile_for, name, shape, dtype, kind, axis
):
    options = {"implementation": "tpu", "chip": TOPOLOGIES[name]}
    scores = functools.partial(kernels.dct_scores, kind=kind, axis=axis, **options)
    program = compile_for(name, scores, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    assert program.as_text().count(CALL) == 1
    assert (
        program.memory_analysis().temp_size_in_bytes < shape[0] * shape[1]
    )  # half of x in bfloat16


def test_dct_scores_of_small_transforms_stay_with_xla(compile_for):
    scores = functools.partial(kernels.dct_scores, kind=3)
    assert (
        CALL
        not in compile_for(
            "v5e:2x2", scores, jax.ShapeDtypeStruct((1024, 256), jnp.float32)
        ).as_text()
    )
