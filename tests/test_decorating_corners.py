"""Decorated functions in their corners: which calls count as sent, and what is said of those that cannot work."""

import asyncio
import contextlib
import functools

import openai
import pytest

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    StackOrderWarning,
    circuit_protected,
    decorating,
    get_all_resilience_stats,
    layers,
    rate_limited,
    resilient,
    token_budget,
)
from resilience_kit.testing import disabled

pytestmark = pytest.mark.looptime

UNPACED = {"requests_per_minute": 10_000, "min_interval": 0}


def ask():
    raise ConnectionError


async def ask_later():
    raise ConnectionError


def stream():
    raise ConnectionError
    yield


async def stream_later():
    raise ConnectionError
    yield


each_kind = pytest.mark.parametrize("function", [ask, ask_later, stream, stream_later])


async def run(function):
    """Call a function of any kind, and read what it returns to its end."""
    returned = function()
    if hasattr(returned, "__await__"):
        return await returned
    if hasattr(returned, "__aiter__"):
        return [item async for item in returned]
    return list(returned) if hasattr(returned, "__next__") else returned


def requests_in_window():
    return get_all_resilience_stats()["rate_limiters"]["chat"]["requests_in_window"]


# --- quota that was spent --------------------------------------------------------------------------------------------


@each_kind
async def test_a_call_that_failed_was_sent_and_keeps_its_quota(function):
    limited = rate_limited("chat", **UNPACED)(function)

    with pytest.raises(ConnectionError):
        await run(limited)

    assert requests_in_window() == 1


@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
@each_kind
async def test_a_call_that_was_refused_below_the_limit_was_not_sent_and_gives_its_quota_back(function):
    protected = rate_limited("chat", **UNPACED)(circuit_protected("chat", failure_threshold=1)(function))
    with pytest.raises(ConnectionError):
        await run(protected)

    with pytest.raises(CircuitOpenError):
        await run(protected)

    assert requests_in_window() == 1


# --- what a plain wrapper returns ------------------------------------------------------------------------------------


async def test_a_plain_wrapper_around_a_coroutine_function_may_return_a_task():
    async def look_up():
        return "four"

    @rate_limited("chat", **UNPACED)
    @functools.wraps(look_up)
    def create():
        return asyncio.ensure_future(look_up())

    assert await create() == "four"


@pytest.mark.parametrize("decorator", [rate_limited, resilient])
async def test_an_empty_async_generator_that_is_returned_is_empty(decorator, slots_taken):
    async def silent():
        return
        yield

    @decorator("chat", **UNPACED)
    async def create():
        return silent()

    assert [item async for item in await create()] == []
    assert slots_taken("chat") == 0


async def test_an_async_stream_settles_its_budget_with_what_was_read():
    @token_budget("MathAgent", budget_tokens=100, argument="text")
    async def spell(text, max_tokens):
        yield "four"
        yield " five"

    assert [word async for word in spell("two words", max_tokens=50)] == ["four", " five"]

    assert get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_used"] == 4


# --- switched off ----------------------------------------------------------------------------------------------------


def echo(*, word="four"):
    return [word]


async def echo_later(*, word="four"):
    return [word]


def spell(*, word="four"):
    yield word


async def spell_later(*, word="four"):
    yield word


@pytest.mark.parametrize("function", [echo, echo_later, spell, spell_later])
async def test_disabled_layers_hand_on_keyword_arguments(function):
    decorated = resilient("chat")(function)

    with disabled():
        assert await run(functools.partial(decorated, word="five")) == ["five"]


# --- warnings ---------------------------------------------------------------------------------------------------------


CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1", max_retries=2)


def test_a_client_that_retries_is_warned_of_when_its_function_is_decorated():
    def complete(text):
        return CLIENT.chat.completions.create(text)

    with pytest.warns(StackOrderWarning, match="OpenAI retries 2 times on its own"):
        rate_limited("chat")(complete)


# --- words -----------------------------------------------------------------------------------------------------------


class Suspending(layers.Guard):
    kind = name = "suspending"

    async def enter(self, call, /):
        await asyncio.sleep(0)


def returns_a_coroutine():
    return ask_later()


@pytest.mark.parametrize(
    ("decorate", "words"),
    [
        (
            lambda: decorating.guarded(ask, Suspending()),
            (
                "a sync function was decorated, but something that it was given is async (a fallback, or a callable "
                "argument). Make the function async def, or give it sync callables."
            ),
        ),
        (
            lambda: rate_limited("chat", **UNPACED)(returns_a_coroutine),
            (
                f"{__name__}.returns_a_coroutine is not async, but returned a coroutine, which would run outside of "
                "its decorators: make it async def and await the call in it"
            ),
        ),
        (
            lambda: rate_limited("chat", **UNPACED)(contextlib.contextmanager(stream)),
            (
                f"{__name__}.stream stands for a generator, but returned _GeneratorContextManager: put the decorator "
                "beneath the one that makes something else of it, as @contextmanager does"
            ),
        ),
        (
            lambda: rate_limited("chat", **UNPACED)(contextlib.asynccontextmanager(stream_later)),
            (
                f"{__name__}.stream_later stands for a generator, but returned _AsyncGeneratorContextManager: put the "
                "decorator beneath the one that makes something else of it, as @contextmanager does"
            ),
        ),
    ],
    ids=["suspends", "returns a coroutine", "is no generator", "is no async generator"],
)
async def test_what_cannot_work_is_refused_with_what_to_do(decorate, words):
    with pytest.raises(ConfigurationError) as refused:
        await run(decorate())

    assert str(refused.value) == words
