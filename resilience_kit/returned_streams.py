"""Streams that a function returns instead of being one: HTTP responses whose body is still on its way.

The openai SDK returns them for `stream=True`, `with_raw_response` and `with_streaming_response`, and httpx for
`send(stream=True)`. They are recognised by their classes' names, so that neither package has to be there. What is
watched is the response's body, through httpx's public `Response.stream`: whatever reads or closes it, `.stream()`
helpers included, comes by there.
"""

import _thread
import asyncio
import copy
import json
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience_kit.layers import Passage


@dataclass(frozen=True, slots=True)
class _Carrier:
    """A class of objects that have an HTTP response, or are one."""

    response_of: Callable[[Any], Any]
    is_copied: bool = False


# By the package and the name of a base class.
_CARRIERS = {
    # openai 3.57: a stream holds an iterator that holds the stream, so one that is dropped stays until the garbage
    # collector comes by. Nothing holds its copy, which shares all that it is made of.
    "openai.Stream": _Carrier(attrgetter("response"), is_copied=True),
    "openai.AsyncStream": _Carrier(attrgetter("response"), is_copied=True),
    "openai.BaseAPIResponse": _Carrier(attrgetter("http_response")),
    "openai.LegacyAPIResponse": _Carrier(attrgetter("http_response")),
    "httpx.Response": _Carrier(lambda response: response),
    "httpx2.Response": _Carrier(lambda response: response),
}

# Bytes of an event, or of a body that is one JSON text, that are kept until they are whole.
_LONGEST = 8 * 1024 * 1024

_closing: "set[asyncio.Task[None]]" = set()


class _ToldError(Exception):
    """An error that the service tells of in a stream, whose headers said that all was well."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told.get("message"))
        self.code, self.type = told.get("code"), told.get("type")
        self.status_code = 500 if "server_error" in (self.code, self.type) else self.code


class Stay:
    """The passages of a stream, innermost first, which last as long as it does.

    Where it is dropped and its reader's frame is never run again, the finalizer ends them.
    """

    __slots__ = ("__weakref__", "passages")

    def __init__(self) -> None:
        self.passages: list[Passage] = []

    def add(self, passage: "Passage") -> None:
        """Add the passage of a guard further out."""
        self.passages.append(passage)

    def observe(self, item: Any) -> None:
        """Show an item to all passages."""
        for passage in self.passages:
            passage.observe(item)

    def leave(self, error: BaseException | None = None, *, result: Any = None) -> None:
        """End all passages; a second time does nothing."""
        passages, self.passages = self.passages, []
        with ExitStack() as stack:
            for passage in reversed(passages):
                stack.callback(passage.leave, result, error)

    def hand_over(self) -> Any:
        """What the caller gets."""

    def __del__(self) -> None:
        self.leave()


class _OpenStay(Stay):
    """The stay of a response that is still to be read."""

    __slots__ = ("_returned",)

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self._returned = returned

    def add(self, passage: "Passage") -> None:
        super().add(passage)
        passage.opened(self._returned)

    def hand_over(self) -> Any:
        # The body that is part of what is returned holds this stay: without the reference back, dropping it is enough.
        returned, self._returned = self._returned, None
        return returned


class _CompleteStay(Stay):
    """The stay of a raw response that is there as a whole: over as soon as its usage is read."""

    __slots__ = ("_response", "_returned")

    def __init__(self, returned: Any, response: Any) -> None:
        super().__init__()
        self._returned = returned
        self._response = response

    def hand_over(self) -> Any:
        try:
            if _is_of_type(self._response, "json"):
                # httpx: a response that was closed before it was read has no content, and says so
                with suppress(RuntimeError):
                    _observe(self, self._response.content)
        finally:
            self.leave(result=self._returned)
        return self._returned


def is_carrier(kind: type) -> bool:
    """Whether objects of a class may be responses that are still to be read."""
    return _carrier_of(kind) is not None


def held(result: Any) -> Any:
    """The stay of a response that a function returned; anything else as it is."""
    kind: Any = type(result)
    carrier = _carrier_of(kind)
    if carrier is None:
        return result
    response = carrier.response_of(result)
    if response.is_closed:
        return _CompleteStay(result, response)
    returned = copy.copy(result) if carrier.is_copied else result
    stay = _OpenStay(returned)
    response.stream = body = _watched(response, stay)
    if carrier.is_copied:
        # What was returned may be such a copy itself, of a function that is decorated too: it is dropped with this one.
        weakref.finalize(returned, body.drop, result).atexit = False
    return stay


@lru_cache(maxsize=1_024)
def _carrier_of(kind: type) -> _Carrier | None:
    names = (f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in kind.__mro__)
    return next((_CARRIERS[name] for name in names if name in _CARRIERS), None)


class _Body:
    """A response's body, which tells the stay what goes by, and when it ends; its response is all that holds it."""

    def __init__(self, response: Any, stay: Stay) -> None:
        self._stream = response.stream
        self._stay = stay
        self._is_open = True
        self._is_done = False
        self._told: _ToldError | None = None
        is_plain = response.headers.get("content-encoding", "identity") == "identity"
        self._has_events = is_plain and _is_of_type(response, "event-stream")
        self._is_json = is_plain and _is_of_type(response, "json")
        self._unread = bytearray()

    @property
    def elapsed(self) -> Any:
        """What httpx2 asks its own body for when `Response.elapsed` is read."""
        return self._stream.elapsed

    def see(self, piece: bytes) -> None:
        """Look for events in a piece of the body; a compressed or a very long one is not looked into."""
        if not (self._has_events or self._is_json):
            return
        self._unread += piece
        if len(self._unread) > _LONGEST:
            self._has_events = self._is_json = False
            self._unread.clear()
        if self._has_events:
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    text = line.removeprefix(b"data:").strip()
                    self._is_done = self._is_done or text == b"[DONE]"
                    self._told = _error_in(_observe(self._stay, text)) or self._told

    def fail(self, error: BaseException) -> None:
        """End with an error, unless the answer was whole: openai 3.57 reads on for 0.1 s, and drops what is raised."""
        self._stay.leave(self._told if self._is_done else error)

    def close_unread(self) -> None:
        """Start to close the connection, whatever thread this is; RuntimeError where it is too late for that."""

    def drop(self, _origin: object = None) -> None:
        """End what nobody can read any more."""
        if self._is_open:
            self._is_open = False
            self._stay.leave(self._told)
            # the event loop is closed, or Python shuts down: the connection ends with it
            with suppress(RuntimeError):
                self.close_unread()

    def __del__(self) -> None:
        self.drop()

    def end(self) -> None:
        """Look at what is only understood as a whole."""
        if self._is_json:
            _observe(self._stay, self._unread)


class _SyncBody(_Body):
    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._stream:
                self.see(piece)
                yield piece
            self.end()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def close(self) -> None:
        self._is_open = False
        try:
            self._stream.close()
        finally:
            self._stay.leave(self._told)

    def close_unread(self) -> None:
        # The garbage collector may run while this thread holds the lock of httpcore's pool, which closing takes.
        _thread.start_new_thread(self._stream.close, ())


class _AsyncBody(_Body):
    def __init__(self, response: Any, stay: Stay) -> None:
        super().__init__(response, stay)
        self._loop = asyncio.get_running_loop()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        try:
            async for piece in pieces:
                self.see(piece)
                yield piece
            self.end()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def aclose(self) -> None:
        self._is_open = False
        try:
            await self._stream.aclose()
        finally:
            self._stay.leave(self._told)

    def close_unread(self) -> None:
        self._loop.call_soon_threadsafe(self._close_soon)

    def _close_soon(self) -> None:
        task = self._loop.create_task(self._stream.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)


def _watched(response: Any, stay: Stay) -> Any:
    """A body of the class that httpx demands of `Response.stream`."""
    for base in type(response.stream).__mro__:
        if base.__name__ in ("SyncByteStream", "AsyncByteStream"):
            return _body_class(base)(response, stay)
    raise TypeError(f"{type(response.stream).__name__} is neither a SyncByteStream nor an AsyncByteStream")


@lru_cache
def _body_class(base: type) -> type:
    return type("WatchedBody", (_SyncBody if base.__name__ == "SyncByteStream" else _AsyncBody, base), {})


def _is_of_type(response: Any, ending: str) -> bool:
    media_type: str = response.headers.get("content-type", "").partition(";")[0]
    return media_type.strip().endswith(ending)


def _observe(stay: Stay, text: bytes | bytearray) -> Any:
    try:
        item = json.loads(text)
    except ValueError:
        # "[DONE]", or a body that was cut off
        return None
    stay.observe(item)
    return item


def _error_in(event: Any) -> _ToldError | None:
    """The error that an event of chat completions or of responses tells of."""
    if not isinstance(event, dict):
        return None
    response = event.get("response")
    told = event.get("error") or (response.get("error") if isinstance(response, dict) else None)
    if not told and event.get("type") == "error":
        told = event
    return _ToldError(told if isinstance(told, dict) else {"message": told}) if told else None
