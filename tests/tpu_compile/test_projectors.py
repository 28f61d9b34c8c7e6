"""Refreshes of the 60M preset's largest stack, and whole optimizer updates, as TPU programs."""

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx
from experiments.benchmarks import tpu_programs, workload

SMALL = ["dct3", "dct2", "random gaussian", "random orthonormal", "random structured", "power"]


@pytest.mark.parametrize("name", SMALL)
def test_a_refresh_is_a_small_program(topology, name):
    projector = tpu_programs.projectors(workload.rank("60M"))[name]
    view = lrx.resolution.resolve(
        {"kernel": jax.ShapeDtypeStruct((8, 512, 1376), jnp.float32)},
        lrx.Views(stacked=("kernel",)),
        rank=projector.rank_for,
    ).projected[0]
    row = tpu_programs.compile_row(name, projector, view, topology("v5e:2x2").devices[0])
    assert 0 < row["program_bytes"] < tpu_programs.LIMIT_BYTES


@pytest.mark.parametrize(
    "tx",
    [
        lrx.dct_adamw(1e-3, rank=32, refresh_every=10, views=lrx.Views(stacked=("kernel",))),
        lrx.galore(
            1e-3, projector=lrx.projectors.power(rank=32), views=lrx.Views(stacked=("kernel",))
        ),
        lrx.apollo(1e-3, rank=32, views=lrx.Views(stacked=("kernel",))),
    ],
    ids=["dct_adamw", "galore power", "apollo"],
)
def test_an_update_compiles_and_updates_in_place(compile_for, tx):
    params = {"kernel": jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)}
    state = jax.eval_shape(tx.init, params)
    memory = compile_for(
        "v5e:2x2", tx.update, params, state, params, donate_argnums=(1,)
    ).memory_analysis()
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    assert memory.alias_size_in_bytes >= sum(size for size in sizes if size > 4096)
