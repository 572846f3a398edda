# make quickstart   create .venv, install, train a small model with GRPO
# make test         create .venv, install with what tests need, run them      (ARGS="-k loss" picks some)
# make test-slow    what is slow: 8B models compiled for TPUs, runs in four processes
# make fuzz         10,000 examples for every parser of what strangers wrote (half an hour and more)
# make lint         ruff, pyright, import-linter
# make test-peers   live comparisons with torch, transformers, PEFT and llama.cpp, in an environment of their own (large: torch)
# make test-gpu-compile   compile for an H200 without one, in an environment of its own (NVIDIA's compiler wheels)
# make gpu-check    on a machine with an NVIDIA GPU and the extra `cuda`: gradients, times and whole steps in under 8 minutes
# make soak         train the quickstart's model for 30 minutes under faults drawn at random (ARGS="--minutes 5 --seed 1")
# make clean        remove the environments and caches
#
# PYTHON=python3.12 chooses the Python, VENV=.venv-3.12 the place of the environment.

SHELL := /bin/bash
VENV ?= .venv
VENV_PEERS ?= .venv-peers
VENV_GPU ?= .venv-gpu
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
PIP_FLAGS = --quiet --disable-pip-version-check --constraint constraints.txt
NEEDS = pyproject.toml constraints.txt
ARGS ?=

.PHONY: help quickstart test test-slow fuzz lint test-peers test-gpu-compile gpu-check soak clean
help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

# Without an accelerator JAX is told so: the libtpu that tests compile with would otherwise look for a TPU first.
quickstart: $(VENV)/.installed
	@ls /dev/accel* /dev/vfio/[0-9]* /dev/nvidia0 >/dev/null 2>&1 || export JAX_PLATFORMS=cpu; $(VENV)/bin/grpo-jax quickstart $(ARGS)

# Tests start some hundred processes, which share compiled bytecode whatever the caller's environment says.
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/pytest -n 2 --dist worksteal -m slow $(ARGS)

fuzz: $(VENV)/.installed-test
	FUZZ_EXAMPLES=10000 JAX_PLATFORMS=cpu $(VENV)/bin/pytest -n 2 -m "not slow" tests/fuzz $(ARGS)

lint: $(VENV)/.installed-lint
	@status=0; for tool in "ruff check --quiet" "lint-imports --no-logo --no-cache" "pyright --pythonpath $(VENV)/bin/python"; do \
	  echo "$$tool"; $(VENV)/bin/$$tool || status=1; done; exit $$status

test-peers: $(VENV_PEERS)/.installed
	JAX_PLATFORMS=cpu $(VENV_PEERS)/bin/pytest tests/peers $(ARGS)

# JAX would refuse the plugin for want of a driver and of CUDA's libraries, which compiling does not need.
test-gpu-compile: $(VENV_GPU)/.installed
	JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(VENV_GPU)/bin/pytest -s tests/gpu_compile $(ARGS)

# With the Python that is named, which has JAX for this GPU.
gpu-check:
	$(PYTHON) kernels/bench/gpu_check.py $(ARGS)

soak: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python tests/tools/soak.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_PEERS) $(VENV_GPU) .pytest_cache .ruff_cache .import_linter_cache

# Each stamp is newer than the files that say what to install, so a second run installs nothing.
$(VENV)/.installed: $(NEEDS) | $(VENV)/bin/python
	@echo "Installing grpo-jax into $(VENV); the first time takes some minutes."
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/.installed-test: $(NEEDS) | $(VENV)/bin/python
	@echo "Installing grpo-jax and what its tests need into $(VENV); the first time takes some minutes."
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --editable '.[code,gguf,math,test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) ruff 'pyright[nodejs]'
	@touch $@

$(VENV_PEERS)/.installed: $(NEEDS) | $(VENV_PEERS)/bin/python
	@echo "Installing grpo-jax, torch, PEFT and llama.cpp into $(VENV_PEERS); the first time takes some minutes."
	$(VENV_PEERS)/bin/python -m pip install $(PIP_FLAGS) torch peft trl llama-cpp-python --editable '.[gguf,test]'
	@touch $@

$(VENV_GPU)/.installed: $(NEEDS) | $(VENV_GPU)/bin/python
	@echo "Installing grpo-jax and NVIDIA's compilers into $(VENV_GPU); the first time takes some minutes."
	$(VENV_GPU)/bin/python -m pip install $(PIP_FLAGS) --editable '.[test]' "tokamax; python_version >= '3.12'"
	jax=$$($(VENV_GPU)/bin/python -c "import importlib.metadata as m; print(m.version('jaxlib'))"); \
	  $(VENV_GPU)/bin/python -m pip install $(PIP_FLAGS) --no-deps jax-cuda13-pjrt==$$jax jax-cuda13-plugin==$$jax \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
	@touch $@

$(VENV)/bin/python $(VENV_PEERS)/bin/python $(VENV_GPU)/bin/python:
	@$(or $(PYTHON),false) $(NEW_ENOUGH) 2>/dev/null || { echo "grpo-jax needs Python 3.11 or newer$(if $(PYTHON), and $(PYTHON) is older or missing). Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
