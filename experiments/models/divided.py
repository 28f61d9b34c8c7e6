"""What layers of our models add for explicit meshes, where array types say how they lie.

Kernels are gathered where they are multiplied, and sums over divided axes, look-ups and choices
along them say where they go. All but the look-up are keywords of Flax's own layers and jax's own
products, so that taps and adapters find what they know.

Shapes are named by their suffix: B batch, S sequence, D width, V vocabulary, H query heads, G
key/value heads, K head size.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lowrank_jax import dot_general, sharding
from lowrank_jax.sharding.meshes import at_input, constrain, out_sharding
from lowrank_jax.typing import DTypeLike


def promoted(
    *arrays: jax.Array | None, dtype: DTypeLike | None = None, inexact: bool = True
) -> list[Any]:
    """Flax's `promote_dtype` of a layer, with its kernel as products want it on explicit meshes."""
    x, kernel, bias = promote_dtype(*arrays, dtype=dtype, inexact=inexact)
    return [x, at_input(kernel, x), bias]


def summed(x, features):
    """The product of x (B, S, ...) and a kernel whose rows may be divided (o_proj, down_proj)."""
    place = out_sharding((*x.shape[:-1], features), "batch", "length", None)
    return functools.partial(dot_general, out_sharding=place)


def rematerialised(block, config):
    """The module that keeps for its backward pass what `config.remat` says.

    On explicit meshes no gathered kernel.

    Without, the gathered kernels of all layers would be kept, where the compiler of an auto mesh
    gathers them again.
    """
    if config.remat:
        policy = None if config.remat is True else getattr(jax.checkpoint_policies, config.remat)
    elif out_sharding(()) is not None:
        policy = _all_but_reshards
    else:
        return block
    # inside a scan XLA cannot merge the recomputation with the forward pass, so no barrier is
    # needed
    return nn.remat(block, policy=policy, prevent_cse=not config.scan)


def _all_but_reshards(primitive, *_, **__):
    return primitive.name != "reshard"


def positions(chunk: int | None) -> str | None:
    """The axis of queries' positions; explicit meshes take all chunks of a sequence everywhere."""
    return "length" if chunk is None or out_sharding(()) is None else None


def beside(k_BxSxGxK, q_BxSxHxK):
    """Keys or values, repeated for each query head where a mesh divides those alone."""
    q_spec, k_spec = sharding.explicit_spec(q_BxSxHxK), sharding.explicit_spec(k_BxSxGxK)
    if q_spec is None or k_spec is None or q_spec[2] == k_spec[2]:
        return k_BxSxGxK
    B, S, G, K = k_BxSxGxK.shape
    H = q_BxSxHxK.shape[2]
    repeated = jnp.broadcast_to(k_BxSxGxK[:, :, :, None], (B, S, G, H // G, K))
    return constrain(
        sharding.reshape(repeated, (B, S, H, K), first=2), "batch", None, "heads", None
    )


class Embed(nn.Embed):
    """`nn.Embed` that says on an explicit mesh where the rows go that it looks up."""

    def __call__(self, tokens_BxS):
        """Of token ids, (B, S, D)."""
        place = out_sharding((*tokens_BxS.shape, self.features), "batch", "length", None)
        if place is None:
            return super().__call__(tokens_BxS)

        table_VxD: Any
        (table_VxD,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return constrain(table_VxD, "vocabulary", None).at[tokens_BxS].get(out_sharding=place)


def chosen(logits_BxSxV, targets_BxS):
    """logits[target], (B, S), without other devices' logits along a divided vocabulary.

    There it is a sum with one term.
    """
    spec = sharding.explicit_spec(logits_BxSxV)
    if spec is None or spec[-1] is None:
        return jnp.take_along_axis(logits_BxSxV, targets_BxS[..., None], axis=-1)[..., 0]
    own_BxSxV = jnp.arange(logits_BxSxV.shape[-1]) == targets_BxS[..., None]
    return jnp.sum(jnp.where(own_BxSxV, logits_BxSxV, 0), axis=-1)
