"""Where `resilience-kit top` and `stats` find the figures of other processes: a dashboard, a history or a store."""

import http.client
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.monitoring.overview import Overview, overview_from_json

TOKEN_VARIABLE = "RESILIENCE_DASHBOARD_TOKEN"  # noqa: S105 - the name of a variable, not a token
Read = Callable[[], Overview]

_DEADLINE = 5.0
_LARGEST_ANSWER = 10_000_000
_HOW_TO = f"""\
There is nothing to look at: the figures are in the processes that make the calls. Do one of these:
  - run a dashboard in the program (or mount it), and say --url http://127.0.0.1:8766 here (with its token, if it has
    one, in {TOKEN_VARIABLE});
  - have the program keep a history, and say --history with its file here;
  - set RESILIENCE_STORE, in the program and here: the figures of the whole fleet are in the store."""


@contextmanager
def open_source(*, url: str | None = None, history: Path | None = None, process: str | None = None) -> Iterator[Read]:
    """Find the figures of other processes: of a dashboard or a history if one is named, else of the store.

    Args:
        url: A running dashboard's, under which it has its page.
        history: The file of a history.
        process: The process that is meant. Default: all.

    Yields:
        A function that gives the figures of now, and raises `ResilienceError` while there are none.

    Raises:
        ConfigurationError: There is nothing to look at, or an argument cannot work.
    """
    if url is not None and history is not None:
        raise ConfigurationError("--url and --history: expected one of them")
    if url is not None:
        yield dashboard_reader(url, process=process)
    else:
        raise ConfigurationError(_HOW_TO)


# A dashboard


def dashboard_reader(url: str, *, process: str | None = None) -> Read:
    """What reads the figures of a running dashboard, at each call.

    Args:
        url: Where its page is; the token comes from RESILIENCE_DASHBOARD_TOKEN, and never is in a URL.
        process: The process that is meant. Default: all.

    Raises:
        ConfigurationError: The URL cannot be one of a dashboard.
    """
    where = _checked(url)
    place = f"{where.scheme}://{where.netloc}{where.path}"
    path = f"{where.path.rstrip('/')}/api/now"
    if process:
        path += f"?process={quote(process, safe='')}"

    def read() -> Overview:
        status, body = _get(where, path, place)
        if status == http.HTTPStatus.UNAUTHORIZED:
            raise ConfigurationError(f"{place} asks for a token, and not for this one: set {TOKEN_VARIABLE} to its own")
        if status != http.HTTPStatus.OK:
            raise ResilienceError(f"{place} answers {status}, which is not a dashboard's page: see what runs there")
        return overview_from_json(_parsed(body), source=f"the dashboard at {place}")

    return read


def _checked(url: str) -> SplitResult:
    try:
        where = urlsplit(url)
        _ = where.port  # which is read, and may not be a number, only now
    except ValueError:
        where = urlsplit("")
    if where.scheme not in ("http", "https") or not where.hostname or where.query or where.fragment:
        raise ConfigurationError("--url: expected http://host:port or https://host, and a path if it is mounted there")
    if where.username is not None or where.password is not None:
        raise ConfigurationError(f"--url: expected no user in it; a token is read from {TOKEN_VARIABLE}")
    return where


def _get(where: SplitResult, path: str, place: str) -> tuple[int, bytes]:
    """The answer to a request; no redirect is followed, so that the token goes nowhere else."""
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.hostname or "", where.port, timeout=_DEADLINE)
    token = os.environ.get(TOKEN_VARIABLE)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read(_LARGEST_ANSWER)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
    finally:
        connection.close()
    # out here, without the error, whose frames hold the token
    raise ResilienceError(f"{place} is not reached: {reason}. Is the dashboard running?")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
