"""A model in three parts around a stack of equal layers, and the gradients of one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.functions.adapted import adapted
from lowrank_jax.projection.state import Projected
from lowrank_jax.projection.tapped import Tapped
from lowrank_jax.reprs import Short
from lowrank_jax.trees import dequantized
from lowrank_jax.typing import Pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack(Short):
    """A model in three parts around a stack of equal layers.

    Attributes:
      before: `(rest, *args) -> x`.
      layer: `(layer parameters, x) -> x`.
      after: `(rest, x, *args) -> value`, a scalar.
      name: the entry of `params` with the stacked layers; `rest` is the parameters without it.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> stack = Stack(
    ...     before=lambda rest, x: x,
    ...     layer=lambda layer, x: jnp.tanh(lrx.matmul(x, layer["kernel"])),
    ...     after=lambda rest, x, _: jnp.mean(x**2),
    ... )
    >>> stack.name
    'layers'
    """

    before: Callable[..., Any]
    layer: Callable[..., Any]
    after: Callable[..., Any]
    name: str = "layers"

    def loss(self, params: Pytree, *args: Any) -> jax.Array:
        """The same model as one function, for evaluation and for `train_step`."""
        rest = {name: tree for name, tree in params.items() if name != self.name}
        x, _ = jax.lax.scan(
            lambda x, layer: (self.layer(layer, x), None),
            self.before(rest, *args),
            params[self.name],
        )
        return self.after(rest, x, *args)


def layer_gradients(
    function: Callable[..., Any], kernels: Any, taps: Pytree, vectors: Any, inputs: Any, dx: Any
) -> Any:
    """Gradients of one layer, summed over the microbatches: `(kernels', vectors', inputs')`.

    Args:
      function: `(kernels, vectors, x) -> x`, of lists of the layer's leaves.
      kernels, vectors: of this layer.
      taps: of its kernels, or None for full gradients.
      inputs, dx: `(k, ...)`, what came into the layer, and the gradient of what left it.
    """
    zeros = (
        None if taps is None else [tap.zeros(own) for tap, own in zip(taps, kernels, strict=True)]
    )
    if taps is None:  # codes have no gradient, their values do
        dtype = jax.tree.leaves(inputs)[0].dtype
        kernels = [dequantized(kernel, dtype) for kernel in kernels]

    function = adapted(function)

    def apply(free, x):
        places, vectors = free
        if taps is None:
            return function(places, vectors, x)
        tapped = [
            Tapped(kernel, dataclasses.replace(tap, low=low, sketch=sketch))
            for kernel, tap, (low, sketch) in zip(kernels, taps, places, strict=True)
        ]
        return function(tapped, vectors, x)

    free = (zeros if taps is not None else kernels, vectors)

    def one(total, part):
        x, dx = part
        _, pull = jax.vjp(apply, free, x)
        grads, d_inputs = pull(dx)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), d_inputs

    if dx.shape[0] == 1:
        _, pull = jax.vjp(apply, free, inputs[0])
        (places, d_vectors), d_inputs = pull(dx[0])
        d_inputs = d_inputs[None]
    else:
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), free)
        (places, d_vectors), d_inputs = sharding.scan(one, start, (inputs, dx))
    if taps is not None:
        places = [Projected(*place) for place in places]
    return places, d_vectors, d_inputs
