# Developers and continuous integration run the same commands. `make` alone lists them.
# The environment is .venv, created once and updated when pyproject.toml changes; pip's own settings apply.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys, venv, ensurepip; print(sys.version_info >= (3, 11) or "")' 2>/dev/null | grep True),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# Stamps of two installations: what a run needs, and what a developer needs in addition.
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
COMPILED := $(VENV)/.compiled
GRPCIO_TOOLS := 1.67.1
# Tests in virtual time run in one process per core. Tests with real processes of a swarm need the cores themselves.
SHARED := --numprocesses logical --maxprocesses 4 --dist worksteal
UNIT := -m "not slow and not processes and not containers and not evidence" $(SHARED)
VIRTUAL := -m "not long and not processes and not containers and not evidence" $(SHARED)

# Python compiles modules when they are first imported: a tenth of what would be compiled here.
PIP_OPTIONS := --no-compile

# Tests start the package very often: without bytecode, each start would compile all of it.
unexport PYTHONDONTWRITEBYTECODE
PROTOC := .venv-protoc/.installed-$(GRPCIO_TOOLS)

.DEFAULT_GOAL := help
.PHONY: help venv test check test-virtual test-processes test-unit test-long test-containers image evidence chaos lint format protos demo search soak long-soak results docs site clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv was found; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --editable '.[dev]'
	@touch $(CORE) $@

venv: $(DEV)  ## create .venv with everything that a developer needs

test: $(DEV)  ## style, types, import contracts, and all quick tests: ten minutes on two cores
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory test-processes

# mypy uses one core for a minute: tests in virtual time may run beside it, tests with real processes may not.
check: $(DEV)  ## style, types, import contracts, and the tests without real processes
	@said=$$(mktemp); (nice $(MAKE) --no-print-directory lint >$$said 2>&1; code=$$?; cat $$said; rm $$said; exit $$code) & lint=$$!; \
	$(MAKE) --no-print-directory test-virtual; code=$$?; wait $$lint && exit $$code

# In a fresh clone, each test process would compile all tests, and torch: once is enough.
$(COMPILED): $(DEV)
	@$(BIN)/python -m pytest --collect-only --quiet >/dev/null 2>&1 || true
	@touch $@

test-virtual: $(COMPILED)  ## unit tests, and whole runs in virtual time
	$(BIN)/python -m pytest $(VIRTUAL)

test-unit: $(COMPILED)  ## unit tests only: a minute
	$(BIN)/python -m pytest $(UNIT)

test-processes: $(DEV)  ## tests with swarms of real processes, without the long ones
	$(BIN)/python -m pytest -m "processes and not long and not evidence"

test-long: $(DEV)  ## tests that take more than twenty seconds each, which continuous integration also runs
	$(BIN)/python -m pytest -m "long and not evidence"

test-containers: $(DEV)  ## tests with swarms in containers (needs a Docker engine with compose)
	$(BIN)/python -m pytest -m containers

image: $(DEV)  ## build the image that test-containers uses
	PYTHONPATH=tests $(BIN)/python -c 'import docker_engine; docker_engine.build()'

evidence: $(DEV)  ## long versions of the tests, run by hand; docs/testing.md says where results are recorded
	$(BIN)/python -m pytest -m evidence -rA --durations=0

chaos: $(DEV)  ## faults in containers, with a table of their effects (needs a Docker engine with compose)
	$(BIN)/python tests/chaos/run.py

lint: $(DEV)  ## check style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)  ## repair style and format the code by ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A separate protoc: the runtime must not be older than the generated code, and hivemind accepts many versions.
$(PROTOC): | $(BIN)/python
	$(BIN)/python -m venv .venv-protoc
	.venv-protoc/bin/python -m pip install --quiet 'grpcio-tools==$(GRPCIO_TOOLS)' 'setuptools<81'
	@touch $@

protos: $(PROTOC)  ## generate swarmtrain/v1/ from protos/
	.venv-protoc/bin/python protos/generate.py

search: $(DEV)  ## play random faults in virtual time until Ctrl-C; prints a failure as a test
	PYTHONPATH=tests $(BIN)/python -m fault_search

soak: $(DEV)  ## ten runs of ten minutes under kills, stops and restarts (two hours)
	$(BIN)/python tests/processes/soak.py

long-soak: $(DEV)  ## an hour of six volunteers with churn: checks for growth and errors in logs
	$(BIN)/python benchmarks/long_soak.py

results: $(DEV)  ## run examples/scenarios into docs/results/scenarios.md (hours); ONLY="equal churn" selects, FRESH=1 reruns
	$(BIN)/python benchmarks/results.py $(ONLY) $(if $(FRESH),--fresh)

docs: $(DEV)  ## generate the reference pages of docs/: run file, events, commands, decisions
	$(BIN)/python docs/generate.py

# Fetches nothing, and fails on broken links.
site: $(DEV)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: $(CORE)  ## train three unequal volunteers and one alone on this machine, in minutes
	$(BIN)/swarmtrain local examples/stdlib-gpt.toml --peers 3 --slowdown 2,2.5,4 --compare-alone

clean:  ## remove everything that make created
	rm -rf $(VENV) .venv-protoc build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
