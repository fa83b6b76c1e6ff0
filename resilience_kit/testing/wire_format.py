"""The bodies of answers as they go over the wire: whole, or as server-sent events."""

import base64
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resilience_kit.testing.exchange import SimulatedAnswer, SimulatedRequest, embedding_inputs

_DEFAULT_DIMENSIONS = 8
_WORDS = re.compile(r"\s*\S+|\s+$")


@dataclass(frozen=True, slots=True)
class Reply:
    """All that a body is made of.

    Attributes:
        number: The request's number, which ids are made of.
        created: Seconds since 1970.
        request: What was asked.
        answer: What is answered, in each choice.
        prompt_tokens: What `usage` says of the prompt.
    """

    number: int
    created: int
    request: SimulatedRequest
    answer: SimulatedAnswer
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """What `usage` says of all choices together."""
        return 0 if self.request.operation == "embeddings" else self.answer.count_tokens() * self.choices

    @property
    def choices(self) -> int:
        """How many choices the request wants."""
        return self.request.body.get("n") or 1


def whole_body(reply: Reply) -> bytes:
    """Return the body of an answer that isn't streamed."""
    if reply.request.operation == "chat.completions":
        body = _chat_completion(reply)
    elif reply.request.operation == "responses":
        body = _response(reply, _final_status(reply.answer), _output_items(reply))
    else:
        body = _embeddings(reply)
    return json.dumps(body).encode()


def streamed_body(reply: Reply) -> list[bytes]:
    """Return the server-sent events of a streamed answer, in order."""
    if reply.request.operation == "responses":
        events = enumerate(_response_events(reply))
        return [
            f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number, **event})}\n\n".encode()
            for number, (kind, event) in events
        ]
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in _chat_chunks(reply)), b"data: [DONE]\n\n"]


def _chat_completion(reply: Reply) -> dict[str, Any]:
    answer = reply.answer
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or None, "refusal": None}
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": _call_id(reply, index),
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(given)},
            }
            for index, (name, given) in enumerate(answer.tool_calls)
        ]
    choices = [
        {"index": index, "message": message, "finish_reason": answer.resolved_finish_reason, "logprobs": None}
        for index in range(reply.choices)
    ]
    return {**_chat_frame(reply, "chat.completion"), "choices": choices, "usage": _chat_usage(reply)}


def _chat_chunks(reply: Reply) -> Iterator[dict[str, Any]]:
    frame = _chat_frame(reply, "chat.completion.chunk")
    include_usage = (reply.request.body.get("stream_options") or {}).get("include_usage", False)
    if include_usage:
        frame["usage"] = None
    for index in range(reply.choices):
        for delta in _chat_deltas(reply):
            yield {**frame, "choices": [_chat_choice(index, delta, None)]}
        yield {**frame, "choices": [_chat_choice(index, {}, reply.answer.resolved_finish_reason)]}
    if include_usage:
        yield {**frame, "choices": [], "usage": _chat_usage(reply)}


def _chat_choice(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


def _chat_deltas(reply: Reply) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if reply.answer.content else None}
    for piece in _pieces(reply.answer.content):
        yield {"content": piece}
    for index, (name, given) in enumerate(reply.answer.tool_calls):
        head = {"id": _call_id(reply, index), "type": "function", "function": {"name": name, "arguments": ""}}
        yield {"tool_calls": [{"index": index, **head}]}
        for piece in _pieces(json.dumps(given)):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _chat_frame(reply: Reply, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-simulated-{reply.number}",
        "object": kind,
        "created": reply.created,
        "model": reply.request.model,
        "system_fingerprint": "fp_simulated",
    }


def _chat_usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def _response_events(reply: Reply) -> Iterator[tuple[str, dict[str, Any]]]:
    started = _response(reply, "in_progress", [])
    yield "response.created", {"response": started}
    yield "response.in_progress", {"response": started}
    items = _output_items(reply)
    for index, item in enumerate(items):
        events = _message_events(item) if item["type"] == "message" else _function_call_events(item)
        for kind, event in events:
            yield kind, {"output_index": index, **event}
    status = _final_status(reply.answer)
    yield f"response.{status}", {"response": _response(reply, status, items)}


def _message_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    (part,) = item["content"]
    place = {"item_id": item["id"], "content_index": 0}
    yield "response.output_item.added", {"item": {**item, "status": "in_progress", "content": []}}
    yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
    for piece in _pieces(part["text"]):
        yield "response.output_text.delta", {**place, "delta": piece, "logprobs": []}
    yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
    yield "response.content_part.done", {**place, "part": part}
    yield "response.output_item.done", {"item": item}


def _function_call_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "response.output_item.added", {"item": {**item, "status": "in_progress", "arguments": ""}}
    for piece in _pieces(item["arguments"]):
        yield "response.function_call_arguments.delta", {"item_id": item["id"], "delta": piece}
    done = {"item_id": item["id"], "name": item["name"], "arguments": item["arguments"]}
    yield "response.function_call_arguments.done", done
    yield "response.output_item.done", {"item": item}


def _output_items(reply: Reply) -> list[dict[str, Any]]:
    answer = reply.answer
    items: list[dict[str, Any]] = []
    if answer.content or not answer.tool_calls:
        part = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        identifier = f"msg_simulated_{reply.number}"
        items.append(
            {"id": identifier, "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        )
    for index, (name, given) in enumerate(answer.tool_calls):
        call = {"id": f"fc_simulated_{reply.number}_{index}", "type": "function_call", "status": "completed"}
        items.append({**call, "call_id": _call_id(reply, index), "name": name, "arguments": json.dumps(given)})
    return items


def _final_status(answer: SimulatedAnswer) -> str:
    return "incomplete" if answer.resolved_finish_reason in ("length", "content_filter") else "completed"


def _response(reply: Reply, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    body = reply.request.body
    finish_reason = reply.answer.resolved_finish_reason
    reason = "max_output_tokens" if finish_reason == "length" else finish_reason
    usage = {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": reply.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }
    return {
        "id": f"resp_simulated_{reply.number}",
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "model": reply.request.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": list(reply.request.tools),
        "top_p": 1.0,
        "usage": None if status == "in_progress" else usage,
    }


def _embeddings(reply: Reply) -> dict[str, Any]:
    body = reply.request.body
    vectors = [
        _vector(given, body.get("dimensions") or _DEFAULT_DIMENSIONS) for given in embedding_inputs(reply.request)
    ]
    encode = _base64 if body.get("encoding_format") == "base64" else list
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": reply.request.model,
        "usage": {"prompt_tokens": reply.prompt_tokens, "total_tokens": reply.prompt_tokens},
    }


def _vector(given: str | list[int], dimensions: int) -> list[float]:
    """Return a vector of length 1 that is the same for the same input."""
    digest = hashlib.shake_128(repr(given).encode()).digest(dimensions)
    # Half-way between whole numbers, no coordinate is 0, so that there is always a length to divide by.
    coordinates = [byte - 127.5 for byte in digest]
    length = math.hypot(*coordinates)
    return [coordinate / length for coordinate in coordinates]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _call_id(reply: Reply, index: int) -> str:
    return f"call_simulated_{reply.number}_{index}"


def _pieces(text: str) -> list[str]:
    return _WORDS.findall(text)
