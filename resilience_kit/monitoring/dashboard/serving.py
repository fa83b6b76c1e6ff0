"""Serving the dashboard alone, or from a thread of the program that it shows."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import uvicorn
from starlette.types import ASGIApp

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.dashboard.security import is_loopback

__all__ = ["PORT", "running", "serve"]

PORT = 8766
_HOST = "127.0.0.1"
TOKEN_VARIABLE = "RESILIENCE_DASHBOARD_TOKEN"  # noqa: S105 - the name of a variable, not a token
# Open streams end with the server: browsers come back to the next one.
_SECONDS_TO_FINISH = 1


def check_address(host: str, *, has_token: bool) -> None:
    """Refuse to listen where others could look.

    Args:
        host: The address to listen on.
        has_token: Whether a token is asked for.

    Raises:
        ConfigurationError: The address is not this machine's alone, and there is no token.
    """
    if not has_token and not is_loopback(host):
        raise ConfigurationError(
            f"{host} is reached from elsewhere, and there is no token. Set {TOKEN_VARIABLE} to one, such as that of "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'`, or listen on 127.0.0.1 and look through an "
            "SSH tunnel."
        )


def serve(app: ASGIApp, *, port: int = PORT, listener: socket.socket | None = None) -> None:
    """Serve an application until Ctrl-C.

    Args:
        app: What `create_app` made.
        port: The port of this machine to listen on.
        listener: A socket to listen on instead. One that others reach needs an application with a token.

    Raises:
        OSError: The port is taken.

    Example:
        >>> from resilience_kit.monitoring.dashboard import create_app, serve
        >>> serve(create_app())  # doctest: +SKIP
    """
    # uvicorn ends of the signal a second time, once it has finished
    with (
        suppress(KeyboardInterrupt),
        socket.create_server((_HOST, port)) if listener is None else nullcontext(listener) as listening,
    ):
        _server(app).run([listening])


@contextmanager
def running(app: ASGIApp, *, port: int = PORT) -> Iterator[str]:
    """Serve an application on this machine from a thread, for as long as the block lasts.

    Args:
        app: What `create_app` made.
        port: The port to listen on; 0 takes a free one.

    Yields:
        Its URL.

    Raises:
        OSError: The port is taken.

    Example:
        >>> from resilience_kit.monitoring.dashboard import create_app, running
        >>> with running(create_app(), port=0) as url:
        ...     print(url.startswith("http://127.0.0.1:"))
        True
    """
    # bound here, so that a port that is taken is this thread's error
    with socket.create_server((_HOST, port)) as listener:
        server = _server(app)
        thread = threading.Thread(target=server.run, args=([listener],), name="resilience-kit-dashboard", daemon=True)
        thread.start()
        try:
            yield f"http://{_HOST}:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def _server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            # who a client is decides what it may see: no header may say otherwise
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
        )
    )
