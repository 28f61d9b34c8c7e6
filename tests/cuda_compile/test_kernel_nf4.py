"""NF4's product as a program of GPUs that are not there: Triton and ptxas take it."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.planning import targets
from lowrank_jax import kernels, linalg

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
@pytest.mark.parametrize("rows", [3, 500])
def test_nf4_linear_compiles_with_its_gradient(name, dtype, rows):
    n, m = 264, 700
    place = SingleDeviceSharding(targets.parse(name).devices()[0])

    def training(x, codes, scales, dy):
        w = linalg.NormalFloat4(codes, scales, None, n, "xla")
        y, pull = jax.vjp(lambda x: kernels.nf4_linear(x, w, chip=name), x)
        return y, *pull(dy)

    arrays = [((rows, n), dtype), ((160, m), "uint8"), ((5, m), "float32"), ((rows, m), dtype)]
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=place) for shape, kind in arrays
    ]
    compiled = jax.jit(training).lower(*operands).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < n * m  # no decoded matrix
