"""Functions that return a stream, instead of being one: generators, and HTTP responses that are still to be read."""

import asyncio
import gc
import gzip
import inspect
import json
import threading

import httpx2
import pytest

from resilience_kit import get_all_resilience_stats, resilient
from resilience_kit.decorating import guarded
from resilience_kit.layers import Guard
from resilience_kit.returned_streams import held
from resilience_kit.testing import disabled

OPTIONS = {"requests_per_minute": 10_000, "min_interval": 0, "budget_tokens": 1_000, "max_retries": 0}
EVENTS = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "four"}}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 30}},
]
SSE = "".join(f"data: {json.dumps(event)}\n\n" for event in EVENTS).encode() + b"data: [DONE]\n\n"
PIECES = [SSE[start : start + 7] for start in range(0, len(SSE), 7)]
USAGE = b'{"usage": {"prompt_tokens": 20, "completion_tokens": 30}}'


class Body(httpx2.SyncByteStream):
    """A body that comes in pieces, one of which may be an error, and that knows whether it was closed."""

    def __init__(self, *pieces):
        self.pieces = pieces
        self.closed = 0

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def close(self):
        self.closed += 1


class AsyncBody(httpx2.AsyncByteStream):
    """The same, for async readers; its iterator need not be a generator."""

    def __init__(self, *pieces):
        self.pieces = iter(pieces)
        self.closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = next(self.pieces, None)
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self):
        self.closed += 1


def response_of(body, content_type="text/event-stream", **headers):
    request = httpx2.Request("POST", "https://example.test")
    return httpx2.Response(200, headers={"content-type": content_type, **headers}, stream=body, request=request)


def returning(returned, **options):
    """A decorated function that returns what it is given."""

    @resilient(**{**OPTIONS, **options})
    def ask(prompt="", max_tokens=100):
        return returned

    return ask


def returning_later(returned, **options):
    @resilient(**{**OPTIONS, **options})
    async def ask(prompt="", max_tokens=100):
        return returned

    return ask


def failures():
    return get_all_resilience_stats()["circuit_breakers"]["default"]["failure_count"]


def tokens_used():
    return get_all_resilience_stats()["token_budgets"]["default"]["tokens_used"]


# Responses


def test_a_response_holds_its_slot_until_it_is_read(slots_taken):
    response = response_of(Body(*PIECES))
    assert returning(response)() is response
    assert slots_taken() == 1
    assert response.read() == SSE
    assert slots_taken() == 0


async def test_an_async_response_holds_its_slot_until_it_is_read(slots_taken):
    response = response_of(AsyncBody(*PIECES))
    assert await returning_later(response)() is response
    assert slots_taken() == 1
    assert await response.aread() == SSE
    assert slots_taken() == 0


def test_a_response_of_a_transport_still_tells_its_time(slots_taken):
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, stream=Body(*PIECES)))
    with httpx2.Client(transport=transport) as client:
        ask = returning(client.send(client.build_request("GET", "https://example.test"), stream=True))
        response = ask()
        response.read()
        assert response.elapsed.total_seconds() >= 0


def test_a_response_that_is_closed_frees_its_slot_and_its_connection(slots_taken):
    body = Body(*PIECES)
    with_body = returning(response_of(body))()
    with_body.close()
    assert (slots_taken(), body.closed) == (0, 1)


def test_a_body_that_fails_to_close_frees_its_slot(slots_taken):
    body = Body()
    body.close = lambda: 1 / 0
    response = returning(response_of(body))()
    with pytest.raises(ZeroDivisionError):
        response.close()
    assert slots_taken() == 0


async def test_an_async_response_that_is_closed_frees_its_slot_and_its_connection(slots_taken):
    body = AsyncBody(*PIECES)
    response = await returning_later(response_of(body))()
    await response.aclose()
    assert (slots_taken(), body.closed) == (0, 1)


def test_a_response_that_breaks_is_a_failure(slots_taken):
    response = returning(response_of(Body(b"data: ", httpx2.ReadError("gone"))))()
    with pytest.raises(httpx2.ReadError):
        response.read()
    assert (slots_taken(), failures(), tokens_used()) == (0, 1, 0)


async def test_an_async_response_that_breaks_is_a_failure(slots_taken):
    response = await returning_later(response_of(AsyncBody(b"data: ", httpx2.ReadError("gone"))))()
    with pytest.raises(httpx2.ReadError):
        await response.aread()
    assert (slots_taken(), failures(), tokens_used()) == (0, 1, 0)


def test_an_error_after_the_last_event_is_no_failure(slots_taken):
    response = returning(response_of(Body(*PIECES, httpx2.ReadError("gone"))))()
    with pytest.raises(httpx2.ReadError):
        response.read()
    assert (slots_taken(), failures(), tokens_used()) == (0, 0, 50)


def test_a_response_that_is_left_half_way_is_no_failure(slots_taken):
    response = returning(response_of(Body(*PIECES)))()
    pieces = response.iter_bytes()
    next(pieces)
    pieces.close()
    assert (slots_taken(), failures()) == (0, 0)


async def test_an_async_response_that_is_left_half_way_is_no_failure(slots_taken):
    response = await returning_later(response_of(AsyncBody(*PIECES)))()
    pieces = response.aiter_bytes()
    await anext(pieces)
    await pieces.aclose()
    assert (slots_taken(), failures()) == (0, 0)


async def test_a_body_that_is_an_async_generator_is_closed_where_its_reader_leaves():
    ended = []

    class Generating(AsyncBody):
        async def __aiter__(self):
            try:
                for piece in self.pieces:
                    yield piece
            finally:
                ended.append("generator")

        async def aclose(self):
            ended.append("body")

    response = await returning_later(response_of(Generating(*PIECES)))()
    pieces = response.aiter_bytes()
    await anext(pieces)
    await pieces.aclose()
    assert ended == ["generator", "body"]


def test_a_response_that_is_dropped_frees_its_slot_at_once_and_then_its_connection(slots_taken):
    closed = threading.Event()
    body = Body(*PIECES)
    body.close = closed.set
    response = returning_once(response_of(body))()
    del response
    assert slots_taken() == 0
    assert closed.wait(5)


async def test_an_async_response_that_is_dropped_frees_its_slot_at_once_and_then_its_connection(slots_taken):
    body = AsyncBody(*PIECES)
    ask = returning_once(response_of(body))
    response = ask()
    del response
    assert (slots_taken(), body.closed) == (0, 0)
    while not body.closed:  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0)
    assert body.closed == 1


def test_an_async_response_may_outlive_its_loop(slots_taken):
    body = AsyncBody(*PIECES)

    async def open_it():
        return returning_once(response_of(body))()

    response = asyncio.run(open_it())
    del response
    assert (slots_taken(), body.closed) == (0, 0)


def test_a_dropped_response_whose_body_holds_it_is_ended_when_it_is_collected(slots_taken):
    closed = threading.Event()
    body = Body(*PIECES)  # as that of httpx 0.28 does
    body.response = response_of(body)
    body.close = closed.set
    returning_once(body.response)()
    del body
    gc.collect()
    assert slots_taken() == 0
    assert closed.wait(5)


def test_a_response_that_was_read_has_nothing_left_to_close():
    body = Body(*PIECES)
    response = returning_once(response_of(body))()
    response.read()
    del response
    assert body.closed == 1


def returning_once(returned):
    """A decorated function that returns what it is given, and then does not hold it."""
    kept = [returned]

    @resilient(**OPTIONS)
    def ask():
        return kept.pop()

    return ask


def test_a_guard_sees_a_response_when_it_is_opened():
    class Seeing(Guard):
        kind = name = "seeing"
        seen = ()

        async def enter(self, call):
            return self

        def opened(self, response):
            self.seen += (response,)

        def recheck(self):
            raise AssertionError

        def observe(self, item):
            raise AssertionError

        def leave(self, result, error):
            self.seen += ("end",)

    guard, response = Seeing(), response_of(Body(b"four"), "text/plain")
    guarded(lambda: response, guard)().read()
    assert guard.seen == (response, "end")


def test_a_body_that_is_no_stream_of_httpx_is_a_type_error():
    with pytest.raises(TypeError, match=r"^str is neither"):
        held(response_of("body"))


# What a response used


@pytest.mark.parametrize("pieces", [[SSE], PIECES, [SSE.replace(b"\n", b"\r\n")]], ids=["whole", "in pieces", "CRLF"])
def test_the_usage_of_the_last_event_settles_the_budget(pieces):
    returning(response_of(Body(*pieces)))().read()
    assert tokens_used() == 50


def test_text_is_counted_where_no_usage_comes():
    returning(response_of(Body(*PIECES[:18])))("What is 2 + 2?").read()
    assert 1 <= tokens_used() < 20


def test_what_was_reserved_is_kept_where_no_text_came():
    returning(response_of(Body(b'data: {"choices": []}\n\n')))().read()
    assert tokens_used() == 100


@pytest.mark.parametrize(
    "event", [b"5", b"null", b'"text"', b"[1]", b'{"choices": 5}', b'{"choices": [{"delta": [0]}]}']
)
def test_an_event_of_another_shape_is_no_error(event):
    returning(response_of(Body(b"data: " + event + b"\n\n" + SSE)))().read()
    assert tokens_used() == 50


def test_the_usage_of_a_whole_json_body_settles_the_budget():
    returning(response_of(Body(USAGE[:9], USAGE[9:]), "application/json; charset=utf-8"))().read()
    assert tokens_used() == 50


def test_a_json_body_that_is_cut_off_keeps_what_was_reserved():
    returning(response_of(Body(USAGE[:9]), "application/json"))().read()
    assert tokens_used() == 100


def test_a_json_body_of_many_megabytes_keeps_what_was_reserved():
    returning(response_of(Body(*[b" " * 1024 * 1024] * 9, USAGE), "application/json"))().read()
    assert tokens_used() == 100


def test_a_body_of_another_type_keeps_what_was_reserved():
    returning(response_of(Body(USAGE), "audio/mpeg"))().read()
    assert tokens_used() == 100


def test_a_compressed_body_is_decoded_for_the_reader_and_keeps_what_was_reserved():
    response = returning(response_of(Body(gzip.compress(SSE)), **{"content-encoding": "gzip"}))()
    assert response.read() == SSE
    assert tokens_used() == 100


def test_a_response_that_is_there_as_a_whole_is_settled_at_once(slots_taken):
    request = httpx2.Request("POST", "https://example.test")
    response = httpx2.Response(200, json=json.loads(USAGE), request=request)
    assert returning(response)() is response
    assert (slots_taken(), tokens_used()) == (0, 50)


def test_a_response_that_was_closed_unread_keeps_what_was_reserved(slots_taken):
    response = response_of(Body(USAGE), "application/json")
    response.close()
    assert returning(response)() is response
    assert (slots_taken(), tokens_used()) == (0, 100)


def test_the_headers_of_a_whole_response_are_believed():
    request = httpx2.Request("POST", "https://example.test")
    response = httpx2.Response(200, headers={"x-ratelimit-remaining-requests": "7000"}, text="", request=request)
    returning(response)()
    assert get_all_resilience_stats()["rate_limiters"]["default"]["requests_in_window"] == 3_000


# What the service says in the middle of an answer

SERVER_ERRORS = [
    {"error": {"message": "The server had an error", "type": "server_error", "code": None}},
    {"error": {"message": "The server had an error", "code": "500"}},
    {"error": {"message": "The server had an error", "code": 503}},
    {"type": "error", "code": "server_error", "message": "The server had an error"},
    {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "It failed"}}},
]
OTHER_ERRORS = [
    {"error": "The server had an error"},
    {"error": {"message": "Too many requests", "code": "429"}},
    {"error": {"message": "Filtered", "code": "content_filter", "status": 400}},
    {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "Slow down"}}},
]


def end_with(event):
    """Read a stream with an event in its middle, after a call that failed."""

    @resilient(**OPTIONS)
    def ask(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ConnectionError):
        ask(ConnectionError())
    ask(response_of(Body(PIECES[0], *PIECES[1:9], b"\n\n", f"data: {json.dumps(event)}\n\n".encode()))).read()


@pytest.mark.parametrize("event", SERVER_ERRORS, ids=json.dumps)
def test_a_stream_in_which_the_server_tells_of_its_failure_counts_as_one(event, slots_taken):
    end_with(event)
    assert (failures(), slots_taken(), tokens_used()) == (2, 0, 0)


@pytest.mark.parametrize("event", OTHER_ERRORS, ids=json.dumps)
def test_a_stream_that_ends_with_another_error_says_nothing_of_the_service(event, slots_taken):
    end_with(event)
    assert (failures(), slots_taken(), tokens_used()) == (1, 0, 0)


@pytest.mark.parametrize("event", [{"error": None}, {"error": {}}, {"type": "response.completed", "response": {}}])
def test_an_event_without_an_error_is_no_failure(event):
    end_with(event)
    assert failures() == 0


def test_a_stream_that_is_dropped_after_an_error_counts_as_a_failure():
    ask = returning(response_of(Body(f"data: {json.dumps(SERVER_ERRORS[0])}\n\n".encode(), SSE)))
    pieces = (response := ask()).iter_raw()
    next(pieces)
    del pieces, response, ask
    gc.collect()
    assert failures() == 1


# Generators


def spell(word="four"):
    heard = yield word[0]
    while heard:
        heard = yield heard
    yield from word[1:]
    return "spelt"


async def spell_later(word="four"):
    heard = yield word[0]
    while heard:
        heard = yield heard
    for letter in word[1:]:
        yield letter


def fail():
    yield "f"
    raise ConnectionError


async def fail_later():
    yield "f"
    raise ConnectionError


async def fail_at_once():
    raise ConnectionError
    yield


def test_a_generator_that_is_returned_stays_one_and_holds_its_slot(slots_taken):
    generator = returning(spell())()
    assert inspect.isgenerator(generator)
    assert slots_taken() == 1
    assert (next(generator), generator.send("x"), list(generator)) == ("f", "x", ["o", "u", "r"])
    assert slots_taken() == 0


def test_a_generator_that_is_returned_runs_when_it_is_read():
    started = []
    generator = returning(started.append(each) or each for each in "four")()
    assert started == []
    assert list(generator) == list("four")


def test_a_generator_that_is_returned_returns_its_value():
    def read():
        return (yield from returning(spell())())

    reader = read()
    assert [next(reader) for _ in "four"] == list("four")
    with pytest.raises(StopIteration) as stop:
        next(reader)
    assert stop.value.value == "spelt"


def test_a_coroutine_function_may_return_a_generator(slots_taken):
    generator = asyncio.run(returning_later(spell())())
    assert slots_taken() == 1
    assert "".join(generator) == "four"
    assert slots_taken() == 0


async def test_an_async_generator_that_is_returned_stays_one_and_holds_its_slot(slots_taken):
    generator = await returning_later(spell_later())()
    assert inspect.isasyncgen(generator)
    assert slots_taken() == 1
    assert (await anext(generator), await generator.asend("x")) == ("f", "x")
    assert [letter async for letter in generator] == ["o", "u", "r"]
    assert slots_taken() == 0


async def test_a_plain_function_may_return_an_async_generator(slots_taken):
    generator = returning(spell_later())()
    assert slots_taken() == 1
    assert [letter async for letter in generator] == list("four")
    assert slots_taken() == 0


def test_a_returned_generator_that_fails_is_a_failure(slots_taken):
    with pytest.raises(ConnectionError):
        list(returning(fail())())
    assert (slots_taken(), failures()) == (0, 1)


@pytest.mark.parametrize("generator", [fail_later, fail_at_once])
async def test_a_returned_async_generator_that_fails_is_a_failure(generator, slots_taken):
    with pytest.raises(ConnectionError):
        async for _ in returning(generator())():
            pass
    assert (slots_taken(), failures()) == (0, 1)


@pytest.mark.parametrize("read", [0, 1])
def test_a_returned_generator_that_is_closed_or_dropped_frees_its_slot(read, slots_taken):
    closed, dropped = returning(spell())(), returning(spell())()
    for _ in range(read):
        next(closed)
        next(dropped)
    assert slots_taken() == 2
    closed.close()
    del dropped
    assert slots_taken() == 0


@pytest.mark.parametrize("read", [0, 1])
async def test_a_returned_async_generator_that_is_closed_frees_its_slot(read, slots_taken):
    generator = returning(spell_later())()
    for _ in range(read):
        await anext(generator)
    assert slots_taken() == 1
    await generator.aclose()
    del generator
    assert slots_taken() == 0


def test_in_disabled_what_is_returned_is_left_alone():
    generator = spell()
    with disabled():
        assert returning(generator)() is generator


def test_what_is_no_stream_is_left_alone():
    for returned in ("four", None, {}, [1], iter([1]), range(3), object()):
        assert held(returned) is returned
