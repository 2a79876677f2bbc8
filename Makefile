.DEFAULT_GOAL := help
.PHONY: help setup demo test lint soak bench clean

BIN := .venv/bin
OUT ?= out/demo
PYTEST := $(BIN)/python -m pytest
# Most of the time goes into starting engines, which keeps one core busy.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

help:  ## This list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Build .venv with a CPU vLLM, impala-vllm and the tools; run it again at any time
	@PYTHON="$(PYTHON)" python3 -m tools.setup_env

demo: setup  ## Stock vLLM against impala on a recorded session, with a report in OUT (out/demo)
	@$(BIN)/impala demo --out $(OUT)

lint: setup  ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

test: setup lint  ## All checks and tests, engine tests included
	$(PYTEST) $(SIDE_BY_SIDE)

soak: setup  ## The long runs that `make test` leaves out
	$(PYTEST) -m soak --timeout 3600

bench: setup  ## Micro benchmarks; the serving ones are in benchmarks/serving
	$(PYTEST) benchmarks/micro --benchmark-enable -m ''

clean:  ## Remove what was built, .venv included
	rm -rf .venv build dist out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
