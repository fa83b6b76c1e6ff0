"""What a decorated call costs in tokens: estimated from its arguments before it, read from its result after it."""

import math
from dataclasses import dataclass
from typing import Any

from resilience_kit import token_counting
from resilience_kit.layers import Call
from resilience_kit.validating import is_number

PROMPT_ARGUMENTS = ("messages", "input", "prompt")
ANSWER_ARGUMENTS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_REQUEST_ARGUMENTS = frozenset(
    {
        *PROMPT_ARGUMENTS,
        *ANSWER_ARGUMENTS,
        "instructions",
        "tools",
        "functions",
        "response_format",
        "n",
        "best_of",
        "model",
    }
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a call used."""

    prompt_tokens: int
    completion_tokens: int


def prompt_argument(call: Call, names: tuple[str, ...] = PROMPT_ARGUMENTS) -> tuple[str, Any] | None:
    """The name and value of the argument that holds a call's prompt, if it has one that can be counted."""
    for name in names:
        value = call.argument(name)
        if value is not None:
            return (name, value) if isinstance(value, (str, list, tuple)) else None
    return None


def answer_tokens(call: Call) -> int:
    """The most tokens that the call lets its answer have; 0 if it does not say."""
    for name in ANSWER_ARGUMENTS:
        value = call.argument(name)
        if is_number(value) and value > 0:
            return math.ceil(value)
    return 0


async def count(call: Call, prompt: Any, model: str) -> int:
    """Count a prompt: text, messages, or what an embedding takes.

    The vocabulary, which takes a while to load, never blocks an event loop.
    """
    await _load(call, model)
    return token_counting.estimate_request_tokens({"input": prompt}, model=model)


async def estimate(call: Call) -> int:
    """What Azure charges a request with when it arrives: its prompt, and the most that its answer may have.

    Source: learn.microsoft.com, "Manage Azure OpenAI in Foundry Models quota".
    """
    names = (call.parameters.names & _REQUEST_ARGUMENTS) | (call.kwargs.keys() & _REQUEST_ARGUMENTS)
    request = {name: value for name in names if (value := call.argument(name)) is not None}
    if not request:
        return 0
    model = str(request.get("model") or token_counting.DEFAULT_MODEL)
    await _load(call, model)
    return token_counting.estimate_request_tokens(request, model=model)


async def _load(call: Call, model: str) -> None:
    if not token_counting.is_ready(model):
        await call.waiting.offload(token_counting.load, model)


def usage_of(result: Any) -> Usage | None:
    """The usage that a response, or a chunk of a stream, reports: of chat completions or of responses.

    The last event of a Responses stream carries it one level down, on its `response`.
    """
    usage = _field(result, "usage") or _field(_field(result, "response"), "usage")
    if usage is None:
        return None
    prompt = _first_count(usage, "prompt_tokens", "input_tokens")
    if prompt is None:
        return None
    return Usage(prompt, _first_count(usage, "completion_tokens", "output_tokens") or 0)


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


def _first_count(usage: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := _field(usage, name), int)), None)
