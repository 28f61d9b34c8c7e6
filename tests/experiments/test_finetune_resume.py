"""The command: a run that is killed and started again ends where the uninterrupted one does, bit
for bit; exports."""

import dataclasses
import json
import random
import signal
import time

import pytest

from experiments.finetuning.base import parameter_digest
from experiments.finetuning.sources import open_base
from experiments.settings.finetuning_configuration import BaseConfig
from tests.experiments import commands, runs, tuning

pytestmark = pytest.mark.slow

STEPS, EVERY = 160, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    tuning.pretrained(folder)
    config = tuning.tiny(
        folder,
        adapter={"method": "lora(rank=2, dropout=0.1, init='pissa')"},
        schedule={"steps": STEPS, "accumulation": 2},
        checkpoint={"every": EVERY},
        run={"evaluate_every": 40, "compile_cache": True},
    )
    commands.write(folder, "finetuning_configuration", dataclasses.asdict(config))
    process = commands.start("finetune", folder, "whole", f"--export={folder}/exported")
    assert process.wait(400) == 0, (folder / "whole.log").read_text()
    return folder


def test_killed_at_random_and_resumed(folder):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    process = commands.start("finetune", folder, "killed")
    commands.wait_for_step(process, folder / "killed", generator.randint(2 * EVERY + 2, 120))
    time.sleep(generator.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert commands.start("finetune", folder, "killed").wait(300) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "killed")
    assert any(text.startswith("resumed") for text in runs.notes(folder / "killed"))


def test_terminated_saves_exits_with_0_and_says_how_to_resume(folder):
    process = commands.start("finetune", folder, "terminated")
    commands.wait_for_step(process, folder / "terminated", 33)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    log = (folder / "terminated.log").read_text()
    saved = max(int(path.name) for path in (folder / "terminated" / "checkpoints").iterdir())
    assert f"stopped after update {saved} of {STEPS}" in log
    assert (
        f"-m experiments.finetune --config={folder}/config.py --workdir={folder}/terminated" in log
    )
    assert not (folder / "terminated" / "summary.json").exists()
    assert commands.start("finetune", folder, "terminated").wait(300) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "terminated")


def test_the_command_tells_the_shares_and_exports(folder):
    log = (folder / "whole.log").read_text()
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    trained, total = summary["trainable_parameters"], summary["parameters"]
    assert f"trained {trained:,} of {total:,} parameters ({trained / total:.3%})" in log
    before, after = summary["domain_loss_before"], summary["domain_loss"]
    assert f"loss on base's domain    {before:.4f} before, {after:.4f} after" in log
    assert f"exported to {folder}/exported" in log
    models = [open_base(BaseConfig(source=str(folder / name)), 0) for name in ("exported", "whole")]
    exported, whole = (parameter_digest(base.read(base.placing())) for base in models)
    assert exported == whole


def test_a_run_that_is_over_is_exported_without_training(folder):
    before = (folder / "whole" / "metrics.jsonl").read_text()
    flags = (f"--export={folder}/transformers", "--export_format=huggingface")
    assert commands.start("finetune", folder, "whole", *flags).wait(120) == 0, (
        folder / "whole.log"
    ).read_text()
    assert (folder / "transformers" / "model.safetensors").is_file()
    assert (folder / "whole" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config.adapter.methd='x'"],
            "adapter.methd: section adapter has no key 'methd'; did you mean adapter.method?",
        ),
        (
            ["--config.adapter.method=lara(rank=2)"],
            "configuration error: adapter.method='lara(rank=2)': did you mean",
        ),
        (
            ["--config.base.source=nowhere"],
            "configuration error: base.source='nowhere' does not exist",
        ),
    ],
    ids=["unknown key", "adapter", "base"],
)
def test_the_command_exits_with_2_and_one_message(folder, flags, message):
    process = commands.start("finetune", folder, "refused", *flags)
    assert process.wait(120) == 2
    log = (folder / "refused.log").read_text()
    assert message in log
    assert "Traceback" not in log
    assert not (folder / "refused" / "config.json").exists()
