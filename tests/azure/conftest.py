"""A simulator, and clients on limits that no test waits for."""

from contextlib import AsyncExitStack

import pytest
from azure_helpers import CLIENTS, UNPACED, connection, finished

from resilience_kit.testing import AzureOpenAISimulator


@pytest.fixture
def azure():
    with AzureOpenAISimulator() as simulator:
        yield simulator


@pytest.fixture(params=CLIENTS)
def kind(request):
    return request.param


@pytest.fixture
async def make_client(azure):
    """Make a client of a kind, on the simulator; it is closed at the end of the test."""
    async with AsyncExitStack() as stack:

        def make(kind="AsyncAzureOpenAI", **options):
            client = CLIENTS[kind](**connection(kind, azure), **{**UNPACED, "timeout": 5, **options})
            stack.push_async_callback(lambda: finished(client.close()))
            return client

        yield make


@pytest.fixture
def client(make_client, kind):
    return make_client(kind)
