"""Kernels as programs of an H100, an H200 and an RTX 4090 that are not there: Triton and ptxas take
them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.planning import targets
from lowrank_jax import kernels

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs jax-cuda13-plugin, which brings XLA's compiler for GPUs: run "
        "`make test-cuda`",
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["h100", "h200", "rtx4090"])
def test_lora_linear_compiles_with_its_gradients(name, dtype):
    rows, n, m, r = 1000, 264, 700, 5
    place = SingleDeviceSharding(targets.parse(name).devices()[0])

    def training(x, w, a, b, dy):
        y, pull = jax.vjp(lambda x, a, b: kernels.lora_linear(x, w, a, b, chip=name), x, a, b)
        return y, *pull(dy)

    shapes = [(rows, n), (n, m), (n, r), (r, m), (rows, m)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place) for shape in shapes]
    compiled = jax.jit(training).lower(*operands).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    # nothing of the size of y beside y, which the thin products of XLA split over the rows may
    # reach
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * rows * m * jnp.dtype(dtype).itemsize
