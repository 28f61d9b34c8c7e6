"""Kernels that are known by their views, whatever their leaves are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

PARAMS = {
    "q_proj": {"w": jnp.ones((6, 2, 4))},
    "up": {"w": jnp.ones((6, 5))},
    "norm": {"w": jnp.ones(6)},
}
RULES = {
    "q_proj/w": lrx.MatrixView(rows=(0,), cols=(1, 2)),
    "up/w": lrx.MatrixView(rows=(0,), cols=(1,)),
}


def model(params, x):
    x = x * params["norm"]["w"]
    return jnp.einsum("bd,dnh->bnh", x, params["q_proj"]["w"]), x @ params["up"]["w"]


@pytest.mark.parametrize("kind", ["rules", "inferred"])
def test_what_is_written_is_read_again(kind, tmp_path):
    views = lrx.Views(rules=RULES)
    if kind == "inferred":
        views = lrx.Views(inferred=lrx.functions.views_of(model, PARAMS, jnp.ones((3, 6))))
    rules = dict.fromkeys(RULES, lrx.adapters.lora(rank=2))
    adaptation = lrx.adapt(PARAMS, rules, jax.random.key(0), views=views)
    moved = jax.tree.map(lambda x: x + 1, adaptation.train)
    options = {
        "names": lambda path, index: path.replace("/", ".").removesuffix("w") + "weight",
        "views": views,
        "head": None,
    }
    lrx.interop.peft.save(tmp_path, adaptation.replace(train=moved), PARAMS, **options)
    again = lrx.interop.peft.load(tmp_path, PARAMS, **options)
    jax.tree.map(np.testing.assert_array_equal, again.train, moved)
