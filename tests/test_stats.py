import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import tenacity

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    TokenBudgetExceededError,
    circuit_protected,
    events,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    reset_circuit_breakers,
    resilient,
    retry_on_429,
    stats,
    token_budget,
)
from resilience_kit.testing import no_waiting


class TooManyRequestsError(Exception):
    """A 429 of any SDK."""

    status_code = 429


def name_of(function):
    return f"{function.__module__}.{function.__qualname__}"


def fail():
    raise ConnectionError


def refuse():
    raise TooManyRequestsError


def open_circuit(*names):
    for name in names:
        with suppress(ConnectionError):
            circuit_protected(name, failure_threshold=1)(fail)()


def state_of(name):
    return get_all_resilience_stats()["circuit_breakers"][name]["state"]


def use_everything():
    """One call of each outcome, and a second one that waits."""
    ask = resilient("chat", agent="MathAgent", budget_tokens=100, min_interval=1)(lambda prompt: "four")
    with no_waiting():
        ask("one two three")
        ask("one two three")
    open_circuit("broken")


# Its shape


def test_before_any_call_all_sections_are_there():
    assert get_all_resilience_stats() == {
        "global_resilience": {
            "circuit_breaker": {"state": "CLOSED", "failure_count": 0},
            "rate_limiter": {
                "calls_admitted": 0,
                "calls_delayed": 0,
                "calls_refused": 0,
                "calls_rate_limited": 0,
                "tokens_admitted": 0,
                "seconds_waited": 0.0,
                "tightened_by_server": 0,
                "relaxed_again": 0,
            },
        },
        "rate_limiters": {},
        "circuit_breakers": {},
        "retries": {},
        "token_budgets": {},
        "agents": {},
        "models": {},
    }


def test_it_is_plain_json():
    use_everything()
    assert json.loads(json.dumps(get_all_resilience_stats(), allow_nan=False)) == get_all_resilience_stats()


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("rate_limiters", {"chat"}),
        ("circuit_breakers", {"chat", "broken"}),
        ("token_budgets", {"MathAgent"}),
        ("agents", {"MathAgent"}),
        ("models", {"gpt-4o"}),
    ],
)
def test_each_section_is_by_name(section, names):
    use_everything()
    assert get_all_resilience_stats()[section].keys() == names


def test_the_global_circuit_is_the_one_named_default():
    open_circuit("default")
    circuit = get_all_resilience_stats()["global_resilience"]["circuit_breaker"]
    assert (circuit["state"], circuit["failure_count"]) == ("OPEN", 1)


def test_the_global_circuit_is_closed_while_another_is_open():
    open_circuit("chat")
    assert get_all_resilience_stats()["global_resilience"]["circuit_breaker"]["state"] == "CLOSED"


def test_the_global_circuit_counts_failures_before_it_opens():
    ask = circuit_protected(fail)
    for _ in range(2):
        with suppress(ConnectionError):
            ask()
    assert get_all_resilience_stats()["global_resilience"]["circuit_breaker"]["failure_count"] == 2


@pytest.mark.looptime
async def test_the_global_circuit_is_half_open_while_it_is_tried():
    @circuit_protected(failure_threshold=1, recovery_timeout=30)
    async def ask(answers):
        if not answers:
            raise ConnectionError

    with suppress(ConnectionError):
        await ask(answers=False)
    await asyncio.sleep(30)
    await ask(answers=True)
    assert get_all_resilience_stats()["global_resilience"]["circuit_breaker"]["state"] == "HALF_OPEN"


def test_the_global_rate_limiter_is_the_one_named_default():
    rate_limited(tokens=7)(lambda: "four")()
    assert get_all_resilience_stats()["global_resilience"]["rate_limiter"]["tokens_admitted"] == 7


def test_what_is_returned_is_a_copy():
    use_everything()
    get_all_resilience_stats()["agents"]["MathAgent"].clear()
    assert get_all_resilience_stats()["agents"]["MathAgent"]["calls"] == 2


# What is counted


@pytest.mark.looptime
async def test_a_rate_limit_shows_where_it_stands_and_what_it_did():
    @rate_limited("chat", requests_per_minute=60, min_interval=2, max_wait=3, tokens=10)
    async def ask():
        await asyncio.sleep(100)

    calls = [asyncio.create_task(ask()) for _ in range(3)]
    await asyncio.sleep(2.5)
    shown = get_all_resilience_stats()["rate_limiters"]["chat"]
    assert shown.pop("seconds_waited") == pytest.approx(2, abs=0.1)
    assert shown == {
        "in_flight": 2,
        "max_concurrent": 3,
        "paused": 0,
        "waiting": 0,
        "requests_in_window": 2,
        "requests_per_minute": 60,
        "tokens_in_window": 20,
        "tokens_per_minute": 150_000,
        "period": 60.0,
        "calls_admitted": 2,
        "calls_delayed": 1,
        "calls_refused": 1,
        "calls_rate_limited": 0,
        "tokens_admitted": 20,
        "tightened_by_server": 0,
        "relaxed_again": 0,
    }
    await asyncio.gather(*calls, return_exceptions=True)


def test_a_limit_that_the_server_tightened_counts_it():
    events.emit(events.QuotaTightened(name="chat", reason="remaining", seconds=1.0, tokens=0, requests=1))
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["tightened_by_server"] == 1


@pytest.mark.looptime
async def test_a_circuit_shows_where_it_stands_and_what_it_did():
    @circuit_protected("chat", failure_threshold=2, recovery_timeout=30, success_threshold=1)
    async def ask(*, answers):
        if not answers:
            raise ConnectionError

    for _ in range(3):
        with suppress(ConnectionError, CircuitOpenError):
            await ask(answers=False)
    await asyncio.sleep(30)
    await ask(answers=True)
    with suppress(ConnectionError):
        await ask(answers=False)
    assert get_all_resilience_stats()["circuit_breakers"]["chat"] == {
        "state": "CLOSED",
        "failure_count": 1,
        "success_count": 0,
        "trials_in_flight": 0,
        "times_opened": 1,
        "times_closed": 1,
        "calls_refused": 1,
    }


def test_retries_are_shown_by_function():
    outcomes = iter([TooManyRequestsError(), TooManyRequestsError(), None, *[TooManyRequestsError()] * 4, None])

    @retry_on_429(initial_backoff=1, jitter=False)
    def ask():
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
            return

    with no_waiting():
        for _ in range(3):
            with suppress(TooManyRequestsError):
                ask()
    assert get_all_resilience_stats()["retries"] == {
        name_of(ask): {
            "retries": 2 + 3,
            "calls_recovered": 1,
            "calls_given_up": 1,
            "seconds_waited": (1 + 2) + (1 + 2 + 4),
        }
    }


def test_a_function_that_was_never_retried_is_not_shown():
    retry_on_429(lambda: "four")()
    assert get_all_resilience_stats()["retries"] == {}


@pytest.mark.looptime
async def test_a_budget_shows_where_it_stands_and_what_it_did():
    @token_budget("MathAgent", budget_tokens=100, per="minute", on_exceed="wait")
    async def ask(prompt, max_tokens):
        return {"usage": {"prompt_tokens": 0, "completion_tokens": 80}}

    await ask("", 80)
    await ask("", 80)
    with suppress(TokenBudgetExceededError):
        await ask("", 101)
    shown = get_all_resilience_stats()["token_budgets"]["MathAgent"]
    assert shown.pop("seconds_left") == pytest.approx(60, abs=0.1)
    assert shown.pop("seconds_waited") == pytest.approx(60, abs=0.1)
    assert shown == {
        "budget_tokens": 100,
        "tokens_used": 80,
        "tokens_reserved": 0,
        "budget_usd": None,
        "usd_used": 0.0,
        "usd_reserved": 0.0,
        "calls_refused": 1,
        "calls_delayed": 1,
    }


def test_an_agent_shows_what_it_used():
    @token_budget("MathAgent", max_tokens=4, budget_tokens=100, on_exceed="truncate")
    def ask(prompt, max_tokens):
        return {"usage": {"prompt_tokens": 4, "completion_tokens": 2}}

    ask("one two three four", 10)
    ask("one two three four five six", 10)
    assert get_all_resilience_stats()["agents"] == {
        "MathAgent": {
            "calls": 2,
            "prompt_tokens": 8,
            "completion_tokens": 4,
            "tokens_reserved": 28,
            "usd": pytest.approx(6e-05),
            "calls_of_unknown_price": 0,
            "truncations": 1,
            "tokens_truncated": 2,
        }
    }


def test_a_call_that_the_server_refused_is_counted_for_its_limit():
    with suppress(TooManyRequestsError):
        rate_limited("chat")(refuse)()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["calls_rate_limited"] == 1


def test_a_call_that_failed_otherwise_is_not_counted_as_refused_by_the_server():
    with suppress(ConnectionError):
        rate_limited("chat")(fail)()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["calls_rate_limited"] == 0


def use_of(model):
    return {"model": model, "usage": {"prompt_tokens": 1_000, "completion_tokens": 500}}


def test_a_model_shows_what_all_agents_used_of_it():
    for agent in ("MathAgent", "ADXAgent"):
        token_budget(agent)(lambda prompt: use_of("gpt-4o-2024-08-06"))("2 + 2?")
    assert get_all_resilience_stats()["models"] == {
        "gpt-4o-2024-08-06": {
            "calls": 2,
            "prompt_tokens": 2_000,
            "completion_tokens": 1_000,
            "usd": pytest.approx(0.015),
            "calls_of_unknown_price": 0,
        }
    }


def test_an_answer_that_names_no_model_is_of_the_one_that_the_decorator_names():
    token_budget("MathAgent", model="gpt-4o-mini")(lambda prompt: use_of(None))("2 + 2?")
    assert get_all_resilience_stats()["models"].keys() == {"gpt-4o-mini"}


def test_a_model_without_a_price_counts_its_calls_as_such():
    token_budget("MathAgent", model="ours")(lambda prompt: use_of("ours"))("2 + 2?")
    shown = get_all_resilience_stats()["models"]["ours"]
    assert (shown["calls"], shown["calls_of_unknown_price"], shown["usd"]) == (1, 1, 0)


def test_a_call_of_which_nothing_is_known_is_of_no_model():
    token_budget("MathAgent")(lambda prompt: "four")("2 + 2?")
    assert get_all_resilience_stats()["models"] == {}


def test_models_beyond_a_thousand_share_one_name(monkeypatch):
    monkeypatch.setattr(stats, "_MOST_NAMES", 2)
    for model in ("one", "two", "three", "four"):
        token_budget("MathAgent")(lambda prompt, model=model: use_of(model))("2 + 2?")
    shown = get_all_resilience_stats()["models"]
    assert {name: of_model["calls"] for name, of_model in shown.items()} == {"one": 1, "two": 1, "other": 2}


def test_counts_are_exact_over_threads(restless_threads):
    together = threading.Barrier(8)
    ask = rate_limited("chat", requests_per_minute=6_000, min_interval=0, max_concurrent=8, tokens=3)(lambda: "four")

    def run(_):
        together.wait()
        for _ in range(100):
            ask()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(8)))
    shown = get_all_resilience_stats()["rate_limiters"]["chat"]
    assert (shown["calls_admitted"], shown["tokens_admitted"], shown["in_flight"]) == (800, 2_400, 0)


def test_an_event_of_a_kind_that_is_not_counted_changes_nothing():
    before = get_all_resilience_stats()
    stats.count(events.Waiting(name="chat", seconds=None, tokens=0, ahead=0))
    assert get_all_resilience_stats() == before


# tenacity 9.2.1 keeps one `statistics` for a function, and clears it at each call

ATTEMPTS = [1, 3, 4]


async def call_concurrently(function):
    """Have calls of the function fail until each was attempted as often as it should, all at the same time."""
    await asyncio.gather(*(function(iter(range(attempts - 1))) for attempts in ATTEMPTS))


async def fail_while_there_are(failures):
    await asyncio.sleep(1)
    for _ in failures:
        raise TooManyRequestsError


@pytest.mark.looptime
async def test_tenacitys_own_statistics_of_concurrent_calls_are_those_of_none_of_them_together():
    ask = tenacity.retry(wait=tenacity.wait_fixed(1))(fail_while_there_are)
    await call_concurrently(ask)
    assert ask.statistics["attempt_number"] != sum(ATTEMPTS)


@pytest.mark.looptime
async def test_our_counts_of_concurrent_calls_are_those_of_all_of_them():
    ask = retry_on_429(initial_backoff=1, backoff_multiplier=1, jitter=False, max_retries=5)(fail_while_there_are)
    await call_concurrently(ask)
    assert get_all_resilience_stats()["retries"][name_of(ask)] == {
        "retries": sum(ATTEMPTS) - len(ATTEMPTS),
        "calls_recovered": 2,
        "calls_given_up": 0,
        "seconds_waited": 5.0,
    }


# Resets


def test_reset_all_puts_all_counters_to_zero():
    use_everything()
    rate_limited("small", tokens_per_minute=1, tokens=1)(lambda: "four")()
    reset_all()
    counters = [
        shown[counter]
        for section, counters in stats._SECTIONS.items()
        for shown in get_all_resilience_stats()[section].values()
        for counter in counters
        if counter in shown
    ]
    assert counters
    assert not any(counters)


def test_reset_all_forgets_what_was_sent():
    ask = rate_limited("chat", tokens_per_minute=10, tokens=10, min_interval=0, max_wait=0)(lambda: "four")
    ask()
    with pytest.raises(RateLimitTimeoutError):
        ask()
    reset_all()
    assert ask() == "four"


def test_reset_all_closes_circuits():
    open_circuit("chat", "search")
    reset_all()
    assert (state_of("chat"), state_of("search")) == ("CLOSED", "CLOSED")


def test_reset_all_keeps_what_was_declared():
    rate_limited("chat", requests_per_minute=10)(lambda: "four")()
    reset_all()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_per_minute"] == 10


def test_a_call_that_is_under_way_at_reset_all_keeps_its_slot():
    held = []

    @rate_limited("chat")
    def ask():
        reset_all()
        held.append(get_all_resilience_stats()["rate_limiters"]["chat"]["in_flight"])

    ask()
    assert held == [1]


def test_reset_circuit_breakers_closes_the_one_that_is_named():
    open_circuit("chat", "search")
    reset_circuit_breakers("chat")
    assert (state_of("chat"), state_of("search")) == ("CLOSED", "OPEN")


def test_reset_circuit_breakers_without_a_name_closes_all():
    open_circuit("chat", "search")
    reset_circuit_breakers()
    assert (state_of("chat"), state_of("search")) == ("CLOSED", "CLOSED")


def test_reset_circuit_breakers_keeps_the_counters():
    open_circuit("chat")
    reset_circuit_breakers("chat")
    shown = get_all_resilience_stats()["circuit_breakers"]["chat"]
    assert (shown["times_opened"], shown["times_closed"], shown["failure_count"]) == (1, 1, 0)


def test_reset_circuit_breakers_refuses_a_name_that_does_not_exist():
    open_circuit("chat")
    with pytest.raises(ConfigurationError, match=r"there is no circuit 'caht'\. Known names: chat"):
        reset_circuit_breakers("caht")
