"""`lrx.nnx.merge`, the former way to give a model kernels that are more than arrays."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lowrank_jax import deprecations
from lowrank_jax.functions.adapted import adapted, is_special


def merge(graphdef: Any, *states: Any) -> Any:
    """Deprecated: `nnx.merge(graphdef, *states)` within a function of `lrx.adapted`.

    Without kernel nodes in the states this is `nnx.merge`, and so it is within `lrx.adapted`. With them
    it gives an object whose call is `lrx.adapted` of merging and calling; what the call writes, the
    next one sees.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> graphdef, params = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> run = lrx.adapted(lambda params, x: nnx.merge(graphdef, params)(x))  # in its place
    >>> run(lrx.attach(params, adaptation), jnp.ones((3, 4))).shape
    (3, 6)
    """
    new = "lrx.adapted(lambda params, ...: flax.nnx.merge(graphdef, params, ...)(...))"
    deprecations.warn("lrx.nnx.merge", new, stacklevel=3)
    if not any(map(is_special, jax.tree.leaves(states, is_leaf=is_special))):
        return nnx.merge(graphdef, *states)
    return Merged(graphdef, states)


class Merged:
    """A model of which only the call is there."""

    def __init__(self, graphdef: Any, states: tuple[Any, ...]):
        self._graphdef, self._states = graphdef, states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def call(states: Any, *args: Any, **kwargs: Any) -> Any:
            model = nnx.merge(self._graphdef, *states)
            return model(*args, **kwargs), nnx.split(model)

        result, (graphdef, state) = adapted(call)(self._states, *args, **kwargs)
        self._graphdef, self._states = graphdef, (state,)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"lrx.nnx.merge: .{name} of a model with kernel nodes; only its call is there. Write "
            f"lrx.adapted(lambda params, ...: flax.nnx.merge(graphdef, params, ...).{name}(...))"
        )
