# Every target makes the environment it needs, once: a stamp inside it is older than setup.cfg only when that changed.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)
JOBS ?= 2
RUNS ?= $(wildcard runs/*/)
export TF_CPP_MIN_LOG_LEVEL ?= 2

BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu
# Tests compile more than they compute: XLA's older CPU emitters, and one LLVM module a program, take half the time.
# `make test-peer` has the usual ones.
# The XLA of Pythons newer than 3.11 no longer knows the former, and ends at a flag that it does not know.
ONE_MODULE := --xla_cpu_parallel_codegen_split_count=1
QUICK := $(if $(filter 3.11,$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')),--xla_cpu_use_fusion_emitters=false) $(ONE_MODULE)
ONE := $(CPU) XLA_FLAGS="$(QUICK)"
EIGHT := $(CPU) XLA_FLAGS="$(QUICK) --xla_force_host_platform_device_count=8"
TPU := $(CPU) ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 \
	TPU_ACCELERATOR_TYPE=v5litepod-4
# what each test costs; `python -m tests.durations` prints it
SPENT := --cpu-seconds=.pytest_cache/cpu_seconds
ONE_PROCESS := not multi_device and not multi_process and not tpu_compile and not cuda_compile and not peer and not zoo

# A stamp of an environment that was not finished is none.
.DELETE_ON_ERROR:
.PHONY: help train finetune test test-fast test-full test-multi test-tpu test-cuda test-peer test-zoo test-newest lint compare study evidence report clean

help:
	@echo "make train      pre-train a small LLaMA with dct_adamw on embedded text; writes a checkpoint and a report"
	@echo "make finetune   LoRA of that model on documentation texts (trains it first if it is not there)"
	@echo "make test       lint, types, doctests, fast and slow tests, tests on eight fake devices (40 minutes on 2 cores)"
	@echo "make test-fast  doctests and fast tests (3 minutes on 2 cores)"
	@echo "make lint       ruff (rules and format) and mypy"
	@echo "make compare    the study of all optimizers, docs/results/compare.md (hours on 2 cores; may be interrupted and resumed)"
	@echo "make report     one page from finished runs: make report RUNS='runs/a runs/b'"
	@echo "make test-tpu   compile for TPUs that are not there (libtpu); make test-peer: compare with PyTorch"
	@echo "make test-cuda  compile kernels for GPUs that are not there (jax-cuda13-plugin)"
	@echo "make test-zoo   models of other packages (tunix, gemma, equinox, haiku, flaxmodels)"
	@echo "make test-newest  fast tests with the newest jax that a newer Python here can install"

# $(call environment,DIRECTORY,EXTRAS,OPTIONS OF PIP)
define environment
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: needs Python 3.11 or newer with venv and pip (on Debian: apt install python3.11-venv);" \
			"name it with 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; fi
	@if [ ! -x $(1)/bin/python ]; then rm -rf $(1) && $(PYTHON) -m venv $(1); fi
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3) -e ".[$(2)]"
	@touch $(1)/installed
endef

.venv/installed: setup.cfg pyproject.toml
	$(call environment,.venv,experiments$(comma)test)
.venv-tpu/installed: setup.cfg pyproject.toml
	$(call environment,.venv-tpu,experiments$(comma)test$(comma)tpu)
.venv-cuda/installed: setup.cfg pyproject.toml
	$(call environment,.venv-cuda,experiments$(comma)test$(comma)cuda)
.venv-peer/installed: setup.cfg pyproject.toml
	$(call environment,.venv-peer,experiments$(comma)test$(comma)peer)
# Some packages of the zoo ask for far more than their models import: these come without what they ask for.
ZOO_ALONE := gemma==3.3.0 kauldron==1.4.2
.venv-zoo/installed: setup.cfg pyproject.toml Makefile
	$(call environment,.venv-zoo,test$(comma)zoo)
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ZOO_ALONE)
# A Python that is newer than the one that everything else runs on: there pip finds newer releases of jax.
NEWER := $(shell for p in python3.13 python3.12 $(HOME)/.pyenv/versions/3.13*/bin/python $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
.venv-newest/installed: PYTHON = $(NEWER)
.venv-newest/installed: setup.cfg pyproject.toml
	$(call environment,.venv-newest,experiments$(comma)test,--upgrade --upgrade-strategy eager)
comma := ,

train: .venv/installed
	$(BIN)/python -m experiments.pretrain --config=experiments/configs/default.py

finetune: .venv/installed
	@if [ ! -e runs/default/summary.json ]; then $(MAKE) train; fi
	$(BIN)/python -m experiments.finetune --config=experiments/configs/finetune/documentation.py

report: .venv/installed
	$(BIN)/python -m experiments.report $(RUNS) --output=runs/report.html

compare: .venv/installed
	$(BIN)/python -m experiments.study --time

# the old names, until the next minor version
study: compare
evidence: .venv/installed
	$(BIN)/python -m experiments.evidence --time

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-fast: .venv/installed
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and $(ONE_PROCESS)"

test-full: .venv/installed
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) $(SPENT)/one_process.json -m "$(ONE_PROCESS)"

test-multi: .venv/installed
	$(EIGHT) $(BIN)/python -m pytest -q -n $(JOBS) $(SPENT)/eight_devices.json -m multi_device tests
	$(ONE) $(BIN)/python -m pytest -q -n $(JOBS) $(SPENT)/processes.json -m multi_process tests/multi_process

test: lint
	$(MAKE) test-full
	$(MAKE) test-multi

test-tpu: .venv-tpu/installed
	.venv-tpu/bin/python -c 'import libtpu'  # without it the tests would skip
	$(TPU) .venv-tpu/bin/python -m pytest -q -m tpu_compile tests/tpu_compile

test-cuda: .venv-cuda/installed
	.venv-cuda/bin/python -c 'import jax_cuda13_plugin'  # without it the tests would skip
	$(CPU) .venv-cuda/bin/python -m pytest -q -m cuda_compile tests/cuda_compile

test-peer: .venv-peer/installed
	$(CPU) .venv-peer/bin/python -m pytest -q -m peer tests/peer

test-zoo: .venv-zoo/installed
	.venv-zoo/bin/python -c 'import tunix'  # without it the tests would skip
	$(ONE) .venv-zoo/bin/python -m pytest -q -m zoo tests/zoo

# What `make test-fast` runs.
ifeq ($(NEWER),)
test-newest:
	@echo "make test-newest: no Python newer than 3.11 is here, so the newest jax was not tried"
else
test-newest: .venv-newest/installed
	.venv-newest/bin/python -c 'import sys, jax, flax; print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'
	$(CPU) XLA_FLAGS="$(ONE_MODULE)" .venv-newest/bin/python -m pytest -q -n $(JOBS) -m "not slow and $(ONE_PROCESS)"
endif

clean:
	rm -rf .venv .venv-tpu .venv-cuda .venv-peer .venv-zoo .venv-newest *.egg-info .pytest_cache .mypy_cache .ruff_cache
