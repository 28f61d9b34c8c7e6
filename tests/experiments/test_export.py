"""A run becomes a folder of Hugging Face's: the newest good checkpoint, exactly, and how text
becomes tokens."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.tokenizer import ByteTokenizer
from experiments.harness import checkpoint, export, training, workdir
from experiments.models import huggingface
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs

pytest.importorskip("safetensors", reason="needs the safetensors package")


def parameters(config, step):
    rng = np.random.default_rng(step)
    shapes = huggingface.shapes(config.model)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a run leaves of two updates: its configuration, and checkpoints with more than
    parameters in them."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = runs.tiny(folder.parent)
    store = checkpoint.Checkpoints(
        folder / "checkpoints", sides={"layers/mlp/up_proj/kernel": ("rows", 4)}
    )
    for step in (1, 2):
        state = {
            "key": jax.random.key(step),
            "moments": jnp.ones((7, 3)),
            "none": jnp.zeros((0, 2)),
        }
        store.save(step, {"params": parameters(config, step), "opt_state": state})
    store.close()
    checkpoint.write_json(folder / "config.json", workdir.as_json(config))
    return folder, config


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


def assert_holds(folder, expected):
    _, params = huggingface.load(folder)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_newest_step_is_written(run, saved, tmp_path, capsys):
    output = tmp_path / "exported"
    assert export.main(["--workdir", str(run), "--output", str(output)]) == 0
    assert "update 2 of" in capsys.readouterr().out
    assert_holds(output, parameters(saved[1], 2))
    values = json.loads((output / "config.json").read_text())
    assert (
        values["hidden_size"],
        values["num_key_value_heads"],
        values["max_position_embeddings"],
    ) == (16, 1, 16)
    assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, 257, 258]
    note = (output / "README.md").read_text()
    assert (
        "# tiny, update 2" in note and "byte i of UTF-8" in note and "257 ends a document" in note
    )
    assert "ids = torch.tensor([list(text.encode())])" in note
    assert list("né".encode()) == ByteTokenizer().encode("né").tolist()


@pytest.mark.slow
def test_a_real_run(tmp_path):
    runs.write_text(tmp_path / "text")
    config = runs.tiny(
        tmp_path,
        schedule={"steps": 2},
        run={"evaluate_every": 0, "evaluation_tokens": 64},
    )
    training.run(config, tmp_path / "run", verbose=False)
    assert export.export(tmp_path / "run", tmp_path / "exported")[0] == 2
    _, arrays = runs.final_arrays(tmp_path / "run")
    expected = {
        path.removeprefix("params/"): array
        for path, array in arrays.items()
        if path.startswith("params/")
    }
    config, params = huggingface.load(tmp_path / "exported")
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found.keys() == expected.keys()
    assert all(found[path].tobytes() == array.tobytes() for path, array in expected.items())


def test_a_damaged_step_is_passed_over(run, saved, tmp_path, capsys):
    files = [path for path in (run / "checkpoints" / "2" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert export.export(run, tmp_path / "exported")[0] == 1
    assert "damaged" in capsys.readouterr().err
    assert_holds(tmp_path / "exported", parameters(saved[1], 1))


def test_a_model_is_not_overwritten_unless_told(run, tmp_path, capsys):
    arguments = ["--workdir", str(run), "--output", str(tmp_path / "exported")]
    assert export.main(arguments) == 0
    (tmp_path / "exported" / "README.md").write_text("mine")
    assert export.main(arguments) == 2
    assert "holds config.json, model.safetensors" in capsys.readouterr().err
    assert (tmp_path / "exported" / "README.md").read_text() == "mine"
    assert export.main(["--workdir", str(run), "--output", str(run), "--overwrite"]) == 2
    assert "is not that of a model" in capsys.readouterr().err
    assert export.main([*arguments, "--overwrite"]) == 0
    assert "update 2" in (tmp_path / "exported" / "README.md").read_text()


def test_sentencepiece_models_are_copied(run, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options = {"vocab_size": 30, "bos_id": -1, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "pieces"), **options
    )
    values = json.loads((run / "config.json").read_text())
    values["data"]["tokenizer"] = str(tmp_path / "pieces.model")
    (run / "config.json").write_text(json.dumps(values))
    export.export(run, tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == (
        tmp_path / "pieces.model"
    ).read_bytes()
    entries = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert entries["bos_token_id"] is None and entries["eos_token_id"] == 2
    assert "tokenizer.model" in (tmp_path / "exported" / "README.md").read_text()
    (tmp_path / "pieces.model").unlink()
    with pytest.raises(ConfigurationError, match=r"pieces.model': no such file"):
        export.export(run, tmp_path / "again")


def test_errors(run, tmp_path, capsys):
    assert export.main(["--workdir", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    assert "holds no run; give a folder that experiments.pretrain wrote" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    for step in (1, 2):
        (run / "checkpoints" / str(step) / checkpoint.MANIFEST).unlink()
    assert export.main(["--workdir", str(run), "--output", str(tmp_path / "x")]) == 1
    assert "holds no finished checkpoint" in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"adapter": {}, "base": {}}))
    assert export.main(["--workdir", str(run), "--output", str(tmp_path / "x")]) == 2
    assert (
        "is a fine-tuning run; `python -m experiments.finetune` exports it"
        in capsys.readouterr().err
    )
    # a configuration of nothing would be that of the default model
    wrong = {
        "{": "is not JSON",
        "[]": "is [], where an object is needed",
        "{}": "config.json has no 'name'",
    }
    model = {key: value for key, value in config.items() if key != "model"}
    wrong |= {
        json.dumps(model): "config.json has no 'model'",
        json.dumps(config | {"model": None}): "model is None",
    }
    for text, words in wrong.items():
        (run / "config.json").write_text(text)
        assert export.main(["--workdir", str(run), "--output", str(tmp_path / "x")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_partial_restore_compares_what_it_reads(run, saved):
    store = checkpoint.Checkpoints(run / "checkpoints", sides={"not/a/matrix": ("rows", 3)})
    like = {"params": {"lm_head": {"kernel": jax.ShapeDtypeStruct((16, 259), np.float32)}}}
    with pytest.raises(checkpoint.MismatchError, match=r"absent here"):
        store.restore(like)
    restored = store.restore(like, partial=True)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(like)
    expected = parameters(saved[1], 2)["lm_head"]["kernel"]
    np.testing.assert_array_equal(restored.tree["params"]["lm_head"]["kernel"], expected)
    like["params"]["lm_head"]["kernel"] = jax.ShapeDtypeStruct((16, 260), np.float32)
    with pytest.raises(
        checkpoint.MismatchError, match=r"params/lm_head/kernel is float32\[16, 259\] there"
    ):
        store.restore(like, partial=True)
    with pytest.raises(checkpoint.MismatchError, match=r"params/more is absent there"):
        store.restore({"params": {"more": jax.ShapeDtypeStruct((2,), np.float32)}}, partial=True)
    store.close()
