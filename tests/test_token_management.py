"""What a call would meet at its limit, and what the usage of many says about the settings."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    agent,
    configure,
    events,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    stats,
    token_budget,
)
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import isolated
from resilience_kit.token_management import token_manager

UNPACED = {"min_interval": 0, "max_concurrent": 100}
check = token_manager.check_rate_limit_risk
insights = token_manager.get_usage_insights


async def send(tokens, name="chat", **limit):
    """Make one call through a limit."""
    await rate_limited(name, tokens=tokens, **limit)(asyncio.sleep)(0)


def use(agent="MathAgent", *, prompt=0, completion=0, reserved=0, times=1):
    """Let an agent's calls end."""
    for _ in range(times):
        events.emit(
            events.BudgetSettled(
                name=agent, reserved=reserved, prompt_tokens=prompt, completion_tokens=completion, usd=0.0
            )
        )


def cut(agent="MathAgent", *, tokens=5, times=1):
    """Let an agent's prompts lose tokens."""
    for _ in range(times):
        events.emit(events.Truncated(name=agent, tokens_before=100 + tokens, tokens_after=100, removed_messages=1))


def admit(name="chat", *, waited=0.0, tokens=0, times=1):
    """Let calls through a limit."""
    for _ in range(times):
        events.emit(events.Admitted(name=name, waited=waited, tokens=tokens))


# The risk before a call: its figures


def test_the_share_is_that_of_the_tokens_where_these_are_the_tighter_quota():
    assert check(75_000).share == 0.5


def test_the_share_is_that_of_the_requests_where_these_are_the_tighter_quota():
    assert check(0).share == 1 / 60


@pytest.mark.looptime
async def test_the_share_counts_what_was_sent_before():
    await send(600, tokens_per_minute=1_000)
    assert check(300, name="chat").share == 0.9


@pytest.mark.looptime
async def test_the_share_of_requests_counts_what_was_sent_before():
    await send(0, requests_per_minute=4)
    assert check(0, name="chat").share == 0.5


def test_a_fraction_of_a_token_is_a_token():
    rate_limited("chat", tokens_per_minute=2)(lambda: None)
    assert check(1.2, name="chat").share == 1


@pytest.mark.looptime
async def test_a_call_that_fits_does_not_wait():
    await send(600, tokens_per_minute=1_000, **UNPACED)
    assert check(400, name="chat").projected_wait == 0


@pytest.mark.looptime
async def test_a_call_that_does_not_fit_waits_until_what_was_sent_has_left_the_window():
    await send(600, tokens_per_minute=1_000, **UNPACED)
    await asyncio.sleep(20)
    assert check(401, name="chat").projected_wait == pytest.approx(40)


@pytest.mark.looptime
async def test_the_projected_wait_is_what_a_call_then_waits():
    await send(600, tokens_per_minute=1_000, **UNPACED)
    projected = check(401, name="chat").projected_wait
    await send(401)
    assert asyncio.get_running_loop().time() == pytest.approx(projected)


@pytest.mark.looptime
async def test_the_projected_wait_counts_those_that_wait_now():
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(send(1_000, tokens_per_minute=1_000, **UNPACED))
        await asyncio.sleep(0)
        assert check(1, name="chat").projected_wait == pytest.approx(3 * 60)


@pytest.mark.looptime
async def test_the_projected_wait_counts_nobody_who_has_given_up():
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(send(1_000, tokens_per_minute=1_000, **UNPACED)) for _ in range(3)]
        await asyncio.sleep(0)
        calls[-1].cancel()
        await asyncio.wait(calls[-1:])
        assert check(1, name="chat").projected_wait == pytest.approx(2 * 60)


@pytest.mark.looptime
async def test_the_projected_wait_counts_nobody_of_a_later_priority():
    await send(1_000, tokens_per_minute=1_000, **UNPACED)
    async with asyncio.TaskGroup() as group:
        group.create_task(send(1_000, priority=1))
        await asyncio.sleep(0)
        assert check(1, name="chat").projected_wait == pytest.approx(60)


def test_a_call_above_the_quota_waits_for_ever():
    assert check(150_001).projected_wait == math.inf


@pytest.mark.looptime
async def test_a_check_takes_nothing_from_the_quota():
    await send(600, tokens_per_minute=1_000)
    for _ in range(100):
        check(400, name="chat")
    assert rate_limits.items()["chat"].statistics().tokens_in_window == 600


# The risk before a limit is used


def test_a_limit_that_was_not_used_yet_is_judged_by_its_declaration():
    rate_limited("chat", tokens_per_minute=1_000)(lambda: None)
    assert check(500, name="chat").share == 0.5


def test_a_limit_that_nobody_declared_is_judged_by_the_settings():
    configure(ResilienceSettings(tokens_per_minute=1_000))
    assert check(500, name="chat").share == 0.5


def test_a_check_does_not_put_a_limit_in_use():
    check(500, name="chat")
    rate_limited("chat", tokens_per_minute=1_000)(lambda: None)()
    assert check(500, name="chat").share == 0.5


# The risk's level


@pytest.mark.parametrize(
    ("tokens", "level"),
    [
        (500, "low"),
        (501, "medium"),
        (800, "medium"),
        (801, "high"),
        (1_000, "high"),
        (1_001, "critical"),
    ],
)
def test_the_level_follows_the_share(tokens, level):
    rate_limited("chat", tokens_per_minute=1_000)(lambda: None)
    assert check(tokens, name="chat").level == level


@pytest.mark.parametrize(
    ("seconds", "level"), [(3, "low"), (4, "medium"), (10, "medium"), (11, "high"), (30, "high"), (31, "critical")]
)
@pytest.mark.looptime
async def test_the_level_follows_the_wait(seconds, level):
    await send(0, min_interval=seconds)
    assert check(0, name="chat").level == level


@pytest.mark.looptime
async def test_the_level_measures_the_wait_by_the_window():
    await send(0, min_interval=4, period=6)
    assert check(0, name="chat").level == "critical"


# The risk's advice


def test_a_low_risk_needs_no_change():
    assert check(100).advice == "send it"


def test_advice_for_what_never_fits_names_the_setting():
    assert check(150_001).advice == (
        "it never fits: lower max_tokens or shorten the prompt, or raise TOKENS_PER_MINUTE=150000"
    )


def test_advice_names_the_parameter_where_the_code_gave_the_value():
    rate_limited("chat", tokens_per_minute=1_000)(lambda: None)
    assert check(1_001, name="chat").advice.endswith("raise tokens_per_minute=1000")


def test_advice_for_what_fits_barely_says_so():
    assert check(100_000).advice == (
        "it fits now and leaves little: lower max_tokens or shorten the prompt, or raise TOKENS_PER_MINUTE=150000"
    )


@pytest.mark.looptime
async def test_advice_for_what_waits_tells_for_how_long():
    await send(600, tokens_per_minute=1_000, **UNPACED)
    assert check(500, name="chat").advice.startswith("it starts in 60.0 s: lower max_tokens")


@pytest.mark.looptime
async def test_advice_where_requests_are_the_tighter_quota_is_to_send_fewer():
    await send(0, requests_per_minute=1)
    assert check(0, name="chat").advice.endswith("send fewer calls, or raise requests_per_minute=1")


@pytest.mark.looptime
async def test_advice_where_the_window_has_room_and_the_call_waits_all_the_same_tells_why():
    for _ in range(10):
        await send(0, requests_per_minute=60, **UNPACED)
    assert check(0, name="chat").advice == (
        "it starts in 10.0 s, since calls wait before it, came in a burst, or the server asked for a pause: send it "
        "later, or raise requests_per_minute=60, of which a sixth may go in a sixth of the window"
    )


def test_a_risk_reads_as_a_sentence():
    assert str(check(4_000, "nightly-report")) == (
        "low risk for 'nightly-report' at the rate limit 'default': 4000 tokens fill it to 3%; send it"
    )


def test_a_risk_cannot_be_changed():
    with pytest.raises(AttributeError):
        check(1).level = "high"


# What cannot be checked


@pytest.mark.parametrize("tokens", [-1, math.nan, math.inf, "4000", None, True], ids=repr)
def test_what_is_no_number_of_tokens_is_refused(tokens):
    with pytest.raises(ConfigurationError, match=r"estimated_tokens=.*expected a number, 0 or more"):
        check(tokens)


@pytest.mark.parametrize("argument", ["context", "name"])
def test_what_is_no_text_is_refused(argument):
    with pytest.raises(ConfigurationError, match=rf"{argument}=5.*expected text"):
        check(1, **{argument: 5})


def test_what_is_refused_is_not_counted():
    with pytest.raises(ConfigurationError):
        check(-1, "nightly-report")
    assert insights()["by_context"] == {}


# Insights: the figures


def test_before_any_call_all_is_zero_or_empty():
    assert insights() == {
        "calls": 0,
        "tokens": 0,
        "truncation_rate": 0.0,
        "peak_usage": 0,
        "mean_usage": 0.0,
        "estimate_accuracy": 0.0,
        "peak_usage_per_minute": 0,
        "by_agent": {},
        "by_context": {},
        "recommendations": [],
    }


def test_insights_are_plain_json():
    use(prompt=8, completion=2, reserved=100, times=10)
    cut(times=10)
    admit(waited=2.0, times=10)
    check(1, "nightly-report")
    assert json.loads(json.dumps(insights(), allow_nan=False)) == insights()


def test_calls_are_counted_through_the_decorator():
    @token_budget("MathAgent", max_tokens=4, on_exceed="truncate")
    def ask(prompt):
        return {"usage": {"prompt_tokens": 4, "completion_tokens": 2}}

    ask("one two three four five six")
    found = insights()
    assert (found["calls"], found["tokens"], found["truncation_rate"]) == (1, 6, 100.0)


def test_the_truncation_rate_is_in_per_cent_of_the_calls():
    use(times=8)
    cut(times=1)
    assert insights()["truncation_rate"] == 12.5


def test_the_truncation_rate_is_never_above_all_of_them():
    cut(times=3)
    assert insights()["truncation_rate"] == 100.0


def test_the_peak_is_the_largest_call():
    for completion in (1, 5, 2):
        use(prompt=10, completion=completion)
    assert insights()["peak_usage"] == 15


def test_the_mean_is_over_the_calls_whose_tokens_are_known():
    use(prompt=10)
    use(prompt=20)
    use()
    assert insights()["mean_usage"] == 15.0


def test_the_accuracy_is_what_was_used_in_per_cent_of_what_was_reserved():
    use(prompt=20, completion=30, reserved=200)
    assert insights()["estimate_accuracy"] == 25.0


def test_the_accuracy_leaves_out_calls_for_which_nothing_was_reserved():
    use(prompt=50, reserved=200)
    use(prompt=1_000)
    assert insights()["estimate_accuracy"] == 25.0


@pytest.mark.looptime
async def test_the_peak_of_a_minute_adds_the_calls_that_ended_in_it():
    use(prompt=10)
    await asyncio.sleep(59)
    use(prompt=5)
    assert insights()["peak_usage_per_minute"] == 15


@pytest.mark.looptime
async def test_the_peak_of_a_minute_leaves_out_what_was_before_it():
    use(prompt=10)
    await asyncio.sleep(60)
    use(prompt=5)
    assert insights()["peak_usage_per_minute"] == 10


@pytest.mark.looptime
async def test_of_the_seconds_only_those_of_the_last_minute_are_kept():
    for _ in range(200):
        use(prompt=1)
        await asyncio.sleep(1)
    assert len(stats._counts.minute.seconds) == 60


# Insights: by agent


def test_each_agent_has_figures_of_its_own():
    use("MathAgent", prompt=10, times=2)
    use("ADXAgent", prompt=30)
    found = insights()["by_agent"]
    assert {name: (it["calls"], it["tokens"], it["peak_usage"]) for name, it in found.items()} == {
        "MathAgent": (2, 20, 10),
        "ADXAgent": (1, 30, 30),
    }


def test_an_agent_shows_its_maximum_and_that_it_is_the_default():
    use("MathAgent")
    shown = insights()["by_agent"]["MathAgent"]
    assert (shown["max_tokens"], shown["max_tokens_source"]) == (4_000, "default")


def test_an_agent_shows_that_its_maximum_is_from_the_environment(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "500")
    use("WriterAgent")
    shown = insights()["by_agent"]["WriterAgent"]
    assert (shown["max_tokens"], shown["max_tokens_source"]) == (500, "environment")


def test_the_sum_is_that_of_all_agents():
    use("MathAgent", prompt=10)
    use("ADXAgent", prompt=30)
    assert (insights()["calls"], insights()["tokens"]) == (2, 40)


def test_agents_beyond_a_thousand_are_counted_as_other():
    for number in range(1_002):
        use(f"Agent{number}")
    found = insights()["by_agent"]
    assert (len(found), found["other"]["calls"]) == (1_001, 2)


def test_an_agent_that_was_there_before_the_thousand_keeps_its_own_count():
    for number in range(1_002):
        use(f"Agent{number}")
    use("Agent0")
    assert insights()["by_agent"]["Agent0"]["calls"] == 2


# Insights: by context


def calls_by_context():
    return {name: account["calls"] for name, account in insights()["by_context"].items()}


def test_a_call_belongs_to_the_context_of_its_block():
    with agent("MathAgent", context="nightly-report"):
        use("MathAgent")
    assert calls_by_context() == {"nightly-report": 1}


def test_a_call_outside_of_any_context_belongs_to_default():
    use()
    with agent("MathAgent"):
        use()
    assert calls_by_context() == {"default": 2}


def test_an_inner_block_keeps_the_context_of_the_outer_one():
    with agent("CoordinatorAgent", context="nightly-report"), agent("MathAgent"):
        use()
    assert calls_by_context() == {"nightly-report": 1}


def test_an_inner_block_may_have_a_context_of_its_own():
    with agent("CoordinatorAgent", context="nightly-report"), agent("MathAgent", context="check"):
        use()
    assert calls_by_context() == {"check": 1}


@pytest.mark.looptime
async def test_a_decorated_call_belongs_to_the_context_of_its_own_task():
    @token_budget("MathAgent")
    async def ask(prompt):
        await asyncio.sleep(1)

    async def work(context):
        with agent("CoordinatorAgent", context=context):
            await ask("2 + 2?")

    await asyncio.gather(work("chat"), work("nightly-report"))
    assert calls_by_context() == {"chat": 1, "nightly-report": 1}


@pytest.mark.parametrize("context", ["", 5], ids=repr)
def test_a_context_is_a_text(context):
    with pytest.raises(ConfigurationError, match="context"), agent("MathAgent", context=context):
        pass


def test_a_cut_prompt_is_counted_in_its_context():
    with agent("MathAgent", context="nightly-report"):
        cut()
    assert insights()["by_context"]["nightly-report"]["truncation_rate"] == 100.0


def test_checks_are_counted_in_the_context_that_they_name():
    check(100, "nightly-report")
    check(300, "nightly-report")
    shown = insights()["by_context"]["nightly-report"]
    assert (shown["risk_checks"], shown["mean_estimate"]) == (2, 200.0)


def test_a_check_is_not_a_call():
    check(100, "nightly-report")
    assert (insights()["calls"], calls_by_context()) == (0, {"nightly-report": 0})


def test_contexts_beyond_a_thousand_are_counted_as_other():
    for number in range(1_002):
        check(1, f"context {number}")
    found = insights()["by_context"]
    assert (len(found), found["other"]["risk_checks"]) == (1_001, 2)


# Insights: the recommendations


def test_many_cut_prompts_are_a_reason_to_raise_the_agents_variable():
    use(times=50)
    cut(tokens=20, times=7)
    (sentence,) = insights()["recommendations"]
    assert sentence == (
        "MathAgent: 14 % of its prompts were cut, by 20 tokens on average: raise MATH_AGENT_MAX_TOKENS=4000, or the "
        "max_tokens of its @token_budget if that has one"
    )


def test_cut_prompts_of_an_agent_without_a_variable_are_a_reason_to_raise_its_argument():
    cut("Writer", times=10)
    assert insights()["recommendations"] == [
        "Writer: 100 % of its prompts were cut, by 5 tokens on average: raise the max_tokens of its @token_budget"
    ]


def test_few_cut_prompts_are_no_reason():
    use(times=100)
    cut(times=4)
    assert insights()["recommendations"] == []


def test_cut_prompts_of_few_calls_are_no_reason():
    use(times=9)
    cut(times=9)
    assert insights()["recommendations"] == []


def test_reserved_tokens_that_are_not_used_are_a_reason_to_ask_for_shorter_answers():
    use(prompt=20, completion=20, reserved=100, times=10)
    (sentence,) = insights()["recommendations"]
    assert sentence == (
        "MathAgent: 60 % of the tokens that were reserved for its calls were never used: lower the max_tokens of its "
        "requests"
    )


def test_reserved_tokens_half_of_which_are_used_are_no_reason():
    use(prompt=50, reserved=100, times=10)
    assert insights()["recommendations"] == []


def test_calls_for_which_nothing_was_reserved_are_no_reason():
    use(prompt=50, times=10)
    assert insights()["recommendations"] == []


def test_long_waits_are_a_reason_to_raise_the_tighter_quota():
    admit(waited=12.0, tokens=10_000, times=10)
    (sentence,) = insights()["recommendations"]
    assert sentence == (
        "chat: calls wait 12 s on average for TOKENS_PER_MINUTE=150000 or a free slot: raise it if the server allows "
        "more, raise MAX_CONCURRENT_REQUESTS=3 if calls take long, or send less"
    )


def test_long_waits_of_small_calls_are_a_reason_to_raise_the_requests():
    admit(waited=12.0, tokens=10, times=10)
    (sentence,) = insights()["recommendations"]
    assert "for REQUESTS_PER_MINUTE=60" in sentence


def test_a_recommendation_names_the_parameter_where_the_code_gave_the_value():
    rate_limited("chat", tokens_per_minute=1_000)(lambda: None)
    admit(waited=12.0, tokens=1_000, times=10)
    (sentence,) = insights()["recommendations"]
    assert "for tokens_per_minute=1000" in sentence


def test_short_waits_are_no_reason():
    admit(waited=0.9, times=10)
    assert insights()["recommendations"] == []


def test_long_waits_of_few_calls_are_no_reason():
    admit(waited=12.0, times=9)
    assert insights()["recommendations"] == []


# Counting, and starting anew


def test_reset_all_resets_the_insights():
    before = insights()
    use(prompt=10)
    check(1)
    reset_all()
    assert insights() == before


@pytest.mark.looptime
async def test_reset_all_forgets_the_last_minute():
    use(prompt=10)
    reset_all()
    use(prompt=5)
    assert insights()["peak_usage_per_minute"] == 5


def test_an_isolated_test_starts_with_none():
    use(prompt=10)
    with isolated():
        assert insights()["calls"] == 0


def test_after_an_isolated_test_the_insights_of_before_are_back():
    use(prompt=10)
    with isolated():
        use(prompt=20)
    assert insights()["peak_usage"] == 10


def test_what_is_counted_for_the_insights_is_not_in_the_statistics():
    use(prompt=10)
    assert get_all_resilience_stats()["agents"]["MathAgent"].keys() == stats._SECTIONS["agents"].keys()


def test_threads_count_together_and_keep_to_their_own_contexts():
    def work(number):
        with agent("MathAgent", context=f"thread {number}"):
            use(prompt=1, times=200)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    found = insights()
    assert (found["calls"], {it["calls"] for it in found["by_context"].values()}) == (1_600, {200})
