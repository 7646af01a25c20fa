# Everything happens in .venv, made on first use with the versions of constraints.txt.
#
#   make test        ruff, pyright, and the tests that fit a small machine
#   make test-full   also the tests marked `full`
#   make demo        the demonstration on a pretrained model
#   make clean       forget .venv and what was built

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: test test-full lint demo clean

test: lint
	$(BIN)/python -m pytest

test-full: lint
	$(BIN)/python -m pytest --full

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
