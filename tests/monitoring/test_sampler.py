"""The sampler: what it counts, that it loses nothing, and that it harms nobody."""

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from resilience_kit import (
    CircuitOpenError,
    circuit_protected,
    events,
    rate_limited,
    reset_all,
    resilient,
    token_budget,
)
from resilience_kit.monitoring import History, sampler as sampler_module, sinks
from resilience_kit.monitoring.measures import merge
from resilience_kit.monitoring.sampler import Sampler, running_sampler
from resilience_kit.testing import no_waiting

FREE = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "min_interval": 0}


class TooManyRequestsError(Exception):
    """A 429 of any SDK."""

    status_code = 429


@pytest.fixture
def by_hand(monkeypatch):
    """Take samples where the test says so, and at the end, but not at each full second."""
    monkeypatch.setattr(Sampler, "_seconds_to_next", lambda sampler: 3_600)


@pytest.fixture
def sampler(by_hand):
    with Sampler(process="one") as sampler:
        yield sampler


@pytest.fixture
def seconds():
    """Let seconds pass for a sampler that is not started, with a call and a sample in each."""
    sampler, now, ask = Sampler(clock=lambda: now[0]), [0.0], free()

    def pass_by(count):
        for _ in range(count):
            now[0] += 1
            sampler._taken_at = time.monotonic() - 1
            ask()
            sampler._take()
        return sampler

    return pass_by


@pytest.fixture
def take(sampler):
    """Take a sample now, and tell one of its readings."""

    def take(section, name):
        sampler._take()
        return sampler.latest.reading(section, name)

    return take


def free(function=lambda: "four", **options):
    return rate_limited("chat", **{**FREE, "tokens": 10, **options})(function)


# What it counts


def test_a_sample_has_what_happened_since_the_one_before(take):
    ask = free()
    ask()
    assert take("rate_limiters", "chat").counters == {"calls_admitted": 1, "tokens_admitted": 10}
    ask(), ask()
    assert take("rate_limiters", "chat").counters == {"calls_admitted": 2, "tokens_admitted": 20}
    assert take("rate_limiters", "chat").counters == {}


def test_a_sample_has_nothing_of_before_the_start():
    ask = free()
    ask()
    with Sampler() as sampler:
        pass
    assert sampler.total.reading("rate_limiters", "chat").counters == {}


def test_a_sample_says_where_each_limit_stands(sampler):
    free(sampler._take)()
    gauges = sampler.latest.reading("rate_limiters", "chat").gauges
    assert (gauges["in_flight"], gauges["tokens_in_window"], gauges["tokens_per_minute"]) == (1, 10, 10**9)


def test_a_sample_says_in_which_state_a_circuit_is(take):
    @circuit_protected("ill", failure_threshold=1)
    def fail():
        raise ConnectionError

    for _ in range(2):
        with suppress(ConnectionError, CircuitOpenError):
            fail()
    reading = take("circuit_breakers", "ill")
    assert (reading.gauges["state"], reading.counters) == ("OPEN", {"times_opened": 1, "calls_refused": 1})


def test_a_sample_has_what_agents_and_models_used(take, sampler):
    @token_budget("MathAgent")
    def ask(prompt):
        return {"model": "gpt-4o", "usage": {"prompt_tokens": 1_000, "completion_tokens": 500}}

    ask("2 + 2?")
    of_agent = take("agents", "MathAgent").counters
    of_model = sampler.latest.reading("models", "gpt-4o").counters
    assert of_agent == of_model == {"calls": 1, "prompt_tokens": 1_000, "completion_tokens": 500, "usd": 0.0075}


def test_a_refusal_by_the_server_is_counted(take):
    def refuse():
        raise TooManyRequestsError

    with suppress(TooManyRequestsError):
        free(refuse)()
    assert take("rate_limiters", "chat").counter("calls_rate_limited") == 1


def test_counters_that_went_back_to_zero_have_risen_from_there(take):
    ask = free()
    for _ in range(5):
        ask()
    take("rate_limiters", "chat")
    reset_all()
    ask(), ask()
    assert take("rate_limiters", "chat").counter("calls_admitted") == 2


# Histograms


def test_calls_that_went_at_once_waited_for_no_time(take):
    ask = free()
    ask(), ask()
    wait = take("rate_limiters", "chat").histogram("wait")
    assert (wait.count, wait.counts[0], wait.total) == (2, 2, 0)


@pytest.mark.parametrize("is_heard", [False, True], ids=["unheard", "heard"])
def test_a_call_that_waited_is_counted_with_its_wait(take, is_heard):
    stop = events.subscribe(lambda event: None) if is_heard else lambda: None
    ask = free(min_interval=3)
    with no_waiting():
        ask(), ask()
    stop()
    wait = take("rate_limiters", "chat").histogram("wait")
    assert (wait.count, wait.counts[0]) == (2, 1)
    assert wait.total == pytest.approx(3, abs=0.1)


@pytest.mark.looptime
async def test_answers_are_counted_with_the_time_from_admission_to_their_end(take):
    @rate_limited("chat", min_interval=5, tokens=0)
    async def ask():
        await asyncio.sleep(2)

    await asyncio.gather(ask(), ask())
    answer = take("rate_limiters", "chat").histogram("answer")
    assert (answer.count, answer.total) == (2, pytest.approx(4, abs=0.1))


@pytest.mark.looptime
async def test_a_stream_is_answered_when_it_is_read(take):
    @rate_limited("chat", tokens=0)
    async def stream():
        for word in ("one", "two", "three"):
            await asyncio.sleep(1)
            yield word

    async for _ in stream():
        pass
    assert take("rate_limiters", "chat").histogram("answer").total == pytest.approx(3, abs=0.1)


def test_a_call_that_fails_is_no_answer(take):
    def fail():
        raise ConnectionError

    with suppress(ConnectionError):
        free(fail)()
    assert take("rate_limiters", "chat").histogram("answer").count == 0


def test_nothing_is_lost_over_threads_while_samples_are_taken(sampler, restless_threads):
    calls, threads = 200, 8
    ask = free(max_concurrent=threads)
    done = threading.Event()

    def take():
        while not done.is_set():
            sampler._take()

    taking = threading.Thread(target=take)
    taking.start()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: [ask() for _ in range(calls)], range(threads)))
    done.set()
    taking.join()
    sampler.stop()
    reading = sampler.total.reading("rate_limiters", "chat")
    counted = reading.counter("calls_admitted"), reading.histogram("wait").count, reading.histogram("answer").count
    assert counted == (threads * calls,) * 3


def test_an_answer_of_a_limit_that_is_new_while_a_sample_is_taken_is_in_the_next(sampler, take, monkeypatch):
    shown = sampler_module.stats.get_all_resilience_stats

    def ask_afterwards():
        before = shown()
        free()()
        return before

    with monkeypatch.context() as patch:
        patch.setattr(sampler_module.stats, "get_all_resilience_stats", ask_afterwards)
        sampler._take()
    assert take("rate_limiters", "chat").histogram("answer").count == 1


# What it costs


def test_nobody_looks_at_the_clock_for_an_answer_while_nobody_wants_to_know():
    told = []
    stop = events.subscribe(lambda event: None, tally=lambda kind, *_: told.append(kind))
    free()()
    stop()
    assert told == []


def test_a_call_makes_no_record_for_a_sampler(sampler, monkeypatch):
    def make(**fields):
        raise AssertionError

    for kind in ("Admitted", "Answered"):
        monkeypatch.setattr(f"resilience_kit.rate_limits.{kind}", type(kind, (), {"__new__": make}))
    assert free()() == "four"


def test_after_the_last_sampler_has_stopped_answers_are_timed_no_more():
    with Sampler(), Sampler():
        assert events.are_answers_timed
    assert not events.are_answers_timed


# What it keeps


def test_it_keeps_an_hour_of_seconds(seconds):
    sampler = seconds(3_700)
    kept = sampler.samples()
    assert (len(kept), kept[-1].at) == (3_600, 3_700)
    assert [it.at for it in sampler.samples(3)] == [3_698, 3_699, 3_700]


def test_it_keeps_an_hour_of_minutes(seconds):
    minutes = seconds(3_730).samples(resolution=60)
    admitted = [it.reading("rate_limiters", "chat").counter("calls_admitted") for it in minutes]
    assert (admitted, minutes[-1].seconds) == ([60] * 60 + [10], pytest.approx(10, abs=0.1))


def test_where_much_happens_seconds_do_not_reach_back_so_far(seconds, monkeypatch):
    monkeypatch.setattr(sampler_module, "_MOST_READINGS", 50)
    sampler = seconds(100)
    assert len(sampler.samples()) <= 50
    assert sampler.total.reading("rate_limiters", "chat").counter("calls_admitted") == 100


def test_what_does_not_change_is_kept_once(sampler, take):
    free()()
    take("rate_limiters", "chat")
    assert take("rate_limiters", "chat") is take("rate_limiters", "chat")


def test_names_beyond_a_thousand_are_left_out(sampler, monkeypatch):
    monkeypatch.setattr(sampler_module, "_MOST_NAMES", 2)
    for name in ("one", "two", "three"):
        rate_limited(name, **FREE)(lambda: "four")()
    sampler._take()
    assert sampler.latest.of("rate_limiters").keys() == {"one", "two"}


def test_a_long_name_is_cut_so_that_it_can_be_kept(sampler):
    rate_limited("x" * 5_000, **FREE)(lambda: "four")()
    sampler._take()
    assert sampler.latest.of("rate_limiters").keys() == {"x" * 200}


# Its life


def test_it_takes_a_sample_at_each_full_second():
    taken = threading.Event()
    with Sampler([lambda sample: taken.set()]) as sampler:
        assert taken.wait(10)
        assert sampler.latest.at % 1 < 0.9


def test_stopping_takes_a_last_sample_and_ends_all_threads():
    before = set(threading.enumerate())
    samples = []
    sampler = Sampler([samples.append])
    sampler.start()
    free()()
    sampler.stop()
    assert set(threading.enumerate()) <= before
    assert merge(samples).reading("rate_limiters", "chat").counter("calls_admitted") == 1


def test_starting_and_stopping_twice_do_nothing_more():
    sampler = Sampler()
    sampler.stop()
    sampler.start()
    thread = sampler._thread
    sampler.start()
    assert (sampler._thread, repr(sampler).startswith("<Sampler running")) == (thread, True)
    sampler.stop()
    sampler.stop()
    assert not sampler.is_running


def test_it_goes_on_after_it_was_started_again(by_hand):
    sampler = Sampler()
    ask = free()
    for _ in range(2):
        with sampler:
            ask()
        ask()
    assert sampler.total.reading("rate_limiters", "chat").counter("calls_admitted") == 2


async def test_stopping_in_an_event_loop_does_not_wait():
    held = threading.Event()
    sampler = Sampler([lambda sample: held.wait(5)])
    sampler.start()
    sampler.stop()
    assert not held.is_set()
    threads = [sampler._sinks[0].thread]
    held.set()
    await asyncio.to_thread(threads[0].join)


def test_a_sample_that_fails_is_warned_of_and_its_counts_are_in_the_next(sampler, take, monkeypatch, caplog):
    free()()
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module.stats, "get_all_resilience_stats", lambda: 1 / 0)
        sampler._take()
        sampler._take()
    assert take("rate_limiters", "chat").counter("calls_admitted") == 1
    assert caplog.messages == ["a sample failed with ZeroDivisionError, and the next one holds its counts"]


def test_all_share_one_sampler_that_may_be_stopped_and_started():
    shared = running_sampler()
    shared.stop()
    assert running_sampler() is shared
    assert shared.is_running
    shared.stop()


def test_a_sampler_that_is_dropped_is_forgotten():
    Sampler(process="dropped")
    gc.collect()
    assert "dropped" not in {sampler.process for sampler in sampler_module._all}


FORK = """
import os
from resilience_kit import events, rate_limited
from resilience_kit.monitoring.sampler import Sampler

ask = rate_limited("chat", min_interval=0, requests_per_minute=1000)(lambda: "four")
samples = []
sampler = Sampler([samples.append])
sampler.start()
ask()
child = os.fork()
if child == 0:
    ok = not sampler.is_running and not events.are_answers_timed and sampler.process.endswith(f"-{os.getpid()}")
    ask()
    with sampler:
        ask(), ask()
    counted = sampler.total.reading("rate_limiters", "chat").counter("calls_admitted")
    os._exit(0 if ok and counted == 2 and samples else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sampler.stop()
print(status, sampler.total.reading("rate_limiters", "chat").counter("calls_admitted"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_child_samples_only_when_it_is_asked_to():
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=True)  # noqa: S603 - our own program
    assert finished.stdout.split() == ["0", "1"]


def test_a_program_that_ends_without_stopping_it_hands_on_the_last_sample(tmp_path):
    program = """
import sys
from resilience_kit import rate_limited
from resilience_kit.monitoring import History, Sampler
Sampler([History(sys.argv[1]).add]).start()
rate_limited("chat")(lambda: "four")()
"""
    place = tmp_path / "history.sqlite3"
    subprocess.run([sys.executable, "-c", program, place], check=True, timeout=30)  # noqa: S603 - our own program
    total = History(place).total(0)
    assert total.reading("rate_limiters", "chat").counter("calls_admitted") == 1


# Sinks


def test_a_sink_that_raises_is_warned_of_once_and_takes_no_sample_from_another(by_hand, caplog):
    samples = []

    def fail(sample):
        raise RuntimeError("a secret")

    with Sampler([fail, samples.append]) as sampler:
        sampler._take()
        sampler._take()
    assert len(samples) == 3
    assert caplog.messages == [f"'{fail.__qualname__}' raised RuntimeError on a sample"]


def test_a_sink_that_is_slow_misses_the_oldest_samples_and_is_warned_of_once(by_hand, caplog, monkeypatch):
    monkeypatch.setattr(sinks, "_MOST_WAITING", 3)
    held, taken, samples, others = threading.Event(), threading.Semaphore(0), [], []

    def slow(sample):
        held.wait(30)
        samples.append(sample)

    def quick(sample):
        others.append(sample)
        taken.release()

    with Sampler([slow, quick]) as sampler:
        for _ in range(10):
            sampler._take()
            taken.acquire()
        held.set()
    assert len(others) == 11
    assert len(samples) <= 5
    assert samples[-1] is others[-1]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"'{slow.__qualname__}' is too slow to take a sample each second, and misses some"
    ]


def test_a_sink_that_is_added_later_takes_what_comes_then(sampler):
    samples = []
    sampler._take()
    remove = sampler.add_sink(samples.append)
    sampler._take()
    remove()
    sampler._take()
    sampler.stop()
    assert len(samples) == 1


def test_a_sink_may_stop_the_sampler():
    done = threading.Event()
    sampler = Sampler([lambda sample: (sampler.stop(), done.set())])
    sampler.start()
    sampler._take()
    assert done.wait(10)


def test_the_whole_stack_is_told_by_one_sample(take, sampler):
    resilient("chat", agent="MathAgent", **FREE)(lambda prompt: "four")("2 + 2?")
    take("rate_limiters", "chat")
    assert {reading.section for reading in sampler.latest.readings} == {
        "rate_limiters",
        "circuit_breakers",
        "retries",
        "token_budgets",
        "agents",
    }
