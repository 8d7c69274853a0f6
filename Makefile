# Everything runs in VENV, created from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q $(PYTEST_FLAGS)
EXAMPLES_SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')

.PHONY: install train test test-engines test-ranks test-launch test-unit test-tools test-cluster test-gpu golden lint fuzz bench bench-gpu faults soak

install: $(VENV)/.installed

train: install
	$(BIN)/python launch.py cluster.gpus_per_node=2

# All suites run at once, as most of them spend much time waiting. The unit tests, which never
# wait, run at a lower priority.
test: install
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=line test-launch test-engines test-ranks test-unit

# These take half of the time of tests/ranks.
ENGINES := $(patsubst %,tests/ranks/test_%.py,accelerate bitwise branches crossing deepspeed engines fsdp memory)

test-engines: install
	$(PYTEST) $(ENGINES)

test-ranks: install
	$(PYTEST) tests/ranks $(addprefix --ignore=,$(ENGINES))

test-launch: install
	$(PYTEST) tests/launch tests/faults

test-unit: install
	nice -n 10 $(PYTEST) -p tests.support.no_torch tests/unit

# Extras of pyproject.toml that only tests/tools uses.
TOOLS := tensorboard,wandb,mlflow,trackio,tools

test-tools: $(VENV)/.tools
	$(PYTEST) tests/tools

# The most valuable tests come first. Where .venv can't be made, with any torch and what else is there:
# python -m pytest tests/gpu. With PYTEST_FLAGS=--on-cpu a CPU runs what it can.
test-gpu: install
	$(PYTEST) --durations=5 $(addprefix tests/gpu/test_,waits.py runs.py commands.py trial.py)

test-cluster: install
	$(PYTEST) tests/cluster

# Rewrite the golden files whose tests differ; read the difference before you commit it.
golden: install
	GOLDEN=rewrite $(PYTEST) -p tests.support.no_torch $(shell grep -rl 'tests.support.golden' tests/unit)

# `make fuzz EXAMPLES_SEED=N` repeats the examples of an earlier run.
fuzz: install
	@echo "To reproduce: make fuzz EXAMPLES_SEED=$(EXAMPLES_SEED)"
	$(PYTEST) -p tests.support.no_torch -m hypothesis --hypothesis-profile=fuzz --hypothesis-seed=$(EXAMPLES_SEED) tests/unit || \
		{ echo "To reproduce: make fuzz EXAMPLES_SEED=$(EXAMPLES_SEED)"; exit 1; }

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.structure

bench: install
	$(BIN)/python -m benchmarks

bench-gpu: install
	$(BIN)/python -m benchmarks gpu

faults: install
	$(BIN)/python -m tests.faults

soak: install
	$(BIN)/python -m benchmarks.soak

$(VENV)/.installed: constraints.txt pyproject.toml
	@echo "Installing the packages of constraints.txt into $(VENV) (a few minutes, once) …"
	@$(PYTHON) -m venv $(VENV)
	@# DeepSpeed compiles its ops on first use, not now.
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		".[tasks,accelerate,deepspeed,peers,report,test,lint]"
	@$(BIN)/pip uninstall --quiet --yes isobatch  # a copy; everything runs from this clone
	@# Other optimizer packages to compare with, without their dependencies, and so outside site-packages
	@# (see tests/support/peers.py).
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $(VENV)/peers pytorch-optimizer timm torch-optimizer
	@rm -rf build isobatch.egg-info  # left by pip
	@touch $@

# What only tests/tools needs, so that the other parts don't wait for it.
$(VENV)/.tools: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt ".[$(TOOLS)]"
	@$(BIN)/pip uninstall --quiet --yes isobatch
	@rm -rf build isobatch.egg-info
	@touch $@
