# make demo   set up, build, train, print a table          make test   everything that must hold before a commit
# make gpu    on a machine with an NVIDIA GPU: build, test on it, measure: gpu-build, gpu-test and gpu-bench in turn,
#             each stopped after GPU_SECONDS. With OFFLINE=1 in PYTHON as it is, with its packages: nothing is downloaded.
# Variables: PYTHON (3.11 or later), TORCH (which PyTorch to install), TRITON (which, where PyTorch brings none), GPU_JAX
# (which JAX make gpu installs), VENV (where to), LOPT_CUDA (AUTO, ON, OFF), CUDA_ARCHITECTURES (what CMake calls so,
# separated by semicolons; empty: those of cmake/cuda_code.cmake).

OFFLINE ?=
PYTHON ?= $(shell $(if $(OFFLINE),,command -v python3.11 ||) command -v python3 || echo python3.11)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
GPU_JAX ?= jax[cuda13]
VENV ?= .venv
CUDA_ARCHITECTURES ?=
LOPT_CUDA ?= AUTO
GPU_SECONDS ?= 570

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lopt_fast-installed
STAMP := $(INSTALLED)-$(LOPT_CUDA)
# Without the CUDA kernels, which take minutes to compile, where nothing is installed yet.
DEMO_STAMP := $(firstword $(wildcard $(INSTALLED)-*) $(INSTALLED)-OFF)
NATIVE := CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*) $(wildcard kernels/*/*.cc kernels/*/*.cu kernels/*/*.h)
CXX_FILES = $(wildcard csrc/*.cc csrc/*.h kernels/*/*.cc kernels/*/*.cu kernels/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench gpu gpu-build gpu-test gpu-bench clean

help:
	@echo "make demo | test | install | lint | format | bench | gpu | clean"
	@echo "PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed; on Debian: apt install python3.11-venv python3.11-dev" >&2; exit 1; }

# The C headers of an interpreter and a compiler: said here in one line, not in the middle of a CMake log.
define check-compiler
@$(1) -c 'import os, sys, sysconfig; \
  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
  { echo "Python.h is missing; on Debian: apt install python3.11-dev" >&2; exit 1; }
@command -v $(or $(CXX),c++) >/dev/null || \
  { echo "no C++ compiler ($(CXX)); on Debian: apt install g++" >&2; exit 1; }
endef

.PHONY: requirements
requirements: | $(BIN)/python
	$(call check-compiler,$(BIN)/python)

# The stamp is newer than everything that the installed package was built from; Python files need no new install.
$(INSTALLED)-%: pyproject.toml $(NATIVE) | requirements
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@# PyTorch with CUDA brings the Triton that it needs.
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TRITON)"
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -Cbuild-dir=build/{wheel_tag} \
	  -Ccmake.define.LOPT_CUDA=$* -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
	  --editable ".[torch,jax,meta,plot,test,bench,dev]"
	@rm -f $(INSTALLED)-*
	@touch $@

install: $(STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# JAX on the processor, where its kernels are tested on arrays in main memory: tests of GPUs are in gpu-test.
test: lint
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m pytest bench

# The parts of `make gpu`. What is built is that of this machine's GPU; without one, of compute capability 9.0.
GPU_PYTHON := $(if $(OFFLINE),$(PYTHON),$(BIN)/python)
GPU_ARCHITECTURE = $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  sed -n '1s/^\([0-9]*\)\.\([0-9]\)$$/\1\2/p'),90)-real
# SIGINT: pytest then still says what it has found.
LIMITED = timeout --foreground --signal=INT --kill-after=20 $(GPU_SECONDS)
# Modules that OFFLINE=1 finds in PYTHON: of the build, of lopt_fast, of the tests and of the benchmark.
OFFLINE_MODULES := pip scikit_build_core pybind11 numpy array_api_compat safetensors typer rich torch triton jax optax \
  pydantic pytest xdist

.PHONY: gpu-present gpu-modules gpu-install
gpu-present:
	@nvidia-smi -L >/dev/null 2>&1 || \
	  { echo "make gpu: this machine has no NVIDIA GPU (nvidia-smi -L finds none)" >&2; exit 1; }

gpu-modules:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	  missing = [name for name in sys.argv[1:] if find_spec(name) is None]; \
	  sys.exit(bool(missing) and f"OFFLINE=1: {sys.executable} has no module {chr(44).join(missing)}: " \
	    "put what is missing there, or into a folder on PYTHONPATH")' $(OFFLINE_MODULES)

ifneq ($(OFFLINE),)
gpu-install: gpu-modules
	$(call check-compiler,$(PYTHON))
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation -Cbuild-dir=build/{wheel_tag} \
	  -Ccmake.define.LOPT_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" --editable .
else
gpu-install: $(INSTALLED)-ON
	$(BIN)/python -m pip install --quiet "$(GPU_JAX)"
endif

gpu-build:
	$(LIMITED) $(MAKE) gpu-install CUDA_ARCHITECTURES="$(or $(CUDA_ARCHITECTURES),$(GPU_ARCHITECTURE))"

# Several processes: a kernel that faults takes the other tests of its own along, not all. What is skipped is listed.
gpu-test: gpu-present
	$(LIMITED) $(GPU_PYTHON) -m lopt_fast.cli bench gpu --check
	@echo "golden vectors: $(or $(LOPT_SHARED),$(abspath ../shared)) (LOPT_SHARED)"
	$(LIMITED) $(GPU_PYTHON) -m pytest -q -n 4 --dist worksteal --durations=10 tests/gpu

# Results are to be committed: bench/results/gpu/ holds one record of each run.
gpu-bench: gpu-present
	$(LIMITED) $(GPU_PYTHON) -m lopt_fast.cli bench gpu --json bench/results/gpu

gpu: gpu-present
	$(MAKE) gpu-build
	@status=0; $(MAKE) gpu-test || status=$$?; $(MAKE) gpu-bench || status=$$?; exit $$status

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
