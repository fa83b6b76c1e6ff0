"""Each file in examples/ runs alone and offline; the packages beside them have tests of their own."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PYPROJECT = ROOT / "pyproject.toml"
# What each prints, in part.
PRINTS = {
    "basics.py": "'retries': 1, 'calls_recovered': 1",
    "with_cli.py": "limited by    tokens_per_minute",
    "with_cost.py": "Writer: 2 calls, 0.0180 USD",
    "with_dashboard.py": "What it showed last: [{'name': 'chat'",
    "with_fleet.py": "calls in 3 seconds",
    "with_forecast.py": "day 3, 20 h: 2",
    "with_history.py": "'calls': 3, 'prompt_tokens': 60",
    "with_offline.py": "tokens in 12 messages were sent",
    "with_otel.py": "gen_ai.client",
    "with_prometheus.py": 'resilience_kit_calls_admitted_total{limit="chat"} 3.0',
    "with_semantic_kernel.py": "Four.\n2 tokens in the answer",
    "with_testing.py": "3 requests, 2 of which failed",
}
# What these change, or start, is for the whole process.
OWN_PROCESS = ["with_cli.py", "with_fleet.py", "with_otel.py"]


def test_each_example_is_looked_at_here():
    files = {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py", "live.py"}
    assert files == PRINTS.keys()


def test_each_extra_has_an_example():
    extras = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["optional-dependencies"]
    without = {"bench", "dev", "docs", "examples", "mutants", "versions"}  # they serve this repository
    assert {f"with_{extra.replace('-', '_')}.py" for extra in extras if extra not in without} == (
        PRINTS.keys() - {"basics.py"}
    )


@pytest.mark.parametrize("name", sorted(PRINTS.keys() - set(OWN_PROCESS)))
def test_an_example_does_what_it_says(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN_PROCESS)
def test_an_example_with_a_process_of_its_own_does_what_it_says(name):
    finished = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True
    )
    assert PRINTS[name] in finished.stdout
