"""Cut texts and messages to a number of tokens."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilience_kit.text_tokens import PIECES, count_text, estimate_text
from resilience_kit.token_counting import (
    NESTED,
    REPLY_TOKENS,
    as_messages,
    fields_of,
    measure,
    parts_of,
    text_key,
    text_of_part,
)
from resilience_kit.vocabularies import DEFAULT_MODEL, encoding_for

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


def truncate_text(text: str, *, max_tokens: int, model: str = DEFAULT_MODEL) -> str:
    """Return the beginning of a text that has at most `max_tokens` tokens; the text itself if it fits.

    Example:
        >>> truncate_text("one two three four", max_tokens=2)
        'one two'
    """
    max_tokens = max(0, max_tokens)
    if count_text(text, model) <= max_tokens:
        return text
    encoding = encoding_for(model)
    if encoding is None:
        return _estimated_beginning(text, max_tokens)
    tokens: list[int] = []
    for piece in PIECES.finditer(text):
        tokens += encoding.encode_ordinary(_sendable(piece[0]))
        if len(tokens) > max_tokens:
            break
    kept = max_tokens
    while True:
        # A token may end in the middle of a character, whose bytes are then left out.
        beginning = encoding.decode_bytes(tokens[:kept]).decode("utf-8", "ignore")
        # A text's beginning may split into other tokens, and rarely into more, than when the text went on.
        excess = count_text(beginning, model) - max_tokens
        if excess <= 0:
            return beginning
        kept = max(0, kept - excess)


def _estimated_beginning(text: str, max_tokens: int) -> str:
    beginning, left = "", max_tokens
    for piece in PIECES.finditer(text):
        more = _sendable(piece[0])
        tokens = estimate_text(more)
        if tokens > left:
            lengths = range(1, len(more) + 1)
            return beginning + more[: bisect_right(lengths, left, key=lambda length: estimate_text(more[:length]))]
        beginning += more
        left -= tokens
    return beginning


def _sendable(text: str) -> str:
    """Join surrogate pairs, and leave lone ones out, which no request can carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


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
    items = as_messages(messages)
    try:
        sizes = [measure(item, model) for item in items]
    except RecursionError:
        raise TypeError(NESTED) from None
    before = REPLY_TOKENS + sum(map(sum, sizes))
    if before <= max_tokens:
        return Truncation(items, before, before, 0, 0, fits=True)

    fixed = {index for index, item in enumerate(items) if item.get("role") in ("system", "developer")}
    last = max((index for index, item in enumerate(items) if item.get("role") == "user"), default=len(items) - 1)
    least_sizes = [
        rest + (text if index in fixed else min(text, _SHORTEST_TEXT)) for index, (text, rest) in enumerate(sizes)
    ]
    after, least = before, REPLY_TOKENS + sum(least_sizes)
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
        after += sum(measure(items[index], model)) - sum(sizes[index])
    kept = [item for index, item in enumerate(items) if index not in removed]
    return Truncation(kept, before, after, len(removed), uncut - after, fits=True)


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
        made = [(fields_of(tool_call) or {}).get("id") for tool_call in item.get("tool_calls") or ()]
        calls.update(dict.fromkeys([call, *made], group))
    return groups


def _cut_message(message: Mapping[str, Any], keep: int, model: str) -> dict[str, Any]:
    """Return a copy whose text, all parts together, has at most `keep` tokens."""
    key = text_key(message)
    content = message[key]
    if isinstance(content, str):
        return {**message, key: truncate_text(content, max_tokens=keep, model=model)}
    parts = []
    for part in parts_of(content):
        text = text_of_part(part)
        if text is None:
            parts.append(part)
        elif beginning := truncate_text(text, max_tokens=keep, model=model):
            parts.append(beginning if isinstance(part, str) else {**part, "text": beginning})
            keep -= count_text(beginning, model)
    return {**message, key: parts}
