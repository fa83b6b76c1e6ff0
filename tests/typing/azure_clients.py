# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of the drop-in clients: the SDK's arguments and the kit's are known. Checked, not run."""

from typing import assert_type

from openai import AsyncStream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from resilience_kit.azure import (
    ResilientAsyncAzureOpenAI,
    ResilientAzureOpenAI,
    ResilientOpenAI,
    create_resilient_azure_service,
)

client = ResilientAsyncAzureOpenAI(
    agent="MathAgent", azure_endpoint="https://example.test", api_key="KEY", timeout=5, max_retries=3, max_concurrent=2
)
assert_type(client.with_options(timeout=3), ResilientAsyncAzureOpenAI)

ResilientAzureOpenAI(azure_ad_token_provider=lambda: "token", api_version="2024-10-21", name="east")
ResilientOpenAI(base_url="https://example.test", on_exceed="truncate")

ResilientOpenAI(api_key=1)  # type: ignore[arg-type]  # wrong on purpose
ResilientOpenAI(max_concurrent="2")  # type: ignore[arg-type]  # wrong on purpose
ResilientOpenAI(azure_endpoint="https://example.test")  # type: ignore[call-arg]  # wrong on purpose


async def ask() -> None:
    completion = await client.chat.completions.create(model="gpt-4o", messages=[])
    assert_type(completion, ChatCompletion)
    stream = await client.chat.completions.create(model="gpt-4o", messages=[], stream=True)
    assert_type(stream, AsyncStream[ChatCompletionChunk])


def serve() -> str:
    return create_resilient_azure_service("math", "KEY", "https://example.test", "gpt-4o", "MathAgent").service_id
