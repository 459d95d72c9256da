# Every target sets up what it needs in .venv first; nothing but Python 3.11 and make has to be there.

PYTHON ?= python3
VENV   ?= .venv
SEEDS  ?= 20000
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check soak bench venv clean

demo: $(VENV)/.demo
	$(BIN)/pccl demo

test: $(VENV)/.torch
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 15 $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_packaging.py -k layer

soak: $(VENV)/.dev
	$(BIN)/python -m tests.sim.soak --seeds $(SEEDS)

bench: $(VENV)/.torch
	$(BIN)/pccl bench $(ARGS)

venv: $(VENV)/.base

clean:
	rm -rf $(VENV) build dist *.egg-info

# --- set-up: one stamp per set of packages -------------------------------------------------------------------------

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.torch: $(VENV)/.dev
	$(PIP) -e '.[torch]'
	@touch $@
