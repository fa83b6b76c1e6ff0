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
from collections import deque
from collections.abc import Coroutine, Hashable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any, cast

from aiolimiter import AsyncLimiter
from sortedcontainers import SortedKeyList

from resilience_kit.errors import RateLimitTimeoutError
from resilience_kit.events import Admitted, QuotaTightened, Waiting as WaitingEvent, WaitRefused, emit
from resilience_kit.layers import Call, Passage
from resilience_kit.quota_ledger import Correction, QuotaLedger, WindowLedger
from resilience_kit.registry import Registry, Value, effective, mode
from resilience_kit.server_advice import ServerAdvice, advice_from_error, advice_from_result, is_rate_limit
from resilience_kit.waiting import Waiter, now

PERIOD = 60.0
# Timers may fire a rounding error before the moment that they were set for: no wait is shorter than a microsecond.
_SHORTEST_WAIT = 1e-6
# Seconds after which a loop or a thread in which callers wait looks after the queue, though its head is not there: the
# loop of the head may stand still, or its thread be gone. They double with each look, up to a period.
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


class _Lookout:
    """An event loop or a thread in which callers wait, and how many: it looks after the queue from time to time."""

    __slots__ = ("callers", "grace", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self.callers = 0
        self.grace = _FIRST_GRACE


class Ticket(Passage):
    """One call's place in the queue, and then its slot."""

    __slots__ = ("call", "granted_at", "limit", "lookout", "tokens", "turn", "waiter")

    # set while it is in the queue: `turn` is when it is due, as if all priorities were one
    turn: float
    waiter: Waiter
    lookout: _Lookout | None

    def __init__(self, limit: "RateLimit", call: Call, tokens: int) -> None:
        self.limit = limit
        self.call = call
        self.tokens = tokens
        self.granted_at: float | None = None

    def opened(self, response: Any, /) -> None:
        """Believe what the server says of its limits."""
        advice = advice_from_result(response)
        if advice is not None:
            self.limit.believe(advice)

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        """Give the slot back."""
        try:
            # before the slot goes to the next in the queue, who must hear of it too
            if error is None:
                self.opened(result)
            elif is_rate_limit(error):
                self.limit.refused(self, advice_from_error(error))
        finally:
            # a layer below may have refused the call
            self.limit.release(self, sent=self.call.is_sent)


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
        # Sorted by turn, and those of one turn as they came.
        self._queue: SortedKeyList[Ticket] = SortedKeyList(key=attrgetter("turn"))
        self._lookouts: dict[Hashable, _Lookout] = {}
        # Where and when the head of the queue is looked after next.
        self._alarm: tuple[Hashable, float] = (None, math.inf)
        self._in_flight = 0
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
            seconds = self._look_ahead(tokens, self._queue.bisect_key_right(now()))
        self._take_back()
        return seconds

    def acquire(
        self, call: Call, tokens: int, priority: float, max_wait: float | None
    ) -> Ticket | Coroutine[Any, Any, Ticket]:
        """Take a slot and quota: at once where nobody has to wait, else by awaiting what is returned.

        Raises:
            RateLimitTimeoutError: The wait is known to be longer than `max_wait`, or has become so, or has no end.
        """
        if tokens > self._tokens_per_period:
            raise self._refusal(math.inf, max_wait, tokens)
        ticket = Ticket(self, call, tokens)
        with self._lock:
            if not self._queue:
                self._start(ticket, now())
        if ticket.granted_at is None:
            return self._wait(ticket, priority, max_wait)
        try:
            if self._returned:
                self._take_back()
            emit(Admitted(name=self.name, waited=0.0, tokens=tokens))
        except BaseException:
            # an interrupt that comes while a listener hears of the call
            self.release(ticket, sent=False)
            raise
        return ticket

    async def _wait(self, ticket: Ticket, priority: float, max_wait: float | None) -> Ticket:
        # raises where there is no event loop of asyncio, and so comes first
        ticket.waiter = ticket.call.waiting.waiter()
        with self._lock:
            arrived = now()
            # A step of priority is worth a period of waiting, so that no priority waits for ever.
            ticket.turn = arrived + priority * self._period
            self._queue_up(ticket)
            due = self._serve()
            ahead = self._queue.bisect_key_right(ticket.turn) - 1
            known_wait = 0.0 if max_wait is None else self._look_ahead(ticket.tokens, max(ahead, 0))
        try:
            if self._returned:
                self._take_back()
            if ticket.granted_at is None:
                if max_wait is not None and known_wait > max_wait:
                    raise self._refusal(known_wait, max_wait, ticket.tokens)
                emit(WaitingEvent(name=self.name, seconds=due, tokens=ticket.tokens, ahead=ahead))
            deadline = math.inf if max_wait is None else arrived + max_wait
            while ticket.granted_at is None:
                left = deadline - now()
                if left <= 0:
                    raise self._refusal(self._seconds_left(ticket), max_wait, ticket.tokens)
                await ticket.waiter.wait(None if left == math.inf else max(left, _SHORTEST_WAIT))
            ticket.call.recheck()
            emit(Admitted(name=self.name, waited=now() - arrived, tokens=ticket.tokens))
        except BaseException:
            # also cancellation, and an interrupt that comes while a listener hears of the call
            self.release(ticket, sent=False)
            raise
        return ticket

    def release(self, ticket: Ticket, *, sent: bool) -> None:
        """Give a slot or a place in the queue back, and the quota as well if nothing was sent. Never blocks."""
        self._returned.append((ticket, sent))
        self._take_back()

    def believe(self, advice: ServerAdvice) -> None:
        """Take the server's word where it is the stricter one, for all callers of the name."""
        with self._lock:
            correction = self._ledger.believe(advice, now())
        self._take_back()
        self._tell([] if correction is None else [correction])

    def refused(self, ticket: Ticket, advice: ServerAdvice) -> None:
        """Learn from the server's refusal of a call, for all callers of the name."""
        with self._lock:
            sent_at = now() if ticket.granted_at is None else ticket.granted_at
            corrections = self._ledger.refused(advice, sent_at, now())
        self._take_back()
        self._tell(corrections)

    def _tell(self, corrections: list[Correction]) -> None:
        for correction in corrections:
            emit(
                QuotaTightened(
                    name=self.name,
                    reason=correction.reason,
                    seconds=correction.seconds,
                    requests=correction.requests,
                    tokens=correction.tokens,
                )
            )

    def _start(self, ticket: Ticket, current: float) -> float | None:
        """Start a call if it may start now. Returns the seconds until it may, 0 if it did; None if it needs a slot."""
        if self._in_flight >= self._max_concurrent:
            return None
        due = self._ledger.seconds_until_fits(ticket.tokens, current)
        if self._spacing is not None:
            due = max(due, self._spacing.seconds_until_room())
        if due <= 0:
            self._in_flight += 1
            self._ledger.commit(ticket.tokens, current)
            if self._spacing is not None:
                self._spacing.fill()
            ticket.granted_at = current
        return due

    def _serve(self) -> float | None:
        """Start those at the head of the queue that may start. Returns the seconds until the next may, as _start()."""
        while self._queue:
            ticket = self._queue[0]
            if not ticket.waiter.is_gone:
                current = now()
                due = self._start(ticket, current)
                if ticket.granted_at is None:
                    if due is not None:
                        self._set_alarm(ticket.waiter, current, due)
                    return due
                ticket.waiter.wake()
            self._leave_queue(ticket)
        return None

    def _queue_up(self, ticket: Ticket) -> None:
        self._queue.add(ticket)
        home = ticket.waiter.home
        lookout = self._lookouts.get(home)
        if lookout is None:
            lookout = self._lookouts[home] = _Lookout(ticket.waiter)
            self._look_again(lookout)
        lookout.callers += 1
        ticket.lookout = lookout

    def _leave_queue(self, ticket: Ticket) -> None:
        # a caller that is gone may have left already
        lookout, ticket.lookout = ticket.lookout, None
        if lookout is not None:
            self._queue.remove(ticket)
            lookout.callers -= 1
            if not lookout.callers:
                del self._lookouts[lookout.waiter.home]

    def _set_alarm(self, waiter: Waiter, current: float, due: float) -> None:
        """Have the home of the head of the queue serve it when it is due; an earlier alarm there does as well."""
        home, at = self._alarm
        if home is not waiter.home or at > current + due:
            self._alarm = waiter.home, current + due
            waiter.call_later(max(due, _SHORTEST_WAIT), partial(self._ring, self._alarm))

    def _ring(self, alarm: tuple[Hashable, float]) -> None:
        with self._lock:
            # another one that was set since is still to come
            if self._alarm is alarm:
                self._alarm = (None, math.inf)
                self._serve()
        self._take_back()

    def _look_again(self, lookout: _Lookout) -> None:
        # a test that skips its waits would skip this one before the head's
        if not mode.skips_waiting:
            lookout.waiter.call_later(min(lookout.grace, self._period), partial(self._look, lookout))
            lookout.grace *= 2

    def _look(self, lookout: _Lookout) -> None:
        with self._lock:
            if lookout.callers:
                self._serve()
            if lookout.callers:
                self._look_again(lookout)
        self._take_back()

    def _take_back(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    ticket, sent = self._returned.popleft()
                    if ticket.granted_at is None:
                        self._leave_queue(ticket)
                        continue
                    self._in_flight -= 1
                    if not sent:
                        self._ledger.give_back(ticket.tokens, ticket.granted_at)
                if self._queue:
                    self._serve()
            finally:
                self._lock.release()

    def _seconds_left(self, ticket: Ticket) -> float | None:
        """Seconds until a call in the queue is served; None if the head of the queue needs a slot."""
        with self._lock:
            due = self._serve()
            if due is not None:
                due = self._look_ahead(ticket.tokens, self._queue.index(ticket))
        self._take_back()
        return due

    def _look_ahead(self, tokens: int, ahead: int) -> float:
        """Seconds until a call with so many ahead of it is served, if slots were free: it takes no less."""
        ledger = self._ledger.copy()
        started = now()
        current = started + (self._spacing.seconds_until_room() if self._spacing is not None else 0.0)
        for other in islice(self._queue, ahead):
            current += ledger.seconds_until_fits(other.tokens, current)
            ledger.commit(other.tokens, current)
            current += self._min_interval
        return current + ledger.seconds_until_fits(tokens, current) - started

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
