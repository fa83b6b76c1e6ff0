"""The limits that are shared by name: the queue, the slots and the ledger of each.

A limit belongs to no event loop: all threads and loops of the process share it. Who waits is served first come, first
served within a priority, whatever its size. aiolimiter's bucket keeps calls apart; the windows of the quota are the
ledger's, since a bucket of aiolimiter 1.3.0 lets a full bucket through on top of its rate, serves the smallest amount
first, and belongs to one loop. Behind a ledger that keeps to every window a bucket of the same size is never the one
that is full, so there is none for requests and tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from resilience_kit import events
from resilience_kit.errors import RateLimitTimeoutError, ResilienceError
from resilience_kit.events import (
    Admitted,
    Answered,
    QuotaRelaxed,
    QuotaTightened,
    RateLimited,
    Waiting as WaitingEvent,
    WaitRefused,
    emit,
    tell,
)
from resilience_kit.forking import new_lock
from resilience_kit.layers import Call, Passage
from resilience_kit.queueing import SHORTEST_WAIT, Place, Queue
from resilience_kit.quota_ledger import QuotaLedger, Sent, WindowLedger
from resilience_kit.quota_lessons import Correction, rules_of
from resilience_kit.rate_limit_parameters import RateLimitConfiguration, RateLimitStatistics, effective_parameters
from resilience_kit.registry import Registry
from resilience_kit.response_times import ResponseTimes
from resilience_kit.server_advice import ServerAdvice, advice_from_error, advice_from_result, is_rate_limit
from resilience_kit.spacing import Spacing
from resilience_kit.waiting import now

if TYPE_CHECKING:
    from resilience_kit.fleet.fleet_ledger import FleetLedger

# A call with a max_wait looks at so many ahead of it, half a millisecond's worth: if each of thousands looked at all,
# an event loop would stand still for minutes. One that would wait longer for those behind them hears of it later.
_MOST_LOOKED_AT = 500
# Seconds between two looks at whether the store has answered, where a caller's patience has ended.
_FOR_AN_ANSWER = 0.002


class Ticket(Place, Passage):
    """One call's place in the queue, and then its slot."""

    __slots__ = ("call", "is_answered", "is_timed", "limit", "sent", "tokens")

    def __init__(self, limit: "RateLimit", call: Call, tokens: int, is_timed: bool) -> None:  # noqa: FBT001 - as fast as can be
        self.limit = limit
        self.call = call
        self.tokens = tokens
        self.sent: Sent | None = None
        self.is_answered = False
        # whether somebody wants to know how long its answer takes
        self.is_timed = is_timed

    def opened(self, response: Any, /) -> None:
        """Believe what the server says of its limits."""
        advice = advice_from_result(response)
        if advice is not None:
            self.limit.answered(self, advice)
        if self.limit.measures:
            self.limit.took_its_time(self)

    def observe(self, item: Any, /) -> None:
        """Take a stream's first item for the answer: the others come as fast as the reader takes them."""
        if self.limit.measures:
            self.limit.took_its_time(self)

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        """Give the slot back."""
        try:
            # before the slot goes to the next in the queue, who must hear of it too
            if error is None:
                self.opened(result)
                if self.is_timed and self.sent is not None:
                    tell(Answered, self.limit.name, (now() - self.sent.at,))
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
        rules = rules_of(values["adaptive"])
        # whether it matters how long answers take
        self.measures = "latency" in rules
        self._response_times = ResponseTimes(self._max_concurrent)
        self._spacing = self._new_spacing()
        self._lock = new_lock()
        self._queue: Queue[Ticket] = Queue(self._look, self._period)
        self._in_flight = 0
        own = WindowLedger(values["requests_per_minute"], self._tokens_per_period, self._period, rules)
        self._fleet = self._joined(own)
        self._ledger: QuotaLedger = own if self._fleet is None else self._fleet
        # why calls in the queue were refused, until they wake
        self._refusals: dict[Ticket, ResilienceError] = {}
        # What nobody heard of when it was admitted, as it is counted here.
        self._unheard_calls = 0
        self._unheard_tokens = 0
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
                max_concurrent=self._response_times.limit,
                paused=int(self._response_times.is_paused),
                waiting=len(self._queue),
                requests_in_window=requests,
                requests_per_minute=values["requests_per_minute"],
                tokens_in_window=tokens,
                tokens_per_minute=self._tokens_per_period,
                period=self._period,
                calls_admitted=self._unheard_calls,
                tokens_admitted=self._unheard_tokens,
            )
        self._take_back()
        return statistics

    def reset(self) -> None:
        """Forget what was sent; calls that are under way keep their slots."""
        with self._lock:
            self._ledger.reset()
            self._response_times = ResponseTimes(self._max_concurrent)
            self._spacing = self._new_spacing()
            self._unheard_calls = self._unheard_tokens = 0
            self._serve()
        self._take_back()

    def pause(self, *, paused: bool = True) -> None:
        """Let new calls wait, or go on; those that are under way go on either way. A reset ends a pause."""
        with self._lock:
            if paused:
                self._response_times.pause()
            else:
                self._response_times.resume()
                self._serve()
        self._take_back()

    def seconds_until_served(self, tokens: int) -> float:
        """Seconds until a call of so many tokens would start, after those that wait now; infinite if it never fits.

        Its priority is 0. It takes longer where a slot has to become free: nobody knows when calls end.
        """
        with self._lock:
            seconds = self._look_ahead(tokens, self._queue.ahead(now()))
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
        is_heard = events.is_heard(Admitted)
        ticket = Ticket(self, call, tokens, is_heard or events.are_answers_timed)
        with self._lock:
            if not self._queue.lookouts:
                self._start(ticket, call.now())
            if ticket.sent is not None and not is_heard:
                self._unheard_calls += 1
                self._unheard_tokens += tokens
        if ticket.sent is None:
            return self._wait(ticket, priority, max_wait)
        try:
            if self._returned:
                self._take_back()
            if is_heard:
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
            self._queue.join(ticket)
        try:
            with self._lock:
                due = self._serve()
                ahead = self._queue.ahead(ticket.turn) - 1
                known_wait = 0.0 if max_wait is None else self._least_wait(ticket.tokens, max(ahead, 0))
            if self._returned:
                self._take_back()
            waited = 0.0
            if ticket.sent is None:
                if max_wait is not None and known_wait > max_wait:
                    raise self._refusal(known_wait, max_wait, ticket.tokens)
                tell(WaitingEvent, self.name, (due, ticket.tokens, ahead))
                while True:
                    if max_wait is None:
                        await ticket.waiter.wait(None)
                    else:
                        await self._wait_at_most(ticket, max_wait, arrived + max_wait)
                    if self._fleet is None or self._may_be_sent(self._fleet, ticket):
                        break
                self._tell_news()
                ticket.call.recheck()
                waited = now() - arrived
            tell(Admitted, self.name, (waited, ticket.tokens))
        except BaseException:
            # also cancellation, and an interrupt that comes while a listener hears of the call
            self.release(ticket, sent=False)
            raise
        return ticket

    async def _wait_at_most(self, ticket: Ticket, max_wait: float, deadline: float) -> None:
        while ticket.sent is None and ticket not in self._refusals:
            left = deadline - now()
            if left <= 0 and self._fleet is not None and self._fleet.is_asking(deadline):
                # the way to the store and back is no wait for a slot
                with self._lock:
                    if ticket.sent is None:
                        ticket.waiter = ticket.call.waiting.waiter()
                left = _FOR_AN_ANSWER
            if left > 0:
                await ticket.waiter.wait(max(left, SHORTEST_WAIT))
                continue
            seconds = self._seconds_left(ticket)
            if ticket in self._refusals:
                continue
            if ticket.sent is None:
                raise self._refusal(seconds, max_wait, ticket.tokens)

    def _may_be_sent(self, fleet: "FleetLedger", ticket: Ticket) -> bool:
        """Whether a call that was woken may be sent; if it woke too late, it is back in the queue, where it was.

        Raises:
            ResilienceError: The fleet refused it.
        """
        refusal = self._refusals.pop(ticket, None)
        if refusal is not None:
            raise refusal
        with self._lock:
            sent = ticket.sent
            if sent is None or not fleet.is_late(sent):
                return True
            self._in_flight -= 1
            self._ledger.give_back(sent)
            ticket.sent = None
            ticket.waiter = ticket.call.waiting.waiter()
            self._queue.join(ticket)
            self._serve()
        self._take_back()
        return ticket.sent is not None

    def release(self, ticket: Ticket, *, sent: bool) -> None:
        """Give a slot or a place in the queue back, and the quota as well if nothing was sent. Never blocks."""
        if sent and ticket.sent is not None and self._lock.acquire(False):
            # most calls end like this, and need not go the long way
            try:
                self._in_flight -= 1
                if self._fleet is not None:
                    self._fleet.freed()
                if self._queue.lookouts:
                    self._serve()
            finally:
                self._lock.release()
        else:
            self._returned.append((ticket, sent))
        if self._returned:
            self._take_back()

    def answered(self, ticket: Ticket, advice: ServerAdvice) -> None:
        """Take the server's word where it is the stricter one, for all callers of the name."""
        self._learn(self._ledger.answered, ticket, advice)

    def refused(self, ticket: Ticket, advice: ServerAdvice) -> None:
        """Learn from the server's refusal of a call, for all callers of the name."""
        emit(RateLimited(name=self.name, retry_after=advice.retry_after))
        self._learn(self._ledger.refused, ticket, advice)

    def _learn(self, learn: Callable[[ServerAdvice, Sent, float], None], ticket: Ticket, advice: ServerAdvice) -> None:
        with self._lock:
            if ticket.sent is not None:
                learn(advice, ticket.sent, now())
            news = self._ledger.news()
        self._take_back()
        self._tell(news)

    def took_its_time(self, ticket: Ticket) -> None:
        """Note how long an answer took, once: it decides on how many may be under way."""
        if ticket.is_answered or ticket.sent is None:
            return
        ticket.is_answered = True
        # As in _take_back(), the garbage collector may be here while its thread has the lock. One answer less to look
        # at is no loss.
        if not self._lock.acquire(blocking=False):
            return
        try:
            before = self._response_times.limit
            has_moved = self._response_times.observe(now() - ticket.sent.at)
            limit = self._response_times.limit
        finally:
            self._lock.release()
        self._take_back()
        if has_moved:
            self._tell([Correction("latency", requests=limit, relaxes=limit > before)])

    def _tell_news(self) -> None:
        with self._lock:
            news = self._ledger.news()
        self._take_back()
        self._tell(news)

    def _tell(self, news: list[Correction]) -> None:
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

    def _start(self, ticket: Ticket, current: float) -> float | None:
        """Start a call if it may start now. Returns the seconds until it may, 0 if it did; None if it needs a slot."""
        if self._in_flight >= self._response_times.limit:
            return None
        due = self._ledger.seconds_until_fits(ticket.tokens, current)
        if due is None:
            return None
        if self._spacing is not None:
            due = max(due, self._spacing.seconds_until_room())
        if due <= 0:
            self._in_flight += 1
            if self._spacing is not None:
                self._spacing.fill()
            ticket.sent = self._ledger.commit(ticket.tokens, current)
        return due

    def _serve(self) -> float | None:
        """Start those at the head of the queue that may start. Returns the seconds until the next may, as _start()."""
        while self._queue.lookouts:
            ticket = self._queue.head
            if not ticket.waiter.is_gone:
                current = now()
                due = self._start(ticket, current)
                if ticket.sent is None and (self._fleet is None or not self._is_refused(self._fleet, ticket)):
                    if due is not None:
                        self._queue.set_alarm(current, due)
                    elif self._fleet is not None and not self._is_held_back:
                        self._ask(self._fleet, ticket)
                    return due
                ticket.waiter.wake()
            self._queue.leave(ticket)
        return None

    @property
    def _is_held_back(self) -> bool:
        """Whether slow answers keep calls from starting, so that what the store would grant is of no use."""
        return self._in_flight >= self._response_times.limit < self._max_concurrent

    def _is_refused(self, fleet: "FleetLedger", ticket: Ticket) -> bool:
        refusal = fleet.refusal(ticket.tokens)
        if refusal is not None:
            self._refusals[ticket] = refusal
        return refusal is not None

    def _ask(self, fleet: "FleetLedger", ticket: Ticket) -> None:
        """Have the store asked for the head of the queue, and for those behind, where the head waits."""
        behind = (other.tokens for other in self._queue.first(_MOST_LOOKED_AT) if other is not ticket)
        wish = fleet.wish(ticket.tokens, behind)
        if wish is not None:
            ticket.waiter.start(partial(fleet.ask, ticket.call.waiting, wish))

    def _joined(self, own: WindowLedger) -> "FleetLedger | None":
        """The fleet's ledger around this process's own, if there is a fleet that shares the name."""
        if rate_limits.is_private(self.name):
            return None
        # pydantic and redis are imported where they are needed
        from resilience_kit.settings import current_settings

        if current_settings().resilience_store is None:
            return None
        from resilience_kit.fleet.fleet_limits import joined

        return joined(
            self.name,
            own,
            max_concurrent=self._max_concurrent,
            min_interval=self._min_interval,
            lock=self._lock,
            in_flight=lambda: self._in_flight,
            look=self._look,
        )

    def _look(self) -> None:
        with self._lock:
            self._serve()
        self._take_back()

    def _take_back(self) -> None:
        while self._returned and self._lock.acquire(False):
            try:
                while self._returned:
                    ticket, sent = self._returned.popleft()
                    if ticket.sent is None:
                        self._queue.leave(ticket)
                        self._refusals.pop(ticket, None)
                        if self._fleet is not None and not self._queue.lookouts:
                            self._fleet.nobody_waits()
                        continue
                    self._in_flight -= 1
                    if not sent:
                        self._ledger.give_back(ticket.sent)
                    if self._fleet is not None:
                        self._fleet.freed()
                if self._queue.lookouts:
                    self._serve()
            finally:
                self._lock.release()

    def _seconds_left(self, ticket: Ticket) -> float | None:
        """Seconds until a call in the queue is served; None if the head of the queue needs a slot."""
        with self._lock:
            due = self._serve()
            if due is not None and ticket.sent is None and ticket not in self._refusals:
                # a fleet's line may be longer than what this process knows of it
                due = max(due, self._least_wait(ticket.tokens, self._queue.index(ticket)))
        self._take_back()
        return due

    def _least_wait(self, tokens: int, ahead: int) -> float:
        """As _look_ahead(), in a time that does not grow with the queue."""
        return self._look_ahead(tokens, min(ahead, _MOST_LOOKED_AT))

    def _look_ahead(self, tokens: int, ahead: int) -> float:
        """Seconds until a call with so many ahead of it is served, if slots were free: it takes no less."""
        ledger = self._ledger.copy()
        started = now()
        current = started + (self._spacing.seconds_until_room() if self._spacing is not None else 0.0)
        for other in self._queue.first(ahead):
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

    def _new_spacing(self) -> Spacing | None:
        return Spacing(1, self._min_interval) if self._min_interval > 0 else None


rate_limits: Registry[RateLimitConfiguration, RateLimit] = Registry(
    "rate limit", "rate_limiters", RateLimit, effective_parameters
)
