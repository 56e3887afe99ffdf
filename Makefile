# Everything a user or developer does here is one of these targets; `make help` lists them.
# Variables: PYTHON, PIP_ARGS (extra arguments for pip, such as another index), HOST, PORT, MODEL, ARGS.

PYTHON   ?= python3
PIP_ARGS ?=
HOST     ?= 127.0.0.1
PORT     ?= 8000
MODEL    ?= model_store/demo
ARGS     ?=
BENCH    ?= vs_peft lookahead vs_base speculation prefix_cache context throughput observability batch_invariance
IMAGE    ?= xlora-service:latest

BIN := .venv/bin
PIP := -m pip --disable-pip-version-check install -qq $(PIP_ARGS)
SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; choose one with PYTHON=python3.12")

.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help install serve test test-slow test-min check-gpu fuzz clients check format bench demo image verify-image verify-compose clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

# Two stamps: serving needs the runtime dependencies only, testing and checking the rest as well, in one installation.
VENV = $(PYTHON) -c '$(SUPPORTED)' && { test -x $(BIN)/python || { echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }; }

.venv/.runtime: pyproject.toml constraints.txt
	@$(VENV)
	@echo "installing the service into .venv (the first time downloads PyTorch and takes minutes)"
	@$(BIN)/python $(PIP) -c constraints.txt -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt
	@$(VENV)
	@echo "installing the service with its test and development tools into .venv (the first time takes minutes)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[test,dev,plot,ray]'
	@touch .venv/.runtime $@

.venv-min/.test: pyproject.toml constraints-min.txt
	@$(PYTHON) -c '$(SUPPORTED)'
	@test -x .venv-min/bin/python || $(PYTHON) -m venv .venv-min
	@echo "installing the oldest supported versions into .venv-min"
	@.venv-min/bin/python $(PIP) -c constraints-min.txt -e '.[test]'
	@touch $@

# Apart from .venv: on a machine without a GPU the service and its tests run without Triton, as users have it.
.venv-gpu/.triton: .venv/.dev constraints-gpu.txt
	@echo "installing Triton into .venv-gpu (700 MB)"
	@rm -rf .venv-gpu
	@$(BIN)/python $(PIP) --no-deps --target .venv-gpu -r constraints-gpu.txt
	@touch $@

install: .venv/.dev ## create .venv with the pinned versions, for serving, testing and checking
	@echo ".venv is ready"

serve: .venv/.runtime ## serve MODEL (the demo) on HOST:PORT (127.0.0.1:8000)
	@exec $(BIN)/xlora-serve serve --model $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.dev ## run the tests; ARGS="-k name" narrows them
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: .venv/.dev ## run the soak and full-product tests as well
	@$(BIN)/python -m pytest $(ARGS)

test-min: .venv-min/.test ## model and checkpoint tests on the oldest supported versions
	@.venv-min/bin/python -m pytest -m "not slow" tests/model tests/checkpoint $(ARGS)

check-gpu: .venv-gpu/.triton ## before a release: what can be known of the GPU path without a GPU; ARGS='-m "not slow"' for a sample
	@PYTHONPATH=.venv-gpu TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/model/attention/test_triton.py $(ARGS)
	@PYTHONPATH=.venv-gpu $(BIN)/python -m pytest -n 2 --dist worksteal -o faulthandler_timeout=1800 tests/gpu_checks tests/model/attention/test_triton_launcher.py $(ARGS)

fuzz: .venv/.dev ## fuzz bodies (schemathesis), paths and headers of the server; ARGS="300" sets the cases per operation
	@$(BIN)/python -m tests.fuzz $(ARGS)

clients: .venv/.dev ## try OpenAI clients, each in an environment of its own (docs/clients.md); ARGS="openai instructor" narrows them
	@$(BIN)/python -m tests.clients $(ARGS)

check: .venv/.dev ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.dev ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.dev ## run the benchmarks named in BENCH, then print all their bars; ARGS are flags for each
	@$(BIN)/python -m benchmarks.suite $(BENCH) -- $(ARGS)

demo: .venv/.dev ## train the demo bundle again (40 minutes on 2 cores)
	@$(BIN)/python -u model_store/build_demo.py $(ARGS)

image: ## build the container image (docker, or buildah where there is no docker)
	@IMAGE=$(IMAGE) docker/verify.sh build

verify-image: ## before a release: build the image, run it locked down, and check that it serves and drains
	@IMAGE=$(IMAGE) docker/verify.sh

verify-compose: ## before a release: bring compose up, alone, with replicas, with keys; ARGS=--stand-ins without images
	@python3 docker/verify_compose.py $(ARGS)
	@python3 docker/verify_compose.py --replicas $(ARGS)
	@python3 docker/verify_compose.py --keys $(ARGS)

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-min .venv-gpu .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
