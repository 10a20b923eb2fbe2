# Every target sets the machine up first, so each works alone on a fresh checkout.
.DEFAULT_GOAL := help
.PHONY: help setup check test test-all coverage demo bench
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nodes share few cores: idle threads must sleep, not spin, and one process takes one core.
export OMP_WAIT_POLICY := passive
export OMP_NUM_THREADS := 1

help:  ## Print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv and install what constraints.txt pins (minutes once, then nothing)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[zoo,demo,train,dev]"
	touch $@

check: setup  ## Format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

FAST_TESTS := -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test: setup  ## Tests without the slow ones, on two cores
	$(BIN)/python $(FAST_TESTS)

test-all: setup  ## Every test: all models, the long streams
	$(BIN)/python -m pytest

coverage: setup  ## The same tests, and which lines of which process they reach (half as long again)
	$(BIN)/coverage erase
	$(BIN)/coverage run $(FAST_TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

demo: setup  ## Send photographs through ResNet-50 on a device, two edges and a cloud
	$(BIN)/python scripts/demo.py

bench: setup  ## Every benchmark, bars and all; reports in runs/bench (an hour; keep the machine quiet)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	mkdir -p runs/bench
	$(foreach name,echo split testbed tiles plan predict recovery env,$(BIN)/python scripts/bench.py $(name) --json runs/bench/$(name).json || true;)
