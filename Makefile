# demo          the multi-agent example, bare client against the kit
# demo-live     the same beside the dashboard, until Ctrl-C
# test          everything that CI runs
# docs          the documentation, into site/
# bench         what a call costs, and how the peers do at the edge of a quota
# chaos         2,000 seeded scenarios with faults of every kind
# soak          a million calls, for leaks, slowness and miscounts
# mutants       whether the tests notice when a decorator is wrong
# versions      the tests on every Python that is here, and on the oldest versions that are admitted
# release-check the packages as a stranger gets them: each extra alone, licences, known vulnerabilities

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo demo-live test lint docs bench chaos soak mutants versions release-check clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m examples.multi_agent

demo-live: .venv/installed
	$(BIN)/python -m examples.live

test: lint
	# file by file: some files start a server for all of their tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --cov --cov-report=term

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing

# The theme greets each build with news of its own. Not --quiet: a warning that is not heard does not fail the build.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html is the documentation; for its search: python3 -m http.server -d site"

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

soak: .venv/installed
	$(BIN)/python -m benchmarks.soak

# In environments of its own: it takes minutes, and the package index.
release-check: .venv/installed
	$(BIN)/python tools/release_check.py

# Changes the decorators line by line, and sees which changes no test notices: tests/mutants.md says why they may stay.
mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(BIN)/mutmut run
	$(BIN)/mutmut results

clean:
	rm -rf .venv .tox site mutants .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "resilience_kit needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
