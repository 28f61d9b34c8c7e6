"""Every refusal names the field, the value and the remedy."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx

P, C, R = lrx.projectors, lrx.refresh_schedules, lrx.residuals
PARAMS = {"kernel": jnp.ones((6, 10))}

AT_CONSTRUCTION = [
    (lambda: lrx.scale_by_projection("svd"), "projector='svd' must be one of lrx.projectors"),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), refresh_schedule=200),
        "refresh_schedule=200 must be one of lrx.refresh_schedules",
    ),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), residual="sign"),
        "residual='sign' must be one of lrx.residuals",
    ),
    (lambda: lrx.scale_by_projection(P.svd(rank=2), views=(".*",)), "must be one of lrx.Views"),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), transport="keep"),
        "transport='keep' must be one of",
    ),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), inner="adam"),
        "inner='adam' must be lrx.inner.adam",
    ),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), side="left"),
        "side='left' is unknown; use one of",
    ),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), tie="left"),
        "tie='left' must be 'rows' or 'cols'",
    ),
    (
        lambda: lrx.scale_by_projection(P.svd(rank=2), clip_norm=0),
        "clip_norm=0 must be a finite number above 0",
    ),
    (
        lambda: lrx.scale_by_projection(
            P.svd(rank=2), refresh_schedule=C.every(period=2, first=False)
        ),
        r"Every\(.*first=False leaves Svd with the basis of its init",
    ),
    (
        lambda: lrx.galore(1.0, projector=P.online_pca(rank=2), refresh_schedule=C.lazy(period=2)),
        "Lazy reads cosines .* bases of OnlinePca are not orthonormal",
    ),
    (
        lambda: lrx.galore(1.0, projector=P.dct(rank=2), refresh_schedule=C.lazy(period=2)).init(
            {"kernel": jnp.ones((4, 6))}
        ),
        "projector Dct.*overlap fails .*IndexChange has no cosines",
    ),
    (lambda: P.columns(rank=2, select=(0, 1)), r"rank=2 beside the indices select=\(0, 1\)"),
    (lambda: P.svd(rank=0), "rank=0 must be a positive integer"),
    (lambda: P.svd(rank=1.5), "rank=1.5 must be a positive integer, or a fraction"),
    (lambda: P.svd(rank=True), "rank=True must be an integer"),
    (lambda: P.svd(rank=jnp.int32(3)), "static_args"),
    (lambda: P.dct(rank=2, kind=4), "kind=4 must be the number 2 or 3"),
    (lambda: P.dct(rank=2, norm="max"), "norm='max' must be 'l1' or 'l2'"),
    (lambda: P.random(rank=2, kind="normal"), "kind='normal' must be one of"),
    (lambda: P.columns(rank=2, select="best"), "select='best' must be"),
    (lambda: P.columns(select=(1, 1)), "must be distinct indices"),
    (lambda: P.columns(select=(-1, 1)), "must be distinct indices"),
    (lambda: P.given(), "matrix=None; pass the basis"),
    (lambda: P.power(rank=2, first="qr"), "first='qr' must be 'svd' or 'range'"),
    (lambda: P.power(rank=2, iterations=0), "iterations=0 must be at least 1"),
    (lambda: P.randomized(rank=2, iterations=-1), "iterations=-1 must not be negative"),
    (
        lambda: P.online_pca(rank=2, first="range"),
        "online_pca: first='range' must be 'svd' or 'random'",
    ),
    (lambda: P.online_pca(rank=2, optimizer="adam"), "online_pca: optimizer='adam' must be one of"),
    (lambda: P.online_pca(rank=2, peak_rate=0.0), "online_pca: peak_rate=0.0 must be"),
    (
        lambda: lrx.online_subspace_descent(optax.constant_schedule(0.1), rank=2),
        "learning_rate is a schedule.*give peak_rate=",
    ),
    (lambda: C.every(period=0), "period=0 must be an integer of at least 1"),
    (lambda: C.every(period=2, when="during"), "when='during' must be 'before' or 'after'"),
    (lambda: C.staggered(period=2.0), "period=2.0 must be a Python integer"),
    (lambda: R.gradient_rescale(axis="row"), "axis='row' must be"),
    (lambda: R.gradient_rescale(limiter=0.5), "limiter=0.5 must be a finite number of at least 1"),
    (
        lambda: R.norm_scaled(form="official"),
        "norm_scaled: form='official' must be 'code' or 'paper'",
    ),
    (
        lambda: R.norm_scaled(limiter=0.5),
        "norm_scaled: limiter=0.5 must be a finite number of at least 1",
    ),
    (lambda: lrx.inner.adam(b1=1.0), "b1=1.0 must be a finite number of at least 0 and below 1"),
    (lambda: lrx.inner.adam(eps=-1), "eps=-1 must be a finite number of at least 0"),
    (lambda: lrx.inner.adam(convention="keras"), "convention='keras' must be one of"),
    (lambda: lrx.MatrixView(rows=()), "must each name at least one axis"),
    (lambda: lrx.MatrixView(rows=(0,), cols=(0,)), "must name distinct axes"),
    (lambda: lrx.Views(stacked=("(",)), "is not a regular expression"),
    (lambda: lrx.galore(0.1), "rank=None: give rank"),
    (lambda: lrx.galore(0.1, rank=2, projector=P.svd(rank=2)), "both fix the rank"),
    (lambda: lrx.galore(0.1, rank=2, proj_type="up"), "proj_type='up' must be one of"),
    (lambda: lrx.frugal(0.1, rule="adam"), "rule='adam'"),
    (
        lambda: lrx.galore(0.1, rank=2, weight_decay=-1.0),
        "weight_decay=-1.0 must be a finite number of at least 0",
    ),
]

AT_INIT = [
    (lrx.galore(0.1, rank=7), PARAMS, "rank=7 exceeds 6, the shrunk dimension of 'kernel'; use at most 6"),
    *(
        (
            lrx.galore(0.1, projector=projector(rank=8), side="cols"),
            PARAMS,
            "rank=8 exceeds 6, the kept dimension of 'kernel'.*use at most 6",
        )
        for projector in (P.svd, P.svd_two_sided, P.power, P.randomized, P.alternating)
    ),
    (lrx.galore(0.1, rank=((".*/q", 2),)), PARAMS, r"no pattern matches 'kernel'; add \('.\*', rank\)"),
    (lrx.galore(0.1, rank=2), {"w": jnp.ones((4, 4))}, "no leaf is projected.*Views"),
    (lrx.galore(0.1, rank=2, side="sharding"), PARAMS, "sides_for"),
    (lrx.galore(0.1, rank=2, side=(("other", "rows"),)), PARAMS, "the stored sides name no 'kernel'"),
    (lrx.scale_by_projection(P.hadamard(rank=2)), PARAMS, "6 of 'kernel' is not a power of two; use dct"),
    (lrx.scale_by_projection(P.given(matrix=np.eye(5, 2))), PARAMS, "cannot shrink dimension 6 of 'kernel'"),
    (lrx.scale_by_projection(P.given(matrix=(("a", np.eye(6)),))), PARAMS, "no pattern matches 'kernel'"),
    (lrx.scale_by_projection(P.columns(select=(6, 9))), PARAMS, "no index of .* is below 6"),
    (lrx.galore(0.1, rank=2, views=lrx.Views(rules=(("kernel", lrx.MatrixView(rows=(0, 1), cols=(2,))),))), PARAMS,
     "does not cover a leaf of shape"),
    (lrx.scale_by_projection(P.svd(rank=2), inner=optax.scale_by_lion(), residual=R.gradient_rescale()), PARAMS,
     "GradientRescale needs the inner direction without bias correction"),
]  # fmt: skip


@pytest.mark.parametrize(
    "build, message", AT_CONSTRUCTION, ids=[message[:30] for _, message in AT_CONSTRUCTION]
)
def test_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "transformation, params, message", AT_INIT, ids=[message[:30] for *_, message in AT_INIT]
)
def test_at_init(transformation, params, message):
    with pytest.raises(ValueError, match=message):
        transformation.init(params)


def test_explain_of_a_chain_says_why_it_cannot():
    with pytest.raises(TypeError, match="Nothing can look inside optax.chain"):
        lrx.explain(optax.chain(lrx.galore(0.1, rank=2)), PARAMS)


def test_a_state_of_another_model_is_refused():
    transformation = lrx.galore(0.1, rank=2)
    state = transformation.init({"kernel": jnp.ones((8, 10))})
    with pytest.raises(ValueError, match="kernel"):
        transformation.update(PARAMS, state, PARAMS)


STORED = {
    "NormalFloat4": lrx.linalg.quantize_nf4(jnp.ones((6, 10))),
    "QuantizedBlocks(code='signed')": lrx.linalg.quantize_blocks(jnp.ones((6, 10)), "signed"),
}


@pytest.mark.parametrize("kind", STORED)
def test_stochastic_rounding_of_what_rounds_to_nearest(kind):
    params = {"kernel": jnp.ones((6, 10)), "other": {"kernel": STORED[kind]}}
    form = lrx.fused(lrx.galore(1e-2, rank=2), rounding="stochastic")
    grads = {"kernel": jnp.ones((6, 10)), "other": {"kernel": jnp.ones((6, 10))}}
    message = (
        f"leaf 'other/kernel': rounding='stochastic' cannot write {re.escape(kind)}, .* give "
        "rounding='nearest'"
    )
    with pytest.raises(ValueError, match=message):
        form.step(params, grads, form.init(params))
