"""What the layers tell whoever listens: one frozen record a decision, delivered in one place.

A call goes down through the layers and back; events go sideways. No layer knows a listener, and no listener can
fail a call: what it raises is logged and dropped. No record holds anything of the user's but names and counts.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from resilience_kit.forking import new_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have: the name of the limit, circuit, agent or function that it is about."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Event):
    """A call waits for its turn: `seconds` until it fits if all goes well (None: until a slot is free)."""

    seconds: float | None
    tokens: int
    ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Event):
    """A call got its slot and its tokens, after `waited` seconds."""

    waited: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Event):
    """A call got its answer, or its stream was read to its end, `seconds` after it was admitted."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimited(Event):
    """The server refused a call with a 429, and wants no other for `retry_after` seconds (None: it did not say)."""

    retry_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitRefused(Event):
    """A call would wait longer than allowed: `seconds` is the known wait (None: it would never fit)."""

    seconds: float | None
    max_wait: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaTightened(Event):
    """The server said that there is less room than was known; for the reasons see `quota_lessons.Correction`."""

    reason: str
    seconds: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRelaxed(Event):
    """A part of what was tightened is tried again, or was disproved; never above the user's limit."""

    reason: str
    seconds: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying(Event):
    """Attempt number `attempt` failed, and another follows in `seconds`; `told` if the server named the wait."""

    attempt: int
    seconds: float
    reason: str
    error: str
    told: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesRecovered(Event):
    """A call succeeded after more than one attempt."""

    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesExhausted(Event):
    """A call gave up on an error that is otherwise retried; `reason` says which bound was reached."""

    attempts: int
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """A circuit opened after `failures` failures in a row, or because a trial failed; `error` says if elsewhere."""

    failures: int
    error: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitHalfOpened(Event):
    """A circuit lets trials through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """A circuit closed: `reason` is "recovered" or "reset", with "in another process" after it where it was there."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRefused(Event):
    """A call was refused without being sent; the next trial is `seconds` away."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSettled(Event):
    """An agent's call ended: what was reserved for it, what it used, and of which model; None for what is unknown."""

    reserved: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetWaiting(Event):
    """An agent's call waits `seconds` for its budget's next period."""

    seconds: float
    requested: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRefused(Event):
    """An agent's call would use more than is left, and was not sent."""

    requested: float
    remaining: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated(Event):
    """An agent's prompt was cut to its maximum."""

    tokens_before: int
    tokens_after: int
    removed_messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakExpected(Event):
    """In `seconds`, more `tokens` per minute are expected than the `quota` has; told once for each peak."""

    seconds: float
    tokens: int
    quota: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLost(Event):
    """The store of the fleet with the prefix `name` is gone or slow: until it is back, no call asks it."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRejoined(Event):
    """The store answers again, after `seconds` without it."""

    seconds: float


Listener = Callable[[Event], object]
# Takes the type of an event, its name and the values of its other fields, in their order.
Tally = Callable[[type[Event], str, tuple[Any, ...]], object]


@dataclass(frozen=True, slots=True, eq=False)
class _Subscription:
    listener: Listener
    wants: Callable[[type[Event]], bool] | None
    tally: Tally | None
    times_answers: bool = False


_log = logging.getLogger(__name__)
# Replaced, never changed: emit() may be walking it in another thread.
_listeners: tuple[_Subscription, ...] = ()
# Whether a tally counts how long answers take: else nobody looks at the clock for it.
are_answers_timed = False
_lock = new_lock()
_sole_listener: ContextVar[tuple[_Subscription] | None] = ContextVar("resilience_kit_sole_listener", default=None)


def subscribe(
    listener: Listener,
    *,
    wants: Callable[[type[Event]], bool] | None = None,
    tally: Tally | None = None,
    times_answers: bool = False,
) -> Callable[[], None]:
    """Have `listener` called with each event, in the thread or task that caused it.

    Args:
        listener: Takes an event; should return at once. What it raises is logged and dropped.
        wants: Says of a type whether its events matter now; it may be called with others too. Of what happens in
            every call, no record is made if nobody wants it.
        tally: Called in place of `listener` with the type, the name and the values of the other fields of what
            happens in every call. It must not raise, unlike the other two.
        times_answers: Whether the tally wants to hear of `Answered`, which is told where somebody listens. Default: it
            hears of it where another listener makes it known.

    Returns:
        A function that ends the subscription; calling it again does nothing.

    Example:
        >>> from resilience_kit.events import Retrying, subscribe
        >>> stop = subscribe(lambda event: print(event) if isinstance(event, Retrying) else None)
        >>> stop()
    """
    subscription = _Subscription(listener, wants, tally, times_answers)
    with _lock:
        _replace_listeners((*_listeners, subscription))

    def unsubscribe() -> None:
        with _lock:
            _replace_listeners(tuple(other for other in _listeners if other is not subscription))

    return unsubscribe


def _replace_listeners(listeners: tuple[_Subscription, ...]) -> None:
    global _listeners, are_answers_timed  # noqa: PLW0603 - the one place where they are kept, replaced as a whole
    _listeners = listeners
    are_answers_timed = any(subscription.times_answers for subscription in listeners)


@contextmanager
def heard_only_by(listener: Listener) -> Iterator[None]:
    """Deliver what happens inside, and in tasks started inside, to one listener: a simulation is nobody else's news."""
    token = _sole_listener.set((_Subscription(listener, None, None),))
    try:
        yield
    finally:
        _sole_listener.reset(token)


def emit(event: Event) -> None:
    """Deliver an event to all listeners."""
    for subscription in _sole_listener.get() or _listeners:
        _deliver(event, subscription.listener)


def tell(kind: type[Event], name: str, values: tuple[Any, ...]) -> None:
    """Emit an event that happens in every call, from its fields: its record is made only if somebody wants it."""
    event: Event | None = None
    for subscription in _sole_listener.get() or _listeners:
        if subscription.tally is not None:
            subscription.tally(kind, name, values)
            continue
        try:
            if subscription.wants is not None and not subscription.wants(kind):
                continue
        except Exception as error:  # noqa: BLE001 - as what a listener raises, it must not fail the call
            _warn_of(error, kind, subscription.listener)
            continue
        if event is None:
            names = [field.name for field in fields(kind)]
            event = kind(**dict(zip(names, (name, *values), strict=True)))
        _deliver(event, subscription.listener)


def is_heard(kind: type[Event]) -> bool:
    """Whether somebody wants a record of what happens in every call, and not only to count it."""
    # any() would make a generator, in every call
    for subscription in _sole_listener.get() or _listeners:
        if subscription.tally is not None:
            continue
        wants = subscription.wants
        try:
            if wants is None or wants(kind):
                return True
        except Exception as error:  # noqa: BLE001 - as what a listener raises, it must not fail the call
            _warn_of(error, kind, subscription.listener)
    return False


def _deliver(event: Event, listener: Listener) -> None:
    try:
        listener(event)
    except Exception as error:  # noqa: BLE001 - a listener may raise anything, and must not fail the call
        _warn_of(error, type(event), listener)


def _warn_of(error: Exception, kind: type[Event], listener: Listener) -> None:
    # by its name: the repr() of a partial holds its arguments, and another one may raise
    name = getattr(listener, "__qualname__", type(listener).__qualname__)
    _log.warning("listener %r raised %s on %s", name, type(error).__name__, kind.__name__)
