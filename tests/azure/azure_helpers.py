"""The four clients, and ways to use a sync one and an async one alike."""

import inspect

from resilience_kit.azure import (
    ResilientAsyncAzureOpenAI,
    ResilientAsyncOpenAI,
    ResilientAzureOpenAI,
    ResilientOpenAI,
)

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
GREETING = "A simulated answer to: Hello"
UNPACED = {"requests_per_minute": 10_000, "tokens_per_minute": 1_000_000, "min_interval": 0}
CLIENTS = {
    "AsyncAzureOpenAI": ResilientAsyncAzureOpenAI,
    "AzureOpenAI": ResilientAzureOpenAI,
    "AsyncOpenAI": ResilientAsyncOpenAI,
    "OpenAI": ResilientOpenAI,
}


def connection(kind, azure):
    """What a client of a kind needs in order to reach a simulator."""
    if "Azure" in kind:
        return azure.client_options()
    return {"base_url": f"{azure.endpoint}/openai/v1", "api_key": "simulated"}


async def finished(outcome):
    """What a sync client returns, or an async one awaits."""
    return await outcome if inspect.isawaitable(outcome) else outcome


async def items_of(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


class Entered:
    """A context manager of either kind, entered with `async with`."""

    def __init__(self, manager):
        self._manager = manager

    async def __aenter__(self):
        is_async = hasattr(self._manager, "__aenter__")
        return await self._manager.__aenter__() if is_async else self._manager.__enter__()

    async def __aexit__(self, *error):
        is_async = hasattr(self._manager, "__aexit__")
        return await self._manager.__aexit__(*error) if is_async else self._manager.__exit__(*error)
