# Two commands do everything on a fresh machine: `make run` and `make test`.
# A virtual environment is made in .venv; another Python is chosen with PYTHON=python3.12.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PORT   ?= 8180

.PHONY: help run test check format build bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

run: $(VENV)/.installed ## Install duomo and serve the embedded model on port 8180
	$(BIN)/duomo serve --port $(PORT)

test: $(VENV)/.installed-test ## Install what the tests need and run them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

check: $(VENV)/.installed-test ## Format, lint, types and the contracts between rooms
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test ## Rewrite the sources in the one style
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

build: $(VENV)/.installed-test ## Rebuild the native kernels in place
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .

bench: $(VENV)/.installed-test ## The longer proofs and every figure of NUMBERS.md (hours)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m duomo.bench.distortion
	$(BIN)/python -m duomo.bench.kernels

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis src/duomo/_native*.so

# torch comes first where it is missing: left to the resolver, a CUDA build of several GB arrives.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/pip install -q 'scikit-build-core>=0.11' 'nanobind>=2.4' cmake ninja
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -e '.[test]'
	touch $@
