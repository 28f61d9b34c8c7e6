"""Norms of DCT coefficients in one pass: the kernel, interpreted, against cosines in float64, and
its projector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax import kernels
from lowrank_jax.kernels import _dct

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

TOLERANCE = 1e-5
NAMED = {"implementation": "tpu", "interpret": True}


def exact(x, kind, norm):
    """Scores in float64, from the definition of the basis."""
    d = x.shape[-2]
    i, j = np.mgrid[:d, :d]
    c = np.sqrt(np.where(i == 0, 1, 2) / d) * np.cos(i * (2 * j + 1) * np.pi / (2 * d))
    s = (c.T if kind == 3 else c) @ np.asarray(x, np.float64)
    return np.abs(s).sum(-1) if norm == "l1" else np.sqrt((s * s).sum(-1))


def operand(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.fixture(autouse=True)
def rolled(monkeypatch):
    monkeypatch.setattr(_dct, "_UNROLL", 1)  # a quarter of the time to compile, the same numbers


# (8, 16); two tiles of columns, the last cut; a != b beside 8 and 16, and less than a tile
@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "norm"),
    [
        ((128, 256), "float32", 2, "l1"),
        ((256, 130), "float32", 3, "l1"),
        ((256, 130), "bfloat16", 2, "l2"),
        ((640, 5), "bfloat16", 3, "l1"),
        ((640, 5), "float32", 2, "l1"),
        ((384, 130), "float32", 3, "l2"),
    ],
    ids=str,
)
def test_scores_are_those_of_float64(shape, dtype, kind, norm):
    x = operand(shape, dtype)
    expected = exact(x, kind, norm)
    for option in ({"implementation": "reference"}, NAMED):
        for axis, given in ((-2, x), (-1, x.T)):
            found = kernels.dct_scores(given, kind, norm, axis, **option)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(
                found, expected, atol=TOLERANCE * expected.max(), err_msg=f"{option} {axis}"
            )


def test_every_vector_is_found_by_its_own_score():
    d = 256
    for kind in (2, 3):
        basis = lrx.linalg.dct_matrix(d, kind)
        for axis, given in ((-2, basis.T[:, :, None]), (-1, basis.T[:, None, :])):
            scores = kernels.dct_scores(given, kind, axis=axis, **NAMED)
            np.testing.assert_allclose(scores, np.eye(d), atol=1e-5)


def test_batch_axes_are_kept_and_nothing_scores_nothing():
    x = operand((2, 1, 128, 3))
    found = kernels.dct_scores(x, 3, **NAMED)
    np.testing.assert_allclose(found, exact(x, 3, "l1"), rtol=1e-4)
    assert kernels.dct_scores(x[..., :0], 3, **NAMED).tolist() == np.zeros((2, 1, 128)).tolist()


def test_a_column_that_is_not_finite_spoils_no_other_matrix():
    x = operand((2, 128, 130)).at[0, 5, 129].set(jnp.nan)
    found = kernels.dct_scores(x, 2, **NAMED)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], exact(x[1], 2, "l1"), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((128, 2), jnp.float16)}, "float16 must be float32 or bfloat16"),
        ({"x": jnp.ones(128)}, r"x \(128,\) must have two axes"),
        ({"axis": 0}, "axis=0 must be -2 or -1"),
        ({"kind": 4}, r"kind=4 must be one of \(2, 3\)"),
        ({"norm": "max"}, "norm='max' must be one of"),
        ({"implementation": "triton"}, "implementation='triton' must be one of"),
        ({"implementation": "gpu"}, "no program for GPUs, .* take implementation='reference'"),
        ({"interpret": True}, "name the kernel to interpret"),
        ({"chip": "v9", "implementation": "tpu"}, "chip='v9' must be one of"),
        ({"x": jnp.ones((72, 2)), "implementation": "tpu"}, "d=72 is no multiple of 128"),
        (
            {"x": jax.ShapeDtypeStruct((2**16, 2), jnp.float32), "implementation": "tpu"},
            "needs .* bytes of fast memory",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_errors_name_field_value_and_remedy(change, message):
    options = {"x": jnp.ones((128, 2)), "kind": 3} | change
    x = options.pop("x")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: kernels.dct_scores(x, **options), x)


def test_split_takes_few_operations_and_covers_every_frequency_once():
    for d in range(128, 8193, 128):
        a, b = _dct.split(d)
        assert a * b == d and a % 8 == b % 16 == 0
        assert sorted(_dct.frequencies(a, b).ravel()) == list(range(d))
        assert d < 1024 or _dct.operations(d, 1) < d * d  # half of a product's, and less


def lowered(shape, platform, **options):
    """Text of an update whose refresh is every step, for a platform that is not here."""
    tx = lrx.scale_by_projection(lrx.projectors.dct(rank=4, **options))
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    return (
        jax.jit(tx.update)
        .trace(params, state, params)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


@pytest.mark.parametrize(
    ("shape", "calls"), [((2048, 2176), 1), ((2176, 2048), 1), ((1024, 1152), 0), ((2100, 2200), 0)]
)
def test_the_projector_takes_the_kernel_where_it_is_told_to_and_it_pays(shape, calls):
    assert ("tpu_custom_call" in lowered(shape, "tpu", implementation="pallas")) == bool(calls)
    assert "tpu_custom_call" not in lowered(shape, "tpu")


def test_projector_refreshes_to_the_same_basis(monkeypatch):
    monkeypatch.setattr(_dct, "_SMALLEST", 0)
    real = kernels.dct_scores
    monkeypatch.setattr(kernels, "dct_scores", lambda *args: real(*args, **NAMED))
    for shape in ((128, 200), (200, 128), (2, 128, 200)):
        grads = {"kernel": operand(shape)}
        views = lrx.Views(stacked=("kernel",)) if len(shape) == 3 else lrx.Views()
        bases = []
        for implementation in ("xla", "pallas"):
            tx = lrx.scale_by_projection(
                lrx.projectors.dct(rank=32, implementation=implementation), views=views
            )
            state = tx.update(grads, tx.init(grads), grads)[1]
            bases.append(jax.tree.leaves(state.matrices["kernel"].basis)[0])
        np.testing.assert_array_equal(*bases)


def test_projector_refuses_another_word():
    with pytest.raises(ValueError, match="implementation='kernels' must be 'xla' or 'pallas'"):
        lrx.projectors.dct(implementation="kernels")
