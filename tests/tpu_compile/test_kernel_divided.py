"""Kernels in programs for several TPUs: each chip runs them on its own block, and nothing larger is
sent for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lrx
from experiments.harness import collectives
from experiments.planning import hlo
from lowrank_jax import kernels, linalg
from lowrank_jax.sharding import meshes

CALL = 'custom_call_target="tpu_custom_call"'


@pytest.fixture
def mesh(topology):
    """`mesh(fsdp=4)` of a v5e:2x2."""
    return functools.partial(meshes.make_mesh, devices=topology("v5e:2x2").devices)


def sent(program):
    """The number of elements of each tensor that is sent, with its kind."""
    found = collectives.read(hlo.once(hlo.with_trips(program.as_text())))
    return {(one.kind, math.prod(one.shape)) for one in found if one.shape}


def abstract(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def compiled(function, places, *operands, **options):
    return jax.jit(function, out_shardings=places, **options).lower(*operands).compile()


def test_lora_linear_by_columns_and_rows(mesh):
    own, spec = mesh(data=2, tensor=2), (None, "tensor")
    put = functools.partial(abstract, own)
    x, w = put((2, 4096, 4096), "bfloat16", "data"), put((4096, 12288), "bfloat16", *spec)
    a, b = put((4096, 8), "bfloat16"), put((8, 12288), "bfloat16", *spec)
    dy = put((2, 4096, 12288), "bfloat16", "data", None, "tensor")

    def training(x, w, a, b, dy):
        with meshes.use(own):
            product = functools.partial(kernels.lora_linear, spec=spec, chip="v5e")
            y, pull = jax.vjp(lambda x, a, b: product(x, w, a, b), x, a, b)
        return y, *pull(dy)

    program = compiled(training, tuple(leaf.sharding for leaf in (dy, x, a, b)), x, w, a, b, dy)
    assert program.as_text().count(CALL) == 2
    # dx, what the thin products with A and B give, and the gradients of both
    assert {kind for kind, _ in sent(program)} == {"all-reduce"}
    assert max(size for _, size in sent(program)) == 4096 * 4096
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096  # nothing like x, y or W


def test_nf4_is_gathered_as_codes(mesh):
    own, spec = mesh(fsdp=4), ("fsdp", "tensor")
    put = functools.partial(abstract, own)
    x, dy = put((4, 256, 4096), "bfloat16", "fsdp"), put((4, 256, 11008), "bfloat16", "fsdp")
    codes, scales = put((2048, 11008), "uint8", *spec), put((64, 11008), "float32", *spec)

    def training(x, codes, scales, dy):
        with meshes.use(own):
            w = linalg.NormalFloat4(codes, scales, None, 4096, "xla")
            y, pull = jax.vjp(lambda x: kernels.nf4_linear(x, w, spec=spec, chip="v5e"), x)
        return y, *pull(dy)

    program = compiled(training, (dy.sharding, x.sharding), x, codes, scales, dy)
    assert program.as_text().count(CALL) == 2
    assert sent(program) == {("all-gather", 2048 * 11008), ("all-gather", 64 * 11008)}
    assert (
        program.memory_analysis().temp_size_in_bytes < 1.1 * 2048 * 11008
    )  # the codes, and no decoded matrix


@pytest.mark.parametrize("part", ["projected", "full"])
def test_the_fused_form_writes_in_place_and_gathers_one_basis_after_the_other(mesh, part):
    own, (layers, s, k, r) = mesh(fsdp=4), (4, 4096, 11264, 128)
    params = {"kernel": abstract(own, (layers, s, k), "bfloat16", None, None, "fsdp")}
    basis = lrx.projectors.given(matrix=np.zeros((s, r), np.float32))
    tx = lrx.galore(
        1e-3, projector=basis, weight_decay=0.1, views=lrx.Views(stacked=("kernel",)), side="rows"
    )
    form, state = lrx.fused(tx, implementation="pallas"), jax.eval_shape(tx.init, params)
    places = lrx.state_shardings(tx, params, spread=True)
    state = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), state, places
    )
    grads = params
    if part == "projected":
        low = abstract(own, (layers, r, k), "float32", None, None, "fsdp")
        grads = {
            "kernel": jax.tree.map(lambda _: low, jax.eval_shape(lrx.projection.Projected, low))
        }

    def step(params, grads, state):
        with meshes.use(own, parameters=params_known):
            return form.step(
                params, grads, state, taps=lrx.taps(state) if part == "projected" else None
            )

    params_known = params
    placed = {"kernel": params["kernel"].sharding}
    program = compiled(step, (placed, places), params, grads, state, donate_argnums=(0, 2))
    assert program.as_text().count(CALL) == 1
    # a full gradient is projected by all bases at once, in XLA's form too
    assert sent(program) == {("all-gather", s * r)} | (
        {("all-gather", layers * s * r)} if part == "full" else set()
    )
    assert program.memory_analysis().temp_size_in_bytes < s * k  # half of a chip's share of W


def test_scores_of_a_dct_are_summed(mesh):
    own = mesh(fsdp=4)
    x = abstract(own, (2048, 2048), "float32", None, "fsdp")

    def scores(x):
        with meshes.use(own):
            return kernels.dct_scores(x, 3, chip="v5e")

    program = compiled(scores, NamedSharding(own, PartitionSpec()), x)
    assert program.as_text().count(CALL) == 1
    assert sent(program) == {("all-reduce", 2048)}
