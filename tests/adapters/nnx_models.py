"""The model of every layer that takes adapters in nnx, and the two ways to give it some."""

import functools

import jax.numpy as jnp
from flax import nnx

import lowrank_jax as lrx


class EveryNnx(nnx.Module):
    """The layers of `linen_models.Every`, and the same paths."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 6, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 5), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 5), 8, axis=(-2, -1), rngs=rngs)
        self.mix = nnx.Einsum("bsd,sdf->bsf", (3, 8, 4), (3, 4), rngs=rngs)
        self.conv = nnx.Conv(3, 6, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.embed = nnx.Embed(12, 8, rngs=rngs)

    def __call__(self, x, image, ids):
        return {
            "dense": self.dense(x),
            "heads": self.heads(x),
            "out": self.out(jnp.stack([x, x[..., ::-1]], -2)[..., :5]),
            "mix": self.mix(x),
            "conv": self.conv(image),
            "embed": self.embed(ids),
            "attend": self.embed.attend(x),
        }


def parameters(model):
    """The parameters of an nnx model as a pure dict."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def merged(model, params):
    """The call of a model with other parameters, which may have adapters."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    call = lambda params, *args: nnx.merge(graphdef, params, rest)(*args)  # noqa: E731
    return functools.partial(lrx.adapted(call), params)


def plainly(model, params):
    """`nnx.merge` of a model with other parameters."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, params, rest)


def inserted(model, *adaptations):
    """The model itself, with adapters, and what it was before as a function of parameters."""
    before = functools.partial(plainly, nnx.clone(model))
    for adaptation in adaptations:
        lrx.nnx.insert(model, adaptation)
    return model, before
