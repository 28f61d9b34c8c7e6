"""Adapters and projected backprop in Flax linen models, also unmodified ones of other people.

    loss = lrx.linen.adapted(lambda params, batch: objective(model.apply({"params": params},
    batch)))
    value = loss(lrx.attach(params, adaptation), batch)                                          adapters
    value, grads = lrx.projected_value_and_grad(loss, lrx.taps(opt_state))(params, batch)         taps

A kernel travels with its adapters or its tap as one node in its place inside `params`, the only
collection that other people's `nn.scan`, `nn.vmap` and `nn.remat` lift: every array in it has the
leading axes of the kernel, so it is sliced as the kernel is. What a group of adapters shares has
none, and goes beside. Where a layer of Flax is called, a method interceptor puts the node into its
product; dtypes, promotion and bias stay Flax's. Any other use of a kernel with adapters is an error
at the place of that use.

`WithAdapter` is for authors who want adapters to be parameters of their model.
"""

import functools

from lowrank_jax.linen.interceptor import adapted, tapped
from lowrank_jax.linen.wrapper import WithAdapter, extract, insert

__all__ = ["WithAdapter", "adapted", "extract", "insert", "tapped"]
__dir__ = functools.partial(sorted, __all__)
