"""plan(): what it foresees, that it keeps to itself, and that the simulator agrees."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.planning import WORKLOADS, compare
from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    get_all_resilience_stats,
    plan,
    planning,
    rate_limited,
)
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import disabled, no_waiting

SMALL = {
    "requests_per_minute": 120,
    "tokens_per_minute": 10**6,
    "agents": 16,
    "prompt_tokens": 600,
    "output_tokens": 400,
    "latency": (2, 4),
    "minutes": 5,
}

# Each with the calls a minute that its limit lets through.
BOUND = {
    "requests_per_minute": ({}, 120),
    "tokens_per_minute": ({"tokens_per_minute": 50_000}, 50),
    "max_concurrent": ({"max_concurrent": 3}, 60),
    "min_interval": ({"min_interval": 1.5}, 40),
    "agents": ({"agents": 4}, 80),
}
each_limit = pytest.mark.parametrize(("limit", "given", "calls"), [(limit, *bound) for limit, bound in BOUND.items()])


def small(**changes):
    return plan(**{**SMALL, **changes})


# What it foresees


@each_limit
def test_the_limit_that_lets_the_fewest_calls_through_is_named(limit, given, calls):
    assert small(**given).binding_limit == limit


@each_limit
def test_throughput_is_what_the_binding_limit_lets_through(limit, given, calls):
    assert small(**given).requests_per_minute == pytest.approx(calls, rel=0.05)


@each_limit
def test_twice_as_much_of_the_binding_limit_lets_more_calls_through(limit, given, calls):
    values = {**SMALL, **given}
    values[limit] = values[limit] / 2 if limit == "min_interval" else values[limit] * 2

    assert plan(**values).requests_per_minute > 1.2 * calls


def test_twice_as_much_of_a_limit_that_does_not_bind_changes_nothing():
    assert small(tokens_per_minute=2 * 10**6).requests_per_minute == small().requests_per_minute


def test_the_share_of_the_quota_is_what_the_calls_are_charged_for():
    # 120 calls of 600 tokens and 4,400 for the answer
    assert small(max_tokens=4_400).tokens_used == pytest.approx(0.6, rel=0.05)


def test_tokens_are_those_of_prompts_and_answers_whatever_max_tokens_says():
    planned = small(max_tokens=4_400)

    assert planned.tokens_per_minute == pytest.approx(1_000 * planned.requests_per_minute)


def test_tokens_are_drawn_evenly_from_a_range():
    planned = small(prompt_tokens=(100, 1_100), output_tokens=(0, 800))

    assert planned.tokens_per_minute / planned.requests_per_minute == pytest.approx(1_000, rel=0.05)


def test_agents_wait_for_the_rest_of_the_time_that_a_turn_of_all_takes():
    # 16 agents at 120 a minute have a turn every 8 seconds, 3 of which the answer takes
    assert small().wait_p50 == pytest.approx(5, rel=0.2)


def test_waits_are_those_of_a_queue_that_has_grown_to_its_length():
    # a turn of all takes 100 seconds: before that, the waits of those who come to it are shorter
    assert small(agents=200, minutes=1).wait_p50 == pytest.approx(97, rel=0.03)


def test_nobody_waits_where_the_agents_are_the_limit():
    assert small(agents=4).wait_p99 == 0


def test_percentiles_of_waits_grow():
    planned = small(prompt_tokens=(100, 1_100), tokens_per_minute=50_000)

    assert planned.wait_p50 < planned.wait_p95 < planned.wait_p99


def test_a_whole_call_is_the_wait_and_the_latency():
    planned = small(latency=3)

    assert planned.latency_p50 == pytest.approx(planned.wait_p50 + 3, abs=0.5)


def test_agents_that_ask_less_than_they_could_get_what_they_ask_for():
    assert small(calls_per_minute=5).requests_per_minute == pytest.approx(80, rel=0.1)


def test_agents_that_ask_for_more_than_the_quota_get_the_quota():
    assert small(calls_per_minute=15).requests_per_minute == pytest.approx(120, rel=0.05)


def test_a_server_that_evaluates_requests_over_a_second_refuses_more():
    assert small(request_window=1).refusals > small().refusals


def test_the_same_seed_gives_the_same_plan():
    assert small(seed=1) == small(seed=1)


def test_another_seed_draws_other_times():
    assert small(seed=1).latency_p95 != small(seed=2).latency_p95


# Settings


@each_limit
@pytest.mark.parametrize("token_window", ["fixed", "sliding"])
def test_the_recommended_slots_let_as_many_calls_through_as_a_slot_for_each_agent(limit, given, calls, token_window):
    given = {name: value for name, value in given.items() if name not in ("max_concurrent", "min_interval")}

    recommended = small(**given, token_window=token_window)
    unheld = small(**given, token_window=token_window, max_concurrent=SMALL["agents"])

    assert recommended.requests_per_minute >= 0.95 * unheld.requests_per_minute


def test_there_are_fewer_recommended_slots_than_agents_where_the_quota_is_the_limit():
    assert small().settings["MAX_CONCURRENT_REQUESTS"] == 9


def test_there_is_a_slot_for_each_agent_where_the_quota_is_not_the_limit():
    assert small(calls_per_minute=5).settings["MAX_CONCURRENT_REQUESTS"] == SMALL["agents"]


@pytest.mark.parametrize("given", [{"max_concurrent": 3}, {"min_interval": 1.5}])
def test_what_is_given_and_holds_back_is_planned_as_recommended_too(given):
    assert small(**given).recommended == small()


def test_nothing_else_is_recommended_where_nothing_was_given():
    assert small().recommended is None


def test_what_is_given_and_does_not_hold_back_stays():
    settings = small(max_concurrent=12, min_interval=0.1).settings

    assert (settings["MAX_CONCURRENT_REQUESTS"], settings["MIN_REQUEST_INTERVAL_MS"]) == (12, 100)


def test_the_settings_are_read_back_from_the_last_lines_of_the_text():
    planned = small(max_concurrent=3)
    Path(".env").write_text(str(planned).rpartition("\n\n")[2], encoding="utf-8")
    settings = ResilienceSettings()

    assert {name: getattr(settings, name.lower()) for name in planned.settings} == planned.settings


def test_the_text_shows_what_is_and_what_is_recommended():
    text = str(small(max_concurrent=3))

    assert [line.split(":")[0] for line in text.splitlines() if line.startswith(("As", "limited"))] == [
        "As it is",
        "limited by    max_concurrent",
        "As recommended",
        "limited by    requests_per_minute",
    ]


# Large workloads


@pytest.fixture
def simulated(monkeypatch):
    """How many calls were simulated."""
    calls = []

    def simulate(*arguments, **options):
        outcome = before(*arguments, **options)
        calls.append(outcome.calls)
        return outcome

    before = planning.simulate
    monkeypatch.setattr(planning, "simulate", simulate)
    return calls


LARGE = {"requests_per_minute": 1_200, "agents": 160, "tokens_per_minute": 10**7}


def test_of_a_large_workload_a_part_is_simulated(simulated, monkeypatch):
    monkeypatch.setattr(planning, "_MOST_CALLS", 2_000)
    small(**LARGE)

    assert simulated[0] <= 2_000


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"request_window": 1},
        {"tokens_per_minute": 800_000},
        {"max_concurrent": 45},
        {"min_interval": 0.08},
        {"agents": 50},
    ],
)
def test_the_part_of_a_large_workload_tells_of_the_whole(monkeypatch, given):
    whole = small(**LARGE | given)
    monkeypatch.setattr(planning, "_MOST_CALLS", 2_000)

    assert small(**LARGE | given).requests_per_minute == pytest.approx(whole.requests_per_minute, rel=0.03)


def test_the_waits_of_a_part_are_those_of_the_whole(monkeypatch):
    whole = small(**LARGE)
    monkeypatch.setattr(planning, "_MOST_CALLS", 2_000)

    assert small(**LARGE).wait_p50 == pytest.approx(whole.wait_p50, rel=0.1)


def test_the_refusals_of_a_part_are_told_as_of_the_whole(monkeypatch):
    whole = small(**LARGE, request_window=1)
    monkeypatch.setattr(planning, "_MOST_CALLS", 2_000)

    assert small(**LARGE, request_window=1).refusals == pytest.approx(whole.refusals, rel=0.5)


def test_a_workload_without_parts_that_is_too_large_is_refused():
    with pytest.raises(ConfigurationError, match=r"would have to simulate .* calls, 1 at once"):
        small(agents=1, latency=0.0001, requests_per_minute=10**9, tokens_per_minute=10**12)


def test_agents_that_would_wait_for_hours_are_refused():
    with pytest.raises(ConfigurationError, match="an answer every 83 minutes"):
        small(agents=10_000)


# Arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requests_per_minute", 0),
        ("requests_per_minute", 1.5),
        ("tokens_per_minute", "many"),
        ("agents", True),
        ("agents", 10_001),
        ("prompt_tokens", -1),
        ("output_tokens", (3, 1)),
        ("latency", (1, 2, 3)),
        ("latency", float("nan")),
        ("latency", "1-3"),
        ("max_concurrent", 0),
        ("min_interval", -1),
        ("max_tokens", 399),
        ("calls_per_minute", 0),
        ("minutes", 61),
        ("token_window", "rolling"),
        ("request_window", 60),
        ("seed", 0.5),
    ],
)
def test_an_argument_that_cannot_work_is_named(name, value):
    with pytest.raises(ConfigurationError, match=rf"^plan\({name}="):
        small(**{name: value})


def test_a_call_that_is_larger_than_the_quota_is_refused():
    with pytest.raises(ConfigurationError, match=r"may be charged for 1001 tokens.* would never fit"):
        small(tokens_per_minute=1_000, output_tokens=401)


# The process around it


def test_a_plan_leaves_no_trace_in_the_statistics():
    before = get_all_resilience_stats()
    small()

    assert get_all_resilience_stats() == before


def test_no_listener_hears_of_a_plan(heard):
    small(request_window=1)

    assert heard == []


def test_no_name_is_left_of_a_plan():
    small()

    assert not rate_limits._declared


def test_a_limit_that_is_in_use_keeps_its_quota():
    @rate_limited("chat", requests_per_minute=1)
    def ask():
        return "four"

    ask()
    small()

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_in_window"] == 1


def test_the_settings_of_the_process_do_not_matter(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "not a number")

    assert small().requests_per_minute > 0


async def test_a_plan_is_made_in_a_running_event_loop():
    assert small() == await asyncio.to_thread(small)


def test_plans_in_several_threads_do_not_disturb_each_other():
    alone = small()
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda _: small(), range(3)))

    assert together == [alone] * 3


@pytest.mark.parametrize("switch", [disabled, no_waiting])
def test_where_the_limiter_is_switched_off_there_is_no_plan(switch):
    with switch(), pytest.raises(ConfigurationError, match="call it outside"):
        small()


def test_a_plan_is_not_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().refusals = 0


# The simulator


async def test_the_simulator_agrees_within_five_per_cent():
    calls = await compare("token-bound", WORKLOADS["token-bound"], period=2.0, minutes=2)

    assert calls.planned == pytest.approx(calls.measured, rel=0.05)
