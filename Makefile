# Two commands do everything on a fresh machine with Python 3.11, pip, git, make and a C compiler:
#   make demo    the whole workflow on the embedded default, ending in results/demo/report/index.html
#   make test    all tests
# Each sets up what it needs in .venv; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= all
CONFIG ?= config/demo.yaml
READY := $(VENV)/.ready
BENCH := .venv-bench
export MPLBACKEND := agg
export CELLMILL_DATA ?= $(abspath $(CURDIR)/../shared/data)

.PHONY: help demo plan corpus run test lint format bench picture config lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 18

$(READY): envs/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(READY)  ## run the workflow on the embedded default
	$(BIN)/snakemake --cores $(CORES)

plan: $(READY)  ## show what CONFIG would read, and how long it takes, before anything heavy starts
	$(BIN)/cellmill check $(CONFIG)
	$(BIN)/snakemake plan --cores $(CORES) --configfile $(CONFIG)

corpus: $(READY)  ## make the corpus of CONFIG and its page, without training
	$(BIN)/cellmill check $(CONFIG)
	$(BIN)/snakemake corpus --cores $(CORES) --configfile $(CONFIG)

run: $(READY)  ## run the workflow on CONFIG=config/NAME.yaml
	$(BIN)/cellmill check $(CONFIG)
	$(BIN)/snakemake --cores $(CORES) --configfile $(CONFIG)

$(VENV)/.ready-parity: $(READY) envs/parity.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r envs/parity.txt
	touch $@

test: $(VENV)/.ready-parity  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)  ## style, workflow lint, drift of the generated config files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint
	$(BIN)/python -m cellmill.config_docs --check

format: $(READY)  ## format all sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow/rules

$(BENCH)/.ready: envs/lock.txt envs/bench.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r envs/lock.txt -r envs/bench.txt
	touch $@

bench: demo $(BENCH)/.ready $(VENV)/.ready-parity  ## measure against peers and limits: one table, results/bench; NAMES="loaders views" for some
	$(BIN)/python tests/bench/run.py $(NAMES)

picture: demo  ## take the README's picture of the report (needs chromium)
	chromium --headless --no-sandbox --disable-gpu --user-data-dir=$$(mktemp -d) --window-size=1280,1700 \
	  --virtual-time-budget=20000 --screenshot=docs/report.png file://$(CURDIR)/results/demo/report/index.html

config: $(READY)  ## regenerate config/demo.yaml, config/schema.json and docs/config.md
	$(BIN)/python -m cellmill.config_docs

lock:  ## resolve envs/requirements.in anew into envs/lock.txt
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -r envs/requirements.in
	(echo "# made by make lock from envs/requirements.in"; $(VENV)-lock/bin/python -m pip freeze | sed 's/+cpu$$//') > envs/lock.txt
	rm -rf $(VENV)-lock

clean:  ## remove the demo's results
	rm -rf results/demo
