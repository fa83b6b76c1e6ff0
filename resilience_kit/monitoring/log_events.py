"""Events as structlog lines on stdlib loggers: `resilience_kit.rate_limiting` and its kin.

Quiet at INFO while all is well: what is part of normal pacing is DEBUG, what mends itself INFO, what loses a call
or needs a look WARNING. A line holds names and figures only.
"""

import logging
from collections.abc import MutableMapping
from dataclasses import asdict
from functools import cache
from typing import Any

from resilience_kit import events

_LIMITS = logging.getLogger("resilience_kit.rate_limiting")
_RETRIES = logging.getLogger("resilience_kit.retrying")
_CIRCUITS = logging.getLogger("resilience_kit.circuit_breaking")
_BUDGETS = logging.getLogger("resilience_kit.token_budgeting")
_FORECASTS = logging.getLogger("resilience_kit.forecast")
_FLEET = logging.getLogger("resilience_kit.fleet")

_LINES: dict[type[events.Event], tuple[logging.Logger, int, str]] = {
    events.Waiting: (_LIMITS, logging.DEBUG, "waiting"),
    events.Admitted: (_LIMITS, logging.DEBUG, "admitted"),
    events.Answered: (_LIMITS, logging.DEBUG, "answered"),
    events.RateLimited: (_LIMITS, logging.INFO, "rate-limited"),
    events.WaitRefused: (_LIMITS, logging.WARNING, "refused"),
    events.QuotaTightened: (_LIMITS, logging.INFO, "tightened"),
    events.QuotaRelaxed: (_LIMITS, logging.INFO, "relaxed"),
    events.Retrying: (_RETRIES, logging.INFO, "retrying"),
    events.RetriesRecovered: (_RETRIES, logging.INFO, "recovered"),
    events.RetriesExhausted: (_RETRIES, logging.WARNING, "given up"),
    events.CircuitOpened: (_CIRCUITS, logging.WARNING, "opened"),
    events.CircuitHalfOpened: (_CIRCUITS, logging.INFO, "half-opened"),
    events.CircuitClosed: (_CIRCUITS, logging.INFO, "closed"),
    events.CircuitRefused: (_CIRCUITS, logging.WARNING, "refused"),
    events.BudgetSettled: (_BUDGETS, logging.DEBUG, "settled"),
    events.BudgetWaiting: (_BUDGETS, logging.INFO, "waiting"),
    events.BudgetRefused: (_BUDGETS, logging.WARNING, "refused"),
    events.Truncated: (_BUDGETS, logging.INFO, "truncated"),
    events.PeakExpected: (_FORECASTS, logging.WARNING, "peak-expected"),
    events.StoreLost: (_FLEET, logging.WARNING, "store-lost"),
    events.StoreRejoined: (_FLEET, logging.INFO, "store-rejoined"),
}

# A library adds no output of its own: without logging set up, nothing is printed.
logging.getLogger("resilience_kit").addHandler(logging.NullHandler())


def wants(kind: type[events.Event]) -> bool:
    """Whether events of a type are logged now."""
    line = _LINES.get(kind)
    return line is not None and line[0].isEnabledFor(line[1])


def log(event: events.Event) -> None:
    """Log an event; subscribed when the package is imported."""
    if wants(type(event)):
        write(*_LINES[type(event)], asdict(event))


def write(logger: logging.Logger, level: int, text: str, fields: dict[str, Any]) -> None:
    """Write a line with its fields to a logger."""
    _structured(logger).log(level, text, **fields)


@cache
def _structured(logger: logging.Logger) -> Any:
    """A structlog logger with processors of its own, so that the user's structlog.configure() is left alone."""
    import structlog

    return structlog.wrap_logger(logger, processors=[_to_stdlib], wrapper_class=structlog.stdlib.BoundLogger)


def _to_stdlib(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    """A line to read, with the fields beside it in `extra` for handlers that want data.

    Values are written with repr(), so that a name with a newline cannot forge a line.
    """
    event = fields.pop("event")
    text = " ".join([event, *(f"{name}={_short(value)!r}" for name, value in fields.items())])
    return ("%s", text), {"extra": {"resilience": {"event": event, **fields}}}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
