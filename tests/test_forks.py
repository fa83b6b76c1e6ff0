"""Forks: in the child, what its parent's threads held is free, and what they did for it works or says what to do.

The tests of a sampler, of a history, of OpenTelemetry and of a fleet beside a fork stand with those.
"""

import ast
import asyncio
import faulthandler
import multiprocessing
import os
import pickle
import threading
import traceback
import warnings
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from openai import AzureOpenAI, DefaultHttpxClient

import resilience_kit
from resilience_kit import (
    ConfigurationError,
    count_tokens,
    events,
    get_all_resilience_stats,
    registry,
    reset_circuit_breakers,
    resilient,
    stats,
    text_tokens,
    vocabularies,
)
from resilience_kit.azure import ResilientAsyncAzureOpenAI, ResilientAzureOpenAI
from resilience_kit.circuits import circuits
from resilience_kit.monitoring.dashboard import create_app, running
from resilience_kit.rate_limits import rate_limits
from resilience_kit.retry_budgets import retry_budgets
from resilience_kit.testing import AzureOpenAISimulator
from resilience_kit.testing.faults import Fault
from resilience_kit.token_budgets import token_budgets

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")

# Seconds after which a child counts as hanging; it takes a hundredth of that.
PATIENCE = 15


@resilient("forks", agent="forks", budget_tokens=10_000, min_interval=0, max_concurrent=2)
def ask(prompt):
    return f"an answer to {prompt}"


@resilient("forks", agent="forks", budget_tokens=10_000, min_interval=0, max_concurrent=2)
async def ask_later(prompt):
    await asyncio.sleep(0)
    return f"an answer to {prompt}"


@resilient("forks", agent="forks", budget_tokens=10_000, max_retries=0)
def fail():
    raise ConnectionError


@resilient("forks", agent="forks", budget_tokens=10_000, min_interval=0, max_concurrent=2)
def stream(prompt):
    yield "some "
    yield "words"


def use_everything():
    """Use what a child may use; returns what it counted, from zero."""
    assert ask("2 + 2?") == "an answer to 2 + 2?"
    assert asyncio.run(ask_later("2 + 2?")) == "an answer to 2 + 2?"
    assert [*stream("2 + 2?")] == ["some ", "words"]
    assert count_tokens("2 + 2?") > 0
    events.subscribe(lambda event: None)()
    reset_circuit_breakers()
    return get_all_resilience_stats()["rate_limiters"]["forks"]["calls_admitted"]


def in_child(work):
    """What a function returns in a forked child; fails if it raises there, or hangs."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # from 3.12 on, Python warns of each fork beside threads: that is what is tested
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            answer = work(), None
        except BaseException:  # noqa: BLE001 - told to the parent
            answer = None, traceback.format_exc()
        os.write(writer, pickle.dumps(answer))
        # no test goes on in the child, and nothing is tidied up twice
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told, "the child hangs"
    answer, raised = pickle.loads(told)  # noqa: S301 - of the test's own child
    assert raised is None, raised
    return answer


@contextmanager
def held_by_another_thread(lock):
    """Have a thread hold a lock, but not for so long that a fork could not wait for it."""
    is_held, is_over = threading.Event(), threading.Event()

    def hold():
        with lock:
            is_held.set()
            is_over.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(PATIENCE)
    yield
    is_over.set()
    thread.join()


# of "2 + 2?"
EXACT = 5
# of a simulator, to "Hello!"
ANSWER = "A simulated answer to: Hello!"
MAKERS_OF_LOCKS = ("threading.Lock", "threading.RLock", "threading.Condition", "threading.Semaphore")
# Each has something at the end of its module that runs at a fork, or is asked by one that has.
RENEWED_OTHERWISE = {"forking", "history", "sampler", "sinks", "stats"}

LOCKS = {
    "events": lambda: events._lock,
    "statistics": lambda: stats._lock,
    **{it.kind: lambda it=it: it._lock for it in registry.all_registries},
    "one rate limit": lambda: rate_limits.items()["forks"]._lock,
    "one circuit": lambda: circuits.items()["forks"]._lock,
    "one token budget": lambda: token_budgets.items()["forks"]._lock,
    "one retry budget": lambda: next(iter(retry_budgets.items().values()))._lock,
}


def test_a_child_uses_everything_after_the_import():
    assert in_child(use_everything) == 3


def test_a_child_counts_from_zero_and_its_parent_goes_on():
    use_everything()
    assert in_child(use_everything) == 3
    assert use_everything() == 6


@pytest.mark.parametrize("name", LOCKS)
def test_a_child_waits_for_no_lock_that_a_thread_of_its_parent_held(name):
    use_everything()
    with held_by_another_thread(LOCKS[name]()):
        assert in_child(use_everything) == 3


@pytest.mark.parametrize("name", ["one rate limit", "one circuit", "one token budget"])
def test_a_child_reads_on_in_a_stream_of_its_parents_though_a_thread_held_what_it_gives_back(name):
    with pytest.raises(ConnectionError):
        # a failure, which the circuit forgets with the next success
        fail()
    words = stream("2 + 2?")
    next(words)
    with held_by_another_thread(LOCKS[name]()):
        assert in_child(lambda: [*words]) == ["words"]
    assert [*words] == ["words"]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(vocabularies, "_encodings", {})
    # what was counted once is known without a vocabulary
    monkeypatch.setattr(text_tokens, "_counts", {})


def test_a_child_loads_a_vocabulary_though_a_thread_of_its_parent_was_about_to(nothing_is_loaded):
    with held_by_another_thread(vocabularies._loading):
        assert in_child(lambda: count_tokens("2 + 2?")) == EXACT


def test_a_child_loads_a_vocabulary_that_a_thread_of_its_parent_was_downloading(nothing_is_loaded):
    vocabularies._encodings["gpt-4o"] = Future()
    assert in_child(lambda: count_tokens("2 + 2?")) == EXACT


def test_a_child_counts_by_the_vocabulary_that_its_parent_has_loaded():
    count_tokens("2 + 2?")
    assert in_child(lambda: vocabularies.is_ready("gpt-4o"))


def test_a_child_does_not_wait_for_the_calls_of_its_parents_threads():
    holding, is_over = threading.Barrier(3), threading.Event()

    @resilient("forks")
    def hold():
        holding.wait(PATIENCE)
        is_over.wait(PATIENCE)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    holding.wait(PATIENCE)
    waiting = threading.Thread(target=ask, args=["3 + 3?"])
    waiting.start()
    assert in_child(use_everything) == 3
    is_over.set()
    for thread in [*threads, waiting]:
        thread.join(PATIENCE)
    assert get_all_resilience_stats()["rate_limiters"]["forks"]["calls_admitted"] == 3


async def test_a_child_of_a_running_event_loop_uses_everything():
    await ask_later("2 + 2?")
    assert in_child(use_everything) == 3
    assert await ask_later("2 + 2?") == "an answer to 2 + 2?"


def test_a_process_of_multiprocessing_that_is_forked_calls_what_its_parent_decorated():
    use_everything()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=lambda: queue.put(use_everything()))
        process.start()
    process.join(PATIENCE)
    assert (process.exitcode, queue.get()) == (0, 3)


def test_a_child_leaves_the_block_of_a_simulator_that_goes_on_serving_its_parent():
    with ExitStack() as stack:
        azure = stack.enter_context(AzureOpenAISimulator())
        in_child(stack.close)
        ask_over_http(azure)
        assert azure.stats.requests == 1


def test_the_simulator_of_its_parent_serves_a_child_and_counts_it():
    with AzureOpenAISimulator() as azure:
        in_child(lambda: ask_over_http(azure))
        assert azure.stats.requests == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda azure: azure.stats,
        lambda azure: azure.reset(),
        lambda azure: azure.set_quota(rpm=1),
        lambda azure: azure.inject(Fault.internal_error()),
    ],
    ids=["stats", "reset", "set_quota", "inject"],
)
def test_a_child_is_told_that_the_simulator_counts_in_its_parent(use):
    def use_in_child(azure):
        with pytest.raises(ConfigurationError, match="in the process that started it"):
            use(azure)

    with AzureOpenAISimulator() as azure:
        in_child(lambda: use_in_child(azure))


def test_a_child_starts_a_simulator_that_its_parent_only_made():
    azure = AzureOpenAISimulator()

    def start():
        with azure:
            ask_over_http(azure)
            return azure.stats.requests

    assert in_child(start) == 1


def ask_over_http(azure):
    with AzureOpenAI(**azure.client_options()) as client:
        client.responses.create(model="gpt-4o", input="Hello!")


@pytest.fixture
def client():
    with AzureOpenAISimulator() as azure, ResilientAzureOpenAI(**azure.client_options(), min_interval=0) as client:
        yield client


def ask_by(client):
    return client.responses.create(model="gpt-4o", input="Hello!").output_text


def test_a_child_is_told_not_to_read_answers_from_its_parents_connections(client):
    ask_by(client)

    def ask_in_child():
        with pytest.raises(ConfigurationError, match="make a client in the child"):
            ask_by(client)

    in_child(ask_in_child)
    assert ask_by(client) == ANSWER


def test_a_child_uses_a_client_that_its_parent_has_not_used(client):
    assert in_child(lambda: ask_by(client)) == ANSWER
    assert ask_by(client) == ANSWER


def test_a_child_gives_a_client_connections_of_its_own(client):
    ask_by(client)
    assert in_child(lambda: ask_by(client.copy(http_client=DefaultHttpxClient()))) == ANSWER


async def test_a_child_is_told_not_to_use_its_parents_connections_of_an_event_loop():
    with AzureOpenAISimulator() as azure:
        async with ResilientAsyncAzureOpenAI(**azure.client_options()) as client:
            await client.responses.create(model="gpt-4o", input="Hello!")

            def ask_in_child():
                with pytest.raises(ConfigurationError, match="make a client in the child"):
                    asyncio.run(client.responses.create(model="gpt-4o", input="Hello!"))

            in_child(ask_in_child)


def test_a_child_leaves_the_block_of_a_dashboard_that_its_parent_serves():
    with ExitStack() as stack:
        stack.enter_context(running(create_app(), port=0))
        in_child(stack.close)


def made_locks(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return [node for node in calls if ast.unparse(node.func) in MAKERS_OF_LOCKS]


def test_no_lock_is_made_that_a_thread_could_hold_for_ever_in_a_child():
    modules = Path(resilience_kit.__file__).parent.rglob("*.py")
    assert {path.stem for path in modules if made_locks(path)} == RENEWED_OTHERWISE
