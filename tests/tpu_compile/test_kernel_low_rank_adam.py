"""Adam in a subspace as TPU programs: Mosaic takes them, for every chip, storage, side and cut
tile."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import kernels, linalg

TOPOLOGIES = {"v5e:2x2": "v5e", "v6e:2x2": "v6e", "v5p:2x2x1": "v5p"}
CALL = 'custom_call_target="tpu_custom_call"'
CASES = {
    "float32": ("rows", (2, 1000, 1408, 72), "float32", "float32"),
    "bfloat16, stochastic": ("cols", (1, 1000, 1408, 72), "bfloat16", "bfloat16"),
    "8 bits, stochastic": ("rows", (2, 1000, 1000, 5), "bfloat16", "8 bits"),
    "8 bits, columns": ("cols", (1, 1024, 1408, 128), "float32", "8 bits"),
}


def compiled(compile_for, name, case, **options):
    side, (count, s, k, r), dtype, moments = CASES[case]
    shape = (count, s, k) if side == "rows" else (count, k, s)
    w, basis = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((count, s, r), dtype)
    low = jax.ShapeDtypeStruct((count, r, k), jnp.float32)
    if moments == "8 bits":
        mu, nu = (
            jax.eval_shape(lambda x, c=c: linalg.quantize_blocks(x, c), low)
            for c in ("signed", "unsigned")
        )
    else:
        mu = nu = jax.ShapeDtypeStruct(low.shape, moments)

    def step(w, basis, low, mu, nu, key):
        keys = (
            jax.random.split(jax.random.wrap_key_data(key), count) if "stochastic" in case else None
        )
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
            chip=TOPOLOGIES[name],
            **options,
        )

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return compile_for(name, step, w, basis, low, mu, nu, key, donate_argnums=(0, 3, 4))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_it_is_taken(compile_for, name, case):
    assert compiled(compile_for, name, case, implementation="tpu").as_text().count(CALL) == 1


@pytest.mark.parametrize("case", ["float32", "8 bits, columns"])
def test_cut_lanes_are_left_to_xla_and_whole_ones_written_in_place(compile_for, case):
    program = compiled(compile_for, "v5e:2x2", case)
    whole = case == "8 bits, columns"
    assert program.as_text().count(CALL) == int(whole)
    if whole:  # nothing like w, nor like moments in float32
        assert program.memory_analysis().temp_size_in_bytes < 4 * 128 * 1408
