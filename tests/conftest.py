"""What every test process starts from: the CPU, one device, 32-bit numbers, and markers given by
folder."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

from tests.durations import pytest_addoption, pytest_configure  # noqa: F401

TESTS = Path(__file__).parent
ALONE = ("test_programs",)  # files whose tests share nothing
TIERS = ("multi_device", "multi_process", "tpu_compile", "cuda_compile", "peer", "zoo")


def pytest_collection_modifyitems(items):
    """A test in the folder of a tier carries its marker without saying so; tests that share programs
    run in one process."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            tier = item.path.relative_to(TESTS).parts[0]
            if tier in TIERS:
                item.add_marker(tier)
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    # the longest groups first, so that no process waits for the other at the end
    slow = {_group(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: _group(item) not in slow)


def _group(item) -> str:
    """Tests of one row of a table share its compiled program, tests of a file its fixtures."""
    if not item.path.is_relative_to(TESTS) or item.path.stem in ALONE:
        return ""
    given = getattr(item, "callspec", None)
    for value in given.params.values() if given else ():
        if type(value).__module__.startswith("tests.laws.") and hasattr(value, "name"):
            return f"{type(value).__name__} {value.name}"
    return str(item.path)


def pytest_collection_finish():
    """The collected tests live on: the garbage collector need not look at them again.

    It must look at what tests leave behind as often as ever: jax keeps the compiled programs of a
    few thousand functions at most, and forgets those of living ones for the sake of dead ones.
    """
    gc.collect()
    gc.freeze()


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
