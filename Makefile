# Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-commands test-rest test-cluster lint bench faults soak

train: .venv/.installed
	$(BIN)/python launch.py cluster.gpus_per_node=2

# Two halves at a time: each waits for processes, and for time to pass, most of the while.
test: .venv/.installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line test-commands test-rest

test-commands:
	$(BIN)/python -m pytest -q tests/launch

test-rest:
	$(BIN)/python -m pytest -q tests/faults tests/ranks tests/unit

test-cluster: .venv/.installed
	$(BIN)/python -m pytest -q tests/cluster

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks

faults: .venv/.installed
	$(BIN)/python -m tests.faults

soak: .venv/.installed
	$(BIN)/python -m benchmarks.soak

.venv/.installed: constraints.txt pyproject.toml
	@echo "Installing into .venv what constraints.txt names (some minutes, once) …"
	@$(PYTHON) -m venv .venv
	@# DeepSpeed builds what it can compile when that is first used: nothing now.
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		".[tasks,accelerate,deepspeed,peers,test,lint]"
	@# Others' optimizers, which ours are compared with: single modules, without what their packages bring, and so not
	@# where others look for them (see tests/peers.py).
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target .venv/peers pytorch-optimizer timm torch-optimizer
	@rm -rf build isobatch.egg-info  # what pip left beside it
	@touch $@
