# Everything needed is set up by the targets themselves: `make demo` on a fresh clone is enough.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out/demo
PYTEST_ARGS ?=
COMPAT_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench slow compat clean
.DEFAULT_GOAL := demo

install: $(STAMP)

# torch goes first and alone: it is the one package that people take from an index of their own (CPU, CUDA).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] < (3, 14) else 1)' || \
	  { echo "informed-routing needs Python 3.10 to 3.13: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/informed-routing demo --out $(OUT)

# Two processes of one thread each: tests are small, and one after the other takes twice as long.
test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(STAMP)
	@test -f $(OUT)/routing_config.json || { echo "No routed model in $(OUT): run 'make demo' first" >&2; exit 1; }
	$(BIN)/informed-routing benchmark $(OUT) --prompt-tokens 512

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# The parity tests with the oldest, the tested and the newest transformers, peft, accelerate and lm-eval.
compat: $(STAMP)
	$(BIN)/python benchmarks/compat.py $(COMPAT_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
