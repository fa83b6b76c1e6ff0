"""What the soak calls: functions that fail as a service does, and the program's own books of each call.

Of 100 calls one meets a fault, the same one in each run. What `get_all_resilience_stats()` is to say of all calls, the
program counts itself: in the functions, which know how often they were called, and where the calls end.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import openai

from resilience_kit import agent, count_tokens, reset_circuit_breakers, resilient
from resilience_kit.errors import CircuitOpenError, RateLimitTimeoutError, TokenBudgetExceededError

# By section, name and counter, as in the statistics; what the kit does not count is in the section "program".
Books = Counter[tuple[str, str, str]]
Trouble = Literal["429", "500", "timeout", "connection reset", "insufficient_quota", "cancelled"]
Answer = dict[str, Any] | str

TROUBLES: tuple[Trouble, ...] = ("429", "500", "timeout", "connection reset", "insufficient_quota", "cancelled")
# One call in so many meets a fault, and one in so many of those a fault that lasts for all attempts.
FAULT_EVERY, _LASTS_EVERY = 100, 5
# One call in so many asks for more than there ever is.
_TOO_MUCH_EVERY, _TOO_MUCH = 1_000, 10**13
_ANSWER_TOKENS = 20
# The kit remembers what so many texts count, and forgets all at once when there are 10,000: its memory would go up and
# down by a MiB.
QUESTIONS = 8_000
_FAILURES_TO_OPEN = 3
# An outage lasts for so many calls, and there is one in so many.
_OUTAGE, _OUTAGE_EVERY = 10, 100
_CALLERS = 30

_REQUEST = httpx2.Request("POST", "https://soak.invalid/chat/completions")

# Quotas that hold nobody up, but slots for which callers queue. A window of a second keeps the ledger at the size that
# it has in a real program.
PERIOD = 1.0
STACK: Any = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "min_interval": 0,
    "period": PERIOD,
    "max_concurrent": 20,
    "max_retries": 3,
    "initial_backoff": 0,
    "failure_threshold": 1_000,
}
_BUDGET: Any = {"budget_tokens": 10**12}


@dataclass(slots=True, eq=False)
class Question:
    """One call: what it asks, what goes wrong with it, and what the function saw of it."""

    prompt: str
    max_tokens: int
    trouble: Trouble | None = None
    lasts: bool = False
    attempts: int = 0
    told_429: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def arrive(self) -> bool:
        """Fail as planned. Returns whether the caller is to leave instead."""
        self.attempts += 1
        if self.trouble is None or (self.attempts > 1 and not self.lasts):
            return False
        if self.trouble == "cancelled":
            return True
        self.told_429 += self.trouble == "429"
        raise _error(self.trouble)


def question(number: int) -> Question:
    """The question of a number, and what goes wrong with it."""
    fault, is_fault = divmod(number, FAULT_EVERY)
    too_much = number % _TOO_MUCH_EVERY == 1
    return Question(
        f"Question {number % QUESTIONS}: how many were sold?",
        _TOO_MUCH if too_much else _ANSWER_TOKENS,
        None if is_fault else TROUBLES[fault % len(TROUBLES)],
        lasts=fault // len(TROUBLES) % _LASTS_EVERY == _LASTS_EVERY - 1,
    )


def _error(trouble: Trouble) -> Exception:
    if trouble == "timeout":
        return openai.APITimeoutError(_REQUEST)
    if trouble == "connection reset":
        return ConnectionResetError("connection reset by peer")
    if trouble == "500":
        return openai.InternalServerError("it broke", response=httpx2.Response(500, request=_REQUEST), body=None)
    if trouble == "429":
        response = httpx2.Response(429, headers={"retry-after-ms": "1"}, request=_REQUEST)
        return openai.RateLimitError("too many requests", response=response, body=None)
    body = {"code": "insufficient_quota", "message": "You exceeded your current quota"}
    return openai.RateLimitError(str(body), response=httpx2.Response(429, request=_REQUEST), body=body)


def _answer(asked: Question) -> dict[str, Any]:
    usage = {"prompt_tokens": count_tokens(asked.prompt), "completion_tokens": asked.max_tokens - 1}
    return {"model": "gpt-4o", "usage": usage}


# What is called


@resilient("soak threads", agent="SoakThreads", **{**STACK, "max_concurrent": 3})
def ask(prompt: str, max_tokens: int, asked: Question) -> Answer:
    """Answer, with the usage or without it."""
    if asked.arrive():
        raise KeyboardInterrupt
    return _answer(asked) if len(prompt) % 2 else "some"


@resilient("soak tasks", agent="SoakTasks", shared=True, **STACK, **_BUDGET)
async def ask_later(prompt: str, max_tokens: int, asked: Question) -> Answer:
    """Answer in a moment; all event loops share the name."""
    leaves = asked.arrive()
    await asyncio.sleep(0)
    if leaves:
        asked.reached.set()
        await asyncio.get_running_loop().create_future()
    return _answer(asked)


@resilient("soak streams", agent="SoakStreams", **STACK, **_BUDGET)
def stream(prompt: str, max_tokens: int, asked: Question) -> Iterator[Any]:
    """Answer word by word; only the last item has the usage."""
    asked.arrive()
    yield from _words(asked)


@resilient("soak streams", agent="SoakStreams", **STACK, **_BUDGET)
async def stream_later(prompt: str, max_tokens: int, asked: Question) -> AsyncIterator[Any]:
    """Do the same, and let others run between the words."""
    asked.arrive()
    for item in _words(asked):
        yield item
        await asyncio.sleep(0)


def _words(asked: Question) -> Iterator[Any]:
    yield "some "
    yield "words"
    yield _answer(asked)


@resilient("soak outages", agent="SoakOutages", **{**STACK, "max_retries": 0, "failure_threshold": _FAILURES_TO_OPEN})
def ask_in_outage(asked: Question) -> Answer:
    """Answer, but in an outage."""
    asked.arrive()
    return "some"


# Who calls, and what they note


@dataclass(frozen=True, slots=True)
class Names:
    """What a function is called by in the statistics."""

    limit: str
    agent: str
    function: str

    @classmethod
    def of(cls, function: Callable[..., Any], limit: str, agent_name: str) -> "Names":
        """Name a function."""
        return cls(limit, agent_name, f"{function.__module__}.{function.__qualname__}")


THREADS = Names.of(ask, "soak threads", "SoakThreads")
TASKS = Names.of(ask_later, "soak tasks", "SoakTasks")
STREAMS = Names.of(stream, "soak streams", "SoakStreams")
LATER_STREAMS = Names.of(stream_later, "soak streams", "SoakStreams")
OUTAGES = Names.of(ask_in_outage, "soak outages", "SoakOutages")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with the tokens of its prompt and answer, None for what nobody knows; or with an error."""

    used: tuple[int, int] | None = None
    error: BaseException | None = None


def note(books: Books, names: Names, asked: Question, outcome: Outcome, *, caller: str | None = None) -> None:
    """Put a call into the program's own books."""
    books["program", "", "calls"] += 1
    books["rate_limiters", names.limit, "calls_admitted"] += asked.attempts
    books["rate_limiters", names.limit, "calls_rate_limited"] += asked.told_429
    books["retries", names.function, "retries"] += max(0, asked.attempts - 1)
    if names is not OUTAGES:
        tokens = count_tokens(asked.prompt) + asked.max_tokens
        books["rate_limiters", names.limit, "tokens_admitted"] += asked.attempts * tokens
    error = outcome.error
    if error is None:
        books["program", "", "successes"] += 1
        books["retries", names.function, "calls_recovered"] += asked.attempts > 1
        books["agents", caller or names.agent, "calls"] += 1
        if outcome.used is not None:
            for key, used in zip(("prompt_tokens", "completion_tokens"), outcome.used, strict=True):
                books["agents", caller or names.agent, key] += used
            if names.agent in ("SoakTasks", "SoakStreams"):
                books["token_budgets", names.agent, "tokens_used"] += sum(outcome.used)
        return
    books["program", "", "failures"] += 1
    if isinstance(error, RateLimitTimeoutError):
        books["rate_limiters", names.limit, "calls_refused"] += 1
    elif isinstance(error, TokenBudgetExceededError):
        books["token_budgets", names.agent, "calls_refused"] += 1
    elif isinstance(error, CircuitOpenError):
        books["circuit_breakers", names.limit, "calls_refused"] += 1
    elif asked.trouble not in ("insufficient_quota", "cancelled"):
        books["retries", names.function, "calls_given_up"] += 1


def call_from_thread(numbers: Iterable[int]) -> Books:
    """Ask in this thread; a caller that leaves does so as on Ctrl-C."""
    books = Books()
    for asked in map(question, numbers):
        try:
            answer = ask(asked.prompt, asked.max_tokens, asked)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the books tell them apart
            note(books, THREADS, asked, Outcome(error=error))
        else:
            note(books, THREADS, asked, Outcome(_used(answer)))
    return books


def read_from_thread(numbers: Iterable[int]) -> Books:
    """Read streams in this thread; a caller that leaves drops the stream after its first word."""
    books = Books()
    for asked in map(question, numbers):
        text, used = "", None
        try:
            for item in stream(asked.prompt, asked.max_tokens, asked):
                if isinstance(item, str):
                    text += item
                used = _used(item)
                if asked.trouble == "cancelled":
                    break
        except Exception as error:  # noqa: BLE001 - the books tell them apart
            note(books, STREAMS, asked, Outcome(error=error))
        else:
            note(books, STREAMS, asked, Outcome(used or (count_tokens(asked.prompt), count_tokens(text))))
    return books


def call_in_outages(numbers: Iterable[int]) -> Books:
    """Ask a service that is down every now and then, and close the circuit by hand when it is back."""
    books = Books()
    for number in numbers:
        asked = Question("", 0, "500" if number % _OUTAGE_EVERY < _OUTAGE else None, lasts=True)
        if number % _OUTAGE_EVERY == _OUTAGE:
            reset_circuit_breakers(OUTAGES.limit)
            for counter in ("times_opened", "times_closed"):
                books["circuit_breakers", OUTAGES.limit, counter] += 1
        try:
            ask_in_outage(asked)
        except Exception as error:  # noqa: BLE001 - the books tell them apart
            note(books, OUTAGES, asked, Outcome(error=error))
        else:
            note(books, OUTAGES, asked, Outcome())
    return books


async def call_from_tasks(numbers: Iterator[int]) -> Books:
    """Ask from many tasks, for several agents; a caller that leaves is cancelled while its call is under way."""
    books = Books()

    async def call() -> None:
        for number in numbers:
            asked, caller = question(number), f"SoakAgent{number % 5}"
            with agent(caller, context=f"job {number % 3}"):
                call = ask_later(asked.prompt, asked.max_tokens, asked)
                if asked.trouble == "cancelled":
                    call = _left(call, asked)
                try:
                    answer = await call
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the books tell them apart
                    note(books, TASKS, asked, Outcome(error=error), caller=caller)
                else:
                    note(books, TASKS, asked, Outcome(_used(answer)), caller=caller)

    await asyncio.gather(*(call() for _ in range(_CALLERS)))
    return books


async def _left(call: Any, asked: Question) -> Answer:
    task: asyncio.Task[Answer] = asyncio.ensure_future(call)
    await asked.reached.wait()
    task.cancel()
    return await task


async def read_from_tasks(numbers: Iterator[int]) -> Books:
    """Read streams in many tasks; a caller that leaves closes the stream after its first word."""
    books = Books()

    async def read() -> None:
        for number in numbers:
            asked = question(number)
            text, used = "", None
            try:
                stream: Any = stream_later(asked.prompt, asked.max_tokens, asked)
                async with aclosing(stream):
                    async for item in stream:
                        if isinstance(item, str):
                            text += item
                        used = _used(item)
                        if asked.trouble == "cancelled":
                            break
            except Exception as error:  # noqa: BLE001 - the books tell them apart
                note(books, LATER_STREAMS, asked, Outcome(error=error))
            else:
                used = used or (count_tokens(asked.prompt), count_tokens(text))
                note(books, LATER_STREAMS, asked, Outcome(used))

    await asyncio.gather(*(read() for _ in range(_CALLERS)))
    return books


def _used(answer: Answer) -> tuple[int, int] | None:
    if isinstance(answer, str):
        return None
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
