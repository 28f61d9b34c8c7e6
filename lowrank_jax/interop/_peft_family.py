"""What differs from one PEFT method to the next: its tensors, its configuration, and which of our
adapters it is.

A `Family` speaks of one matrix at a time, at that matrix's own rank; tensors are NumPy arrays as
torch stores them. `lowrank_jax.interop.peft` does the rest: which modules, which keys, stacks,
leaves trained in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lowrank_jax.adapters.base import Adapter, Arrays
from lowrank_jax.interop._peft_config import by_pattern
from lowrank_jax.interop._torch_layout import Host
from lowrank_jax.matrices import Shape
from lowrank_jax.typing import Scalar

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the modules of a file share: trained and frozen arrays, and frozen ones of single
    modules."""

    train: Arrays = dataclasses.field(default_factory=dict)
    frozen: Arrays = dataclasses.field(default_factory=dict)
    modules: Mapping[str, Arrays] = dataclasses.field(default_factory=dict)


class Family:
    """One `peft_type`.

    Class attributes:
      peft_type: its name.
      adapters: ours, just these types.
      bias: the value of `bias` that trains biases beside adapted modules; "" where the method has
      none. hosts: kinds of torch modules that it sits on in PEFT.
      required: fields of the configuration that must be there.
      reads: those that it understands beside.
      free: fields of any value: how arrays started, and what torch calls the base.
      options: fields that the caller of `save` may set.
    """

    peft_type: ClassVar[str]
    adapters: ClassVar[tuple[type[Adapter], ...]]
    bias: ClassVar[str] = ""
    hosts: ClassVar[tuple[str, ...]] = ("linear",)
    required: ClassVar[tuple[str, ...]] = ("r",)
    reads: ClassVar[frozenset[str]] = frozenset()
    free: ClassVar[frozenset[str]] = frozenset({"init_weights", "fan_in_fan_out"})
    options: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out"})

    # reading

    def problems(self, config: Config) -> list[str]:
        """Values of understood fields that are not supported, with the reason."""
        del config
        return []

    def sits_on(self, host: Host) -> bool:
        """Whether PEFT has the method for this kind of module."""
        return host.kind in self.hosts

    def size_of(self, config: Config, module: str) -> int:
        """r of one module, or whatever else sets the size of its tensors."""
        return by_pattern(config.get("rank_pattern"), module, config["r"])

    def stored_size(self, config: Config, module: str, shapes: Mapping[str, Any]) -> int:
        """As `size_of`, by the shapes of the file's tensors where PEFT does not keep to the
        configuration."""
        del shapes
        return self.size_of(config, module)

    def alpha(self, config: Config, module: str) -> float | None:
        """alpha of one module; None for a method without."""
        del config, module
        return None

    def make(self, config: Config, host: Host, size: int) -> Adapter:
        """Our adapter of a leaf whose largest size is given."""
        raise NotImplementedError

    def shapes(self, config: Config, host: Host, size: int) -> dict[str, Shape]:
        """`{end of the key: shape}` of one module."""
        raise NotImplementedError

    def read(
        self, adapter: Adapter, host: Host, tensors: Tensors, kernel: Callable
    ) -> tuple[Arrays, Arrays]:
        """`(trained, frozen)` arrays of one module, at its own rank, which `adapter` has;
        `kernel()` is `K (n, m)`."""
        raise NotImplementedError

    def copies(self, config: Config) -> Mapping[str, str]:
        """`{end of the key: key}` of shared tensors that a file may hold once more for a module."""
        del config
        return {}

    def shared_shapes(self, config: Config, hosts: Mapping[str, Host]) -> dict[str, Shape]:
        """`{key: shape}` of what the modules share."""
        del config, hosts
        return {}

    def shared(
        self, config: Config, hosts: Mapping[str, Host], tensors: Tensors, order: Callable
    ) -> Shared:
        """What the modules share. `order()` gives the modules in the order of torch's traversal."""
        del config, hosts, tensors, order
        return Shared()

    # writing

    def fields(
        self, made: Sequence[tuple[Adapter, Host]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Fields of the configuration beside ranks and alphas; `common` refuses what PEFT has once
        for all modules."""
        raise NotImplementedError

    def write(
        self, adapter: Adapter, host: Host, p: Arrays, rank: int, fold: Any
    ) -> dict[str, np.ndarray]:
        """`{end of the key: tensor}` of one module. `fold` (r,) or () is what `scale` holds beyond
        the adapter's own scaling, which the tensors take up; None where it holds nothing else."""
        raise NotImplementedError

    def written(
        self, adapter: Adapter, p: Arrays, rank: int, alpha: Scalar | None
    ) -> tuple[int, Any]:
        """The size and alpha of one module as they are written."""
        del adapter, p
        return rank, alpha

    def sizes(self, sizes: Mapping[str, int], alphas: Mapping[str, Any]) -> dict[str, Any]:
        """Fields for the sizes and alphas of modules."""
        del alphas
        return {"r": common("rank", sizes.values())}

    def evened(
        self, tensors: dict[str, np.ndarray], sizes: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        """`{key: tensor}` of all modules as PEFT loads them, where it has one size for all."""
        del sizes
        return tensors

    def write_shared(
        self,
        adapter: Adapter,
        hosts: Mapping[str, Host],
        p: Mapping[str, Arrays],
        shared: Arrays,
        options: Mapping[str, Any],
        order: Callable,
    ) -> dict[str, np.ndarray]:
        """`{key: tensor}` of what the modules share; `p` holds the arrays of each module."""
        del adapter, hosts, p, shared, options, order
        return {}


def largest(hosts: Mapping[str, Host]) -> tuple[int, int]:
    """The largest n and m."""
    return max(host.n for host in hosts.values()), max(host.m for host in hosts.values())


def common(field: str, values: Any) -> Any:
    """The one value; ValueError if there are several."""
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise ValueError(
            f"{field}: the adapters have {found}, a PEFT file has one; save them as several "
            "adaptations"
        )
    return found[0]


def folded(array: np.ndarray, fold: Any) -> np.ndarray:
    """The array with what the scale holds, along its first axis where that is a vector."""
    if fold is None:
        return array
    return array * np.reshape(fold, np.shape(fold) + (1,) * (array.ndim - np.ndim(fold)))


def unfoldable(fold: Any, family: Family) -> None:
    """ValueError where a scale cannot be written."""
    if fold is not None:
        raise ValueError(
            f"scale: a {family.peft_type} file holds no weights; set the scale back to 1 before "
            "saving"
        )
