"""What `repr` shows of public things: one short line, and no numbers of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lrx
from lowrank_jax import reprs

X = jnp.ones((32, 64))
PARAMS = {"dense": {"kernel": X, "bias": jnp.zeros(64)}}
LORA = lrx.adapters.lora(rank=4)
ADAPTATION = lrx.adapt(PARAMS, LORA, jax.random.key(0))
ATTACHED = lrx.attach(PARAMS, ADAPTATION)["dense"]["kernel"]

GALORE = lrx.galore(1e-2, rank=8)
STATE = GALORE.init(PARAMS)
SHORT = "Svd(rank=8)"

THINGS = {
    "transformation": (GALORE, f"ProjectionTransformation(Projection(projector={SHORT}, "),
    "projection": (GALORE.projection, f"Projection(projector={SHORT}, "),
    "fused": (lrx.fused(GALORE), "Fused("),
    "state": (STATE, "RecipeState("),
    "projection state": (STATE.projection, "ProjectionState("),
    "matrix": (STATE.projection.matrices["dense"]["kernel"], "MatrixState('dense/kernel', "),
    "taps": (lrx.taps(STATE), "Taps(dense/kernel: rank 8, rows)"),
    "projected": (lrx.projection.Projected(X), "Projected(low=float32[32,64])"),
    "inputs": (lrx.projectors.RefreshInputs(target=X), "RefreshInputs(target=float32[32,64])"),
    "projector": (lrx.projectors.dct(rank=8, kind=2), "Dct(rank=8, kind=2)"),
    "given": (lrx.projectors.given(matrix=X), "Given("),
    "schedule": (lrx.refresh_schedules.every(period=3), "Every(period=3)"),
    "transport": (lrx.transports.rotate(), "Rotate()"),
    "residual": (lrx.residuals.sign(scale=0.5), "Sign(scale=0.5)"),
    "target": (lrx.targets.error_feedback(), "ErrorFeedback()"),
    "ledger": (lrx.memory.ledger(GALORE, PARAMS), "Ledger(rows="),
    "views": (lrx.Views(), "Views()"),
    "inferred": (
        lrx.functions.views_of(lambda w, x: x @ w, X, jnp.ones((2, 32))),
        "ViewReport(rows=(ViewRow(path='', shape=(32, 64), view=MatrixView(), ",
    ),
    "view": (lrx.MatrixView(cols=(1, 2)), "MatrixView(cols=(1, 2))"),
    "resolved": (lrx.resolution.resolve(X, rank=8).projected[0], "ResolvedView("),
    "report": (lrx.resolution.resolve(PARAMS, rank=8), "Report(leaves="),
    "adapter": (LORA, "Lora(rank=4)"),
    "adaptation": (ADAPTATION, "Adaptation(train={2 arrays, 384 numbers}, "),
    "attached": (ATTACHED, "AdaptedKernel(kernel=float32[32,64], "),
    "converted": (lrx.to_lora(PARAMS, ADAPTATION, rank=2)[1], "Conversion(how="),
    "nf4": (lrx.linalg.quantize_nf4(X), "NormalFloat4(codes=uint8[32,64], "),
    "codes": (lrx.linalg.quantize_blocks(X), "QuantizedBlocks(codes=uint8[32,64], "),
    "inner": (lrx.inner.stored8(block=128), "Stored8(inner=Adam(), block=128)"),
    "inner state": (lrx.inner.adam().init(X), "AdamState(count=int32[], mu=float32[32,64], "),
    "scale": (lrx.scales.fan_ratio(), "FanRatio()"),
    "pairs": (
        lrx.lora_plus(1e-3).init({"a": jnp.ones((8, 4)), "b": jnp.ones((4, 8))}),
        "PairsState(",
    ),
}


@pytest.mark.parametrize("name", THINGS)
def test_it_is_short_and_shows_no_numbers(name):
    thing, begin = THINGS[name]
    text = repr(thing)
    assert text.startswith(begin), text
    assert len(text) <= 400 and "\n" not in text
    assert "Array(" not in text and " at 0x" not in text and "<class" not in text


def test_classes_of_others_are_short_too():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(lrx.adapters.Adapter):
        table: jax.Array
        rate: float = 0.5

    assert repr(Mine(table=X)) == "Mine(table=float32[32,64])"

    @dataclasses.dataclass(frozen=True)
    class Own(Mine):
        def __repr__(self):
            return "mine"

    assert repr(Own(table=X)) == "mine"


def test_tracers_abstract_arrays_and_keys():
    found = []
    jax.jit(lambda x: found.append(reprs.short(x)) or x)(X)
    abstract = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert [*found, reprs.short(abstract)] == ["float32[32,64]", "bfloat16[2]"]
    assert reprs.short(jax.random.key(0)) == "key<fry>[]"
