"""Scenarios of the resilient clients of the openai SDK: chat, responses and embeddings, whole, raw and streamed."""

from collections.abc import AsyncIterable

from resilience_kit.azure import (
    ResilientAsyncAzureOpenAI,
    ResilientAsyncOpenAI,
    ResilientAzureOpenAI,
    ResilientOpenAI,
)

from .services import MODEL, piece_of, read_all, read_all_blocking, text_of


def client_of(world, azure, agent, *, is_async, timeout=None):
    """A resilient client whose requests are witnessed; every second scenario talks to Azure, the others to OpenAI."""
    from .running import NAME, options_of

    is_azure = world.scenario.seed % 2 == 0
    kinds = {
        (True, True): ResilientAsyncAzureOpenAI,
        (True, False): ResilientAsyncOpenAI,
        (False, True): ResilientAzureOpenAI,
        (False, False): ResilientOpenAI,
    }
    base = kinds[is_async, is_azure]
    witness = world.witness

    def use(order, response):
        if not order.stream:
            witness.use(agent, response.http_response.json()["usage"]["total_tokens"])
        return response

    class AsyncWitnessed(base):
        async def _send_once(self, order, /, **json):
            with witness.function(int(json["user"])):
                return use(order, await super()._send_once(order, **json))

    class Witnessed(base):
        def _send_once(self, order, /, **json):
            with witness.function(int(json["user"])):
                return use(order, super()._send_once(order, **json))

    where = azure.client_options() if is_azure else {"base_url": f"{azure.endpoint}/openai/v1", "api_key": "simulated"}
    given = options_of(world.scenario)
    return (AsyncWitnessed if is_async else Witnessed)(
        name=NAME, agent=agent, timeout=timeout or world.scenario.client_timeout, **where, **given
    )


def ask(client, order):
    """Call an operation, another one for each order; returns what the client does, and what makes a text of it."""
    messages = [{"role": "user", "content": order.prompt}]
    chat = {"model": MODEL, "messages": messages, "max_tokens": order.max_tokens, "user": str(order.number)}
    response = {
        "model": MODEL,
        "input": order.prompt,
        "max_output_tokens": order.max_tokens,
        "user": str(order.number),
    }
    if order.is_stream and order.number % 3 == 0:
        return client.responses.create(**response, stream=True), _delta_of
    if order.is_stream:
        return client.chat.completions.create(**chat, stream=True), piece_of
    match order.number % 4:
        case 0:
            return client.responses.create(**response), lambda answer: answer.output_text
        case 1:
            raw = client.chat.completions.with_raw_response.create(**chat)
            return raw, lambda answer: text_of(answer.parse())
        case 2:
            embeddings = client.embeddings.create(model=MODEL, input=order.prompt, user=str(order.number))
            return embeddings, lambda answer: ""
        case _:
            return client.chat.completions.create(**chat), text_of


def _delta_of(event):
    return event.delta if event.type == "response.output_text.delta" else ""


def clients_of(world, azure, *, is_async):
    """A client for each agent: of streams nobody but the client knows when their usage was told."""
    return {agent: client_of(world, azure, agent, is_async=is_async) for agent in ("whole", "part")}


async def ask_async(order, clients):
    """Make one call of an async client's, and return its text."""
    outcome, text = ask(clients["part" if order.is_stream else "whole"], order)
    answer = await outcome
    del outcome
    if not isinstance(answer, AsyncIterable):
        return text(answer)
    return await read_all(order, answer, text)


def ask_blocking(order, clients):
    """Make one call of a sync client's in this thread, and return its text."""
    answer, text = ask(clients["part" if order.is_stream else "whole"], order)
    if not order.is_stream:
        if order.dies:
            raise SystemExit
        return text(answer)
    return read_all_blocking(order, answer, text)
