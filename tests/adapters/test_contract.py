"""Families and kernel nodes of somebody's own that break their contract are named, with the remedy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

PARAMS = {"dense": {"kernel": jnp.ones((6, 10))}}
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair(lrx.adapters.Adapter):
    """`a diag(scale) b`, as little as a family of factors needs."""

    rank: int = 2
    ranked = True

    def axes(self, site):
        return {"a": ("rows", "rank"), "b": ("rank", "cols")}

    def init_site(self, key, site, kernel, given):
        a = jax.random.normal(key, (site.n, site.rank))
        return {"a": a, "b": jnp.zeros((site.rank, site.m))}, {}

    def factors(self, site, p):
        return lrx.adapters.Factors(p["a"], p["scale"], p["b"], np.arange(site.rank))


def factors(change):
    def made(self, site, p):
        return change(Pair.factors(self, site, p))

    return {"factors": made}


WRONG: dict[str, tuple[dict[str, Any], type, str]] = {
    "no factors": (factors(lambda f: (f.a, f.scale, f.b)), TypeError, "gives a tuple"),
    "transposed": (
        factors(lambda f: f._replace(a=f.a.T)),
        ValueError,
        r"'dense/kernel': Pair.factors gives a, scale, b of shapes \[\(2, 6\), .*n = 6, m = 10",
    ),
    "b": (
        factors(lambda f: f._replace(b=f.b[:1])),
        ValueError,
        r"return \(n, q\), \(q,\), \(q, m\)",
    ),
    "scale": (factors(lambda f: f._replace(scale=jnp.ones(3))), ValueError, r"shapes \[.*\(3,\)"),
    "rank_of": (
        factors(lambda f: f._replace(rank_of=np.arange(3))),
        ValueError,
        "gives 2 components and rank_of=array.*to which of the ranks 0 .. 1",
    ),
    "axes of nothing": (
        {"axes": lambda self, site: {"c": ("rows",)}},
        ValueError,
        r"Pair.axes names 'c', and its arrays are \['a', 'b', 'scale'\]",
    ),
    "an unknown axis": (
        {"axes": lambda self, site: {"a": ("inputs", "rank")}},
        ValueError,
        "Pair.axes says .*inputs.* an axis is 'rows', 'cols', 'rank' or None",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_family_that_breaks_its_contract(name):
    methods, kind, message = WRONG[name]
    family = type("Pair", (Pair,), methods)
    with pytest.raises(kind, match=message):
        lrx.effective(PARAMS, lrx.adapt(PARAMS, family(), KEY))


def test_trained_numbers_follow_from_what_a_family_makes():
    stack = {"layers": {"kernel": jnp.ones((3, 6, 10))}}
    views = lrx.Views(stacked=("layers/.*",))
    adaptation = lrx.adapt(stack, Pair(rank=3), KEY, views=views, ranks={"layers/.*": (1, 2, 3)})
    assert adaptation.trained == (1 + 2 + 3) * (6 + 10)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(lrx.KernelNode):
    """A node that forgets what adapters give beside the product."""

    kernel: jax.Array

    @property
    def shape(self):
        return self.kernel.shape

    @property
    def dtype(self):
        return self.kernel.dtype

    def multiply(self, op, x, key=None):
        return op.multiply(x, self.kernel)


def test_a_node_gives_the_product_and_what_stands_beside_it():
    with pytest.raises(TypeError, match=r"Scaled.multiply returned a .*; return \(y, aux\)"):
        lrx.matmul(jnp.ones((2, 6)), Scaled(jnp.ones((6, 10))))
