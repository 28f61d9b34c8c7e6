"""Factors that follow from a leaf's view."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

S = lrx.scales


def view_of(shape, **rule):
    rules = (("kernel", lrx.MatrixView(**rule)),)
    return lrx.resolution.resolve(
        {"kernel": jnp.ones(shape)}, lrx.Views(rules=rules), rank=2
    ).projected[0]


@pytest.mark.parametrize(
    ("scale", "rows", "folded"),
    [(S.fan_ratio(), (2 / 8) ** 0.5, (15 / 4) ** 0.5), (S.fan_ratio(least=1.0), 1.0, (15 / 4) ** 0.5),
     (S.fan_ratio(power=1.0), 2 / 8, 15 / 4), (S.rms(0.5), 0.5 * 8**0.5, 0.5 * 15**0.5),
     (S.by_path((("kernel", S.rms(2.0)), (".*", 7.0))), 2 * 8**0.5, 2 * 15**0.5), (S.by_path((("q", 7.0),)), 1, 1)],
)  # fmt: skip
def test_of_views(scale, rows, folded):
    """A kernel of 8 inputs and 2 outputs; a stack of 4 inputs and 3 heads of 5."""
    assert scale.of(view_of((8, 2))) == pytest.approx(rows)
    view = view_of((4, 6, 3, 5), batch=(1,), cols=(2, 3))
    assert scale.of(view) == scale.of(view.matrix) == pytest.approx(folded)


def test_muons_step_is_scaled_by_its_own_matrix():
    """Through a transformation whose square leaf and stack share one inner."""
    views = lrx.Views(stacked=("stack/.*",))
    params = {"stack": {"kernel": jnp.ones((3, 2, 8))}, "tall": {"kernel": jnp.ones((8, 2))}}
    build = lambda scale: lrx.scale_by_projection(  # noqa: E731
        lrx.projectors.identity(), inner=lrx.inner.newton_schulz(scale=scale), views=views
    )
    scaled, plain = (
        tx.update(params, tx.init(params), params)[0] for tx in map(build, (S.fan_ratio(), 1.0))
    )
    for leaf, factor in (("stack", 2.0), ("tall", 0.5)):
        np.testing.assert_allclose(scaled[leaf]["kernel"], factor * plain[leaf]["kernel"])


def test_what_is_refused():
    for build, match in [
        (lambda: S.rms("x"), "rms: value='x'"),
        (lambda: S.fan_ratio(least=-1), "fan_ratio: least=-1"),
        (lambda: S.by_path((("a", None),)), "by_path: 'a'=None must be .*, or one of lrx.scales"),
        (lambda: lrx.inner.newton_schulz(scale="x"), "newton_schulz: scale='x'"),
    ]:
        with pytest.raises(ValueError, match=match):
            build()
    inner = lrx.inner.newton_schulz(scale=S.rms())
    with pytest.raises(ValueError, match="reads the view of a matrix.*plain=lrx.inner.adam"):
        inner.init(jnp.ones((2, 2)))
