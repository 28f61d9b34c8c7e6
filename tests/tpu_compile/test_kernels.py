"""Kernels as TPU programs: Mosaic takes them, for every chip, dtype and cut tile."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import kernels

TOPOLOGIES = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p"}
CALL = 'custom_call_target="tpu_custom_call"'


def training(x, w, a, b, dy, **options):
    y, pull = jax.vjp(lambda x, a, b: kernels.lora_linear(x, w, a, b, **options), x, a, b)
    return y, *pull(dy)


def compiled(compile_for, name, dtype, sizes, **options):
    rows, n, m, r = sizes
    shapes = [(rows, n), (n, m), (n, r), (r, m), (rows, m)]
    abstract = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    return compile_for(
        name, functools.partial(training, chip=TOPOLOGIES[name], **options), *abstract
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_lora_linear_is_taken_with_its_gradients(compile_for, name, dtype):
    program = compiled(compile_for, name, dtype, (1000, 256, 1408, 5))
    assert program.as_text().count(CALL) == 2
    assert (
        program.memory_analysis().temp_size_in_bytes < 1000 * 1408 * jnp.dtype(dtype).itemsize
    )  # nothing like y


@pytest.mark.parametrize(("implementation", "calls"), [("tpu", 2), (None, 0)])
def test_lora_linear_of_cut_lanes_only_where_it_is_named(compile_for, implementation, calls):
    program = compiled(
        compile_for, "v5e:2x2", "bfloat16", (1000, 264, 700, 5), implementation=implementation
    )
    assert program.as_text().count(CALL) == calls
