"""How the layers go around every kind of function: the real decorators, and one guard that shows what a layer sees."""

import asyncio
import functools
import gc
import inspect
import itertools
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from resilience_kit import (
    ConfigurationError,
    circuit_protected,
    decorating,
    explain,
    get_all_resilience_stats,
    layers,
    rate_limited,
    resilient,
    retry_on_429,
    token_budget,
)
from resilience_kit.events import Admitted, Answered
from resilience_kit.testing import disabled, no_waiting

pytestmark = pytest.mark.looptime

UNPACED = {"requests_per_minute": 10_000, "min_interval": 0}


class RateLimitError(Exception):
    status_code = 429


class ServerError(Exception):
    status_code = 500


def say(text, ending="!"):
    """Say it."""
    return text + ending


async def say_later(text, ending="!"):
    """Say it."""
    await asyncio.sleep(0)
    return text + ending


def spell(text, ending="!"):
    """Say it."""
    yield text
    yield ending


async def spell_later(text, ending="!"):
    """Say it."""
    yield text
    await asyncio.sleep(0)
    yield ending


class Host:
    """A class with each kind of method."""

    def say(self, text, ending="!"):
        """Say it."""
        return text + ending

    async def say_later(self, text, ending="!"):
        """Say it."""
        return text + ending

    def spell(self, text, ending="!"):
        """Say it."""
        yield text
        yield ending

    async def spell_later(self, text, ending="!"):
        """Say it."""
        yield text
        yield ending


KINDS = {function.__name__: function for function in (say, say_later, spell, spell_later)}
each_kind = pytest.mark.parametrize("function", KINDS.values(), ids=KINDS)
each_decorator = pytest.mark.parametrize(
    "decorator", [rate_limited, retry_on_429, circuit_protected, token_budget, resilient]
)


async def outcome(returned):
    """What a call of any kind comes to: its result, or its stream's items in one string."""
    if inspect.isasyncgen(returned):
        return "".join([item async for item in returned])
    if inspect.isgenerator(returned):
        return "".join(returned)
    return await returned if inspect.isawaitable(returned) else returned


def held(name="chat"):
    """What calls hold at this moment, of each thing that can be held."""
    stats = get_all_resilience_stats()
    return {
        "slots": stats["rate_limiters"][name]["in_flight"],
        "places": stats["rate_limiters"][name]["waiting"],
        "trials": stats["circuit_breakers"][name]["trials_in_flight"],
        "tokens": stats["token_budgets"]["default"]["tokens_reserved"],
    }


NOTHING = {"slots": 0, "places": 0, "trials": 0, "tokens": 0}


class Witness(layers.Guard):
    """A layer that looks at arguments, and replaces them if it is told to."""

    kind: ClassVar[str] = "witness"
    name = "witness"

    def __init__(self, *, replaces=None):
        self.replaces = replaces or {}
        self.seen = []
        self.passages_above = []

    async def enter(self, call, /):
        self.passages_above.append(len(call.passages))
        self.seen.append((call.argument("text"), call.argument("ending"), call.argument("other", "nothing")))
        for name, value in self.replaces.items():
            call.replace(name, value)
        return WitnessPassage()

    def describe(self):
        return {}


class WitnessPassage(layers.Passage):
    def leave(self, result, error, /):
        pass


# --- each kind of function -------------------------------------------------------------------------------------------


@each_decorator
@each_kind
async def test_a_decorator_works_bare(decorator, function):
    assert await outcome(decorator(function)("four")) == "four!"


@each_decorator
@each_kind
async def test_a_decorator_works_called(decorator, function):
    assert await outcome(decorator()(function)("four", ending="?")) == "four?"


@each_decorator
@pytest.mark.parametrize("method", KINDS)
async def test_a_decorator_works_on_methods(decorator, method):
    class Decorated(Host):
        pass

    setattr(Decorated, method, decorator(getattr(Host, method)))

    assert await outcome(getattr(Decorated(), method)("four")) == "four!"


@pytest.mark.parametrize("binding", [staticmethod, classmethod])
@each_decorator
@pytest.mark.parametrize("is_outside", [True, False], ids=["decorator outside", "decorator inside"])
async def test_a_decorator_works_on_static_and_class_methods_in_either_order(decorator, binding, is_outside):
    def ask(*args):
        return args

    class Decorated:
        method = decorator(binding(ask)) if is_outside else binding(decorator(ask))

    own = (Decorated,) if binding is classmethod else ()

    assert Decorated.method("four") == (*own, "four")


@pytest.mark.parametrize("binding", [staticmethod, classmethod])
async def test_async_static_and_class_methods_stay_coroutine_functions(binding):
    async def ask(*args):
        return args[-1]

    class Decorated:
        method = rate_limited(binding(ask))

    assert inspect.iscoroutinefunction(Decorated.method)
    assert await Decorated.method("four") == "four"


@each_kind
async def test_a_partial_is_what_it_is_a_partial_of(function):
    assert await outcome(rate_limited(functools.partial(function, ending="?"))("four")) == "four?"


async def test_an_object_with_a_call_method_is_decorated():
    class Speaker:
        def __call__(self, text):
            return text

    assert rate_limited(Speaker())("four") == "four"


async def test_an_object_with_an_async_call_method_becomes_a_coroutine_function():
    class Speaker:
        async def __call__(self, text):
            return text

    speaker = rate_limited(Speaker())

    assert inspect.iscoroutinefunction(speaker)
    assert await speaker("four") == "four"


def test_a_lambda_is_decorated():
    assert rate_limited(lambda text: text)("four") == "four"


async def test_a_plain_wrapper_around_a_coroutine_function_counts_as_one():
    """An example is `create` of openai's async clients."""

    @functools.wraps(say_later)
    def create(*args, **kwargs):
        return say_later(*args, **kwargs)

    decorated = rate_limited(create)

    assert inspect.iscoroutinefunction(decorated)
    assert await decorated("four") == "four!"


async def test_a_plain_wrapper_around_a_coroutine_function_may_return_a_result_at_once():
    @functools.wraps(say_later)
    def create(text):
        return "cached"

    assert await rate_limited(create)("four") == "cached"


async def test_a_plain_function_must_not_return_a_coroutine():
    """It would run after the slot is given back."""
    ask = rate_limited(lambda: say_later("four"))

    with pytest.raises(ConfigurationError, match="make it async def"):
        ask()
    gc.collect()  # a coroutine that was not closed would warn now


def test_a_sync_function_with_an_async_fallback_is_refused():
    async def fallback(text):
        await asyncio.sleep(0)

    @circuit_protected("chat", failure_threshold=1, fallback=fallback)
    def ask(text):
        raise ServerError

    with pytest.raises(ServerError):
        ask("four")
    with pytest.raises(ConfigurationError, match="returned a coroutine"):
        ask("four")


def test_a_sync_function_never_suspends():
    class Suspending(Witness):
        async def enter(self, call, /):
            await asyncio.sleep(0)

    with pytest.raises(ConfigurationError, match="a sync function was decorated"):
        decorating.guarded(say, Suspending())("four")


# --- what a decorated function still is ------------------------------------------------------------------------------


@each_decorator
@each_kind
def test_a_decorated_function_keeps_its_face(decorator, function):
    decorated = decorator(function)

    assert inspect.signature(decorated) == inspect.signature(function)
    assert (decorated.__name__, decorated.__doc__) == (function.__name__, "Say it.")
    assert decorated.__module__ == __name__


@each_decorator
@each_kind
@pytest.mark.parametrize("kind", [inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction])
def test_a_decorated_function_keeps_its_kind(decorator, function, kind):
    assert kind(decorator(function)) == kind(function)


# --- arguments -------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("four", "?"), {}), (("four",), {"ending": "?"}), ((), {"ending": "?", "text": "four"})],
    ids=["by position", "by both", "by keyword"],
)
async def test_a_layer_sees_an_argument_however_it_is_passed(function, args, kwargs):
    witness = Witness()

    await outcome(decorating.guarded(function, witness)(*args, **kwargs))

    assert witness.seen == [("four", "?", "nothing")]


async def test_a_layer_sees_the_defaults_of_arguments_that_are_left_out():
    witness = Witness()

    decorating.guarded(say, witness)("four")

    assert witness.seen == [("four", "!", "nothing")]


@each_kind
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("four", "?"), {}), (("four",), {}), ((), {"text": "four"})],
    ids=["by position", "left out", "by keyword"],
)
async def test_a_layer_replaces_an_argument_however_it_is_passed(function, args, kwargs):
    witness = Witness(replaces={"text": "five", "ending": "."})

    assert await outcome(decorating.guarded(function, witness)(*args, **kwargs)) == "five."


def test_a_layer_sees_and_replaces_the_arguments_of_a_method():
    witness = Witness(replaces={"text": "five"})

    class Decorated:
        ask = decorating.guarded(Host.say, witness)

    assert Decorated().ask("four") == "five!"
    assert witness.seen == [("four", "!", "nothing")]


def test_a_function_whose_signature_cannot_be_read_takes_everything_by_keyword():
    witness = Witness()

    decorating.guarded(dict, witness)(text="four")

    assert witness.seen == [("four", None, "nothing")]
    assert layers.Parameters.of(dict).accepts("anything")


@pytest.mark.parametrize(
    ("function", "accepts"), [(say, False), (lambda **options: options, True), (lambda other: other, True)]
)
def test_a_function_accepts_what_its_signature_says(function, accepts):
    assert layers.Parameters.of(function).accepts("other") is accepts


# --- errors ----------------------------------------------------------------------------------------------------------


def fail(error):
    raise error


async def fail_later(error):
    await asyncio.sleep(0)
    raise error


def fail_spelling(error):
    yield "f"
    raise error


async def fail_spelling_later(error):
    yield "f"
    raise error


@each_decorator
@pytest.mark.parametrize("function", [fail, fail_later, fail_spelling, fail_spelling_later])
async def test_an_error_reaches_the_caller_as_it_was_raised(decorator, function):
    error = LookupError("no such word")

    with pytest.raises(LookupError) as caught:
        await outcome(decorator(function)(error))

    assert caught.value is error


def test_an_errors_traceback_ends_in_the_function():
    @resilient
    def ask():
        raise LookupError("no such word")

    with pytest.raises(LookupError) as caught:
        ask()

    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "ask"
    assert caught.value.__context__ is None


def test_a_sync_functions_stop_iteration_reaches_the_caller():
    """Coroutines, of which the layers are made, cannot raise it."""
    words = iter([])

    @resilient
    def next_word():
        return next(words)

    with pytest.raises(StopIteration) as caught:
        next_word()
    assert "_StoppedError" not in "".join(traceback.format_exception(caught.value))


def test_a_stop_iteration_keeps_its_value_and_its_cause():
    stop, cause = StopIteration("four"), LookupError()

    @rate_limited
    def ask():
        raise stop from cause

    with pytest.raises(StopIteration) as caught:
        ask()

    assert caught.value is stop
    assert caught.value.value == "four"
    assert caught.value.__cause__ is cause


# --- cancellation ----------------------------------------------------------------------------------------------------


async def guarded_call():
    """A function that holds, and waits for, everything that there is, behind a half-open circuit."""
    started = asyncio.Event()

    @resilient(
        "chat",
        max_concurrent=1,
        failure_threshold=1,
        recovery_timeout=0,
        half_open_max_calls=2,
        budget_tokens=20,
        per="minute",
        on_exceed="wait",
        max_retries=1,
        initial_backoff=10,
        jitter=False,
        retry_transient=False,
        **UNPACED,
    )
    async def ask(step, *, max_tokens=10):
        started.set()
        if isinstance(step, Exception):
            raise step
        await asyncio.sleep(step)
        return "four"

    with pytest.raises(ServerError):
        await ask(ServerError())
    started.clear()
    return ask, started


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_holds_a_slot_a_trial_and_a_reservation():
    ask, started = await guarded_call()
    call = asyncio.create_task(ask(1))
    await started.wait()

    assert held() == {"slots": 1, "places": 0, "trials": 1, "tokens": 10}

    await call
    assert held() == NOTHING


async def test_a_call_that_is_cancelled_in_the_function_gives_everything_back():
    ask, started = await guarded_call()
    call = asyncio.create_task(ask(60))
    await started.wait()

    await cancel(call)

    assert held() == NOTHING


async def test_a_call_that_is_cancelled_in_the_queue_gives_everything_back():
    ask, started = await guarded_call()
    first = asyncio.create_task(ask(5))
    await started.wait()
    second = asyncio.create_task(ask(5))
    await asyncio.sleep(1)
    assert held() == {"slots": 1, "places": 1, "trials": 2, "tokens": 20}

    await cancel(second)

    assert held() == {"slots": 1, "places": 0, "trials": 1, "tokens": 10}
    await first
    assert held() == NOTHING


async def test_a_call_that_is_cancelled_as_it_gets_its_slot_gives_it_back():
    ask, started = await guarded_call()
    first = asyncio.create_task(ask(5))
    await started.wait()
    second = asyncio.create_task(ask(5))
    await asyncio.sleep(1)
    first.add_done_callback(lambda _: second.cancel())

    await asyncio.wait([first, second])

    assert second.cancelled()
    assert held() == NOTHING


async def test_a_call_that_is_cancelled_between_two_attempts_gives_everything_back():
    ask, started = await guarded_call()
    call = asyncio.create_task(ask(RateLimitError()))
    await started.wait()
    await asyncio.sleep(1)
    assert held() == {"slots": 0, "places": 0, "trials": 0, "tokens": 10}

    await cancel(call)

    assert held() == NOTHING


async def test_a_call_that_is_cancelled_waiting_for_its_budget_gives_everything_back():
    ask, _ = await guarded_call()
    others = [asyncio.create_task(ask(5)) for _ in range(2)]
    await asyncio.sleep(1)
    third = asyncio.create_task(ask(5))
    await asyncio.sleep(1)
    assert held()["tokens"] == 20

    await cancel(third)
    await asyncio.wait(others)

    assert held() == NOTHING


# --- stacks ----------------------------------------------------------------------------------------------------------


LAYERS = {
    "budget": lambda: token_budget(budget_tokens=100),
    "retry": lambda: retry_on_429(max_retries=1),
    "circuit": lambda: circuit_protected("chat", failure_threshold=1),
    "limit": lambda: rate_limited("chat", **UNPACED),
}


@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
@pytest.mark.parametrize("order", list(itertools.permutations(LAYERS)), ids=" ".join)
@each_kind
async def test_any_order_of_the_four_lets_a_call_through_and_gives_everything_back(order, function):
    for layer in reversed(order):
        function = LAYERS[layer]()(function)

    assert await outcome(function("four")) == "four!"
    assert len(explain(function).layers) == 4
    assert held() == NOTHING


@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
@pytest.mark.parametrize("order", list(itertools.permutations(LAYERS)), ids=" ".join)
async def test_any_order_of_the_four_gives_everything_back_after_an_error(order):
    async def ask():
        raise ServerError

    for layer in reversed(order):
        ask = LAYERS[layer]()(ask)

    with pytest.raises(ServerError):
        await ask()
    assert held() == NOTHING


async def test_an_attempt_does_not_ask_the_layers_of_the_attempt_before_it():
    outer, inner, errors = Witness(), Witness(), [RateLimitError()]

    async def ask():
        if errors:
            raise errors.pop()

    await retry_on_429(decorating.guarded(decorating.guarded(ask, inner), outer))()

    assert outer.passages_above == [0, 0]
    assert inner.passages_above == [1, 1]


def test_a_foreign_decorator_between_two_layers_is_called_once_and_hides_neither(heard):
    calls = []

    @rate_limited("outer")
    @(lambda function: functools.wraps(function)(lambda *args: calls.append(args) or function(*args)))
    @rate_limited("inner")
    def ask(text):
        return text

    assert ask("four") == "four"
    assert calls == [("four",)]
    assert [event.name for event in heard if isinstance(event, Admitted)] == ["outer", "inner"]


def test_a_foreign_decorator_on_top_leaves_the_layers_beneath_it():
    limited = rate_limited("chat")(say)

    @functools.wraps(limited)
    def logged(text):
        return limited(text)

    assert [layer.name for layer in explain(logged).layers] == ["chat"]


async def test_a_decorated_function_may_call_another(slots_taken):
    @rate_limited("inner", **UNPACED)
    async def look_up(text):
        return f"{text} with {slots_taken('outer')} and {slots_taken('inner')}"

    @rate_limited("outer", **UNPACED)
    async def ask(text):
        return await look_up(text)

    assert await ask("four") == "four with 1 and 1"
    assert slots_taken("outer") == slots_taken("inner") == 0


@each_kind
async def test_a_function_can_be_decorated_without_changing_the_original(function, heard):
    rate_limited("chat")(function)

    await outcome(function("four"))

    assert heard == []


# --- threads and loops -----------------------------------------------------------------------------------------------


class Counted:
    """Counts how many calls are under way, and the most that ever were."""

    def __init__(self):
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.calls = 0

    def __enter__(self):
        with self._lock:
            self._now += 1
            self.calls += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *raised):
        with self._lock:
            self._now -= 1


def in_threads(*functions):
    """Run them at the same time, each in a thread."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(functions)) as pool:
        list(pool.map(run, functions))


def test_two_running_loops_together_never_exceed_one_limit():
    counted = Counted()

    @rate_limited("shared", max_concurrent=2, **UNPACED)
    async def ask():
        with counted:
            for _ in range(5):
                await asyncio.sleep(0)

    async def ask_often():
        await asyncio.gather(*(ask() for _ in range(20)))

    in_threads(*[lambda: asyncio.run(ask_often())] * 2)

    assert (counted.calls, counted.most) == (40, 2)


def test_two_running_loops_and_threads_share_one_limit():
    counted = Counted()
    limit = rate_limited("shared", max_concurrent=3, **UNPACED)

    @limit
    async def ask():
        with counted:
            for _ in range(5):
                await asyncio.sleep(0)

    @limit
    def ask_blocking():
        with counted:
            threading.Event().wait(0)

    async def ask_often():
        await asyncio.gather(*(ask() for _ in range(20)))

    in_threads(
        *[lambda: asyncio.run(ask_often())] * 2,
        *[lambda: [ask_blocking() for _ in range(20)]] * 2,
    )

    assert counted.calls == 80
    assert counted.most <= 3


def test_threads_run_side_by_side():
    """Row 2: a breaker of pybreaker's holds its lock while the function runs, so that they would never meet."""
    meeting = threading.Barrier(3, timeout=5)

    @resilient(max_concurrent=3, **UNPACED)
    def ask():
        meeting.wait()

    in_threads(ask, ask, ask)


# --- switched off ----------------------------------------------------------------------------------------------------


@each_kind
async def test_disabled_layers_let_calls_straight_through(function, heard):
    decorated = resilient("chat")(function)

    with disabled():
        assert await outcome(decorated("four")) == "four!"

    assert heard == []


def test_a_disabled_generator_is_the_bare_one():
    @rate_limited
    def ask():
        return (yield)

    with disabled():
        stream = ask()
        next(stream)
        with pytest.raises(StopIteration) as caught:
            stream.send("four")

    assert caught.value.value == "four"


def test_layers_are_back_after_disabled(heard):
    decorated = rate_limited("chat")(say)
    with disabled():
        decorated("four")

    decorated("four")

    assert [type(event) for event in heard] == [Admitted, Answered]


def test_a_sync_function_is_retried():
    errors = [RateLimitError(), RateLimitError()]

    @retry_on_429
    def ask():
        if errors:
            raise errors.pop()
        return "four"

    with no_waiting():
        assert ask() == "four"


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (say, "say"),
        (Host.say, "Host.say"),
        (Host().say, "Host.say"),
        (functools.partial(functools.partial(say), ending="?"), "say"),
        (Host(), "Host"),
    ],
    ids=["function", "method", "bound method", "partial", "object"],
)
def test_a_function_has_a_name_for_people(function, name):
    assert layers.name_of(function) == f"{__name__}.{name}"
