"""What projectors say of themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

P = lrx.projectors
PROJECTORS = {
    "dct": P.dct(rank=3),
    "dct2, l2": P.dct2(rank=3, norm="l2"),
    "hadamard": P.hadamard(rank=3),
    "columns": P.columns(rank=3, select="l2"),
    "randomized": P.randomized(rank=3),
    "online pca": P.online_pca(rank=3, period=5),
    "power from an svd": P.power(rank=3, first="svd"),
    "power from a range": P.power(rank=3, first="range"),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_columns_of_zeros_change_no_basis_of_rows(name):
    projector, gradient = PROJECTORS[name], jax.random.normal(jax.random.key(0), (2, 8, 13))
    view = lrx.resolution.resolve(gradient, lrx.Views(stacked=(".*",)), rank=3).projected[0]
    keys = jax.random.split(jax.random.key(1), 2)
    assert projector.of_rows
    for step in (0, 1):
        found = [
            projector.refresh(
                view,
                *projector.init(view, keys),
                lrx.projectors.RefreshInputs(target=g, step=jnp.int32(step), key=keys),
            )[0]
            for g in (gradient, jnp.pad(gradient, [(0, 0), (0, 0), (0, 3)]))
        ]
        np.testing.assert_allclose(*found, atol=1e-5)


def test_a_basis_that_mixes_the_moment_in_is_not_of_rows():
    assert not P.power(rank=3, mix=0.9).of_rows
    assert not P.svd(rank=3).of_rows
