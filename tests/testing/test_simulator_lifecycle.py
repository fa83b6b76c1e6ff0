"""How a simulator starts and ends, and what it leaves behind."""

import asyncio
import gc
import importlib
import socket
import sys
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import openai
import pytest
from openai import AsyncAzureOpenAI, AzureOpenAI

from resilience_kit.testing.background_server import BackgroundServer
from resilience_kit.testing.faults import Fault
from resilience_kit.testing.simulator import AzureOpenAISimulator

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}


def client_of(azure):
    return AzureOpenAI(**azure.client_options(), max_retries=0, timeout=5)


def server_threads():
    return [thread for thread in threading.enumerate() if thread.name == "azure-openai-simulator"]


def address_of(azure):
    parts = urlsplit(azure.endpoint)
    return parts.hostname, parts.port


def test_the_end_leaves_no_thread_and_no_listener():
    with AzureOpenAISimulator() as azure:
        address = address_of(azure)
        assert len(server_threads()) == 1
    assert server_threads() == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_it_can_run_again_and_keeps_its_counts():
    azure = AzureOpenAISimulator()
    for _ in range(2):
        with azure, client_of(azure) as client:
            client.chat.completions.create(**HELLO)
    assert azure.stats.requests == 2


def test_a_second_end_does_nothing():
    with AzureOpenAISimulator() as azure:
        azure.__exit__(None, None, None)
    assert server_threads() == []


def test_a_responder_may_leave_work_to_threads_and_they_end_with_it():
    async def answer(_):
        return await asyncio.to_thread(lambda: "From a thread.")

    before = threading.active_count()
    with AzureOpenAISimulator(responder=answer) as azure, client_of(azure) as client:
        client.chat.completions.create(**HELLO)
    assert threading.active_count() == before


def test_it_cannot_run_twice_at_once():
    with AzureOpenAISimulator() as azure, pytest.raises(RuntimeError, match="running already"):
        azure.__enter__()


def test_it_has_no_endpoint_before_it_runs():
    with pytest.raises(RuntimeError, match="not running"):
        AzureOpenAISimulator().endpoint  # noqa: B018 - reading it is what raises


def test_it_listens_where_it_is_told():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with AzureOpenAISimulator(host="localhost", port=port) as azure:
        assert azure.endpoint == f"http://localhost:{port}"


@pytest.mark.parametrize("fault", [Fault.slow_stream(delay=60), Fault.time_out()])
def test_the_end_does_not_wait_for_open_requests(fault):
    failed = threading.Event()

    def ask():
        with client_of(azure) as client, pytest.raises(openai.APIConnectionError):
            list(client.chat.completions.create(**HELLO, stream=True))
        failed.set()

    with AzureOpenAISimulator(faults=[fault]) as azure:
        asking = threading.Thread(target=ask)
        asking.start()
        while not azure.stats.faults:
            time.sleep(0.001)
        start = time.monotonic()
    assert time.monotonic() - start < 1
    assert failed.wait(5)
    asking.join()
    assert azure.stats.in_flight == 0


def test_the_end_breaks_an_idle_connection():
    with AzureOpenAISimulator() as azure, client_of(azure) as client:
        client.chat.completions.create(**HELLO)
        azure.__exit__(None, None, None)
        with pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(**HELLO)


def test_the_end_breaks_a_connection_that_sent_half_a_request():
    with AzureOpenAISimulator() as azure:
        half = socket.create_connection(address_of(azure))
        half.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        while not azure.stats.in_flight:
            time.sleep(0.001)
    with half:
        assert half.recv(1) == b""
    assert azure.stats.in_flight == 0


def test_the_end_leaves_no_connection_open_that_is_just_being_accepted(monkeypatch):
    server = BackgroundServer(None, "127.0.0.1", 0)
    end_all = server._end_all
    with ExitStack() as clients:

        async def end_while_accepting():
            """Connect in the server's loop, which accepts at its next turn, and is not done with it when this ends."""
            for _ in range(3):
                clients.enter_context(socket.create_connection(address_of(server)))
            for _ in range(2):
                await asyncio.sleep(0)
            await end_all()

        monkeypatch.setattr(server, "_end_all", end_while_accepting)
        server.close()
        gc.collect()  # a socket that is left open warns now


async def test_it_serves_while_the_clients_loop_is_blocked():
    async with AzureOpenAISimulator() as azure:
        with client_of(azure) as client:
            assert client.chat.completions.create(**HELLO).choices


async def test_requests_in_flight_are_counted():
    everyone_is_here = threading.Barrier(5)

    async def wait_for_all(_):
        await asyncio.to_thread(everyone_is_here.wait)
        return "Here."

    async with (
        AzureOpenAISimulator(responder=wait_for_all) as azure,
        AsyncAzureOpenAI(**azure.client_options(), max_retries=0, timeout=5) as client,
    ):
        await asyncio.gather(*(client.chat.completions.create(**HELLO) for _ in range(5)))
    assert (azure.stats.in_flight, azure.stats.max_in_flight) == (0, 5)


def test_a_reset_keeps_count_of_requests_in_flight():
    with AzureOpenAISimulator(responder=lambda _: azure.reset() or "Reset.") as azure, client_of(azure) as client:
        client.chat.completions.create(**HELLO)
    assert (azure.stats.requests, azure.stats.in_flight, azure.stats.max_in_flight) == (0, 0, 1)


@pytest.mark.parametrize("latency", [0.1, (0.1, 0.2), lambda _: 0.1])
def test_an_answer_takes_the_latency(latency):
    with AzureOpenAISimulator(latency=latency) as azure, client_of(azure) as client:
        start = time.monotonic()
        client.chat.completions.create(**HELLO)
        assert time.monotonic() - start >= 0.1


def fail(_):
    raise LookupError("no answer")


def test_what_the_responder_raises_is_a_500_and_raised_at_the_end():
    with (
        pytest.raises(ExceptionGroup) as caught,
        AzureOpenAISimulator(responder=fail) as azure,
        client_of(azure) as client,
        pytest.raises(openai.InternalServerError, match="raised at exit"),
    ):
        client.chat.completions.create(**HELLO)
    (failure,) = caught.value.exceptions
    assert isinstance(failure, LookupError)


def test_what_the_responder_raises_is_noted_on_the_error_that_ends_the_block():
    with (
        pytest.raises(openai.InternalServerError) as caught,
        AzureOpenAISimulator(responder=fail) as azure,
        client_of(azure) as client,
    ):
        client.chat.completions.create(**HELLO)
    assert caught.value.__notes__ == ["The simulator failed to answer: LookupError('no answer')"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "resilience_kit.testing.simulator")
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    with pytest.raises(ImportError, match=r"pip install 'resilience-kit\[testing\]'"):
        importlib.import_module("resilience_kit.testing.simulator")
