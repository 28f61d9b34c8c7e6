"""How torch names and stores what stands in a Flax tree: one torch parameter for each matrix or
vector of a leaf.

    Linear      W (m, n) = Kᵀ, inputs in the order of the view's row axes
    Embedding   W (V, d) = K
    Conv        W (c_out, c_in, window...) of K (window..., c_in, c_out)

A view folds the window and the input channels of a convolution into rows with the channels last;
torch has them first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.base import Site
from lowrank_jax.matrices import DENSE, MatrixView, Shape
from lowrank_jax.resolution import Views, is_stacked
from lowrank_jax.trees import leaves_with_metadata
from lowrank_jax.typing import Kernel, Pytree

Names = Callable[..., str]
WEIGHTS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
MATRICES = ("kernel", "embedding")


def linen_name(path: str, index: int | None = None) -> str:
    """The torch name of a leaf of a plain linen tree: dots for slashes; kernel, embedding and scale
    become weight.

    Raises:
      ValueError: for a stack, whose layers have no names here.

    >>> linen_name("encoder/dense_0/kernel"), linen_name("head/bias")
    ('encoder.dense_0.weight', 'head.bias')
    """
    if index is not None:
        raise ValueError(
            f"{path!r} is a stack, and torch has a module for each of its matrices: say which in "
            "names="
        )
    *module, leaf = path.split("/")
    return ".".join([*module, WEIGHTS.get(leaf, leaf)])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one torch parameter is placed.

    Attributes:
      name: torch's, "model.layers.3.self_attn.q_proj.weight"; "mlp.experts.down_proj[3]" of one
        matrix of a parameter that holds several.
      path: of the leaf.
      index: along the flattened batch axes of the leaf; None for a leaf without.
    """

    name: str
    path: str
    index: int | None

    @property
    def module(self) -> str:
        """The torch module; of a matrix of experts, which has none of its own, its name."""
        return self.name if self.name.endswith("]") else self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def number(self) -> int:
        """The index, 0 for a leaf without batch axes."""
        return self.index or 0


@dataclasses.dataclass(frozen=True)
class Host:
    """The torch module of one matrix `(n, m)`.

    Attributes:
      kind: "linear", "embedding" or "conv".
      n, m: rows (inputs) and columns (outputs).
      window: of a convolution.

    >>> Host("conv", 18, 4, (3, 3)).down_shape(2), Host("linear", 18, 4).up_shape(2)
    ((2, 2, 3, 3), (4, 2))
    """

    kind: str
    n: int
    m: int
    window: Shape = ()

    @classmethod
    def of(cls, site: Site, convolutions: Sequence[str]) -> Host:
        """Of a site. A view that folds all axes but the last into rows is that of a convolution;
        with one window axis it is also that of a projection from heads, so `convolutions` names
        those."""
        rows, taken = site.view.rows, len(site.view.batch)
        if site.lookup:
            return cls("embedding", site.n, site.m)
        folded = rows == tuple(range(taken, len(site.shape) - 1)) and len(rows) > 1
        if folded and (
            len(rows) > 2 or any(re.fullmatch(pattern, site.path) for pattern in convolutions)
        ):
            return cls("conv", site.n, site.m, tuple(site.shape[axis] for axis in rows[:-1]))
        return cls("linear", site.n, site.m)

    @property
    def points(self) -> int:
        """Size of the window."""
        return math.prod(self.window)

    def down_shape(self, rank: int) -> Shape:
        """Of the module from the inputs to r channels."""
        return (rank, self.n // self.points, *self.window)

    def up_shape(self, rank: int) -> Shape:
        """Of the module from r channels to the outputs."""
        return (self.m, rank, *(1 for _ in self.window))

    @property
    def vector_shape(self) -> Shape:
        """Of one number for each output, as DoRA stores them."""
        return (1, self.m, *(1 for _ in self.window)) if self.window else (self.m,)

    @property
    def weight_shape(self) -> Shape:
        """Of torch's own weight."""
        return (self.n, self.m) if self.kind == "embedding" else self.down_shape(self.m)

    def torch_rows(self, x: np.ndarray) -> np.ndarray:
        """`(n, ...)` with the channels of a convolution before its window."""
        return np.swapaxes(x.reshape(self.points, -1, *x.shape[1:]), 0, 1).reshape(x.shape)

    def flax_rows(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `torch_rows`."""
        return np.swapaxes(x.reshape(-1, self.points, *x.shape[1:]), 0, 1).reshape(x.shape)

    def down(self, a: np.ndarray) -> np.ndarray:
        """`(n, r)` as torch's first module."""
        return self.torch_rows(a).T.reshape(self.down_shape(a.shape[1]))

    def from_down(self, weight: np.ndarray) -> np.ndarray:
        """The inverse of `down`."""
        return self.flax_rows(weight.reshape(weight.shape[0], self.n).T)

    def up(self, b: np.ndarray) -> np.ndarray:
        """`(r, m)` as torch's second module."""
        return b.T.reshape(self.up_shape(b.shape[0]))

    def from_up(self, weight: np.ndarray) -> np.ndarray:
        """The inverse of `up`."""
        return weight.reshape(self.m, -1).T

    def weight(self, kernel: np.ndarray) -> np.ndarray:
        """`K (n, m)` as torch's own weight."""
        return kernel if self.kind == "embedding" else self.down(kernel)

    def kernel(self, weight: np.ndarray) -> np.ndarray:
        """The inverse of `weight`."""
        return weight if self.kind == "embedding" else self.from_down(weight)


@dataclasses.dataclass(frozen=True)
class Tree:
    """The leaves of a parameter tree with what torch calls them.

    Attributes:
      params: the tree.
      leaves: `{path: leaf}`.
      views: `{path: view}` of kernels and embeddings; None where the axes are not claimed.
      leads: `{path: sizes of the batch axes}`.
      places: `{torch's name: place}`, in the order of the tree.
      convolutions: patterns.
      claimed: paths of leaves that `views` say are matrices, whatever their names.
    """

    params: Pytree
    leaves: dict[str, Any]
    views: dict[str, MatrixView | None]
    leads: dict[str, Shape]
    places: dict[str, Place]
    convolutions: tuple[str, ...]
    claimed: set[str]

    @classmethod
    def of(cls, params: Pytree, names: Names, views: Views, convolutions: Sequence[str]) -> Tree:
        """ValueError where two leaves have one name, or from `names`."""
        tree = cls(params, {}, {}, {}, {}, tuple(convolutions), set())
        for path, node, axes in leaves_with_metadata(params):
            shape, layered = tuple(node.shape), is_stacked(path, axes, views)
            rules = [
                view
                for pattern, view in views.rules
                if view is not None and re.fullmatch(pattern, path)
            ]
            inferred = None if views.inferred is None else views.inferred.at(path, shape).view
            view = rules[0] if rules else DENSE if len(shape) - layered == 2 else None
            view = view.stacked() if view is not None and layered else view
            if not rules and inferred is not None:
                view = inferred  # of the whole leaf, layers and all
            if rules or inferred is not None:
                tree.claimed.add(path)
            lead = shape[:1] if layered else ()
            if view is not None:
                lead = tuple(shape[axis] for axis in view.batch)
            tree.leaves[path], tree.views[path], tree.leads[path] = node, view, lead
            for index in range(math.prod(lead)) if lead else [None]:
                name = names(path, index)
                if name in tree.places:
                    raise ValueError(
                        f"names: {tree.places[name].path!r} and {path!r} are both {name!r}"
                    )
                tree.places[name] = Place(name, path, index)
        unused = [p for p in convolutions if not any(re.fullmatch(p, path) for path in tree.leaves)]
        if unused:
            raise ValueError(f"convolutions: {unused} match no leaf of {list(tree.leaves)[:12]}")
        return tree

    @property
    def matrices(self) -> dict[str, Place]:
        """`{torch's module: place of its matrix}`, of the modules that an adapter may sit on."""
        return {place.module: place for place in self.places.values() if self.is_matrix(place)}

    @property
    def modules(self) -> list[str]:
        """Every torch module, and those that they are parts of."""
        parts = [place.module.split(".") for place in self.places.values()]
        return list(
            dict.fromkeys(".".join(part[: i + 1]) for part in parts for i in range(len(part)))
        )

    def at(self, path: str) -> list[Place]:
        """The places of a leaf, along its batch axes."""
        return [place for place in self.places.values() if place.path == path]

    def site(self, path: str) -> Site:
        """The site of a kernel or embedding; ValueError where its axes are not claimed."""
        view, shape = self.views[path], tuple(self.leaves[path].shape)
        if view is None:
            raise ValueError(
                f"{path!r} of shape {shape}: say in views= which axes are inputs, outputs and "
                "layers"
            )
        return Site(
            path=path, shape=shape, view=view, lookup=path.rsplit("/", 1)[-1] == "embedding"
        )

    def host(self, path: str) -> Host:
        """The kind of torch module of a kernel or embedding."""
        return Host.of(self.site(path), self.convolutions)

    def is_linear(self, path: str) -> bool:
        """Whether a kernel is that of a dense layer."""
        return self.views[path] is not None and self.host(path).kind == "linear"

    def is_matrix(self, place: Place) -> bool:
        """Whether the parameter is one that an adapter may sit on."""
        return (place.leaf in MATRICES or place.path in self.claimed) and len(
            self.leaves[place.path].shape
        ) > len(self.leads[place.path]) + 1

    def shape(self, place: Place) -> Shape:
        """Of the torch parameter."""
        if self.is_matrix(place):
            return self.host(place.path).weight_shape
        return (math.prod(self.leaves[place.path].shape[len(self.leads[place.path]) :]),)

    def parameter(self, place: Place, leaf: Kernel) -> np.ndarray:
        """The torch parameter out of a leaf like the one in the tree."""
        if not self.is_matrix(place):
            return np.asarray(leaf).reshape(math.prod(self.leads[place.path]), -1)[place.number]
        site, host = self.site(place.path), self.host(place.path)
        matrices = np.asarray(site.view.to_matrices(leaf)).reshape(-1, host.n, host.m)
        return host.weight(matrices[place.number])

    def whole(self, path: str, parameters: Sequence[np.ndarray]) -> jax.Array:
        """The leaf of which these are the torch parameters, in the dtype of the tree's."""
        like, places = self.leaves[path], self.at(path)
        if not self.is_matrix(places[0]):
            return jnp.asarray(np.stack(parameters), like.dtype).reshape(like.shape)
        site, host = self.site(path), self.host(path)
        kernels = np.stack([host.kernel(parameter) for parameter in parameters])
        matrices = jnp.asarray(kernels, like.dtype).reshape(*site.lead, host.n, host.m)
        return site.view.from_matrices(matrices, tuple(like.shape))
