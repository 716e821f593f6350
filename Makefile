# Builds everything in .venv: needs Python 3.11 or newer, pip and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests and examples use small tensors: one thread for each worker, a worker for each core.
export OMP_NUM_THREADS := 1
# Each worker begins with a contiguous part of the tests, which keeps most shared fixtures on one worker.
WORKERS := -n auto --dist worksteal

.PHONY: demo test check static house clean

demo: $(INSTALLED)
	$(BIN)/pyro-vae demo

# Everything: minutes.
test: static
	$(BIN)/python -m pytest $(WORKERS)

# Everything but the tests, with the docstrings' examples: less than a minute.
check: static
	$(BIN)/python -m pytest $(WORKERS) pyro_vae tests/test_house.py

static: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Measure the package's structure, and write it into benchmarks/README.md.
house: $(INSTALLED)
	$(BIN)/python -m benchmarks.house
	$(BIN)/python -m benchmarks.render

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
