"""What every adapter must obey; the table of adapters and what is compiled for each stand in
tests/laws/adapters.py."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters.families.lora import INITS
from lowrank_jax.matrices import DENSE
from tests.laws import adapters as a

FLOAT32, BFLOAT16 = 2e-6, 2.0**-6


@a.every_row()
def test_the_start_is_the_base_or_what_its_documentation_says(row):
    found = a.ran(row, "start")
    if row.starts == "base":
        assert a.error(found["attached"][0], found["base"]) < FLOAT32
        assert a.error(found["kernels"], a.params()) < FLOAT32
    else:
        assert a.error(found["attached"][0], found["base"]) > 1e-4


@a.every_row()
def test_some_gradient_is_not_zero_at_the_start_and_none_is_zero_everywhere(row):
    assert (
        max(
            float(jnp.abs(leaf).max())
            for leaf in jax.tree.leaves(a.ran(row, "start")["attached"][1])
        )
        > 1e-4
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(a.ran(row, "moved")["attached"][1]):
        assert float(jnp.abs(leaf).max()) > 1e-5, jax.tree_util.keystr(path)


@a.every_row()
def test_outputs_and_gradients_are_those_of_the_effective_kernels(row):
    found = a.ran(row, "moved")
    assert a.error(found["kernels"], a.params()) > 1e-2, (
        "the adapter changes nothing here, so nothing is tested"
    )
    assert a.error(found["attached"][0], found["effective"][0]) < 5 * FLOAT32
    assert a.error(found["attached"][1], found["effective"][1]) < 20 * FLOAT32


@a.every_row()
def test_merged_kernels_are_the_effective_ones_and_come_apart_again(row):
    found = a.ran(row, "moved")
    assert a.error(found["merged"], found["kernels"]) < FLOAT32
    if row.removable:
        assert a.error(found["unmerged"], a.params()) < 20 * FLOAT32
    else:
        with pytest.raises(
            ValueError, match=r"'dense/kernel'.*pass the parameters from before the merge as base="
        ):
            lrx.adapters.unmerge(found["merged"], a.moved(row))
    same = lrx.adapters.unmerge(found["merged"], a.moved(row), base=a.params())
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(a.params())))


@a.every_row(more=a.FOREIGN)
def test_plain_lora_is_the_effective_kernel_with_ranks_of_its_own_in_each_layer(row):
    found, wanted, errors = a.converted(row, rank=8)
    assert a.error(found, wanted) < 5 * FLOAT32
    assert max(float(own.max()) for own in errors.values()) < 5 * FLOAT32


@a.every_row(unless=lambda row: not row.fast)
def test_the_reported_error_of_a_conversion_is_that_of_its_delta(row):
    *kernels, errors = a.converted(row, rank=1)
    adds = [jax.tree.map(np.subtract, one, a.params()) for one in kernels]
    for path, reported in errors.items():
        found, wanted = (np.asarray(one[path.split("/")[0]]["kernel"], np.float64) for one in adds)
        norms = np.linalg.norm(wanted, axis=(-2, -1))
        measured = np.linalg.norm(found - wanted, axis=(-2, -1)) / np.where(norms == 0, 1, norms)
        np.testing.assert_allclose(reported, measured, atol=1e-5)
        assert reported.max() > 1e-3 or row.name == "vera"


@a.every_row()
def test_a_weight_of_zero_is_the_base(row):
    found = a.ran(row, "off")
    assert a.error(found["attached"][0], found["base"]) < FLOAT32
    assert a.error(found["kernels"], a.params()) < FLOAT32


@a.every_row()
def test_a_scan_is_its_unrolled_layers_and_jit_is_eager(row):
    found = a.ran(row, "moved")
    assert a.error(found["unrolled"], found["attached"][0]) < FLOAT32
    with jax.disable_jit():
        eager = a.attached(a.params(), a.moved(row), a.inputs(), scan=False)
    assert a.error(eager, found["attached"][0]) < 5 * FLOAT32


@a.every_row()
def test_a_stack_is_its_layers_one_by_one(row):
    kernels, path = a.params()["stack"]["kernel"], "stack/kernel"
    _, site = a.moved(row).layout.by_path[path]
    one = dataclasses.replace(site, shape=site.shape[1:], view=DENSE)
    arrays = a.moved(row).arrays(path)
    shared = arrays.pop("shared")
    for number in range(a.LAYERS):
        p = jax.tree.map(lambda leaf, i=number: leaf[i], arrays) | {"shared": shared}
        alone = row.adapter.effective(one, kernels[number], p)
        assert a.error(alone, a.ran(row, "moved")["kernels"]["stack"]["kernel"][number]) < FLOAT32


@a.every_row()
def test_the_layers_of_a_stack_start_differently_where_they_are_random(row):
    drawn = [
        leaf
        for leaf in jax.tree.leaves(a.start(row).train["sites"].get("stack/kernel", {}))
        if leaf.std() > 0
    ]
    assert all(float(jnp.abs(leaf[0] - leaf[1]).max()) > 0 for leaf in drawn if row.name != "vera")


@a.every_row()
def test_what_trains_is_counted_by_the_formula(row):
    formula = sum(row.count(n, m) for n, m in a.MATRICES) + row.shared
    adaptation = a.start(row)
    assert (
        adaptation.trained
        == formula
        == sum(leaf.size for leaf in jax.tree.leaves(adaptation.train))
    )
    assert f"{formula:,} trained" in str(adaptation)


@a.every_row()
def test_adapt_works_on_shapes_alone(row):
    adapt = functools.partial(lrx.adapt, rules=row.adapter, views=a.VIEWS)
    shapes = jax.eval_shape(
        lambda params, key: adapt(params, key=key), a.params(), jax.random.key(0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, a.start(row))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes.train))


@a.every_row()
def test_a_bfloat16_model_stays_one(row):
    found = a.low_precision(row)
    assert all(
        leaf.dtype == jnp.bfloat16
        for leaf in jax.tree.leaves((found["attached"], found["effective"]))
    )
    assert a.error(found["attached"], found["exact"]) < BFLOAT16
    assert a.error(found["merged"], found["exact"]) < BFLOAT16


@a.every_row()
def test_every_named_axis_is_that_axis_of_the_kernel(row):
    """`axes` names for each array which of its axes are as long as the kernel's rows, its columns,
    or the rank."""
    adapter, site = a.start(row).layout.by_path["dense/kernel"]
    sizes = {"rows": site.n, "cols": site.m, "rank": site.rank}
    for name, array in a.start(row).arrays("dense/kernel").items():
        if name in ("scale", "shared"):
            continue
        own = adapter.axes(site)[name]
        assert len(own) == array.ndim
        for axis, size in zip(own, array.shape, strict=True):
            assert (
                axis is None
                or size == sizes[axis]
                or (axis in ("rows", "cols") and sizes[axis] % size == 0)
            )


def test_arrays_survive_a_checkpoint(tmp_path):
    rows = [row for row in a.ROWS if row.fast or row.name == "vera-regenerated"]
    tree = {row.name: {"train": a.moved(row).train, "frozen": a.moved(row).frozen} for row in rows}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "adapters", jax.tree.map(jnp.zeros_like, tree))
    for row in rows:
        again = a.moved(row).replace(
            train=restored[row.name]["train"], frozen=restored[row.name]["frozen"]
        )
        for found, leaf in zip(jax.tree.leaves(again), jax.tree.leaves(a.moved(row)), strict=True):
            assert found.dtype == leaf.dtype and np.array_equal(found, leaf)


def test_every_family_and_initialiser_is_a_row():
    """A new family, or a new start of LoRA, must be a row of the table."""
    families = {getattr(lrx.adapters, name) for name in lrx.adapters.__all__}
    families = {
        one for one in families if isinstance(one, type) and issubclass(one, lrx.adapters.Adapter)
    }
    assert families - {lrx.adapters.Adapter} == {type(row.adapter) for row in a.ROWS}
    starts = {row.adapter.start_of for row in a.ROWS if isinstance(row.adapter, lrx.adapters.lora)}
    assert starts >= set(INITS.values())
