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
    """A kernel whose layer multiplies by it with its adapters.

    Any other use as an array would pass them by, and is an error that names it; `get_value()` gives
    the base array, as `nnx.to_pure_dict`, checkpoints and optimizers need it, and it can be
    assigned as any Variable.
    """

    def raw(self, what: str) -> RawKernelError:
        """The error of such a use."""
        return RawKernelError(
            f"adapters of {self.get_metadata('adapted')!r}: the kernel {what}, outside of its "
            "layer, which would pass its adapters by. Call the layer (nnx.Embed has attend), or "
            "compute with lrx.effective(params, adaptation); get_value() gives the array of the "
            "base model"
        )

    def __getitem__(self, index: Any) -> Any:
        raise self.raw(f"is read, [{'...' if index is Ellipsis else index}]")

    def __jax_array__(self) -> Any:
        raise self.raw("is used as an array")

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAYS:
            raise self.raw(f"is asked for .{name}")
        return super().__getattr__(name)


def _refused(name: str) -> Any:
    def operator(self: AdaptedParam, *others: Any) -> Any:
        raise self.raw("is an operand")

    operator.__name__ = name
    return operator


for _name in (
    *(f"__{name}__" for name in _OPERATORS),
    *(f"__r{name}__" for name in _OPERATORS),
    "__neg__",
    "__abs__",
):
    setattr(AdaptedParam, _name, _refused(_name))
