"""A tokenizer of one's own from pre-training to export: it sets the vocabulary, and every folder
brings it."""

import json
import shutil

import pytest

from experiments.data.tokenizer import make_tokenizer
from experiments.finetuning import export as tuned_export
from experiments.finetuning.sources import open_base
from experiments.finetuning.task import Finetuning
from experiments.harness import export, training
from experiments.settings.finetuning_configuration import BaseConfig
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs, tokenizers, tuning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base by a tokenizer.json that is gone since, and conversations."""
    pytest.importorskip(
        "tokenizers", reason="a tokenizer.json needs the tokenizers package (extra tokenizers)"
    )
    folder = tmp_path_factory.mktemp("own")
    runs.write_text(folder / "text")
    path = tokenizers.byte_level(
        folder / "files", [("t", "e"), ("a", "n")], eos_token="<|endoftext|>"
    )
    config = runs.tiny(folder, data={"tokenizer": path}, schedule={"steps": 2})
    assert config.model.vocabulary_size == 256 + 2 + 3
    training.run(config, folder / "base", verbose=False)
    shutil.rmtree(folder / "files")
    talk = [{"role": "user", "content": "te"}, {"role": "assistant", "content": "an an"}]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": talk, "n": i}) + "\n" for i in range(40))
    )
    return folder


@pytest.fixture(scope="module")
def tuned(folder):
    path = str(folder / "rows.jsonl")
    config = tuning.tiny(
        folder,
        data={"task": "instruction", "name": path, "validation": path, "sequence_length": 12},
        schedule={"steps": 2},
        run={"domain_tokens": 64, "evaluation_tokens": 64},
    )
    task = Finetuning(config)
    batch = task.dataset.train.batch(0)
    end = task.dataset.tokenizer.token("<|im_end|>")
    assert batch["targets"][0][batch["weights"][0] > 0].tolist()[-1] == end
    assert "template chatml" in task.headline()
    assert tuning.run(config, folder / "tuned")["domain_loss"] is not None
    return folder / "tuned"


def names(folder):
    return sorted(path.name for path in folder.glob("tokenizer*"))


def test_every_folder_brings_the_tokenizer(folder, tuned):
    brought = ["tokenizer.json", "tokenizer_config.json"]
    own = make_tokenizer(str(folder / "base"))
    export.export(folder / "base", folder / "transformers")
    assert "AutoTokenizer" in (folder / "transformers" / "README.md").read_text()
    for form in tuned_export.FORMATS:
        tuned_export.export(tuned, folder / form, form)
    for name in ("base", "tuned", "transformers", *tuned_export.FORMATS):
        assert names(folder / name) == brought, name
        assert make_tokenizer(str(folder / name)).identity == own.identity
    for name in ("base", "tuned", "transformers", "run", "huggingface"):
        base = open_base(BaseConfig(source=str(folder / name)), 0)
        assert base.tokenizer == str(folder / name / "tokenizer.json")
        assert base.domain is None or base.domain.tokenizer == base.tokenizer
    config = json.loads((folder / "huggingface" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (261, own.eos)


def test_a_folder_without_its_tokenizer_is_refused_before_any_work(folder, tuned):
    shutil.copytree(tuned, folder / "bare")
    for name in names(folder / "bare"):
        (folder / "bare" / name).unlink()
    description = json.loads((folder / "bare" / "model.json").read_text()) | {
        "tokenizer": "/gone/tokenizer.json"
    }
    (folder / "bare" / "model.json").write_text(json.dumps(description))
    with pytest.raises(
        ConfigurationError, match=r"data\.tokenizer='.*tokenizer\.json': no such file"
    ):
        tuned_export.export(folder / "bare", folder / "nowhere", "huggingface")
    assert not (folder / "nowhere").exists()


def test_new_parameters_have_the_vocabulary_of_the_data(tmp_path):
    path = tokenizers.sentencepiece(tmp_path / "own.model")
    size = make_tokenizer(path).vocabulary_size
    new = open_base(BaseConfig(source="", preset="nano"), 0, path)
    assert new.config.vocabulary_size == size != 259
    assert open_base(BaseConfig(source="", preset="nano"), 0, "bytes").config.vocabulary_size == 259
    runs.write_text(tmp_path / "text")
    too_small = runs.tiny(tmp_path, data={"tokenizer": path}, model={"vocabulary_size": size - 1})
    message = rf"has {size} tokens, the model {size - 1}; set model\.vocabulary_size={size}"
    with pytest.raises(ConfigurationError, match=message):
        training.run(too_small, tmp_path / "run", verbose=False)
