"""Checkpoints: every kind of damage is an error or a fallback, never a silent restore."""

import errno
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import checkpoint, manifest, outputs
from experiments.harness.checkpoint import (
    CheckpointError,
    Checkpoints,
    DiskFullError,
    MismatchError,
)


def make_tree(value=1.0):
    params = {
        "layers": {
            "kernel": jnp.full((16, 24), float(value)),
            "half": jnp.full((5,), value, jnp.bfloat16),
        }
    }
    return {
        "params": params,
        "opt_state": (
            optax.adamw(1e-3).init(params),
            optax.EmptyState(),
            {"key": jax.random.key(3), "none": jnp.zeros((0, 0))},
        ),
    }


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_and_wait(store, step):
    store.save(step, make_tree(step))
    store.wait()


def kernel(restored):
    return float(restored.tree["params"]["layers"]["kernel"][0, 0])


@pytest.fixture
def lines():
    return []


@pytest.fixture
def store(tmp_path, lines):
    """Three finished steps, of which the newest two are kept."""
    store = Checkpoints(tmp_path / "checkpoints", keep=2, say=lines.append)
    for step in (10, 20, 30):
        store.save(step, make_tree(step), {"tokens": 7 * step})
    store.wait()
    yield store
    store.close()


@pytest.fixture
def counted(tmp_path, lines):
    """Two steps whose states count their updates."""
    store = Checkpoints(tmp_path / "checkpoints", keep=2, say=lines.append)
    for step in (20, 30):
        adam, empty, rest = (tree := make_tree(step))["opt_state"]
        adam = (adam[0]._replace(count=jnp.asarray(step, jnp.int32)), *adam[1:])
        store.save(step, tree | {"opt_state": (adam, empty, rest)}, {"tokens": 7 * step})
    store.wait()
    yield store
    store.close()


def largest_file(store, step):
    files = [path for path in (store.directory / str(step) / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_round_trip_is_exact_and_keeps_the_newest(store):
    assert store.steps() == [30, 20]
    restored = store.restore(abstract(make_tree()))
    assert (restored.step, restored.extra) == (30, {"tokens": 210})
    expected = make_tree(30)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_saved_values_are_those_at_the_call_although_the_buffers_are_donated(tmp_path):
    store = Checkpoints(tmp_path)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {"a": jnp.zeros((500, 500)), "b": jnp.zeros(3)}
    for number in range(1, 4):
        store.save(number, tree)
        for _ in range(5):
            tree = step(tree)
    store.wait()
    restored = store.restore(abstract(tree))
    assert restored.step == 3
    np.testing.assert_array_equal(np.unique(restored.tree["a"]), [10.0])
    store.close()


def test_any_flipped_bit_is_found(store, lines):
    path = largest_file(store, 30)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert kernel(store.restore(abstract(make_tree()))) == 20
    assert "30" in lines[0] and "sha256" in lines[0] and path.name in lines[0]
    store.verify = False
    lines.clear()
    assert store.restore(abstract(make_tree())).step == 30 or "cannot read" in lines[0]


@pytest.mark.parametrize(
    "damage", ["truncate", "remove file", "manifest", "manifest bit", "no manifest", "empty folder"]
)
def test_damage_falls_back_and_says_so(store, lines, damage):
    folder = store.directory / "30"
    manifest = folder / checkpoint.MANIFEST
    if damage == "truncate":
        path = largest_file(store, 30)
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "remove file":
        largest_file(store, 30).unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "manifest bit":
        manifest.write_text(manifest.read_text().replace('"tokens": 210', '"tokens": 211'))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        (store.directory / "40").mkdir()
        (store.directory / "40" / "state").mkdir()
        assert store.restore(abstract(make_tree())).step == 30
        assert "40: never finished" in lines[0]
        return
    assert kernel(store.restore(abstract(make_tree()))) == 20
    assert len(lines) == 1 and str(folder) in lines[0]


def resealed(folder, **entries):
    """Change a manifest so that it matches its own digest."""
    file = folder / checkpoint.MANIFEST
    values = json.loads(file.read_text()) | entries
    del values["digest"]
    outputs.write_json(file, {**values, "digest": checkpoint.digest(values)})


def put_halves(store):
    """Float16 data where the manifest says float32."""
    tree = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float16) if leaf.dtype == jnp.float32 else leaf, make_tree(30)
    )
    leaves = json.loads((store.directory / "30" / checkpoint.MANIFEST).read_text())["leaves"]
    store.save(40, tree)
    store.wait()
    resealed(store.directory / "40", leaves=leaves)


def renumbered(store):
    (store.directory / "30").rename(store.directory / "32")
    return store.directory / "32"


def no_manifest(store):
    (store.directory / "30" / checkpoint.MANIFEST).unlink()
    return store.directory / "30" / checkpoint.MANIFEST


def written(store, data):
    (store.directory / "30" / checkpoint.MANIFEST).write_bytes(data)


# What is done to the newest step, and what is said of it.
DISAGREEMENTS = {
    "another number": (renumbered, "the folder 32 holds step 30"),
    "another number, sealed": (
        lambda store: resealed(renumbered(store), step=32),
        "its state has seen 30 updates",
    ),
    "no files, sealed": (
        lambda store: resealed(store.directory / "30", files={}),
        "is not in manifest.json",
    ),
    "unlisted file": (
        lambda store: (store.directory / "30/state/d/0f").write_bytes(b""),
        "state/d/0f is not in",
    ),
    "array": (lambda store: written(store, b"[]"), r"is \[\], where an object is needed"),
    "lacks a key": (lambda store: written(store, b"{}"), "has no 'format'"),
    "encoding": (lambda store: written(store, b"\xff"), "is not UTF-8"),
    "nesting": (lambda store: written(store, b"[" * 100_000), "nested deeper"),
    "folder for a manifest": (lambda store: no_manifest(store).mkdir(), "is no file"),
    "format, sealed": (
        lambda store: resealed(store.directory / "30", format=7),
        "has format 7, this program reads 1",
    ),
    "leaf, sealed": (
        lambda store: resealed(store.directory / "30", leaves={"a": [[2], 3]}),
        r"leaves\['a'\].* is 3",
    ),
    "leaves, sealed": (
        lambda store: resealed(store.directory / "30", leaves={}),
        "is stored but not in",
    ),
    "half precision": (put_halves, "is stored as float16.*says float32"),
}


def updates_done(restored):
    """The state's own counter, as a run compares it."""
    done = int(restored.tree["opt_state"][0][0].count)
    return None if done == restored.step else f"its state has seen {done} updates"


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_what_disagrees_is_damage_and_the_step_before_it_is_taken(counted, lines, kind):
    damage, words = DISAGREEMENTS[kind]
    damage(counted)
    restored = counted.restore(abstract(make_tree()), check=updates_done)
    assert (restored.step, kernel(restored)) in ((20, 20), (30, 30))
    assert restored.step == (30 if kind == "half precision" else 20)
    assert any(re.search(words, line) and line.endswith("passed over") for line in lines), lines


def test_swapped_folders_are_both_damage(counted, lines):
    for source, target in (("30", "x"), ("20", "30"), ("x", "20")):
        (counted.directory / source).rename(counted.directory / target)
    with pytest.raises(CheckpointError, match=r"damaged: \[30, 20\]"):
        counted.restore(abstract(make_tree()), check=updates_done)
    assert "the folder 30 holds step 20" in lines[0] and "the folder 20 holds step 30" in lines[1]


@pytest.mark.parametrize("name", ["²", "٣", "030", "+30", "1e3", "30.orbax", "-1", "40"])
def test_a_name_that_no_save_writes_is_no_step(store, name):
    (store.directory / name).write_text("a file") if name == "40" else (
        store.directory / name
    ).mkdir()
    assert store.steps() == [30, 20]
    assert store.restore(abstract(make_tree())).step == 30
    assert checkpoint.stored_sides(store.directory) == {}


def test_another_meaning_of_the_same_shapes_is_refused(tmp_path):
    """How many heads share a kernel does not show in its shape."""
    store = Checkpoints(tmp_path, meaning={"model": {"heads": 4, "rope": (1, 2)}})
    save_and_wait(store, 1)
    again = Checkpoints(tmp_path, meaning={"model": {"heads": 4, "rope": (1, 2), "newer": 3}})
    assert again.restore(abstract(make_tree())).step == 1
    other = Checkpoints(tmp_path, meaning={"model": {"heads": 2}})
    with pytest.raises(
        MismatchError, match="was written with model.heads=4, the configuration now says 2"
    ):
        other.restore(abstract(make_tree()))
    values = json.loads((tmp_path / "1" / checkpoint.MANIFEST).read_text())
    del values["meaning"], values["digest"]  # as older runs wrote it
    outputs.write_json(
        tmp_path / "1" / checkpoint.MANIFEST, {**values, "digest": checkpoint.digest(values)}
    )
    assert other.restore(abstract(make_tree())).step == 1


def test_nothing_finished_is_a_fresh_start_but_nothing_sound_is_an_error(store, tmp_path):
    for step in (20, 30):
        largest_file(store, step).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .* verifies \(damaged: \[30, 20\]\).*start over"
    ):
        store.restore(abstract(make_tree()))
    other = Checkpoints(tmp_path / "other", say=lambda line: None)
    (tmp_path / "other" / "9").mkdir()
    assert other.restore(abstract(make_tree())) is None


def test_another_models_checkpoint_names_the_first_leaf(store):
    like = abstract(make_tree())
    like["params"]["layers"]["kernel"] = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    with pytest.raises(
        MismatchError,
        match=r"leaf params/layers/kernel is float32\[16, 24\] there and float32\[16, 32\] here",
    ):
        store.restore(like)
    like["params"]["layers"]["kernel"] = jax.ShapeDtypeStruct((16, 24), jnp.bfloat16)
    with pytest.raises(MismatchError, match=r"float32\[16, 24\] there and bfloat16\[16, 24\] here"):
        store.restore(like)
    like = abstract(make_tree())
    like["params"]["more"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(MismatchError, match=r"params/more is absent there"):
        store.restore(like)
    like = abstract(make_tree())
    del like["params"]["layers"]["half"]
    with pytest.raises(MismatchError, match=r"params/layers/half .* absent here"):
        store.restore(like)


def test_another_side_of_a_square_matrix_is_refused(tmp_path):
    tree = {"basis": jnp.ones((4, 2))}
    store = Checkpoints(tmp_path, sides={"q_proj/kernel": ("rows", 2)})
    store.save(1, tree)
    store.wait()
    assert store.restore(tree).step == 1
    store.sides = {"q_proj/kernel": ["cols", 2]}
    with pytest.raises(MismatchError, match="q_proj/kernel"):
        store.restore(tree)
    store.close()


# What orbax 0.12.8 raised on a full tmpfs of 2 MB, and what the system raises for our own files.
FULL_DISK = [
    ValueError(
        'RESOURCE_EXHAUSTED: Error writing "a/0.0": Failed to write 1640802 bytes: No space left '
        "[os_error_code='28']"
    ),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=["orbax", "system"])
@pytest.mark.parametrize("moment", ["begin", "background"])
def test_full_disk_names_the_folder_and_keeps_the_last_good_step(store, monkeypatch, error, moment):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(store._writer, "save" if moment == "begin" else "wait_until_finished", fail)
    with pytest.raises(
        DiskFullError, match=rf"step 40 in {store.directory} .*disk is full .*last good step is 30"
    ):
        save_and_wait(store, 40)
    monkeypatch.undo()
    store._writer.wait_until_finished()
    assert store.steps() == [30, 20]
    store.save(41, make_tree(41))
    store.wait()
    assert store.restore(abstract(make_tree())).step == 41


def test_manifest_is_written_after_the_arrays(store, monkeypatch):
    """A process killed while orbax writes leaves a folder without a manifest."""
    gate = threading.Event()
    checksums = manifest.checksums
    monkeypatch.setattr(
        manifest, "checksums", lambda folder, names: gate.wait(30) and checksums(folder, names)
    )
    store.save(40, make_tree(40))
    assert not (store.directory / "40" / checkpoint.MANIFEST).exists()
    assert store.steps() == [40, 30, 20]  # nothing is pruned for the sake of an unfinished step
    gate.set()
    store.wait()
    assert json.loads((store.directory / "40" / checkpoint.MANIFEST).read_text())["step"] == 40


def test_save_again_at_a_damaged_step_replaces_it(store, lines):
    largest_file(store, 30).write_bytes(b"")
    again = Checkpoints(store.directory, keep=2, say=lines.append)
    assert again.restore(abstract(make_tree())).step == 20
    again.save(30, make_tree(99))
    again.wait()
    assert kernel(again.restore(abstract(make_tree()))) == 99
    again.close()


def test_keep_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
