"""What is seen of a scenario from outside of the kit: what each call came to, and what its function did and when."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from resilience_kit.circuits import circuits
from resilience_kit.rate_limits import RateLimit, rate_limits
from resilience_kit.token_budgets import token_budgets

_SERVER_ERROR, _REQUEST_TIMEOUT, _TOO_MANY = 500, 408, 429
# A trial may come this much too soon: the model looks at the clock a little later than the kit does.
_CLOCK = 0.001


class Death(BaseException):
    """What a call dies of: neither an error nor a cancellation, as SystemExit, which a loop would not survive."""


@dataclass(slots=True)
class Ending:
    """What a call came to: an answer, or an error that the plan allows it to end in."""

    number: int
    answer: str | None = None
    error: BaseException | None = None

    def __str__(self) -> str:
        return "answers" if self.error is None else type(self.error).__name__


class CircuitModel:
    """What state a circuit must be in, worked out from how the calls of its function ended, one after the other.

    It is well-defined where all calls run in one event loop: a call's outcome is counted in the step in which its
    function ends.
    """

    def __init__(self, threshold: int, recovery: float, successes: int, trials: int, now: Any) -> None:
        self.state = "CLOSED"
        self.failures = 0
        self.successes = 0
        self.problems: list[str] = []
        self._epoch = 0
        self._trials = 0
        self._open_until = 0.0
        self._bounds = threshold, recovery, successes, trials
        self._now = now

    @property
    def may_be_tried(self) -> bool:
        """Whether an open circuit may let a trial through by now."""
        return self._now() >= self._open_until - _CLOCK

    def begin(self) -> int:
        """Take note that the function is called; returns what its end is to be told with."""
        if self.state == "OPEN":
            if not self.may_be_tried:
                self.problems.append(f"sent {self._open_until - self._now():.3f} s before the circuit may be tried")
            self._move("HALF_OPEN")
        if self.state == "HALF_OPEN":
            self._trials += 1
            if self._trials > self._bounds[3]:
                self.problems.append(f"{self._trials} trials under way at once, of {self._bounds[3]}")
        return self._epoch

    def end(self, epoch: int, error: BaseException | None) -> None:
        """Take note of how a call of the function ended."""
        if epoch != self._epoch:
            return
        self._trials -= self.state == "HALF_OPEN"
        if error is None or isinstance(error, GeneratorExit):
            self._succeed()
        elif is_failure(error):
            self._fail()

    def _succeed(self) -> None:
        self.failures = 0
        if self.state == "HALF_OPEN":
            self.successes += 1
            if self.successes >= self._bounds[2]:
                self._move("CLOSED")

    def _fail(self) -> None:
        self.failures += 1
        if self.state == "HALF_OPEN" or self.failures >= self._bounds[0]:
            self._move("OPEN")
            self._open_until = self._now() + self._bounds[1]

    def _move(self, state: str) -> None:
        self.state = state
        self.failures = self.successes = self._trials = 0
        self._epoch += 1


def is_failure(error: BaseException) -> bool:
    """Whether an error says that the service is ill: no connection, no answer in time, or an error of the server's."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= _SERVER_ERROR or error.status_code == _REQUEST_TIMEOUT
    return isinstance(error, openai.APIConnectionError | httpx2.TransportError)


def is_refusal(error: BaseException | None) -> bool:
    """Whether the server refused a request for its rate: it counts as a request then, and is charged no tokens."""
    return isinstance(error, openai.APIStatusError) and error.status_code == _TOO_MANY


def number_of(call: Any) -> int:
    """The number of a call as the kit carries it: in its order, or in what a client sends as the user; -1 without."""
    number = getattr(call.args[0], "number", None) if call.args else None
    return int(call.kwargs.get("user", -1)) if number is None else number


@dataclass(slots=True)
class Witness:
    """The record of one scenario.

    Attributes:
        endings: What each call came to, by its number.
        cancelled: The numbers of the calls that were cancelled.
        began: When the function of a call was called, once for each attempt.
        tokens_began: The tokens that each of those is charged: by the plan, and none where it was refused.
        last_errors: The error that a call's own function ended in the last time.
        errors: All errors that the functions of a call raised.
        used: Tokens that the answers say that they used, by agent.
        admitted: When the kit let calls go that were sent, and their tokens: its decision, not its counters.
        decided: When the kit last let each call go.
        ended_badly: How many functions ended in anything but an answer or an error response.
        failures: How many ended in what is a failure of the service's.
        problems: What was wrong on the way.
        model: The circuit's model, where there is one.
        say: Told at once of each function that is called.
    """

    now: Any
    model: CircuitModel | None = None
    endings: dict[int, Ending] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    began: list[float] = field(default_factory=list)
    tokens_began: list[int] = field(default_factory=list)
    last_errors: dict[int, BaseException] = field(default_factory=dict)
    errors: dict[int, list[BaseException]] = field(default_factory=lambda: defaultdict(list))
    decided: dict[int, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    admitted: list[tuple[float, int]] = field(default_factory=list)
    ended_badly: int = 0
    failures: int = 0
    problems: list[str] = field(default_factory=list)
    say: Any = lambda *values: None
    _lock: Any = field(default_factory=threading.Lock)

    @contextmanager
    def function(self, number: int, tokens: int = 0):
        """Stand around the body of a decorated function, as its outermost part."""
        with self._lock:
            attempt = len(self.began)
            self.began.append(self.now())
            self.tokens_began.append(tokens)
            self.say("began", self.began[-1], tokens, self.decided.get(number, self.began[-1]))
            self.last_errors.pop(number, None)
        epoch = self.model.begin() if self.model is not None else 0
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            with self._lock:
                self.last_errors[number] = raised
                self.errors[number].append(raised)
                self.failures += is_failure(raised)
                self.ended_badly += not isinstance(raised, openai.APIStatusError)
                if is_refusal(raised):
                    self.tokens_began[attempt] = 0
            raise
        finally:
            if self.model is not None:
                self.model.end(epoch, error)

    def use(self, agent: str, tokens: int) -> None:
        """Take note of an answer's usage."""
        with self._lock:
            self.used[agent] += tokens

    def let_go(self) -> None:
        """Hold no frame of a function any more."""
        for errors in self.errors.values():
            for error in errors:
                without_frames(error)

    @contextmanager
    def watching_admissions(self):
        """Note when each call that was sent had been let go.

        The moment is the kit's own, since it alone knows when it decided; that a decision stands behind each call that
        was sent is checked against what the functions saw.
        """
        original, original_start = RateLimit.release, RateLimit._start

        def start(limit: RateLimit, ticket: Any, current: float) -> float | None:
            due = original_start(limit, ticket, current)
            if ticket.sent is not None:
                self.decided[number_of(ticket.call)] = ticket.sent.at
            return due

        def release(limit: RateLimit, ticket: Any, *, sent: bool) -> None:
            if sent and ticket.sent is not None:
                refused = is_refusal(self.last_errors.get(number_of(ticket.call)))
                self.admitted.append((ticket.sent.at, 0 if refused else ticket.tokens))
            original(limit, ticket, sent=sent)

        RateLimit.release, RateLimit._start = release, start
        try:
            yield
        finally:
            RateLimit.release, RateLimit._start = original, original_start


def clock() -> float:
    """Seconds on the running loop's clock, else on the monotonic one."""
    loop = asyncio._get_running_loop()
    return time.monotonic() if loop is None else loop.time()


def held() -> Iterable[str]:
    """Say what the kit still holds for calls."""
    for name, limit in rate_limits.items().items():
        statistics = limit.statistics()
        if statistics.in_flight or statistics.waiting:
            yield f"left: {statistics.in_flight} slots and {statistics.waiting} waiters of the limit {name!r}"
    for name, budget in token_budgets.items().items():
        statistics = budget.statistics()
        if statistics.tokens_reserved or statistics.usd_reserved:
            yield f"left: {statistics.tokens_reserved} tokens reserved in the budget {name!r}"
    for name, circuit in circuits.items().items():
        if circuit.statistics().trials_in_flight:
            yield f"left: {circuit.statistics().trials_in_flight} trials of the circuit {name!r}"


def without_frames(error: BaseException) -> BaseException:
    """Let go of what an error keeps alive: a stream in a frame is not dropped as long as its traceback is held.

    Nor is a call that waits in a loop that is closed, as long as the response is: it has the connections of its client.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        vars(link).pop("response", None)
        link = link.__cause__ or link.__context__
    return error
