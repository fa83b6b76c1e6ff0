"""@circuit_protected: pybreaker's states, driven so that coroutines count and neutral outcomes are neutral."""

import asyncio
import threading

import pybreaker
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
    reset_circuit_breakers,
    retry_on_429,
    subscribe,
)
from resilience_kit.circuits import Circuit, CircuitConfiguration
from resilience_kit.events import CircuitClosed, CircuitHalfOpened, CircuitOpened, CircuitRefused
from resilience_kit.registry import mode
from resilience_kit.testing import isolated, no_waiting
from resilience_kit.waiting import now

pytestmark = pytest.mark.looptime


def state(name="chat"):
    return get_all_resilience_stats()["circuit_breakers"][name]["state"]


def failures(name="chat"):
    return get_all_resilience_stats()["circuit_breakers"][name]["failure_count"]


@circuit_protected("chat", failure_threshold=3, recovery_timeout=60, success_threshold=2)
async def ask(outcome=None, seconds=0.0):
    """A service: answers, fails or takes its time as it is told."""
    await asyncio.sleep(seconds)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def fail(times=3):
    for _ in range(times):
        with pytest.raises(ConnectionError):
            await ask(ConnectionError())


async def test_row_1_failures_of_a_coroutine_open_the_circuit_where_pybreaker_counts_none():
    breaker = pybreaker.CircuitBreaker(fail_max=3)

    @breaker
    async def naive():
        raise ConnectionError

    for _ in range(3):
        with pytest.raises(ConnectionError):
            await naive()
    await fail()

    assert (breaker.current_state, state()) == ("closed", "OPEN")


def test_row_2_sync_calls_run_side_by_side_where_pybreaker_runs_one_at_a_time():
    breaker = pybreaker.CircuitBreaker()
    together = threading.Barrier(4)

    def meet():
        together.wait(timeout=0.2)

    def crowd(function):
        outcomes = []

        def run():
            try:
                function()
            except threading.BrokenBarrierError:
                outcomes.append("alone")
            else:
                outcomes.append("together")

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together.reset()
        return set(outcomes)

    assert crowd(lambda: breaker.call(meet)) == {"alone"}
    assert crowd(circuit_protected("chat")(meet)) == {"together"}


@pytest.mark.parametrize("trials", [1, 3])
async def test_row_3_a_half_open_circuit_lets_so_many_trials_through_where_pybreaker_lets_all(trials):
    naive_breaker = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0)
    naive_breaker.open()
    naive, ours = 0, 0

    async def naive_call():
        nonlocal naive
        with naive_breaker.calling():
            naive += 1
            await asyncio.sleep(1)

    @circuit_protected("trials", failure_threshold=1, recovery_timeout=60, half_open_max_calls=trials)
    async def call(error=None):
        nonlocal ours
        ours += 1
        await asyncio.sleep(1)
        if error:
            raise error

    await asyncio.gather(*(naive_call() for _ in range(50)))
    with pytest.raises(ConnectionError):
        await call(ConnectionError())
    await asyncio.sleep(60)
    ours = 0
    outcomes = await asyncio.gather(*(call() for _ in range(50)), return_exceptions=True)

    assert naive == 50
    assert ours == trials
    assert sum(isinstance(outcome, CircuitOpenError) for outcome in outcomes) == 50 - trials


async def test_row_4_a_cancelled_call_is_no_failure_where_pybreaker_counts_one():
    breaker = pybreaker.CircuitBreaker(fail_max=3)

    async def naive():
        with breaker.calling():
            await asyncio.sleep(10)

    for call in (naive, lambda: ask(seconds=10)):
        tasks = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    assert (breaker.current_state, state(), failures()) == ("open", "CLOSED", 0)


async def test_row_4_a_cancelled_trial_gives_its_permit_back():
    await fail()
    await asyncio.sleep(60)
    trial = asyncio.create_task(ask(seconds=10))
    await asyncio.sleep(1)
    trial.cancel()
    await asyncio.wait([trial])

    assert await ask("answer") == "answer"


async def test_row_5_a_neutral_error_leaves_the_count_alone_where_pybreaker_forgets_it():
    breaker = pybreaker.CircuitBreaker(fail_max=3, exclude=[ValueError])

    def naive(error):
        raise error

    for error in (OSError(), OSError(), ValueError()):
        with pytest.raises(type(error)):
            breaker.call(naive, error)
    await fail(2)
    with pytest.raises(ValueError, match="mine"):
        await ask(ValueError("mine"))

    assert (breaker.fail_counter, failures()) == (0, 2)


async def test_row_5_a_neutral_error_in_a_trial_is_no_success():
    await fail()
    await asyncio.sleep(60)
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            await ask(ValueError("mine"))

    assert state() == "HALF_OPEN"


async def test_row_6_the_call_that_opens_the_circuit_raises_its_own_error_where_pybreaker_hides_it():
    breaker = pybreaker.CircuitBreaker(fail_max=1)

    def naive():
        raise ConnectionError

    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(naive)
    error = ConnectionError("mine")
    with pytest.raises(ConnectionError) as raised:
        await circuit_protected("once", failure_threshold=1)(ask)(error)
    assert raised.value is error


async def test_an_open_circuit_refuses_at_once_and_says_when_to_come_back():
    await fail()
    await asyncio.sleep(20)

    with pytest.raises(CircuitOpenError, match="reset_circuit_breakers") as refused:
        await ask()
    assert (refused.value.name, refused.value.retry_after) == ("chat", pytest.approx(40))


async def test_trials_that_succeed_close_the_circuit():
    await fail()
    await asyncio.sleep(60)
    await ask()
    assert state() == "HALF_OPEN"
    await ask()

    assert (state(), failures()) == ("CLOSED", 0)


async def test_a_trial_that_fails_opens_the_circuit_for_the_whole_time_again():
    await fail()
    await asyncio.sleep(60)
    await fail(1)

    with pytest.raises(CircuitOpenError) as refused:
        await ask()
    assert refused.value.retry_after == pytest.approx(60)


async def test_a_success_forgets_the_failures_before_it():
    await fail(2)
    await ask()
    await fail(2)

    assert state() == "CLOSED"


async def test_a_straggler_that_fails_does_not_open_a_half_open_circuit_again():
    straggler = asyncio.create_task(ask(ConnectionError(), seconds=65))
    await asyncio.sleep(0)
    await fail()
    await asyncio.sleep(61)
    await ask()
    with pytest.raises(ConnectionError):
        await straggler

    assert state() == "HALF_OPEN"


async def test_a_straggler_that_succeeds_does_not_close_a_half_open_circuit():
    straggler = asyncio.create_task(ask(seconds=65))
    await asyncio.sleep(0)
    await fail()
    await asyncio.sleep(61)
    await ask()
    await straggler

    assert state() == "HALF_OPEN"


async def test_a_call_that_waited_for_its_slot_is_not_sent_if_the_circuit_opened_meanwhile():
    sent = []

    @circuit_protected("ill", failure_threshold=1)
    @rate_limited("ill", max_concurrent=1, min_interval=0)
    async def call(label):
        sent.append(label)
        await asyncio.sleep(1)
        raise ConnectionError

    outcomes = await asyncio.gather(call("first"), call("waiting"), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [ConnectionError, CircuitOpenError]
    assert sent == ["first"]


async def test_a_call_that_waited_until_the_circuit_was_half_open_needs_a_trials_permit():
    sent = []

    @circuit_protected("ill", failure_threshold=1, recovery_timeout=5, success_threshold=1)
    @rate_limited("ill", max_concurrent=1, min_interval=0)
    async def call(label, seconds=1.0, error=None):
        sent.append(label)
        await asyncio.sleep(seconds)
        if error:
            raise error

    first = asyncio.create_task(call("first", error=ConnectionError()))
    long = asyncio.create_task(call("long", seconds=10))
    with pytest.raises(ConnectionError):
        await first
    with pytest.raises(CircuitOpenError):
        await long
    await asyncio.sleep(5)
    await call("trial")

    assert sent == ["first", "trial"]
    assert state("ill") == "CLOSED"


async def test_a_waiting_call_is_let_in_as_a_trial_when_it_comes_to_it_in_time():
    protected = circuit_protected("ill", failure_threshold=1, recovery_timeout=5, success_threshold=1)

    @protected
    async def break_it():
        raise ConnectionError

    @protected
    @rate_limited("slow", tokens_per_minute=1, tokens=1, min_interval=0)
    async def call():
        return "answer"

    await call()
    waiting = asyncio.create_task(call())
    await asyncio.sleep(1)
    with pytest.raises(ConnectionError):
        await break_it()

    assert await waiting == "answer"
    assert state("ill") == "CLOSED"


@pytest.mark.parametrize(
    "error", [RateLimitTimeoutError("late", name="chat", retry_after=None), KeyboardInterrupt(), LookupError()]
)
async def test_errors_that_do_not_speak_of_the_service_are_neutral(error):
    with pytest.raises(type(error)):
        await ask(error)

    assert failures() == 0


@pytest.mark.parametrize(("status", "counted"), [(429, 0), (400, 0), (404, 0), (408, 1), (500, 1), (503, 1)])
async def test_a_status_of_5xx_is_a_failure_and_other_statuses_but_the_timeout_are_not(status, counted):
    error = RuntimeError("from any HTTP client")
    error.status_code = status
    with pytest.raises(RuntimeError):
        await ask(error)

    assert failures() == counted


async def test_is_failure_takes_the_place_of_the_rule():
    call = circuit_protected("mine", is_failure=lambda error: isinstance(error, LookupError))(ask.__wrapped__)
    for error in (LookupError(), ConnectionError()):
        with pytest.raises(type(error)):
            await call(error)

    assert failures("mine") == 1


async def test_an_is_failure_that_raises_reaches_the_caller_and_gives_the_permit_back():
    def broken(error):
        raise KeyError("mine")

    call = circuit_protected("mine", is_failure=broken)(ask.__wrapped__)
    with pytest.raises(KeyError, match="mine") as raised:
        await call(LookupError())

    assert isinstance(raised.value.__context__, LookupError)
    assert get_all_resilience_stats()["circuit_breakers"]["mine"]["trials_in_flight"] == 0


async def test_a_fallback_answers_in_place_of_a_refused_call_with_its_arguments():
    async def fallback(outcome, seconds=0.0):
        return f"no answer to {outcome}"

    call = circuit_protected("chat", fallback=fallback)(ask.__wrapped__)
    await fail()

    assert await call("the question") == "no answer to the question"


async def test_a_fallback_answers_for_a_call_that_is_refused_after_its_wait_for_a_slot():
    @circuit_protected("ill", failure_threshold=1, fallback=lambda: "fallback")
    @rate_limited("ill", max_concurrent=1, min_interval=0)
    async def call():
        await asyncio.sleep(1)
        raise ConnectionError

    outcomes = await asyncio.gather(call(), call(), return_exceptions=True)

    assert [outcomes[1], type(outcomes[0])] == ["fallback", ConnectionError]


async def test_a_fallback_does_not_answer_for_another_circuit_beneath():
    await fail()
    call = circuit_protected("outer", fallback=lambda: "fallback")(ask)

    with pytest.raises(CircuitOpenError) as refused:
        await call()
    assert refused.value.name == "chat"


async def test_a_fallback_of_a_coroutine_function_may_be_a_plain_function():
    call = circuit_protected("chat", fallback=lambda outcome: f"no answer to {outcome}")(ask.__wrapped__)
    await fail()

    assert await call("the question") == "no answer to the question"


async def test_a_fallback_is_not_asked_when_the_function_itself_fails():
    call = circuit_protected("chat", fallback=lambda _: "never")(ask.__wrapped__)
    with pytest.raises(ConnectionError):
        await call(ConnectionError())


async def test_an_error_of_the_fallback_keeps_what_it_was_raised_from():
    def substitute():
        try:
            raise KeyError
        except KeyError:
            raise RuntimeError  # noqa: B904 - what the interpreter notes by itself is what is tested

    @rate_limited("chat")
    @circuit_protected("chat", fallback=substitute)
    def call():
        return "answer"

    await fail()
    with pytest.raises(RuntimeError) as raised:
        call()

    assert isinstance(raised.value.__context__, KeyError)
    assert isinstance(raised.value.__context__.__context__, CircuitOpenError)


async def test_a_generator_has_a_generator_for_a_fallback():
    def substitute():
        yield "nothing"

    @circuit_protected("chat", fallback=substitute)
    def stream():
        yield "something"

    await fail()

    assert list(stream()) == ["nothing"]


async def test_an_async_fallback_of_a_sync_function_is_a_configuration_error():
    async def fallback():
        await asyncio.sleep(0)

    @circuit_protected("chat", fallback=fallback)
    def call():
        return "answer"

    await fail()
    with pytest.raises(ConfigurationError, match="async"):
        call()


async def test_an_open_circuit_is_not_retried():
    attempts = 0

    @retry_on_429(retry_transient=True, retry_if=lambda error: True)
    @circuit_protected("chat")
    async def call():
        nonlocal attempts
        attempts += 1

    await fail()
    with pytest.raises(CircuitOpenError):
        await call()

    assert (attempts, asyncio.get_running_loop().time()) == (0, 0)


async def test_each_move_of_the_circuit_is_told_to_listeners(heard):
    await fail()
    with pytest.raises(CircuitOpenError):
        await ask()
    await asyncio.sleep(60)
    await ask()
    await ask()

    told = [event for event in heard if event.name == "chat"]
    assert told == [
        CircuitOpened(name="chat", failures=3, error="ConnectionError", seconds=60),
        CircuitRefused(name="chat", seconds=60),
        CircuitHalfOpened(name="chat"),
        CircuitClosed(name="chat", reason="recovered"),
    ]


async def test_a_circuit_is_closed_by_hand(heard):
    await fail()
    reset_circuit_breakers("chat")

    assert state() == "CLOSED"
    assert heard[-1] == CircuitClosed(name="chat", reason="reset")


async def test_closing_a_closed_circuit_by_hand_forgets_its_failures():
    await fail(2)
    reset_circuit_breakers()

    assert failures() == 0


async def test_a_listener_may_ask_the_circuit_that_it_hears_of():
    states = []
    stop = subscribe(lambda event: states.append(state()) if isinstance(event, CircuitOpened) else None)
    await fail()
    stop()

    assert states == ["OPEN"]


async def test_an_interrupt_while_listeners_hear_of_a_trial_gives_its_permit_back():
    def interrupt(event):
        if isinstance(event, CircuitHalfOpened):
            raise KeyboardInterrupt

    await fail()
    await asyncio.sleep(60)
    unsubscribe = subscribe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        await ask()
    unsubscribe()

    assert get_all_resilience_stats()["circuit_breakers"]["chat"]["trials_in_flight"] == 0


async def test_a_stream_that_breaks_after_its_first_item_is_a_failure():
    @circuit_protected("stream", failure_threshold=1)
    async def stream():
        yield "first"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        async for _ in stream():
            pass

    assert state("stream") == "OPEN"


async def test_a_stream_decides_only_at_its_end():
    @circuit_protected("stream")
    async def stream(error=None):
        yield "first"
        if error:
            raise error

    with pytest.raises(ConnectionError):
        async for _ in stream(ConnectionError()):
            pass
    reading = stream()
    await anext(reading)
    assert failures("stream") == 1
    await reading.aclose()

    assert failures("stream") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"failure_threshold": 0},
        {"failure_threshold": 2.5},
        {"recovery_timeout": -1},
        {"success_threshold": 0},
        {"half_open_max_calls": 0},
        {"is_failure": "ConnectionError"},
        {"fallback": "sorry"},
    ],
    ids=str,
)
def test_an_argument_that_cannot_work_is_refused_when_it_is_written(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        circuit_protected("chat", **arguments)


@pytest.mark.parametrize("what", [5, None, Circuit], ids=repr)
def test_what_is_not_a_function_is_not_decorated(what):
    with pytest.raises(ConfigurationError, match="circuit_protected"):
        circuit_protected(what)


FAILURES, SUCCESSES, TRIALS = 3, 2, 2


class AgainstPybreaker(RuleBasedStateMachine):
    """The circuit, one call at a time, beside pybreaker called as it is meant to be: the same states throughout."""

    def __init__(self):
        super().__init__()
        self.under_way = []
        self.isolation = isolated()
        self.unhurried = no_waiting()

    @initialize()
    def start(self):
        self.isolation.__enter__()
        self.unhurried.__enter__()
        self.circuit = Circuit("model", CircuitConfiguration(FAILURES, 60.0, SUCCESSES, TRIALS))
        self.model = pybreaker.CircuitBreaker(
            fail_max=FAILURES, reset_timeout=10**6, success_threshold=SUCCESSES, throw_new_error_on_trip=False
        )
        self.opened_at = None

    def teardown(self):
        self.unhurried.__exit__(None, None, None)
        self.isolation.__exit__(None, None, None)

    def call(self, error):
        def outcome():
            if error:
                raise error

        if self.model.current_state == "open" and now() >= self.opened_at + 60:
            self.model.half_open()
        try:
            self.model.call(outcome)
        except pybreaker.CircuitBreakerError:
            expected = "refused"
        except ConnectionError:
            expected = "failed"
        else:
            expected = "answered"
        if self.model.current_state == "open" and expected == "failed":
            self.opened_at = now()
        try:
            admission = self.circuit.admit()
        except CircuitOpenError:
            actual = "refused"
        else:
            self.circuit.settle(admission, failure=error, success=error is None)
            actual = "failed" if error else "answered"
        assert actual == expected

    @rule()
    def succeed(self):
        self.call(None)

    @rule()
    def fail(self):
        self.call(ConnectionError())

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def wait(self, seconds):
        mode.seconds_skipped += seconds

    @rule()
    def cancel(self):
        before = self.circuit.statistics()
        try:
            admission = self.circuit.admit()
        except CircuitOpenError:
            return
        self.circuit.settle(admission)
        if before.state != "OPEN":
            assert self.circuit.statistics() == before
        else:
            self.model.half_open()

    @precondition(lambda self: hasattr(self, "circuit"))
    @rule()
    def reset(self):
        self.circuit.reset()
        if self.model.current_state == "closed":
            self.model._state_storage.reset_counter()
        else:
            self.model.close()

    @invariant()
    def both_are_in_the_same_state(self):
        if not hasattr(self, "circuit"):
            return
        ours = self.circuit.statistics()
        assert ours.state == self.model.current_state.upper().replace("-", "_")
        assert ours.trials_in_flight == 0
        if ours.state == "CLOSED":
            assert ours.failure_count == self.model.fail_counter
        if ours.state == "HALF_OPEN":
            assert ours.success_count == self.model.success_counter


TestAgainstPybreaker = AgainstPybreaker.TestCase
TestAgainstPybreaker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
