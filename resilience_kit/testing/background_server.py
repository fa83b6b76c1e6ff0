"""An ASGI application served on loopback by uvicorn's protocol, in a thread with an event loop of its own."""

import asyncio
import os
import socket
import struct
import threading
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

# An idle connection that the server closes just as the client uses it again would look like a fault.
_KEEP_ALIVE_SECONDS = 3600


class BackgroundServer:
    """Serves from construction until `close`.

    `uvicorn.Server` is not used: it waits for open streams when it ends, and looks every 0.1 s whether it should.

    Args:
        application: What to serve. Its scopes let `reset_connection` and `close_connection` work.
        host: An IPv4 address or a name.
        port: 0 takes a free one.

    Raises:
        OSError: If the address cannot be bound.
    """

    def __init__(self, application: ASGIApp, host: str, port: int) -> None:
        self._state = ServerState()
        self._config = uvicorn.Config(
            application,
            interface="asgi3",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        self._config.load()
        self._listener = socket.create_server((host, port))
        self.endpoint = f"http://{host}:{self._listener.getsockname()[1]}"
        # this kind, whatever the program's policy is: close() takes the listener from it
        self._loop = asyncio.SelectorEventLoop()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="azure-openai-simulator", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def close(self) -> None:
        """Break all connections, end all requests, and return when nothing is left; a forked child leaves all that."""
        if os.getpid() != self._process:
            # The thread is the parent's, and so is what the loop waits in: to close it would deafen the parent's.
            self._listener.close()
            return
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> asyncio.Server:
        return await self._loop.create_server(lambda: _Connection(self._config, self._state, {}), sock=self._listener)

    async def _end_all(self) -> None:
        # A closed asyncio.Server of Python 3.11 meets connections that are just being accepted with an AssertionError,
        # and leaves their sockets open: it is closed when there are none.
        self._loop.remove_reader(self._listener)
        # A connection that is just being accepted shows up only when the task that accepts it is done.
        while True:
            for connection in tuple(self._state.connections):
                connection.transport.abort()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if not others:
                break
            await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        self._server.close()
        await self._server.wait_closed()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


def reset_connection(scope: Scope) -> None:
    """Reset the request's connection, so that the client sees no response but an error."""
    transport = scope["state"]["transport"]
    # A linger time of 0 makes the kernel send RST instead of a polite end.
    # A client that has left already has no connection to reset.
    with suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def close_connection(scope: Scope) -> None:
    """End the request's connection after what was sent so far."""
    scope["state"]["transport"].close()


class _Connection(H11Protocol):
    """An HTTP connection that lets the application get at its transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        # asyncio does this only for sockets that were made with an explicit protocol. Without it each answer waits
        # 40 ms for the client's delayed acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
