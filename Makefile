# All paths are relative, because the checkout may be in a folder with spaces in its name.

PYTHON ?= python3
# The versions that pip installs.
CONSTRAINTS ?= constraints.txt

BIN := .venv/bin
# The project that the default answers generate.
DEMO := build/demo/my-muon-project
LINT := build/lint/my-muon-project
# A free worker takes from the tail of another's list. Many tests start up to four processes: no more than four workers.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
BAKE := $(BIN)/python -m cookiecutter . --no-input --default-config

.DEFAULT_GOAL := help
.PHONY: help install install-corpus demo test test-all test-corpus lint docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## Make .venv with all that development needs

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

install-corpus: .venv/.corpus ## Add the libraries of the models in tests/corpus

# timm's models need nothing of torchvision but a class, for which the tests have a substitute; each of its wheels fits one build of torch only.
.venv/.corpus: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,corpus]'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps timm
	@touch $@

demo: install ## Generate a project, train it on real text, sample from its model
	rm -rf build/demo
	$(BAKE) --output-dir build/demo > /dev/null
	cd $(DEMO) && PYTHONPATH=src ../../../$(BIN)/python -m my_muon_project fit
	@cd $(DEMO) && checkpoint=$$(find logs -name last.ckpt) && \
	PYTHONPATH=src ../../../$(BIN)/python -m my_muon_project predict --ckpt_path "$$checkpoint" && \
	printf '\nCheckpoint:   %s\nTensorBoard:  %s\n' "$(DEMO)/$$checkpoint" "$(BIN)/tensorboard --logdir $(DEMO)/logs"

test: install ## Run the tests, those of generated projects included
	$(BIN)/python -m pytest $(PARALLEL)

test-all: install ## Run the slow tests too
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not corpus'

test-corpus: install-corpus ## Build, route and train the models of tests/corpus
	$(BIN)/python -m pytest $(PARALLEL) -m corpus tests/corpus

lint: install ## Check style and types, here and in a generated project
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	rm -rf build/lint
	$(BAKE) --output-dir build/lint > /dev/null
	cd $(LINT) && ../../../$(BIN)/python -m ruff check . && ../../../$(BIN)/python -m ruff format --check .
	cd $(LINT) && ../../../$(BIN)/python -m mypy --cache-dir ../../.mypy_cache
	$(BIN)/python -m mypy --cache-dir build/.mypy_cache

docs: .venv/.docs ## Build the documentation in build/docs; a broken link or name is an error
	rm -rf build/docs
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs
	@echo 'The documentation: build/docs/index.html'

# Sphinx needs Python 3.11.
.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	@touch $@

clean: ## Remove .venv, build and the caches of tools
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
