"""The multi-agent example in a loop, beside its dashboard."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from examples import live

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def started():
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.live", "--port", "0"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_it_says_where_to_look_and_ends_after_its_rounds(capsys):
    assert live.main(["--port", "0", "--rounds", "1", "--questions", "1"]) == 0
    assert re.search(r"Watch it at http://127\.0\.0\.1:\d+/ and log in with \S{32}", capsys.readouterr().out)


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert live.main(["--port", str(listener.getsockname()[1])]) == 2
    assert "cannot listen on port" in capsys.readouterr().err


def test_its_dashboard_shows_the_three_agents_until_it_is_interrupted(started):
    url, token = re.search(r"at (\S+) and log in with (\S+)", started.stdout.readline()).groups()

    def agents():
        answer = httpx2.get(f"{url}api/now", headers={"authorization": f"Bearer {token}"}, trust_env=False)
        return {agent["name"] for agent in answer.json()["agents"] if agent["calls"]}

    while not agents() >= {"CoordinatorAgent", "MathAgent", "ADXAgent"}:
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=30) == 0
