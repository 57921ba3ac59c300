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
.PHONY: help env reproduce paper test test-notebooks test-slow test-deep test-oldest test-gpu dist check tables notebooks student address lab book audit clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..."   more arguments for memdfa reproduce, or for pytest, which then leaves the notebooks out:'
	@echo '               make test ARGS="-k rules"'
	@echo '  PY=python    use the activated environment instead of $(VENV)'
	@echo '  PYTHON=...   make $(VENV) with this Python (3.11 or newer)'

env: $(READY) ## make or update the environment in .venv

reproduce: $(READY) ## run all notebooks; figures, tables and a page that shows them go under reports/runs/
	$(BIN)memdfa reproduce $(ARGS)

paper: $(READY) ## run the paper's comparison, hours; goes on where it stopped: make paper ARGS="--budget 2h"
	$(BIN)memdfa reproduce --paper $(ARGS)

# One thread a worker: WORKERS x OpenMP threads on as many cores would only take turns. worksteal keeps a module's
# tests mostly on one worker (its fixtures are made once) and still shares out the long parametrised files.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal
test: $(READY) ## run the quick tests, then notebooks 01 to 07
	$(PYTEST) -m 'not slow' $(ARGS)
	$(if $(strip $(ARGS)),,@$(MAKE) --no-print-directory test-notebooks NOTEBOOKS='notebooks/0[1-7]*')

# Every cell is run and its output compared with the committed one; a cell that depends on the machine says so by the
# tag nbval-ignore-output. loadscope keeps a notebook's cells on one worker, in order. nbval wants the notebooks below
# pytest's root folder: elsewhere their cells have the same names, and xdist drops all but one.
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb))
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=tests/notebooks.sanitize
test-notebooks: $(READY) ## run the notebooks, outputs compared with those committed
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(PY) -m pytest -n $(WORKERS) --dist loadscope $(NBVAL) $(NOTEBOOKS) $(ARGS)

test-slow: $(if $(READY),$(VENV)/.book) ## the other tests: wrong rules, random networks, killed processes, a browser, the book; notebooks 08, 09
	$(PYTEST) -m slow $(ARGS)
	$(if $(strip $(ARGS)),,@$(MAKE) --no-print-directory test-notebooks NOTEBOOKS='notebooks/0[89]*')

# 500 random networks a property, others each time; 20 processes killed in training and in reproduce.
test-deep: $(if $(READY),$(VENV)/.book) ## test-slow with larger numbers: an hour or more
	HYPOTHESIS_PROFILE=deep MEMDFA_FAULTS=20 MEMDFA_STEPS=20000 $(PYTEST) -m slow $(ARGS)

test-oldest: .venv-oldest/.installed ## the quick tests on the oldest releases that are supported, in .venv-oldest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(ARGS)

DEVICE ?= cuda
test-gpu: $(READY) ## the tests of what differs on a GPU, on one: DEVICE=xpu or mps for another kind
	MEMDFA_TEST_DEVICE=$(DEVICE) $(PY) -m pytest tests/test_gpu.py $(ARGS)

dist: $(READY) ## build the source archive and the wheel into dist/
	$(PY) -m build --outdir dist .

check: $(READY) ## what a change must pass: format, lint, types, imports, tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(BIN)lint-imports --no-cache
	$(MAKE) --no-print-directory test

COG := -m cogapp -r -P -I reports -p 'import tables'
tables: $(READY) ## make the tables in README, the book and reports anew
	OMP_NUM_THREADS=1 $(PY) -W ignore tests/options.py reports/options.csv
	$(PY) $(COG) README.md reports/index.md notebooks/book/memory.md notebooks/book/teaching.md

notebooks: $(READY) ## run the notebooks and keep what they put out, to be committed
	$(PY) .ci/refresh_notebooks.py $(NOTEBOOKS)

student: $(READY) ## write the notebooks without solutions and outputs into student/
	$(PY) -m nbconvert --to notebook --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=solution \
		--ClearOutputPreprocessor.enabled=True --log-level=WARN --output-dir=student $(NOTEBOOKS)

address: $(READY) ## write the repository's address, a line of pyproject.toml, wherever else it stands
	$(PY) .ci/address.py

lab: $(READY) ## open the notebooks in JupyterLab
	$(PY) -m jupyter lab --notebook-dir=notebooks

# Built anew each time: what an earlier build warned of, a second one that has nothing to read would pass over.
book: $(if $(READY),$(VENV)/.book) ## make README, the notebooks and a reference into pages under build/book/
	rm -rf build/book
	$(PY) -m sphinx -E -W --keep-going -q -d build/doctrees -c notebooks/book . build/book
	@echo 'open file://$(CURDIR)/build/book/index.html'

audit: $(if $(READY),$(VENV)/.audit) ## ask PyPI whether what is installed has known weaknesses
	$(PY) -m pip_audit --skip-editable --progress-spinner off

clean: ## remove caches, builds and .venv-oldest; .venv, data and reports stay
	rm -rf build dist .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis
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

.venv-oldest/.installed: pyproject.toml tests/oldest.txt
	'$(PYTHON)' -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c tests/oldest.txt -e ".[test]"
	@touch $@

$(VENV)/.book: $(READY)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e ".[book]"
	@touch $@

$(VENV)/.audit: $(READY)
	$(VENV)/bin/python -m pip install --disable-pip-version-check pip-audit
	@touch $@
