# `make demo` or `make test` on a fresh machine does all: both begin with `make install`.

SHELL := /bin/bash
.SHELLFLAGS := -e -u -o pipefail -c
.DEFAULT_GOAL := help

# The first Python of the right version; another by `make install PYTHON=/path/to/python3.12`.
SUITS := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
SUITS2 := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.10; do \
	$$python -c '$(SUITS)' 2>/dev/null && echo $$python && break; done)
PYTHON2 ?= $(shell for python in python3.12 python3.13 python3 python3.11 python3.14; do \
	$$python -c '$(SUITS2)' 2>/dev/null && echo $$python && break; done)

# fairchem-core 1.10 and 2.x cannot share an environment: numpy 1 and torch 2.4, numpy 2 and 2.13.
VENV := .venv
VENV2 := .venv-fairchem2
BIN := $(VENV)/bin
BIN2 := $(VENV2)/bin
PIP_OPTIONS := --disable-pip-version-check install -qq
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)
PIP2 := $(BIN2)/python -m pip $(PIP_OPTIONS)
# Tell when an environment is complete and for which description of it.
STAMP := $(VENV)/.installed
STAMP2 := $(VENV2)/.installed
DESCRIPTION := setup.cfg setup.py pyproject.toml startup/fairchem_equiformer_startup.pth \
	startup/fairchem_equiformer_startup.py $(wildcard fairchem_equiformer/ops/native/*.cpp) \
	$(wildcard fairchem_equiformer/ops/native/*.h) fairchem_equiformer/ops/native/sources.py

.PHONY: help install install-fairchem2 demo demo-long compare-versions adsorbml test test-long \
	test-fairchem2 test-slurm test-wheel wheel soak lint format clean

help:
	@echo 'make install         set up $(VENV) with fairchem-core 1.10 (12 minutes on 2 cores; once)'
	@echo 'make demo            install, then train, predict and relax on a small real problem'
	@echo 'make demo-long       the same, trained for longer to smaller errors'
	@echo 'make compare-versions  train Equiformer, EquiformerV2 and their ablations: one table'
	@echo 'make adsorbml        after make demo: search adsorption sites with its model'
	@echo 'make test            install, then the tests'
	@echo 'make test-long       install, then the tests that take minutes each'
	@echo 'make soak            install, then kill trainings again and again: nothing may be lost'
	@echo 'make test-slurm      set up a Slurm of this machine, then the tests of its jobs (root, Debian)'
	@echo 'make test-fairchem2  set up $(VENV2) with fairchem-core 2, then what belongs there'
	@echo 'make wheel           build a wheel, with the compiled kernels, in dist/'
	@echo 'make test-wheel      install that wheel into an empty environment, and predict'
	@echo 'make lint            install, then ruff and mypy'
	@echo 'make format          let ruff rewrite what it can'
	@echo 'make clean           remove environments and caches, but no data and no results'

install: $(STAMP)
	@# Versions before 0.2 had a script of this name, and took it along when they left.
	@test -e $(BIN)/fairchem || { \
		echo "== Putting fairchem-core's command back in place"; \
		$(PIP) --no-deps --force-reinstall 'fairchem-core==1.10.*'; }

$(STAMP): $(DESCRIPTION)
	@test -n '$(PYTHON)' && $(PYTHON) -c '$(SUITS)' || { \
		echo 'error: Python 3.10, 3.11 or 3.12 is needed, and $(or $(PYTHON),python3) is' \
			"$$($(or $(PYTHON),python3) --version 2>&1);" \
			'run make with PYTHON=/path/to/python3.11' >&2; exit 1; }
	@test -x $(BIN)/python || { echo '== Making $(VENV) with $(PYTHON)'; \
		$(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(SUITS)' || { \
		echo "error: $(VENV) has $$($(BIN)/python --version 2>&1);" \
			'Python 3.10, 3.11 or 3.12 is needed: run make clean, then again' >&2; exit 1; }
	@echo '== 1/3 PyTorch and what builds extensions of it (1 to 5 minutes)'
	@$(PIP) 'setuptools>=70.1,<81' wheel 'torch==2.4.*' 'numpy<2'
	@echo '== 2/3 torch-scatter, compiled against it (5 minutes on 2 cores, with no output)'
	@$(PIP) --no-build-isolation 'torch-scatter>=2.1.2'
	@echo '== 3/3 fairchem-core, this package and its tools (2 to 5 minutes)'
	@$(PIP) --no-build-isolation --editable '.[fairchem1,adsorbml,dev]'
	@touch $@
	@echo '== Installed. Try: $(BIN)/fairchem --help'

install-fairchem2: $(STAMP2)

$(STAMP2): $(DESCRIPTION)
	@test -n '$(PYTHON2)' && $(PYTHON2) -c '$(SUITS2)' || { \
		echo 'error: Python 3.11 to 3.14 is needed, and $(or $(PYTHON2),python3) is' \
			"$$($(or $(PYTHON2),python3) --version 2>&1);" \
			'run make with PYTHON2=/path/to/python3.12' >&2; exit 1; }
	@test -x $(BIN2)/python || { echo '== Making $(VENV2) with $(PYTHON2)'; \
		$(PYTHON2) -m venv $(VENV2); }
	@echo '== fairchem-core 2, torch-sim, this package and its tools (3 to 8 minutes)'
	@$(PIP2) --editable '.[fairchem2,torch-sim,dev]'
	@touch $@
	@echo '== Installed in $(VENV2)'

demo: install
	@$(BIN)/python examples/emt/run.py

demo-long: install
	@$(BIN)/python examples/emt/run.py --long

compare-versions: install
	@$(BIN)/python examples/emt/compare.py

adsorbml: install
	@$(BIN)/python examples/emt/adsorbml.py

test: install
	@$(BIN)/python -m pytest

test-long: install wheel
	@$(BIN)/python -m pytest -m long

test-slurm: install
	@trap 'tools/slurm.sh down' EXIT; \
		found=$$(tools/slurm.sh up) || exit 1; eval "$$found"; \
		$(BIN)/python -m pytest -m slurm tests/test_slurm.py

test-fairchem2: install-fairchem2
	@$(BIN2)/python -m pytest -c tests/fairchem2/pytest.ini tests/fairchem2 tests/plain

wheel: install
	@rm -rf build dist
	@$(BIN)/python -m pip --disable-pip-version-check wheel -qq --no-deps --no-build-isolation \
		--wheel-dir dist .
	@$(BIN)/python -m zipfile --list dist/*.whl | grep -q native/_kernels.so || { \
		echo 'error: the kernels could not be compiled: is there a C++ compiler?' >&2; exit 1; }
	@ls dist/*.whl

test-wheel: wheel
	@$(BIN)/python -m pytest -m long tests/test_wheel.py

soak: install
	@$(BIN)/python -W ignore -m tests.soak --kills 21
	@$(BIN)/python -m pytest -m long tests/test_saving.py tests/test_reliability.py tests/test_ranks.py
	@$(BIN)/python -m pytest --hypothesis-profile=soak tests/test_any_structure.py
	@$(BIN)/python -W ignore -m tests.long_runs --steps 2000

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV2) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
