# `make up` runs the mesh, `make test` tests it; both set up everything they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
PROTOS := $(shell find protos -name '*.proto')
KERNELS := services/engine/core/kernels/cpu
KERNEL_SOURCES := $(wildcard $(KERNELS)/src/*) $(KERNELS)/build.py services/engine/core/compiling.py
CUDA_KERNELS := services/engine/core/kernels/cuda
CUDA_SOURCES := $(CUDA_KERNELS)/src/* $(addprefix tests/fakes/cuda/,*.cpp *.cu include/*)
# Where `meshserve up --traces` looks for it.
PHOENIX := $(or $(MESHSERVE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/meshserve)/phoenix
PYTEST := $(BIN)/python -m pytest
# The kernels by themselves, and the steps of decoders, encoders and adapters that are made of them.
SANITIZED_TESTS := tests/unit/engine_core/cpu tests/unit/engine_encoding/test_native.py \
  tests/unit/engine_models/test_native_families.py tests/unit/engine_adapters/test_families.py

# What `GPU_PYTHON` runs of the tests: those of an engine's core. It has torch, triton and
# transformers, and what `make gpu-wheels` fetches.
BARE_GPU_TESTS = $(shell grep -rl --include='*.py' 'mark\.gpu' tests/unit/engine_* tests/integration/engine)
WHEEL_PLATFORMS := $(foreach glibc,2_17 2_28 2_31 2_34,--platform manylinux_$(glibc)_x86_64)

.PHONY: help up down test test-slow test-compose test-sanitized test-gpu bench-gpu gpu-wheels lint format bench bench-peers bench-start phoenix docs kernels stubs baseline lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: $(VENV)/.all $(VENV)/.kernels ## Pull the demo model, start the mesh on this machine and keep serving
	@$(BIN)/meshserve up $(ARGS)

down: ## Stop a mesh that `make up` started
	@test ! -x $(BIN)/meshserve || $(BIN)/meshserve down

test: $(VENV)/.dev $(VENV)/.kernels ## Run the tests (those marked slow excepted)
	$(PYTEST) -m "not slow and not gpu and not docker" $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.kernels ## Run the tests that take longer: faults, load, long streams
	$(PYTEST) -m "slow and not gpu and not docker" $(ARGS)

test-compose: $(VENV)/.dev ## Build the images and run the whole stack on a Docker engine
	$(PYTEST) -m docker $(ARGS)

test-sanitized: $(VENV)/.dev ## Run the tests of the CPU kernels with AddressSanitizer and UBSan
	$(BIN)/python $(KERNELS)/build.py --sanitize --into build/sanitized
	TESTED_KERNELS="$$(ls -t build/sanitized/*.so | head -1)" \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(PYTEST) $(SANITIZED_TESTS) -m "not slow" \
	  --ignore-glob="*/test_build.py" --ignore-glob="*/test_library.py" --timeout=1200 $(ARGS)

test-gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev) ## Run the tests that need a CUDA device; GPU_PYTHON=python3: without a mesh
	TRITON_INTERPRET=0 $(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu $(if $(GPU_PYTHON),$(BARE_GPU_TESTS)) $(ARGS)

lint: $(VENV)/.dev ## Check style, types, contracts, images and what the C++ compiler warns of
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)/src/* $(CUDA_SOURCES)
	$(BIN)/python $(KERNELS)/build.py --strict --into build/strict
	$(BIN)/hadolint deploy/images/Dockerfile tests/compose/stand-ins.Dockerfile
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf breaking --against baseline.binpb

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(KERNELS)/src/* $(CUDA_SOURCES)

bench: $(VENV)/.bench $(VENV)/.kernels ## Measure the engine core alone and through the mesh
	$(BIN)/python -m benchmarks --systems ours $(ARGS)
	$(BIN)/python -m benchmarks.mesh_overhead

bench-peers: $(VENV)/.bench $(VENV)/.kernels ## Measure MeshServe beside vLLM, llama.cpp and OpenVINO GenAI
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks --systems all --json docs/benchmarks.json $(ARGS)
	$(BIN)/python -m benchmarks.mesh_overhead --json docs/benchmarks.json
	$(BIN)/python -m benchmarks.document

bench-start: ## Print the time from git clone to the first token, and of a second start
	$(PYTHON) benchmarks/first_token.py

bench-gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev) ## Measure kernels and engine on a CUDA device; GPU_PYTHON=python3: without a mesh
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu --into build/gpu $(ARGS)

gpu-wheels: $(VENV)/.dev ## Fetch what a GPU machine without a network lacks beside torch, for Python 3.12
	$(BIN)/python -m pip download --only-binary=:all: --no-deps --python-version 3.12 \
	  --implementation cp --abi cp312 --abi abi3 $(WHEEL_PLATFORMS) -d build/gpu-wheels \
	  $$(grep -E '^(msgspec|llguidance)==' requirements.lock)

phoenix: ## Install Phoenix, which shows traces, in an environment of its own (850 MB)
	@test -x $(PHOENIX)/bin/phoenix || { $(PYTHON) -m venv $(PHOENIX) && $(PHOENIX)/bin/pip --disable-pip-version-check --quiet install arize-phoenix==20.26.1; }

docs: $(VENV)/.dev ## Regenerate the reference tables in docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python deploy/helm/generate.py

kernels: $(VENV)/.kernels ## Compile the C++ kernels of the CPU again after editing them

stubs: $(VENV)/.all ## Regenerate the stubs after editing a .proto file
	$(BIN)/python build_stubs.py

baseline: $(VENV)/.dev ## Record the contracts as those that may no longer break
	cd protos && ../$(BIN)/buf build -o baseline.binpb

lock: $(VENV)/.dev ## Record the installed versions as the ones to install
	$(BIN)/python -m pip freeze --exclude-editable --exclude meshserve | sed 's/+cpu$$//' > requirements.lock

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) meshserve/v1 $(KERNELS)/*.so $(KERNELS)/objects build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# PyTorch comes first: what depends on it then takes the build that is here.
$(VENV)/.torch: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.lock)"
	@touch $@

$(VENV)/.all: $(VENV)/.torch pyproject.toml build_hook.py build_stubs.py $(PROTOS)
	$(PIP) install -c requirements.lock -e '.[all]'
	@touch $@

$(VENV)/.bench: $(VENV)/.all
	$(PIP) install -c requirements.lock -e '.[bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.all
	$(PIP) install -c requirements.lock -e '.[dev]'
	@touch $@

# Without a compiler the engine runs on plain torch, and says so when it starts.
$(VENV)/.kernels: $(VENV)/.all $(KERNEL_SOURCES)
	@$(BIN)/python $(KERNELS)/build.py || true
	@touch $@
