"""What every test process starts from: the CPU, one device, 32-bit numbers, and markers given by
folder."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

from tests.durations import pytest_addoption, pytest_configure  # noqa: F401

TESTS = Path(__file__).parent
TIERS = ("multi_device", "multi_process", "tpu_compile", "cuda_compile", "peer", "zoo")


def pytest_collection_modifyitems(items):
    """A test in the folder of a tier carries its marker without saying so."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            tier = item.path.relative_to(TESTS).parts[0]
            if tier in TIERS:
                item.add_marker(tier)


def pytest_runtest_setup(item):
    """Most of a test's time goes into LLVM: programs are compiled without its optimisations, XLA's
    own stay."""
    for_devices = any(item.get_closest_marker(tier) for tier in ("tpu_compile", "cuda_compile"))
    jax.config.update("jax_disable_most_optimizations", not for_devices)
    if item.get_closest_marker("multi_device") and jax.device_count() < 8:
        pytest.skip(
            "needs 8 devices: run `make test-multi`, which fakes them in a process of their own"
        )


@pytest.fixture(scope="session")
def golden():
    """The recorded values in third_party/golden, by file name without its ending."""
    import json

    folder = TESTS.parent / "third_party" / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text())
