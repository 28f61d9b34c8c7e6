"""Checkpoints: every kind of damage is an error or a fallback, never a silent restore."""

import errno
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import checkpoint
from experiments.checkpoint import CheckpointError, Checkpoints, DiskFullError, MismatchError


def make_tree(value=1.0):
    params = {"layers": {"kernel": jnp.full((16, 24), float(value)), "half": jnp.full((5,), value, jnp.bfloat16)}}
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


def test_nothing_finished_is_a_fresh_start_but_nothing_sound_is_an_error(store, tmp_path):
    for step in (20, 30):
        largest_file(store, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* verifies \(damaged: \[30, 20\]\).*start over"):
        store.restore(abstract(make_tree()))
    other = Checkpoints(tmp_path / "other", say=lambda line: None)
    (tmp_path / "other" / "9").mkdir()
    assert other.restore(abstract(make_tree())) is None


def test_another_models_checkpoint_names_the_first_leaf(store):
    like = abstract(make_tree())
    like["params"]["layers"]["kernel"] = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    with pytest.raises(
        MismatchError, match=r"leaf params/layers/kernel is float32\[16, 24\] there and float32\[16, 32\] here"
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
        "RESOURCE_EXHAUSTED: Error writing \"a/0.0\": Failed to write 1640802 bytes: No space left [os_error_code='28']"
    ),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=["orbax", "system"])
@pytest.mark.parametrize("moment", ["begin", "background"])
def test_full_disk_names_the_folder_and_keeps_the_last_good_step(store, monkeypatch, error, moment):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(store._writer, "save" if moment == "begin" else "wait_until_finished", fail)
    with pytest.raises(DiskFullError, match=rf"step 40 in {store.directory} .*disk is full .*last good step is 30"):
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
    checksums = checkpoint._checksums
    monkeypatch.setattr(checkpoint, "_checksums", lambda folder: gate.wait(30) and checksums(folder))
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
