# Two commands do everything: `make demo` and `make test`. Each does all of its own set-up.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
# The newest that flwr allows, which would otherwise replace it at each installation.
UV_VERSION := 0.11.33
READY := $(VENV)/.ready
# With the libraries of learning, which are large.
WHOLE := $(VENV)/.whole
ARGS ?=
JOBS ?= auto

# Debian's programs that some tests talk to. Without them those tests skip and say why. After a colon
# stands the package of a command that may be there from elsewhere.
APT_PACKAGES := postgresql chromium:chromium nginx:nginx-light wrk:wrk node:nodejs npm:npm

.PHONY: help demo test lint bench format lock apt clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY) ## Show the gateway in front of a clinic, and a study over four sites
	@$(BIN)/python examples/demo.py $(ARGS)

test: lint ## Check style, types and import contracts, then run every test
	$(BIN)/pytest -m "not serial" -n $(JOBS) --dist loadfile
	$(BIN)/pytest -m serial

lint: $(WHOLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(WHOLE) ## Measure, print a table and write benchmarks/results.json
	@$(BIN)/python benchmarks/run.py $(ARGS)

format: $(READY) ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: $(READY) ## Resolve the newest versions that go together into uv.lock
	UV_PYTHON_DOWNLOADS=never $(BIN)/uv lock --upgrade --python $(BIN)/python

apt: ## Install the Debian programs that tests talk to
	@sh scripts/apt-install.sh $(APT_PACKAGES)

clean: ## Remove the virtual environment and caches; ./var, where the demo keeps its data, stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The virtual environment is made once and made again when the lock changes.
$(READY): uv.lock pyproject.toml Makefile scripts/make-venv.sh
	@sh scripts/make-venv.sh $(VENV) $(UV_VERSION)
	@touch $@

$(WHOLE): $(READY)
	@sh scripts/make-venv.sh $(VENV) $(UV_VERSION) --group learning
	@touch $@
