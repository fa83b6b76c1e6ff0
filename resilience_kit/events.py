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

__all__ = [
    "Admitted",
    "Answered",
    "BudgetRefused",
    "BudgetSettled",
    "BudgetWaiting",
    "CircuitClosed",
    "CircuitHalfOpened",
    "CircuitOpened",
    "CircuitRefused",
    "Event",
    "PeakExpected",
    "QuotaRelaxed",
    "QuotaTightened",
    "RateLimited",
    "RetriesExhausted",
    "RetriesRecovered",
    "Retrying",
    "StoreLost",
    "StoreRejoined",
    "Truncated",
    "WaitRefused",
    "Waiting",
    "subscribe",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have.

    Attributes:
        name: Of the limit, circuit, agent, store or function that it is about.
    """

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Event):
    """A call waits for its turn.

    Attributes:
        seconds: Seconds until it fits if all goes well; None until a slot is free, which nobody knows.
        tokens: What the call costs.
        ahead: How many wait before it.
    """

    seconds: float | None
    tokens: int
    ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Event):
    """A call got its slot and its tokens.

    Attributes:
        waited: Seconds that it waited.
        tokens: What the call costs.
    """

    waited: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Event):
    """A call got its answer, or its stream was read to its end.

    Attributes:
        seconds: Seconds since it was admitted.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimited(Event):
    """The server refused a call with a 429.

    Attributes:
        retry_after: Seconds for which it wants no other call; None if it did not say.
    """

    retry_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitRefused(Event):
    """A call would wait longer than allowed, and was not sent.

    Attributes:
        seconds: Seconds that it would wait; None if it would never fit, or if no slot was free.
        max_wait: Seconds that it was allowed to wait; None for no bound.
    """

    seconds: float | None
    max_wait: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaTightened(Event):
    """The server said that there is less room than was known; for the reasons see `quota_lessons.Correction`.

    Attributes:
        reason: The rule, by its name.
        seconds: Seconds, as the rule says.
        tokens: Tokens, as the rule says.
        requests: Requests, as the rule says.
    """

    reason: str
    seconds: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRelaxed(Event):
    """A part of what was tightened is tried again, or was disproved; never above the user's limit.

    Attributes:
        reason: The rule, by its name.
        seconds: Seconds, as the rule says.
        tokens: Tokens, as the rule says.
        requests: Requests, as the rule says.
    """

    reason: str
    seconds: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying(Event):
    """An attempt failed, and another follows.

    Attributes:
        attempt: The number of the one that failed, from 1 on.
        seconds: Seconds until the next one.
        reason: Why it is retried: "rate limit", "transient" or "retry_if".
        error: The error's type.
        told: Whether the server named the wait.
    """

    attempt: int
    seconds: float
    reason: str
    error: str
    told: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesRecovered(Event):
    """A call succeeded after more than one attempt.

    Attributes:
        attempts: How many it took.
    """

    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesExhausted(Event):
    """A call gave up on an error that is otherwise retried.

    Attributes:
        attempts: How many there were.
        reason: The bound that was reached: "max_retries", "max_retry_after", "max_elapsed" or "retry_budget".
        error: The error's type.
    """

    attempts: int
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """A circuit opened after failures in a row, or because a trial failed.

    Attributes:
        failures: How many there were.
        error: The last error's type, with "in another process" after it where it was there.
        seconds: Seconds until it lets a trial through.
    """

    failures: int
    error: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitHalfOpened(Event):
    """A circuit lets trials through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """A circuit closed.

    Attributes:
        reason: "recovered" or "reset", with "in another process" after it where it was there.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRefused(Event):
    """A call was refused by a circuit, and was not sent.

    Attributes:
        seconds: Seconds until the next trial.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSettled(Event):
    """An agent's call ended.

    Attributes:
        reserved: Tokens that were reserved for it; 0 without a budget.
        prompt_tokens: Tokens of its prompt, as the answer says, else as they were counted; 0 if neither is known.
        completion_tokens: Tokens of its answer, likewise.
        usd: What it cost in US dollars; None if no price is known.
        model: The model, as the answer names it, else the decorator's; None if no usage is known.
    """

    reserved: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetWaiting(Event):
    """An agent's call waits for its budget's next period.

    Attributes:
        seconds: Seconds until then.
        requested: What the call asked for, in `unit`.
        unit: "tokens" or "USD".
    """

    seconds: float
    requested: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRefused(Event):
    """An agent's call would use more than is left, and was not sent.

    Attributes:
        requested: What the call asked for, in `unit`.
        remaining: What is left, in `unit`.
        unit: "tokens" or "USD".
    """

    requested: float
    remaining: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated(Event):
    """An agent's prompt was cut to its maximum.

    Attributes:
        tokens_before: Tokens of the prompt as it was.
        tokens_after: Tokens of what was sent.
        removed_messages: How many messages were left out.
    """

    tokens_before: int
    tokens_after: int
    removed_messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakExpected(Event):
    """More tokens per minute are expected than the quota has; told once for each peak.

    Attributes:
        seconds: Seconds until then.
        tokens: Tokens per minute that are expected.
        quota: Tokens per minute that are allowed.
    """

    seconds: float
    tokens: int
    quota: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLost(Event):
    """The store of the fleet with the prefix `name` is gone or slow: until it is back, no call asks it.

    Attributes:
        error: What went wrong in one word, such as "TimeoutError".
    """

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRejoined(Event):
    """The store answers again.

    Attributes:
        seconds: Seconds without it.
    """

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
