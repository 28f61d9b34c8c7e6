"""The command: a run that is killed and started again ends where the uninterrupted one does, bit for bit; exports."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments import bases
from tests.experiments import runs, tuning

pytestmark = pytest.mark.slow

STEPS, EVERY = 160, 10
CONFIG = """
from experiments import tuning_configuration

def get_config():
    config = tuning_configuration.template()
    for section, table in {values!r}.items():
        if isinstance(table, dict):
            for key, value in table.items():
                config[section][key] = value
        else:
            config[section] = table
    return config
"""


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
    (folder / "config.py").write_text(CONFIG.format(values=dataclasses.asdict(config)))
    assert start(folder, "whole", f"--export={folder}/exported").wait(400) == 0, (folder / "whole.log").read_text()
    return folder


def start(folder, name, *flags):
    """The command as a user gives it, with a compile cache shared by all runs of this module."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "experiments.finetune", f"--config={folder}/config.py"]
    command += [f"--workdir={folder / name}", "--noreport", *flags]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and f'"step": {step}, "loss"' in path.read_text():
            return
        assert process.poll() is None, f"ended before step {step}"
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


def test_killed_at_random_and_resumed(folder):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    process = start(folder, "killed")
    wait_for_step(process, folder / "killed", generator.randint(2 * EVERY + 2, 120))
    time.sleep(generator.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert start(folder, "killed").wait(300) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "killed")
    assert any(text.startswith("resumed") for text in runs.notes(folder / "killed"))


def test_terminated_saves_exits_with_0_and_says_how_to_resume(folder):
    process = start(folder, "terminated")
    wait_for_step(process, folder / "terminated", 33)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    log = (folder / "terminated.log").read_text()
    saved = max(int(path.name) for path in (folder / "terminated" / "checkpoints").iterdir())
    assert f"stopped after update {saved} of {STEPS}" in log
    assert f"-m experiments.finetune --config={folder}/config.py --workdir={folder}/terminated" in log
    assert not (folder / "terminated" / "summary.json").exists()
    assert start(folder, "terminated").wait(300) == 0
    runs.assert_bitwise_equal(folder / "whole", folder / "terminated")


def test_the_command_tells_the_shares_and_exports(folder):
    log = (folder / "whole.log").read_text()
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    trained, total = summary["trainable_parameters"], summary["parameters"]
    assert f"trained {trained:,} of {total:,} parameters ({trained / total:.3%})" in log
    before, after = summary["domain_loss_before"], summary["domain_loss"]
    assert f"loss on base's domain    {before:.4f} before, {after:.4f} after" in log
    assert f"exported to {folder}/exported" in log
    models = [bases.open_base(bases.BaseConfig(source=str(folder / name)), 0) for name in ("exported", "whole")]
    exported, whole = (bases.digest(base.read(base.placing())) for base in models)
    assert exported == whole


def test_a_run_that_is_over_is_exported_without_training(folder):
    before = (folder / "whole" / "metrics.jsonl").read_text()
    flags = (f"--export={folder}/transformers", "--export_format=huggingface")
    assert start(folder, "whole", *flags).wait(120) == 0, (folder / "whole.log").read_text()
    assert (folder / "transformers" / "model.safetensors").is_file()
    assert (folder / "whole" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.adapter.methd='x'"], 'Did you mean "method" instead of "methd"?'),
        (["--config.adapter.method=lara(rank=2)"], "configuration error: adapter.method='lara(rank=2)': did you mean"),
        (["--config.base.source=nowhere"], "configuration error: base.source='nowhere' does not exist"),
    ],
    ids=["unknown key", "adapter", "base"],
)
def test_the_command_exits_with_2_and_one_message(folder, flags, message):
    process = start(folder, "refused", *flags)
    assert process.wait(120) == 2
    log = (folder / "refused.log").read_text()
    assert message in log
    assert "Traceback" not in log
    assert not (folder / "refused" / "config.json").exists()
