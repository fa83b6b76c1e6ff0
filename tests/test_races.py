"""Races: calls of the same names from threads and from two event loops, in programs that hypothesis makes up.

What a step starts goes on by itself while the next ones are made, so that all of it overlaps in real time. It runs by
whatever interpreter runs pytest; on a free-threaded one (3.13t or later) nothing but the kit's own locks keeps the
threads apart: install the kit with `pytest`, `pytest-asyncio`, `pytest-timeout` and `hypothesis`, and say
`python3.14t -m pytest tests/test_races.py`.
"""

import asyncio
import faulthandler
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from resilience_kit import (
    ConfigurationError,
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    reset_circuit_breakers,
    resilient,
    token_budget,
)
from resilience_kit.errors import ResilienceError
from resilience_kit.pausing import pause, resume
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import isolated

NAMES = ("one", "other")
PERIOD, REQUESTS, TOKENS, SLOTS, BUDGET = 0.12, 12, 60, 3, 80
MAX_WAITS = (None, 0.05)
THREADS = 6
# Nothing takes a tenth of that; what does is a deadlock.
PATIENCE = 30

STACK = {
    "requests_per_minute": REQUESTS,
    "tokens_per_minute": TOKENS,
    "max_concurrent": SLOTS,
    "min_interval": 0.001,
    "period": PERIOD,
    "max_retries": 1,
    "initial_backoff": 0.001,
    # one call and its retry
    "failure_threshold": 2,
    "recovery_timeout": 0.005,
    "success_threshold": 1,
    "budget_tokens": BUDGET,
    "per": 2 * PERIOD,
}


class ServiceError(Exception):
    """What the service answers in place of an answer."""

    def __init__(self, status):
        super().__init__(status)
        self.status_code = status
        self.headers = {"retry-after-ms": "2"}


@dataclass(frozen=True)
class Plan:
    """What a call is to be: from a thread or in a loop, and under way until a later step ends it or it has a status."""

    name: str
    tokens: int
    loop: int | None = None
    reads: str = "whole"
    max_wait: float | None = None
    status: int | None = None


class Call:
    """One call, from its start to its end, as its function and its caller see it."""

    def __init__(self, plan, books):
        self.plan = plan
        self.name = plan.name
        self.tokens = plan.tokens
        self.books = books
        self.status = 200
        self.loop = None
        self.task = None
        self.has_answer = False
        self.error = None
        self.ended = threading.Event()
        self._gate = threading.Event()
        self._gate_of_loop = asyncio.Event()

    def let_go(self, status=200):
        if not self._gate.is_set():
            self.status = status
            self._gate.set()
            if self.loop is None:
                # of a thread, or not yet under way
                self._gate_of_loop.set()
            else:
                self.loop.do(self._gate_of_loop.set)

    def hold(self):
        assert self._gate.wait(PATIENCE)

    async def hold_later(self):
        await self._gate_of_loop.wait()

    def answer(self):
        if self.status != 200:
            raise ServiceError(self.status)
        return {"usage": {"prompt_tokens": 0, "completion_tokens": self.tokens}}


class Books:
    """What was seen of the calls, beside what the kit says of them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._in_flight = Counter()
        self.peak = Counter()
        self.entered = Counter()
        self.tokens = Counter()

    @contextmanager
    def under_way(self, call):
        with self._lock:
            self.entered[call.name] += 1
            self.tokens[call.name] += call.tokens
            self._in_flight[call.name] += 1
            self.peak[call.name] = max(self.peak[call.name], self._in_flight[call.name])
        try:
            yield
        finally:
            with self._lock:
                self._in_flight[call.name] -= 1


class WatchedLedger(WindowLedger):
    """A ledger of which all is remembered that it let through; its reset ends that too."""

    __slots__ = ("seen",)

    def reset(self):
        super().reset()
        self.seen = []

    def commit(self, tokens, now):
        sent = super().commit(tokens, now)
        self.seen.append(sent)
        return sent

    def give_back(self, sent):
        super().give_back(sent)
        if sent in self.seen:
            self.seen.remove(sent)


def functions_of(name, max_wait):
    """The three kinds of function that share a name: for threads, for tasks, and for readers of a stream."""
    on_exceed = {"one": "raise", "other": "wait"}[name]
    decorate = resilient(
        name, agent=name, max_wait=max_wait, on_exceed=on_exceed, tokens=lambda call, max_tokens: max_tokens, **STACK
    )

    @decorate
    def ask(call, max_tokens):
        with call.books.under_way(call):
            call.hold()
            return call.answer()

    @decorate
    async def ask_later(call, max_tokens):
        with call.books.under_way(call):
            await call.hold_later()
            return call.answer()

    @decorate
    async def stream(call, max_tokens):
        with call.books.under_way(call):
            yield "some"
            await call.hold_later()
            yield call.answer()

    return ask, ask_later, stream


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self, call, run):
        def begin():
            call.task = self._loop.create_task(run())
            call.task.add_done_callback(lambda task: call.ended.set())

        self.do(begin)

    def cancel(self, call):
        def cancel():
            call.task.cancel()

        self.do(cancel)

    def do(self, function):
        """Have the loop call a function, in the order in which it is asked."""
        self._loop.call_soon_threadsafe(function)

    def close(self):
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_asyncgens(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


class Races(RuleBasedStateMachine):
    """Each step starts, ends or disturbs calls, and waits for none of them."""

    calls = Bundle("calls")
    names = st.sampled_from(NAMES)
    statuses = st.sampled_from([200, 200, 429, 500, 500])
    plans = st.builds(
        Plan,
        name=names,
        tokens=st.integers(1, 15),
        loop=st.sampled_from([None, 0, 1]),
        reads=st.sampled_from(["whole", "to its end", "one item"]),
        max_wait=st.sampled_from(MAX_WAITS),
        status=st.none() | statuses,
    )

    def __init__(self):
        super().__init__()
        self.setting = ExitStack()
        self.setting.enter_context(isolated())
        self.setting.enter_context(mock.patch("resilience_kit.rate_limits.WindowLedger", WatchedLedger))
        self.loops = [Loop(), Loop()]
        self.pool = ThreadPoolExecutor(THREADS)
        self.books = Books()
        self.started = []
        self.is_reset = False
        self.functions = {(name, wait): functions_of(name, wait) for name in NAMES for wait in MAX_WAITS}
        for name in NAMES:
            first = self.begin_one(Plan(name, 1, status=200))
            assert first.ended.wait(PATIENCE)

    @rule(target=calls, plans=st.lists(plans, min_size=1, max_size=6))
    def begin_more(self, plans):
        return self.begin(plans)

    def begin(self, plans):
        return multiple(*(self.begin_one(plan) for plan in plans))

    def begin_one(self, plan):
        call = Call(plan, self.books)
        self.started.append(call)
        if plan.status is not None:
            call.let_go(plan.status)
        if plan.loop is None:
            self.pool.submit(self.run, call)
        else:
            call.loop = self.loops[plan.loop]
            call.loop.start(call, partial(self.run_later, call))
        return call

    def run(self, call):
        ask, _, _ = self.functions[call.name, call.plan.max_wait]
        try:
            ask(call, call.tokens)
            call.has_answer = True
        except (ServiceError, ResilienceError) as error:
            call.error = error
        finally:
            call.ended.set()

    async def run_later(self, call):
        _, ask_later, stream = self.functions[call.name, call.plan.max_wait]
        try:
            if call.plan.reads == "whole":
                await ask_later(call, call.tokens)
            else:
                async with aclosing(stream(call, call.tokens)) as items:
                    async for _ in items:
                        if call.plan.reads == "one item":
                            break
            call.has_answer = True
        except (ServiceError, ResilienceError, asyncio.CancelledError) as error:
            call.error = error

    @rule(call=calls, status=statuses)
    def end(self, call, status):
        call.let_go(status)

    @rule(call=calls)
    def cancel(self, call):
        if call.loop is None:
            call.let_go(500)
        else:
            call.loop.cancel(call)

    @rule(milliseconds=st.integers(1, 30))
    def let_time_pass(self, milliseconds):
        time.sleep(milliseconds / 1_000)

    @rule(name=names)
    def hold_back(self, name):
        pause(name)

    @rule(name=names)
    def go_on(self, name):
        resume(name)

    @rule(name=st.none() | names)
    def close_circuits(self, name):
        reset_circuit_breakers(name)

    @initialize(target=calls, may_reset=st.booleans(), plans=st.lists(plans, min_size=6, max_size=16))
    def begin_first(self, may_reset, plans):
        # after a reset, nobody knows what the kit should have counted
        self.is_reset = may_reset
        return self.begin(plans)

    @precondition(lambda self: self.is_reset)
    @rule()
    def reset(self):
        reset_all()

    @rule(name=names)
    def contradict(self, name):
        with pytest.raises(ConfigurationError):
            rate_limited(name, requests_per_minute=REQUESTS + 1)
        with pytest.raises(ConfigurationError):
            circuit_protected(name, failure_threshold=1_000)
        with pytest.raises(ConfigurationError):
            token_budget(name, budget_tokens=BUDGET + 1)

    @invariant()
    def nothing_is_above_its_bound(self):
        shown = get_all_resilience_stats()
        for name in NAMES:
            limit, budget = shown["rate_limiters"][name], shown["token_budgets"][name]
            assert limit["in_flight"] <= SLOTS
            assert limit["requests_in_window"] <= REQUESTS
            assert limit["tokens_in_window"] <= TOKENS
            assert shown["circuit_breakers"][name]["trials_in_flight"] <= 1
            assert budget["tokens_used"] + budget["tokens_reserved"] <= BUDGET
            assert self.books.peak[name] <= SLOTS
            assert_within_quota(rate_limits.items()[name])

    def teardown(self):
        try:
            self.end_all()
            self.nothing_is_left()
            self.nothing_is_above_its_bound()
            if not self.is_reset:
                self.all_is_counted()
        finally:
            self.pool.shutdown(cancel_futures=True)
            for loop in self.loops:
                loop.close()
            self.setting.close()

    def end_all(self):
        for name in NAMES:
            resume(name)
        for call in self.started:
            call.let_go()
        for call in self.started:
            if not call.ended.wait(PATIENCE):
                faulthandler.dump_traceback()
                pytest.fail("a call never ended: the threads are where the lines above say")

    def nothing_is_left(self):
        shown = get_all_resilience_stats()
        for name in NAMES:
            limit = rate_limits.items()[name]
            assert (shown["rate_limiters"][name]["in_flight"], shown["rate_limiters"][name]["waiting"]) == (0, 0)
            assert [*limit._returned, *limit._refusals, *limit._queue.lookouts] == []
            assert shown["circuit_breakers"][name]["trials_in_flight"] == 0
            assert shown["token_budgets"][name]["tokens_reserved"] == 0

    def all_is_counted(self):
        shown = get_all_resilience_stats()
        for name in NAMES:
            refusals = Counter(refusal_of(call.error) for call in self.started if call.name == name)
            assert shown["rate_limiters"][name]["calls_admitted"] == self.books.entered[name]
            assert shown["rate_limiters"][name]["tokens_admitted"] == self.books.tokens[name]
            assert len(rate_limits.items()[name]._ledger.seen) == self.books.entered[name]
            assert shown["rate_limiters"][name]["calls_refused"] == refusals["RateLimitTimeoutError"]
            assert shown["circuit_breakers"][name]["calls_refused"] == refusals["CircuitOpenError"]
            assert shown["token_budgets"][name]["calls_refused"] == refusals["TokenBudgetExceededError"]
            answers = sum(call.has_answer for call in self.started if call.name == name)
            assert shown["agents"].get(name, {"calls": 0})["calls"] == answers


def refusal_of(error):
    """The name of the refusal that ended a call: the caller of a refused retry gets what failed before, with a note."""
    if isinstance(error, ResilienceError):
        return type(error).__name__
    notes = [note.partition(" was refused: ")[2] for note in getattr(error, "__notes__", ())]
    return next((note.partition(":")[0] for note in notes if note), None)


def assert_within_quota(limit):
    with limit._lock:
        sent = [*limit._ledger.seen]
    for most, window in ((REQUESTS, PERIOD), (REQUESTS // 6, PERIOD / 6)):
        assert all(later.at >= earlier.at + window for earlier, later in zip(sent, sent[most:], strict=False))
    for earlier in sent:
        assert sum(it.tokens for it in sent if earlier.at <= it.at < earlier.at + PERIOD) <= TOKENS


def test_calls_from_threads_and_two_event_loops_keep_to_all_bounds_and_leave_nothing_behind(restless_threads):
    run_state_machine_as_test(
        Races,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            suppress_health_check=[HealthCheck.too_slow],
            # what happened by chance does not happen again: there is nothing to shrink
            phases=[Phase.generate],
        ),
    )
