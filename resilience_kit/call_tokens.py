"""What a decorated call costs in tokens: estimated from its arguments before it, read from its result after it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from resilience_kit import token_counting
from resilience_kit.layers import Call
from resilience_kit.validating import is_number

T = TypeVar("T")

PROMPT_ARGUMENTS = ("messages", "input", "prompt")
ANSWER_ARGUMENTS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_NUMBERS_OF_ANSWERS = ("n", "best_of")
# The events of a Responses stream whose `delta` is part of the answer.
_TEXT_EVENTS = frozenset(
    {"response.output_text.delta", "response.refusal.delta", "response.function_call_arguments.delta"}
)
_REQUEST_ARGUMENTS = frozenset(
    {
        *PROMPT_ARGUMENTS,
        *ANSWER_ARGUMENTS,
        "instructions",
        "tools",
        "functions",
        "response_format",
        *_NUMBERS_OF_ANSWERS,
        "model",
    }
)

# What is set aside for an answer without a maximum. Azure's documentation does not say, and its users say two things: a
# small default, which is this one, or all of the model's context, which a limit learns from refusals.
_ABSENT_MAXIMUM = 16
# What only a request for embeddings has, which is not answered in tokens.
_OF_EMBEDDINGS = ("encoding_format", "dimensions")

# More are not meant, or not true: sums of them would not be exact, and prices of them not finite.
_MOST_TOKENS = 2**53

# Characters that take about 1.5 ms to count: an event loop is not held up by more.
_LONG = 50_000


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a call used; `cached_tokens` are those of the prompt that the service had in its cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All of them together."""
        return self.prompt_tokens + self.completion_tokens


def prompt_argument(call: Call, names: tuple[str, ...] = PROMPT_ARGUMENTS) -> tuple[str, Any] | None:
    """The name and value of the argument that holds a call's prompt, if it has one that can be counted."""
    for name in names:
        value = call.argument(name)
        if value is not None:
            return (name, value) if isinstance(value, (str, list, tuple)) else None
    return None


def answer_tokens(call: Call) -> int:
    """The most tokens that the call lets its answers have, all `n` of them together; 0 if it does not say."""
    for name in ANSWER_ARGUMENTS:
        value = call.argument(name)
        if is_number(value) and value > 0:
            answers = (number for name in _NUMBERS_OF_ANSWERS if is_number(number := call.argument(name)))
            tokens = value * max([1, *answers])
            return math.ceil(min(tokens, _MOST_TOKENS))
    return 0


async def count(call: Call, prompt: Any, model: str) -> int:
    """Count a prompt: text, messages, or what an embedding takes."""
    return await _estimate(call, {"input": prompt}, model)


async def estimate(call: Call) -> int:
    """What Azure charges a request with when it arrives: its prompt, and the most that its answer may have.

    An answer without a maximum is taken for a few tokens.

    Source: learn.microsoft.com, "Manage Azure OpenAI in Foundry Models quota".
    """
    names = (call.parameters.names & _REQUEST_ARGUMENTS) | (call.kwargs.keys() & _REQUEST_ARGUMENTS)
    request = {name: value for name in names if (value := call.argument(name)) is not None}
    if not request:
        return 0
    if _is_answered_without_maximum(call, request):
        request["max_tokens"] = _ABSENT_MAXIMUM
    return await _estimate(call, request, str(request.get("model") or token_counting.DEFAULT_MODEL))


def _is_answered_without_maximum(call: Call, request: dict[str, Any]) -> bool:
    if any(is_number(request.get(name)) for name in ANSWER_ARGUMENTS):
        return False
    if "messages" in request or "prompt" in request:
        return True
    given = request.get("input")
    if not isinstance(given, str):
        # messages of the Responses API; an embedding takes texts, and texts as numbers
        return isinstance(given, (list, tuple)) and bool(given) and not isinstance(given[0], (str, int, list, tuple))
    # a text may be either's: one that names no model says too little
    model = request.get("model")
    is_embedding = any(call.argument(name) is not None for name in _OF_EMBEDDINGS)
    return isinstance(model, str) and "embedding" not in model and not is_embedding


async def off_loop(call: Call, prompt: Any, model: str, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function that counts a prompt; in a thread where it would hold up an event loop.

    It would if the vocabulary is not loaded yet, or if the prompt is long.
    """
    if token_counting.is_ready(model) and _is_short(prompt):
        return function(*arguments)
    return await call.waiting.offload(function, *arguments)


async def _estimate(call: Call, request: dict[str, Any], model: str) -> int:
    def estimated() -> int:
        return token_counting.estimate_request_tokens(request, model=model)

    return await off_loop(call, request, model, estimated)


def _is_short(prompt: Any) -> bool:
    try:
        return _characters(prompt) <= _LONG
    except Exception:  # noqa: BLE001 - a prompt may be anything, in itself too, and means something to the function alone
        return False


def _characters(value: Any) -> int:
    """How much text is in a prompt, or in the content of a message that is an object."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    content = getattr(value, "content", None)
    return len(content) if isinstance(content, str) else 0


def usage_of(result: Any) -> Usage | None:
    """The usage that a response, or a chunk of a stream, reports: of chat completions or of responses.

    The last event of a Responses stream carries it one level down, on its `response`.
    """
    usage = _field(result, "usage")
    if usage is None:
        usage = _field(_field(result, "response"), "usage")
    if usage is None:
        return None
    prompt = _first_count(usage, "prompt_tokens", "input_tokens")
    if prompt is None:
        return None
    details = _field(usage, "prompt_tokens_details")
    if details is None:
        details = _field(usage, "input_tokens_details")
    return Usage(
        prompt,
        _first_count(usage, "completion_tokens", "output_tokens") or 0,
        _first_count(details, "cached_tokens") or 0,
    )


def model_of(result: Any) -> str | None:
    """The model that answered, by the name that the response or the chunk gives it."""
    models = (_field(result, "model"), _field(_field(result, "response"), "model"))
    return next((model for model in models if isinstance(model, str) and model), None)


def text_of(item: Any) -> str:
    """The text that an item of a stream adds to the answer: a str, or a chunk of chat completions or of responses."""
    if isinstance(item, str):
        return item
    if _field(item, "type") in _TEXT_EVENTS:
        texts = [_field(item, "delta")]
    else:
        texts = [text for choice in _list(item, "choices") for text in _texts_of_choice(choice)]
    return "".join(text for text in texts if isinstance(text, str))


def _texts_of_choice(choice: Any) -> Iterator[Any]:
    yield _field(choice, "text")  # of the older completions
    delta = _field(choice, "delta")
    yield _field(delta, "content")
    yield _field(delta, "refusal")
    for call in _list(delta, "tool_calls"):
        function = _field(call, "function")
        yield _field(function, "name")
        yield _field(function, "arguments")


def _list(owner: Any, name: str) -> Any:
    value = _field(owner, name)
    return value if isinstance(value, (list, tuple)) else ()


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


def _first_count(usage: Any, *names: str) -> int | None:
    for name in names:
        value = _field(usage, name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS:
            return value
    return None
