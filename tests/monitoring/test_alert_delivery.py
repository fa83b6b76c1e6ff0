"""Alerts on their way: to the log, to a real server on loopback, and to functions that fail, hang or lag."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, strategies as st

from resilience_kit import ConfigurationError, get_all_resilience_stats
from resilience_kit.monitoring import alert_delivery
from resilience_kit.monitoring.alert_delivery import Courier, Webhook, WebhookRefusedError, log_alert, sign, verify
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule
from resilience_kit.monitoring.alerts import Alerts, example_alert
from resilience_kit.monitoring.measures import Reading, Sample
from resilience_kit.testing import no_waiting

SECRET = "from-a-vault-not-from-code"  # noqa: S105 - a test's own
PATH = "/services/T0KEN/B1"
ALERT = example_alert(DEFAULT_RULES[0], 1_000.0)


@pytest.fixture
def receiver():
    """A web server that answers what a test says, and remembers what it was sent."""

    class Receiver:
        def __init__(self):
            self.answers = []
            self.requests = []
            self.took_one = threading.Event()
            self.may_answer = threading.Event()
            self.may_answer.set()

    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            state.requests.append((self.path, dict(self.headers), body))
            state.took_one.set()
            state.may_answer.wait(30)
            status, headers = state.answers.pop(0) if state.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}{PATH}"
    yield state
    state.may_answer.set()
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def dead_server():
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}{PATH}"


# The webhook


def test_a_webhook_sends_the_alert_as_json(receiver):
    Webhook(receiver.url, secret=SECRET)(ALERT)

    ((path, headers, body),) = receiver.requests
    sent = json.loads(body)
    assert (path, headers["content-type"]) == (PATH, "application/json")
    assert len(sent.pop("id")) == 32
    assert sent == ALERT.to_dict()


def test_the_receiver_can_verify_what_it_was_sent(receiver):
    Webhook(receiver.url, secret=SECRET)(ALERT)

    ((_, headers, body),) = receiver.requests
    said = {"timestamp": headers["X-Resilience-Timestamp"], "signature": headers["X-Resilience-Signature"]}
    assert verify(body, **said, secret=SECRET)
    assert not verify(body + b" ", **said, secret=SECRET)
    assert not verify(body, **said, secret=SECRET + "!")


def test_a_server_that_fails_twice_is_asked_again_and_can_tell_that_it_is_the_same_alert(receiver):
    receiver.answers = [(503, {}), (429, {"retry-after": "1"})]
    with no_waiting():
        Webhook(receiver.url, secret=SECRET)(ALERT)

    assert len(receiver.requests) == 3
    assert len({body for _, _, body in receiver.requests}) == 1


def test_a_server_that_refuses_for_good_is_asked_once(receiver):
    receiver.answers = [(410, {})]
    with pytest.raises(WebhookRefusedError, match=r"^the webhook's server answered 410$"):
        Webhook(receiver.url, secret=SECRET)(ALERT)

    assert len(receiver.requests) == 1


def test_a_redirect_is_not_followed(receiver):
    receiver.answers = [(307, {"location": receiver.url})]
    with pytest.raises(WebhookRefusedError, match="307"):
        Webhook(receiver.url, secret=SECRET)(ALERT)

    assert len(receiver.requests) == 1


def test_a_dead_server_is_given_up(receiver):
    with dead_server() as url, no_waiting(), pytest.raises(Exception, match="refused"):
        Webhook(url, secret=SECRET, max_retries=2)(ALERT)


def test_a_server_that_hangs_is_given_up(receiver):
    receiver.may_answer.clear()
    with no_waiting(), pytest.raises(Exception, match="timed out"):
        Webhook(receiver.url, secret=SECRET, timeout=0.05, max_retries=1)(ALERT)

    assert len(receiver.requests) == 2


def test_the_retries_of_a_webhook_are_none_of_the_programs(receiver, heard):
    receiver.answers = [(503, {})]
    with no_waiting():
        Webhook(receiver.url, secret=SECRET)(ALERT)

    assert heard == []
    assert get_all_resilience_stats()["retries"] == {}


def test_neither_address_nor_key_is_ever_shown_or_logged(receiver, caplog):
    caplog.set_level(logging.DEBUG)
    hook = Webhook(receiver.url, secret=SECRET)
    receiver.answers = [(503, {}), (204, {}), (410, {})]
    with no_waiting(), dead_server() as url:
        alerts = Alerts(DEFAULT_RULES, deliver=[hook, hook, Webhook(url, secret=SECRET, max_retries=1)])
        alerts.take(broken_budget(1.0))
        assert alerts.close(30)
        alerts.take(Sample(2.0, 1.0, "one"))
        assert alerts.close(30)

    assert caplog.records
    shown = caplog.text + repr(hook) + repr([vars(record) for record in caplog.records])
    for secret in (SECRET, PATH, "T0KEN"):
        assert secret not in shown


@pytest.mark.parametrize(
    "url",
    [
        "hooks.example.com/T0KEN",
        "ftp://hooks.example.com/T0KEN",
        "https:///T0KEN",
        "https://user:T0KEN@hooks.example.com",
        "https://hooks.example.com:T0KEN/",
        "https://[T0KEN/",
        "",
    ],
)
def test_an_address_that_cannot_work_is_refused_without_telling_it(url):
    with pytest.raises(ConfigurationError, match="expected https:// or http:// and a host") as refused:
        Webhook(url, secret=SECRET)

    assert "T0KEN" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_key_that_is_too_short_is_refused_without_telling_it():
    with pytest.raises(ConfigurationError, match="expected a text of 16 characters or more") as refused:
        Webhook("https://hooks.example.com", secret="hunter2")  # noqa: S106 - a test's own

    assert "hunter2" not in str(refused.value)


def test_a_timeout_that_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match=r"Webhook\(timeout=0\): expected seconds above 0"):
        Webhook("https://hooks.example.com", secret=SECRET, timeout=0)


# The signature


def test_the_signature_is_hmac_sha256_of_the_timestamp_and_the_body():
    # computed with openssl: printf '1000.{}' | openssl dgst -sha256 -hmac from-a-vault-not-from-code
    known = "sha256=1a80fe73503e5356aab72de4e71328885855e21aa4bfabfabb814293e046c0d0"

    assert sign(b"{}", timestamp="1000", secret=SECRET) == known


def verified(body=b"{}", *, timestamp="1000", secret=SECRET, now=1_000.0, **changed):
    said = {"timestamp": timestamp, "signature": sign(b"{}", timestamp="1000", secret=SECRET), **changed}
    return verify(body, **said, secret=secret, now=now)


def test_what_was_signed_is_verified():
    assert verified()


@pytest.mark.parametrize(
    "wrong",
    [
        {"body": b"[]"},
        {"timestamp": "1001"},
        {"timestamp": None},
        {"timestamp": ""},
        {"timestamp": "-1000"},
        {"timestamp": "1000.0"},
        {"timestamp": "\u0661\u0660\u0660\u0660"},
        {"timestamp": "9" * 10_000},
        {"signature": None},
        {"signature": ""},
        {"signature": "sha256="},
        {"signature": "sha256=é\ud800"},
        {"secret": "another-key-of-another-program"},
        {"now": 1_301.0},
        {"now": 699.0},
    ],
)
def test_anything_else_is_not(wrong):
    assert not verified(**wrong)


@pytest.mark.parametrize("now", [1_300.0, 700.0])
def test_a_clock_may_differ_by_the_tolerance(now):
    assert verified(now=now)


def test_the_time_is_the_systems_clock():
    timestamp = str(int(time.time()))
    signature = sign(b"{}", timestamp=timestamp, secret=SECRET)

    assert verify(b"{}", timestamp=timestamp, signature=signature, secret=SECRET)


@given(body=st.binary(), timestamp=st.none() | st.text(), signature=st.none() | st.text())
def test_no_header_and_no_body_can_make_it_fail_or_agree(body, timestamp, signature):
    assert verify(body, timestamp=timestamp, signature=signature, secret=SECRET) is False


def test_signatures_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(alert_delivery.hmac, "compare_digest", lambda *both: compared.append(both) or True)

    assert verified(signature="sha256=wrong")
    assert compared


# The log


@pytest.mark.parametrize(
    ("state", "severity", "level"),
    [("firing", "warning", "WARNING"), ("firing", "critical", "ERROR"), ("ok", "critical", "INFO")],
)
def test_the_log_has_an_alert_at_its_level(caplog, state, severity, level):
    caplog.set_level(logging.INFO, logger="resilience_kit")
    alert = example_alert(Rule(name="own", measure="wait_p95_seconds", above=1, severity=severity), 5.0)
    fields = {**alert.to_dict(), "state": state}
    log_alert(type(alert)(**fields))

    (record,) = caplog.records
    assert (record.name, record.levelname) == ("resilience_kit.alerts", level)
    assert record.getMessage().startswith(f"alert {state} rule='own' name='test'")
    assert record.resilience == {"event": f"alert {state}", **fields}


# Never in the way


def broken_budget(at, name="MathAgent"):
    gauges = {"budget_tokens": 100, "tokens_used": 100}
    return Sample(at, 1.0, "one", (Reading("token_budgets", name, gauges=gauges),))


def test_all_receivers_are_told():
    first, second = [], []
    alerts = Alerts(deliver=[first.append, second.append])
    news = alerts.take(broken_budget(1.0))
    assert alerts.close(30)

    assert first == second == news
    assert len(news) == 1


def test_a_receiver_that_hangs_holds_up_neither_the_samples_nor_the_others():
    free = threading.Event()
    told = threading.Event()
    alerts = Alerts(deliver=[lambda alert: free.wait(30), lambda alert: told.set()])
    try:
        alerts.take(broken_budget(1.0))
        assert told.wait(30)
        assert not alerts.close(0.01)
    finally:
        free.set()
    assert alerts.close(30)


def test_a_receiver_that_fails_is_told_of_once_until_it_works_again(caplog):
    outcomes = iter([1, 1, 0, 1])
    served = []

    def send(alert):
        served.append(alert)
        if next(outcomes):
            raise OSError("https://hooks.example.com/T0KEN")

    courier = Courier(send)
    for _ in range(4):
        courier.send(ALERT)
    assert courier.close(30)

    assert len(served) == 4
    assert caplog.messages == [f"an alert did not reach {send.__qualname__!r}: OSError"] * 2


def test_the_status_of_a_refusal_is_told(receiver, caplog):
    receiver.answers = [(410, {})]
    courier = Courier(Webhook(receiver.url, secret=SECRET))
    courier.send(ALERT)
    assert courier.close(30)

    assert caplog.messages == ["an alert did not reach 'Webhook': WebhookRefusedError (410)"]


def test_of_more_alerts_than_can_wait_the_newest_are_kept_and_that_is_told_once(caplog):
    free, began = threading.Event(), threading.Event()
    served = []

    def send(alert):
        began.set()
        free.wait(30)
        served.append(alert)

    courier = Courier(send)
    courier.send(-1)
    assert began.wait(30)
    for number in range(1_010):
        courier.send(number)
    free.set()
    assert courier.close(30)

    assert served == [-1, *range(10, 1_010)]
    assert len(caplog.messages) == 1


def test_without_alerts_there_is_no_thread():
    before = threading.active_count()
    alerts = Alerts(deliver=[print])
    alerts.take(Sample(1.0, 1.0, "one"))

    assert threading.active_count() == before
    assert alerts.close(0)
