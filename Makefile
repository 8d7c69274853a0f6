# Everything runs in VENV, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q $(PYTEST_FLAGS)
EXAMPLES_SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')

.PHONY: install train test test-engines test-ranks test-launch test-unit test-cluster golden lint fuzz bench faults soak

install: $(VENV)/.installed

train: install
	$(BIN)/python launch.py cluster.gpus_per_node=2

# All at a time, as each waits for processes, and for time to pass, much of the while. The unit tests, which wait for
# nothing, take what the others leave.
test: install
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=line test-launch test-engines test-ranks test-unit

# Half of the time that tests/ranks takes.
ENGINES := $(patsubst %,tests/ranks/test_%.py,accelerate bitwise branches crossing deepspeed engines fsdp memory)

test-engines: install
	$(PYTEST) $(ENGINES)

test-ranks: install
	$(PYTEST) tests/ranks $(addprefix --ignore=,$(ENGINES))

test-launch: install
	$(PYTEST) tests/launch tests/faults

test-unit: install
	nice -n 10 $(PYTEST) -p tests.support.no_torch tests/unit

test-cluster: install
	$(PYTEST) tests/cluster

# Rewrite the files in tests/golden where what the tests make differs; look at the difference before you commit it.
golden: install
	GOLDEN=rewrite $(PYTEST) -p tests.support.no_torch $(shell grep -rl 'tests.support.golden' tests/unit)

# `make fuzz EXAMPLES_SEED=N` tries the examples of an earlier run again.
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

faults: install
	$(BIN)/python -m tests.faults

soak: install
	$(BIN)/python -m benchmarks.soak

$(VENV)/.installed: constraints.txt pyproject.toml
	@echo "Installing into $(VENV) what constraints.txt names (some minutes, once) …"
	@$(PYTHON) -m venv $(VENV)
	@# DeepSpeed builds what it can compile when that is first used: nothing now.
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		".[tasks,accelerate,deepspeed,peers,test,lint]"
	@$(BIN)/pip uninstall --quiet --yes isobatch  # a copy of now; what is run is this clone
	@# Others' optimizers, which ours are compared with: single modules, without what their packages bring, and so not
	@# where others look for them (see tests/support/peers.py).
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $(VENV)/peers pytorch-optimizer timm torch-optimizer
	@rm -rf build isobatch.egg-info  # what pip left beside it
	@touch $@
