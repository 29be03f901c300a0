# Every target makes its own set-up; a second call finds it ready. `make help` lists them.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=

BIN = .venv/bin
CODE = protos services workers clients scripts

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types protos protos-check breaking format requirements clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## build .venv with everything pinned; PYTHON=... names the interpreter
	@command -v $(PYTHON) > /dev/null || { \
		echo "set-up: there is no $(PYTHON) here: install Python 3.11, or name it with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py

demo: setup ## a real teacher teaches a real student, from prompts to packages; ARGS=... goes to lynearm demo
	@$(BIN)/lynearm demo $(ARGS)

# The checks come first, since they are fast; pytest comes last, since its last line is the result.
test: lint types protos-check ## all checks, then the tests; PYTEST_ARGS=... goes to pytest
	@$(BIN)/pytest $(PYTEST_ARGS)

lint: setup ## style and format of the code
	@$(BIN)/ruff check . || { echo "lint: failed; 'make format' mends what it can" >&2; exit 1; }
	@$(BIN)/ruff format --check . || { echo "lint: run 'make format'" >&2; exit 1; }

types: setup ## mypy and pyright, both strict
	@$(BIN)/mypy $(CODE) || { echo "types: mypy found errors" >&2; exit 1; }
	@$(BIN)/pyright || { echo "types: pyright found errors" >&2; exit 1; }

protos-check: setup ## rules of the contract, and whether its generated code is up to date
	@$(BIN)/buf lint || { echo "protos: buf lint found errors" >&2; exit 1; }
	@$(BIN)/python scripts/generate_protos.py --check

breaking: setup ## whether the protos here break those that main has committed
	@$(BIN)/buf breaking --against '.git#branch=main'

protos: setup ## generate the code of the contract again
	@$(BIN)/python scripts/generate_protos.py

format: setup ## mend format and style in place
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

requirements: setup ## resolve pyproject.toml into requirements/; ARGS=--upgrade moves the pins
	@$(BIN)/python scripts/lock_requirements.py $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	@rm -rf .venv .setup .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	@find $(CODE) tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
