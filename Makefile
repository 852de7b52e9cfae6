# Two commands for a newcomer: `make quickstart` and `make test`. Both keep everything in .venv and set up what is missing.
#
#   PYTHON=python3.12         the Python that .venv is made with
#   ARGS="--seed 1"           passed on to the run, to pytest: make test ARGS="-k communicator"
#   WORKERS=1                 test files that run at a time; the default is one more than two cores, for many tests wait
#   TORCH=torch==2.13.0+cu126, TORCH_INDEX=URL    another build of torch, another index to take it from
PYTHON ?= python3
WORKERS ?= 3

# torch is installed first and alone: the default Linux wheel brings gigabytes of CUDA libraries, so a machine without
# nvidia-smi takes the CPU build, which has an index of its own. The version is the one in constraints.txt.
TORCH := $(shell grep '^torch==' constraints.txt)
ifeq ($(shell uname -s):$(shell command -v nvidia-smi 2>/dev/null),Linux:)
TORCH := $(TORCH)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oldest test-oldest-transformers check lint format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-25s %s\n", $$1, $$2 }' Makefile

# In two acts: MeZO, and MeZO-SVRG on the same weights and sentences in half as many forward passes; then one report.
newest = $$(ls -td runs/$(1) runs/$(1)-[0-9]* 2>/dev/null | head -1)
LAUNCH := PATH="$(CURDIR)/$(BIN):$$PATH" launcher/torchrun_local.sh 2
quickstart: .venv/installed-demo ## fine-tune a real model on real sentences, on two processes; takes minutes
	$(BIN)/python -m mezo_dist.assets demo:smollm2-135m demo:movie-sentences
	$(LAUNCH) configs/quickstart.yaml $(ARGS)
	$(LAUNCH) configs/mezo-svrg.yaml --train.steps=170 $(ARGS)
	$(if $(findstring output.dir,$(ARGS)),,$(BIN)/mezo-dist report $(call newest,quickstart) $(call newest,mezo-svrg) --to runs/quickstart.html)

# In the order of the folders, for launches and faults take longest and must not come last.
test: .venv/installed-dev ## run the whole test suite, ruff and mypy among it
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# PyPI's build of an old torch brings 3 GB of CUDA libraries; it is taken where the CPU build cannot be had.
OLDEST := .venv-oldest/bin
OLDEST_TESTS ?= tests/algorithms tests/config tests/directions tests/engines tests/models tests/optim tests/storage tests/trainer
OLDEST_TORCH := $(shell grep '^torch==' constraints-oldest.txt)
OLDEST_TRANSFORMERS := $(shell grep '^transformers==' constraints-oldest.txt)
OLDEST_OPTIONS := -m "not assets and not distributed and not slow"
test-oldest: .venv-oldest/installed ## unit and engine tests with the oldest versions that setup.cfg allows
	$(OLDEST)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -p no:cacheprovider \
	  $(OLDEST_OPTIONS) $(OLDEST_TESTS) $(ARGS)

# The cheap part of that, in a minute: .venv, with the oldest transformers and its hub client before the newest.
test-oldest-transformers: .venv/installed-dev ## what stands closest on transformers, with the oldest that setup.cfg allows
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/oldest-transformers $(OLDEST_TRANSFORMERS) \
	  huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	PYTHONPATH=.venv/oldest-transformers $(BIN)/python -m pytest -p no:cacheprovider $(OLDEST_OPTIONS) \
	  tests/trainer/test_hooks.py tests/trainer/test_same_run.py tests/models/test_load.py

check: lint ## lint and the quick unit tests: for before a commit
	$(BIN)/python -m pytest -m "not assets and not distributed and not slow" $(ARGS)

lint: .venv/installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, and what was built or cached; runs/ stays
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of extras: older than setup.cfg or constraints.txt, it is made again.
.venv/installed-%: setup.cfg constraints.txt | $(BIN)/pip
	$(BIN)/pip install --no-deps --retries 2 $(TORCH_INDEX:%=--extra-index-url %) $(TORCH)
	$(BIN)/pip install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/pip $(OLDEST)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'mezo_dist needs Python 3.10 or newer, and $(PYTHON) is none: name one, as in "make test PYTHON=python3.11".'; exit 1; }
	$(PYTHON) -m venv $(@:/bin/pip=)

.venv-oldest/installed: setup.cfg constraints-oldest.txt | $(OLDEST)/pip
	$(OLDEST)/pip install --no-deps --retries 2 $(TORCH_INDEX:%=--extra-index-url %) \
	  $(OLDEST_TORCH)$(if $(TORCH_INDEX),+cpu) || $(OLDEST)/pip install $(OLDEST_TORCH)
	$(OLDEST)/pip install --constraint constraints-oldest.txt --editable '.[trainer,peft]' \
	  'pytest>=9,<10' 'pytest-timeout>=2.4,<3' 'pytest-xdist>=3.8,<4' 'hypothesis>=6.150,<7' 'scipy>=1.15,<2'
	@touch $@
