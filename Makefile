# The commands that people and CI run; `make` alone lists them. Every target makes the environment it needs in .venv.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test lint types arch check format bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/core ## install, then train, validate, predict and export on handwritten digits
	$(BIN)/visformer quickstart

test: .venv/dev ## run the tests
	$(BIN)/pytest -n 2 --dist worksteal

lint: .venv/dev ## look for mistakes and for unformatted code
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev ## check the type annotations
	$(BIN)/pyright

arch: .venv/dev ## check who imports whom
	$(BIN)/lint-imports

check: test lint types arch ## all of these, as CI does

format: .venv/dev ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# On the interpreter's own packages, without .venv and without a network; see benchmarks/gpu_suite.py for OPTIONS.
bench-gpu: ## measure a GPU, with the torch, triton and timm that PYTHON has
	$(PYTHON) benchmarks/gpu_suite.py $(OPTIONS)

clean: ## remove the environment, caches and build products; runs and data stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The two environments: what a user needs, and with it what the tests need. A change of pyproject.toml installs anew.
.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[export,serve]'
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install -q -e '.[dev]'
	touch $@
