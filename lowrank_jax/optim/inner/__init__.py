"""Inner transformations: what runs inside the subspace, and how others reach the moments it keeps.

`base` has the interface; each of the others is a frozen dataclass of pure functions.
"""

import functools

from lowrank_jax.optim.inner.adafactor import Adafactor, AdafactorState
from lowrank_jax.optim.inner.adam import Adam, AdamState, debias
from lowrank_jax.optim.inner.adam_mini import AdamMini
from lowrank_jax.optim.inner.base import Inner, first_moment, map_moments, of_served
from lowrank_jax.optim.inner.factored_momentum import FactoredMomentumState, factored_momentum
from lowrank_jax.optim.inner.fisher_preconditioned import (
    FisherPreconditionedState,
    fisher_preconditioned,
)
from lowrank_jax.optim.inner.from_optax import FromOptax, as_inner
from lowrank_jax.optim.inner.moments import Moment, register_moments
from lowrank_jax.optim.inner.newton_schulz import NewtonSchulz, NewtonSchulzState, Orthogonal
from lowrank_jax.optim.inner.row_column_scaled import RowColumnScaledState, row_column_scaled
from lowrank_jax.optim.inner.soap import Soap, SoapState
from lowrank_jax.optim.inner.stored8 import Stored8

adafactor = Adafactor
adam = Adam
adam_mini = AdamMini
from_optax = FromOptax
newton_schulz = NewtonSchulz
orthogonal = Orthogonal
soap = Soap
stored8 = Stored8

__all__ = [
    "AdafactorState",
    "AdamState",
    "FactoredMomentumState",
    "FisherPreconditionedState",
    "Inner",
    "Moment",
    "NewtonSchulzState",
    "RowColumnScaledState",
    "SoapState",
    "adafactor",
    "adam",
    "adam_mini",
    "as_inner",
    "debias",
    "factored_momentum",
    "first_moment",
    "fisher_preconditioned",
    "from_optax",
    "map_moments",
    "newton_schulz",
    "of_served",
    "orthogonal",
    "register_moments",
    "row_column_scaled",
    "soap",
    "stored8",
]
__dir__ = functools.partial(sorted, __all__)
