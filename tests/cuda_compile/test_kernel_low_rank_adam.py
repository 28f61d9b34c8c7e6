"""Adam in a subspace as programs of GPUs that are not there: Triton and ptxas take them."""

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


@pytest.mark.parametrize(
    ("side", "dtype", "moments", "stochastic"),
    [("rows", "float32", "float32", False), ("cols", "bfloat16", "bfloat16", True),
     ("rows", "bfloat16", "8 bits", True), ("cols", "float32", "8 bits", False)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["h100", "h200", "rtx4090"])
def test_both_programs_compile_and_write_in_place(name, side, dtype, moments, stochastic):
    count, s, k, r = 2, 1000, 1403, 37
    shape = (count, s, k) if side == "rows" else (count, k, s)
    low = jax.ShapeDtypeStruct((count, r, k), jnp.float32)
    if moments == "8 bits":
        mu, nu = (
            jax.eval_shape(lambda x, c=c: linalg.quantize_blocks(x, c), low)
            for c in ("signed", "unsigned")
        )
    else:
        mu = nu = jax.ShapeDtypeStruct(low.shape, moments)

    def step(w, basis, low, mu, nu, key):
        keys = jax.random.split(jax.random.wrap_key_data(key), count) if stochastic else None
        return kernels.low_rank_adam(
            w,
            basis,
            low,
            mu,
            nu,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            rate=1e-3,
            decay=1e-4,
            keys=keys,
            side=side,
            chip=name,
        )

    w, basis = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((count, s, r), dtype)
    place = SingleDeviceSharding(targets.parse(name).devices()[0])
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (w, basis, low, mu, nu, jax.ShapeDtypeStruct((2,), jnp.uint32)),
    )
    compiled = jax.jit(step, donate_argnums=(0, 3, 4)).lower(*operands).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    # the direction, and nothing like w
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * count * r * k
