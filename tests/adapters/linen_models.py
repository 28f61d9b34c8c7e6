"""A model of every layer that takes adapters, in linen and as a bare function, and its cases."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
A = lrx.adapters
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)), jnp.float32)
KEY = jax.random.key(0)
RULES = {
    "heads/kernel": lrx.MatrixView(rows=(0,), cols=(1, 2)),
    "out/kernel": lrx.MatrixView(rows=(0, 1), cols=(2,)),
    "mix/kernel": lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,)),
    "conv/kernel": lrx.MatrixView(rows=(0, 1, 2), cols=(3,)),
}
FAMILIES = {
    "lora": A.lora(rank=2),
    "pissa": A.lora(rank=2, init="pissa"),
    "dora": A.dora(rank=2),
    "oft": A.oft(block=2),
    "uni_lora": A.uni_lora(rank=2, size=32, bound=0.5),
    "hira": A.hira(rank=2),
}
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Every(nn.Module):
    """One layer of each kind, each on an input of its own."""

    @nn.compact
    def __call__(self, x, image, ids):
        embed = nn.Embed(12, 8, name="embed")
        return {
            "dense": nn.Dense(6, name="dense")(x),
            "heads": nn.DenseGeneral((2, 5), name="heads")(x),
            "out": nn.DenseGeneral(8, axis=(-2, -1), name="out")(
                jnp.stack([x, x[..., ::-1]], -2)[..., :5]
            ),
            "mix": nn.Einsum((3, 8, 4), "bsd,sdf->bsf", name="mix")(x),
            "conv": nn.Conv(6, (2, 2), strides=2, padding="VALID", name="conv")(image),
            "embed": embed(ids),
            "attend": embed.attend(x),
        }


def every_bare(params, x, image, ids):
    """The same as a function of (attached) parameters."""
    kernel = lambda name: params[name]["kernel"]  # noqa: E731
    bias = lambda name: params[name]["bias"]  # noqa: E731
    heads = jnp.stack([x, x[..., ::-1]], -2)[..., :5]

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=LAYOUT)

    return {
        "dense": lrx.matmul(x, kernel("dense")) + bias("dense"),
        "heads": lrx.einsum("bsd,dhk->bshk", x, kernel("heads")) + bias("heads"),
        "out": lrx.einsum("bshk,hkd->bsd", heads, kernel("out")) + bias("out"),
        "mix": lrx.einsum("bsd,sdf->bsf", x, kernel("mix")) + bias("mix"),
        "conv": A.conv(image, kernel("conv"), convolve) + bias("conv"),
        "embed": A.embed(ids, params["embed"]["embedding"]),
        "attend": A.attend(x, params["embed"]["embedding"]),
    }


def every_input():
    generator = np.random.default_rng(0)
    x, image = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 8), (2, 4, 5, 3))
    )
    return x, image, jnp.asarray(generator.integers(0, 12, (2, 3)))


def every_params():
    """Random kernels and biases."""
    shapes = jax.eval_shape(Every().init, jax.random.key(0), *every_input())["params"]
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), jnp.float32), shapes)


def adapted(params, rules, seed=0, **options):
    """An adaptation whose arrays have moved away from their start."""
    return moved(lrx.adapt(params, rules, jax.random.key(seed), **options), seed)


def moved(adaptation, seed=0):
    generator = np.random.default_rng(seed)
    move = lambda x: x + jnp.asarray(0.3 * generator.normal(size=x.shape), x.dtype)  # noqa: E731
    return adaptation.replace(train=jax.tree.map(move, adaptation.train))


def every_adaptation(family, seed=0):
    rules = {".*/(kernel|embedding)": FAMILIES[family]}
    return adapted(every_params(), rules, seed, views=lrx.Views(rules=RULES))


def run(function, *args):
    """Compiled quickly, and run."""
    return jax.jit(function).lower(*args).compile(FAST)(*args)


def total(tree):
    """A number that every entry of every leaf moves, each differently."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(leaf + 0.1 * i)) for i, leaf in enumerate(leaves))


def close(got, expected, rtol=2e-5, atol=2e-5):
    """Two trees are equal up to rounding."""
    got, expected = (jax.tree.map(np.float32, tree) for tree in (got, expected))
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=atol)


def on(model, **options):
    """`model.apply` as a function that takes adapters."""
    return lrx.adapted(
        lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs), **options
    )


def initial(model, *args):
    """The parameters of a linen model."""
    return model.init(KEY, *args)["params"]
