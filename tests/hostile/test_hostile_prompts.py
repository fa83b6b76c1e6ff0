"""Prompts, messages and answers of any kind and size are counted and cut without an error, and in time."""

import asyncio
import json
from contextlib import contextmanager

import pytest
from hostile_values import NUMBERS, TEXTS, VALUES, examples, growth, nested, told
from hypothesis import given, strategies as st

from resilience_kit import count_tokens, get_all_resilience_stats, rate_limited, text_tokens, token_budget, truncating
from resilience_kit.call_tokens import Usage, text_of, usage_of
from resilience_kit.errors import TokenBudgetExceededError
from resilience_kit.image_tokens import image_tokens
from resilience_kit.testing import isolated
from resilience_kit.token_counting import as_messages, estimate_request_tokens
from resilience_kit.truncating import truncate_messages, truncate_text

KEYS = st.sampled_from(
    [
        *(
            "role",
            "content",
            "output",
            "name",
            "type",
            "text",
            "tool_calls",
            "tool_call_id",
            "call_id",
            "id",
            "function",
        ),
        *(
            "image_url",
            "url",
            "detail",
            "arguments",
            "parameters",
            "properties",
            "items",
            "enum",
            "anyOf",
            "description",
        ),
    ]
)
WORDS = st.sampled_from(
    ["user", "system", "tool", "function", "reasoning", "image_url", "file", "function_call_output", "low", "object"]
)
FIELDS = st.recursive(
    VALUES | WORDS | st.just("data:image/png;base64," + "A" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(KEYS, FIELDS, max_size=5) | VALUES, max_size=5)
REQUESTS = st.dictionaries(
    st.sampled_from(
        [
            *("messages", "input", "prompt", "instructions", "tools", "functions", "response_format", "model"),
            *("max_tokens", "max_completion_tokens", "n", "best_of"),
        ]
    ),
    FIELDS | MESSAGES,
    max_size=5,
)
# What vocabularies have no words for, or merge into tokens pair by pair.
UNITS = ["a", " ", "\n", "^", "aA", "中", "a\u0301", "\ud800", "word "]


class Broken:
    """Raises whatever it is asked."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("broken")


class BrokenModel:
    """Looks like pydantic's, and is not."""

    def model_dump(self):
        return {"role": "user"}


def in_itself():
    """A list that is its own only item."""
    ring = []
    ring.append(ring)
    return ring


@pytest.fixture
def no_vocabulary():
    """Let tokens be estimated."""
    with without_vocabulary():
        yield


@contextmanager
def without_vocabulary():
    """Let tokens be estimated, as where no vocabulary is at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_tokens, "encoding_for", lambda model: None)
        patch.setattr(truncating, "encoding_for", lambda model: None)
        patch.setattr(text_tokens, "_counts", {})
        yield


@given(REQUESTS)
@examples(60)
def test_a_request_of_any_kind_is_estimated(request):
    assert estimate_request_tokens(request) >= 0


@given(MESSAGES | VALUES)
@examples(50)
def test_messages_of_any_kind_are_counted_or_are_no_messages(messages):
    message = told(TypeError, count_tokens, messages)

    assert message is None or "message" in message


@given(MESSAGES, st.integers(-5, 60))
@examples(50)
def test_messages_of_any_kind_are_cut_or_are_no_messages(messages, maximum):
    try:
        cut = truncate_messages(messages, max_tokens=maximum)
    except TypeError:
        return
    assert cut.tokens_after <= maximum or not cut.fits
    assert cut.tokens_after == count_tokens(cut.messages)


@given(TEXTS, st.integers(-5, 30), st.sampled_from(["gpt-4o", "gpt-4", "\n", "", "gpt-" * 500]))
@examples(50)
def test_text_of_any_kind_is_cut_to_a_beginning_that_fits_and_can_be_sent(text, maximum, model):
    beginning = truncate_text(text, max_tokens=maximum, model=model)

    assert count_tokens(beginning, model=model) <= max(0, maximum)
    if beginning != text:
        beginning.encode()


@given(TEXTS, st.integers(-5, 30))
@examples(40)
def test_text_of_any_kind_is_cut_without_a_vocabulary(text, maximum):
    with without_vocabulary():
        beginning = truncate_text(text, max_tokens=maximum)

        assert count_tokens(beginning) <= max(0, maximum)


@pytest.mark.parametrize("hostile", [in_itself(), nested("x", times=5_000), nested("x", times=5_000, key="content")])
@pytest.mark.parametrize("key", ["messages", "input", "prompt", "tools", "functions", "response_format"])
def test_what_is_nested_too_deeply_to_be_sent_counts_nothing(key, hostile):
    assert estimate_request_tokens({key: [hostile], "max_tokens": 10}) >= 10


@pytest.mark.parametrize("work", [count_tokens, lambda messages: truncate_messages(messages, max_tokens=20)])
def test_messages_that_are_nested_too_deeply_to_be_sent_are_no_messages(work):
    with pytest.raises(TypeError, match="nested"):
        work([{"role": "user", "content": nested("x", times=5_000)}])


@pytest.mark.parametrize("message", [BrokenModel(), Broken()])
def test_an_object_that_does_not_say_what_it_holds_is_no_message(message):
    with pytest.raises(TypeError, match=type(message).__name__):
        as_messages([message])


def test_an_object_that_does_not_say_what_it_holds_counts_nothing():
    assert estimate_request_tokens({"messages": [BrokenModel(), Broken()]}) < 10


@pytest.mark.parametrize("prompt", [nested("x", times=5_000), [{"content": in_itself()}], [Broken()]])
@pytest.mark.parametrize(
    "decorator",
    [
        rate_limited("chat"),
        token_budget("agent", max_tokens=1_000),
        token_budget("other", max_tokens=1_000, budget_tokens=1_000, on_exceed="truncate"),
    ],
)
def test_a_prompt_of_any_kind_reaches_the_function(decorator, prompt):
    received = []

    @decorator
    def ask(messages):
        received.append(messages)

    ask(prompt)

    assert received[0] is prompt


@given(NUMBERS | VALUES, NUMBERS | VALUES)
@examples(40)
def test_numbers_of_any_size_for_the_answer_are_refused_or_reach_the_function(most, answers):
    def ask(prompt, max_tokens=None, n=None):
        return "four"

    with isolated():
        decorated = token_budget("agent", budget_tokens=1_000)(ask)
        message = told(TokenBudgetExceededError, decorated, "two plus two", max_tokens=most, n=answers)

    assert message is None or "1000" in message


@given(st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "input_tokens"]), NUMBERS | VALUES))
@examples(50)
def test_a_usage_of_any_kind_takes_no_less_than_nothing_from_a_budget(usage):
    with isolated():

        @token_budget("agent", budget_tokens=10**9, budget_usd=10**9)
        def ask(prompt):
            return {"usage": usage, "model": "gpt-4o"}

        assert ask("two plus two")["usage"] is usage
        stats = get_all_resilience_stats()
    assert stats["token_budgets"]["agent"]["tokens_used"] >= 0
    assert stats["token_budgets"]["agent"]["usd_used"] >= 0
    json.dumps(stats, allow_nan=False)


@pytest.mark.parametrize("count", [-1, -(10**9), 10**400, True, 2**53 + 1])
def test_a_usage_that_cannot_be_is_none(count):
    assert usage_of({"usage": {"prompt_tokens": count, "completion_tokens": 1}}) is None


@given(VALUES)
@examples(40)
def test_results_of_any_kind_have_a_usage_and_a_text_or_none(value):
    for result in (value, {"usage": value}, {"response": {"usage": value}}, {"choices": value, "delta": value}):
        assert isinstance(usage_of(result), Usage | None)
        assert isinstance(text_of(result), str)


@given(st.dictionaries(KEYS, FIELDS))
@examples(40)
def test_an_image_of_any_kind_costs_something(part):
    assert image_tokens(part, "gpt-4o") > 0


@pytest.mark.parametrize("unit", UNITS)
def test_long_texts_are_counted_in_time_in_proportion(unit):
    # not twice the same, which is counted once
    assert growth(count_tokens, lambda size: [{"content": (unit * size)[:size]}], 25_000) < 10


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_long_texts_are_cut_in_time_in_proportion(monkeypatch, unit, share):
    monkeypatch.setattr(text_tokens, "_MOST_COUNTS", 0)

    def cut(text):
        truncate_text(text, max_tokens=int(share * len(text) / 8))

    assert growth(cut, lambda size: (unit * size)[:size], 25_000) < 10


@pytest.mark.parametrize("unit", UNITS)
def test_long_texts_are_cut_without_a_vocabulary_in_time_in_proportion(no_vocabulary, unit):
    def cut(text):
        truncate_text(text, max_tokens=len(text) // 20)

    assert growth(cut, lambda size: (unit * size)[:size], 25_000) < 10


@pytest.mark.parametrize("content", ["one two three", [{"type": "text", "text": "one two three"}] * 3])
@pytest.mark.parametrize("extra", [{}, {"role": "tool", "tool_call_id": "1"}, {"role": "system"}])
def test_many_messages_are_cut_in_time_in_proportion(content, extra):
    def make(many):
        return [{"role": "user", "content": content, **extra} for _ in range(many)]

    assert growth(lambda messages: truncate_messages(messages, max_tokens=200), make, 200) < 10


@pytest.mark.parametrize("unit", ["a", "word ", "\ud800", "\ud800a", "😀"])
@pytest.mark.parametrize("on_exceed", ["raise", "truncate"])
def test_a_long_prompt_is_estimated_in_pieces_between_which_an_event_loop_runs(
    monkeypatch, no_vocabulary, unit, on_exceed
):
    """A search in a text of megabytes lets no other thread run: there has to be none in more than a piece."""
    searched = []

    class Watched:
        def findall(self, text):
            searched.append(len(text))
            return original.findall(text)

    original = text_tokens._ESTIMATED
    monkeypatch.setattr(text_tokens, "_ESTIMATED", Watched())

    @token_budget("agent", max_tokens=100, on_exceed=on_exceed)
    async def ask(prompt):
        return len(prompt)

    message = told(TokenBudgetExceededError, asyncio.run, ask((unit * 100_000)[:100_000]))

    assert (message is None) is (on_exceed == "truncate")
    assert max(searched) <= 20_000


@pytest.mark.parametrize("unit", ["\ud800", "\ud800a", "word\udc80 "])
def test_of_a_long_prompt_no_more_is_made_fit_to_be_sent_than_is_kept(monkeypatch, unit):
    """To leave surrogates out of megabytes takes seconds in which no other thread runs."""
    cleaned = []

    def watched(text):
        cleaned.append(len(text))
        return original(text)

    original = truncating._sendable
    monkeypatch.setattr(truncating, "_sendable", watched)

    truncate_text((unit * 200_000)[:200_000] + " word" * 100_000, max_tokens=10)

    assert max(cleaned) <= 20_000


@given(st.text("\ud83d\ude00 a", max_size=50), st.integers(1, 20))
@examples(50)
def test_a_character_that_was_sent_as_two_surrogates_is_kept(text, maximum):
    with_characters = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")

    assert with_characters.startswith(truncate_text(text + " word" * 30, max_tokens=maximum).rstrip(" word"))
