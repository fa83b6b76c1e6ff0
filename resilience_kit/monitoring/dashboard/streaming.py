"""The figures once a second, to all who look: built once for them all, and not at all while nobody does."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from resilience_kit.forking import new_lock

_EVERY = 1.0
# A browser that takes this long to read a frame has stopped reading: it may come back.
_SLOWEST_READER = 10.0
# A server that ends waits for its open responses. Browsers come back at once, and their users see nothing of it.
_LONGEST_STREAM = 20.0
_COME_BACK_AFTER_MS = 250
# Each is an open connection: those that come later are told to try again.
_MOST_STREAMS = 64
# Frames of so many processes are kept, for the second in which they are new.
_MOST_FRAMES = 64


class Frames:
    """The newest figures of the whole fleet and of each process, as text that goes to any number of browsers.

    Args:
        build: Makes the figures of one process, or of all where it gets None. It may block.
    """

    def __init__(self, build: Callable[[str | None], dict[str, Any]]) -> None:
        self._build = build
        self._lock = new_lock()
        self._newest: dict[str | None, tuple[float, str]] = {}
        self.streams = 0

    def latest(self, process: str | None) -> str:
        """Figures that are less than a second old, built by the first who asks; blocks."""
        with self._lock:
            built, text = self._newest.get(process, (-_EVERY, ""))
            # browsers tick together, on the clock's full second, and a little apart
            if time.monotonic() - built < _EVERY * 0.9:
                return text
            text = json.dumps(self._build(process), separators=(",", ":"), allow_nan=False)
            if len(self._newest) >= _MOST_FRAMES:
                self._newest.clear()
            self._newest[process] = time.monotonic(), text
            return text

    @property
    def is_full(self) -> bool:
        """Whether as many look as may."""
        return self.streams >= _MOST_STREAMS


class EventStream(Response):
    """Server-sent events: a frame now, and one each second.

    There is no queue that could grow: a browser gets the newest frame when it has read the one before.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: Frames, process: str | None) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._frames = frames
        self._process = process

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until the browser leaves, stops reading, or has to come back."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        has_left = asyncio.ensure_future(_disconnect(receive))
        self._frames.streams += 1
        try:
            with suppress(TimeoutError, OSError):
                await self._send_frames(send, has_left)
        finally:
            self._frames.streams -= 1
            has_left.cancel()

    async def _send_frames(self, send: Send, has_left: "asyncio.Future[None]") -> None:
        ends = time.monotonic() + _LONGEST_STREAM
        prefix, sent = f"retry: {_COME_BACK_AFTER_MS}\n", ""
        while not has_left.done() and time.monotonic() < ends:
            frame = await asyncio.to_thread(self._frames.latest, self._process)
            if frame is not sent:
                body = f"{prefix}data: {frame}\n\n".encode()
                async with asyncio.timeout(_SLOWEST_READER):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            prefix, sent = "", frame
            await asyncio.wait({has_left}, timeout=_EVERY - time.time() % _EVERY)
        async with asyncio.timeout(_SLOWEST_READER):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
