"""What a refresh costs on a TPU: sizes of the compiled programs, on a matrix of the 60M preset."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import linalg

LARGEST = 5e6
SHAPE = (512, 1376)
RANK = 128


def power(x):
    return linalg.power_step(x, x[..., :RANK])


def random_basis(x):
    return linalg.range_finder(x, RANK, jax.random.key(0), power_iterations=0)


def cosine(x):
    coefficients = linalg.dct(x, kind=3, method="matmul")
    rows = linalg.top_rows(coefficients, RANK)
    return linalg.dct_columns(rows, x.shape[-2], kind=3), linalg.gather_rows(coefficients, rows)


@pytest.mark.parametrize("refresh", [cosine, power, random_basis])
def test_refresh_is_a_small_program(compile_for, refresh):
    memory = compile_for(
        "v5e:2x2", refresh, jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    ).memory_analysis()
    assert memory.argument_size_in_bytes >= 2 * SHAPE[0] * SHAPE[1]
    assert 0 < memory.generated_code_size_in_bytes < LARGEST
