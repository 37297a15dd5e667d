# Needs make and Python 3.11 or newer; everything else goes into .venv. `make PYTHON=python3.12` picks another Python.
PYTHON ?= python3
BIN := .venv/bin

NOTEBOOKS_CI := 00_first_video 05_kv_cache 08_dmd

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint format results bench lab grade notebooks notebooks-ci site links clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## install everything into .venv (a second call does nothing)

# One resolver for everybody: pip only brings uv, and uv installs the pinned versions.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, for example: make setup PYTHON=python3.11" \
		if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup ## train Self-Forcing from the shipped weights and show before and after, in outputs/quickstart/
	$(BIN)/python -m experiments.quickstart

test: setup ## run the fast tests on two workers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2

lint: setup ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# EVALUATE=1 ONLY=main_table/sf_dmd measures a row's shipped weights again, RETRAIN=1 ONLY=... trains it anew first (seed 0,
# or SEEDS="1 2"; interrupted, it goes on), MISSING=1 runs, for hours, what no record was committed of.
results: setup ## redraw RESULTS.md from the records of all experiments
	@$(if $(MISSING),$(BIN)/python -m experiments.run)
	@$(if $(RETRAIN),$(BIN)/python -m experiments.run $(subst /, --only ,$(or $(ONLY),$(error say which, such as ONLY=main_table/tf))) --seeds $(or $(SEEDS),0) --again)
	@$(if $(EVALUATE),$(BIN)/python -m experiments.results --evaluate --only $(ONLY),$(BIN)/python -m experiments.results)

bench: setup ## measure speed and memory, as ratios to this machine's own peak
	$(BIN)/python -m benchmarks

lab: setup ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

grade: setup ## grade your exercises of a lesson: make grade LESSON=8
	@$(BIN)/python -m tutorial $(LESSON)

# Short of everything (SF_FAST), with the solutions filled in; a full run is what a student does, by hand.
# They run as copies in outputs/notebooks/, where their outputs stay for the site.
NBMAKE := SF_FAST=1 SF_SOLUTIONS=1 $(BIN)/python -m pytest --nbmake --overwrite --nbmake-timeout=900 -p no:cacheprovider

notebooks: setup ## run every notebook, shortened, with the solutions filled in
	@mkdir -p outputs/notebooks && cp notebooks/*.ipynb outputs/notebooks
	$(NBMAKE) outputs/notebooks

notebooks-ci: setup ## run those that cover the others' code
	@mkdir -p outputs/notebooks && cp $(NOTEBOOKS_CI:%=notebooks/%.ipynb) outputs/notebooks
	$(NBMAKE) $(NOTEBOOKS_CI:%=outputs/notebooks/%.ipynb)

site: setup ## build the course as a site in build/site, with the outputs of `make notebooks` where there are any
	$(BIN)/python docs/build_site.py

links: setup ## list the links that lead out of the site
	@$(BIN)/python docs/build_site.py --links

clean: ## remove caches and build leftovers; never the environment, weights, logs or outputs
	rm -rf .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
