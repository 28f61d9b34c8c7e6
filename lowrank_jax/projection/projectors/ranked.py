"""A basis of which a schedule says how many vectors serve."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import sharding
from lowrank_jax.matrices import ResolvedView
from lowrank_jax.projection.batches import count
from lowrank_jax.projection.projectors.base import BasisProjector
from lowrank_jax.projection.rank_schedules import RankSchedule
from lowrank_jax.projection.state import RefreshInputs
from lowrank_jax.typing import Pytree, Rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(BasisProjector):
    """What a basis of `Ranked` means: `{"basis": of the projector, "serves": bool (batch..., r)}`,
    whose vectors that do not serve are zero."""

    rank: Rank = dataclasses.field(init=False)  # the projector's
    projector: Any
    orthonormal = False
    masks = True

    def __post_init__(self):
        object.__setattr__(self, "rank", self.projector.rank)
        super().__post_init__()

    def columns(self, view, basis):
        whole = self.projector.columns(view, basis["basis"])
        return jnp.where(basis["serves"][..., None, :], whole, 0)

    def served(self, view, basis):
        return basis["serves"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Masked):
    """The basis of a projector, of which a rank schedule lets a part serve, chosen anew at each
    refresh.

    Shapes and state are those of the largest rank, the projector's: vectors that do not serve are
    zero in all products, their moments are zeroed when they cease to and stay zero, and one that
    serves again begins with zero moments. State: the projector's, and a byte for each vector.

    Args:
      projector: of the largest rank, whose basis is a matrix `P (..., s, r)`.
      schedule: one of `lrx.rank_schedules`.

    Raises:
      ValueError: for a projector without such a basis, one that never moves it, one whose first
        basis is another computation than a refresh, and where energies are read one whose basis is
        not orthonormal.

    >>> import lowrank_jax as lrx
    >>> schedule = lrx.rank_schedules.decay(steps=1000, to=0.25)
    >>> tx = lrx.galore(
    ...     1e-2, projector=ranked(projector=lrx.projectors.svd(rank=4), schedule=schedule)
    ... )
    >>> tx.init({"kernel": jnp.ones((8, 16))}).projection.matrices["kernel"]
    MatrixState('kernel', rank=4, shrinks=rows, basis=[(8, 4), (4,)], 648 bytes)
    """

    schedule: Any

    def __post_init__(self):
        part, name = self.projector, type(self.projector).__name__
        one_sided = isinstance(part, BasisProjector) and type(part).down is BasisProjector.down
        if not one_sided or isinstance(part, Masked) or not part.moves:
            raise ValueError(
                f"ranked: projector={part!r} must have a basis of vectors on one side, and move it; "
                "take one such as lrx.projectors.svd"
            )
        if part.starts:
            raise ValueError(
                f"ranked: the first basis of {name} is another computation than a refresh; take one "
                "without, such as lrx.projectors.svd or power(first='range')"
            )
        if not isinstance(self.schedule, RankSchedule):
            raise ValueError(
                f"ranked: schedule={self.schedule!r} must be one of lrx.rank_schedules"
            )
        if "energies" in self.schedule.reads and not part.orthonormal:
            raise ValueError(
                f"ranked: {type(self.schedule).__name__} reads energies, and bases of {name} are "
                "not orthonormal; take a projector such as lrx.projectors.svd, or another schedule"
            )
        super().__post_init__()

    @property
    def reads(self):
        names = {"step": "step", "energies": "target"}
        return self.projector.reads | {names[name] for name in self.schedule.reads}

    sees = property(lambda self: self.projector.sees)
    remembers = property(lambda self: self.projector.remembers)
    decomposes = property(lambda self: self.projector.decomposes)
    of_range = property(lambda self: self.projector.of_range)
    of_rows = property(lambda self: self.projector.of_rows)
    of_layers = property(lambda self: self.schedule.of_layers)

    def structure(self):
        return Masked(projector=self.projector.structure())

    def rank_for(self, path, shrunk, kept):
        return self.projector.rank_for(path, shrunk, kept)

    def check(self, view):
        self.projector.check(view)

    def init(self, view, keys):
        basis, memory = self.projector.init(view, keys)
        # all serve until the first refresh, which knows more
        everything = jnp.ones((*view.batch, view.rank), bool)
        spec = None if view.spec is None else (*view.spec[:-2], None)
        serves = sharding.reshard(everything, spec)
        return {"basis": basis, "serves": serves}, (memory, self.schedule.init(view))

    def refresh(self, view, basis, memory, inputs):
        own, state = memory
        new, own = self.projector.refresh(view, basis["basis"], own, inputs)
        read: dict[str, Any] = {}
        if "step" in self.schedule.reads:
            read["step"] = inputs.step
        if "energies" in self.schedule.reads:
            read["energies"] = self._energies(view, new, inputs)
        serves = self.schedule.serving(view.rank, state, **read)
        serves = jnp.broadcast_to(serves, (*view.batch, view.rank))
        return {"basis": new, "serves": serves}, (own, state)

    def _energies(
        self, view: ResolvedView, basis: Pytree, inputs: RefreshInputs
    ) -> tuple[jax.Array, jax.Array]:
        """`|p_jᵀG|² (batch..., r)` and `|G|² (batch...)`."""
        target = jnp.asarray(inputs.target)
        low = self.projector.down(view, basis, target)
        return jnp.sum(jnp.square(low), axis=-1), jnp.sum(jnp.square(target), axis=(-2, -1))

    def sketch_basis(self, view, basis, memory, inputs):
        return self.projector.sketch_basis(view, basis["basis"], memory[0], inputs)

    def seen(self, view, basis, memory, low, target):
        own, state = memory
        return self.projector.seen(view, basis["basis"], own, low, target), state

    def basis_bytes(self, view):
        return self.projector.basis_bytes(view) + count(view) * view.rank


ranked = Ranked
