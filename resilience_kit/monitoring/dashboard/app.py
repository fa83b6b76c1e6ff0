"""The dashboard as an ASGI application: the page, its stream, its JSON, its buttons."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resilience_kit.circuit_breaking import reset_circuit_breakers
from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.dashboard.figures import RANGES, Figures
from resilience_kit.monitoring.dashboard.outlook import Outlook
from resilience_kit.monitoring.dashboard.security import HEADERS, LOOPBACK_NAMES, Guard, comes_from_own_page
from resilience_kit.monitoring.dashboard.sources import FleetProcesses, OwnProcess, Source
from resilience_kit.monitoring.dashboard.streaming import EventStream, Frames
from resilience_kit.monitoring.sampler import running_sampler
from resilience_kit.pausing import pause, resume
from resilience_kit.settings import current_settings

if TYPE_CHECKING:
    from resilience_kit.monitoring.alerts import Alerts
    from resilience_kit.monitoring.forecast import Forecaster
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.sampler import Sampler

# A button's or the login's request is a name or a token.
_LARGEST_BODY = 4_096
# What the login form needs is shown to all; none of it says anything of the program.
_FILES = ("dashboard.js", "charts.js", "drawing.js", "theme.js", "login.js", "dashboard.css", "uplot.js", "uplot.css")
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

Button = Callable[[str], None]
Handler = Callable[[Request], Awaitable[Response]]
_BUTTONS: dict[str, Button] = {"reset-circuit": reset_circuit_breakers, "pause": pause, "resume": resume}


def create_app(
    *,
    title: str = "resilience_kit",
    history: "History | None" = None,
    alerts: "Alerts | None" = None,
    forecaster: "Forecaster | None" = None,
    sampler: "Sampler | None" = None,
    controls: bool = False,
    token: str | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_NAMES,
) -> Starlette:
    """Make the dashboard, an ASGI application: mount it into your own, under any path, or serve it alone.

    Args:
        title: What the page is headed.
        history: Where days and weeks come from. Default: the page shows the last hour, from memory.
        alerts: Whose alerts the page shows. Default: open circuits only.
        forecaster: What expects the tokens to come. Default: none is shown.
        sampler: What takes the samples. Default: one of its own, which runs as long as the process.
        controls: Whether there are buttons that reset a circuit, and pause and resume a limit. They need a token.
        token: What those who may see the page must have; 16 characters or more. Default: being on this machine.
        allowed_hosts: Names that a Host header may have, without a port; addresses always may. "*" is any name and
            client: for an application that decides itself who may come.

    Returns:
        The application.

    Raises:
        ConfigurationError: The token is too short, or there are controls without one.

    Example:
        >>> from starlette.applications import Starlette
        >>> from resilience_kit.monitoring.dashboard import create_app
        >>> app = Starlette()
        >>> app.mount("/resilience", create_app(title="Answers"))
    """
    if controls and token is None:
        raise ConfigurationError("create_app(controls=True) needs a token: whoever sees the page could press buttons")
    figures = _figures(title, history, alerts, forecaster, sampler, has_controls=controls)
    return application_of(figures, Guard(token, allowed_hosts), has_controls=controls)


def application_of(figures: Figures, guard: Guard, *, has_controls: bool = False) -> Starlette:
    """The application that shows these figures to those whom the guard lets in."""
    pages = _Pages(figures, guard, _BUTTONS if has_controls else {})
    application = Starlette(
        routes=[
            Route("/", pages.index),
            Route("/page/{name}", pages.file),
            Route("/login", pages.log_in, methods=["POST"]),
            Route("/events", pages.known(pages.events)),
            Route("/api/now", pages.known(pages.now)),
            Route("/api/history", pages.known(pages.past)),
            Route("/api/{button}", pages.known(pages.press), methods=["POST"]),
        ]
    )
    # for a redirect, Starlette 1.10 decodes the query as UTF-8, and fails where it is not
    application.router.redirect_slashes = False
    application.add_middleware(_Guarded, guard=guard)
    return application


class _Pages:
    """What is answered to each kind of request."""

    def __init__(self, figures: Figures, guard: Guard, buttons: Mapping[str, Button]) -> None:
        self._figures = figures
        self._frames = Frames(figures.now)
        self._guard = guard
        self._buttons = buttons

    def known(self, handler: Handler) -> Handler:
        """A handler for those who may see the figures."""

        async def handle(request: Request) -> Response:
            if not self._guard.knows(request):
                return _refuse(401, "the token is missing", {"www-authenticate": "Bearer"})
            return await handler(request)

        return handle

    async def index(self, request: Request) -> Response:
        return _file("index.html") if self._guard.knows(request) else _file("login.html", 401)

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        return _file(name) if name in _FILES else _refuse(404, "there is no such file")

    async def log_in(self, request: Request) -> Response:
        if not comes_from_own_page(request):
            return _refuse(403, "only the login form logs in; programs send Authorization: Bearer")
        if not self._guard.is_token(str((await _body(request)).get("token", ""))):
            return _refuse(401, "this is not the token")
        response = Response(status_code=204)
        self._guard.let_in(request, response)
        return response

    async def now(self, request: Request) -> Response:
        text = await asyncio.to_thread(self._frames.latest, _process(request))
        return Response(text, media_type="application/json")

    async def past(self, request: Request) -> Response:
        name = request.query_params.get("range", "hour")
        if name not in RANGES:
            return _refuse(400, f"range: expected one of {', '.join(RANGES)}")
        return JSONResponse(await asyncio.to_thread(self._figures.past, name, _process(request)))

    async def events(self, request: Request) -> Response:
        if self._frames.is_full:
            return _refuse(503, "too many look at the moment", {"retry-after": "5"})
        return EventStream(self._frames, _process(request))

    async def press(self, request: Request) -> Response:
        button = self._buttons.get(request.path_params["button"])
        if button is None:
            return _refuse(404, "there is no such button")
        if not self._guard.may_change(request):
            return _refuse(403, "buttons need the token, pressed on the dashboard's own page")
        try:
            # it may tell a store
            await asyncio.to_thread(button, str((await _body(request)).get("name", "")))
        except ConfigurationError as error:
            return _refuse(404, str(error))
        return Response(status_code=204)


def _figures(
    title: str,
    history: "History | None",
    alerts: "Alerts | None",
    forecaster: "Forecaster | None",
    sampler: "Sampler | None",
    *,
    has_controls: bool,
) -> Figures:
    """The figures of the fleet where there is one, else of this process."""
    own = running_sampler() if sampler is None else sampler
    source: Source = OwnProcess(running_sampler if sampler is None else lambda: sampler)
    if current_settings().resilience_store is not None:
        from resilience_kit.monitoring.fleet_samples import FleetSamples

        fleet = FleetSamples()
        if sampler is None:
            own.add_sink(fleet.add)
        source = FleetProcesses(fleet)
    return Figures(
        title,
        source,
        history=history,
        sampler=own if isinstance(source, OwnProcess) else None,
        alerts=alerts,
        outlook=Outlook(history, forecaster),
        has_controls=has_controls,
    )


class _Guarded:
    """Refuses what may not come, and sends the security headers with all that is answered."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        answer: ASGIApp = self._guard.refusal(HTTPConnection(scope)) or self._app
        await answer(scope, receive, send_with_headers)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; empty where it is none, or too large."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            return {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _process(request: Request) -> str | None:
    return request.query_params.get("process") or None


def _file(name: str, status: int = 200) -> Response:
    return Response(_content(name), status, media_type=_KINDS[name.rpartition(".")[2]])


@cache
def _content(name: str) -> bytes:
    return resources.files(__package__).joinpath("page", name).read_bytes()


def _refuse(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)
