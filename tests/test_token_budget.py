import asyncio
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from types import SimpleNamespace

import genai_prices
import pytest
from hypothesis import given, strategies as st

from resilience_kit import (
    ConfigurationError,
    TokenBudgetExceededError,
    count_tokens,
    explain,
    get_all_resilience_stats,
    pricing,
    reset_all,
    token_budget,
)
from resilience_kit.call_tokens import Usage
from resilience_kit.events import BudgetRefused, BudgetSettled, BudgetWaiting, Truncated
from resilience_kit.pricing import Price, cost_usd
from resilience_kit.testing import isolated, no_waiting

LONG = "one two three four five six seven eight nine ten"
PRICE = float(genai_prices.calc_price(genai_prices.Usage(input_tokens=1_000, output_tokens=500), "gpt-4o").total_price)


PRICE_OF_MINI = float(
    genai_prices.calc_price(genai_prices.Usage(input_tokens=1_000, output_tokens=500), "gpt-4o-mini").total_price
)


@pytest.fixture
def without_genai_prices(monkeypatch):
    """A process without the extra `cost`."""
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setattr(pricing, "_published", {})
    pricing._library.cache_clear()
    yield
    pricing._library.cache_clear()


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def usage(prompt, completion):
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def budget_of(agent):
    return get_all_resilience_stats()["token_budgets"][agent]


def spend(tokens, *, agent="MathAgent", **budget):
    """Call a function of an agent that asks for as many tokens as it then uses."""

    @token_budget(agent, **budget)
    def ask(prompt, max_tokens):
        return usage(0, max_tokens)

    return ask("", tokens)


def of_type(heard, kind):
    return [event for event in heard if isinstance(event, kind)]


# The longest prompt


def test_a_prompt_within_max_tokens_is_sent_as_it_is():
    @token_budget(max_tokens=count_tokens(LONG))
    def ask(prompt):
        return prompt

    assert ask(LONG) == LONG


def test_a_prompt_above_max_tokens_is_not_sent():
    sent = []
    ask = token_budget(max_tokens=3)(lambda prompt: sent.append(prompt) or "four")
    with suppress(TokenBudgetExceededError):
        ask(LONG)
    assert sent == []


def test_a_prompt_above_max_tokens_is_refused_with_figures():
    ask = token_budget("WriterAgent", max_tokens=3)(lambda prompt: prompt)
    with pytest.raises(TokenBudgetExceededError) as caught:
        ask(LONG)
    error = caught.value
    assert vars(error) == {
        "agent": "WriterAgent",
        "limit": 3,
        "requested": count_tokens(LONG),
        "remaining": 3,
        "unit": "tokens",
        "retry_after": None,
    }


def test_a_prompt_above_max_tokens_is_refused_with_what_to_do():
    ask = token_budget("WriterAgent", max_tokens=3)(lambda prompt: prompt)
    with pytest.raises(
        TokenBudgetExceededError,
        match=r"token budget of 'WriterAgent': the prompt has 10 tokens, and max_tokens=3: "
        r'shorten it, raise max_tokens, or say on_exceed="truncate"$',
    ):
        ask(LONG)


def test_a_refused_prompt_is_told_to_listeners(heard):
    ask = token_budget("WriterAgent", max_tokens=3)(lambda prompt: prompt)
    with suppress(TokenBudgetExceededError):
        ask(LONG)
    assert heard == [BudgetRefused(name="WriterAgent", requested=10, remaining=3, unit="tokens")]


def test_max_tokens_left_out_is_the_agents_own_variable(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "3")
    ask = token_budget("WriterAgent")(lambda prompt: prompt)
    with pytest.raises(TokenBudgetExceededError, match="max_tokens=3"):
        ask(LONG)


def test_max_tokens_wins_over_the_agents_own_variable(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "3")
    ask = token_budget("WriterAgent", max_tokens=10)(lambda prompt: prompt)
    assert ask(LONG) == LONG


def test_an_agent_without_a_variable_may_send_any_prompt():
    ask = token_budget("WriterAgent")(lambda prompt: prompt)
    assert ask(LONG * 1_000) == LONG * 1_000


@pytest.mark.parametrize("parameter", ["messages", "input", "prompt"])
def test_the_prompt_is_found_under_its_usual_names(parameter):
    ask = token_budget(max_tokens=3)(lambda **request: request)
    with pytest.raises(TokenBudgetExceededError):
        ask(**{parameter: LONG})


def test_the_prompt_is_found_under_the_name_that_argument_says():
    ask = token_budget(max_tokens=3, argument="question")(lambda number, question: question)
    with pytest.raises(TokenBudgetExceededError):
        ask(1, LONG)


def test_the_prompt_of_a_method_is_found():
    class Agent:
        @token_budget(max_tokens=3)
        def ask(self, prompt):
            return prompt

    with pytest.raises(TokenBudgetExceededError):
        Agent().ask(LONG)


@pytest.mark.parametrize(
    "embedded", [["one two", "three four"], [[1, 2], [3, 4]], [1, 2, 3, 4]], ids=["texts", "lists of ids", "ids"]
)
def test_the_input_of_an_embedding_is_counted(embedded):
    embed = token_budget(max_tokens=3)(lambda input: input)  # noqa: A006 - OpenAI's name for it
    with pytest.raises(TokenBudgetExceededError, match="the prompt has 4 tokens"):
        embed(embedded)


def test_a_prompt_that_is_neither_text_nor_messages_is_left_alone():
    ask = token_budget(max_tokens=3)(lambda prompt: prompt)
    assert ask(12345) == 12345


# Cutting


def test_truncate_hands_the_function_a_text_that_fits():
    ask = token_budget(max_tokens=3, on_exceed="truncate")(lambda prompt: prompt)
    assert ask(LONG) == "one two three"


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by position", "by keyword"])
def test_truncate_hands_the_function_messages_without_the_oldest(by_keyword):
    messages = [system("Be brief."), user(LONG), user("2 + 2?")]
    kept = [messages[0], messages[2]]
    ask = token_budget(max_tokens=count_tokens(kept), on_exceed="truncate")(lambda messages: messages)
    assert (ask(messages=messages) if by_keyword else ask(messages)) == kept


def test_truncate_leaves_the_callers_list_as_it_was():
    messages = [user(LONG), user(LONG)]
    token_budget(max_tokens=20, on_exceed="truncate")(lambda messages: messages)(messages)
    assert messages == [user(LONG), user(LONG)]


def test_truncate_tells_listeners_what_was_cut(heard):
    messages = [user(LONG), user("2 + 2?")]
    after = count_tokens(messages[1:])
    token_budget("WriterAgent", max_tokens=after, on_exceed="truncate")(lambda messages: messages)(messages)
    assert of_type(heard, Truncated) == [
        Truncated(name="WriterAgent", tokens_before=count_tokens(messages), tokens_after=after, removed_messages=1)
    ]


def test_truncate_reserves_what_is_left_of_the_prompt():
    token_budget("WriterAgent", max_tokens=3, budget_tokens=5, on_exceed="truncate")(lambda prompt: usage(3, 1))(LONG)
    assert budget_of("WriterAgent")["tokens_used"] == 4


@pytest.mark.parametrize(
    "prompt", [[system(LONG * 9), user("2 + 2?")], [LONG, LONG]], ids=["a system message", "texts of an embedding"]
)
def test_truncate_refuses_what_cannot_be_cut_and_does_not_advise_itself(prompt):
    ask = token_budget(max_tokens=12, on_exceed="truncate")(lambda messages: messages)
    with pytest.raises(TokenBudgetExceededError, match=r"cannot be cut that far: shorten it, or raise max_tokens$"):
        ask(prompt)


def test_truncate_raises_where_the_budget_is_spent():
    with pytest.raises(TokenBudgetExceededError, match="budget_tokens=5"):
        spend(6, budget_tokens=5, on_exceed="truncate")


# Reserving and settling


def test_a_call_reserves_its_prompt_and_the_most_that_its_answer_may_have():
    held = []

    @token_budget("MathAgent", budget_tokens=100)
    def ask(prompt, max_completion_tokens):
        held.append(budget_of("MathAgent")["tokens_reserved"])

    ask(LONG, 50)
    assert held == [60]


def test_a_call_without_a_prompt_reserves_its_answer_alone():
    token_budget("MathAgent", budget_tokens=100)(lambda max_tokens: None)(50)
    assert budget_of("MathAgent")["tokens_used"] == 50


@pytest.mark.parametrize(
    "result",
    [
        {"usage": {"prompt_tokens": 12, "completion_tokens": 8}},
        {"usage": {"input_tokens": 12, "output_tokens": 8}},
        SimpleNamespace(usage=SimpleNamespace(prompt_tokens=12, completion_tokens=8, total_tokens=20)),
        SimpleNamespace(usage=SimpleNamespace(input_tokens=12, output_tokens=8, total_tokens=20)),
        SimpleNamespace(usage={"prompt_tokens": 20}),
    ],
    ids=["chat dict", "responses dict", "chat object", "responses object", "embedding"],
)
def test_a_call_is_settled_with_the_usage_of_its_result(result):
    token_budget("MathAgent", budget_tokens=100)(lambda prompt, max_tokens: result)(LONG, 50)
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["tokens_reserved"]) == (20, 0)


def test_a_result_that_is_text_is_counted():
    token_budget("MathAgent", budget_tokens=100)(lambda prompt, max_tokens: "five six")(LONG, 50)
    assert budget_of("MathAgent")["tokens_used"] == 10 + 2


@pytest.mark.parametrize("result", [None, {"usage": None}, {"usage": {"seconds": 3}}, object()])
def test_a_result_that_says_nothing_is_settled_with_what_was_reserved(result):
    token_budget("MathAgent", budget_tokens=100)(lambda prompt, max_tokens: result)(LONG, 50)
    assert budget_of("MathAgent")["tokens_used"] == 60


def test_what_a_call_used_beyond_its_reservation_counts_too():
    token_budget("MathAgent", budget_tokens=100)(lambda prompt: usage(10, 500))(LONG)
    assert budget_of("MathAgent")["tokens_used"] == 510


def chat_chunk(text):
    return SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))], usage=None)


def responses_event(text):
    return SimpleNamespace(type="response.output_text.delta", delta=text)


def chunks(*items):
    return [SimpleNamespace(usage=None), *items]


@pytest.mark.parametrize(
    ("items", "used"),
    [
        (chunks(SimpleNamespace(usage=SimpleNamespace(prompt_tokens=12, completion_tokens=8))), 20),
        (chunks(SimpleNamespace(response=SimpleNamespace(usage={"input_tokens": 12, "output_tokens": 8}))), 20),
        (["five", " six"], 10 + 2),
        (chunks(*map(chat_chunk, ["five", None, " six"])), 10 + 2),
        ([{"choices": [{"delta": {"content": "five six"}}]}, {"choices": []}], 10 + 2),
        (chunks(*map(responses_event, ["five", " six"]), SimpleNamespace(type="response.done", delta="x")), 10 + 2),
        ([chat_chunk("five"), {"usage": {"prompt_tokens": 12, "completion_tokens": 8}}], 20),
        (chunks(), 60),
        (chunks(SimpleNamespace(type="response.output_text.delta", delta=5), SimpleNamespace(choices=5)), 60),
    ],
    ids=[
        "chat",
        "responses",
        "text",
        "text of chat",
        "text of chat as dicts",
        "text of responses",
        "text and usage",
        "nothing said",
        "nothing that is text",
    ],
)
async def test_a_stream_is_settled_when_it_was_read(items, used):
    @token_budget("sync", budget_tokens=100)
    def stream(prompt, max_tokens):
        yield from items

    @token_budget("async", budget_tokens=100)
    async def astream(prompt, max_tokens):
        for item in items:
            yield item

    list(stream(LONG, 50))
    [item async for item in astream(LONG, 50)]
    assert [budget_of(agent)["tokens_used"] for agent in ("sync", "async")] == [used, used]


def test_a_stream_keeps_its_reservation_while_it_is_read():
    @token_budget("MathAgent", budget_tokens=100)
    def stream(prompt, max_tokens):
        yield from ["five", "six"]

    with closing(stream(LONG, 50)) as reading:
        next(reading)
        assert budget_of("MathAgent")["tokens_reserved"] == 60


async def test_a_stream_that_is_closed_early_is_settled_with_what_was_read():
    @token_budget("sync", budget_tokens=100)
    def stream(prompt, max_tokens):
        yield from ["five", " six", " seven"]

    @token_budget("async", budget_tokens=100)
    async def astream(prompt, max_tokens):
        for item in ["five", " six", " seven"]:
            yield item

    with closing(stream(LONG, 50)) as reading:
        next(reading)
    async with aclosing(astream(LONG, 50)) as areading:
        await anext(areading)
    for agent in ("sync", "async"):
        assert (budget_of(agent)["tokens_used"], budget_of(agent)["tokens_reserved"]) == (10 + 1, 0)


def test_a_stream_that_breaks_gives_its_reservation_back():
    @token_budget("MathAgent", budget_tokens=100)
    def stream(prompt, max_tokens):
        yield "five"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        list(stream(LONG, 50))
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["tokens_reserved"]) == (0, 0)


def test_a_failed_call_gives_its_reservation_back():
    @token_budget("MathAgent", budget_tokens=100)
    def ask(prompt, max_tokens):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        ask(LONG, 50)
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["tokens_reserved"]) == (0, 0)


async def test_a_cancelled_call_gives_its_reservation_back():
    sent = asyncio.Event()

    @token_budget("MathAgent", budget_tokens=100)
    async def ask(prompt, max_tokens):
        sent.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(ask(LONG, 50))
    await sent.wait()
    held = budget_of("MathAgent")["tokens_reserved"]
    call.cancel()
    await asyncio.wait([call])
    assert (held, budget_of("MathAgent")["tokens_reserved"]) == (60, 0)


def test_a_settled_call_is_told_to_listeners(heard):
    token_budget("MathAgent", budget_tokens=1_600)(lambda prompt, max_tokens: usage(1_000, 500))(LONG, 50)
    assert heard == [
        BudgetSettled(
            name="MathAgent",
            reserved=60,
            prompt_tokens=1_000,
            completion_tokens=500,
            usd=pytest.approx(PRICE),
            model="gpt-4o",
        )
    ]


def test_without_a_budget_the_usage_of_a_result_is_told_all_the_same(heard):
    token_budget("MathAgent")(lambda prompt: usage(1_000, 500))(LONG)
    assert heard == [
        BudgetSettled(
            name="MathAgent",
            reserved=0,
            prompt_tokens=1_000,
            completion_tokens=500,
            usd=pytest.approx(PRICE),
            model="gpt-4o",
        )
    ]


# What is spent


def test_a_call_that_needs_more_than_is_left_is_refused_with_figures():
    spend(80, budget_tokens=100)
    with pytest.raises(TokenBudgetExceededError) as caught:
        spend(30)
    assert vars(caught.value) == {
        "agent": "MathAgent",
        "limit": 100,
        "requested": 30,
        "remaining": 20,
        "unit": "tokens",
        "retry_after": None,
    }


def test_a_call_that_takes_all_that_is_left_is_sent():
    spend(80, budget_tokens=100)
    spend(20)
    assert budget_of("MathAgent")["tokens_used"] == 100


def test_a_budget_without_a_period_says_how_to_start_it_anew():
    spend(1_234_567, budget_tokens=1_234_567)
    with pytest.raises(
        TokenBudgetExceededError,
        match=r"token budget of 'MathAgent': the call needs 10 tokens, and 0 of budget_tokens=1234567 are left; "
        r"the budget has no period: reset_all\(\) starts it anew$",
    ):
        spend(10)


def test_reset_all_starts_a_budget_anew():
    spend(100, budget_tokens=100)
    reset_all()
    spend(100)
    assert budget_of("MathAgent")["tokens_used"] == 100


def test_a_call_that_was_under_way_at_reset_all_does_not_count():
    @token_budget("MathAgent", budget_tokens=100)
    def ask(prompt, max_tokens):
        reset_all()
        return usage(10, 50)

    ask(LONG, 50)
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["tokens_reserved"]) == (0, 0)


def test_a_call_that_never_fits_is_told_so_whatever_the_period():
    with pytest.raises(
        TokenBudgetExceededError,
        match=r"needs 30 tokens, and budget_tokens=20: it never fits; "
        r"shorten the prompt, lower the most that the answer may have, or raise budget_tokens$",
    ):
        spend(30, budget_tokens=20, per="minute")


def test_waiting_does_not_help_a_call_that_never_fits():
    spend(10, budget_tokens=20, per="minute")
    with pytest.raises(TokenBudgetExceededError) as caught:
        spend(30)
    assert caught.value.retry_after is None


# Periods


@pytest.mark.looptime
@pytest.mark.parametrize(("per", "seconds"), [("minute", 60), ("hour", 3_600), ("day", 86_400), (5, 5), (0.5, 0.5)])
async def test_a_budget_is_whole_again_when_its_period_is_over(per, seconds):
    spend(100, budget_tokens=100, per=per)
    await asyncio.sleep(seconds)
    spend(100)
    assert budget_of("MathAgent")["tokens_used"] == 100


@pytest.mark.looptime
async def test_a_budget_is_not_whole_again_before_its_period_is_over():
    spend(100, budget_tokens=100, per="minute")
    await asyncio.sleep(59)
    with pytest.raises(TokenBudgetExceededError, match="it turns in 1 s") as caught:
        spend(1)
    assert caught.value.retry_after == pytest.approx(1, abs=0.1)


@pytest.mark.looptime
async def test_a_period_starts_with_its_first_call():
    spend(100, budget_tokens=100, per="minute")
    await asyncio.sleep(90)
    spend(10)
    assert budget_of("MathAgent")["seconds_left"] == pytest.approx(60, abs=0.1)


@pytest.mark.looptime
async def test_a_budget_that_turned_shows_nothing_used():
    spend(100, budget_tokens=100, per="minute")
    await asyncio.sleep(60)
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["seconds_left"]) == (0, None)


@pytest.mark.looptime
async def test_a_call_of_an_earlier_period_is_settled_with_that_one():
    @token_budget("MathAgent", budget_tokens=100, per="minute")
    async def ask(prompt, max_tokens):
        await asyncio.sleep(90)
        return usage(0, 100)

    slow = asyncio.create_task(ask("", 100))
    await asyncio.sleep(60)
    spend(40)
    await slow
    assert (budget_of("MathAgent")["tokens_used"], budget_of("MathAgent")["tokens_reserved"]) == (40, 0)


@pytest.mark.looptime
async def test_wait_waits_until_the_period_turns_and_no_longer(heard):
    clock = asyncio.get_running_loop()

    @token_budget("MathAgent", budget_tokens=100, per="minute", on_exceed="wait")
    async def ask(prompt, max_tokens):
        return clock.time()

    first = await ask("", 100)
    await asyncio.sleep(20)
    assert await ask("", 100) - first == pytest.approx(60, abs=0.1)
    (waiting,) = of_type(heard, BudgetWaiting)
    assert waiting == BudgetWaiting(name="MathAgent", seconds=waiting.seconds, requested=100, unit="tokens")
    assert waiting.seconds == pytest.approx(40, abs=0.1)


@pytest.mark.looptime
async def test_wait_waits_for_a_second_turn_if_others_were_quicker():
    clock = asyncio.get_running_loop()

    @token_budget("MathAgent", budget_tokens=100, per="minute", on_exceed="wait")
    async def ask(prompt, max_tokens):
        return clock.time()

    times = await asyncio.gather(*(ask("", 100) for _ in range(3)))
    assert [time - times[0] for time in times] == pytest.approx([0, 60, 120], abs=0.1)


def test_wait_lets_a_sync_function_wait():
    ask = token_budget("MathAgent", budget_tokens=100, per="day", on_exceed="wait")(lambda prompt, max_tokens: "four")
    with no_waiting():
        assert [ask("", 100) for _ in range(3)] == ["four"] * 3


def test_wait_raises_where_no_period_will_ever_be_enough():
    with pytest.raises(TokenBudgetExceededError, match="never fits"):
        spend(101, budget_tokens=100, per="minute", on_exceed="wait")


def test_wait_raises_where_the_prompt_is_too_long():
    ask = token_budget(max_tokens=3, budget_tokens=100, per="minute", on_exceed="wait")(lambda prompt: prompt)
    with pytest.raises(TokenBudgetExceededError, match="max_tokens=3"):
        ask(LONG)


# Many at once

CALLS = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12
)


@given(CALLS)
async def test_reservations_and_use_together_never_exceed_the_budget(calls):
    levels, settled = [], []

    @token_budget("MathAgent", budget_tokens=100)
    async def ask(prompt, max_tokens, used, fails, steps):
        for _ in range(steps):
            levels.append(budget_of("MathAgent"))
            await asyncio.sleep(0)
        if fails:
            raise ConnectionError
        settled.append(used)
        return usage(0, used)

    with isolated():
        calling = [ask("", most, int(most * share), fails, steps) for most, share, fails, steps in calls]
        await asyncio.gather(*calling, return_exceptions=True)
        levels.append(budget_of("MathAgent"))
    assert all(level["tokens_used"] + level["tokens_reserved"] <= 100 for level in levels)
    assert (levels[-1]["tokens_used"], levels[-1]["tokens_reserved"]) == (sum(settled), 0)


def test_functions_of_one_agent_share_its_budget_over_threads(restless_threads):
    together = threading.Barrier(8)

    def run(_):
        ask = token_budget("MathAgent", budget_tokens=1_000)(lambda prompt, max_tokens: usage(0, max_tokens))
        together.wait()
        sent = 0
        for _ in range(50):
            with suppress(TokenBudgetExceededError):
                ask("", 10)
                sent += 1
        return sent

    with ThreadPoolExecutor(8) as threads:
        sent = sum(threads.map(run, range(8)))
    shown = budget_of("MathAgent")
    assert (sent, shown["tokens_used"], shown["tokens_reserved"]) == (100, 1_000, 0)


def test_agents_do_not_share_a_budget():
    spend(100, agent="MathAgent", budget_tokens=100)
    spend(100, agent="WriterAgent", budget_tokens=100)
    assert budget_of("WriterAgent")["tokens_used"] == 100


# Money


def test_a_call_is_settled_at_the_price_of_its_usage():
    token_budget("MathAgent", budget_usd=1)(lambda prompt: usage(1_000, 500))(LONG)
    assert budget_of("MathAgent")["usd_used"] == pytest.approx(PRICE)


def test_the_price_is_told_to_listeners(heard):
    token_budget("MathAgent", budget_usd=1)(lambda prompt: usage(1_000, 500))(LONG)
    assert [event.usd for event in of_type(heard, BudgetSettled)] == [pytest.approx(PRICE)]


def test_the_price_is_that_of_the_model():
    price = genai_prices.calc_price(genai_prices.Usage(input_tokens=1_000, output_tokens=500), "gpt-4o-mini")
    token_budget("MathAgent", budget_usd=1, model="gpt-4o-mini")(lambda prompt: usage(1_000, 500))(LONG)
    assert budget_of("MathAgent")["usd_used"] == pytest.approx(float(price.total_price))


def test_a_call_that_costs_more_than_is_left_is_refused_with_figures():
    ask = token_budget("MathAgent", budget_usd=1.5 * PRICE)(lambda prompt: usage(1_000, 500))
    ask(LONG)
    price = float(
        genai_prices.calc_price(genai_prices.Usage(input_tokens=10, output_tokens=5_000), "gpt-4o").total_price
    )
    bigger = token_budget("MathAgent")(lambda prompt, max_tokens: usage(10, 5_000))
    with pytest.raises(
        TokenBudgetExceededError, match=r"needs 0\.05\d+ USD, and budget_usd=0\.01\d+: it never"
    ) as caught:
        bigger(LONG, 5_000)
    assert (caught.value.unit, caught.value.requested, caught.value.remaining) == (
        "USD",
        pytest.approx(price),
        pytest.approx(0.5 * PRICE),
    )


def test_money_that_is_left_is_told_in_dollars():
    ask = token_budget("MathAgent", budget_usd=1.5 * PRICE)(lambda prompt, max_tokens: usage(1_000, 500))
    ask(LONG, 500)
    with pytest.raises(
        TokenBudgetExceededError, match=r"needs 0\.0\d+ USD, and 0\.0\d+ of budget_usd=0\.0\d+ are left;"
    ):
        ask(LONG, 500)


def test_a_budget_in_tokens_and_dollars_holds_to_both():
    ask = token_budget("MathAgent", budget_tokens=1_000_000, budget_usd=0.001)(lambda prompt, max_tokens: "four")
    with pytest.raises(TokenBudgetExceededError, match="budget_usd"):
        ask(LONG, 1_000)


def test_a_model_without_a_known_price_is_refused_at_decoration():
    with pytest.raises(
        ConfigurationError,
        match=r"no price is known for the model 'my-deployment': say model= .*set_prices\(\), or give budget_tokens",
    ):
        token_budget("MathAgent", budget_usd=1, model="my-deployment")


def test_a_function_that_joins_a_budget_in_dollars_needs_a_known_price():
    token_budget("MathAgent", budget_usd=1)
    ask = token_budget("MathAgent", model="my-deployment")(lambda prompt: usage(1, 1))
    with pytest.raises(ConfigurationError, match="no price is known for the model 'my-deployment'"):
        ask(LONG)


def test_a_price_that_is_lost_during_a_call_is_replaced_by_what_was_reserved():
    def ask(prompt, max_tokens):
        pricing.set_prices({})
        return usage(5, 5)

    pricing.set_prices({"my-deployment": Price(1_000, 1_000)})
    token_budget("MathAgent", budget_usd=1, model="my-deployment")(ask)("one two three", 7)
    assert budget_of("MathAgent")["usd_used"] == pytest.approx(0.01)


def test_a_budget_in_dollars_without_the_extra_says_what_to_install(without_genai_prices):
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'resilience-kit[cost]'")):
        token_budget("MathAgent", budget_usd=1)


def test_a_budget_in_dollars_without_the_extra_is_kept_by_prices_of_ones_own(without_genai_prices):
    pricing.set_prices({"gpt-4o": Price(1, 2)})
    token_budget("MathAgent", budget_usd=1)(lambda prompt: usage(1_000, 500))(LONG)
    assert budget_of("MathAgent")["usd_used"] == pytest.approx(0.002)


def test_a_budget_in_tokens_needs_no_prices(without_genai_prices):
    spend(10, budget_tokens=100)
    assert budget_of("MathAgent")["tokens_used"] == 10


def test_a_budget_in_tokens_shows_no_dollars():
    token_budget("MathAgent", budget_tokens=2_000)(lambda prompt: usage(1_000, 500))(LONG)
    assert budget_of("MathAgent")["usd_used"] == 0.0


# What an agent costs


def cost_of(result, **arguments):
    """What an agent's only call, and the calls whose price is unknown, add to its account."""
    token_budget("MathAgent", **arguments)(lambda prompt: result)(LONG)
    account = get_all_resilience_stats()["agents"]["MathAgent"]
    return account["usd"], account["calls_of_unknown_price"]


def test_an_agent_without_a_budget_is_shown_with_its_cost():
    assert cost_of(usage(1_000, 500)) == (pytest.approx(PRICE), 0)


@pytest.mark.parametrize(
    "result",
    [
        usage(1_000, 500) | {"model": "gpt-4o-mini-2024-07-18"},
        SimpleNamespace(usage=SimpleNamespace(input_tokens=1_000, output_tokens=500), model="gpt-4o-mini"),
        {"response": usage(1_000, 500) | {"model": "gpt-4o-mini"}},
    ],
    ids=["chat", "responses", "last event of a responses stream"],
)
def test_the_model_that_the_answer_names_is_priced(result):
    assert cost_of(result) == (pytest.approx(PRICE_OF_MINI), 0)


def test_an_answer_that_names_a_model_of_unknown_price_is_priced_as_the_one_that_was_asked_for():
    assert cost_of(usage(1_000, 500) | {"model": "my-deployment"}) == (pytest.approx(PRICE), 0)


def test_a_model_of_unknown_price_is_never_counted_as_free():
    assert cost_of(usage(1_000, 500), model="my-deployment") == (0.0, 1)


def test_a_call_of_unknown_usage_is_never_counted_as_free():
    assert cost_of("four") == (0.0, 1)


def test_a_model_of_unknown_price_is_named_once_in_the_log(caplog):
    for model in ("unknown-1", "unknown-1", "unknown-2"):
        token_budget("MathAgent", model=model)(lambda prompt: usage(1, 1))(LONG)
    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [(record.name, record.args) for record in said] == [
        ("resilience_kit.token_budgeting", ("unknown-1",)),
        ("resilience_kit.token_budgeting", ("unknown-2",)),
    ]


def test_without_any_prices_nothing_is_said_of_them(without_genai_prices, caplog):
    cost_of(usage(1, 1), model="unknown-3")
    assert caplog.records == []


def test_without_any_prices_what_an_agent_costs_is_unknown(without_genai_prices):
    assert cost_of(usage(1_000, 500)) == (0.0, 1)


@pytest.mark.parametrize(
    "counted",
    [
        {"prompt_tokens": 1_000, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 400}},
        {"input_tokens": 1_000, "output_tokens": 0, "input_tokens_details": {"cached_tokens": 400}},
        SimpleNamespace(
            prompt_tokens=1_000, completion_tokens=0, prompt_tokens_details=SimpleNamespace(cached_tokens=400)
        ),
    ],
    ids=["chat", "responses", "object"],
)
def test_tokens_from_the_services_cache_are_priced_as_such(counted):
    pricing.set_prices({"gpt-4o": Price(10, 0, cached_input_usd_per_million=5)})
    assert cost_of({"usage": counted}) == (pytest.approx(0.008), 0)


async def test_an_event_loop_goes_on_while_prices_are_loaded(monkeypatch):
    monkeypatch.setattr(pricing, "_published", {})
    goes_on = threading.Event()
    find = pricing._find

    def find_slowly(model):
        assert goes_on.wait(10), "the event loop was blocked"
        return find(model)

    monkeypatch.setattr(pricing, "_find", find_slowly)

    @token_budget("MathAgent")
    async def ask(prompt):
        return usage(1, 1)

    asyncio.get_running_loop().call_later(0.01, goes_on.set)
    assert await ask(LONG) == usage(1, 1)


# What is written wrongly


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"on_exceed": "drop"}, '@token_budget(on_exceed=\'drop\'): expected "raise", "truncate" or "wait"'),
        ({"on_exceed": "wait"}, '@token_budget(on_exceed="wait"): say per=, or there is nothing to wait for'),
        ({"per": "month"}, '@token_budget(per=\'month\'): expected "minute", "hour", "day", seconds above 0, or None'),
        ({"per": 0}, "@token_budget(per=0): expected "),
        ({"per": True}, "@token_budget(per=True): expected "),
        ({"per": float("nan")}, "@token_budget(per=nan): expected "),
        ({"max_tokens": 0}, "@token_budget(max_tokens=0): expected a whole number above 0"),
        ({"max_tokens": 1.5}, "@token_budget(max_tokens=1.5): expected a whole number above 0"),
        ({"max_tokens": True}, "@token_budget(max_tokens=True): expected a whole number above 0"),
        ({"budget_tokens": -1}, "@token_budget(budget_tokens=-1): expected a whole number above 0"),
        ({"budget_usd": -0.5}, "@token_budget(budget_usd=-0.5): expected a number above 0"),
        ({"budget_usd": "1"}, "@token_budget(budget_usd='1'): expected a number above 0"),
        ({"model": None}, "@token_budget(model=None): expected text"),
        ({"argument": 0}, "@token_budget(argument=0): expected text"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_with_what_to_write(arguments, text):
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        token_budget("MathAgent", **arguments)


def test_max_tokens_on_a_function_without_a_prompt_is_refused():
    with pytest.raises(
        ConfigurationError,
        match=r"@token_budget\(max_tokens=5\): .*<lambda> takes no messages or input or prompt: say argument= with the",
    ):
        token_budget(max_tokens=5)(lambda question: question)


def test_an_argument_that_the_function_does_not_take_is_refused():
    with pytest.raises(ConfigurationError, match=r"@token_budget\(argument='qestion'\): .*<lambda> takes no qestion"):
        token_budget(budget_tokens=5, argument="qestion")(lambda question: question)


def test_a_function_that_takes_any_keyword_is_taken_to_have_a_prompt():
    ask = token_budget(max_tokens=5)(lambda **request: "four")
    assert ask(prompt="2 + 2?") == "four"


def test_a_class_cannot_be_decorated():
    with pytest.raises(ConfigurationError, match="was put on the class dict: put it on its methods"):
        token_budget(dict)


def test_what_cannot_be_called_cannot_be_decorated():
    with pytest.raises(ConfigurationError, match=r'or write its parameters by name, as in @token_budget\(agent="Math'):
        token_budget(4_000)


def test_called_or_bare_it_is_the_agent_default():
    token_budget(lambda prompt: usage(1, 1))("2 + 2?")
    token_budget()(lambda prompt: usage(1, 1))("2 + 2?")
    assert get_all_resilience_stats()["agents"]["default"]["calls"] == 2


def test_explain_tells_where_each_parameter_came_from():
    ask = token_budget("MathAgent", budget_tokens=100, argument="question", on_exceed="truncate")(
        lambda question: question
    )
    (layer,) = explain(ask).layers
    assert {name: str(value) for name, value in layer.parameters.items()} == {
        "max_tokens": "4000 (default)",
        "budget_tokens": "100 (argument)",
        "budget_usd": "None (default)",
        "per": "None (default)",
        "model": "gpt-4o (default)",
        "on_exceed": "truncate (argument)",
        "shared": "False (default)",
        "argument": "question (argument)",
    }


def test_a_result_whose_usage_cannot_be_read_raises_and_holds_nothing_back():
    class Broken:
        @property
        def usage(self):
            raise LookupError("mine")

    @token_budget("MathAgent", budget_tokens=100)
    def ask(prompt):
        return Broken()

    with pytest.raises(LookupError, match="mine"):
        ask("hello world")

    assert get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_reserved"] == 0


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"delta": {"content": "hello world"}}]},
        {"choices": [{"delta": {"refusal": "hello world"}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": "hello", "arguments": " world"}}]}}]},
        {"choices": [{"text": "hello world"}]},
        {"type": "response.output_text.delta", "delta": "hello world"},
        {"type": "response.refusal.delta", "delta": "hello world"},
        {"type": "response.function_call_arguments.delta", "delta": "hello world"},
        "hello world",
    ],
    ids=str,
)
def test_a_stream_without_usage_is_settled_by_counting_all_that_the_answer_says(chunk):
    @token_budget("MathAgent", budget_tokens=100)
    def ask():
        yield chunk

    list(ask())

    assert get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_used"] == 2


def test_a_stream_without_usage_is_priced_as_the_model_that_its_chunks_name():
    @token_budget("MathAgent", budget_usd=1)
    def ask(prompt):
        yield {"model": "gpt-4o-mini", "choices": [{"delta": {"content": "hello world"}}]}

    list(ask("hello world"))

    usd = get_all_resilience_stats()["agents"]["MathAgent"]["usd"]
    assert usd == pytest.approx(cost_usd(Usage(2, 2), "gpt-4o-mini"))


def test_a_result_whose_usage_is_neither_true_nor_false_reaches_the_caller():
    class Column:
        def __bool__(self):
            raise ValueError("ambiguous")

    class Table:
        usage = Column()

    table = Table()

    assert token_budget("MathAgent", budget_tokens=100)(lambda prompt: table)("hello world") is table
