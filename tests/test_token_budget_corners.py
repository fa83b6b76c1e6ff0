"""@token_budget in its corners: calls of which nothing is known, and prompts that are cut for another model."""

import asyncio
import threading

import pytest

from resilience_kit import (
    ConfigurationError,
    TokenBudgetExceededError,
    agent,
    count_tokens,
    explain,
    get_all_resilience_stats,
    pricing,
    subscribe,
    token_budget,
    token_manager,
    truncating,
    vocabularies,
)
from resilience_kit.events import BudgetSettled, Truncated
from resilience_kit.token_counting import is_ready

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


def test_who_subscribes_to_settled_calls_alone_hears_of_one_whose_usage_is_unknown():
    heard = []
    unsubscribe = subscribe(heard.append, wants=lambda kind: kind is BudgetSettled)

    token_budget("MathAgent")(lambda: None)()
    unsubscribe()

    assert [event.name for event in heard] == ["MathAgent"]


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


# --- what is loaded before a call ------------------------------------------------------------------------------------


async def test_what_counts_an_answer_is_loaded_before_the_call(monkeypatch):
    monkeypatch.setattr(vocabularies, "_encodings", {})

    @token_budget("MathAgent", budget_tokens=100, model="gpt-4")
    async def ask():
        return [is_ready("gpt-4")]

    assert await ask() == [True]


def test_where_there_is_nothing_to_keep_to_no_vocabulary_is_loaded(monkeypatch):
    monkeypatch.setattr(vocabularies, "_encodings", {})
    monkeypatch.setattr(pricing, "_published", {})

    assert token_budget("WriterAgent")(lambda prompt: [is_ready("gpt-4o")])("no test counts this") == [False]


@pytest.mark.parametrize("budget", [{}, {"budget_tokens": 1_000}], ids=["unbounded", "bounded"])
def test_the_price_of_a_model_is_looked_for_once(budget, monkeypatch):
    looked, find = [], pricing._find
    monkeypatch.setattr(pricing, "_published", {})
    monkeypatch.setattr(pricing, "_find", lambda model: looked.append(model) or find(model))
    ask = token_budget("WriterAgent", **budget)(lambda: None)

    ask()
    ask()

    assert looked == ["gpt-4o"]


# --- whose prompt it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binding", [staticmethod, classmethod])
def test_a_static_or_class_method_without_a_prompt_is_refused_as_a_function_is(binding):
    with pytest.raises(ConfigurationError, match="takes no messages or input or prompt"):
        token_budget(max_tokens=5)(binding(lambda *_, question: question))


def test_a_function_with_an_agent_of_its_own_is_explained_and_refused_as_that_one_in_any_block():
    ask = token_budget("WriterAgent", max_tokens=3)(lambda prompt: prompt)

    with agent("MathAgent"):
        assert explain(ask).layers[0].parameters["max_tokens"].value == 3
        with pytest.raises(TokenBudgetExceededError) as refused:
            ask("one two three four")

    assert refused.value.agent == "WriterAgent"


def test_the_maximum_of_an_agents_own_variable_is_explained_in_any_block():
    ask = token_budget("MathAgent")(lambda prompt: prompt)

    with agent("CoordinatorAgent"):
        assert str(explain(ask).layers[0].parameters["max_tokens"]) == "4000 (default)"
