# Two commands: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: demo test lint types check format bench-batch bench-peers bench-gpu clean

$(STAMP): pyproject.toml constraints.txt infra/local/wheels.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r infra/local/wheels.txt
	@touch $@

# The main job on real flights; KILL=1 kills a run twice and compares its bytes with an undisturbed one.
demo: $(STAMP)
	@$(BIN)/python -m deployments.demo $(if $(filter 1,$(KILL)),--kill)

test: lint types $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Figures: a table, then one JSON object as the last line. ROWS=1000000 for a quick look.
bench-batch: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.batch

# The same beside Ray Data, Daft, Spark, sentence-transformers and a loop by hand, each in an environment of its own.
bench-peers: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.peers

# Whole runs over passes alone on the card; says so where there is none.
bench-gpu: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.gpu

clean:
	rm -rf $(VENV) .demo .bench
