"""Kernels inside programs for several devices, interpreted: each makes its block of what one device
would compute."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import kernels, linalg
from lowrank_jax.kernels import _dct
from lowrank_jax.sharding import meshes

MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
}
NAMED = {"implementation": "tpu", "interpret": True}
SPECS = {"up": ("fsdp", "tensor"), "down": ("tensor", "fsdp"), "whole": (None, None)}


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape) / 4, jnp.float32)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def on(mesh, *specs):
    return [jax.NamedSharding(mesh, jax.P(*spec)) for spec in specs]


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("w", SPECS)
@pytest.mark.parametrize("sizes", MESHES)
def test_lora_linear_and_its_gradients(sizes, w, implementation):
    mesh, spec = meshes.make_mesh(**MESHES[sizes]), SPECS[w]
    x, *leaves, dy = arrays = [
        draw(8, 4, 32),
        draw(32, 24),
        draw(32, 3),
        draw(3, 24),
        draw(8, 4, 24),
    ]

    def training(x, *leaves, **options):
        y, pull = jax.vjp(functools.partial(kernels.lora_linear, **options), x, *leaves)
        return y, *pull(dy)

    def divided(*arrays):
        with meshes.use(mesh):
            return training(*arrays, spec=spec, implementation=implementation, interpret=True)

    places = on(mesh, (("data", "fsdp"), "sequence"), spec, spec[:1], (None, *spec[1:]))
    program = jax.jit(divided, in_shardings=places)
    close(program(x, *leaves), training(*arrays[:-1], implementation="reference"))
    assert "shard_map" in str(jax.make_jaxpr(divided)(x, *leaves))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("sizes", "w"), [("fsdp", "up"), ("fsdp x tensor", "down"), ("fsdp x tensor", "up")]
)
def test_nf4_and_its_gradient(sizes, w, double):
    mesh, spec = meshes.make_mesh(**MESHES[sizes]), SPECS[w]
    matrix, x, dy = (
        linalg.quantize_nf4(draw(256, 24), double=double),
        draw(8, 4, 256),
        draw(8, 4, 24),
    )

    def training(x, w, **options):
        y, pull = jax.vjp(lambda x: kernels.nf4_linear(x, w, **options), x)
        return y, *pull(dy)

    def divided(*arrays):
        with meshes.use(mesh):
            return training(*arrays, spec=spec, **NAMED)

    close(jax.jit(divided)(x, matrix), training(x, matrix, implementation="reference"), 1e-4)
    assert "shard_map" in str(jax.make_jaxpr(divided)(x, matrix))


def test_where_a_product_is_not_local_or_nothing_is_known_the_reference_serves():
    mesh = meshes.make_mesh(fsdp=4, tensor=2)

    def maps(x, shape, spec, function=kernels.lora_linear, rules=meshes.RULES):
        leaves = [draw(*shape), draw(shape[0], 3), draw(3, shape[1])]
        leaves = [linalg.quantize_nf4(leaves[0])] if function is kernels.nf4_linear else leaves

        def run(x, *leaves):
            with meshes.use(mesh, rules):
                return function(x, *leaves, spec=spec)

        return "shard_map" in str(jax.make_jaxpr(run)(x, *leaves))

    up, down = SPECS["up"], SPECS["down"]
    assert maps(draw(8, 4, 32), (32, 24), up)
    assert not maps(draw(8, 4, 32), (32, 24), None)  # nothing is known of w
    assert not maps(draw(6, 4, 32), (32, 24), up)  # rows that the mesh does not divide
    assert not maps(draw(8, 4, 33), (33, 24), down)  # a dimension that it does not divide
    assert not maps(draw(32), (32, 24), up)  # no rows
    assert not maps(
        draw(8, 4, 32), (32, 24), up, rules=(("embed", "fsdp"),)
    )  # rules that name no rows
    assert maps(draw(8, 4, 256), (256, 24), down, kernels.nf4_linear)
    assert not maps(
        draw(8, 4, 64), (64, 24), down, kernels.nf4_linear
    )  # half a block of 64 rows on a device
    sequences = meshes.make_mesh(fsdp=4, sequence=2)
    with meshes.use(sequences):  # rows in one axis, where the mesh divides two of them
        assert "shard_map" not in str(
            jax.make_jaxpr(
                lambda x: kernels.lora_linear(x, draw(32, 24), draw(32, 3), draw(3, 24), spec=up)
            )(draw(8, 32))
        )
    with meshes.use(mesh):  # inside somebody's own shard_map
        own = jax.shard_map(
            lambda x: kernels.lora_linear(x, draw(32, 24), draw(32, 3), draw(3, 24), spec=up),
            mesh=mesh,
            in_specs=jax.P("fsdp"),
            out_specs=jax.P("fsdp"),
        )
        assert str(jax.make_jaxpr(own)(draw(32, 4, 32))).count("shard_map") == 1


PARAMS = {
    "layers": {"up": {"kernel": draw(2, 16, 128)}, "down": {"kernel": draw(2, 128, 16)}},
    "bias": draw(8),
}
VIEWS = lrx.Views(stacked=("layers/.*",))


def galore(inner=None, **options):
    inner = lrx.inner.adam() if inner is None else inner
    basis = lrx.projectors.random(rank=4, kind="orthonormal", stored=True)
    return lrx.galore(
        1e-1, projector=basis, weight_decay=0.1, inner=inner, views=VIEWS, eps=1e-3, **options
    )


def steps(form, params, mesh=None, placed=None):
    """Parameters and state after two steps, on one device or on the mesh."""
    state, known = form.init(params), None
    if mesh is not None:
        known = jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), params, placed
        )
        params = jax.device_put(params, placed)
        state = jax.device_put(
            state, lrx.state_shardings(form.recipe.optax(), params, placed, spread=True)
        )

    def step(params, grads, state):
        with contextlib.nullcontext() if mesh is None else meshes.use(mesh, parameters=known):
            return form.step(params, grads, state)

    run = jax.jit(step)
    for i in range(2):
        grads = jax.tree.map(
            lambda x, i=i: jnp.cos((i + 2) * jnp.arange(x.size)).reshape(x.shape), params
        )
        params, state = run(params, grads, state)
    return (params, state), str(jax.make_jaxpr(step)(params, params, state))


def placement(mesh, up, down):
    kinds = {
        "layers": {"up": {"kernel": jax.P(*up)}, "down": {"kernel": jax.P(*down)}},
        "bias": jax.P(),
    }
    return jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), kinds, is_leaf=lambda x: isinstance(x, jax.P)
    )


@pytest.mark.parametrize(
    ("implementation", "moments", "dtype", "place"),
    [
        ("tpu", lrx.inner.adam(), "float32", ((None, None, "fsdp"), (None, "fsdp"))),
        (
            "gpu",
            lrx.inner.stored8(minimum=1, block=8),
            "bfloat16",
            ((None, None, ("fsdp", "tensor")), (None, "fsdp")),
        ),
        ("tpu", lrx.inner.adam(), "bfloat16", (("tensor", None, "fsdp"), ("tensor", "fsdp"))),
    ],
    ids=["float32", "8 bits, stochastic", "layers, stochastic"],
)
def test_the_fused_form_writes_each_device_its_own_block(
    implementation, moments, dtype, place, monkeypatch
):
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    options = {"rounding": "stochastic"} if dtype == "bfloat16" else {}
    form = lrx.fused(galore(moments), implementation="pallas", **options)
    expected, _ = steps(form, params)
    chosen = functools.partial(kernels.low_rank_adam, implementation=implementation, interpret=True)
    monkeypatch.setattr(kernels, "low_rank_adam", chosen)
    found, text = steps(form, params, mesh, placement(mesh, *place))
    assert text.count("shard_map") == 2
    compare = [
        jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (found, expected)
    ]
    if dtype == "float32":
        close(*compare, 1e-4)
        return
    for one, exact in zip(*(jax.tree.leaves(tree[0]) for tree in compare), strict=True):
        # the same bits are drawn: other bits would differ in a tenth of all entries
        assert np.mean(one != exact) < 0.02
        np.testing.assert_allclose(one, exact, atol=2e-2)


def test_leaves_that_are_not_local_take_the_form_of_xla():
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    kernel, xla = (
        lrx.fused(galore(), implementation=implementation) for implementation in ("pallas", "xla")
    )
    place = placement(mesh, (None, "fsdp", "tensor"), (None, "tensor"))
    found, text = steps(kernel, PARAMS, mesh, place)
    assert (
        text.count("shard_map") == 2
    )  # of down, whose shrunk dimension is whole, on TPUs and on GPUs
    close(found, steps(xla, PARAMS)[0], 1e-4)
    coded = lrx.fused(galore(lrx.inner.stored8(minimum=1, block=24)), implementation="pallas")
    with pytest.warns(
        UserWarning, match="no leaf is written by the kernel"
    ):  # a device would have part of a block
        assert "shard_map" not in steps(coded, PARAMS, mesh, place)[1]
    with (
        meshes.use(mesh),
        pytest.warns(UserWarning, match="no leaf is written by the kernel"),
    ):  # nothing is known
        text = str(jax.make_jaxpr(kernel.step)(PARAMS, PARAMS, kernel.init(PARAMS)))
    assert "shard_map" not in text


def test_a_division_with_a_rest_is_refused():
    arrays = [draw(1, 8, 36), draw(1, 8, 2), draw(1, 2, 36), draw(1, 2, 36), draw(1, 2, 36) ** 2]
    numbers = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "rate": 0.1}
    with meshes.use(meshes.make_mesh(fsdp=8)):
        with pytest.raises(ValueError, match="k = 36 and s = 8 without a rest"):
            kernels.low_rank_adam(*arrays, **numbers, spec=(None, "fsdp", None))
        coded = [
            linalg.quantize_blocks(x, code, 9)
            for x, code in zip(arrays[3:], ("signed", "unsigned"), strict=True)
        ]
        with pytest.raises(ValueError, match="cut no block of 9"):
            kernels.low_rank_adam(*arrays[:3], *coded, **numbers, spec=(None, "fsdp", None))


@pytest.mark.parametrize(("axis", "norm"), [(-2, "l1"), (-1, "l2")])
def test_scores_of_a_dct_are_added_up(axis, norm, monkeypatch):
    monkeypatch.setattr(_dct, "_UNROLL", 1)
    mesh, x = meshes.make_mesh(fsdp=4, tensor=2), draw(2, 128, 16)
    x = x if axis == -2 else jnp.swapaxes(x, 1, 2)

    def divided(x):
        with meshes.use(mesh):
            return kernels.dct_scores(x, 3, norm, axis, **NAMED)

    for spec in (jax.P(None, "fsdp", "tensor"), jax.P()):
        found = jax.jit(divided, in_shardings=jax.NamedSharding(mesh, spec))(x)
        close(found, kernels.dct_scores(x, 3, norm, axis, implementation="reference"), 1e-4)
    assert "shard_map" in str(jax.make_jaxpr(divided)(x))
    odd = x[..., :-1] if axis == -2 else x[:, :-1]
    assert "shard_map" not in str(jax.make_jaxpr(divided)(odd))


def lowered(function, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("sizes", "known", "taken"),
    [
        ({"data": 4, "tensor": 2}, True, {"tpu", "cuda"}),
        ({"data": 4, "tensor": 2}, False, set()),  # the matrix is not among `parameters`
        ({"fsdp": 4, "tensor": 2}, True, {"cuda"}),  # XLA:TPU gathers it while it multiplies
    ],
)
def test_a_divided_program_has_the_kernel_of_lora_where_the_mesh_knows_its_matrix(
    sizes, known, taken
):
    mesh, params = meshes.make_mesh(**sizes), {"up": {"kernel": draw(256, 512)}, "bias": draw(8)}
    made = lrx.adapt(params, lrx.adapters.lora(rank=4, implementation="pallas"), jax.random.key(0))
    place = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    parameters = {"up": {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=place)}}

    def loss(train, x):
        with meshes.use(
            mesh, parameters=parameters if known else None
        ):  # the backward pass is traced outside
            y = lrx.matmul(x, lrx.attach(params, made.replace(train=train))["up"]["kernel"])
        return jnp.sum(jnp.sin(y))

    calls = {"tpu": "tpu_custom_call", "cuda": "triton"}
    for rows, expected in ((2**15, taken), (16, taken - {"tpu"})):  # few rows XLA:TPU keeps in VMEM
        x = jax.ShapeDtypeStruct((8, rows, 256), jnp.float32)
        traced = jax.jit(jax.grad(loss)).trace(made.train, x)
        found = {
            p
            for p, call in calls.items()
            if call in traced.lower(lowering_platforms=(p,)).as_text()
        }
        assert found == expected


def test_a_divided_program_has_the_kernel_of_nf4_under_adapters():
    mesh, x = meshes.make_mesh(fsdp=4, tensor=2), draw(8, 4, 256)
    params = {"up": {"kernel": linalg.quantize_nf4(draw(256, 512), implementation="pallas")}}
    made = lrx.adapt(params, lrx.adapters.lora(rank=4, init="orthogonal"), jax.random.key(0))
    place = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    parameters = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params
    )

    def text(params):
        def loss(x):
            with meshes.use(mesh, parameters=parameters):
                return jnp.sum(jnp.sin(lrx.matmul(x, params["up"]["kernel"])))

        return jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" in text(lrx.attach(params, made))
    assert "triton" not in text(params)  # a bare matrix has no path
