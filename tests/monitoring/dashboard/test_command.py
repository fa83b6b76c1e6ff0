"""`resilience-kit dashboard`, and what serves the page."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from resilience_kit import ResilienceSettings, cli, configure
from resilience_kit.monitoring.dashboard import command, create_app, running, serve as serve_alone

TOKEN = "a-token-that-nobody-guesses"
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def run(monkeypatch):
    # Narrow terminals wrap what the tests look for.
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *arguments: CliRunner().invoke(cli.app, ["dashboard", *arguments])


@pytest.fixture
def started():
    """Start the command in a process of its own; gives its URL, and ends it."""
    processes = []

    def start(*arguments, **environment):
        code = "from resilience_kit.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "dashboard", "--port", "0", *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, re.search(r"http://\S+", process.stdout.readline()).group()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_an_address_that_others_reach_is_refused_without_a_token(run):
    ended = run("--host", "0.0.0.0")
    assert (ended.exit_code, "RESILIENCE_DASHBOARD_TOKEN" in ended.output) == (2, True)


def test_a_token_that_can_be_guessed_is_refused(run, monkeypatch):
    monkeypatch.setenv("RESILIENCE_DASHBOARD_TOKEN", "secret")
    ended = run("--host", "0.0.0.0")
    assert (
        ended.exit_code,
        "16 or more" in ended.output,
        "secret" in ended.output.replace("import secrets", "").replace("secrets.", ""),
    ) == (2, True, False)


def test_a_token_file_that_is_not_there_is_told(run):
    ended = run("--token-file", "nothing.txt")
    assert (ended.exit_code, "nothing.txt: cannot be read" in ended.output) == (2, True)


def test_a_port_that_is_taken_is_told(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = run("--port", str(listener.getsockname()[1]))
    assert (ended.exit_code, "cannot listen" in ended.output) == (2, True)


def test_without_the_extra_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "resilience_kit.monitoring.dashboard.command", None)
    assert "pip install 'resilience-kit[cli,dashboard]'" in run().stderr


def test_without_starlette_the_package_says_what_to_install(monkeypatch):
    name = "resilience_kit.monitoring.dashboard"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, f"{name}.app", None)
    with pytest.raises(ImportError, match=r"pip install 'resilience-kit\[dashboard\]'"):
        importlib.import_module(name)


def test_the_command_serves_until_it_is_interrupted(started):
    process, url = started()
    told = httpx2.get(f"{url}api/now", trust_env=False).json()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors, "Traceback" in output) == (0, "", False)
    assert "there is no history to read" in told["notes"][0]


@pytest.mark.parametrize(
    ("options", "store", "shown"),
    [
        ([], None, "the history at resilience-history.sqlite3"),
        (["--history", "own.sqlite3"], None, "the history at own.sqlite3"),
        ([], "redis://127.0.0.1:1/0", "the fleet"),
        (["--history", "own.sqlite3"], "redis://127.0.0.1:1/0", "the fleet"),
    ],
)
def test_it_says_what_it_shows_and_where(run, monkeypatch, options, store, shown):
    if store is not None:
        configure(ResilienceSettings(resilience_store=store))
    monkeypatch.setattr(command, "serve", lambda app, listener: None)
    ended = run("--port", "0", *options)
    assert (ended.exit_code, ended.output.partition(" at http://127.0.0.1:")[0]) == (0, f"Showing {shown}")


def test_elsewhere_it_asks_for_the_token(started, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    _, url = started("--host", "0.0.0.0", "--token-file", str(tmp_path / "token"))
    assert httpx2.get(f"{url}api/now", trust_env=False).status_code == 401
    answer = httpx2.get(f"{url}api/now", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
    assert answer.status_code == 200


def test_a_port_that_is_taken_is_the_callers_error():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError, match="in use"):
        serve_alone(create_app(), port=listener.getsockname()[1])


def test_a_server_in_a_thread_is_gone_with_its_block():
    with running(create_app(), port=0) as url:
        assert httpx2.get(url, trust_env=False).status_code == 200
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url, trust_env=False)


def test_an_open_stream_does_not_keep_the_server_from_ending():
    with running(create_app(), port=0) as url, httpx2.Client(trust_env=False) as client:
        response = client.send(client.build_request("GET", f"{url}events"), stream=True)
        next(response.iter_lines())
    response.close()
