"""The openai SDK's four clients with @resilient around each request that is metered.

All that asks a model goes through the clients' public `request()`: `create`, `.parse()`, `.stream()`, raw and streaming
responses. There the request's JSON becomes the keyword arguments of a function that @resilient decorates.
"""

import functools
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, Unpack

from openai import (
    DEFAULT_MAX_RETRIES,
    APIResponse,
    AsyncAPIResponse,
    AsyncAzureOpenAI,
    AsyncOpenAI,
    AzureOpenAI,
    NotGiven,
    OpenAI,
)

from resilience_kit.azure.client_options import (
    AsyncAzureOpenAIOptions,
    AsyncOpenAIOptions,
    AzureOpenAIOptions,
    OpenAIOptions,
)
from resilience_kit.errors import ConfigurationError
from resilience_kit.stack import ResilientOptions, resilient

if TYPE_CHECKING:
    from openai._models import FinalRequestOptions

# What Azure and OpenAI count towards the quotas of requests and tokens of a model.
_METERED = frozenset({"/chat/completions", "/completions", "/embeddings", "/responses", "/responses/compact"})

# With this header the SDK returns a response that has headers and is still to be parsed. `with_raw_response` and
# `with_streaming_response` set it too.
_RAW = "X-Stainless-Raw-Response"

# By each HTTP client, the process that first used it, and so has opened its connections.
_users: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


class _Resilience:
    """What a client and its copies have of @resilient: the method that sends a request, decorated once for all.

    Args:
        send_once: The method, of its class and not of a client, since each copy is a client of its own.
        owner: The client's class, whose name is told with the retries.
        name: The name of the rate limit and of the circuit.
        agent: The name of the token budget.
        options: The other parameters of @resilient.
    """

    def __init__(
        self, send_once: Callable[..., Any], owner: type, name: str, agent: str | None, options: dict[str, Any]
    ) -> None:
        @functools.wraps(send_once)
        def send(*client_and_order: Any, **json: Any) -> Any:
            return send_once(*client_and_order, **json)

        send.__module__, send.__qualname__ = owner.__module__, f"{owner.__qualname__}({name!r})"
        # What takes the call's own arguments is given the request's JSON alone.
        adapted: dict[str, Any] = {key: _of_request(options[key]) for key in ("tokens", "fallback") if key in options}
        self._origin = (send_once, owner, name, agent, options)
        self.options = options
        self.send = resilient(name, agent=agent, **{"shared": True, **options, **adapted})(send)

    def changed(self, given: dict[str, Any]) -> "_Resilience":
        """The same with other parameters."""
        if not given:
            return self
        send_once, owner, name, agent, options = self._origin
        given = {"name": name, "agent": agent, **options, **given}
        return _Resilience(send_once, owner, given.pop("name"), given.pop("agent"), given)


def _taken_of_resilient(options: dict[str, Any]) -> dict[str, Any]:
    """Take the kit's parameters out of a client's options."""
    names = ("name", "agent", *ResilientOptions.__annotations__)
    return {name: options.pop(name) for name in names if name in options}


@dataclass(frozen=True, slots=True)
class _Order:
    """A request as the SDK hands it to its client."""

    cast_to: Any
    options: "FinalRequestOptions"
    stream: bool
    stream_cls: Any

    def is_metered(self) -> bool:
        """Whether it counts towards the quotas; files, batches, models and their like do not."""
        # `client.beta.responses` asks for "/responses?beta=true"
        return self.options.method.lower() == "post" and self.options.url.partition("?")[0] in _METERED

    def is_raw(self) -> bool:
        """Whether the caller wants the response instead of what is in it."""
        return not isinstance(self.options.headers, NotGiven) and _RAW in self.options.headers

    def json(self, model: str | None) -> dict[str, Any]:
        """The request's JSON, with the model whose vocabulary counts, if a deployment's name does not say."""
        json = {**_mapping(self.options.json_data), **_mapping(self.options.extra_json)}
        return json if model is None else {**json, "model": model}

    def unmetered(self, max_retries: int | None) -> "_Order":
        """The order with the SDK's own retries, which are the only ones that it has."""
        if not isinstance(self.options.max_retries, NotGiven):
            return self
        retries = DEFAULT_MAX_RETRIES if max_retries is None else max_retries
        return replace(self, options=self.options.model_copy(update={"max_retries": retries}))

    def metered(self, json: dict[str, Any]) -> "_Order":
        """The order with what the layers made of its JSON, without the SDK's retries, and answered with headers."""
        headers = {} if isinstance(self.options.headers, NotGiven) else self.options.headers
        update = {
            "max_retries": 0,
            "headers": {_RAW: "raw", **headers},
            "json_data": _updated(self.options.json_data, json),
            "extra_json": _updated(self.options.extra_json, json),
        }
        return replace(self, options=self.options.model_copy(update=update))


class _Client:
    """What the four clients share: the stack, built once, and copies that keep it."""

    _send_once: Callable[..., Any]

    def __init__(self, *, name: str, agent: str | None, _resilience: _Resilience | None = None, **options: Any) -> None:
        given = _taken_of_resilient(options)
        send_once: Any = self._send_once
        self._resilience = _resilience or _Resilience(send_once.__func__, type(self), name, agent, given)
        sdk: Any = super()
        sdk.__init__(**options, max_retries=0)

    @property
    def resilient_request(self) -> Callable[..., Any]:
        """What each metered request goes through: the decorated function, for `explain()`."""
        return self._resilience.send

    def copy(self, **options: Any) -> Self:
        """A client with other options, of the SDK's or of the kit's; what is not given stays, and state is shared."""
        resilience = self._resilience.changed(_taken_of_resilient(options))
        extra = {**options.pop("_extra_kwargs", {}), "_resilience": resilience}
        sdk: Any = super()
        copied: Self = sdk.copy(**options, _extra_kwargs=extra)
        return copied

    with_options = copy

    def _check_process(self) -> None:
        """Refuse to send through connections of a parent process: each would read answers that are the other's."""
        sdk: Any = self
        if _users.setdefault(sdk._client, os.getpid()) != os.getpid():  # noqa: SLF001 - the SDK has no other name for it
            raise ConfigurationError(
                "this client was used before the process was forked, and its connections are the parent's: make a "
                "client in the child, or give this one others, as client.copy(http_client=DefaultHttpxClient())"
            )


class _AsyncClient(_Client, AsyncOpenAI):
    async def request(
        self, cast_to: Any, options: "FinalRequestOptions", *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Send a request of the SDK's through the layers."""
        self._check_process()
        order = _Order(cast_to, options, stream, stream_cls)
        if order.is_metered():
            answer = await self._resilience.send(self, order, **order.json(self._resilience.options.get("model")))
            # Outside of the layers, which have settled what the answer used: it may be cut off, and not to be parsed.
            return await answer.parse() if isinstance(answer, AsyncAPIResponse) and not order.is_raw() else answer
        return await self._hand_on(order.unmetered(self._resilience.options.get("max_retries")))

    async def _send_once(self, order: _Order, /, **json: Any) -> Any:
        response = await self._hand_on(order.metered(json))
        return await response.parse() if order.stream and not order.is_raw() else response

    async def _hand_on(self, order: _Order) -> Any:
        request: Any = super().request
        return await request(order.cast_to, order.options, stream=order.stream, stream_cls=order.stream_cls)


class _SyncClient(_Client, OpenAI):
    def request(
        self, cast_to: Any, options: "FinalRequestOptions", *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Send a request of the SDK's through the layers."""
        self._check_process()
        order = _Order(cast_to, options, stream, stream_cls)
        if order.is_metered():
            answer = self._resilience.send(self, order, **order.json(self._resilience.options.get("model")))
            # Outside of the layers, which have settled what the answer used: it may be cut off, and not to be parsed.
            return answer.parse() if isinstance(answer, APIResponse) and not order.is_raw() else answer
        return self._hand_on(order.unmetered(self._resilience.options.get("max_retries")))

    def _send_once(self, order: _Order, /, **json: Any) -> Any:
        response = self._hand_on(order.metered(json))
        return response.parse() if order.stream and not order.is_raw() else response

    def _hand_on(self, order: _Order) -> Any:
        request: Any = super().request
        return request(order.cast_to, order.options, stream=order.stream, stream_cls=order.stream_cls)


class ResilientAsyncAzureOpenAI(_AsyncClient, AsyncAzureOpenAI):
    """The SDK's `AsyncAzureOpenAI` with @resilient around chat completions, responses, completions and embeddings.

    Everything else, as files, batches and fine-tuning, passes through unmetered, with the SDK's own retries: as many
    as `max_retries` says.

    Args:
        name: The name of the rate limit and of the circuit: clients with the same name share them.
        agent: Whose calls these are, outside of `with agent("..."):`. Default: "default".
        **options: The SDK's own arguments, and any parameter of `resilient`; `max_retries` is the kit's. A function
            given as `tokens` or `fallback` takes the request's JSON as keyword arguments. `model` names the model
            whose vocabulary and prices count, where a deployment's name does not say.

    Raises:
        ConfigurationError: An argument cannot work, or a name has another configuration elsewhere. From a request: the
            client was used before the process was forked.

    Example:
        >>> import asyncio
        >>> from resilience_kit.azure import ResilientAsyncAzureOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator
        >>> async def ask(question):
        ...     with AzureOpenAISimulator(rpm=600) as azure:
        ...         options = azure.client_options()
        ...         async with ResilientAsyncAzureOpenAI(agent="MathAgent", **options) as client:
        ...             messages = [{"role": "user", "content": question}]
        ...             completion = await client.chat.completions.create(model="gpt-4o", messages=messages)
        ...             return completion.choices[0].message.content
        >>> asyncio.run(ask("Hello!"))
        'A simulated answer to: Hello!'
    """

    def __init__(
        self, *, name: str = "default", agent: str | None = None, **options: Unpack[AsyncAzureOpenAIOptions]
    ) -> None:
        super().__init__(name=name, agent=agent, **options)


class ResilientAzureOpenAI(_SyncClient, AzureOpenAI):
    """The SDK's `AzureOpenAI` with @resilient around chat completions, responses, completions and embeddings.

    Arguments are those of `ResilientAsyncAzureOpenAI`.

    Args:
        name: The name of the rate limit and of the circuit.
        agent: Whose calls these are, outside of `with agent("..."):`. Default: "default".
        **options: The SDK's own arguments, and any parameter of `resilient`.

    Example:
        >>> from resilience_kit.azure import ResilientAzureOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator
        >>> with AzureOpenAISimulator() as azure:
        ...     client = ResilientAzureOpenAI(agent="MathAgent", **azure.client_options())
        ...     response = client.responses.create(model="gpt-4o", input="Hello!")
        ...     client.close()
        >>> response.output_text
        'A simulated answer to: Hello!'
    """

    def __init__(
        self, *, name: str = "default", agent: str | None = None, **options: Unpack[AzureOpenAIOptions]
    ) -> None:
        super().__init__(name=name, agent=agent, **options)


class ResilientAsyncOpenAI(_AsyncClient):
    """The SDK's `AsyncOpenAI` with @resilient around chat completions, responses, completions and embeddings.

    Arguments are those of `ResilientAsyncAzureOpenAI`, with those of `openai.AsyncOpenAI` in place of Azure's.

    Args:
        name: The name of the rate limit and of the circuit.
        agent: Whose calls these are, outside of `with agent("..."):`. Default: "default".
        **options: The SDK's own arguments, and any parameter of `resilient`.

    Example:
        >>> import asyncio
        >>> from resilience_kit.azure import ResilientAsyncOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator
        >>> async def embed(text):
        ...     with AzureOpenAISimulator() as service:
        ...         async with ResilientAsyncOpenAI(base_url=f"{service.endpoint}/openai/v1", api_key="key") as client:
        ...             answer = await client.embeddings.create(model="text-embedding-3-small", input=text)
        ...             return len(answer.data)
        >>> asyncio.run(embed("Hello!"))
        1
    """

    def __init__(
        self, *, name: str = "default", agent: str | None = None, **options: Unpack[AsyncOpenAIOptions]
    ) -> None:
        super().__init__(name=name, agent=agent, **options)


class ResilientOpenAI(_SyncClient):
    """The SDK's `OpenAI` with @resilient around chat completions, responses, completions and embeddings.

    Arguments are those of `ResilientAsyncAzureOpenAI`, with those of `openai.OpenAI` in place of Azure's.

    Args:
        name: The name of the rate limit and of the circuit.
        agent: Whose calls these are, outside of `with agent("..."):`. Default: "default".
        **options: The SDK's own arguments, and any parameter of `resilient`.

    Example:
        >>> from resilience_kit.azure import ResilientOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator
        >>> with AzureOpenAISimulator() as service:
        ...     client = ResilientOpenAI(base_url=f"{service.endpoint}/openai/v1", api_key="key", max_retries=5)
        ...     response = client.responses.create(model="gpt-4o", input="Hello!")
        ...     client.close()
        >>> response.output_text
        'A simulated answer to: Hello!'
    """

    def __init__(self, *, name: str = "default", agent: str | None = None, **options: Unpack[OpenAIOptions]) -> None:
        super().__init__(name=name, agent=agent, **options)


def _of_request(function: Any) -> Any:
    """A function of a request's JSON, as one of the arguments that the decorated method takes."""
    if not callable(function):
        return function

    @functools.wraps(function)
    def of_request(_client: _Client, _order: _Order, /, **json: Any) -> Any:
        return function(**json)

    return of_request


def _mapping(json: Any) -> dict[str, Any]:
    return json if isinstance(json, dict) else {}


def _updated(before: Any, after: dict[str, Any]) -> Any:
    """JSON with the values of other JSON for its own keys; the model stays, as it may be there for counting alone."""
    if not isinstance(before, dict):
        return before
    return {key: value if key == "model" else after[key] for key, value in before.items()}
