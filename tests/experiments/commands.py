"""Runs as a user starts them: commands in processes of their own."""

import os
import subprocess
import sys
import time

from tests.experiments.runs import ROOT

# as in conftest: programs are compiled with little work
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
CONFIG = """
from experiments.settings import {module} as configuration

def get_config():
    config = configuration.template()
    for section, table in {values!r}.items():
        if isinstance(table, dict):
            for key, value in table.items():
                config[section][key] = value
        else:
            config[section] = table
    return config
"""


def write(folder, module, values):
    """`folder`/config.py, with the values of a configuration of experiments.settings.MODULE."""
    (folder / "config.py").write_text(CONFIG.format(module=module, values=values))


def start(program, folder, name, *flags):
    """`experiments.PROGRAM` on `folder`/config.py; all runs of a folder share one cache of compiled
    programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", f"experiments.{program}", f"--config={folder}/config.py"]
    command += [f"--workdir={folder / name}", "--noreport", *flags]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT | cache, stdout=log, stderr=log
        )


def wait_for_step(process, workdir, step):
    """Until metrics.jsonl holds `step`; polled finely, so that the signal falls anywhere within an
    update."""
    deadline = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and f'"step": {step}, "loss"' in path.read_text():
            return
        assert process.poll() is None, f"ended before step {step}"
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")
