"""Count text, messages and requests in tokens; with the extra `offline`, exactly and without a network.

Without the extra, tiktoken's own cache or download is used. Where neither is at hand, counts are estimates on the high
side, and a warning says so once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from resilience_kit.image_tokens import image_tokens
from resilience_kit.text_tokens import count_text
from resilience_kit.vocabularies import DEFAULT_MODEL, encoding_name, is_ready, load

__all__ = [
    "DEFAULT_MODEL",
    "count_tokens",
    "estimate_request_tokens",
    "is_ready",
    "load",
]

# The arithmetic of OpenAI's cookbook, "How to count tokens with tiktoken".
_MESSAGE_TOKENS = 3
_NAME_TOKENS = 1
REPLY_TOKENS = 3
_FUNCTION_TOKENS = {"cl100k_base": 10}  # of the models before gpt-4o
_LATER_FUNCTION_TOKENS = 7
_PROPERTIES_TOKENS = 3
_PROPERTY_TOKENS = 3
_ENUM_TOKENS = -3
_ENUM_ITEM_TOKENS = 3
_TOOLS_END_TOKENS = 12

# Images, and files, which count as images do: what is in them cannot be known from the request.
_ATTACHMENTS = frozenset({"image_url", "input_image", "image_file", "input_audio", "file", "input_file"})

# Parts of a JSON schema that are not spelt out, but counted by their size.
_OTHER_SCHEMAS = ("anyOf", "oneOf", "allOf", "$defs")

# Of a message that JSON cannot say either.
NESTED = "A message is nested too deeply, or in itself"

# Keys whose values do not reach the model as text.
_NOT_PROMPT = frozenset(
    {"type", "id", "call_id", "tool_call_id", "status", "annotations", "logprobs", "audio", "encrypted_content"}
)


def count_tokens(text_or_messages: str | Iterable[object], *, model: str = DEFAULT_MODEL) -> int:
    """Count the tokens of a text, or of messages as a request would hold them.

    Special tokens such as `<|endoftext|>` count as the text that they are.

    Args:
        text_or_messages: A str, or a list of messages: dicts or objects with `model_dump` (pydantic's, the SDK's).
        model: A model or a deployment; a name that contains no known model counts as gpt-4o does.

    Raises:
        TypeError: It is neither.

    Example:
        >>> count_tokens("hello world"), count_tokens([{"role": "user", "content": "hello world"}])
        (2, 9)
    """
    if isinstance(text_or_messages, str):
        return count_text(text_or_messages, model)
    messages = as_messages(text_or_messages)
    try:
        return REPLY_TOKENS + sum(sum(measure(message, model)) for message in messages)
    except RecursionError:
        raise TypeError(NESTED) from None


def estimate_request_tokens(request: Mapping[str, object], *, model: str | None = None) -> int:
    """Estimate what a request is charged with on arrival: its prompt, and the answer that it reserves.

    Azure adds `max_tokens` times `best_of` to the prompt when the request arrives. Never raises for a value of an
    unexpected type: what isn't understood counts nothing.

    Args:
        request: A request's JSON, or a function's arguments by name. Read are `messages`, `input`, `prompt` and
            `instructions`; `tools` and `functions`, and `response_format`, roughly by its size; `max_tokens`,
            `max_completion_tokens` and `max_output_tokens`; `n` and `best_of`.
        model: The request's own `model` by default, else gpt-4o.

    Example:
        >>> estimate_request_tokens({"prompt": "hello world", "max_tokens": 100, "n": 2})
        202
    """
    if model is None:
        named = request.get("model")
        model = named if isinstance(named, str) else DEFAULT_MODEL
    prompt = sum(_understood(count, request.get(key), model) for key, count in _PROMPT.items())
    answer = _largest(request, ("max_tokens", "max_completion_tokens", "max_output_tokens"), default=0)
    return prompt + answer * _largest(request, ("n", "best_of"), default=1)


def _understood(count: Callable[[object, str], int], value: object, model: str) -> int:
    try:
        return count(value, model)
    except Exception:  # noqa: BLE001 - a value may be anything; one that cannot be read through cannot be sent either
        return 0


def as_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages as new dicts in a new list.

    Raises:
        TypeError: These are not messages.
    """
    if isinstance(messages, Iterable) and not isinstance(messages, str | bytes | Mapping):
        return [_as_message(message) for message in messages]
    raise TypeError(f"Pass a list of messages (count_tokens takes a str too), not {type(messages).__name__}")


def _as_message(message: object) -> dict[str, Any]:
    fields = fields_of(message)
    if fields is None:
        raise TypeError(f"A message is a dict or an object with model_dump, not {type(message).__name__}")
    return fields


def fields_of(value: object) -> dict[str, Any] | None:
    """Return a copy of a dict's or a pydantic object's fields; None for all else, mocks and classes included."""
    if isinstance(value, dict):  # most of them: asking for a Mapping takes longer
        return value.copy()
    try:
        if not isinstance(value, Mapping | type) and hasattr(value, "model_dump"):
            value = value.model_dump(exclude_none=True)
        return dict(value) if isinstance(value, Mapping) else None
    except Exception:  # noqa: BLE001 - an object that does not say what it holds may mean something to the function
        return None


def measure(message: Mapping[str, Any], model: str) -> tuple[int, int]:
    """Count the tokens of a message: those of its text, which may be cut, and all others."""
    text, rest = 0, _MESSAGE_TOKENS
    key_of_text = text_key(message)
    for key, value in message.items():
        if key != key_of_text:
            if key not in _NOT_PROMPT:
                rest += _part_tokens(value, model)
                if key == "name" and value:
                    rest += _NAME_TOKENS
        elif isinstance(value, str):
            text += count_text(value, model)
        else:
            for part in parts_of(value):
                part_text = text_of_part(part)
                if part_text is None:
                    rest += _part_tokens(part, model)
                else:
                    text += count_text(part_text, model)
    return text, rest


def text_key(message: Mapping[str, Any]) -> str:
    """Return where a message's text is: the results of tools have it in `output` in the Responses API."""
    return "content" if "content" in message else "output"


def parts_of(content: Any) -> Sequence[Any]:
    """Return the parts of a message's content; text is its only part."""
    return content if isinstance(content, (list, tuple)) else (content,)


def text_of_part(part: Any) -> str | None:
    """Return the text of a part that is text."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _part_tokens(part: Any, model: str) -> int:
    """Count whatever in a part of a message reaches the model."""
    if isinstance(part, str):
        return count_text(part, model)
    if isinstance(part, (list, tuple)):
        return sum(_part_tokens(inner, model) for inner in part)
    fields = fields_of(part) or {}
    if str(fields.get("type")) in _ATTACHMENTS:
        return image_tokens(fields, model)
    return sum(_part_tokens(value, model) for key, value in fields.items() if key not in _NOT_PROMPT)


def _tools_tokens(tools: object, model: str) -> int:
    """Count the tools that a request offers: functions as the cookbook counts them, all else by its size."""
    if not isinstance(tools, (list, tuple)) or not tools:
        return 0
    return _TOOLS_END_TOKENS + sum(_tool_tokens(tool, model) for tool in tools)


def _tool_tokens(tool: object, model: str) -> int:
    fields = fields_of(tool) or {}
    # `tools` of chat completions hold it one level down; `functions`, and `tools` of responses, do not.
    function = fields_of(fields.get("function")) or fields
    if "name" not in function:
        return _printed_tokens(tool, model)
    tokens = _FUNCTION_TOKENS.get(encoding_name(model), _LATER_FUNCTION_TOKENS)
    tokens += count_text(f"{function['name']}:{_description(function)}", model)
    return tokens + _schema_tokens(function.get("parameters"), model)


def _schema_tokens(schema: object, model: str) -> int:
    """Count the properties of a JSON schema; those of inner objects, of which the cookbook is silent, likewise."""
    if not isinstance(schema, Mapping):
        return 0
    properties = schema.get("properties")
    tokens = _schema_tokens(schema.get("items"), model) + sum(
        _printed_tokens(schema.get(key), model) for key in _OTHER_SCHEMAS
    )
    if not isinstance(properties, Mapping) or not properties:
        return tokens
    tokens += _PROPERTIES_TOKENS
    for name, value in properties.items():
        inner = value if isinstance(value, Mapping) else {}
        tokens += _PROPERTY_TOKENS + count_text(f"{name}:{inner.get('type', '')}:{_description(inner)}", model)
        items = inner.get("enum")
        if isinstance(items, (list, tuple)):
            tokens += _ENUM_TOKENS + sum(_ENUM_ITEM_TOKENS + count_text(str(item), model) for item in items)
        tokens += _schema_tokens(inner, model)
    return tokens


def _description(owner: Mapping[str, Any]) -> str:
    return str(owner.get("description") or "").removesuffix(".")


def _printed_tokens(schema: object, model: str) -> int:
    """Count a schema by what Python prints of it, which is about as long as its JSON."""
    return count_text(str(schema), model) if isinstance(schema, Sequence | Mapping) else 0


def _prompt_tokens(prompt: object, model: str) -> int:
    """Count a prompt in any of the shapes that the APIs take: text, messages, token ids, and lists of these."""
    if isinstance(prompt, str):
        return count_text(prompt, model)
    if isinstance(prompt, int):
        return 1
    if isinstance(prompt, (list, tuple)):
        of_messages = bool(prompt) and not isinstance(prompt[0], (str, int, list, tuple))
        return (REPLY_TOKENS if of_messages else 0) + sum(_prompt_tokens(item, model) for item in prompt)
    fields = fields_of(prompt)
    return 0 if fields is None else sum(measure(fields, model))


def _largest(request: Mapping[str, object], keys: tuple[str, ...], *, default: int) -> int:
    numbers = [value for value in map(request.get, keys) if isinstance(value, int)]
    return max([default, *numbers])


_PROMPT: dict[str, Callable[[object, str], int]] = {
    **dict.fromkeys(("messages", "input", "prompt", "instructions"), _prompt_tokens),
    **dict.fromkeys(("tools", "functions"), _tools_tokens),
    "response_format": _printed_tokens,
}
