# Two commands do everything on a machine with Python 3.11, pip and make:
#   make demo   installs into .venv, runs the built-in jobs side by side, prints where the one report is
#   make test   installs into .venv, then lint, types and tests

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# spinning OpenMP threads make small models several times slower on two cores
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types check slow style clean

demo: $(READY)
	$(BIN)/mmrl demo

# one core checks types while the other begins with the tests
test: $(READY) lint
	$(MAKE) --jobs=2 types check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

check: $(READY)
	$(BIN)/pytest -q -n 2 --dist worksteal

slow: $(READY)
	$(BIN)/pytest -q -m "slow and not gpu"

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
