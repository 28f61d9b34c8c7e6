"""The layers of nnx that multiply by a kernel which is more than an array.

A layer becomes one of these classes in place (`become_host`). Its own call then runs Flax's code on
a stand-in for the layer, whose kernel is the array alone, which Flax promotes, and whose product
knows the rest. Nothing is written to the layer itself, so that it stays as static as it was where a
scan or a jit within the model splits and merges it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lowrank_jax.adapters import layers
from lowrank_jax.adapters.hosts import AdaptedKernel, attend, embed

ADAPTERS = "_adapters"


class _StandIn:
    """A module seen with some of its fields replaced."""

    def __init__(self, module: nnx.Module, **fields: Any):
        vars(self).update(fields, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """The value of a Variable that is no array: `variable[...]`, by which modules read it, gives
    the value."""

    value: Any

    def __getitem__(self, index: Any) -> Any:
        if index is not Ellipsis:
            raise TypeError(
                "a tapped, adapted or quantised parameter can be read as a whole only, [...], not "
                f"[{index!r}]"
            )
        return self.value

    def __jax_array__(self) -> jax.Array:
        return self.value.__jax_array__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "value":
            raise AttributeError(name)
        return getattr(self.value, name)  # of a kernel with adapters mostly an error that names it


def leaf_of(module: Any) -> str:
    """The name of the kernel of a layer."""
    return "embedding" if isinstance(module, nnx.Embed) else "kernel"


def kernel_of(module: Any) -> Any:
    """The kernel of a layer with everything that belongs to it."""
    leaf = leaf_of(module)
    value = vars(module)[leaf].get_value()
    value = value.value if isinstance(value, Held) else value
    own = tuple(one.bound() for one in getattr(module, leaf + ADAPTERS, ()))
    if not own:
        return value
    before = value.bound if isinstance(value, AdaptedKernel) else ()
    return AdaptedKernel(layers.base(value), (*before, *own))


def product_fields(module: Any, value: Any, where: str) -> dict[str, Any]:
    """The fields by which Flax's call of a layer multiplies by `value`; ValueError, naming the
    layer, if it cannot."""
    if isinstance(module, nnx.Embed):
        return {}
    if isinstance(module, nnx.Einsum):
        return {"einsum_op": layers.einsum_of(value, module.einsum_op, where)}
    if isinstance(module, nnx.Conv):
        own = module.conv_general_dilated
        return {"conv_general_dilated": layers.convolution_of(value, own, where, module)}
    own, cls = module.dot_general, getattr(module, "dot_general_cls", None)
    own = cls() if cls is not None else own or jax.lax.dot_general
    return {"dot_general": layers.product_of(value, own, where), "dot_general_cls": None}


def _multiply(module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`call(module, ...)`, Flax's own, by the module's kernel."""
    value = kernel_of(module)
    if not layers.is_special(value):
        return call(_StandIn(module, kernel={...: value}), *args, **kwargs)
    fields = product_fields(module, value, type(module).__name__)
    array = layers.array_of(value, module.param_dtype)
    return call(_StandIn(module, kernel={...: array}, **fields), *args, **kwargs)


class AdaptedLinear(nnx.Linear):
    """`nnx.Linear`, whose kernel may be more than an array."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _multiply(self, nnx.Linear.__call__, args, kwargs)


class AdaptedLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral`, whose kernel may be more than an array."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _multiply(self, nnx.LinearGeneral.__call__, args, kwargs)


class AdaptedEinsum(nnx.Einsum):
    """`nnx.Einsum`, whose kernel may be more than an array."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _multiply(self, nnx.Einsum.__call__, args, kwargs)


class AdaptedConv(nnx.Conv):
    """`nnx.Conv`, whose kernel may be more than an array."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _multiply(self, nnx.Conv.__call__, args, kwargs)


class AdaptedEmbed(nnx.Embed):
    """`nnx.Embed`, whose table may be more than an array."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        value = layers.table(kernel_of(self), self.param_dtype)
        return embed(inputs, value, self._by(nnx.Embed.__call__, out_sharding))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        value = layers.table(kernel_of(self), self.param_dtype)
        query, _ = self.promote_dtype((query, layers.base(value)), dtype=self.dtype)
        return attend(query, value, self._by(nnx.Embed.attend, out_sharding))

    def _by(
        self, call: Callable[..., Any], out_sharding: Any
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Flax's method as a function of its input and any table."""
        return lambda x, table: call(_StandIn(self, embedding={...: table}), x, out_sharding)


HOSTS: dict[type, type] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Conv: AdaptedConv,
    nnx.Embed: AdaptedEmbed,
}


def derived(name: str, cls: Any, *bases: type, **attributes: Any) -> Any:
    """A class that derives from `cls`, and behind it from others, and is to Flax what it is."""
    attributes |= {"__module__": cls.__module__}
    return type(cls)(name + cls.__name__, (cls, *bases), attributes, pytree=cls._pytree__is_pytree)


@functools.cache
def host_class(cls: type) -> type:
    """The class to which a layer of this class changes; the same for all of them.

    In the order of its bases ours stands directly before Flax's, so that a derived class keeps what
    it adds.
    """
    flax_class, ours = next(
        (theirs, ours) for theirs, ours in HOSTS.items() if issubclass(cls, theirs)
    )
    if issubclass(cls, ours):
        return cls
    return ours if cls is flax_class else derived("Adapted", cls, ours)


def become_host(module: nnx.Module) -> None:
    """Changes the class of a layer in place, to one that multiplies by its kernel whatever that
    is."""
    set_class(module, host_class(type(module)))


def set_class(module: nnx.Module, cls: type) -> None:
    """Gives a module another class; Flax keeps no account of it among the module's attributes."""
    object.__setattr__(module, "__class__", cls)


def is_host(module: Any) -> bool:
    """Whether a module is a layer whose kernel may be more than an array."""
    return isinstance(module, tuple(HOSTS))


def flax_class(module: nnx.Module) -> type:
    """The class of Flax that a module is, or is derived from."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] == "flax")
