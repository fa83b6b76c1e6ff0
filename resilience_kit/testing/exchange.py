"""What a simulated request asks, what an answer holds, and how many tokens the service counts for them."""

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Operation = Literal["chat.completions", "responses", "embeddings"]

_OPERATIONS: dict[str, Operation] = {
    "chat/completions": "chat.completions",
    "responses": "responses",
    "embeddings": "embeddings",
}
_TARGET = re.compile(
    r"/(?:openai/deployments/(?P<deployment>[^/]+)|openai/v1|openai|v1)/(?P<name>chat/completions|responses|embeddings)"
)
_COMPLETION_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_KEYS_WITH_TEXT = ("content", "text", "output", "tool_calls", "function", "name", "arguments")


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request as the simulator understood it; what a responder gets.

    Attributes:
        path: The URL's path.
        operation: "chat.completions", "responses" or "embeddings".
        model: The body's `model`, else the deployment in the path, else "".
        deployment: The deployment in the path; None on paths without one.
        messages: The chat's messages. The input of the Responses API has the same shape, its `instructions` first as
            a system message. Empty for embeddings.
        tools: The tools that the request offers.
        body: The whole JSON body.
        headers: The headers, names in lower case.

    Example:
        >>> from resilience_kit.azure import ResilientAzureOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator, SimulatedRequest
        >>> def respond(request: SimulatedRequest) -> str:
        ...     return f"{request.model} was asked: {request.last_user_text}"
        >>> with AzureOpenAISimulator(responder=respond) as azure:
        ...     client = ResilientAzureOpenAI(**azure.client_options())
        ...     response = client.responses.create(model="gpt-4o", input="Hello!")
        ...     client.close()
        >>> response.output_text
        'gpt-4o was asked: Hello!'
    """

    path: str
    operation: Operation
    model: str
    deployment: str | None
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    body: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def last_user_text(self) -> str:
        """The text of the last message of the user; "" if there is none."""
        texts = ("".join(_texts(message)) for message in reversed(self.messages) if message.get("role") == "user")
        return next(texts, "")


@dataclass(frozen=True, slots=True)
class SimulatedAnswer:
    """What the simulated model answers.

    Attributes:
        content: The text.
        tool_calls: Pairs of a tool's name and its arguments.
        finish_reason: None is "tool_calls" if there are any, else "stop". The Responses API says "incomplete" for
            "length" and "content_filter".
        completion_tokens: What `usage` says; None counts a token for each four characters. An answer is never
            shortened to the request's `max_tokens`.

    Example:
        >>> SimulatedAnswer(tool_calls=(("get_weather", {"city": "Bern"}),)).resolved_finish_reason
        'tool_calls'
    """

    content: str = ""
    tool_calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    finish_reason: str | None = None
    completion_tokens: int | None = None

    @property
    def resolved_finish_reason(self) -> str:
        """The reason that goes over the wire."""
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")

    def count_tokens(self) -> int:
        """Return the tokens that `usage` says."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return tokens_by_length(self.content + "".join(name + json.dumps(given) for name, given in self.tool_calls))


Answer = str | SimulatedAnswer
Responder = Callable[[SimulatedRequest], Answer | Awaitable[Answer]]


def answer_briefly(request: SimulatedRequest) -> str:
    """Answer with a short text that repeats the start of the question: the default responder."""
    return f"A simulated answer to: {request.last_user_text[:60]}"


def tokens_by_length(text: str) -> int:
    """Count a token for each four characters begun."""
    return math.ceil(len(text) / 4)


def operation_at(path: str) -> tuple[Operation, str | None] | None:
    """Return the operation that the path stands for and the deployment in it; None if there is nothing there."""
    match = _TARGET.fullmatch(path)
    return (_OPERATIONS[match["name"]], match["deployment"]) if match else None


def read_request(
    path: str, operation: Operation, deployment: str | None, headers: Mapping[str, str], content: bytes
) -> SimulatedRequest:
    """Read a request's JSON.

    Raises:
        ValueError: If the body is no JSON object, or something in it cannot be read; the message is for the client.
    """
    body = json.loads(content)
    if not isinstance(body, dict):
        raise ValueError("the body is not an object")  # noqa: TRY004 - what the client sent, not a wrong argument
    return SimulatedRequest(
        path=path,
        operation=operation,
        model=str(body.get("model") or deployment or ""),
        deployment=deployment,
        messages=tuple(_messages(operation, body)),
        tools=_objects(body, "tools"),
        body=body,
        headers=headers,
    )


def embedding_inputs(request: SimulatedRequest) -> list[str | list[int]]:
    """Return the texts, or lists of token numbers, that the request wants vectors of."""
    given = request.body.get("input") or ""
    if isinstance(given, list) and not (given and isinstance(given[0], int)):
        return given
    return [given]


def count_prompt_tokens(request: SimulatedRequest, count: Callable[[str], int]) -> int:
    """Count the prompt: the text of messages and tools, or the input of embeddings."""
    if request.operation == "embeddings":
        return sum(count(given) if isinstance(given, str) else len(given) for given in embedding_inputs(request))
    tools = json.dumps(request.tools) if request.tools else ""
    return count("".join(text for message in request.messages for text in _texts(message)) + tools)


def completions_charged(request: SimulatedRequest) -> int:
    """Return for how many completions the service sets tokens aside."""
    return request.body.get("best_of") or request.body.get("n") or 1


def reserved_completion_tokens(request: SimulatedRequest, absent: float) -> float:
    """Return what the service sets aside for the completion when the request arrives.

    Args:
        request: The request.
        absent: What to set aside, for each choice, when the request names no maximum.
    """
    if request.operation == "embeddings":
        return 0
    named = (request.body.get(name) for name in _COMPLETION_LIMITS)
    limit = next((value for value in named if isinstance(value, int)), absent)
    return limit * completions_charged(request)


def _messages(operation: Operation, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if operation == "chat.completions":
        yield from _objects(body, "messages")
    elif operation == "responses":
        if body.get("instructions"):
            yield {"role": "system", "content": body["instructions"]}
        if isinstance(body.get("input"), str):
            yield {"role": "user", "content": body["input"]}
        else:
            yield from _objects(body, "input")


def _objects(body: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    given = body.get(name) or []
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise ValueError(f"'{name}' is not a list of objects")
    return tuple(given)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key in _KEYS_WITH_TEXT:
            yield from _texts(value.get(key))
