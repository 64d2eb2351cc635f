# make setup | demo | test | test-slow | test-chaos | chaos | simulate | lint | bench | ci. Everything runs in .venv, which `setup` makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.hierfl-setup

.PHONY: setup demo test test-slow test-chaos chaos lint bench ci wire-baseline

setup: $(STAMP)

# A no-op unless a requirement changed. The stamp comes last: a setup that was cut off starts again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

demo: setup
	$(BIN)/hierfl demo

test: setup
	$(BIN)/python -m pytest -n auto

test-slow: setup
	$(BIN)/python -m pytest -m slow

# One repeat of what fits into CI; `make chaos` is all of it, and takes more than an hour.
test-chaos: setup
	$(BIN)/python -m pytest -m chaos

chaos: setup
	$(BIN)/python -m tests.chaos

# Thousands of seeded histories on a clock and a network of their own.
simulate: setup
	$(BIN)/python -m tests.simulation --seeds 2000 --jobs 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint hierfl/wire
	$(BIN)/buf breaking hierfl/wire --against .ci/wire-baseline

bench: setup
	$(BIN)/python -m benchmarks

ci:
	.ci/run

# The wire as released, which later ones must not break. Only after a release, or before the first.
wire-baseline:
	mkdir -p .ci/wire-baseline
	cp hierfl/wire/hierfl.proto .ci/wire-baseline/
