"""The headers and the error bodies of Azure OpenAI, in each spelling in which they were seen."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Literal

from resilience_kit.testing.exchange import Operation
from resilience_kit.testing.faults import Fault, FaultKind
from resilience_kit.testing.server_windows import QuotaLevel, Refusal

Headers = Literal["full", "remaining", "off"]
RetryAfterSpelling = Literal[
    "retry-after-ms",
    "x-ms-retry-after-ms",
    "retry-after",
    "retry-after-date",
    "x-ratelimit-reset",
    "x-rate-limit-reset",
    "message",
    "none",
]
ErrorStyle = Literal["azure", "api_management"]

_OPERATION_NAMES: Mapping[Operation, str] = {
    "chat.completions": "ChatCompletions_Create",
    "responses": "Responses_Create",
    "embeddings": "Embeddings_Create",
}
_LIMIT_NAMES = {"requests": "call", "tokens": "token"}
_FILTER_RESULT = {
    "hate": {"filtered": False, "severity": "safe"},
    "jailbreak": {"filtered": False, "detected": False},
    "self_harm": {"filtered": False, "severity": "safe"},
    "sexual": {"filtered": False, "severity": "safe"},
    "violence": {"filtered": True, "severity": "medium"},
}
_FAULTS: Mapping[FaultKind, tuple[int, dict[str, Any]]] = {
    "capacity_429": (
        429,
        {
            "code": "429",
            "message": "The system is currently experiencing high demand and cannot process your request. Your request "
            "exceeds the maximum usage size allowed during peak load.",
        },
    ),
    "insufficient_quota_429": (
        429,
        {
            "message": "You exceeded your current quota, please check your plan and billing details.",
            "type": "insufficient_quota",
            "param": None,
            "code": "insufficient_quota",
        },
    ),
    "token_quota_403": (403, {"code": "403", "message": "Token quota is exceeded."}),
    "internal_error_500": (500, {"code": "500", "message": "The server had an error while processing your request."}),
    "unavailable_503": (503, {"code": "503", "message": "The service is temporarily unable to process your request."}),
    "content_filter_400": (
        400,
        {
            "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management "
            "policy. Please modify your prompt and retry.",
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": _FILTER_RESULT},
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """In which of its spellings the service talks about limits; `AzureOpenAISimulator` describes each option."""

    headers: Headers
    retry_after_spelling: RetryAfterSpelling
    error_style: ErrorStyle
    responses_remaining_unknown: bool


@dataclass(frozen=True, slots=True)
class WireError:
    """An error response: its status, JSON body and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


NOT_FOUND = WireError(404, {"error": {"code": "404", "message": "Resource not found"}}, {})
UNAUTHORIZED = WireError(
    401,
    {
        "error": {
            "code": "401",
            "message": "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a "
            "valid key for an active subscription and use a correct regional API endpoint for your resource.",
        }
    },
    {},
)
SIMULATOR_FAILED = WireError(
    500, {"error": {"code": "500", "message": "The simulator failed to answer; its error is raised at exit."}}, {}
)


def malformed(problem: str) -> WireError:
    """Answer a body that cannot be read."""
    message = f"We could not parse the JSON body of your request: {problem}"
    return WireError(
        400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, {}
    )


def rate_limited(dialect: Dialect, operation: Operation, api_version: str, refusal: Refusal) -> WireError:
    """Answer a request that the quota refuses."""
    return _rate_limit_error(dialect, operation, api_version, refusal.reason, refusal.retry_after)


def faulty(dialect: Dialect, operation: Operation, api_version: str, fault: Fault) -> WireError | None:
    """Answer as the fault wants; None if the fault isn't an error response."""
    if fault.kind == "rate_limit_429":
        return _rate_limit_error(dialect, operation, api_version, "tokens", fault.retry_after)
    if fault.kind not in _FAULTS:
        return None
    status, error = _FAULTS[fault.kind]
    sentence, headers = _retry_advice(dialect, fault.retry_after, "tokens")
    return WireError(status, {"error": {**error, "message": error["message"] + sentence}}, headers)


def level_headers(dialect: Dialect, operation: Operation, level: QuotaLevel) -> dict[str, str]:
    """Say what an answered request leaves of the quota."""
    headers = remaining_headers(dialect, operation, level)
    if dialect.headers == "full":
        for kind, limit, reset in (
            ("requests", level.request_limit, level.reset_requests),
            ("tokens", level.token_limit, level.reset_tokens),
        ):
            if limit < math.inf:
                headers[f"x-ratelimit-limit-{kind}"] = str(int(limit))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(reset)
    return headers


def remaining_headers(dialect: Dialect, operation: Operation, level: QuotaLevel) -> dict[str, str]:
    """Say what is left of the quota, without a word on when it comes back."""
    if dialect.headers == "off":
        return {}
    unknown = operation == "responses" and dialect.responses_remaining_unknown
    remaining = {"requests": level.remaining_requests, "tokens": level.remaining_tokens}
    return {
        f"x-ratelimit-remaining-{kind}": "-1" if unknown else str(int(amount))
        for kind, amount in remaining.items()
        if amount < math.inf
    }


def _rate_limit_error(
    dialect: Dialect, operation: Operation, api_version: str, reason: str, retry_after: float | None
) -> WireError:
    sentence, headers = _retry_advice(dialect, retry_after, reason)
    if dialect.error_style == "api_management":
        message = "Rate limit is exceeded." + sentence.replace("Please retry after", "Try again in")
    else:
        message = (
            f"Requests to the {_OPERATION_NAMES[operation]} Operation under Azure OpenAI API version {api_version} "
            f"have exceeded {_LIMIT_NAMES[reason]} rate limit of your current OpenAI S0 pricing tier.{sentence} "
            "Please go here: https://aka.ms/oai/quotaincrease if you would like to further increase the default "
            "rate limit."
        )
    return WireError(429, {"error": {"code": "429", "message": message}}, headers)


def _retry_advice(dialect: Dialect, seconds: float | None, reason: str) -> tuple[str, dict[str, str]]:
    """Return the sentence for the message and the headers; all are rounded up, so that obeying them is enough."""
    if seconds is None or dialect.retry_after_spelling == "none":
        return "", {}
    whole = math.ceil(seconds)
    sentence = f" Please retry after {whole} second{'' if whole == 1 else 's'}."
    match dialect.retry_after_spelling:
        case "retry-after-ms" | "x-ms-retry-after-ms" as name:
            return sentence, {name: str(math.ceil(seconds * 1000))}
        case "retry-after":
            return sentence, {"retry-after": str(whole)}
        case "retry-after-date":
            return sentence, {"retry-after": formatdate(math.ceil(time.time() + seconds), usegmt=True)}
        case "x-ratelimit-reset" | "x-rate-limit-reset" as name:
            return sentence, {f"{name}-{reason}": _duration(seconds)}
        case _:
            return sentence, {}


def _duration(seconds: float) -> str:
    """Write seconds as "250ms", "13s", "1.5s" or "6m0s", rounded up to a millisecond."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:  # noqa: PLR2004 - milliseconds in a second
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
