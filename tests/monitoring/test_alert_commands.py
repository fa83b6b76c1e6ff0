"""`resilience-kit alerts`, run in this process, and alerts at work from a call to the receiver."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from resilience_kit import circuit_protected, cli, rate_limited
from resilience_kit.monitoring.alert_delivery import Webhook, verify
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule
from resilience_kit.monitoring.alerts import Alerts
from resilience_kit.monitoring.sampler import Sampler
from resilience_kit.testing import no_waiting

SECRET = "from-a-vault-not-from-code"  # noqa: S105 - a test's own


@pytest.fixture
def run(monkeypatch):
    # Narrow terminals wrap what the tests look for.
    monkeypatch.setenv("COLUMNS", "300")
    # whoever runs the tests may have a receiver of their own
    for variable in ("RESILIENCE_ALERTS_WEBHOOK_URL", "RESILIENCE_ALERTS_WEBHOOK_SECRET"):
        monkeypatch.delenv(variable, raising=False)
    return lambda *arguments: CliRunner().invoke(cli.app, ["alerts", *arguments])


@pytest.fixture
def receiver():
    """A web server that takes alerts and answers with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            server.taken.append((dict(self.headers), body))
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.taken, server.status = [], 204
    server.url = f"http://127.0.0.1:{server.server_port}/T0KEN"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def variables(run, monkeypatch, receiver):
    monkeypatch.setenv("RESILIENCE_ALERTS_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("RESILIENCE_ALERTS_WEBHOOK_SECRET", SECRET)


# resilience-kit alerts check


def test_check_tells_the_rules_that_a_file_puts_in_force(run, tmp_path):
    (tmp_path / "alerts.toml").write_text(
        "keep_defaults = false\n[rules.nightly]\nmeasure = 'rate_limited_share'\nabove = 0.2\nfor_seconds = 60\n"
        "names = ['nightly']\n[[silences]]\nuntil = 2027-01-31T08:00:00Z\n"
    )
    result = run("check", "alerts.toml")

    assert (result.exit_code, result.output.splitlines()) == (
        0,
        [
            "nightly: warning when rate_limited_share of 'nightly' is above 0.2 for 60 s",
            "1 rules, 1 silences.",
        ],
    )


def test_check_tells_what_is_wrong_and_fails(run, tmp_path):
    (tmp_path / "alerts.toml").write_text("[rules.circuit-open]\nabove = 'high'\n")
    result = run("check", "alerts.toml")

    assert result.exit_code == 2
    assert "alerts.toml: rules.circuit-open.above = 'high': expected a number" in result.output


# resilience-kit alerts test


@pytest.mark.usefixtures("variables")
def test_test_fires_an_alert_that_the_receiver_can_verify(run, receiver):
    result = run("test")

    ((headers, body),) = receiver.taken
    said = {"timestamp": headers["X-Resilience-Timestamp"], "signature": headers["X-Resilience-Signature"]}
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "The webhook took it.")
    assert verify(body, **said, secret=SECRET)
    assert json.loads(body)["text"].startswith("This is a test of circuit-open, and all is well.")


def test_test_without_a_webhook_shows_the_alert_and_how_to_send_it(run):
    result = run("test", "--rule", "slow-waits")

    assert result.exit_code == 0
    assert result.output.startswith("warning: This is a test of slow-waits")
    assert "set RESILIENCE_ALERTS_WEBHOOK_URL" in result.output


def test_test_knows_the_rules_of_a_file(run, tmp_path):
    (tmp_path / "alerts.toml").write_text("[rules.nightly]\nmeasure = 'rate_limited_share'\nabove = 0.2\n")

    assert run("test", "--rules", "alerts.toml", "--rule", "nightly").exit_code == 0


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(("status", "answer"), [(410, "answered 410"), (503, "answered 503")])
def test_test_fails_where_the_receiver_refuses(run, receiver, status, answer):
    receiver.status = status
    with no_waiting():
        result = run("test")

    assert (result.exit_code, answer in result.output, "T0KEN" in result.output) == (1, True, False)


@pytest.mark.usefixtures("variables")
def test_test_fails_where_nobody_listens_and_does_not_tell_the_address(run, monkeypatch):
    monkeypatch.setenv("RESILIENCE_ALERTS_WEBHOOK_URL", "http://127.0.0.1:1/T0KEN")
    with no_waiting():
        result = run("test")

    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "It was not delivered: ConnectError."


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("--rule", "presure"), "there is no rule 'presure': expected one of circuit-open, "),
        (("--rules", "missing.toml"), "missing.toml: cannot be read"),
        (("--webhook", "http://127.0.0.1:1/T0KEN"), "expected a text of 16 characters or more"),
    ],
)
def test_test_explains_what_cannot_work(run, arguments, answer):
    result = run("test", *arguments)

    assert (result.exit_code, answer in result.output) == (2, True)


@pytest.mark.usefixtures("variables")
def test_help_shows_no_address(run):
    result = run("test", "--help")

    assert (result.exit_code, "T0KEN" in result.output) == (0, False)


# From a call to the receiver


def eventually(condition):
    """Wait for what another thread does."""
    return any(condition() or time.sleep(0.02) for _ in range(1_500))


def test_an_open_circuit_reaches_the_receiver_by_itself_and_so_does_its_end(receiver):
    errors = iter([ConnectionError()])

    @circuit_protected("chat", failure_threshold=1, recovery_timeout=0.01, success_threshold=1)
    def ask():
        for error in errors:
            raise error

    rule = Rule(name="open", measure="circuit_open_seconds", above=-1)
    alerts = Alerts([rule], deliver=[Webhook(receiver.url, secret=SECRET)])
    with Sampler([alerts.take]):
        with pytest.raises(ConnectionError):
            ask()
        assert eventually(lambda: len(receiver.taken) == 1)
        ask()
        assert eventually(lambda: len(receiver.taken) == 2)
    assert alerts.close(30)

    sent = [json.loads(body) for _, body in receiver.taken]
    assert [(each["rule"], each["name"], each["state"]) for each in sent] == [
        ("open", "chat", "firing"),
        ("open", "chat", "ok"),
    ]


def test_the_default_rules_are_quiet_while_all_is_well():
    told = []
    alerts = Alerts(DEFAULT_RULES, deliver=[told.append])
    ask = rate_limited("chat", tokens=0, min_interval=0, requests_per_minute=10_000)(lambda: "four")
    with Sampler([alerts.take]):
        for _ in range(50):
            ask()
    assert alerts.close(30)

    assert told == []
    assert alerts.current() == ()
