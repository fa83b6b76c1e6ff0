"""Count, estimate and truncate text and messages in tokens; with the extra `offline`, exactly and without a network.

Without the extra, tiktoken's own cache or download is used. Where neither is at hand, counts are estimates on the high
side, and a warning says so once.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilience_kit.vocabularies import DEFAULT_MODEL, encoding_for, is_ready, load

__all__ = [
    "DEFAULT_MODEL",
    "Truncation",
    "count_tokens",
    "estimate_request_tokens",
    "is_ready",
    "load",
    "truncate_messages",
    "truncate_text",
]

# Text is encoded in pieces, because tiktoken's time for one word grows faster than the word. To cut in front of a
# space that follows a word changes no token; only where there is none is the cut arbitrary.
_PIECES = re.compile(r".{1,20000}(?:\Z|(?<=\S)(?= ))|.{1,20000}", re.DOTALL)

# What is at least one token each, when it must be estimated: a word of up to four letters, two digits, one mark.
_ESTIMATED = re.compile(r"[A-Z]?[a-z]{1,4}|[A-Z]{1,2}|[0-9]{1,2}|[!-~]|\s{2,64}|[\x00-\x1f\x7f]")

# The arithmetic of OpenAI's cookbook, "How to count tokens with tiktoken".
_MESSAGE_TOKENS = 3
_NAME_TOKENS = 1
_REPLY_TOKENS = 3

# OpenAI's guide "Images and vision": 85, and 170 for each tile of 512 pixels; 1024 x 1024 has four tiles. What an image
# or a file measures cannot be known from the request, so each counts as one of that size.
_LOW_DETAIL_TOKENS = 85
_ATTACHMENT_TOKENS = 765
_GPT_4O_MINI_FACTOR = 100 / 3  # 2,833 and 5,667 there
_ATTACHMENTS = frozenset({"image_url", "input_image", "image_file", "input_audio", "file", "input_file"})

# Keys whose values do not reach the model as text.
_NOT_PROMPT = frozenset(
    {"type", "id", "call_id", "tool_call_id", "status", "annotations", "logprobs", "audio", "encrypted_content"}
)

# No text is cut to fewer tokens than this: what is left would mean nothing.
_SHORTEST_TEXT = 8


@dataclass(frozen=True, slots=True)
class Truncation:
    """What became of messages that had to fit.

    Attributes:
        messages: The messages as dicts, new ones in a new list; all of the original ones where `fits` is False.
        tokens_before: What the original messages count.
        tokens_after: What `messages` count.
        removed_messages: How many messages were left out.
        cut_tokens: How many tokens were cut from the texts of those that stayed.
        fits: Whether `tokens_after` is within the limit.
    """

    messages: list[dict[str, Any]]
    tokens_before: int
    tokens_after: int
    removed_messages: int
    cut_tokens: int
    fits: bool


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
        return _text_tokens(text_or_messages, model)
    return _REPLY_TOKENS + sum(sum(_measure(message, model)) for message in _messages(text_or_messages))


def estimate_request_tokens(request: Mapping[str, object], *, model: str | None = None) -> int:
    """Estimate what a request is charged with on arrival: its prompt, and the answer that it reserves.

    Azure adds `max_tokens` times `best_of` to the prompt when the request arrives. Never raises for a value of an
    unexpected type: what isn't understood counts nothing.

    Args:
        request: A request's JSON, or a function's arguments by name. Read are `messages`, `input`, `prompt` and
            `instructions`; `tools`, `functions` and `response_format`, roughly by their size; `max_tokens`,
            `max_completion_tokens` and `max_output_tokens`; `n` and `best_of`.
        model: The request's own `model` by default, else gpt-4o.

    Example:
        >>> estimate_request_tokens({"prompt": "hello world", "max_tokens": 100, "n": 2})
        202
    """
    if model is None:
        named = request.get("model")
        model = named if isinstance(named, str) else DEFAULT_MODEL
    prompt = sum(_prompt_tokens(request.get(key), model) for key in ("messages", "input", "prompt", "instructions"))
    schemas = [request.get(key) for key in ("tools", "functions", "response_format")]
    # What Python prints of a schema is about as long as its JSON.
    prompt += sum(_text_tokens(str(schema), model) for schema in schemas if isinstance(schema, Sequence | Mapping))
    answer = _largest(request, ("max_tokens", "max_completion_tokens", "max_output_tokens"), default=0)
    return prompt + answer * _largest(request, ("n", "best_of"), default=1)


def truncate_text(text: str, *, max_tokens: int, model: str = DEFAULT_MODEL) -> str:
    """Return the beginning of a text that has at most `max_tokens` tokens; the text itself if it fits.

    Example:
        >>> truncate_text("one two three four", max_tokens=2)
        'one two'
    """
    max_tokens = max(0, max_tokens)
    if _text_tokens(text, model) <= max_tokens:
        return text
    # Surrogate pairs are joined, and lone ones, which no request can carry, left out.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    encoding = encoding_for(model)
    if encoding is None:
        return text[: bisect_right(range(1, len(text) + 1), max_tokens, key=lambda length: _estimate(text[:length]))]
    tokens: list[int] = []
    for piece in _PIECES.finditer(text):
        tokens += encoding.encode_ordinary(piece[0])
        if len(tokens) > max_tokens:
            break
    kept = max_tokens
    while True:
        # A token may end in the middle of a character, whose bytes are then left out.
        beginning = encoding.decode_bytes(tokens[:kept]).decode("utf-8", "ignore")
        # A text's beginning may split into other tokens, and rarely into more, than when the text went on.
        excess = _text_tokens(beginning, model) - max_tokens
        if excess <= 0:
            return beginning
        kept = max(0, kept - excess)


def truncate_messages(messages: Iterable[object], *, max_tokens: int, model: str = DEFAULT_MODEL) -> Truncation:
    """Make messages fit: the oldest go first, then text is cut.

    The order is: messages before the last one of the user, oldest first; text of the last user message and of what
    follows it (results of tools, mostly), longest first, each down to 8 tokens; where that would not be enough, also
    messages that follow it, oldest first. System and developer messages stay as they are, and the last user message
    stays, with the beginning of its text at least. A tool call and its results stay or go together, and so do a
    reasoning item and the item after it. Of a cut text the beginning stays: that is where an instruction usually
    stands, with the material that it speaks of below it.

    Args:
        messages: As for `count_tokens`, or the list that the Responses API takes as `input`. Never changed.
        max_tokens: What they may count together, with the 3 tokens that prime the answer.
        model: A model or a deployment.

    Raises:
        TypeError: These are not messages.

    Example:
        >>> truncate_messages([{"role": "user", "content": "word " * 100}], max_tokens=20).tokens_after
        20
    """
    items = _messages(messages)
    sizes = [_measure(item, model) for item in items]
    before = _REPLY_TOKENS + sum(map(sum, sizes))
    if before <= max_tokens:
        return Truncation(items, before, before, 0, 0, fits=True)

    fixed = {index for index, item in enumerate(items) if item.get("role") in ("system", "developer")}
    last = max((index for index, item in enumerate(items) if item.get("role") == "user"), default=len(items) - 1)
    least_sizes = [
        rest + (text if index in fixed else min(text, _SHORTEST_TEXT)) for index, (text, rest) in enumerate(sizes)
    ]
    after, least = before, _REPLY_TOKENS + sum(least_sizes)
    removed: set[int] = set()
    for group in _inseparable(items):
        if (after if group[0] < last else least) <= max_tokens:
            break
        if last in group or not fixed.isdisjoint(group):
            continue
        removed.update(group)
        after -= sum(sum(sizes[index]) for index in group)
        least -= sum(least_sizes[index] for index in group)
    if least > max_tokens:
        return Truncation(items, before, before, 0, 0, fits=False)

    uncut = after
    for index in sorted(set(range(len(items))) - removed - fixed, key=lambda index: -sizes[index][0]):
        if after <= max_tokens:
            break
        keep = max(_SHORTEST_TEXT, sizes[index][0] - (after - max_tokens))
        items[index] = _cut_message(items[index], keep, model)
        after += sum(_measure(items[index], model)) - sum(sizes[index])
    kept = [item for index, item in enumerate(items) if index not in removed]
    return Truncation(kept, before, after, len(removed), uncut - after, fits=True)


def _text_tokens(text: str, model: str) -> int:
    encoding = encoding_for(model)
    if encoding is None:
        return _estimate(text)
    return sum(len(encoding.encode_ordinary(piece[0])) for piece in _PIECES.finditer(text))


def _estimate(text: str) -> int:
    """Estimate tokens on the high side: about 1.5 times too many for English and code, 2 to 3 times for Chinese."""
    beyond_ascii = len(text.encode("utf-8", "surrogatepass")) - len(text.encode("ascii", "ignore"))
    return len(_ESTIMATED.findall(text)) + -(-beyond_ascii * 3 // 4)


def _messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, Iterable) and not isinstance(messages, str | bytes | Mapping):
        return [_as_message(message) for message in messages]
    raise TypeError(f"Pass a list of messages (count_tokens takes a str too), not {type(messages).__name__}")


def _as_message(message: object) -> dict[str, Any]:
    fields = _fields(message)
    if fields is None:
        raise TypeError(f"A message is a dict or an object with model_dump, not {type(message).__name__}")
    return fields


def _fields(value: object) -> dict[str, Any] | None:
    """Return a copy of a dict's or a pydantic object's fields; None for all else, mocks and classes included."""
    if not isinstance(value, Mapping | type) and hasattr(value, "model_dump"):
        value = value.model_dump(exclude_none=True)
    return dict(value) if isinstance(value, Mapping) else None


def _measure(message: Mapping[str, Any], model: str) -> tuple[int, int]:
    """Count the tokens of a message: those of its text, which may be cut, and all others."""
    text, rest = 0, _MESSAGE_TOKENS + (_NAME_TOKENS if message.get("name") else 0)
    for key, value in message.items():
        if key != _text_key(message):
            rest += 0 if key in _NOT_PROMPT else _part_tokens(value, model)
            continue
        for part in _parts(value):
            part_text = _part_text(part)
            if part_text is None:
                rest += _part_tokens(part, model)
            else:
                text += _text_tokens(part_text, model)
    return text, rest


def _text_key(message: Mapping[str, Any]) -> str:
    """Return where a message's text is: the results of tools have it in `output` in the Responses API."""
    return "content" if "content" in message else "output"


def _parts(content: Any) -> Sequence[Any]:
    return content if isinstance(content, list | tuple) else (content,)


def _part_text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _part_tokens(part: Any, model: str) -> int:
    """Count whatever in a part of a message reaches the model."""
    if isinstance(part, str):
        return _text_tokens(part, model)
    if isinstance(part, list | tuple):
        return sum(_part_tokens(inner, model) for inner in part)
    fields = _fields(part) or {}
    if str(fields.get("type")) in _ATTACHMENTS:
        return _attachment_tokens(fields, model)
    return sum(_part_tokens(value, model) for key, value in fields.items() if key not in _NOT_PROMPT)


def _attachment_tokens(part: Mapping[str, Any], model: str) -> int:
    image = part.get("image_url")
    detail = part.get("detail") or (image.get("detail") if isinstance(image, Mapping) else None)
    tokens = _LOW_DETAIL_TOKENS if detail == "low" else _ATTACHMENT_TOKENS
    return round(tokens * _GPT_4O_MINI_FACTOR) if "4o-mini" in model else tokens


def _prompt_tokens(prompt: object, model: str) -> int:
    """Count a prompt in any of the shapes that the APIs take: text, messages, token ids, and lists of these."""
    if isinstance(prompt, str):
        return _text_tokens(prompt, model)
    if isinstance(prompt, int):
        return 1
    if isinstance(prompt, list | tuple):
        of_messages = bool(prompt) and not isinstance(prompt[0], str | int | list | tuple)
        return (_REPLY_TOKENS if of_messages else 0) + sum(_prompt_tokens(item, model) for item in prompt)
    fields = _fields(prompt)
    return 0 if fields is None else sum(_measure(fields, model))


def _largest(request: Mapping[str, object], keys: tuple[str, ...], *, default: int) -> int:
    numbers = [value for value in map(request.get, keys) if isinstance(value, int)]
    return max([default, *numbers])


def _inseparable(items: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Group the indexes of messages that must stay or go together, in the order of each group's first."""
    groups: list[list[int]] = []
    calls: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        is_result = item.get("role") == "tool" or str(item.get("type")).endswith("_output")
        call = item.get("tool_call_id") or item.get("call_id")
        if is_result and call and call in calls:
            group = calls[call]
        elif groups and (item.get("role") == "function" or items[index - 1].get("type") == "reasoning"):
            group = groups[-1]
        else:
            group = []
            groups.append(group)
        group.append(index)
        made = [(_fields(tool_call) or {}).get("id") for tool_call in item.get("tool_calls") or ()]
        calls.update(dict.fromkeys([call, *made], group))
    return groups


def _cut_message(message: Mapping[str, Any], keep: int, model: str) -> dict[str, Any]:
    """Return a copy whose text, all parts together, has at most `keep` tokens."""
    key = _text_key(message)
    content = message[key]
    if isinstance(content, str):
        return {**message, key: truncate_text(content, max_tokens=keep, model=model)}
    parts = []
    for part in _parts(content):
        text = _part_text(part)
        if text is None:
            parts.append(part)
        elif beginning := truncate_text(text, max_tokens=keep, model=model):
            parts.append(beginning if isinstance(part, str) else {**part, "text": beginning})
            keep -= _text_tokens(beginning, model)
    return {**message, key: parts}
