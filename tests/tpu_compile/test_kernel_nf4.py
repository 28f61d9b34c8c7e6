"""NF4's product as a TPU program: Mosaic takes it, for every chip, dtype and cut tile."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import kernels, linalg

TOPOLOGIES = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p"}
CALL = 'custom_call_target="tpu_custom_call"'


def compiled(compile_for, name, dtype, sizes, implementation):
    rows, n, m = sizes
    blocks = -(-n // 64)

    def training(x, codes, scales, dy):
        w = linalg.NormalFloat4(codes, scales, None, n, "xla")

        def own(x):
            return kernels.nf4_linear(x, w, implementation=implementation, chip=TOPOLOGIES[name])

        y, pull = jax.vjp(own, x)
        return y, *pull(dy)

    arrays = [
        ((rows, n), dtype),
        ((32 * blocks, m), "uint8"),
        ((blocks, m), "float32"),
        ((rows, m), dtype),
    ]
    return compile_for(
        name, training, *(jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for shape, kind in arrays)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize(
    ("sizes", "cut"), [((1000, 768, 1408), False), ((1, 264, 300), True)], ids=str
)
def test_nf4_linear_is_taken_with_its_gradient(compile_for, name, dtype, sizes, cut):
    program = compiled(compile_for, name, dtype, sizes, "tpu")
    assert program.as_text().count(CALL) == 2
    # no decoded matrix; cut lanes XLA copies first
    assert cut or program.memory_analysis().temp_size_in_bytes < sizes[1] * sizes[2]


@pytest.mark.parametrize(
    ("sizes", "calls"), [((16, 4096, 11008), 2), ((16, 2048, 4096), 0)], ids=str
)
def test_nf4_linear_is_the_default_for_matrices_beyond_vmem(compile_for, sizes, calls):
    assert compiled(compile_for, "v5e:2x2", "bfloat16", sizes, None).as_text().count(CALL) == calls
