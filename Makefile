# make demo   set up, build, train, print a table          make test   everything that must hold before a commit
# make gpu    on a machine with an NVIDIA GPU: build, test on it, measure (under 10 minutes)
# Variables: PYTHON (3.11 or later), TORCH (which PyTorch to install), VENV (where to), LOPT_CUDA (AUTO, ON,
# OFF), CUDA_ARCHITECTURES (what CMake calls so, separated by semicolons; resources.json has those below).

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA_ARCHITECTURES ?= 80-real;90-real;100-real
LOPT_CUDA ?= AUTO

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lopt_fast-installed
STAMP := $(INSTALLED)-$(LOPT_CUDA)
# Without the CUDA kernels, which take minutes to compile, where nothing is installed yet.
DEMO_STAMP := $(firstword $(wildcard $(INSTALLED)-*) $(INSTALLED)-OFF)
NATIVE := CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*) $(wildcard kernels/*/*.cc kernels/*/*.cu kernels/*/*.h)
CXX_FILES = $(wildcard csrc/*.cc csrc/*.h kernels/*/*.cc kernels/*/*.cu kernels/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench gpu clean

help:
	@echo "make demo | test | install | lint | format | bench | gpu | clean"
	@echo "PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed; on Debian: apt install python3.11-venv python3.11-dev" >&2; exit 1; }

# The interpreter's C headers and a compiler: said here in one line, not in the middle of a CMake log.
.PHONY: requirements
requirements: | $(BIN)/python
	@$(BIN)/python -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "Python.h is missing; on Debian: apt install python3.11-dev" >&2; exit 1; }
	@command -v $(or $(CXX),c++) >/dev/null || \
	  { echo "no C++ compiler ($(CXX)); on Debian: apt install g++" >&2; exit 1; }

# The stamp is newer than everything that the installed package was built from; Python files need no new install.
$(INSTALLED)-%: pyproject.toml $(NATIVE) | requirements
	$(BIN)/python -m pip install --quiet "$(TORCH)"
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

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m pytest bench

.PHONY: gpu-present
gpu-present:
	@nvidia-smi -L >/dev/null 2>&1 || \
	  { echo "make gpu: this machine has no NVIDIA GPU (nvidia-smi -L finds none)" >&2; exit 1; }

# Results are to be committed: bench/results/gpu/ holds one record of each run.
gpu: CUDA_ARCHITECTURES := native
gpu: gpu-present $(INSTALLED)-ON
	$(BIN)/lopt-fast bench gpu --check
	$(BIN)/python -m pytest -q tests/gpu
	$(BIN)/lopt-fast bench gpu --json bench/results/gpu

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
