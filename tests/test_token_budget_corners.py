"""@token_budget in its corners: calls of which nothing is known, and prompts that are cut for another model."""

import asyncio
import threading

import pytest

from resilience_kit import (
    agent,
    count_tokens,
    get_all_resilience_stats,
    subscribe,
    token_budget,
    token_manager,
    truncating,
)
from resilience_kit.events import BudgetSettled, Truncated

# In the vocabulary of gpt-4 it has many more tokens than in that of gpt-4o.
HINDI = "यह एक लंबा वाक्य है जिसमें कई शब्द हैं और जो काटा जाएगा"


def calls():
    return {name: account["calls"] for name, account in get_all_resilience_stats()["agents"].items()}


# --- calls of which nothing is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_heard", [False, True], ids=["unheard", "heard"])
def test_a_call_whose_usage_is_unknown_counts_for_its_agent(is_heard):
    unsubscribe = subscribe(lambda event: None) if is_heard else lambda: None

    token_budget("MathAgent")(lambda: None)()
    with agent("Coordinator"):
        token_budget(lambda: None)()
    unsubscribe()

    assert calls() == {"MathAgent": 1, "Coordinator": 1}


def test_a_call_whose_usage_is_unknown_is_told_with_none(heard):
    token_budget("MathAgent")(lambda: None)()

    assert heard == [
        BudgetSettled(
            name="MathAgent",
            reserved=0,
            prompt_tokens=0,
            completion_tokens=0,
            usd=None,
            model=None,
        )
    ]


def test_a_call_whose_usage_is_unknown_counts_for_the_context_that_it_was_made_in():
    with agent("MathAgent", context="nightly-report"):
        token_budget("MathAgent")(lambda: None)()

    assert token_manager.get_usage_insights()["by_context"]["nightly-report"]["calls"] == 1


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o"])
def test_an_answer_that_is_text_is_counted_in_the_tokens_of_its_model(model):
    token_budget("MathAgent", budget_tokens=1_000, model=model)(lambda: HINDI)()

    used = get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_used"]
    assert used == count_tokens(HINDI, model=model)


# --- prompts that are cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o"])
def test_a_text_is_cut_to_the_tokens_of_its_model(model, heard):
    kept = token_budget("WriterAgent", max_tokens=12, on_exceed="truncate", model=model)(lambda prompt: prompt)(HINDI)

    assert 10 <= count_tokens(kept, model=model) <= 12
    assert [event for event in heard if isinstance(event, Truncated)] == [
        Truncated(
            name="WriterAgent",
            tokens_before=count_tokens(HINDI, model=model),
            tokens_after=count_tokens(kept, model=model),
            removed_messages=0,
        )
    ]


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o"])
def test_messages_are_cut_to_the_tokens_of_their_model(model):
    messages = [{"role": "user", "content": HINDI}, {"role": "user", "content": "2 + 2?"}]
    maximum = count_tokens(messages, model=model) - 5
    ask = token_budget(max_tokens=maximum, on_exceed="truncate", model=model)(lambda messages: messages)

    kept = ask(messages)

    assert kept != messages
    assert count_tokens(kept, model=model) <= maximum


async def test_an_event_loop_goes_on_while_a_long_prompt_is_cut(monkeypatch):
    goes_on = threading.Event()
    truncate_text = truncating.truncate_text

    def cut_slowly(text, **arguments):
        assert goes_on.wait(10), "the event loop was blocked"
        return truncate_text(text, **arguments)

    monkeypatch.setattr(truncating, "truncate_text", cut_slowly)

    @token_budget(max_tokens=3, on_exceed="truncate")
    async def ask(prompt):
        return prompt

    asyncio.get_running_loop().call_later(0.01, goes_on.set)
    assert await ask("one two three four " * 3_000) == "one two three"
