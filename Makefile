# The commands of a first day. Needs Python 3.11, make and a C++ compiler; nothing here needs root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-slow test-slurm test-all faults lint bench decide clean

install: $(INSTALLED)

# torch alone and first: its version decides which build comes, and everything else accepts it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m harness.operators
	touch $@

# Train, adapt and score a tiny tool-calling model; the results are written to runs/quickstart/.
quickstart: install
	$(BIN)/harness quickstart

# Prompt, retrieve or fine-tune: a tiny model with a planted behaviour for each remedy; the page is runs/decide-tiny/report/index.html.
decide: install
	$(BIN)/harness run quickstart/decide-base --fresh
	$(BIN)/harness run quickstart/decide-adapt --fresh
	$(BIN)/harness decide decide/tiny

# Files of tests at a time; 0: all in one process.
WORKERS ?= 2
test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

# With test all that CI runs, in its hour and a half. TESTS: of these files alone.
TESTS ?= tests
test-slow: install
	$(BIN)/python -m pytest $(TESTS) -m "slow and not slurm and not exhaustive and not gpu"

# As root: they start a Slurm of three nodes on this machine.
test-slurm: install
	$(BIN)/python -m pytest -m "slurm and not exhaustive and not gpu"

test-all: install
	$(BIN)/python -m pytest -m "not gpu"

# Runs that are killed N times at random instants; each must end bit for bit as the one that nobody killed.
N ?= 200
faults: install
	$(BIN)/python tests/faults/fuzz.py --rounds $(N)

lint: install
	$(BIN)/ruff check .

bench: install
	$(BIN)/python benchmarks/sft.py

clean:
	rm -rf $(VENV) build *.egg-info
