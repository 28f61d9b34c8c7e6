"""Views read from programs: what multiplies by a leaf, over which of its axes, and what comes of it."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lrx
from experiments.models.llama import Llama, LlamaConfig
from lowrank_jax.functions import uses, views_of
from lowrank_jax.matrices import MatrixView
from lowrank_jax.resolution import ViewReport
from tests.functions.cases import CASES, DENSE, STACK, normal

TRANSPOSED = MatrixView(rows=(1,), cols=(0,))

# Views that say more than the function does: which of two sides an input comes from, that experts
# whose results are kept apart are several matrices, that heads which are batched are columns elsewhere.
MEANT = {
    "transposed": TRANSPOSED,
    "columns looked up": TRANSPOSED,
    "cond": TRANSPOSED,  # the first of two products, one in each direction
    "a part of the columns contracted": MatrixView(batch=(1,), rows=(2,), cols=(0,)),
    "some layers": MatrixView(rows=(1,), cols=(0, 2)),
    "all tokens to all experts": MatrixView(rows=(1,), cols=(0, 2)),
    "experts summed": MatrixView(rows=(0, 1), cols=(2,)),
}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def row_of(function, shape, *args, dtype=jnp.float32):
    """The row of the one leaf of a function."""
    params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    (row,) = views_of(lambda params, *args: function(params["w"], *args), params, *args).rows
    return row


@pytest.mark.parametrize("name", CASES)
def test_the_view_of_every_function_of_the_laws(name):
    case = CASES[name]
    row = row_of(case.function, case.shape, *case.args)
    assert row.view == MEANT.get(name, case.view), row
    assert row.shape == case.shape and row.reason == "" and row.uses


def test_nothing_is_computed():
    """Shapes are enough, of parameters and arguments."""
    case = CASES["scan in a scan"]
    args = abstract(case.args)
    assert row_of(case.function, case.shape, *args).view == case.view


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy)
)


@jax.custom_vjp
def in_disguise(x, w):
    """A product that only its rule shows."""
    return (x[..., None] * w).sum(-2)


in_disguise.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy)
)
lrx.adapters.rule(in_disguise, lambda x, w: jnp.dot(x, w))


def changed_carry(w, x):
    """The second step has another kernel, that is no longer the leaf."""
    return jax.lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1], 0.5 * c[1]), (x, w))[0]


MORE = {
    "a derivative of its own": (lambda w, x: own_product(x, w), (6, 8), DENSE),
    "by a rule": (lambda w, x: in_disguise(x, w), (6, 8), DENSE),
    "strided": (lambda w, x: x @ w[:, ::2] + x @ w[:, 1::2], (6, 8), DENSE),
    "a place that is computed": (
        lambda w, x: x @ jax.lax.dynamic_slice(w, (0, x[0, 0].astype(int)), (6, 2)),
        (6, 8),
        DENSE,
    ),
    "axes merged and taken apart": (
        lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 3), w.reshape(2, 3, 8)),
        (6, 8),
        DENSE,
    ),
    "one layer, reshaped": (lambda w, x: x @ w[1:2].reshape(6, 8), (3, 6, 8), STACK),
    "changed by a loop": (changed_carry, (6, 6), DENSE),
    "also in a penalty": (lambda w, x: jnp.sum(x @ w) + jnp.sum(w**2), (6, 8), DENSE),
    "mostly transposed": (lambda w, x: x @ w.T + (x @ w) @ w.T @ w.T, (6, 6), TRANSPOSED),
    "by another kernel": (lambda w, x: x @ (w @ w), (6, 6), TRANSPOSED),
}


@pytest.mark.parametrize("name", MORE)
def test_more_views(name):
    function, shape, view = MORE[name]
    row = row_of(function, shape, normal(4, 6))
    assert row.view == view, row


def two_matrices(w, x):
    return jnp.einsum("bd,dhk->bhk", x, w).sum() + jnp.einsum("bh,dhk->bdk", x[:, :2], w).sum()


NONE = {
    "a norm's scale": (lambda w, x: x * w, (6,), "no product: mul at"),
    "a bias": (lambda w, x: x[:, None] + w, (2, 6), "no product: add at"),
    "unused": (lambda w, x: x, (6, 8), "not read"),
    "returned": (lambda w, x: (x, w), (6, 8), "not read"),
    "scaled": (lambda w, x: x @ (2 * w), (6, 8), "no product: mul at"),
    "a vector": (lambda w, x: x @ w, (6,), "no matrix: dot_general at"),
    "conflicting": (two_matrices, (6, 2, 3), "different matrices: dot_general at"),
    "a part of an axis": (
        lambda w, x: jnp.einsum("bhk,dhk->bhd", x.reshape(-1, 2, 3), w.reshape(4, 2, 3)),
        (4, 6),
        "parts of an axis are different things: dot_general at",
    ),
    "a part of an axis taken apart": (
        lambda w, x: jax.lax.scan(lambda c, w: (c, x[:, :3] @ w), 0, w.reshape(2, 3, 8)),
        (6, 8),
        "parts of an axis are different things: dot_general at",
    ),
    "in groups": (
        lambda w, x: jax.lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6
        ),
        (3, 1, 6),
        "no product: conv_general_dilated at",
    ),
    "entries looked up": (lambda w, x: w[x.astype(int)[:, 0], 1], (6, 8), "no product: gather at"),
}


@pytest.mark.parametrize("name", NONE)
def test_a_leaf_without_a_view_says_why(name):
    function, shape, reason = NONE[name]
    row = row_of(function, shape, normal(4, 6))
    assert row.view is None and row.reason.startswith(reason), row
    if "at" in reason:
        assert " at test_inference.py:" in row.reason


def test_integers_are_no_kernels():
    row = row_of(lambda w, x: x @ w, (6, 8), normal(4, 6), dtype=jnp.int32)
    assert (row.view, row.reason) == (None, "entries of int32")


def test_tied_layers_are_oriented_as_the_look_up():
    def tied(w, ids):
        x = jnp.take(w, ids, axis=0)
        return jnp.sin(x) @ w.T + jnp.cos(x) @ w.T

    found = row_of(tied, (9, 8), jnp.array([[1, 2], [8, 0]]))
    assert found.view == DENSE
    assert [use.view for use in found.uses] == [DENSE, TRANSPOSED, TRANSPOSED]


def test_uses_name_every_axis():
    def model(params, x, ids):
        x = x + params["embed"][ids]
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        return jnp.einsum("btd,ndf->bntf", x, params["heads"]) * params["scale"]

    params = {
        "embed": normal(9, 6), "layers": normal(3, 6, 6), "heads": normal(2, 6, 8), "scale": normal(8),
        "spare": normal(3, 3),
    }  # fmt: skip
    found = uses(model, params, normal(2, 5, 6), ids=jnp.zeros((2, 5), int))
    assert {path: [use.axes for use in own] for path, own in found.items()} == {
        "embed": [("looked up", "kept")],
        "heads": [("kept", "contracted", "kept")],
        "layers": [("taken apart", "contracted", "kept")],
        "scale": [()],
        "spare": [],
    }
    assert found["scale"][0].primitive == "mul" and found["scale"][0].line.endswith(".model)")


# ----------------------------------------------------------------------- models

CONFIG = LlamaConfig(
    vocabulary_size=32, width=16, hidden=24, heads=4, kv_heads=2, layers=2, sequence_length=8
)
IDS = jnp.zeros((2, 8), jnp.int32)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_our_llama_is_read_as_the_defaults_have_it(scan, remat):
    model = Llama(dataclasses.replace(CONFIG, scan=scan, remat=remat))
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    report = views_of(lambda params, ids: model.apply({"params": params}, ids), params, IDS)
    by_hand = lrx.Views(stacked=(r"layers/.*",) if scan else ())
    expected = lrx.resolution.resolve(params, by_hand, rank=4)
    found = lrx.resolution.resolve(params, lrx.Views(inferred=report), rank=4)
    assert found.projected == expected.projected
    both = dataclasses.replace(by_hand, inferred=report)  # views of whole leaves, layers and all
    assert lrx.resolution.resolve(params, both, rank=4).projected == expected.projected
    assert len(found.projected) == 7 * (1 if scan else CONFIG.layers)
    assert report.at("embed/embedding").view == report.at("lm_head/kernel").view == DENSE
    assert report.at("norm/scale").reason.startswith("no product: mul")


def test_our_llama_with_a_tied_head():
    model = Llama(dataclasses.replace(CONFIG, tied_head=True))
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    report = views_of(lambda params, ids: model.apply({"params": params}, ids), params, IDS)
    row = report.at("embed/embedding")
    assert row.view == DENSE and {use.primitive for use in row.uses} == {"gather", "dot_general"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attended = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(24)(attended))), None


class Scanned(nn.Module):
    """Layers on the second axis, under remat, with names of axes."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(12, 8)(ids)
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        x, _ = stack()(x, None)
        return nn.Conv(4, (3,))(x)


def test_a_linen_model_with_scan_and_remat():
    model = Scanned()
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    report = views_of(model.apply, variables, IDS)
    block = "params/ScanCheckpointBlock_0"
    views = {row.path: row.view for row in report.rows if row.view is not None}
    projections = MatrixView(batch=(1,), rows=(0,), cols=(2, 3))
    assert views == {
        "params/Conv_0/kernel": MatrixView(rows=(0, 1), cols=(2,)),
        "params/Embed_0/embedding": DENSE,
        f"{block}/Dense_0/kernel": MatrixView(batch=(1,), rows=(0,), cols=(2,)),
        f"{block}/Dense_1/kernel": MatrixView(batch=(1,), rows=(0,), cols=(2,)),
        **{
            f"{block}/MultiHeadDotProductAttention_0/{name}/kernel": projections
            for name in ("query", "key", "value")
        },
        f"{block}/MultiHeadDotProductAttention_0/out/kernel": MatrixView(
            batch=(1,), rows=(0, 2), cols=(3,)
        ),
    }


def test_boxes_of_metadata_keep_their_paths():
    dense = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = dense.init(jax.random.key(0), normal(2, 6))
    report = views_of(dense.apply, variables, normal(2, 6))
    assert [row.path for row in report.rows] == ["params/bias", "params/kernel"]
    assert report.at("params/kernel").view == DENSE


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 5), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 5), 8, axis=(-2, -1), rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.norm(self.out(self.heads(self.embed(ids)))))


def test_an_nnx_model():
    graphdef, params = nnx.split(Nnx(nnx.Rngs(0)))
    report = views_of(lambda params, ids: nnx.merge(graphdef, params)(ids), params, IDS)
    assert {row.path: row.view for row in report.rows} == {
        "embed/embedding": DENSE,
        "heads/bias": None,
        "heads/kernel": MatrixView(rows=(0,), cols=(1, 2)),
        "norm/scale": None,
        "out/bias": None,
        "out/kernel": MatrixView(rows=(0, 1), cols=(2,)),
    }


def test_quantised_kernels_are_read_as_what_they_stand_for():
    params = {"w": lrx.linalg.quantize_nf4(normal(64, 64))}
    report = views_of(lambda params, x: x @ params["w"], params, normal(2, 64))
    assert report.at("w", (64, 64)).view == DENSE


# ------------------------------------------------------------------------ Views(inferred=)

FOREIGN = {
    "embedder": normal(9, 6), "block": {"weight": normal(8, 6), "gate": normal(2, 6, 6)},
    "lm_head": normal(6, 9), "norm": normal(6),
}  # fmt: skip


def foreign(params, ids):
    """Weights (out, in), as equinox has them, and two gates."""
    x = params["embedder"][ids] * params["norm"]
    x = jax.vmap(lambda x: params["block"]["weight"] @ x)(x)[:, :6]
    for gate in params["block"]["gate"]:
        x = jnp.tanh(x @ gate)
    return x @ params["lm_head"]


REPORT = views_of(foreign, FOREIGN, jnp.arange(4))


def test_inferred_views_take_the_defaults_place_and_rules_win():
    views = lrx.Views(inferred=REPORT)
    report = lrx.resolution.resolve(FOREIGN, views, rank=2)
    assert {view.path: view.view for view in report.projected} == {
        "block/gate": STACK,
        "block/weight": TRANSPOSED,
    }
    notes = {leaf.path: leaf.note for leaf in report.leaves}
    assert notes["lm_head"] == notes["embedder"] == "embedding, head or norm"
    ruled = lrx.Views(inferred=REPORT, rules={"lm_head": DENSE, "block/gate": None})
    projected = lrx.resolution.resolve(FOREIGN, ruled, rank=2).projected
    assert {view.path: view.view for view in projected} == {
        "block/weight": TRANSPOSED,
        "lm_head": DENSE,
    }


def test_an_optimizer_and_adapters_take_them():
    views = lrx.Views(inferred=REPORT)
    tx = lrx.galore(1e-2, rank=2, views=views)
    state = jax.eval_shape(tx.init, FOREIGN)
    hash(views)  # static data of transformations
    assert (
        lrx.explain(tx, FOREIGN).projected
        == lrx.resolution.resolve(FOREIGN, views, rank=2).projected
    )
    updates, _ = jax.eval_shape(tx.update, FOREIGN, state, FOREIGN)
    assert abstract(FOREIGN) == updates
    adaptation = lrx.adapt(
        FOREIGN, {"all-linear": lrx.adapters.lora(rank=2)}, jax.random.key(0), views=views
    )
    assert {site.path: site.view for site in adaptation.layout.sites} == {
        "block/gate": STACK,
        "block/weight": TRANSPOSED,
    }
    y = lrx.adapted(foreign)(lrx.attach(FOREIGN, adaptation), jnp.arange(4))
    np.testing.assert_allclose(y, foreign(FOREIGN, jnp.arange(4)), rtol=1e-5, atol=1e-6)


def test_a_rule_of_adapters_for_what_is_no_matrix_is_an_error():
    params = {"w": normal(6, 8), "position": normal(4, 6)}
    report = views_of(lambda p, x: (x + p["position"]) @ p["w"], params, normal(4, 6))
    with pytest.raises(ValueError, match=r"'position'.*no product: add at .*exclude="):
        lrx.adapt(
            params, {".*": lrx.adapters.lora(rank=2)}, jax.random.key(0),
            views=lrx.Views(inferred=report),
        )  # fmt: skip


def test_views_of_another_program_are_an_error():
    views = lrx.Views(inferred=REPORT)
    with pytest.raises(ValueError, match="inferred does not know the leaf 'kernel'"):
        lrx.resolution.resolve({"kernel": normal(6, 8)}, views, rank=2)
    with pytest.raises(ValueError, match=r"'embedder' of shape \(9, 7\)"):
        lrx.resolution.resolve({**FOREIGN, "embedder": normal(9, 7)}, views, rank=2)


def test_a_report_is_stored_and_read_and_its_views_are_those_of_before():
    stored = json.loads(json.dumps(REPORT.to_json()))
    read = ViewReport.from_json(stored)
    assert read == REPORT and lrx.Views(inferred=read) == lrx.Views(inferred=REPORT)
    assert [row.reason for row in read.rows] == [row.reason for row in REPORT.rows]


def test_the_table():
    lines = str(REPORT).splitlines()
    assert lines[:4] == [
        "leaf          shape      batch  rows  cols  read by",
        "block/gate    (2, 6, 6)  0      1     2     dot_general",
        "block/weight  (8, 6)     -      1     0     dot_general",
        "embedder      (9, 6)     -      0     1     gather",
    ]
    assert lines[-1].startswith("norm          (6,)       -      -     -     no product: mul at ")


def test_undecided_leaves_name_the_way_to_read_them():
    with pytest.raises(ValueError, match=r"lrx\.Views\(inferred=lrx\.functions\.views_of"):
        lrx.resolution.resolve({"kernel": normal(2, 6, 8)}, rank=2)
