# Needs Python 3.11 or later, git and make, and nothing else. Everything it makes lies in .venv.

PYTHON ?= python3
VENV ?= .venv

bin := $(VENV)/bin
install := $(bin)/python -m pip install --quiet -c constraints.txt
inputs := pyproject.toml constraints.txt

.PHONY: help check-example test docs zoo zoo-page frameworks test-frameworks clean

help:
	@echo "make check-example   install shardproof into $(VENV) and check examples/digits.py on four ranks"
	@echo "make test            install the tools of its developers as well, and run linters and tests"
	@echo "make docs            build the site of docs/ into site/; open site/index.html"
	@echo "make zoo             check every known bug, and right code that looks like one; minutes"
	@echo "make zoo-page        do so in four settings, and write the tables of docs/zoo.md"
	@echo "make frameworks      make an environment for each framework of examples/frameworks, in $(VENV)/frameworks"
	@echo "make test-frameworks make them, record each framework under all of its layouts, and compare; minutes"
	@echo "make clean           remove $(VENV)"

check-example: $(VENV)/.example-installed
	$(bin)/shardproof check examples/digits.py --ranks 4

test: $(VENV)/.dev-installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/python -m pytest -n 2 --dist loadfile

docs: $(VENV)/.docs-installed
	$(bin)/zensical build --strict

zoo: $(VENV)/.example-installed
	$(bin)/shardproof zoo

zoo-page: $(VENV)/.example-installed
	$(bin)/python benchmarks/zoo_table.py

frameworks:
	$(PYTHON) examples/frameworks/environments.py --into "$(VENV)/frameworks"

test-frameworks: frameworks $(VENV)/.dev-installed
	SHARDPROOF_FRAMEWORKS="$(abspath $(VENV)/frameworks)" $(bin)/python -m pytest examples/frameworks -rA

clean:
	rm -rf "$(VENV)"

# A stamp is written last, so that an install that was cut short is done again. One that is older than what it was
# made from is made again, in the same environment.
$(VENV)/.example-installed: $(inputs) | $(bin)/python
	$(install) -e '.[examples]'
	@touch "$@"

$(VENV)/.docs-installed: $(inputs) | $(bin)/python
	$(install) -e '.[docs]'
	@touch "$@"

$(VENV)/.dev-installed: $(inputs) | $(bin)/python
	$(install) -e '.[dev,docs,examples]'
	@touch "$@"

$(bin)/python:
	$(PYTHON) -m venv "$(VENV)"
