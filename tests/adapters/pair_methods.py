"""The table of optimizers on pairs, and the trees they are tested on."""

import functools

import numpy as np
import pytest

from lowrank_jax.optim import pair_optimizers as A
from tests.laws.methods import tree

STEPS = 5
SHAPES = {
    "experts": {"a": (2, 3, 5, 3), "b": (2, 3, 3, 4)},
    "q": {"kernel": {"a": (6, 2), "b": (2, 5), "magnitude": (5,)}},
}
SCALE = {"experts": {"scale": np.array([2.0, 0.5, 1.0])}, "q": {"kernel": {"scale": 1.5}}}
METHODS = {
    "lora_plus": functools.partial(A.lora_plus),
    "scaled_adamw": functools.partial(A.scaled_adamw, scale=SCALE, damping=1e-3),
    "scaled_adamw sequential": functools.partial(A.scaled_adamw, order="sequential", damping=1e-3),
    "altlora": functools.partial(A.altlora, scale=SCALE, damping=1e-3),
    "altlora both": functools.partial(
        A.altlora, scale=2.0, alternate=None, bias_correction="first", decay="after"
    ),
    "altlora_plus": functools.partial(A.altlora_plus, scale=SCALE, alternate=2, damping=1e-3),
    "altlora_plus official": functools.partial(
        A.altlora_plus,
        scale=1.0,
        alternate=None,
        bias_correction="first",
        transport="step",
        decay="after",
    ),
}
NAMED = {method.func.__name__ for method in METHODS.values()}
FAST = ("scaled_adamw sequential", "altlora_plus")


def rows(*names):
    """Methods as pytest parameters; those that the fast tier leaves out are marked slow."""
    return pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names],
    )


every = rows(*METHODS)
preconditioned = rows(*[name for name in METHODS if name != "lora_plus"])


def build(name, rate=0.1, **options):
    return METHODS[name](rate, **({"weight_decay": 0.1} | options))


def params_like(dtype=np.float32):
    return tree(0, dtype, shapes=SHAPES)


def gradients():
    return tree(1, steps=STEPS, shapes=SHAPES)
