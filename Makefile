# Short forms of the commands in the README. Each one first makes .venv from requirements.lock if it
# is missing or was made from another lock.
#
#   make train CASE=B1-G16-LN_PN-Half_16IPU_4x4 [DATA_DIR=...] [RUN_DIR=...] [ARGS="-p epochs 3"]
#   make test

PYTHON ?= python3
VENV   ?= .venv
CASE   ?= B1-G16-LN_PN-Half_16IPU_4x4
# More papermill parameters, such as ARGS="-p epochs 3 -p seed 1".
ARGS   ?=

READY = $(VENV)/installed
BIN   = $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# A run's output goes to the terminal as it comes, and into the executed notebook.
PAPERMILL = $(BIN)/papermill --no-progress-bar --stdout-file - --stderr-file -
DATA  = $(if $(DATA_DIR),-p data_dir "$(DATA_DIR)")

# Where each run goes, unless RUN_DIR says so; INIT is the training run that a fine-tune starts from.
TRAIN_DIR    = $(or $(RUN_DIR),runs/$(CASE))
INIT        ?= runs/$(CASE)
FINETUNE_DIR = $(or $(RUN_DIR),runs/$(CASE)-finetune)
VALIDATE_DIR = $(or $(RUN_DIR),runs/$(CASE))

.DEFAULT_GOAL := help
.PHONY: help venv train finetune validate test test-long docs readme bench bench-gpu clean

help:  ## list the targets
	@echo "usage: make TARGET [CASE=...] [DATA_DIR=...] [RUN_DIR=...] [ARGS=\"-p name value\"]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

# `installed` is a copy of the lock: a checkout changes dates, and what is installed may still be right.
$(READY): requirements.lock
	@if cmp -s requirements.lock "$@"; then touch "$@"; else .ci/venv "$(PYTHON)" "$(VENV)"; fi

venv: $(READY)  ## install requirements.lock into .venv (the other targets do it when needed)

train: $(READY)  ## train CASE into runs/CASE (built-in images unless DATA_DIR is given)
	@echo "train: $(CASE) -> $(TRAIN_DIR)"
	@mkdir -p "$(TRAIN_DIR)"
	$(PAPERMILL) nbs/40_train.ipynb "$(TRAIN_DIR)/train.ipynb" -p case "$(CASE)" -p run_dir "$(TRAIN_DIR)" $(DATA) $(ARGS)
	@echo "train: curves, example images and confusion matrix are in $(TRAIN_DIR)/train.ipynb"

finetune: $(READY)  ## fine-tune the run in INIT (default runs/CASE) into runs/CASE-finetune
	@echo "finetune: $(INIT) -> $(FINETUNE_DIR)"
	@test -d "$(INIT)" || { echo "finetune: there is no training run in $(INIT): run 'make train CASE=$(CASE)' first, or name one with INIT=..." >&2; exit 1; }
	@mkdir -p "$(FINETUNE_DIR)"
	$(PAPERMILL) nbs/41_finetune.ipynb "$(FINETUNE_DIR)/finetune.ipynb" -p case "$(CASE)" -p init "$(INIT)" -p run_dir "$(FINETUNE_DIR)" $(DATA) $(ARGS)
	@echo "finetune: curves, and scores before and after are in $(FINETUNE_DIR)/finetune.ipynb"

validate: $(READY)  ## validate the run in RUN_DIR (default runs/CASE), or the file CHECKPOINT
	@echo "validate: $(or $(CHECKPOINT),$(VALIDATE_DIR))"
	@test -d "$(VALIDATE_DIR)" || test -n "$(CHECKPOINT)" || { echo "validate: there is no run in $(VALIDATE_DIR): run 'make train CASE=$(CASE)' first, or name one with RUN_DIR=..." >&2; exit 1; }
	@mkdir -p "$(VALIDATE_DIR)"
	$(PAPERMILL) nbs/42_validate.ipynb "$(VALIDATE_DIR)/validate.ipynb" -p case "$(CASE)" -p run_dir "$(VALIDATE_DIR)" $(if $(CHECKPOINT),-p checkpoint "$(CHECKPOINT)") $(DATA) $(ARGS)
	@echo "validate: confusion matrix and example images are in $(VALIDATE_DIR)/validate.ipynb"

test: $(READY)  ## the whole check: library, notebooks, tests, runs, README, site
	@$(BIN)/python .ci/check $(STEPS)

test-long: $(READY)  ## the tests that take minutes, such as hundreds of kills; `make test` leaves them out
	$(BIN)/python -m pytest -q -m long tests

docs: $(READY)  ## build the site into _docs
	@$(BIN)/python .ci/build_docs.py

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/build_readme.py

bench: $(READY)  ## measure the speed on this CPU
	@test -f tests/bench_cpu.py || { echo "bench: nothing to measure yet (there is no tests/bench_cpu.py)" >&2; exit 1; }
	@$(BIN)/python tests/bench_cpu.py $(ARGS)

bench-gpu: $(READY)  ## measure the speed on this GPU beside timm's networks (without a GPU: says so)
	@$(BIN)/python tests/bench_gpu.py $(ARGS)

clean:  ## remove what was built (not .venv, not runs)
	@echo "clean: _proc _docs build dist caches"
	@rm -rf _proc _docs build dist effnet_repro.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
