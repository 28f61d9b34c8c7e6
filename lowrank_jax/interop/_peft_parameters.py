"""Experts in PEFT's files: `target_parameters`.

Where torch holds all experts in one parameter `(E, ., .)` of a module, PEFT has one pair of modules
for it, whose tensors hold the factors of every expert:

    lora_A.weight (E r, n)    an expert's r rows after the other's
    lora_B.weight (m, r E)    of each of the r columns, the experts' after one another

The parameters of one module are wrapped one in the other, the last one outermost, so that the keys
of all but the last have `base_layer.` before them, once for each that follows. Here an expert's
matrix is a module of its own named `mlp.experts.down_proj[3]`, and everything else treats it as one.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.interop import safetensors
from lowrank_jax.interop._peft_config import PREFIX, matches, parameter_of
from lowrank_jax.interop._torch_layout import Tree

FIELD = "target_parameters"
DOWN, UP = "lora_A.weight", "lora_B.weight"
# the order in which transformers makes the parameters of its experts
REGISTERED = ("gate_up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of experts.

    Attributes:
      name: "mlp.experts.down_proj".
      experts: the names of its matrices, in the order of their index.
      depth: how many parameters of its module are wrapped around it.
    """

    name: str
    experts: tuple[str, ...]
    depth: int

    def key(self, end: str) -> str:
        """Of a tensor of the file."""
        module = self.name.rpartition(".")[0]
        return f"{PREFIX}{module}.{'base_layer.' * self.depth}{end}"


def find(experts: Iterable[str], order: Sequence[str] | None) -> list[Parameter]:
    """The parameters of these matrices.

    Args:
      experts: names of matrices of parameters, in any order.
      order: names in the order in which torch made their parameters; None where it is known.

    Raises:
      ValueError: several parameters of a module whose order nobody says.
    """
    found: dict[str, list[str]] = {}
    for matrix in sorted(experts, key=_index):
        found.setdefault(parameter_of(matrix), []).append(matrix)
    made = []
    by_module = lambda name: name.rpartition(".")[0]  # noqa: E731
    for _, names in itertools.groupby(sorted(found, key=by_module), by_module):
        ordered = _in_order(list(names), order)
        for depth, name in enumerate(reversed(ordered)):
            made.append(Parameter(name, tuple(found[name]), depth))
    return made


def _index(matrix: str) -> int:
    return int(matrix[matrix.rindex("[") + 1 : -1])


def _in_order(names: list[str], order: Sequence[str] | None) -> list[str]:
    """The parameters of one module as torch made them."""
    if len(names) == 1:
        return names
    said = [parameter_of(name) for name in order or ()]
    if all(name in said for name in names):
        return sorted(names, key=said.index)
    last = {name: name.rpartition(".")[2] for name in names}
    if set(last.values()) <= set(REGISTERED):
        return sorted(names, key=lambda name: REGISTERED.index(last[name]))
    raise ValueError(
        f"order: {sorted(names)} are parameters of one module, and the file depends on the order in which "
        "torch makes them: give their names in it"
    )


class Opened(Mapping[str, np.ndarray]):
    """The tensors of a file, those of experts one by one.

    Attributes:
      path, shapes: as `safetensors.Reader` has them.
    """

    def __init__(self, tensors: safetensors.Reader, parameters: Sequence[Parameter]):
        self.path: pathlib.Path = tensors.path
        self._tensors = tensors
        # by key of an expert: the key of the file, the expert's place and how many there are
        self._of: dict[str, tuple[str, int, int]] = {}
        self.shapes: dict[str, Any] = dict(tensors.shapes)
        for parameter in parameters:
            self._open(parameter)

    def _open(self, parameter: Parameter) -> None:
        """Replaces the tensors of a parameter by those of its experts."""
        count = len(parameter.experts)
        for end, axis in ((DOWN, 0), (UP, 1)):
            key = parameter.key(end)
            whole = self.shapes.pop(key, None)
            if whole is None:
                continue  # listed as missing, expert by expert, where everything is compared
            if len(whole.shape) != 2 or whole.shape[axis] % count:
                raise ValueError(
                    f"{self.path}: {key} is {tuple(whole.shape)}, which {count} experts of "
                    f"{parameter.name!r} cannot share along axis {axis}"
                )
            shape = list(whole.shape)
            shape[axis] //= count
            for number, matrix in enumerate(parameter.experts):
                own = f"{PREFIX}{matrix}.{end}"
                self._of[own] = key, number, count
                self.shapes[own] = jax.ShapeDtypeStruct(tuple(shape), whole.dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._of:
            return self._tensors[name]
        key, number, count = self._of[name]
        whole = self._tensors[key]
        if key.endswith(DOWN):
            return whole.reshape(count, -1, whole.shape[1])[number]  # (r, n)
        return whole.reshape(whole.shape[0], -1, count)[..., number]  # (m, r)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def opened(
    config: Mapping[str, Any],
    tree: Tree,
    tensors: safetensors.Reader,
    order: Sequence[str] | None,
) -> safetensors.Reader | Opened:
    """The tensors of a file; ValueError where `target_parameters` takes none of the tree's."""
    targets = config.get(FIELD)
    if not targets:
        return tensors
    matrices = [name for name in tree.matrices if parameter_of(name) != name]
    taken = [name for name in matrices if matches(targets, parameter_of(name))]
    if not taken:
        known = list(dict.fromkeys(parameter_of(name) for name in matrices))
        raise ValueError(
            f"{FIELD}={sorted(targets)} takes none of the parameters that names= gives, which are "
            f"{known[:8]}: name each matrix of a parameter of experts by its index, "
            "'mlp.experts.down_proj[3]'"
        )
    return Opened(tensors, find(taken, order))


def closed(
    tensors: Mapping[str, np.ndarray], tree: Tree, experts: Sequence[str], order: Any
) -> dict[str, np.ndarray]:
    """The tensors as a file has them: the experts of a parameter in one.

    Raises:
      ValueError: some experts have no adapter, or one that is no plain LoRA of one rank.
    """
    made = dict(tensors)
    for parameter in find(experts, order):
        every = [name for name in tree.matrices if parameter_of(name) == parameter.name]
        missing = sorted({*every} - {*parameter.experts}, key=_index)
        if missing:
            raise ValueError(
                f"{missing} have no adapter: PEFT adapts all matrices of a parameter or none; adapt "
                "them too, with factors of zero"
            )
        downs, ups = (
            [made.pop(f"{PREFIX}{matrix}.{end}") for matrix in parameter.experts]
            for end in (DOWN, UP)
        )
        if len({down.shape for down in downs}) > 1:
            raise ValueError(
                f"{parameter.name!r}: its matrices have ranks {[len(down) for down in downs]}, and "
                "PEFT has one for all matrices of a parameter"
            )
        made[parameter.key(DOWN)] = np.concatenate(downs)  # (E r, n)
        stack = np.stack(ups, axis=-1)  # (m, r, E)
        made[parameter.key(UP)] = stack.reshape(len(stack), -1)
    extra = [key for key in made if re.search(r"\[\d+\]\.", key)]
    if extra:
        raise ValueError(
            f"{', '.join(extra[:8])}: PEFT adapts parameters by plain LoRA alone, without magnitudes"
        )
    return made


def targets(experts: Iterable[str], tree: Tree) -> list[str]:
    """A `target_parameters` that takes just the parameters of these matrices."""
    adapted = sorted({parameter_of(name) for name in experts})
    every = {parameter_of(name) for name in tree.matrices}
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    is_enough = sorted(name for name in every if matches(ends, name)) == adapted
    return ends if is_enough else adapted
