"""Calls that are products without JAX showing them: kernels, and functions with a derivative of their
own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lowrank_jax.functions.equations import dots_of, names_of
from lowrank_jax.functions.errors import ReadError

CALLING = ("jit", "pjit", "custom_vjp_call", "custom_jvp_call", "pallas_call")

# By name: of the equation of a call, a function of the same operands.
_REGISTERED: dict[str, Callable[[Any], Callable[..., Any]]] = {}


def rule(called: str | Callable[..., Any], equivalent: Callable[..., Any]) -> None:
    """Says what a call computes that JAX does not show as a product, so that nodes go through it.

    Of `equivalent` one thing is used: how it multiplies by the kernel. The call itself makes the base
    product, with the derivative that its author wrote; adapters add thin products of the equivalent's
    kind, and taps take theirs.

    Args:
      called: a function under `jax.jit`, `jax.custom_vjp` or `pallas_call`, or its name; a name may
        have the file or the folder that it stands in before it, "megablox.gmm".
      equivalent: of the arrays that the call is given, in their order; makes one product of JAX by
        the kernel, such as `jnp.dot` or `jax.lax.ragged_dot`, and returns it.

    >>> import jax, jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> @jax.custom_vjp
    ... def my_matmul(x, kernel):
    ...     return x @ kernel
    >>> my_matmul.defvjp(
    ...     lambda x, kernel: (x @ kernel, (x, kernel)),
    ...     lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy),
    ... )
    >>> lrx.adapters.rule(my_matmul, lambda x, kernel: x @ kernel)
    >>> params = {"kernel": jnp.ones((4, 6))}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> model = lambda params, x: my_matmul(x, params["kernel"])
    >>> lrx.adapted(model)(lrx.attach(params, adaptation), jnp.ones((3, 4))).shape
    (3, 6)
    """
    name = called if isinstance(called, str) else called.__name__
    _REGISTERED[name] = lambda eqn: equivalent


def registered(eqn: Any) -> Callable[..., Any] | None:
    """The equivalent of a call that a rule names."""
    if eqn.primitive.name not in CALLING:
        return None
    found = next((_REGISTERED[name] for name in names_of(eqn) if name in _REGISTERED), None)
    return None if found is None else found(eqn)


def _grouped(eqn: Any) -> Callable[..., Any]:
    """Of jax's `megablox.gmm(rows, experts, group_sizes)`, whose transposition is an option that
    only its kernel shows."""
    if len(eqn.invars) != 3:
        raise ReadError("goes into megablox.gmm with group_offset or existing_out")
    transposed = any(one.params["dimension_numbers"][0] == ((1,), (1,)) for one in dots_of(eqn))

    def equivalent(rows, experts, sizes):
        experts = experts.swapaxes(1, 2) if transposed else experts
        return jax.lax.ragged_dot(rows, experts, sizes)

    return equivalent


_REGISTERED["megablox.gmm"] = _grouped
