# make demo: the multi-agent example, bare client against the kit. make demo-live: the same beside the dashboard, until
# Ctrl-C. make test: everything that CI runs. make versions: the tests on every Python that is here, and on the oldest
# versions that are admitted. make chaos: 2,000 seeded scenarios in which everything goes wrong, in about half an hour.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo demo-live test lint bench chaos versions clean
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

chaos: .venv/installed
	$(BIN)/python -m tests.chaos --seeds 0:2000 --jobs 2

versions: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[versions]"
	# pyenv puts one Python at a time on the path
	PATH="$$(printf '%s:' "$$HOME"/.pyenv/versions/3.1[1-9]*/bin)$$PATH" UV_SYSTEM_CERTS=1 $(BIN)/tox

clean:
	rm -rf .venv .tox .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "resilience_kit needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
