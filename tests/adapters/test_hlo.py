"""Bytes of the compiled gradient step: thin adapters form no second matrix of the kernel's size,
dense ones one."""

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx

A = lrx.adapters
N, M, TOKENS = 256, 384, 4
KERNEL = 4 * N * M
THIN = {
    "lora": A.lora(rank=4), "lora-pissa": A.lora(rank=4, init="pissa"), "dora": A.dora(rank=4), "oft": A.oft(block=8),
    "uni_lora": A.uni_lora(rank=4, size=64), "vera": A.vera(rank=4), "vera-regenerated": A.vera(rank=4, stored=False),
    "miss": A.miss(rank=5), "mini": A.miss(rank=5, mode="mini", mini_rank=8), "shira": A.shira(rank=2),
}  # fmt: skip
DENSE = {
    "loha": A.loha(rank=4),
    "hira": A.hira(rank=4),
    "bat": A.miss(rank=8, mode="bat"),
    "fourierft": A.fourierft(frequencies=9),
    "rand_lora": A.rand_lora(rank=4),
}


def temporaries(adapter) -> int:
    """Bytes that the gradient of two adapted layers, one behind the other, needs beside its
    arguments and results."""
    params = {
        "up": jax.ShapeDtypeStruct((N, M), jnp.float32),
        "down": jax.ShapeDtypeStruct((M, N), jnp.float32),
    }
    adaptation = jax.eval_shape(
        lambda params, key: lrx.adapt(params, {".*": adapter}, key), params, jax.random.key(0)
    )

    def loss(train, fixed, params, x):
        tree = lrx.attach(params, adaptation.replace(train=train, frozen=fixed))
        return jnp.sum(lrx.matmul(jnp.tanh(lrx.matmul(x, tree["up"])), tree["down"]) ** 2)

    x = jax.ShapeDtypeStruct((TOKENS, N), jnp.float32)
    compiled = (
        jax.jit(jax.value_and_grad(loss))
        .lower(adaptation.train, adaptation.frozen, params, x)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def rows(table, *fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", rows(THIN, "lora", "dora", "shira"))
def test_a_thin_adapter_forms_no_matrix_beside_the_kernel(name):
    assert temporaries(THIN[name]) < 0.75 * KERNEL


@pytest.mark.parametrize("name", rows(DENSE, "loha"))
def test_a_dense_adapter_does(name):
    """Which says that the test above can fail."""
    assert temporaries(DENSE[name]) >= KERNEL
