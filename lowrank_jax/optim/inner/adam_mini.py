"""Adam-mini: one second moment for each block of a matrix."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from lowrank_jax.checks import is_integer
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.optim.inner.adam import Adam
from lowrank_jax.typing import Shape

# Leaves of queries and keys, by the names that flax, MaxText and Hugging Face give them.
QUERIES_AND_KEYS = r"(.*[/_.])?(query|key|q_proj|k_proj|wq|wk)([/_.].*)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamMini(Adam):
    """Adam-mini (Zhang et al., 2024): Adam with one step size for each block of entries whose Hessian
    is dense, so that second moments cost next to nothing.

    `m` is Adam's, and `v <- b2 v + (1 - b2) mean_block(g²)`. A block is one head of queries and keys,
    and of other matrices what makes one output. Where a basis shrinks the outputs, each row of the
    low-rank object is a direction of outputs and a block. Leaves without a view, such as biases and
    embeddings that are not projected, are Adam's. State of `(r, k)`: `r k` float32, a count, and as
    many float32 as there are blocks.

    Paper: https://arxiv.org/abs/2406.16793. Its code (zyushun/Adam-mini) counts a key's heads as the
    query's, which is wrong with grouped queries; here each leaf has its own, from its view.

    Args:
      b1, b2, eps, convention, mu_dtype, nu_dtype: of `adam`.
      heads: `((pattern, number), ...)`, how many heads the outputs of a leaf hold, where its whole
        path matches, or 0 for a block an output; the first pattern wins. Of leaves that none
        matches, those named as queries or keys have as many as their view says: the first of several
        axes of outputs, `(heads, head_dim)`.

    Raises:
      ValueError: for a rule that is no pair of a pattern and a number, and at `init` for heads that
        do not divide the outputs.

    >>> import jax.numpy as jnp
    >>> import lowrank_jax as lrx
    >>> params = {name: {"kernel": jnp.ones((8, n, 4))} for name, n in (("query", 4), ("key", 2))}
    >>> views = lrx.Views(rules=((".*", lrx.MatrixView(rows=(0,), cols=(1, 2))),))
    >>> identity = lrx.projectors.identity()
    >>> tx = lrx.scale_by_projection(identity, inner=lrx.inner.adam_mini(), views=views)
    >>> state = tx.init(params)  # rows are the smaller or first dimension, columns blocks
    >>> [state.matrices[name]["kernel"].inner.nu.shape for name in params]
    [(1, 4), (1, 2)]
    """

    heads: tuple[tuple[str, int], ...] = ()
    elementwise = False

    def __post_init__(self):
        super().__post_init__()
        for rule in self.heads:
            if not (len(rule) == 2 and isinstance(rule[0], str) and is_integer(rule[1])):
                raise ValueError(
                    f"adam_mini: heads={self.heads!r} must be pairs of a pattern and a number"
                )

    def _heads(self, view: ResolvedView) -> int:
        """How many heads the outputs of a leaf are, or 0 for no heads."""
        for pattern, heads in self.heads:
            if re.fullmatch(pattern, view.path):
                if heads < 0 or (heads and view.fan_out % heads):
                    raise ValueError(
                        f"adam_mini: heads={heads} of {view.path!r} must be 0 or divide its "
                        f"{view.fan_out} outputs"
                    )
                return int(heads)
        named = re.fullmatch(QUERIES_AND_KEYS, view.path)
        return view.cols_shape[0] if named and len(view.cols_shape) > 1 else 0

    def _blocks(self, shape: Shape, view: ResolvedView) -> tuple[int, int]:
        """The axis of outputs in a low-rank object `(r, k)`, and the number of its blocks."""
        axis = -1 if view.side == "rows" else -2
        outputs = shape[axis]
        # rotated outputs belong to no head
        heads = self._heads(view) if outputs == view.fan_out else 0
        return axis, heads or outputs

    def second_like(self, x, view):
        if view is None:
            return super().second_like(x, view)
        axis, blocks = self._blocks(x.shape, view)
        shape = (1, blocks) if axis == -1 else (blocks, 1)
        return jnp.zeros(shape, self.nu_dtype)

    def squares(self, g, view):
        if view is None:
            return super().squares(g, view)
        axis, blocks = self._blocks(g.shape, view)
        of_outputs = jnp.mean(jnp.square(g.astype(jnp.float32)), axis=-3 - axis, keepdims=True)
        flat = jnp.mean(of_outputs.reshape(blocks, -1), axis=-1)
        return flat[None, :] if axis == -1 else flat[:, None]

    def spread(self, v, like, view):
        if view is None:
            return v
        axis, blocks = self._blocks(like.shape, view)
        return jnp.repeat(v, like.shape[axis] // blocks, axis=axis)

    def moments(self, state):
        """Second moments are of blocks, which no transport moves."""
        found = super().moments(state)
        return [x._replace(kind="factored") if x.kind == "second" else x for x in found]

    def matrix_bytes(self, shape, view):
        """Formula: Adam's first moment and count, and each block once in `nu_dtype`."""
        _, blocks = self._blocks(shape, view)
        rows, columns = shape
        first = jnp.dtype(self.mu_dtype).itemsize * rows * columns
        return 4 + first + jnp.dtype(self.nu_dtype).itemsize * blocks
