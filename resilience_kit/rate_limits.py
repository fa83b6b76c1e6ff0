"""The limits that are shared by name: the queue, the slots and the ledger of each.

A limit belongs to no event loop: all threads and loops of the process share it. Who waits is served first come, first
served within a priority, whatever its size. aiolimiter's bucket keeps calls apart; the windows of the quota are the
ledger's, since a bucket of aiolimiter 1.3.0 lets a full bucket through on top of its rate, serves the smallest amount
first, and belongs to one loop. Behind a ledger that keeps to every window a bucket of the same size is never the one
that is full, so there is none for requests and tokens.
"""

import math
import threading
from asyncio import AbstractEventLoop
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import cast

from aiolimiter import AsyncLimiter

from resilience_kit.errors import RateLimitTimeoutError
from resilience_kit.events import Admitted, QuotaRelaxed, QuotaTightened, Waiting as WaitingEvent, WaitRefused, emit
from resilience_kit.layers import Call
from resilience_kit.quota_ledger import QuotaLedger, Sent, WindowLedger
from resilience_kit.registry import Registry, Value, effective, mode
from resilience_kit.server_advice import ServerAdvice
from resilience_kit.waiting import Waiter, now

PERIOD = 60.0
# Timers may fire a rounding error before the moment that they were set for: no wait is shorter than a microsecond.
_SHORTEST_WAIT = 1e-6
# Seconds by which a caller behind the first gives it precedence; its loop may stand still, or its thread be gone. They
# double with each look that a caller takes, or a long queue would be busy with looking; up to a period.
_FIRST_GRACE = 1.0


@dataclass(frozen=True, slots=True)
class RateLimitConfiguration:
    """What a decorator says of a limit; None for what it leaves to the settings."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    min_interval: float | None = None
    period: float | None = None


@dataclass(frozen=True, slots=True)
class RateLimitStatistics:
    """Where a limit stands now: counts of calls and tokens, and of its quota's window."""

    in_flight: int
    max_concurrent: int
    waiting: int
    requests_in_window: int
    requests_per_minute: int
    tokens_in_window: int
    tokens_per_minute: int
    period: float


class _Clock:
    time = staticmethod(now)
    is_closed = staticmethod(lambda: False)


class _Spacing(AsyncLimiter):
    """aiolimiter's bucket with room for one call, on the kit's clock.

    aiolimiter 1.3.0 binds a bucket to the loop that uses it first, and can wait for room but not say how long.
    """

    __slots__ = ()

    @property
    def _loop(self) -> AbstractEventLoop:
        return cast("AbstractEventLoop", _Clock)

    def seconds_until_room(self) -> float:
        return 0.0 if self.has_capacity() else (self._level + 1 - self.max_rate) * self.time_period / self.max_rate

    def fill(self) -> None:
        self._level += 1


# When a call comes to its turn, as if all priorities were one, and in which order it came.
_Place = tuple[float, int]
_place_of = attrgetter("place")


class Ticket:
    """One call's place in the queue, and then its slot."""

    __slots__ = ("grace", "place", "sent", "tokens", "waiter")

    def __init__(self, tokens: int, place: _Place) -> None:
        self.tokens = tokens
        self.place = place
        self.grace = _FIRST_GRACE
        self.sent: Sent | None = None
        self.waiter: Waiter | None = None

    def is_granted(self) -> bool:
        """Whether it is a slot by now."""
        return self.sent is not None


class RateLimit:
    """The one limit of a name: its queue, its slots and its ledger."""

    def __init__(self, name: str, configuration: RateLimitConfiguration) -> None:
        self.name = name
        self.parameters = effective_parameters(configuration)
        values = {key: parameter.value for key, parameter in self.parameters.items()}
        self._period: float = values["period"]
        self._tokens_per_period: int = values["tokens_per_minute"]
        self._max_concurrent: int = values["max_concurrent"]
        self._min_interval: float = values["min_interval"]
        self._ledger: QuotaLedger = WindowLedger(values["requests_per_minute"], self._tokens_per_period, self._period)
        self._spacing = self._new_spacing()
        self._lock = threading.Lock()
        self._order = count()
        self._queue: list[Ticket] = []
        self._in_flight = 0
        # Who set a timer for the moment when the head of the queue fits.
        self._timekeeper: Ticket | None = None
        self._timekeeper_waits_for_slot = False
        # Slots on their way back. The garbage collector may drop a stream while its thread holds the lock, so
        # whoever gives a slot back leaves it here, and whoever can have the lock takes it in.
        self._returned: deque[tuple[Ticket, bool]] = deque()

    def statistics(self) -> RateLimitStatistics:
        """Where the limit stands now."""
        with self._lock:
            requests, tokens = self._ledger.used(now())
            values = {key: parameter.value for key, parameter in self.parameters.items()}
            statistics = RateLimitStatistics(
                in_flight=self._in_flight,
                max_concurrent=self._max_concurrent,
                waiting=len(self._queue),
                requests_in_window=requests,
                requests_per_minute=values["requests_per_minute"],
                tokens_in_window=tokens,
                tokens_per_minute=self._tokens_per_period,
                period=self._period,
            )
        self._take_back()
        return statistics

    def reset(self) -> None:
        """Forget what was sent; calls that are under way keep their slots."""
        with self._lock:
            self._ledger.reset()
            self._spacing = self._new_spacing()
            self._serve()
        self._take_back()

    def seconds_until_served(self, tokens: int) -> float:
        """Seconds until a call of so many tokens would start, after those that wait now; infinite if it never fits.

        Its priority is 0. It takes longer where a slot has to become free: nobody knows when calls end.
        """
        with self._lock:
            seconds = self._look_ahead(Ticket(tokens, (now(), next(self._order))))
        self._take_back()
        return seconds

    async def acquire(self, call: Call, tokens: int, priority: float, max_wait: float | None) -> Ticket:
        """Wait for a slot and for quota.

        Raises:
            RateLimitTimeoutError: The wait is known to be longer than `max_wait`, or has become so, or has no end.
        """
        if tokens > self._tokens_per_period:
            raise self._refusal(math.inf, max_wait, tokens)
        ahead, known_wait, due = 0, 0.0, None
        with self._lock:
            arrived = now()
            # A step of priority is worth a period of waiting, so that no priority waits for ever.
            ticket = Ticket(tokens, (arrived + priority * self._period, next(self._order)))
            if not self._queue and self._has_slot() and self._seconds_until_fits(tokens, arrived) <= 0:
                self._admit(ticket, arrived)
            else:
                # raises where there is no event loop of asyncio, and so comes first
                waiter = call.waiting.waiter()
                insort(self._queue, ticket, key=_place_of)
                due = self._serve()
                if not ticket.is_granted():
                    ticket.waiter = waiter
                    due = self._patience(ticket, due)
                    ahead = self._index(ticket)
                    known_wait = 0.0 if max_wait is None else self._look_ahead(ticket)
        try:
            if self._returned:
                self._take_back()
            waited = 0.0
            if ticket.waiter is not None:
                if max_wait is not None and known_wait > max_wait:
                    raise self._refusal(known_wait, max_wait, tokens)
                emit(WaitingEvent(name=self.name, seconds=due, tokens=tokens, ahead=ahead))
                await self._wait(ticket, ticket.waiter, due, max_wait, arrived)
                self._tell_news()
                call.recheck()
                waited = now() - arrived
            emit(Admitted(name=self.name, waited=waited, tokens=tokens))
        except BaseException:
            # also an interrupt that comes while a listener hears of the call
            self.release(ticket, sent=False)
            raise
        return ticket

    def release(self, ticket: Ticket, *, sent: bool) -> None:
        """Give a slot or a place in the queue back, and the quota as well if nothing was sent. Never blocks."""
        self._returned.append((ticket, sent))
        self._take_back()

    def answered(self, ticket: Ticket, advice: ServerAdvice) -> None:
        """Take the server's word where it is the stricter one, for all callers of the name."""
        with self._lock:
            if ticket.sent is not None:
                self._ledger.answered(advice, ticket.sent, now())
        self._take_back()
        self._tell_news()

    def refused(self, ticket: Ticket, advice: ServerAdvice) -> None:
        """Learn from the server's refusal of a call, for all callers of the name."""
        with self._lock:
            if ticket.sent is not None:
                self._ledger.refused(advice, ticket.sent, now())
        self._take_back()
        self._tell_news()

    def _tell_news(self) -> None:
        with self._lock:
            news = self._ledger.news()
        self._take_back()
        for correction in news:
            event = QuotaRelaxed if correction.relaxes else QuotaTightened
            emit(
                event(
                    name=self.name,
                    reason=correction.reason,
                    seconds=correction.seconds,
                    requests=correction.requests,
                    tokens=correction.tokens,
                )
            )

    async def _wait(
        self, ticket: Ticket, waiter: Waiter, due: float | None, max_wait: float | None, arrived: float
    ) -> None:
        deadline = math.inf if max_wait is None else arrived + max_wait
        while not ticket.is_granted():
            seconds = min(math.inf if due is None else due, deadline - now())
            await waiter.wait(
                None if seconds == math.inf else max(seconds, _SHORTEST_WAIT), for_another_call=due is None
            )
            with self._lock:
                due = self._patience(ticket, self._serve())
            self._take_back()
            if not ticket.is_granted() and now() >= deadline:
                raise self._refusal(due, max_wait, ticket.tokens)

    def _patience(self, ticket: Ticket, due: float | None) -> float | None:
        """Seconds after which a waiting call looks after the queue: the head in time, others if it has not by then."""
        if self._timekeeper is ticket:
            return due
        if mode.skips_waiting:
            return None
        grace = min(ticket.grace, self._period)
        ticket.grace *= 2
        return (due or 0.0) + grace

    def _serve(self) -> float | None:
        """Serve the queue from its head. Returns the seconds until the next one fits; None if it needs a slot."""
        due: float | None = None
        while self._queue:
            ticket = self._queue[0]
            if ticket.waiter is None or not ticket.waiter.is_dead:
                if not self._has_slot():
                    due = None
                    break
                current = now()
                due = self._seconds_until_fits(ticket.tokens, current)
                if due > 0:
                    break
                self._admit(ticket, current)
            del self._queue[0]
        head = self._queue[0] if self._queue else None
        has_new_task = head is not self._timekeeper or (due is not None and self._timekeeper_waits_for_slot)
        self._timekeeper, self._timekeeper_waits_for_slot = head, due is None
        if has_new_task and head is not None and head.waiter is not None:
            head.waiter.wake()
        return due

    def _has_slot(self) -> bool:
        return self._in_flight < self._max_concurrent

    def _seconds_until_fits(self, tokens: int, current: float) -> float:
        due = self._ledger.seconds_until_fits(tokens, current)
        return due if self._spacing is None else max(due, self._spacing.seconds_until_room())

    def _admit(self, ticket: Ticket, current: float) -> None:
        self._in_flight += 1
        if self._spacing is not None:
            self._spacing.fill()
        ticket.sent = self._ledger.commit(ticket.tokens, current)
        if ticket.waiter is not None:
            ticket.waiter.wake()

    def _take_back(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    ticket, sent = self._returned.popleft()
                    if ticket.sent is None:
                        index = self._index(ticket)
                        # the place of a caller whose loop was closed is gone already
                        if ticket in self._queue[index : index + 1]:
                            del self._queue[index]
                        continue
                    self._in_flight -= 1
                    if not sent:
                        self._ledger.give_back(ticket.sent)
                if self._queue:
                    self._serve()
            finally:
                self._lock.release()

    def _index(self, ticket: Ticket) -> int:
        """How many are ahead of a call in the queue."""
        return bisect_left(self._queue, ticket.place, key=_place_of)

    def _look_ahead(self, ticket: Ticket) -> float:
        """Seconds until a call is served, in the queue yet or not, if slots were free: it takes no less."""
        ledger = self._ledger.copy()
        started = now()
        current = started + (self._spacing.seconds_until_room() if self._spacing is not None else 0.0)
        for other in self._queue:
            if other.place >= ticket.place:
                break
            current += ledger.seconds_until_fits(other.tokens, current)
            ledger.commit(other.tokens, current)
            current += self._min_interval
        return current + ledger.seconds_until_fits(ticket.tokens, current) - started

    def _refusal(self, wait: float | None, max_wait: float | None, tokens: int) -> RateLimitTimeoutError:
        seconds = None if wait == math.inf else wait
        emit(WaitRefused(name=self.name, seconds=seconds, max_wait=max_wait))
        if wait == math.inf:
            text = (
                f"a call of {tokens} tokens never fits into {self._tokens_per_period} per {self._period:g} s: "
                "shorten the prompt, lower max_tokens, or raise tokens_per_minute"
            )
        elif wait is None:
            text = f"no slot was free within max_wait={max_wait:g} s: raise max_wait or max_concurrent"
        else:
            text = f"the wait is {wait:.2f} s more, and max_wait={max_wait:g} s: raise max_wait, or send less"
        return RateLimitTimeoutError(f"rate limit {self.name!r}: {text}", name=self.name, retry_after=seconds)

    def _new_spacing(self) -> _Spacing | None:
        return _Spacing(1, self._min_interval) if self._min_interval > 0 else None


def effective_parameters(configuration: RateLimitConfiguration) -> dict[str, Value]:
    """What a limit is made of, from what was declared and from the settings."""
    interval = effective(configuration.min_interval, setting="min_request_interval_ms")
    if interval.source != "argument":
        interval = Value(interval.value / 1000, interval.source)
    return {
        "requests_per_minute": effective(configuration.requests_per_minute, setting="requests_per_minute"),
        "tokens_per_minute": effective(configuration.tokens_per_minute, setting="tokens_per_minute"),
        "max_concurrent": effective(configuration.max_concurrent, setting="max_concurrent_requests"),
        "min_interval": interval,
        "period": effective(configuration.period, PERIOD),
    }


rate_limits: Registry[RateLimitConfiguration, RateLimit] = Registry(
    "rate limit", "rate_limiters", RateLimit, effective_parameters
)
