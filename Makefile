# `make demo` and `make test` work from a fresh clone: each makes the environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,parity
PYTEST_ARGS ?=
KERNEL_ARGS ?=

bin := $(VENV)/bin
# Stamps say what is installed; a change of the pins or of the package's metadata installs again.
core := $(VENV)/core.stamp
full := $(VENV)/full.stamp
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format check check-kernels tune-kernels clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(bin)/python:
	$(PYTHON) -m venv $(VENV)

$(core): pyproject.toml constraints.txt | $(bin)/python
	$(pip) --editable .
	@touch $@

$(full): pyproject.toml constraints.txt | $(bin)/python
	$(pip) --editable '.[$(EXTRAS)]'
	@touch $(core) $@

install: $(full) ## the environment with everything the checks need

demo: $(core) ## generate text with the demo model
	$(bin)/python scripts/generate.py --demo

test: $(full) ## the tests, without those marked slow or gpu
	JAX_PLATFORMS=cpu $(bin)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(PYTEST_ARGS)

# JAX_PLATFORMS empty lets jax take the accelerator, if there is one.
test-all: $(full) ## every test this machine can run, on its accelerator if it has one
	JAX_PLATFORMS= KVJAX_TEST_FUSIONS=new $(bin)/python -m pytest $(PYTEST_ARGS)

lint: $(full) ## ruff and mypy
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: $(full) ## let ruff rewrite what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

check-kernels: $(full) ## prove every kernel, and on a GPU measure it: docs/kernels.md
	$(bin)/python scripts/check_kernels.py $(KERNEL_ARGS)

tune-kernels: $(full) ## prune the kernels' configurations, and on a GPU choose the fastest
	$(bin)/python scripts/tune_kernels.py $(KERNEL_ARGS)

check: lint test ## everything a change must pass

clean: ## remove the environment and every cache
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
