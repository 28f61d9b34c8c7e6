"""`lrx.nnx.merge`: a model from states whose kernels are more than arrays."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lowrank_jax.adapters import layers
from lowrank_jax.adapters.hosts import AdaptedKernel
from lowrank_jax.nnx.hosts import Held, become_host, flax_class, is_host, leaf_of, product_fields
from lowrank_jax.projection.tapped import Tapped


def merge(graphdef: Any, *states: Any) -> Any:
    """`nnx.merge(graphdef, *states)` for states with adapted, tapped or quantised kernels.

    Where the `kernel` of a `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` or `nnx.Conv`, or the
    `embedding` of a `nnx.Embed`, or of a class derived from them, is what `lrx.attach` or
    `lrx.projected_value_and_grad` put there, or a quantised array (a subclass of
    `lrx.linalg.Codes`), the products of the merged module use it; dtypes, promotion and bias stay
    Flax's. Stacked layers work when the model maps or scans over axis 0 of their parameters.
    Without such kernels this is `nnx.merge`. A module of your own hands its value,
    `self.kernel[...]`, to `lrx.matmul`. Any other use of a kernel with adapters is an error that
    names it.

    Where adapters share arrays (Uni-LoRA, VeRA), jit from outside: a `nnx.jit` within the model is
    compiled again for each merged model.

    Args:
      graphdef: of `nnx.split`.
      *states: of `nnx.split`, each a `nnx.State` or a pure dict; both have the paths that rules
        see, "up/kernel".

    Raises:
      ValueError: where such a parameter belongs to another module of Flax, a tapped one to
        `nnx.Conv` or `nnx.Embed`; or to a module with an option that does not allow it, such as a
        tapped one with a product of its own that is more than `jax.lax.dot_general` or `jnp.einsum`
        with keyword options. The message names its path.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> graphdef, params = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> params = nnx.to_pure_dict(params)
    >>> loss = lambda params, x: jnp.sum(lrx.nnx.merge(graphdef, params)(x) ** 2)
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> of = lambda train: loss(
    ...     lrx.attach(params, adaptation.replace(train=train)), jnp.ones((3, 4))
    ... )
    >>> jax.grad(of)(adaptation.train)["sites"]["kernel"]["b"].shape
    (2, 6)
    >>> state = lrx.galore(1e-2, rank=2).init(params)
    >>> value, grads = lrx.projected_value_and_grad(loss, lrx.taps(state))(params, jnp.ones((3, 4)))
    >>> grads["kernel"].low.shape, grads["bias"].shape
    ((2, 6), (6,))
    """
    model = nnx.merge(graphdef, *map(_hold, states))
    for keys, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module):
            continue
        special = {
            name: value.get_raw_value().value
            for name, value in vars(module).items()
            if _is_held(value)
        }
        path = "/".join(map(str, keys)) or type(module).__name__
        if is_host(module) and leaf_of(module) in special:
            _prepare(module, special[leaf_of(module)], path)
        elif not is_host(module) and special and flax_class(module) is not nnx.Module:
            (name, value), *_ = special.items()
            raise _refused(module, name, value, path)
    return model


def _prepare(module: nnx.Module, value: Any, path: str) -> None:
    """Makes a layer multiply by a kernel, if it can."""
    if isinstance(value, Tapped) and isinstance(module, nnx.Conv | nnx.Embed):
        raise _refused(module, leaf_of(module), value, path)
    product_fields(module, value, path)
    become_host(module)


def _refused(module: nnx.Module, name: str, value: Any, path: str) -> ValueError:
    done, remedy = "tapped or quantised", "Views(rules=((path, None),))"
    if isinstance(value, AdaptedKernel):
        done, remedy = "adapted", "exclude=, or give the model lrx.effective(params, adaptations)"
    return ValueError(
        f"{path}: {name} of nnx.{flax_class(module).__name__} is {done}, but only kernels of "
        "nnx.Linear, nnx.LinearGeneral and nnx.Einsum can be, and untapped nnx.Conv and nnx.Embed; "
        "leave it out with " + remedy
    )


def _hold(state: Any) -> Any:
    """A state whose special values are held; the same object where there are none.

    A merged model shares its Variables with the states, so theirs must not be changed in place.
    """

    def is_special(node: Any) -> bool:
        return not isinstance(node, nnx.Variable) and layers.is_special(
            node
        )  # a Variable has its value's attributes

    leaves, treedef = jax.tree.flatten(state, is_leaf=is_special)
    if not any(map(is_special, leaves)):
        return state
    carry = lambda leaf: leaf.carried() if isinstance(leaf, AdaptedKernel) else leaf  # noqa: E731
    return jax.tree.unflatten(
        treedef, [Held(carry(leaf)) if is_special(leaf) else leaf for leaf in leaves]
    )


def _is_held(value: Any) -> bool:
    return isinstance(value, nnx.Variable) and isinstance(value.get_raw_value(), Held)
