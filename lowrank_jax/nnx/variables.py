"""Types of Variables in models with adapters. None is an `nnx.Param`, so nothing trains that is not
named."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lowrank_jax.adapters.hosts import RawKernelError

_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_ARRAYS = (
    "T",
    "mT",
    "at",
    "astype",
    "reshape",
    "transpose",
    "swapaxes",
    "ravel",
    "flatten",
    "take",
    "dot",
)


class AdapterParam(nnx.Variable):
    """What trains: the trained arrays of adapters, and leaves that are trained in full."""


class AdapterConstant(nnx.Variable):
    """Frozen arrays of adapters: scales, index maps, banks, offsets, and keys of dropout."""


class FrozenParam(nnx.Variable):
    """A parameter of the base model, which does not train."""


class AdaptedParam(FrozenParam):
    """A kernel with adapters beside it, which the call of its model attaches.

    A use as an array outside of that call would pass them by, and is an error that names it;
    `get_value()` gives the base array, as `nnx.to_pure_dict`, checkpoints and optimizers need it, and
    it can be assigned as any Variable.
    """

    def raw(self, what: str) -> RawKernelError:
        """The error of such a use."""
        return RawKernelError(
            f"adapters of {self.get_metadata('adapted')!r}: the kernel {what}, outside of the call "
            "of its model, which would pass its adapters by. Call the model; another method, or a "
            "part of it, by lrx.nnx.adapted(function)(model, ...), such as "
            "lrx.nnx.adapted(nnx.Embed.attend)(layer, x); get_value() gives the array of the base "
            "model"
        )

    @property
    def is_read(self) -> bool:
        """Whether it stands in the program of a call, where it is an array of which adapters know."""
        return bool(self.get_metadata("reading", False))

    def __getitem__(self, index: Any) -> Any:
        if not self.is_read:
            raise self.raw(f"is read, [{'...' if index is Ellipsis else index}]")
        return super().__getitem__(index)

    def __jax_array__(self) -> Any:
        if not self.is_read:
            raise self.raw("is used as an array")
        return super().__jax_array__()

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAYS and not self.is_read:
            raise self.raw(f"is asked for .{name}")
        return super().__getattr__(name)


def _refused(name: str) -> Any:
    own = getattr(nnx.Variable, name)

    def operator(self: AdaptedParam, *others: Any) -> Any:
        if not self.is_read:
            raise self.raw("is an operand")
        return own(self, *others)

    operator.__name__ = name
    return operator


for _name in (
    *(f"__{name}__" for name in _OPERATORS),
    *(f"__r{name}__" for name in _OPERATORS),
    "__neg__",
    "__abs__",
):
    setattr(AdaptedParam, _name, _refused(_name))
