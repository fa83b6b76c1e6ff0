import dataclasses
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import threading

import pytest

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    TokenBudgetExceededError,
    agent,
    circuit_protected,
    events,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    resilient,
    retry_on_429,
    stats,
    subscribe,
    token_budget,
)
from resilience_kit.events import (
    Admitted,
    Answered,
    CircuitHalfOpened,
    Event,
    PeakExpected,
    StoreLost,
    StoreRejoined,
    Waiting,
)
from resilience_kit.monitoring import log_events
from resilience_kit.stats import _COUNTED
from resilience_kit.testing import no_waiting

EVENT_TYPES = [kind for kind in vars(events).values() if isinstance(kind, type) and Event in kind.__bases__]
of_each_type = pytest.mark.parametrize("kind", EVENT_TYPES, ids=lambda kind: kind.__name__)


@pytest.fixture
def listen():
    """Subscribe for as long as the test runs."""
    stops = []

    def listen(listener, **options):
        stops.append(subscribe(listener, **options))
        return stops[-1]

    yield listen
    for stop in stops:
        stop()


# One event, where a call would tell more.
NEWS = CircuitHalfOpened(name="chat")


@rate_limited(min_interval=0)
def ask(prompt="2 + 2?"):
    return "four"


def refuse_to_listen(event):
    raise RuntimeError(f"cannot take {event}")


def test_a_listener_gets_the_events_of_a_call(listen):
    heard = []
    listen(heard.append)
    ask()
    admitted, answered = heard
    assert admitted == Admitted(name="default", waited=0.0, tokens=admitted.tokens)
    assert answered == Answered(name="default", seconds=answered.seconds)


def test_a_listener_gets_nothing_after_its_subscription_has_ended(listen):
    heard = []
    listen(heard.append)()
    ask()
    assert heard == []


def test_ending_a_subscription_twice_does_nothing(listen):
    stop = listen(lambda event: None)
    stop()
    stop()
    assert ask() == "four"


def test_ending_one_subscription_leaves_another_of_the_same_listener(listen):
    heard = []
    stop = listen(heard.append)
    other = heard.append
    listen(other)
    listen(other)()
    stop()
    events.emit(NEWS)
    assert heard == [NEWS]


def test_ending_an_old_subscription_again_leaves_a_new_one_of_the_same_listener(listen):
    heard = []
    listener = heard.append
    stop = listen(listener)
    stop()
    listen(listener)
    stop()
    events.emit(NEWS)
    assert heard == [NEWS]


def test_a_listener_may_end_its_own_subscription_while_it_listens(listen):
    heard = []

    def once(event):
        heard.append(event)
        stop()

    stop = listen(once)
    ask()
    ask()
    assert len(heard) == 1


def test_one_that_ends_its_subscription_takes_the_event_from_no_other(listen):
    heard = []
    stop = listen(lambda event: stop())
    listen(heard.append)
    events.emit(NEWS)
    assert heard == [NEWS]


def test_a_listener_that_raises_does_not_fail_the_call(listen):
    listen(refuse_to_listen)
    assert ask() == "four"


def test_a_listener_that_raises_takes_the_event_from_no_other(listen):
    heard = []
    listen(refuse_to_listen)
    listen(heard.append)
    events.emit(NEWS)
    assert heard == [NEWS]


def test_a_listener_that_raises_is_logged_once_an_event_with_the_types_and_without_the_content(listen, caplog):
    listen(refuse_to_listen)
    events.emit(NEWS)
    (record,) = [record for record in caplog.records if record.name == "resilience_kit.events"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "listener 'refuse_to_listen' raised RuntimeError on CircuitHalfOpened"


def test_a_listener_that_raises_is_logged_without_its_traceback_which_may_hold_prompts(listen, caplog):
    listen(refuse_to_listen)
    ask()
    assert not any(record.exc_info for record in caplog.records)


def test_a_listener_that_raises_and_cannot_even_be_shown_does_not_fail_the_call(listen, caplog):
    class Unspeakable:
        def __call__(self, event):
            raise RuntimeError

        def __repr__(self):
            raise RuntimeError

    listen(Unspeakable())
    assert ask() == "four"
    assert "Unspeakable" in caplog.text


@of_each_type
def test_event_records_are_frozen(kind):
    event = object.__new__(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.name = "other"


@of_each_type
def test_event_records_are_slotted(kind):
    assert not hasattr(object.__new__(kind), "__dict__")


@of_each_type
def test_event_records_are_made_by_keyword_alone(kind):
    assert all(field.kw_only for field in dataclasses.fields(kind))


@of_each_type
def test_event_records_hold_plain_values_alone(kind):
    plain = {str, int, float, bool, float | None, str | None}
    assert {field.type for field in dataclasses.fields(kind)} <= plain


@of_each_type
def test_event_records_say_in_a_docstring_what_they_tell(kind):
    told, _, documented = inspect.getdoc(kind).partition("\n\nAttributes:\n")
    assert told.endswith(".")
    assert re.findall(r"^    (\w+): ", documented, re.MULTILINE) == list(kind.__annotations__)


@of_each_type
def test_event_records_are_logged(kind):
    assert kind in log_events._LINES


@of_each_type
def test_event_records_are_counted_where_they_end_something(kind):
    # two are followed by one that is counted, how long an answer took is told only where somebody listens, a peak that
    # is expected has not come yet, and a store ends no call
    uncounted = {Waiting, CircuitHalfOpened, Answered, PeakExpected, StoreLost, StoreRejoined}
    assert (kind in _COUNTED) != (kind in uncounted)


SECRET = "sk-4242-my-secret"  # noqa: S105 - what must not leak is what this test is about


class SecretError(ConnectionError):
    """An SDK's error that quotes the request, as many do."""

    status_code = 503

    def __init__(self, status_code=503):
        super().__init__(f"could not send {SECRET}")
        self.status_code = status_code
        self.headers = {"authorization": SECRET}
        self.response = self


# A prompt, a key and a header go through all decisions, and none of them turns up in what the kit says.


class Answer:
    """An answer of a service, with its headers."""

    def __init__(self, headers):
        self.headers = headers


@pytest.fixture
def said(heard, caplog):
    caplog.set_level(logging.DEBUG, logger="resilience_kit")
    messages = [{"role": "user", "content": SECRET * 20}, {"role": "user", "content": SECRET * 20}]
    errors = []

    def run(function, times=1):
        for _ in range(times):
            try:
                function(messages, api_key=SECRET, headers={"authorization": SECRET})
            except (CircuitOpenError, ConfigurationError, RateLimitTimeoutError, TokenBudgetExceededError) as error:
                errors.append(error)
            except SecretError as error:
                errors.extend(getattr(error, "__notes__", []))

    def answering(*outcomes):
        outcomes = iter(outcomes)

        def answer(messages, **options):
            outcome = next(outcomes, SECRET)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return answer

    with no_waiting():
        run(rate_limited("spaced", min_interval=1)(answering()), times=2)
        run(rate_limited("impatient", min_interval=9, max_wait=1)(answering()), times=2)
        run(rate_limited("small", tokens_per_minute=5)(answering()))
        run(rate_limited("bad", tokens=lambda *args, **options: None)(answering()))
        less, as_before = (
            Answer({"x-ratelimit-remaining-requests": "5", "x-ratelimit-limit-requests": limit})
            for limit in ("30", "60")
        )
        run(rate_limited("tightened")(answering(less, as_before)), times=2)
        run(retry_on_429(max_retries=2)(answering(SecretError(429))))
        run(retry_on_429(max_retries=1)(answering(SecretError(429), SecretError(429))))
        run(retry_on_429(max_retries=1)(answering(SecretError(429), SecretError(404))))
        run(circuit_protected("broken", failure_threshold=1)(answering(SecretError())), times=2)
        mended = circuit_protected("mended", failure_threshold=1, recovery_timeout=0, success_threshold=1)
        run(mended(answering(SecretError())), times=2)
        run(token_budget("cut", max_tokens=60, on_exceed="truncate")(answering()))
        run(token_budget("long", max_tokens=5)(answering()))
        run(token_budget("spent", budget_tokens=5)(answering()))
        run(token_budget("patient", budget_tokens=500, per=5, on_exceed="wait")(answering()), times=2)
        run(resilient("whole", min_interval=0)(answering(SecretError(), SecretError(429))))
    return heard, errors


def test_all_decisions_were_taken(said):
    heard, _ = said
    # neither a forecast nor a store's end is a decision on a call
    assert {type(event) for event in heard} == set(EVENT_TYPES) - {PeakExpected, StoreLost, StoreRejoined}


def test_no_event_holds_one(said):
    heard, _ = said
    assert not any(SECRET in repr(event) for event in heard)


def test_no_log_line_holds_one(said, caplog):
    assert SECRET not in caplog.text
    assert SECRET not in "".join(repr(vars(record)) for record in caplog.records)


def test_no_error_of_ours_holds_one(said):
    _, errors = said
    assert errors
    assert not any(SECRET in repr(error) or SECRET in str(error) for error in errors)


def test_no_statistics_hold_one(said):
    assert SECRET not in json.dumps(get_all_resilience_stats())


def test_an_event_is_delivered_in_the_thread_that_caused_it(listen):
    threads = []
    listen(lambda event: threads.append(threading.current_thread()))
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert set(threads) == {thread}


def test_emitting_with_no_listener_at_all_does_nothing(monkeypatch):
    monkeypatch.setattr(events, "_listeners", {})
    assert ask() == "four"


def test_what_only_one_listener_hears_no_other_does(heard):
    alone = []
    with events.heard_only_by(alone.append):
        ask()
    assert ([type(event) for event in alone], heard) == ([Admitted, Answered], [])


def test_after_one_listener_alone_all_hear_again(heard):
    with events.heard_only_by(lambda event: None):
        pass
    ask()
    assert [type(event) for event in heard] == [Admitted, Answered]


def test_another_thread_is_heard_by_all_meanwhile(heard):
    with events.heard_only_by(lambda event: None):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert [type(event) for event in heard] == [Admitted, Answered]


# What happens in every call


def test_what_nobody_wants_is_not_made_into_a_record(listen, monkeypatch):
    def make(**fields):
        raise AssertionError

    monkeypatch.setattr("resilience_kit.rate_limits.Admitted", make)
    monkeypatch.setattr("resilience_kit.token_budgeting.BudgetSettled", make)
    events.subscribe(refuse_to_listen, wants=lambda kind: False)()
    assert resilient("unheard", min_interval=0)(lambda prompt: "four")("2 + 2?") == "four"


def test_a_listener_that_wants_no_events_of_a_type_may_get_those_that_are_made_for_another(listen):
    wanted, heard, all_heard = [], [], []
    stop = events.subscribe(heard.append, wants=lambda kind: bool(wanted.append(kind)))
    ask()
    assert (set(wanted), heard) == ({Admitted}, [])

    listen(all_heard.append)
    ask()
    stop()
    assert heard == all_heard[:1] == [Admitted(name="default", waited=0.0, tokens=heard[0].tokens)]


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "unheard"])
def test_one_that_cannot_say_what_it_wants_does_not_fail_the_call_and_hears_nothing(listen, caplog, is_heard):
    heard = []
    if is_heard:
        listen(heard.append)
    listen(refuse_to_listen, wants=refuse_to_listen)
    assert resilient("chat", agent="MathAgent", min_interval=0)(lambda prompt: "four")("2 + 2?") == "four"
    assert [type(event) for event in heard] == [Admitted, Answered, events.BudgetSettled] * is_heard
    assert "listener 'refuse_to_listen' raised RuntimeError on BudgetSettled" in caplog.messages


def test_a_tally_gets_the_fields_of_what_is_told_and_no_record():
    told = []
    stop = events.subscribe(refuse_to_listen, tally=lambda *fields: told.append(fields))
    token_budget("MathAgent", budget_tokens=100, model="ours")(lambda prompt, max_tokens: {})("", 7)
    stop()
    assert told == [(events.BudgetSettled, "MathAgent", (7, 0, 7, None, "ours"))]


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "unheard"])
def test_a_call_is_counted_once_whether_or_not_anybody_listens(listen, is_heard):
    if is_heard:
        listen(lambda event: None)
    limited = rate_limited("chat", min_interval=1, tokens=3)(lambda: "four")
    with no_waiting():
        limited(), limited()
    shown = get_all_resilience_stats()["rate_limiters"]["chat"]
    assert (shown["calls_admitted"], shown["tokens_admitted"], shown["calls_delayed"]) == (2, 6, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_child_subscribes_though_a_thread_of_its_parent_was_about_to():
    script = """
import os, signal, threading
from resilience_kit import events

holding, done = threading.Event(), threading.Event()

def hold():
    with events._lock:
        holding.set()
        done.wait(5)

thread = threading.Thread(target=hold)
thread.start()
holding.wait(5)
child = os.fork()
if child == 0:
    signal.alarm(5)
    heard = []
    stop = events.subscribe(heard.append)
    events.emit(events.Event(name="chat"))
    stop()
    os._exit(7 if len(heard) == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - the script above

    assert run.stdout == "7\n", run.stderr


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard", "unheard"])
def test_a_call_of_unknown_usage_is_counted_for_its_agent_whether_or_not_anybody_listens(listen, is_heard):
    if is_heard:
        listen(lambda event: None)
    ask = token_budget("MathAgent", model="ours")(lambda: "four")
    ask(), ask()
    shown = get_all_resilience_stats()["agents"]["MathAgent"]
    assert (shown["calls"], shown["calls_of_unknown_price"], shown["usd"]) == (2, 2, 0)


def test_calls_of_a_shared_budget_that_nobody_hears_of_are_counted_for_the_agents_that_made_them():
    ask = token_budget(model="ours")(lambda: "four")
    ask()
    with agent("MathAgent"):
        ask(), ask()
    shown = get_all_resilience_stats()["agents"]
    assert {name: account["calls"] for name, account in shown.items()} == {"default": 1, "MathAgent": 2}


def test_a_call_that_nobody_hears_of_is_counted_for_the_context_that_it_was_made_in():
    ask = token_budget("MathAgent", model="ours")(lambda: "four")
    ask()
    with agent("MathAgent", context="nightly-report"):
        ask()
    calls = {context: account["calls"] for context, account in stats.usage().by_context.items()}
    assert calls == {"default": 1, "nightly-report": 1}


def test_a_stream_that_nobody_hears_of_is_counted_for_the_agent_that_opened_it_wherever_it_is_read():
    @token_budget(model="ours")
    def stream():
        yield from ("four", "!")

    with agent("MathAgent"):
        opened = stream()
        next(opened)
    list(opened)
    assert get_all_resilience_stats()["agents"]["MathAgent"]["calls"] == 1


def test_calls_that_nobody_hears_of_stay_counted_when_they_have_been_looked_at():
    ask = token_budget("MathAgent", model="ours")(lambda: "four")
    ask()
    get_all_resilience_stats()
    ask()
    assert get_all_resilience_stats()["agents"]["MathAgent"]["calls"] == 2


def test_a_reset_forgets_calls_that_nobody_heard_of():
    token_budget("MathAgent", model="ours")(lambda: "four")()
    reset_all()
    assert "MathAgent" not in get_all_resilience_stats()["agents"]
