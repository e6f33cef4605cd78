# Every target does its own set-up: Python >= 3.11 with its headers, a C++ compiler and the package index are needed.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := constraints.txt

.PHONY: help install pretrain convert posttrain test test-slow test-parity test-slurm gpu-check lint typecheck format bench coverage clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/.installed  ## create .venv with everything that is run here

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: torch, megatron-core and the tools, a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

pretrain: install  ## tokenizer, data, training and evaluation of the laptop recipe, about ten minutes on two cores
	$(BIN)/spiketrain pretrain --config configs/pretrain/laptop.yaml

convert: install  ## a base, its hybrid, experts and spikes: every step of docs/conversion.md, within an hour on two cores
	$(BIN)/spiketrain convert run --config configs/convert/laptop.yaml

posttrain: install  ## a base, fine-tuned and then rewarded: docs/posttraining.md, within ten minutes on two cores
	$(BIN)/spiketrain convert run --config configs/posttrain/laptop.yaml

# Files begin in the order that tests/conftest.py gives them, those that take longest first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs

test: install lint typecheck  ## style, types and all tests but the slow ones
	$(PYTEST) -m "not slow"

test-slow: install  ## all slow tests, SLURM's too where it is installed; OPTIONS="--budget 900" ends after 900 seconds
	$(PYTEST) -p tests.budget -m slow --durations 30 $(OPTIONS)

test-parity: install  ## every parallel layout against one process, with times
	$(BIN)/python -m pytest tests/parity -rs --durations 0

test-slurm: install  ## jobs on a SLURM cluster of two nodes on this machine; installs SLURM (apt-get, as root)
	bash tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm -rs

gpu-check:  ## every kernel on this machine's GPU, with the Python, torch and Triton that are there; see docs/gpu.md
	@if test -x $(BIN)/python; then $(BIN)/python -m tests.gpu_check; else $(PYTHON) -m tests.gpu_check; fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .

typecheck: install
	$(BIN)/mypy

format: install  ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## the training step against transformers, side by side
	$(BIN)/spiketrain bench train_step

coverage: install  ## which lines the tests reach
	$(PYTEST) --ignore tests/slurm --cov --cov-report term --cov-report xml

clean:  ## remove caches; data, runs and .venv stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml build *.egg-info
