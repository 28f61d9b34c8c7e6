"""Safetensors folders: bits, shards and every kind of damage; the package's own reader and writer
are the reference."""

import json
import sys
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.interop import safetensors

package = pytest.importorskip("safetensors.numpy", reason="needs the safetensors package")

DTYPES = (
    "float64",
    "float32",
    "float16",
    jnp.bfloat16,
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


def make(seed=0):
    """One tensor of every dtype, in an order that would leave wide items unaligned, and odd
    shapes."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"t{i}": (10 * rng.normal(size=(3, 5))).astype(dtype)
        for i, dtype in enumerate(reversed(DTYPES))
    }
    return tensors | {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 4), np.float16)}


def layers(count=6, width=8):
    return {f"layers.{i}.weight": np.full((width, width), i, np.float32) for i in range(count)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


class Lazy:
    """An array that is made when NumPy asks for it; `alive` holds those that still exist."""

    def __init__(self, value, alive=None, fails=False):
        self.value, self.alive, self.fails = value, alive, fails
        self.shape, self.dtype = value.shape, value.dtype

    def __array__(self, dtype=None, copy=None):
        if self.fails:
            raise RuntimeError("the device is gone")
        array = np.array(self.value)
        if self.alive is not None:
            self.alive.append(weakref.ref(array))
        return array


@pytest.mark.parametrize("limit", [5 * 10**9, 100])
def test_folder_round_trip_is_exact(tmp_path, limit):
    tensors = make()
    files = safetensors.write(tmp_path, tensors, max_shard_bytes=limit)
    assert (len(files) == 1) == (limit > 100)
    reader = safetensors.read(tmp_path)
    assert_same(reader, tensors)
    for name, array in tensors.items():
        assert (reader.shapes[name].shape, reader.shapes[name].dtype) == (array.shape, array.dtype)
    assert f"{len(tensors)} tensors" in repr(reader)


def test_the_package_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    tensors = make()
    safetensors.write(tmp_path / "ours.safetensors", tensors)
    assert_same(package.load_file(tmp_path / "ours.safetensors"), tensors)
    package.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(safetensors.read(tmp_path / "theirs.safetensors"), tensors)
    about = {
        "shape": "(3, 4)",
        "dtype": "float32",
    }  # words of the user's own, which a tensor's entry has too
    package.save_file(tensors, tmp_path / "described.safetensors", metadata=about)
    assert_same(safetensors.read(tmp_path / "described.safetensors"), tensors)
    length = int.from_bytes((tmp_path / "ours.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "ours.safetensors").read_bytes()[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0, name


def test_jax_arrays_and_strided_ones(tmp_path):
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    safetensors.write(
        tmp_path, {"jax": jnp.asarray(weight, jnp.bfloat16), "strided": weight.T[:, ::2]}
    )
    reader = safetensors.read(tmp_path)
    np.testing.assert_array_equal(reader["strided"], weight.T[:, ::2])
    np.testing.assert_array_equal(reader["jax"].astype(np.float32), weight)


def test_shards_keep_the_order_and_the_limit(tmp_path):
    tensors = layers(5) | {"large": np.ones((40, 40), np.float32), "last": np.ones(3, np.float32)}
    files = safetensors.write(tmp_path, tensors, max_shard_bytes=600)
    names = [file.name for file in files]
    assert names == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)] + [
        safetensors.INDEX
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    shards = [
        [name for name, file in index["weight_map"].items() if file == shard]
        for shard in names[:-1]
    ]
    assert shards == [
        ["layers.0.weight", "layers.1.weight"],
        ["layers.2.weight", "layers.3.weight"],
        ["layers.4.weight"],
        ["large"],
        ["last"],
    ]
    assert_same(safetensors.read(tmp_path), tensors)


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    alive, most = [], 0

    class Counted(Lazy):
        def __array__(self, dtype=None, copy=None):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            return super().__array__(dtype, copy)

    tensors = {name: Counted(value, alive) for name, value in layers(12).items()}
    for limit in (5 * 10**9, 600):
        safetensors.write(tmp_path, tensors, max_shard_bytes=limit)
    assert len(alive) == 24 and most <= 1  # besides the one being made
    reader = safetensors.read(tmp_path)
    first = reader["layers.1.weight"]
    gone = weakref.ref(first)
    del first
    assert gone() is None
    np.testing.assert_array_equal(reader["layers.1.weight"], 1.0)


@pytest.mark.parametrize("before", [10**9, 300, 600])
@pytest.mark.parametrize("after", [10**9, 300, 600])
def test_another_model_takes_the_place_of_the_first(tmp_path, before, after):
    (tmp_path / "config.json").write_text("{}")
    safetensors.write(tmp_path, layers(6), max_shard_bytes=before)
    new = {name: -array for name, array in layers(4).items()}
    files = safetensors.write(tmp_path, new, max_shard_bytes=after)
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files} | {
        "config.json"
    }
    assert_same(safetensors.read(tmp_path), new)


@pytest.mark.parametrize("limit", [10**9, 300])
def test_a_write_that_fails_leaves_the_old_files(tmp_path, limit):
    safetensors.write(tmp_path, layers(3), max_shard_bytes=300)
    before = {path.name for path in tmp_path.iterdir()}
    broken = layers(6) | {"last": Lazy(np.zeros(3, np.float32), fails=True)}
    with pytest.raises(RuntimeError, match="the device is gone"):
        safetensors.write(tmp_path, broken, max_shard_bytes=limit)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert_same(safetensors.read(tmp_path), layers(3))


def test_one_file_by_its_own_name(tmp_path):
    path = tmp_path / "new" / "adapter_model.safetensors"
    assert safetensors.write(path, layers(6), max_shard_bytes=300) == [path]
    assert_same(safetensors.read(path), layers(6))
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model.safetensors nor .*adapter_model.safetensors"
    ):
        safetensors.read(path.parent)


@pytest.mark.parametrize("keep", [0, 5, 20, -1, -100])
@pytest.mark.parametrize("limit", [10**9, 300])
def test_truncated_files_are_named(tmp_path, keep, limit):
    file = safetensors.write(tmp_path, layers(6), max_shard_bytes=limit)[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated or no safetensors file"):
        safetensors.read(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    *shards, index = safetensors.write(tmp_path, layers(4), max_shard_bytes=600)
    good = json.loads(index.read_text())

    def damaged(change):
        values = json.loads(json.dumps(good))
        change(values["weight_map"])
        index.write_text(json.dumps(values))
        return tmp_path

    with pytest.raises(ValueError, match=r"model-00002.* 1 is not expected: layers.3.weight"):
        safetensors.read(damaged(lambda names: names.pop("layers.3.weight")))
    with pytest.raises(ValueError, match=r"model-00001.* lacks 1 tensor: layers.9.weight"):
        safetensors.read(damaged(lambda names: names.update({"layers.9.weight": shards[0].name})))
    with pytest.raises(
        ValueError, match=r"weight_map\['layers.0.weight'\] is '../other.safet.* leaves the folder"
    ):
        safetensors.read(
            damaged(lambda names: names.update({"layers.0.weight": "../other.safetensors"}))
        )
    for text, words in {"{": "is not JSON", "[]": "is \\[\\]", "{}": "has no 'weight_map'"}.items():
        index.write_text(text)
        with pytest.raises(ValueError, match=rf"index.json {words}.*download it again"):
            safetensors.read(tmp_path)
    with pytest.raises(
        ValueError, match=r"weight_map\['layers.1.weight'\] is 3, where a string is needed"
    ):
        safetensors.read(damaged(lambda names: names.update({"layers.1.weight": 3})))
    index.write_text(json.dumps(good))
    shards[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing, though"
    ):
        safetensors.read(tmp_path)


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        safetensors.read(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="c is of dtype complex64: convert it to one of float64, float32"
    ):
        safetensors.write(tmp_path, {"c": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        safetensors.write(tmp_path, layers(1), max_shard_bytes=0)
    with pytest.raises(ValueError, match="nothing to write"):
        safetensors.write(tmp_path, {})
    assert not list(tmp_path.iterdir())
    safetensors.write(tmp_path, layers(2))
    with pytest.raises(
        KeyError, match=r"holds no 'layer.1.weight'; did you mean 'layers.1.weight'\?"
    ):
        safetensors.read(tmp_path)["layer.1.weight"]
    (tmp_path / safetensors.INDEX).write_text("{}")
    with pytest.raises(
        ValueError, match="holds both model.safetensors and model.safetensors.index.json"
    ):
        safetensors.read(tmp_path)
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "f8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(ValueError, match=r"f8.safetensors: x is of type F8_E4M3; known are F64"):
        safetensors.read(tmp_path / "f8.safetensors")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """The package takes the last one."""
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"x": {entry}, "x": {entry}}}'.encode()
    (tmp_path / "twice.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4)
    )
    with pytest.raises(
        ValueError, match="the header of .*twice.safetensors is not JSON: the key 'x' stands twice"
    ):
        safetensors.read(tmp_path / "twice.safetensors")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    safetensors.write(tmp_path, layers(1))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank_jax\[huggingface\]'"):
        safetensors.read(tmp_path)


def test_long_lists_of_names_are_cut():
    with pytest.raises(ValueError, match=r"^here lacks 30 tensors: n0, .*, n19, and 10 more$"):
        safetensors.check_names([], [f"n{i}" for i in range(30)], "here")
    safetensors.check_names(["b", "a"], ["a", "b"], "here")
