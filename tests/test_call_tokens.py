"""What a call is taken for before it is sent, where it says nothing of its answer's length."""

import pytest

from resilience_kit import count_tokens, get_all_resilience_stats, rate_limited
from resilience_kit.azure import ResilientAzureOpenAI
from resilience_kit.testing import AzureOpenAISimulator

TEXT = "hello world"
MESSAGES = [{"role": "user", "content": TEXT}]
OF_TEXT, OF_MESSAGES = count_tokens(TEXT), count_tokens(MESSAGES)


def tokens_of(name="chat"):
    return get_all_resilience_stats()["rate_limiters"][name]["tokens_in_window"]


def tokens_of_call(**arguments):
    """What a call with these arguments is taken for."""
    rate_limited("chat")(lambda **_: "four")(**arguments)
    return tokens_of()


@pytest.mark.parametrize(
    ("arguments", "of_prompt"),
    [
        ({"messages": MESSAGES}, OF_MESSAGES),
        ({"messages": MESSAGES, "max_tokens": None}, OF_MESSAGES),
        ({"prompt": TEXT}, OF_TEXT),
        ({"input": MESSAGES}, OF_MESSAGES),
        ({"input": TEXT, "model": "gpt-4o"}, OF_TEXT),
    ],
    ids=["messages", "no maximum", "prompt", "input of messages", "text and a model"],
)
def test_an_answer_without_a_maximum_is_taken_for_sixteen_tokens(arguments, of_prompt):
    assert tokens_of_call(**arguments) == of_prompt + 16


def test_each_of_several_answers_without_a_maximum_is_taken_for_sixteen_tokens():
    assert tokens_of_call(messages=MESSAGES, n=3) == OF_MESSAGES + 3 * 16


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_an_answer_with_a_maximum_is_taken_for_that(name):
    assert tokens_of_call(messages=MESSAGES, **{name: 5}) == OF_MESSAGES + 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"input": TEXT},
        {"input": [TEXT]},
        {"input": TEXT, "model": "text-embedding-3-small"},
        {"input": TEXT, "model": "ours", "encoding_format": "base64"},
        {"input": TEXT, "model": "ours", "dimensions": 256},
    ],
    ids=["text alone", "texts", "by its model", "by its encoding", "by its dimensions"],
)
def test_an_embedding_has_no_answer(arguments):
    assert tokens_of_call(**arguments) == OF_TEXT


def test_numbers_to_embed_have_no_answer():
    assert tokens_of_call(input=[1, 2, 3], model="ours") == 3


@pytest.mark.parametrize("arguments", [{}, {"n": 3}, {"model": "gpt-4o"}, {"question": TEXT}])
def test_a_call_without_a_prompt_has_no_answer_either(arguments):
    assert tokens_of_call(**arguments) == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.chat.completions.create(model="ours", messages=MESSAGES),
        lambda client: client.chat.completions.create(model="ours", messages=MESSAGES, n=2),
        lambda client: client.responses.create(model="ours", input=TEXT),
        lambda client: client.responses.create(model="ours", input=MESSAGES),
    ],
    ids=["chat", "two choices", "responses of a text", "responses of messages"],
)
def test_a_client_takes_no_request_for_less_than_a_server_does_that_charges_a_small_default(ask):
    with AzureOpenAISimulator(count_prompt=count_tokens) as azure:
        client = ResilientAzureOpenAI(name="chat", **azure.client_options())
        ask(client)
        client.close()
        charged = azure.stats.admissions[0].tokens

    assert charged <= tokens_of() <= charged + 10


def test_a_client_takes_an_embedding_for_its_text_alone():
    with AzureOpenAISimulator() as azure:
        client = ResilientAzureOpenAI(name="chat", **azure.client_options())
        client.embeddings.create(model="ours", input=TEXT)
        client.close()

    assert tokens_of() == OF_TEXT
