"""Responses as ASGI applications: good ones, paced ones, and those that no well-behaved server would give."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from resilience_kit.testing.background_server import close_connection, reset_connection
from resilience_kit.testing.wire_errors import WireError

_ResultT = TypeVar("_ResultT")


def error_response(error: WireError, headers: dict[str, str]) -> ASGIApp:
    """Answer with an error, and these headers beside its own."""
    return JSONResponse(error.body, error.status, {**headers, **error.headers})


def paced_response(
    pieces: Sequence[bytes],
    headers: dict[str, str],
    media_type: str,
    *,
    delay: float = 0.0,
    cut_after: int | None = None,
) -> ASGIApp:
    """Answer piece by piece.

    Args:
        pieces: The body, at least one piece.
        headers: The response's headers.
        media_type: What the pieces are.
        delay: Seconds before each piece.
        cut_after: Break the connection after so many pieces, at the latest before the last; None sends all.
    """

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        body = _paced(scope, pieces, delay, None if cut_after is None else min(cut_after, len(pieces) - 1))
        await StreamingResponse(body, headers=headers, media_type=media_type)(scope, receive, send)

    return respond


async def reset(scope: Scope, receive: Receive, send: Send) -> None:
    """Reset the connection instead of answering."""
    reset_connection(scope)
    await _client_left(receive)


async def never_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Keep the connection open until the client leaves."""
    await _client_left(receive)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, _ResultT]) -> _ResultT | None:
    """Return what the work returns; None, the work cancelled, if the client leaves first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _client_left(receive: Receive) -> None:
    # The request's body has been read, so that nothing else can come.
    await receive()


async def _paced(scope: Scope, pieces: Sequence[bytes], delay: float, cut_at: int | None) -> AsyncIterator[bytes]:
    for index, piece in enumerate(pieces):
        await asyncio.sleep(delay)
        if index == cut_at:
            close_connection(scope)
            # To return would end the body properly; the response cancels this once the connection is gone.
            await asyncio.Event().wait()
        yield piece
