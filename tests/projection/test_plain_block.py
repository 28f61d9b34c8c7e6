"""Plain leaves in blocks of rows: the same step as with whole leaves, in the memory of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

RNG = np.random.default_rng(2)
DRAW = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)  # noqa: E731
PARAMS = {
    "embed": {"embedding": DRAW(37, 8)},
    "dense": {"kernel": DRAW(6, 10), "bias": DRAW(10)},
    "head": {"kernel": DRAW(8, 5)},
    "norm": {"scale": DRAW(3, 8)},
}
PLAIN = {
    "float32": lrx.inner.adam(),
    "8 bits": lrx.inner.stored8(
        minimum=16, block=3
    ),  # a block of three rows has 24 entries, the last one of one row 8
}


def optimizer(plain, **options):
    return lrx.galore(
        1e-2, projector=lrx.projectors.columns(rank=2), weight_decay=0.1, plain=plain, **options
    )


def run(form, grads, params=PARAMS):
    step, state = jax.jit(form.step), form.init(params)
    for tree in grads:
        params, state = step(params, tree, state)
    return params, state


@pytest.mark.parametrize("kind, clip_norm", [("float32", None), ("8 bits", 0.5)])
def test_blocks_are_whole_leaves(kind, clip_norm):
    grads = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), PARAMS) for i in range(3)]
    grads.insert(1, jax.tree.map(lambda x: x.at[0].set(np.nan), PARAMS))
    tx = optimizer(PLAIN[kind], clip_norm=clip_norm)
    expected = run(lrx.fused(tx), grads)
    found = run(lrx.fused(tx, plain_block=24), grads)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    assert int(found[1].projection.plain.count) == 3
    assert int(found[1].projection.skipped) == 1


def test_every_block_has_random_numbers_of_its_own():
    params = {"dense": PARAMS["dense"], "embed": {"embedding": jnp.ones((12, 64), jnp.bfloat16)}}
    form = lrx.fused(optimizer(lrx.inner.adam()), rounding="stochastic", plain_block=64)
    new, _ = run(form, [jax.tree.map(jnp.ones_like, params)], params)
    rows = np.asarray(new["embed"]["embedding"].astype(jnp.float32))
    assert len(np.unique(rows)) > 1
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.slow
def test_the_scratch_is_that_of_a_block():
    params = {"dense": PARAMS["dense"], "embed": {"embedding": jnp.zeros((4096, 256))}}
    tx = optimizer(lrx.inner.stored8())
    state = tx.init(params)
    blocks, whole = (
        jax.jit(lrx.fused(tx, plain_block=block).step, donate_argnums=(0, 2))
        .lower(params, params, state)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for block in (2**14, None)
    )
    assert blocks < 16 * 4 * 2**14
    assert whole > 4 * 4096 * 256


def test_the_layer_wise_step_takes_blocks_too():
    stack = lrx.projection.Stack(
        before=lambda rest, x: rest["embed"]["embedding"][x],
        layer=lambda layer, x: x + jnp.tanh(lrx.matmul(x, layer["kernel"])),
        after=lambda rest, x, _: jnp.mean(x**2),
    )
    params = {"embed": {"embedding": DRAW(9, 6)}, "layers": {"kernel": DRAW(2, 6, 6)}}
    tx = lrx.galore(1e-2, rank=2, views=lrx.Views(stacked=("layers/.*",)))
    arguments = params, tx.init(params), jnp.arange(5)
    steps = [lrx.layerwise_step(stack, lrx.fused(tx, plain_block=block)) for block in (12, None)]
    found, expected = (jax.jit(step)(*arguments) for step in steps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    assert "f32[2,6] = dynamic_slice" in str(jax.make_jaxpr(steps[0])(*arguments))


def test_what_cannot_be_taken_in_blocks():
    with pytest.raises(ValueError, match="plain_block=0"):
        lrx.fused(optimizer(lrx.inner.adam()), plain_block=0)
    for plain in (optax.scale_by_lion(), lrx.inner.stored8(inner=optax.scale_by_adam())):
        with pytest.raises(ValueError, match="plain_block=8: .* may couple the entries of a leaf"):
            lrx.fused(optimizer(plain), plain_block=8)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
    params = jax.tree.map(lambda x: place(x, jax.P()), PARAMS)
    params["embed"]["embedding"] = place(PARAMS["embed"]["embedding"], jax.P("rows"))
    form = lrx.fused(optimizer(lrx.inner.adam()), plain_block=24)
    with pytest.raises(
        ValueError, match="plain_block=24: leaf 'embed/embedding' is sharded along its rows"
    ):
        form.step(params, params, form.init(params))
