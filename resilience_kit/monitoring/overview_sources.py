"""Where `resilience-kit top` and `stats` find the figures of other processes: a dashboard, a history or a store."""

import http.client
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.fleet.fleets import fleet_to_look_at
from resilience_kit.monitoring.alerts import Alerts
from resilience_kit.monitoring.fleet_samples import FleetSamples
from resilience_kit.monitoring.history import DEFAULT_PLACE, History
from resilience_kit.monitoring.measures import Sample, merge, merge_by
from resilience_kit.monitoring.overview import AlertRow, Overview, overview_from_json, overview_of
from resilience_kit.settings import current_settings

TOKEN_VARIABLE = "RESILIENCE_DASHBOARD_TOKEN"  # noqa: S105 - the name of a variable, not a token
Read = Callable[[], Overview]

_DEADLINE = 5.0
_LARGEST_ANSWER = 10_000_000
_MINUTE, _DAY = 60.0, 86_400.0
# How far back rules are looked at first: their longest times are some minutes.
_LOOK_BACK = 900.0
_NOT_ALL_TOLD = 2
# How often the day's counts are read again: most of it is what it was.
_DAY_EVERY = 5.0
_HOW_TO = f"""\
There is nothing to look at: the figures are in the processes that make the calls. Do one of these:
  - run a dashboard in the program (or mount it), and say --url http://127.0.0.1:8766 here (with its token, if it has
    one, in {TOKEN_VARIABLE});
  - have the program keep a history, and say --history with its file here, or come to its folder;
  - set RESILIENCE_STORE, in the program and here: the figures of the whole fleet are in the store."""


@contextmanager
def open_source(*, url: str | None = None, history: str | None = None, process: str | None = None) -> Iterator[Read]:
    """Find the figures of other processes: of a dashboard or a history if one is named, else of the store.

    Where no store is set either, a history of the usual name in the current folder will do.

    Args:
        url: A running dashboard's, under which it has its page.
        history: The place of a history: a file, or a URL of SQLAlchemy's.
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
    elif history is not None:
        yield history_reader(history, process=process)
    elif current_settings().resilience_store is not None:
        with fleet_reader(process=process) as read:
            yield read
    elif Path(DEFAULT_PLACE).exists():
        yield history_reader(DEFAULT_PLACE, process=process)
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


# A history


def history_reader(place: str, *, process: str | None = None, clock: Callable[[], float] = time.time) -> Read:
    """What reads the newest figures of a history, at each call; counts are those of the last day.

    Args:
        place: A file, or a URL of SQLAlchemy's (extra `history`).
        process: The process that is meant. Default: all.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: SQLAlchemy cannot use the URL, or it is not installed.
    """
    try:
        history = History(place)
    except ImportError as error:
        raise ConfigurationError(f"--history: {error}") from error
    firing = _watcher()
    day: Sample | None = None
    day_read_at, read_until = -math.inf, clock() - _LOOK_BACK

    def read() -> Overview:
        nonlocal day, day_read_at, read_until
        now = clock()
        source = f"the history {history.place}, counts of the last 24 hours"
        unread = _of_process(history.read(min(read_until, now - _MINUTE), now + 1), process)
        alerts, read_until = firing(unread), now - _MINUTE
        recent = [sample for sample in unread if sample.at > now - _MINUTE]
        if not recent:
            last = max(_of_process(history.read(now - _DAY, now + 1, resolution=60), process), key=_at, default=None)
            if last is None:
                whom = f" of the process {process!r}" if process else ""
                raise ResilienceError(f"{history.place} holds nothing{whom} of the last day: is the program running?")
            recent, source = [last], f"{source}; nothing since then: is the program running?"
        if day_read_at <= now - _DAY_EVERY:
            minutes = history.read(now - _DAY, now + 1, resolution=3_600)
            day = merge(_of_process(minutes, process) or recent)
            day_read_at = now
        return overview_of(recent, day, source=source, alerts=alerts)

    return read


# A fleet


@contextmanager
def fleet_reader(*, process: str | None = None) -> Iterator[Read]:
    """What reads the figures of all processes that share the store of the settings, at each call.

    Args:
        process: The process that is meant. Default: all.

    Raises:
        ConfigurationError: No store is set, or the extra `fleet` is not installed.
    """
    fleet = fleet_to_look_at(deadline=_DEADLINE)
    if fleet is None:
        raise ConfigurationError("RESILIENCE_STORE is not set")
    samples, place = FleetSamples(fleet), fleet.connection.place
    firing = _watcher()

    def read() -> Overview:
        told = [it for it in samples.read() if process in (None, it.process)]
        recent = [sample for it in told for sample in it.samples]
        if not recent:
            whom = "no process" if process is None else f"no process {process!r}"
            raise ResilienceError(
                f"{whom} tells its figures to the store at {place}: does the program run a Sampler with "
                "FleetSamples().add, and with this store and prefix?"
            )
        source = f"the fleet at {place}, counts since each process began to tell"
        total, alerts = merge(it.total for it in told), firing(recent)
        # who has ended tells nothing; clocks may differ
        return overview_of(recent, total, source=source, alerts=alerts, silence=math.inf)

    try:
        yield read
    finally:
        fleet.close()


# Both


def _watcher() -> Callable[[Iterable[Sample]], tuple[AlertRow, ...]]:
    """What looks at samples by the rules that are on without a word, and gives the alerts that fire."""
    alerts = Alerts(deliver=())
    looked_at = 0.0

    def firing(samples: Iterable[Sample]) -> tuple[AlertRow, ...]:
        nonlocal looked_at
        seconds = merge_by(samples, 1.0)
        # the others of the fleet may not have told of the newest seconds yet
        for sample in seconds[:-_NOT_ALL_TOLD]:
            if sample.at > looked_at:
                looked_at = sample.at
                alerts.take(sample)
        found = (it for it in alerts.current() if it.state == "firing")
        return tuple(AlertRow(it.name, it.rule, it.severity, it.text, it.since) for it in found)

    return firing


def _of_process(samples: Iterable[Sample], process: str | None) -> list[Sample]:
    return [sample for sample in samples if process is None or sample.process == process]


def _at(sample: Sample) -> float:
    return sample.at
