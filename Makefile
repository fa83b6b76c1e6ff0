# make demo: the multi-agent example, bare client against the kit. make demo-live: the same beside the dashboard, until
# Ctrl-C. make test: everything that CI runs.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo demo-live test lint bench mutants clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m examples.multi_agent

demo-live: .venv/installed
	$(BIN)/python -m examples.live

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing

# The peers and the picture need more than the tests do.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks

# Changes the decorators line by line, and sees which changes no test notices: tests/mutants.md says why they may stay.
mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(BIN)/mutmut run
	$(BIN)/mutmut results

clean:
	rm -rf .venv mutants .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "resilience_kit needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
