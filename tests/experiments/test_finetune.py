"""Fine-tuning runs in one process: what trains, what does not, what is measured, saved, resumed and
exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from experiments.data.tokenizer import ByteTokenizer
from experiments.finetuning import export
from experiments.finetuning.base import parameter_digest
from experiments.finetuning.model import Model
from experiments.finetuning.sources import open_base
from experiments.finetuning.task import Finetuning
from experiments.harness import metrics, training
from experiments.harness.runs import read_summary
from experiments.models import huggingface, llama
from experiments.settings.finetuning_configuration import BaseConfig
from experiments.settings.sections import ConfigurationError
from tests.experiments import runs, tuning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Many runs of few programs: compile each of them once."""
    names = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}
    names["jax_persistent_cache_min_compile_time_secs"] = 0
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    tuning.pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run with dropout: (its folder, its summary)."""
    config = tuning.tiny(
        folder, adapter={"method": "lora(rank=2, dropout=0.2)", "whole": ["norm/scale"]}
    )
    return folder / "whole", tuning.run(config, folder / "whole")


def params_of(workdir):
    """The model of a run folder, as `base.source` reads it."""
    base = open_base(BaseConfig(source=str(workdir)), 0)
    return base.read(base.placing())


def evaluated(config):
    """The figures before the first update, without a run."""
    task = Finetuning(config)
    return task.evaluate(task.initial())[0]


def mean_loss(config, params, batches):
    """Token mean by the model alone, summed in NumPy."""
    total = weight = 0.0
    for batch in batches:
        logits = llama.Llama(config).apply({"params": params}, batch["inputs"])
        losses = np.asarray(llama.token_losses(logits, batch["targets"]), np.float64)
        total, weight = total + (losses * batch["weights"]).sum(), weight + batch["weights"].sum()
    return total / weight


def test_a_run_records_what_it_did(folder, whole):
    workdir, summary = whole
    rows = metrics.read(workdir / "metrics.jsonl")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    # seven kernels a layer: (16, 16) q, o; (16, 8) k, v; (16, 32) gate, up; (32, 16) down; two
    # layers; and one norm
    trained = 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32)) + 16
    assert summary["trainable_parameters"] == trained
    assert summary["parameters"] == 259 * 16 * 2 + 2 * (512 + 256 + 1536 + 32) + 16
    assert summary["state_bytes"] == 8 * trained + 2 * 4
    assert any(f"{trained:,} trained" in text for text in runs.notes(workdir))
    assert summary["validation_loss"] == evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert summary["validation_loss_before"] == evaluations[0]["loss"]
    assert summary["domain_loss"] == evaluations[-1]["domain_loss"]
    # before the first update the base's domain is what the base's own last evaluation saw
    before = json.loads((folder / "base" / "summary.json").read_text())["validation_loss"]
    assert summary["domain_loss_before"] == pytest.approx(before, rel=1e-5)
    assert read_summary(workdir / "summary.json") == summary
    ledger = {
        row["component"]: row["bytes_measured"]
        for row in json.loads((workdir / "ledger.json").read_text())
    }
    assert ledger["parameters"] == 4 * trained
    assert ledger["frozen model"] == 4 * summary["parameters"]
    assert ledger["optimizer state"] == summary["state_bytes"]


def test_a_checkpoint_holds_what_trains_and_no_kernel_of_the_base(folder, whole):
    _, arrays = runs.final_arrays(whole[0])
    trained = {path: array for path, array in arrays.items() if path.startswith("params/")}
    assert sum(array.size for array in trained.values()) == whole[1]["trainable_parameters"]
    assert {path.split("/")[0] for path in arrays} == {"params", "opt_state", "fixed", "key"}
    base = params_of(folder / "base")
    assert np.abs(arrays["params/trainable/norm/scale"] - base["norm"]["scale"]).max() > 1e-4
    kernels = {leaf.shape for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim == 3}
    assert not kernels & {array.shape for array in arrays.values()}


def test_the_tuned_model_is_base_and_adapters_and_its_loss_the_summarys(folder, whole):
    workdir, summary = whole
    tuned, base = params_of(workdir), params_of(folder / "base")
    data = Finetuning(tuning.tiny(folder)).dataset.validation
    config = runs.tiny(folder).model
    before = mean_loss(config, base, data.evaluation(4, 512))
    assert before == pytest.approx(summary["validation_loss_before"], rel=1e-5)
    assert mean_loss(config, tuned, data.evaluation(4, 512)) == pytest.approx(
        summary["validation_loss"], rel=1e-4
    )
    _, arrays = runs.final_arrays(workdir)
    site = "params/sites/layers/attention/q_proj/kernel"
    a, b = (arrays[f"{site}/{name}"] for name in "ab")
    moved = (
        tuned["layers"]["attention"]["q_proj"]["kernel"]
        - base["layers"]["attention"]["q_proj"]["kernel"]
    )
    np.testing.assert_allclose(moved, 8 / 2 * a @ b, atol=1e-6)
    np.testing.assert_array_equal(tuned["embed"]["embedding"], base["embed"]["embedding"])


class Crash(Exception):
    pass


def crash_after(monkeypatch, step):
    collect = training._Training._collect

    def failing(self):
        collect(self)
        if self.step >= step:
            raise Crash

    monkeypatch.setattr(training._Training, "_collect", failing)


def interrupted(monkeypatch, config, workdir, step=7):
    with monkeypatch.context() as patch:
        crash_after(patch, step)
        with pytest.raises(Crash):
            tuning.run(config, workdir)


def test_a_crashed_run_resumes_bitwise(folder, whole, monkeypatch):
    config = tuning.tiny(
        folder, adapter={"method": "lora(rank=2, dropout=0.2)", "whole": ["norm/scale"]}
    )
    interrupted(monkeypatch, config, folder / "crashed")
    assert tuning.run(config, folder / "crashed")["status"] == "finished"
    assert "resumed from the checkpoint of step 4" in " ".join(runs.notes(folder / "crashed"))
    runs.assert_bitwise_equal(whole[0], folder / "crashed")


def test_dropout_draws_anew_and_is_off_without_a_key(folder):
    task = Finetuning(tuning.tiny(folder, adapter={"method": "lora(rank=2, dropout=0.2)"}))
    parts = task.parts.cut(task.frozen[0], jax.random.key(0), task.places)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1, parts["params"]
    )  # b starts at 0, where dropout changes nothing
    batch, fixed = task.host_batch(0), {"fixed": parts["fixed"]}
    loss = jax.jit(lambda rest: task.sums(params, batch, rest, *task.frozen)[0])
    first, again, other = (
        float(loss({**fixed, "key": jax.random.key(seed)})) for seed in (1, 1, 2)
    )
    assert first == again != other
    kept = float(loss(fixed))
    assert kept not in (first, other)
    tree = task.parts.plain(params, fixed, *task.frozen)
    assert kept == pytest.approx(float(task._loss(tree, batch)[0]), rel=1e-5)


def test_another_base_is_refused_on_resume(folder, monkeypatch):
    again = folder / "copy"
    (again / "checkpoints").parent.mkdir()
    base = params_of(folder / "base")
    write_exported(again, base)
    config = tuning.tiny(folder, base={"source": str(again)})
    interrupted(monkeypatch, config, folder / "changed")
    base["norm"]["scale"] = base["norm"]["scale"].at[3].add(1e-3)
    write_exported(again, base)
    with pytest.raises(
        ConfigurationError,
        match=r"base\.source=.*parameters changed since the checkpoint of step 4",
    ):
        tuning.run(config, folder / "changed")


def write_exported(folder, params):
    import shutil

    shutil.rmtree(folder)
    base = open_base(BaseConfig(source=str(folder.parent / "base")), 0)
    model = Model(tuning.tiny(folder.parent), base, ())
    export._write_run(folder, model.describe(tuning.tiny(folder.parent).data), params)


def test_an_exported_model_is_a_base_and_a_folder_of_transformers(folder, whole):
    workdir, summary = whole
    tuned = params_of(workdir)
    export.export(workdir, folder / "exported", "run")
    assert parameter_digest(params_of(folder / "exported")) == parameter_digest(tuned)
    found = open_base(BaseConfig(source=str(folder / "exported")), 0)
    assert (found.tokenizer, found.classes, found.domain.name) == (
        "bytes",
        (),
        str(folder / "rows.jsonl"),
    )
    export.export(workdir, folder / "transformers", "huggingface")
    config, params = huggingface.load(folder / "transformers")
    assert config.layers == 2
    jax.tree.map(np.testing.assert_array_equal, params, tuned)
    export.export(workdir, folder / "peft", "peft")
    base, views = params_of(folder / "base"), lrx.Views(stacked=("layers/.*",))
    adaptation = lrx.interop.peft.load(
        folder / "peft", base, lrx.interop.llama.torch_name, views=views
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), lrx.merge(base, adaptation), tuned
    )
    with pytest.raises(ConfigurationError, match="export=.*holds files; give another folder"):
        export.export(workdir, folder / "exported", "run")
    # tuned again, from the folder of transformers, which says neither tokenizer nor domain
    other = {"source": str(folder / "transformers")}
    with pytest.raises(
        ConfigurationError, match=r"data\.tokenizer='': the base's folder has no tokenizer\.json"
    ):
        tuning.run(tuning.tiny(folder, base=other), folder / "again")
    found = evaluated(tuning.tiny(folder, base=other, data={"tokenizer": "bytes"}))
    assert found["loss"] == pytest.approx(summary["validation_loss"], rel=1e-4)
    assert "domain_loss" not in found


def galore_run(folder, backprop):
    """A run by GaLore: (configuration, its folder, summary); one that is over is read back."""
    optimizer = {"name": "galore", "rank": 4, "backprop": backprop, "refresh_every": 5}
    config, workdir = (
        tuning.tiny(folder, adapter={"method": ""}, optimizer=optimizer),
        folder / f"galore {backprop}",
    )
    return config, workdir, tuning.run(config, workdir)


@pytest.mark.parametrize("backprop", [None, "projected"])
def test_the_whole_model_with_a_projection_optimizer(folder, backprop, monkeypatch):
    config, workdir, summary = galore_run(folder, backprop)
    assert summary["adapter"] is None
    assert summary["trainable_parameters"] == summary["parameters"]
    assert summary["validation_loss"] < summary["validation_loss_before"]
    assert any("projected gradients agree" in text for text in runs.notes(workdir)) == (
        backprop is not None
    )
    _, arrays = runs.final_arrays(workdir)
    tuned = params_of(workdir)
    np.testing.assert_array_equal(arrays["params/embed/embedding"], tuned["embed"]["embedding"])
    assert not any(path.startswith("fixed") for path in arrays)
    with pytest.raises(
        ConfigurationError, match="export_format='peft': the whole model was trained"
    ):
        export.export(workdir, folder / f"peft {backprop}", "peft")
    if backprop is not None:
        return
    interrupted(monkeypatch, config, folder / f"galore {backprop} crashed")
    tuning.run(config, folder / f"galore {backprop} crashed")
    runs.assert_bitwise_equal(workdir, folder / f"galore {backprop} crashed")


def test_full_and_projected_gradients_give_the_same_run(folder):
    losses = [runs.losses(galore_run(folder, backprop)[1])[0] for backprop in (None, "projected")]
    first = [np.array([row[0] for row in found.values()]) for found in losses]
    np.testing.assert_allclose(
        first[0][:2], first[1][:2], rtol=1e-5
    )  # clipped alike while no gradient is


def test_an_instructions_loss_is_that_of_its_response(folder):
    config = tuning.tiny(folder, data={"task": "instruction"}, schedule={"steps": 2})
    summary = tuning.run(config, folder / "instruction")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    train = Finetuning(config).dataset.train
    batch = train.batch(0)
    assert batch["weights"].sum(axis=1).tolist() != [16] * 4
    tokenizer, responses = ByteTokenizer(), {row["response"] for row in rows}
    for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
        assert tokenizer.decode(targets[weights > 0]) in responses
    loss = mean_loss(runs.tiny(folder).model, params_of(folder / "base"), [batch])
    row = next(
        row
        for row in metrics.read(folder / "instruction" / "metrics.jsonl")
        if row["kind"] == "train"
    )
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["tokens"] == batch["weights"].sum()
    assert summary["validation_loss"] is not None


@pytest.mark.parametrize("method", ["lora(rank=2)", ""])
def test_classes_of_text_get_a_head_and_the_language_model_stays_measurable(
    folder, method, monkeypatch
):
    config = tuning.tiny(
        folder,
        data={"task": "classification", "batch_size": 16},
        adapter={"method": method},
        schedule={"steps": 60},
        run={"evaluate_every": 30},
        optimizer={"learning_rate": 3e-2 if method else 1e-2},
    )
    workdir = folder / f"classes {bool(method)}"
    summary = tuning.run(config, workdir)
    assert summary["validation_accuracy"] > 0.95 > summary["validation_accuracy_before"]
    assert summary["perplexity"] is None
    assert summary["domain_loss"] != summary["domain_loss_before"]
    tuned, base = params_of(workdir), params_of(folder / "base")
    assert tuned["classifier"]["kernel"].shape == (16, 2)
    np.testing.assert_array_equal(tuned["lm_head"]["kernel"], base["lm_head"]["kernel"])
    _, arrays = runs.final_arrays(workdir)
    assert not any("lm_head" in path for path in arrays)
    found = open_base(BaseConfig(source=str(workdir)), 0)
    assert found.classes == ("even", "odd")
    if method:
        export.export(workdir, folder / "classifier", "run")
        again = {
            "base": {"source": str(folder / "classifier")},
            "data": {"task": "classification", "batch_size": 16},
        }
        kept = evaluated(tuning.tiny(folder, **again))
        assert kept["accuracy"] == pytest.approx(summary["validation_accuracy"], abs=1e-6)
        assert (
            kept["domain_accuracy"] == kept["accuracy"]
        )  # the base's domain is that of its last tuning
        with pytest.raises(ConfigurationError, match="is for language models"):
            export.export(workdir, folder / "no", "huggingface")


def test_digits_turned_by_a_right_angle(folder):
    common = {
        "data": {
            "name": "digits",
            "task": "classification",
            "batch_size": 64,
            "sequence_length": None,
        },
        "schedule": {"steps": 60},
        "run": {"evaluate_every": 60, "evaluation_tokens": None, "evaluation_batch_size": 256},
    }
    new = {"base": {"source": "", "preset": "digits"}, "adapter": {"method": ""}}
    base = tuning.run(tuning.tiny(folder, **common, **new), folder / "digits")
    assert base["validation_accuracy"] > 0.5
    common["data"]["name"] = "digits_rotated"
    adapter = {"method": "lora(rank=4)", "rules": [["patch_embed/kernel", "lora(rank=2)"]]}
    config = tuning.tiny(folder, **common, base={"source": str(folder / "digits")}, adapter=adapter)
    summary = tuning.run(config, folder / "rotated")
    assert summary["domain_accuracy_before"] == pytest.approx(base["validation_accuracy"])
    assert summary["validation_accuracy"] > summary["validation_accuracy_before"] + 0.1
    assert summary["domain_accuracy"] < summary["domain_accuracy_before"]
    # six kernels of four layers at rank 4, and the patches, 4 x 64, at rank 2
    assert summary["trainable_parameters"] == 4 * 4 * (4 * (64 + 64) + 2 * (64 + 128)) + 2 * (
        4 + 64
    )


def test_layers_rules_and_exclusions_are_heeded(folder):
    def trained(**adapter):
        return Finetuning(tuning.tiny(folder, adapter=adapter)).parts.count

    each = 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    assert trained() == 2 * each
    assert trained(layers=[1]) == each
    assert trained(exclude=[".*/mlp/.*"]) == 2 * (each - 2 * 3 * (16 + 32))
    assert trained(targets=".*/q_proj/kernel") == 2 * 2 * 32
    assert trained(
        targets=".*/(q|v)_proj/kernel", rules=[[".*/q_proj/kernel", "lora(rank=1)"]]
    ) == 2 * (32 + 2 * 24)
    assert trained(targets=".*/(q|v)_proj/kernel", rules=[[".*/q_proj/kernel", ""]]) == 2 * 2 * 24
    assert trained(targets=".*/q_proj/kernel", whole=["embed/embedding"]) == 2 * 2 * 32 + 259 * 16


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"base": {"source": "nowhere"}},
            r"base\.source='nowhere' does not exist: name a run folder",
        ),
        (
            {"adapter": {"targets": ".*/qproj/kernel"}},
            r"adapter\.method='lora\(rank=2\)': .*qproj.*Did you mean",
        ),
        (
            {"data": {"sequence_length": 32}},
            r"data\.sequence_length=32: 32 tokens, the base takes 16; shorten it",
        ),
        (
            {"data": {"name": "digits", "task": "classification", "sequence_length": None}},
            r"holds images, the base",
        ),
        ({"data": {"name": "absent.jsonl"}}, r"absent\.jsonl.*no such file"),
        (
            {"adapter": {"method": ""}, "optimizer": {"name": "galore", "rank": 9}},
            r"optimizer\.rank=9: the base's smallest matrix dimension is 8",
        ),
        (
            {"adapter": {"method": "oft(block=4)"}, "optimizer": {"name": "altlora"}},
            r"optimizer\.name='altlora': .*none of the 7 leaves .* is a factor",
        ),
        ({"base": {"domain": "lm1b"}}, r"data\.name='lm1b' is not prepared"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(folder, tmp_path, sections, message):
    if "base" in sections:
        sections = {"base": {"source": str(folder / "base")} | sections["base"]}
    with pytest.raises(ConfigurationError, match=message):
        tuning.run(tuning.tiny(folder, **sections), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_dtypes_and_rematerialisation_of_the_base_can_be_changed(folder):
    base = {
        "source": str(folder / "base"),
        "param_dtype": "bfloat16",
        "dtype": "bfloat16",
        "remat": True,
    }
    task = Finetuning(tuning.tiny(folder, base=base | {"domain": "none"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(task.frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(task.abstract["params"])} == {
        jnp.dtype(jnp.float32)
    }
    assert (task.model.config.dtype, task.model.config.remat, task.exact) == (
        "bfloat16",
        True,
        False,
    )
    assert task.domain is None


@pytest.mark.parametrize("name", ["lora_plus", "altlora"])
def test_optimizers_of_the_factors_take_the_adapters_scale(folder, name):
    """The first update is the library's own, given the frozen scales; with a scale of 1 AltLoRA's
    is another."""
    settings = {
        "name": name,
        "learning_rate": 1e-2 if name == "lora_plus" else 10.0,
        "clip_norm": None,
    }
    settings |= {"ratio": 4.0} if name == "lora_plus" else {"damping": 1e-3}
    config = tuning.tiny(
        folder,
        optimizer=settings,
        schedule={"steps": 1, "warmup_steps": 0},
        adapter={
            "method": "lora(rank=2, alpha=6, init=orthogonal())",
            "targets": ".*/down_proj/kernel",
        },
    )
    task = Finetuning(config)
    state = task.initial()
    begun = jax.tree.map(jnp.copy, state["params"])
    batch = jax.tree.map(jnp.asarray, task.host_batch(0))

    def loss(params):
        total, weight = task.sums(params, batch, {"fixed": state["fixed"]}, *task.frozen)
        return total / weight

    grads = jax.jit(jax.grad(loss))(begun)

    def moves(method):
        return jax.jit(lambda grads: method.update(grads, method.init(begun), begun)[0])(grads)

    if name == "lora_plus":
        expected = moves(lrx.lora_plus(1e-2, ratio=4.0))
    else:
        expected = moves(lrx.altlora(10.0, scale=state["fixed"], damping=1e-3))
        other = moves(lrx.altlora(10.0, scale=1.0, damping=1e-3))
        assert (
            float(optax.tree.norm(optax.tree.sub(other, expected)) / optax.tree.norm(expected))
            > 0.5
        )
    after, _ = jax.jit(task.update())(state, batch, *task.frozen)
    moved = optax.tree.sub(after["params"], begun)
    # Adam's first step divides a gradient by itself, rounding and all
    assert (
        float(optax.tree.norm(optax.tree.sub(moved, expected)) / optax.tree.norm(expected)) < 1e-2
    )
