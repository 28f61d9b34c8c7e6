"""Quantised parameters on meshes: where codes and scales lie, QLoRA and a quantised projected step
on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lrx
from experiments.harness import collectives
from lowrank_jax import linalg
from lowrank_jax.sharding import meshes

TABLE = [(".*up/kernel", ("embed", "mlp")), (".*down/kernel", ("mlp", "embed"))]
N, M = 512, 1024
FORMS = {
    "nf4": functools.partial(linalg.quantize_nf4, double=False),
    "double": functools.partial(linalg.quantize_nf4, double=True),
    "linear": functools.partial(linalg.quantize_blocks, code="linear", block=64),
}


def params(form, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / 32, jnp.float32)  # noqa: E731
    return {"up": {"kernel": FORMS[form](draw(N, M))}, "down": {"kernel": FORMS[form](draw(M, N))}}


def on_a_device(tree, placed):
    sizes = lambda leaf, own: np.prod(own.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(sizes, tree, placed)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_every_device_holds_its_share(form, sizes):
    mesh, own = meshes.make_mesh(**sizes), params(form)
    placed = meshes.shardings(own, TABLE, mesh)
    moved = jax.device_put(own, placed)
    for node, want in zip(
        *(
            jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "dequantize"))
            for tree in (moved, own)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(node.dequantize(), want.dequantize())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    assert on_a_device(own, placed) <= 1.02 * total / 8  # scales of scales are whole
    codes = meshes.partition_specs({"up": {"kernel": jnp.ones((N, M))}}, TABLE, mesh)["up"][
        "kernel"
    ]
    assert placed["up"]["kernel"].codes.spec == codes


def test_blocks_stay_in_one_piece():
    mesh, table = meshes.make_mesh(fsdp=8), [("kernel", ("embed", "mlp"))]
    tree = {"kernel": linalg.quantize_nf4(jnp.ones((256, 64)))}  # four blocks for eight devices
    assert meshes.partition_specs(tree, table, mesh)["kernel"].codes == jax.P(None, "tensor")
    text = (
        "kernel  (256, 64)  P(None, 'tensor')  (embed = 256, 4 blocks, stays whole: 'fsdp' does "
        "not divide it)"
    )
    assert meshes.describe(tree, table, mesh) == text
    flat = {"kernel": linalg.quantize_blocks(jnp.ones((64, 2000)), block=256)}
    assert meshes.partition_specs(flat, [("kernel", (None, "embed"))], mesh)[
        "kernel"
    ].codes == jax.P(None, None)
    odd = {
        "kernel": linalg.quantize_nf4(jnp.ones((512, 12)), double=True)
    }  # 96 scales of 8 x 12 blocks
    assert meshes.partition_specs(odd, table, mesh)["kernel"].absmax.codes == jax.P(
        ("tensor", "fsdp")
    )
    odd = {"kernel": linalg.quantize_nf4(jnp.ones((60, 12)), double=True)}
    assert meshes.partition_specs(odd, [("kernel", (None, "embed"))], mesh)[
        "kernel"
    ].absmax.codes == jax.P(None)


X = jnp.asarray(np.random.default_rng(9).normal(size=(16, N)), jnp.float32)


def loss(params, x, **place):
    product = lambda x, kernel: lrx.dot_general(x, kernel, (((1,), (0,)), ((), ())), **place)  # noqa: E731
    hidden = jnp.tanh(product(x, params["up"]["kernel"]))
    return jnp.mean((x + product(hidden, params["down"]["kernel"])) ** 2)


def qlora(own, family=lrx.adapters.lora, **place):
    adaptation = lrx.adapt(own, family(rank=4), jax.random.key(0))
    random = np.random.default_rng(3)
    train = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), adaptation.train
    )
    adaptation = adaptation.replace(train=train)

    def step(own, train, fixed, x):
        if place:  # on explicit axes the model gathers kernels and says where sums lie
            own = jax.tree.map(
                lambda w: meshes.at_input(w, x), own, is_leaf=lambda w: hasattr(w, "dequantize")
            )

        def of(train):
            return loss(lrx.attach(own, adaptation.replace(train=train, frozen=fixed)), x, **place)

        value, grads = jax.value_and_grad(of)(train)
        return value, jax.tree.map(lambda w, g: w - 0.5 * g, train, grads)

    return adaptation, step


FAMILIES = [(form, lrx.adapters.lora) for form in FORMS] + [("double", lrx.adapters.dora)]


@pytest.mark.parametrize(("form", "family"), FAMILIES)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_step_of_qlora_is_that_of_one_device_and_sends_no_decoded_matrix(form, family, sizes):
    mesh, own = meshes.make_mesh(**sizes), params(form)
    adaptation, step = qlora(own, family)
    alone = jax.jit(lambda *given: step(*given))  # a trace of its own
    want, trained = alone(own, adaptation.train, adaptation.frozen, X)
    placed = meshes.shardings(own, TABLE, mesh)
    train, fixed = lrx.adapters.shardings(adaptation, placed)
    assert train["sites"]["up/kernel"]["a"].spec == jax.P("fsdp", None)
    rows = jax.NamedSharding(mesh, meshes.spec(("batch", None), mesh))
    with meshes.use(mesh, parameters=jax.tree.map(jax.device_put, own, placed)):
        program = jax.jit(
            step, in_shardings=(placed, train, fixed, rows), out_shardings=(None, train)
        )
        compiled = program.lower(own, adaptation.train, adaptation.frozen, X).compile()
    value, new = compiled(
        *jax.device_put((own, adaptation.train, adaptation.frozen, X), (placed, train, fixed, rows))
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new, trained)
    largest = max(found.bytes / found.times for found in collectives.read(compiled.as_text()))
    assert largest <= N * M // sizes.get(
        "tensor", 1
    )  # codes of a byte at the most; a decoded matrix has four


def test_a_tied_output_sends_codes():
    mesh, own = (
        meshes.make_mesh(fsdp=8),
        {"table": FORMS["nf4"](params("nf4")["up"]["kernel"].dequantize())},
    )
    adaptation = lrx.adapt(own, {"table": lrx.adapters.lora(rank=4)}, jax.random.key(0))
    placed = meshes.shardings(own, [("table", ("vocabulary", "embed"))], mesh)
    rows = jax.NamedSharding(mesh, meshes.spec(("batch", None), mesh))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, M)), jnp.float32)
    logits = lambda own, x: lrx.adapters.attend(x, lrx.attach(own, adaptation)["table"])  # noqa: E731
    with meshes.use(mesh, parameters=jax.device_put(own, placed)):
        compiled = jax.jit(logits, in_shardings=(placed, rows)).lower(own, x).compile()
    got = compiled(*jax.device_put((own, x), (placed, rows)))
    np.testing.assert_allclose(got, logits(own, x), rtol=1e-4, atol=1e-5)
    assert max(found.bytes for found in collectives.read(compiled.as_text())) <= N * M


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_qlora_on_explicit_axes(form):
    mesh, own = meshes.make_mesh(fsdp=8, explicit=True), params(form)
    adaptation, step = qlora(own)
    want, trained = jax.jit(step)(own, adaptation.train, adaptation.frozen, X)
    step = qlora(own, out_sharding=jax.P("fsdp", None))[1]
    placed, rows = meshes.shardings(own, TABLE, mesh), jax.NamedSharding(mesh, jax.P("fsdp", None))
    given = jax.device_put(
        (own, adaptation.train, adaptation.frozen, X),
        (placed, *lrx.adapters.shardings(adaptation, placed), rows),
    )
    with jax.set_mesh(mesh):
        gathered = jax.eval_shape(meshes.at_input, given[0]["up"]["kernel"], given[-1])
        assert gathered.codes.sharding.spec == jax.P(None, "tensor")
        value, new = jax.jit(step)(*given)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new, trained)


@pytest.mark.parametrize(
    "columns", [M, 12]
)  # of 12 columns two devices have halves, of their 96 scales eight shares
def test_a_rest_of_rows_is_cut_off_on_explicit_axes(columns):
    mesh, value = (
        meshes.make_mesh(fsdp=4, tensor=2, explicit=True),
        params("double")["up"]["kernel"].dequantize(),
    )
    short = {
        "kernel": linalg.quantize_nf4(value[:510, :columns], double=True)
    }  # 8 blocks for fsdp=4
    placed = meshes.shardings(short, [("kernel", ("embed", "mlp"))], mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda w: w.dequantize())(jax.device_put(short["kernel"], placed["kernel"]))
    np.testing.assert_array_equal(got, short["kernel"].dequantize())


def test_variables_of_nnx_are_quantised_as_their_values_are():
    mesh, own = meshes.make_mesh(fsdp=4, tensor=2), params("double")
    state = nnx.State({"up": {"kernel": nnx.Param(own["up"]["kernel"])}})
    want = meshes.partition_specs({"up": own["up"]}, TABLE, mesh)
    assert jax.tree.leaves(meshes.partition_specs(state, TABLE, mesh)) == jax.tree.leaves(want)


@pytest.mark.parametrize("spread", [False, True])
def test_a_quantised_projected_step_is_that_of_one_device(spread):
    mesh, own = meshes.make_mesh(fsdp=4, tensor=2), params("linear")
    tx = lrx.fused(lrx.dct_adamw(1e-2, rank=8))
    step = lrx.train_step(loss, tx)
    want, _, _ = jax.jit(step)(own, tx.init(own), X)
    placed = meshes.shardings(own, TABLE, mesh)
    state = lrx.state_shardings(tx, own, placed, spread=spread)
    kept = state.projection.matrices["up"]["kernel"].inner.mu.spec
    assert kept == (jax.P("fsdp", "tensor") if spread else jax.P(None, "tensor"))
    rows = jax.NamedSharding(mesh, meshes.spec(("batch", None), mesh))
    given = jax.device_put((own, tx.init(own), X), (placed, state, rows))
    with meshes.use(mesh, parameters=given[0]):
        got, _, _ = jax.jit(
            step, in_shardings=(placed, state, rows), out_shardings=(placed, state, None)
        )(*given)
    for a, b, old in zip(*map(jax.tree.leaves, (got, want, own)), strict=True):
        apart = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))
        assert (
            np.mean(apart > 1e-5) < 1e-3 and apart.max() <= 1
        )  # a code that lies halfway may go either way
        assert np.any(np.asarray(b) != np.asarray(old))


def test_sides_and_state_follow_codes_not_scales():
    mesh, own = meshes.make_mesh(fsdp=8), params("double")
    placed = meshes.shardings(own, TABLE, mesh)
    assert lrx.projection.sides_for(own, placed) == (
        ("down/kernel", "rows"),
        ("up/kernel", "cols"),
    )  # fsdp divides "embed"
    tx = lrx.fused(lrx.galore(1e-2, rank=8, side=lrx.projection.sides_for(own, placed)))
    moments = (
        lrx.state_shardings(tx, own, placed, spread=True)
        .projection.matrices["up"]["kernel"]
        .inner.mu
    )
    assert (
        moments.spec
        == lrx.state_shardings(
            tx,
            jax.tree.map(
                lambda x: x,
                {name: {"kernel": jnp.ones(node["kernel"].shape)} for name, node in own.items()},
            ),
            {name: {"kernel": node["kernel"].codes} for name, node in placed.items()},
            spread=True,
        )
        .projection.matrices["up"]["kernel"]
        .inner.mu.spec
    )
    assert "fsdp" in str(moments.spec)
