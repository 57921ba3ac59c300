# Every command makes the environment it needs (.venv) if it is not there, and reuses it if it is.
# In an environment of your own (conda or venv), activated and installed, name its Python: make test PY=python

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

ifndef PY
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# where the commands installed beside PY are: PATH if PY is a bare name
BIN := $(filter-out ./,$(dir $(PY)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env reproduce test check lab clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..."   more arguments for memdfa reproduce or pytest: make test ARGS="-k rules"'
	@echo '  PY=python    use the activated environment instead of $(VENV)'
	@echo '  PYTHON=...   make $(VENV) with this Python (3.11 or newer)'

env: $(READY) ## make or update the environment in .venv

reproduce: $(READY) ## train the four rules side by side on real digits, write figures and tables under reports/
	$(BIN)memdfa reproduce $(ARGS)

# One thread a worker: WORKERS x OpenMP threads on as many cores would only take turns. worksteal keeps a module's
# tests mostly on one worker (its fixtures are made once) and still shares out the long parametrised files.
test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(READY) ## what a change must pass: format, lint, types, tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(MAKE) --no-print-directory test

lab: $(READY) ## open the notebooks in JupyterLab
	$(PY) -m jupyter lab --notebook-dir=notebooks

clean: ## remove caches and builds; .venv, data and reports stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find memdfa_lab notebooks tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted install leaves none and is taken up again. A .venv that already holds a pip is
# kept, with what is in it: that is how a CPU-only torch is put in first.
$(VENV)/.installed: pyproject.toml
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "memdfa_lab needs Python 3.11 or newer, found '$(PYTHON)': install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  echo '$(PYTHON) -m venv $(VENV)'; '$(PYTHON)' -m venv --clear $(VENV); }
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e ".[test]"
	@touch $@
