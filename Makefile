# `make` alone lists the targets. Variables are set on the command line: make demo MINUTES=12
PYTHON ?= python3
PIP_TORCH ?= torch==2.13.0
MINUTES ?= 13
DRAFTER ?= dflash
RECIPE ?= recipes/study_smollm2.yaml

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types imports check bench study interop clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  with MINUTES=$(MINUTES)  DRAFTER=$(DRAFTER)  RECIPE=$(RECIPE)  PYTHON=$(PYTHON)  PIP_TORCH='$(PIP_TORCH)'"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "specauf needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "this Python makes no virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv: about two minutes"
# torch first and by itself, so that PIP_TORCH may name the index of another build.
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train two drafters on the embedded default, measure them, write a page, in about MINUTES after installing
	$(BIN)/specauf demo --minutes $(MINUTES) $(if $(filter-out dflash,$(DRAFTER)),--drafter $(DRAFTER))

test: $(INSTALLED)  ## the fast test suite
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

imports: $(INSTALLED)  ## the layers in pyproject.toml hold
	$(BIN)/lint-imports

check: lint types imports test  ## all that a change must pass

bench: $(INSTALLED)  ## every benchmark, in ratios measured side by side (half an hour or more, on an idle machine)
	$(BIN)/python -m benchmarks

study: $(INSTALLED)  ## run RECIPE's matrix of trainings and write its report: hours, resumable
	$(BIN)/specauf study $(RECIPE)

interop: $(INSTALLED)  ## compare with other implementations, in an environment of their own
	bash tests/interop/run.sh

clean:  ## delete the environment and the tools' caches; runs and downloads stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
