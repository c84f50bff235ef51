# The commands a person runs are the ones continuous integration runs. `make` alone lists them.
# The environment is .venv, made once and renewed when pyproject.toml changes; pip's own settings apply.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys, venv, ensurepip; print(sys.version_info >= (3, 11) or "")' 2>/dev/null | grep True),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# Two stamps: what a run needs, and what a developer needs on top of it.
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
COMPILED := $(VENV)/.compiled
GRPCIO_TOOLS := 1.67.1
# Tests without processes are shared out to a process a core. Those with processes of a swarm need the cores themselves.
SHARED := --numprocesses logical --maxprocesses 4 --dist worksteal
UNIT := -m "not slow and not processes and not containers and not evidence" $(SHARED)
VIRTUAL := -m "not long and not processes and not containers and not evidence" $(SHARED)

# Python compiles what is imported when it first is: a tenth of what would be compiled here.
PIP_OPTIONS := --no-compile

# The tests start the package again and again: each start would compile all of it.
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

venv: $(DEV)  ## make .venv with everything a developer needs

test: $(DEV)  ## style, types, units, whole runs in virtual time, swarms of real processes: eight minutes on two cores
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory test-processes

# mypy takes one core for a minute: tests in virtual time may run beside it, those with real processes need the cores.
check: $(DEV)  ## style, types and the tests in virtual time: whatever starts no real processes
	@said=$$(mktemp); (nice $(MAKE) --no-print-directory lint >$$said 2>&1; code=$$?; cat $$said; rm $$said; exit $$code) & lint=$$!; \
	$(MAKE) --no-print-directory test-virtual; code=$$?; wait $$lint && exit $$code

# In a fresh clone each process that shares the tests would compile all of them, and torch: once is enough.
$(COMPILED): $(DEV)
	@$(BIN)/python -m pytest --collect-only --quiet >/dev/null 2>&1 || true
	@touch $@

test-virtual: $(COMPILED)  ## units, and whole runs in virtual time
	$(BIN)/python -m pytest $(VIRTUAL)

test-unit: $(COMPILED)  ## the tests that play no whole run: a minute
	$(BIN)/python -m pytest $(UNIT)

test-processes: $(DEV)  ## swarms of real processes, those that take long left out
	$(BIN)/python -m pytest -m "processes and not long and not evidence"

test-long: $(DEV)  ## the rest of what continuous integration checks: what takes more than twenty seconds each
	$(BIN)/python -m pytest -m "long and not evidence"

test-containers: $(DEV)  ## a swarm in real containers: needs a Docker engine with compose
	$(BIN)/python -m pytest -m containers

image: $(DEV)  ## the image that those tests run, built before them
	PYTHONPATH=tests $(BIN)/python -c 'import docker_engine; docker_engine.build()'

evidence: $(DEV)  ## what plays long what the tests show in short, by hand: docs/testing.md says where it is recorded
	$(BIN)/python -m pytest -m evidence -rA --durations=0

chaos: $(DEV)  ## kills, hangs, cuts and deletions in real containers, and a table (needs a Docker engine)
	$(BIN)/python tests/chaos/run.py

lint: $(DEV)  ## style, types, and the arrows between folders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)  ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A protoc of its own: the runtime must not be older than the generated code, and hivemind's range is wide.
$(PROTOC): | $(BIN)/python
	$(BIN)/python -m venv .venv-protoc
	.venv-protoc/bin/python -m pip install --quiet 'grpcio-tools==$(GRPCIO_TOOLS)' 'setuptools<81'
	@touch $@

protos: $(PROTOC)  ## generate swarmtrain/v1/ from protos/
	.venv-protoc/bin/python protos/generate.py

search: $(DEV)  ## random schedules of faults in virtual time, until Ctrl-C; what breaks is printed as a test
	$(BIN)/python -m swarmtrain.simulate.search

soak: $(DEV)  ## ten runs of ten minutes under kills, stops and restarts (two hours)
	$(BIN)/python tests/processes/soak.py

long-soak: $(DEV)  ## an hour of six volunteers with churn: what grows, and what the logs complain of
	$(BIN)/python benchmarks/long_soak.py

results: $(DEV)  ## play examples/scenarios into docs/results/scenarios.md, hours of them; ONLY="equal churn": these; FRESH=1: anew
	$(BIN)/python benchmarks/results.py $(ONLY) $(if $(FRESH),--fresh)

docs: $(DEV)  ## generate the reference pages of docs/: run file, events, commands, decisions
	$(BIN)/python docs/generate.py

# Nothing is fetched, and what leads nowhere is an error.
site: $(DEV)  ## build the documentation as a site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: $(CORE)  ## three unequal volunteers and one alone, on this machine, in minutes
	$(BIN)/swarmtrain local examples/stdlib-gpt.toml --peers 3 --slowdown 2,2.5,4 --compare-alone

clean:  ## remove what make made
	rm -rf $(VENV) .venv-protoc build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
