"""The command line, run in this process."""

import dataclasses
import importlib
import json
import os
import re
import signal
import socket
import sys
import threading

import httpx2
import pytest
from typer.testing import CliRunner

from resilience_kit import cli, plan


@pytest.fixture
def run(monkeypatch):
    # Narrow terminals wrap what the tests look for.
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def interrupt_after_request(monkeypatch, port):
    """Have a request sent and then Ctrl-C pressed as soon as the command waits for it."""

    def ask_and_interrupt():
        url = f"http://127.0.0.1:{port}/v1/embeddings"
        httpx2.post(url, json={"model": "embedding", "input": "Hello"}, headers={"api-key": "any"}).raise_for_status()
        os.kill(os.getpid(), signal.SIGINT)

    wait = cli._wait_for_interrupt

    def start_and_wait():
        asking = threading.Thread(target=ask_and_interrupt)
        asking.start()
        wait()
        asking.join()

    monkeypatch.setattr(cli, "_wait_for_interrupt", start_and_wait)


def test_simulator_serves_until_interrupted_and_tells_how_to_reach_it(run, monkeypatch):
    port = free_port()
    interrupt_after_request(monkeypatch, port)
    result = run("simulator", "--port", str(port), "--rpm", "60", "--request-window", "1")
    assert result.exit_code == 0, result.output
    assert f"export AZURE_OPENAI_ENDPOINT=http://127.0.0.1:{port} " in result.output
    assert "1 requests: 1 admitted, 0 refused, 0 faults." in result.output


def test_simulator_plays_random_faults(run, monkeypatch):
    monkeypatch.setattr(cli, "_wait_for_interrupt", lambda: None)
    assert run("simulator", "--port", "0", "--fault-rate", "0.5").exit_code == 0


def test_an_impossible_setting_is_explained(run):
    result = run("simulator", "--period", "0")
    assert (result.exit_code, "must be more than 0 seconds" in result.output) == (2, True)


def test_a_port_that_is_taken_is_explained(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("simulator", "--port", str(port))
    assert result.exit_code == 2
    assert re.search(rf"cannot listen on 127.0.0.1:{port}: ", result.output)


def test_without_a_command_the_help_lists_them(run):
    assert "simulator" in run().output


def test_main_runs_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resilience-kit", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, "simulator" in capsys.readouterr().out) == (0, True)


def test_the_command_names_its_extras_when_the_server_is_missing(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "resilience_kit.testing.simulator", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    result = run("simulator")
    assert (result.exit_code, "pip install 'resilience-kit[cli,testing]'" in result.output) == (2, True)


def test_the_command_line_names_its_extras_when_typer_is_missing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "resilience_kit.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("resilience_kit.cli")
    assert (caught.value.code, "pip install 'resilience-kit[cli,testing]'" in capsys.readouterr().err) == (2, True)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A user's module in the folder where the command is run."""
    (tmp_path / "shop.py").write_text(
        "import warnings\n"
        "from resilience_kit import rate_limited, resilient, retry_on_429\n"
        "@resilient('shop', max_retries=7)\n"
        "def ask(prompt): return prompt\n"
        "with warnings.catch_warnings(action='ignore'):\n"
        "    wrong = rate_limited(retry_on_429(ask.__wrapped__))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("shop", None)


@pytest.mark.usefixtures("shop")
def test_explain_tells_the_layers_of_a_function_in_the_current_folder(run):
    result = run("explain", "shop:ask")

    assert result.exit_code == 0
    assert "max_retries = 7 (argument)" in result.output


@pytest.mark.usefixtures("shop")
def test_explain_fails_where_there_is_something_to_mend(run):
    result = run("explain", "shop:wrong")

    assert result.exit_code == 1
    assert "limiter-outside-retry" in result.output


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("name", "answer"), [("shop:missing", "missing"), ("no_such:ask", "no_such"), ("shop:__name__", "explain()")]
)
def test_explain_says_what_it_could_not_find_or_explain(run, name, answer):
    result = run("explain", name)

    assert result.exit_code == 2
    assert answer in result.output


PLANNED = ("plan", "--rpm", "600", "--tpm", "50000", "--agents", "4", "--prompt-tokens", "200-1000")
WORKLOAD = (*PLANNED, "--output-tokens", "400", "--latency", "2-4")


def test_plan_prints_what_limits_and_the_lines_for_the_settings(run):
    result = run(*WORKLOAD)

    assert result.exit_code == 0, result.output
    assert "limited by    tokens_per_minute" in result.output
    assert result.output.splitlines()[-4:] == [
        "REQUESTS_PER_MINUTE=600",
        "TOKENS_PER_MINUTE=50000",
        "MAX_CONCURRENT_REQUESTS=4",
        "MIN_REQUEST_INTERVAL_MS=0",
    ]


def test_plan_prints_json_that_says_the_same_as_the_function(run):
    quota = {"requests_per_minute": 600, "tokens_per_minute": 50_000}
    planned = plan(**quota, agents=4, prompt_tokens=(200, 1_000), output_tokens=400, latency=(2, 4))

    assert json.loads(run(*WORKLOAD, "--json").output) == dataclasses.asdict(planned)


def test_plan_explains_a_value_that_cannot_work(run):
    result = run(*WORKLOAD, "--minutes", "0")

    assert (result.exit_code, "expected a number from 1 to 60" in result.output) == (2, True)


@pytest.mark.parametrize("latency", ["fast", "2-slow", "-"])
def test_plan_explains_how_a_range_is_written(run, latency):
    result = run(*PLANNED, "--output-tokens", "400", f"--latency={latency}")

    assert (result.exit_code, "the least and the most, as 200-3000" in result.output) == (2, True)
