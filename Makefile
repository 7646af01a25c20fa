# Everything happens in .venv, made on first use with the versions of constraints.txt.
#
#   make test        ruff, pyright, and the tests that fit a small machine
#   make test-full   also the tests marked `full`
#   make demo        the demonstration on a pretrained model
#   make clean       forget .venv and what was built

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One worker a core; a thread that waits for the others of its team must not spin on the core of another worker.
WORKERS ?= auto
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

.PHONY: test test-full lint demo clean

test: lint
	$(PYTEST)

test-full: lint
	$(PYTEST) --full

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: .venv/ready
	$(BIN)/attncc demo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
	    -e '.[test,demo]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
