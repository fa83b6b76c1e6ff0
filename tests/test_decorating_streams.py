"""Generators: their protocol stays whole, a stream holds what its call holds, and retries end with the first item."""

import asyncio
import contextlib
import functools
import gc

import pytest
import tenacity

from resilience_kit import (
    ConfigurationError,
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
    resilient,
    retry_on_429,
    token_budget,
)
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import disabled, no_waiting

pytestmark = pytest.mark.looptime

UNPACED = {"requests_per_minute": 10_000, "min_interval": 0}


class RateLimitError(Exception):
    status_code = 429


class ServerError(Exception):
    status_code = 500


def circuit_state(name="chat"):
    return get_all_resilience_stats()["circuit_breakers"][name]["state"]


def echo():
    """Give back what is sent in, and what is thrown in; return at "stop"."""
    heard = "hello"
    while heard != "stop":
        try:
            heard = yield heard
        except LookupError as error:
            heard = error
    return "bye"


async def echo_later():
    """Give back what is sent in, and what is thrown in; return at "stop"."""
    heard = "hello"
    while heard != "stop":
        try:
            heard = yield heard
        except LookupError as error:
            heard = error


@pytest.fixture(params=["bare", "limited", "stacked", "disabled"])
def protocol(request):
    """A decorator under which a generator must behave as the bare one does."""
    decorators = {
        "bare": lambda function: function,
        "limited": rate_limited,
        "stacked": resilient,
        "disabled": resilient,
    }
    with disabled() if request.param == "disabled" else contextlib.nullcontext():
        yield decorators[request.param]


# --- the protocol of generators --------------------------------------------------------------------------------------


def test_a_generator_takes_what_is_sent(protocol):
    stream = protocol(echo)()

    assert [next(stream), stream.send("four"), next(stream)] == ["hello", "four", None]


def test_a_generator_handles_what_is_thrown_in(protocol):
    stream, error = protocol(echo)(), LookupError()
    next(stream)

    assert stream.throw(error) is error
    assert stream.send("four") == "four"


def test_what_a_generator_does_not_handle_comes_back_to_who_threw_it(protocol):
    stream, error = protocol(echo)(), OSError()
    next(stream)

    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one it is, is what is asserted
        stream.throw(error)
    assert caught.value is error
    assert list(stream) == []


def test_a_generators_return_value_is_the_result_of_yield_from(protocol):
    results = []

    def reader():
        results.append((yield from protocol(echo)()))

    stream = reader()
    next(stream)
    with pytest.raises(StopIteration):
        stream.send("stop")

    assert results == ["bye"]


def test_an_empty_generator_is_empty_and_keeps_its_return_value(protocol):
    @protocol
    def silent():
        return "bye"
        yield

    with pytest.raises(StopIteration) as caught:
        next(silent())
    assert caught.value.value == "bye"


def test_closing_a_generator_runs_its_cleanup_at_once(protocol):
    steps = []

    @protocol
    def words():
        try:
            yield "four"
        finally:
            steps.append("cleaned up")

    stream = words()
    next(stream)
    stream.close()

    assert steps == ["cleaned up"]
    assert list(stream) == []


def test_an_error_in_a_generators_cleanup_reaches_who_closes_it(protocol):
    @protocol
    def words():
        try:
            yield "four"
        finally:
            raise LookupError

    stream = words()
    next(stream)

    with pytest.raises(LookupError):
        stream.close()


def test_a_generator_that_ignores_close_is_told_off(protocol):
    @protocol
    def words():
        with contextlib.suppress(GeneratorExit):
            yield "four"
        yield "five"

    stream = words()
    next(stream)

    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        stream.close()


async def test_an_async_generator_takes_what_is_sent(protocol):
    stream = protocol(echo_later)()

    assert [await anext(stream), await stream.asend("four"), await anext(stream)] == ["hello", "four", None]
    await stream.aclose()


async def test_an_async_generator_handles_what_is_thrown_in(protocol):
    stream, error = protocol(echo_later)(), LookupError()
    await anext(stream)

    assert await stream.athrow(error) is error
    assert await stream.asend("four") == "four"
    await stream.aclose()


async def test_what_an_async_generator_does_not_handle_comes_back_to_who_threw_it(protocol):
    stream, error = protocol(echo_later)(), OSError()
    await anext(stream)

    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one it is, is what is asserted
        await stream.athrow(error)
    assert caught.value is error
    assert [item async for item in stream] == []


async def test_an_async_generator_ends_where_it_returns(protocol):
    stream = protocol(echo_later)()
    await anext(stream)

    with pytest.raises(StopAsyncIteration):
        await stream.asend("stop")


async def test_an_empty_async_generator_is_empty(protocol):
    @protocol
    async def silent():
        return
        yield

    assert [item async for item in silent()] == []


async def test_closing_an_async_generator_runs_its_cleanup_at_once(protocol):
    steps = []

    @protocol
    async def words():
        try:
            yield "four"
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    stream = words()
    await anext(stream)
    await stream.aclose()

    assert steps == ["cleaned up"]


async def test_an_error_in_an_async_generators_cleanup_reaches_who_closes_it(protocol):
    @protocol
    async def words():
        try:
            yield "four"
        finally:
            raise LookupError

    stream = words()
    await anext(stream)

    with pytest.raises(LookupError):
        await stream.aclose()


def test_what_only_wraps_a_generator_function_must_return_a_generator():
    """What @contextmanager returns is none; beneath it, the layers last as long as its block."""
    ask = rate_limited("above", **UNPACED)(contextlib.contextmanager(echo))

    with pytest.raises(ConfigurationError, match="put the decorator beneath"):
        next(ask())


async def test_what_only_wraps_an_async_generator_function_must_return_an_async_generator():
    ask = rate_limited("above", **UNPACED)(contextlib.asynccontextmanager(echo_later))

    with pytest.raises(ConfigurationError, match="put the decorator beneath"):
        await anext(ask())


def test_a_context_manager_holds_its_slot_for_its_block(slots_taken):
    @contextlib.contextmanager
    @rate_limited("chat", **UNPACED)
    def session():
        yield "four"

    with session() as word:
        assert (word, slots_taken("chat")) == ("four", 1)
    assert slots_taken("chat") == 0


def test_a_plain_wrapper_around_a_generator_function_counts_as_one(slots_taken):
    @rate_limited("chat", **UNPACED)
    @functools.wraps(echo)
    def logged():
        return echo()

    stream = logged()
    next(stream)

    assert slots_taken("chat") == 1
    stream.close()


# --- how long a stream holds its slot --------------------------------------------------------------------------------


@rate_limited("letters", **UNPACED)
def spell(text="four", error=None):
    yield from text
    if error is not None:
        raise error


@rate_limited("letters", **UNPACED)
async def spell_later(text="four", error=None):
    for letter in text:
        yield letter
    if error is not None:
        raise error


def test_a_generator_holds_its_slot_until_it_is_read_to_its_end(slots_taken):
    stream = spell()

    assert [slots_taken("letters") for _ in stream] == [1, 1, 1, 1]
    assert slots_taken("letters") == 0


def test_a_generator_that_is_not_started_holds_nothing(heard):
    stream = spell()

    assert heard == []
    stream.close()


def test_an_empty_generator_gives_its_slot_back(slots_taken):
    assert list(spell("")) == []
    assert slots_taken("letters") == 0


def test_a_closed_generator_gives_its_slot_back(slots_taken):
    stream = spell()
    next(stream)
    assert slots_taken("letters") == 1

    stream.close()

    assert slots_taken("letters") == 0


def test_a_broken_generator_gives_its_slot_back(slots_taken):
    stream = spell("f", LookupError())
    assert next(stream) == "f"
    assert slots_taken("letters") == 1

    with pytest.raises(LookupError):
        next(stream)

    assert slots_taken("letters") == 0


def test_a_dropped_generator_gives_its_slot_back(slots_taken):
    stream = spell()
    next(stream)
    assert slots_taken("letters") == 1

    del stream
    gc.collect()

    assert slots_taken("letters") == 0


@pytest.mark.parametrize("adaptive", [True, "latency"])
def test_a_generator_that_the_garbage_collector_drops_where_its_thread_has_the_lock_gives_its_slot_back(
    slots_taken, adaptive
):
    stream = rate_limited("letters", adaptive=adaptive, **UNPACED)(echo)()
    next(stream)
    limit = rate_limits.items()["letters"]
    with limit._lock:
        del stream
        gc.collect()

    assert limit.statistics().in_flight == 1  # it was in no position to wait for the lock: the next one takes it back
    assert slots_taken("letters") == 0


async def test_an_async_generator_holds_its_slot_until_it_is_read_to_its_end(slots_taken):
    assert [slots_taken("letters") async for _ in spell_later()] == [1, 1, 1, 1]
    assert slots_taken("letters") == 0


async def test_an_async_generator_that_is_not_started_holds_nothing(heard):
    stream = spell_later()

    assert heard == []
    await stream.aclose()


async def test_an_empty_async_generator_gives_its_slot_back(slots_taken):
    assert [letter async for letter in spell_later("")] == []
    assert slots_taken("letters") == 0


async def test_a_closed_async_generator_gives_its_slot_back(slots_taken):
    stream = spell_later()
    await anext(stream)
    assert slots_taken("letters") == 1

    await stream.aclose()

    assert slots_taken("letters") == 0


async def test_a_broken_async_generator_gives_its_slot_back(slots_taken):
    stream = spell_later("f", LookupError())
    await anext(stream)
    assert slots_taken("letters") == 1

    with pytest.raises(LookupError):
        await anext(stream)

    assert slots_taken("letters") == 0


async def test_an_async_generator_that_is_dropped_on_its_loop_gives_its_slot_back(slots_taken):
    stream = spell_later()
    await anext(stream)
    assert slots_taken("letters") == 1

    del stream
    gc.collect()
    await asyncio.sleep(1)  # the loop closes what was dropped

    assert slots_taken("letters") == 0


def test_an_async_generator_that_is_dropped_after_its_loop_gives_its_slot_back(slots_taken):
    """Nobody can run its frame any more, not even to close it."""
    stream = spell_later()

    async def read_one(stream):
        await anext(stream)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(read_one(stream))
    loop.close()
    assert slots_taken("letters") == 1

    del stream
    gc.collect()

    assert slots_taken("letters") == 0


async def test_a_cancelled_reader_gives_its_slot_back(slots_taken):
    @rate_limited("letters", **UNPACED)
    async def slow():
        yield "f"
        await asyncio.sleep(60)

    async def read():
        return [letter async for letter in slow()]

    reader = asyncio.create_task(read())
    await asyncio.sleep(1)
    assert slots_taken("letters") == 1

    reader.cancel()
    await asyncio.wait([reader])

    assert reader.cancelled()
    assert slots_taken("letters") == 0


async def test_a_reader_that_is_cancelled_before_the_first_item_gives_its_slot_back(slots_taken):
    @rate_limited("letters", **UNPACED)
    async def slow():
        await asyncio.sleep(60)
        yield "f"

    reader = asyncio.create_task(anext(slow()))
    await asyncio.sleep(1)
    assert slots_taken("letters") == 1

    reader.cancel()
    await asyncio.wait([reader])

    assert reader.cancelled()
    assert slots_taken("letters") == 0


async def test_a_waiting_stream_starts_when_another_ends():
    ask = rate_limited("narrow", max_concurrent=1, **UNPACED)(echo_later)
    first = ask()
    await anext(first)
    waiting = asyncio.create_task(anext(ask()))
    await asyncio.sleep(1)
    assert not waiting.done()

    await first.aclose()

    assert await waiting == "hello"


# --- a stream's verdict ----------------------------------------------------------------------------------------------


def test_a_stream_that_breaks_is_a_failure_of_the_circuit():
    @circuit_protected("chat", failure_threshold=1)
    def ask():
        yield "f"
        raise ServerError

    stream = ask()
    next(stream)
    assert circuit_state() == "CLOSED"

    with pytest.raises(ServerError):
        next(stream)

    assert circuit_state() == "OPEN"


async def test_an_async_stream_that_breaks_is_a_failure_of_the_circuit():
    @circuit_protected("chat", failure_threshold=1)
    async def ask():
        yield "f"
        raise ServerError

    stream = ask()
    await anext(stream)
    assert circuit_state() == "CLOSED"

    with pytest.raises(ServerError):
        await anext(stream)

    assert circuit_state() == "OPEN"


def test_a_stream_settles_its_budget_when_it_is_read():
    @token_budget("MathAgent", budget_tokens=100, argument="text")
    def ask(text, max_tokens):
        yield from ("four", " five")

    stream = ask("two words", max_tokens=50)
    next(stream)
    budget = get_all_resilience_stats()["token_budgets"]["MathAgent"]
    assert (budget["tokens_reserved"], budget["tokens_used"]) == (52, 0)

    assert list(stream) == [" five"]

    budget = get_all_resilience_stats()["token_budgets"]["MathAgent"]
    assert (budget["tokens_reserved"], budget["tokens_used"]) == (0, 4)


def test_a_fallbacks_stream_stands_in_for_a_refused_one():
    def fallback():
        yield "later"

    @circuit_protected("chat", failure_threshold=1, fallback=fallback)
    def ask():
        raise ServerError
        yield

    with pytest.raises(ServerError):
        next(ask())

    assert list(ask()) == ["later"]


async def test_a_fallbacks_async_stream_stands_in_for_a_refused_one():
    async def fallback():
        yield "later"

    @circuit_protected("chat", failure_threshold=1, fallback=fallback)
    async def ask():
        raise ServerError
        yield

    with pytest.raises(ServerError):
        await anext(ask())

    assert [item async for item in ask()] == ["later"]


def test_every_layer_ends_its_stay_even_if_one_of_them_fails(slots_taken):
    def is_failure(error):
        raise LookupError("a mistake in is_failure")

    @rate_limited("letters", **UNPACED)
    @circuit_protected("chat", is_failure=is_failure)
    def ask():
        yield "f"
        raise ServerError

    stream = ask()
    next(stream)

    with pytest.raises(LookupError, match="a mistake in is_failure"):
        next(stream)

    assert slots_taken("letters") == 0


# --- retries ---------------------------------------------------------------------------------------------------------


def fails_at_first(attempts, error_at):
    """A generator of two items that is refused on its first attempt, before item number `error_at`."""

    def ask():
        attempts.append(None)
        for number in range(3):
            if number == error_at and len(attempts) == 1:
                raise RateLimitError
            if number < 2:
                yield number

    return ask


def fails_at_first_later(attempts, error_at):
    """The same, as an async generator."""

    async def ask():
        for number in fails_at_first(attempts, error_at)():
            yield number

    return ask


def test_row_10_a_generator_is_retried_until_its_first_item():
    attempts = []
    with pytest.raises(RateLimitError):  # tenacity's own decorator does not retry, and does not say so
        list(tenacity.retry(fails_at_first(attempts, 0))())
    assert len(attempts) == 1

    attempts.clear()
    with no_waiting():
        assert list(retry_on_429(fails_at_first(attempts, 0))()) == [0, 1]
    assert len(attempts) == 2


async def test_row_10_an_async_generator_is_retried_until_its_first_item():
    attempts = []
    with pytest.raises(RateLimitError):  # tenacity's own decorator does not retry, and does not say so
        [item async for item in tenacity.retry(fails_at_first_later(attempts, 0))()]
    assert len(attempts) == 1

    attempts.clear()
    assert [item async for item in retry_on_429(fails_at_first_later(attempts, 0))()] == [0, 1]
    assert len(attempts) == 2


@pytest.mark.parametrize("error_at", [1, 2])
def test_row_10_a_generator_is_not_retried_after_its_first_item(error_at):
    """What was read cannot be taken back."""
    attempts, items = [], []

    with pytest.raises(RateLimitError):
        items.extend(item for item in retry_on_429(fails_at_first(attempts, error_at))())

    assert len(attempts) == 1


@pytest.mark.parametrize("error_at", [1, 2])
async def test_row_10_an_async_generator_is_not_retried_after_its_first_item(error_at):
    """What was read cannot be taken back."""
    attempts = []

    with pytest.raises(RateLimitError):
        [item async for item in retry_on_429(fails_at_first_later(attempts, error_at))()]

    assert len(attempts) == 1


async def test_an_empty_stream_is_not_retried():
    attempts = []

    @retry_on_429
    async def silent():
        attempts.append(None)
        return
        yield

    assert [item async for item in silent()] == []
    assert len(attempts) == 1


async def test_a_retried_stream_holds_one_slot(slots_taken):
    attempts = []
    stream = retry_on_429(rate_limited("letters", **UNPACED)(fails_at_first_later(attempts, 0)))()

    await anext(stream)

    assert len(attempts) == 2
    assert slots_taken("letters") == 1
    await stream.aclose()
    assert slots_taken("letters") == 0
