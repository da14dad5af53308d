# make help lists the targets. Everything runs in .venv; PYTHON (3.11 or later) is what the environment is made from.
PYTHON ?= python3
MODEL ?= default
PORT ?= 8000
EXPERT_SERVERS ?= 3
REPLICATION ?= 2
# Further flags: make serve ARGS="--routers 2", make bench-load ARGS="--url http://127.0.0.1:8000"
ARGS ?=
SEEDS ?= 0:10000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# The stamps hold the set-up back until these change, so that a warm start does not run pip at all.
SET_UP := pyproject.toml $(wildcard kernels/csrc/*)
SERVE_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help serve test check lint fault-matrix hosts-test soak simulate compose-test bench-load bench-faults bench-kernels clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

serve: $(SERVE_STAMP) ## set up and serve: make serve [PORT=8000] [MODEL=default or a directory] [EXPERT_SERVERS=3]
	@exec $(BIN)/moering serve "$(or $(MODEL),default)" --port $(PORT) --expert-servers $(EXPERT_SERVERS) --replication $(REPLICATION) $(ARGS)

test: check ## set up, then all checks and tests

check: lint ## ruff, mypy, import-linter and pytest
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

lint: $(DEV_STAMP) ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

simulate: $(DEV_STAMP) ## random fault schedules on virtual time: make simulate [SEEDS=0:10000] (docs/simulation.md)
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) $(ARGS)

fault-matrix: $(DEV_STAMP) ## every cell of docs/fault-matrix.md against real processes
	$(BIN)/python -m pytest tests/faults/test_cells.py --fault-cells all --junitxml build/fault-matrix.xml -o junit_family=xunit1 $(ARGS)

hosts-test: $(DEV_STAMP) ## two gateways and routers on network namespaces as hosts; as root on Linux, else it fails and says so
	$(BIN)/python -m pytest tests/hosts/hosts.py $(ARGS)

soak: $(DEV_STAMP) ## 200 cycles of kill and rejoin; nothing may grow
	$(BIN)/python -m tests.faults.soak $(or $(CYCLES),200)

compose-test: $(DEV_STAMP) ## build the images, run them on a container engine, kill a server, check the stream
	$(BIN)/python -m compose.test $(ARGS)

bench-load: $(DEV_STAMP) ## load generator against an OpenAI server
	$(BIN)/python -m bench.load $(ARGS)

bench-faults: $(DEV_STAMP) ## load with injected faults; writes the client's own account
	$(BIN)/python -m bench.faults $(ARGS)

bench-kernels: $(DEV_STAMP) ## expert kernels, one by one
	$(BIN)/python -m bench.kernels $(ARGS)

clean: ## remove the environment and all caches
	rm -rf $(VENV) build *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "moering needs Python 3.11 or later; choose one with: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(SERVE_STAMP): $(SET_UP) .ci/install-torch | $(BIN)/python
	@.ci/install-torch $(BIN)/python
	@echo "Installing moering and its dependencies ..."
	@$(PIP) -e .
	@$(BIN)/python -c 'from kernels.native_linear import available; raise SystemExit(not available())' || \
	    echo "No C compiler, or another processor than x86-64 with AVX2: computing with PyTorch's operators, which is slower."
	@touch $@

$(DEV_STAMP): $(SET_UP) | $(SERVE_STAMP)
	@echo "Installing the tools for tests ..."
	@$(PIP) -e '.[dev]'
	@touch $@
