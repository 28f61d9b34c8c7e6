"""Models of Flax nnx that hold their adapters.

A model that exists stays as it is: functions of its state take what `lrx.attach` puts in the kernels'
places, whatever the model maps, scans, recomputes or compiles within:

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)               # paths such as "layers/0/up/kernel", as the
                                                    default rules want
    loss = lambda params, batch: objective(nnx.merge(graphdef, params, rest)(batch))
    value = lrx.adapted(loss)(lrx.attach(params, adaptation), batch)                             adapters
    value, grads = lrx.projected_value_and_grad(loss, lrx.taps(opt_state))(params, batch)         taps

A model that holds its adapters is changed in place; everything keeps its path. What trains, what is
frozen and what was a parameter are Variables of types that are no `nnx.Param`:

    lrx.nnx.insert(model, adaptation)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=lrx.nnx.AdapterParam)
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lrx.nnx.AdapterParam))(model, batch)

Known to work with flax 0.12.8 on jax 0.10.2. The nnx of flax 0.12.8 cannot be imported on jax
0.11.1 or later, which `lowrank_jax.nnx` reports; the rest of the library does not need it, and
`import lowrank_jax` does not import it.
"""

import functools

import flax
import jax

try:
    from flax import nnx as _nnx  # noqa: F401
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"flax.nnx of flax {flax.__version__} cannot be imported with jax {jax.__version__} "
        f"({error}): flax 0.12.8 needs jax<0.11.1. Linen models (lrx.linen) and bare functions "
        "work without it"
    ) from error

from lowrank_jax.nnx.calls import adapted, sharing
from lowrank_jax.nnx.inserted import extract, insert, seed_dropout
from lowrank_jax.nnx.merged import merge
from lowrank_jax.nnx.variables import AdaptedParam, AdapterConstant, AdapterParam, FrozenParam

__all__ = [
    "AdaptedParam",
    "AdapterConstant",
    "AdapterParam",
    "FrozenParam",
    "adapted",
    "extract",
    "insert",
    "merge",
    "seed_dropout",
    "sharing",
]
__dir__ = functools.partial(sorted, __all__)
