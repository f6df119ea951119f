# One environment, .venv, for every target but `gpu`, which runs on the python3 it finds, and those that try versions.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

export OMP_NUM_THREADS ?= 2
export PYTHONSAFEPATH := 1

.PHONY: demo reproduce test-env test test-slow test-oldest test-pythons lint types tables site dist gpu

demo: .venv/.core
	$(BIN)/diffumask-fast generate demo --num 24
	$(BIN)/diffumask-fast report demo

reproduce: test-env
	$(BIN)/python -m diffumask_fast.bench.reproduce build/reproduce $(REPRODUCE)

test-env: .venv/.test

test: test-env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: test-env .venv/.docs
	$(BIN)/pytest -m "slow and not gpu"

# A short part of the suite with the oldest versions that pyproject.toml admits.
OLDEST := borrow collect flags joint pipeline preview processor session

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/pytest -m "not slow and not gpu" $(OLDEST:%=tests/test_%.py)

# Install into each Python, import every module, draw, and run a few tests; the pythonX.Y of all are on the PATH.
test-pythons: $(addprefix test-python,3.11 3.12 3.13)

test-python%: .venv-python%/.test
	$(<D)/bin/python tools/import_all.py
	rm -rf build/demo-python$*
	$(<D)/bin/diffumask-fast generate build/demo-python$* --num 8
	$(<D)/bin/pytest tests/test_borrow.py tests/test_flags.py tests/test_console.py

lint: test-env types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: test-env
	rm -rf build/types && mkdir -p build/types/diffumask_fast
	ln -s $(CURDIR)/diffumask_fast/* $(CURDIR)/kernels $(CURDIR)/export $(CURDIR)/bench build/types/diffumask_fast/
	$(BIN)/mypy

tables: test-env
	$(BIN)/python -m diffumask_fast.bench.tables .

site: .venv/.docs
	$(BIN)/mkdocs build --strict

dist: test-env
	rm -rf dist diffumask_fast.egg-info
	$(BIN)/python -m build

gpu:
	bash tools/gpu_run.sh a build/gpu-results/a
	bash tools/gpu_run.sh b build/gpu-results/b

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: install one, or say make PYTHON=/path/to/python3.11." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e .
	@touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[test,bench,onnx,tensorrt-rtx]"
	$(INSTALL) --no-deps attention-map-diffusers
	@touch $@ .venv/.core

.venv/.docs: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[docs]"
	@touch $@ .venv/.core

.venv-oldest/.test: pyproject.toml constraints-oldest.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: say make PYTHON=/path/to/python3.11." >&2; exit 1; }
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[onnx,learn]" pytest
	@touch $@

.venv-python%/.test: pyproject.toml constraints.txt
	python$* -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest
	@touch $@
