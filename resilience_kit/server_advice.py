"""What a response or an error says about the service's limits and health: waits, what is left, what kind of failure.

Pure functions without state. HTTP clients and SDKs are recognised by what their objects look like, so none is imported.
"""

import email.utils
import math
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.message import Message
from typing import Literal

from resilience_kit.errors import ResilienceError

# No more characters than these are looked at, so that garbage costs nothing.
_MAX_HEADER = 64
_MAX_MESSAGE = 4_000

# "13", "1m30s", "6m0s", "250ms", "1 minute 30 seconds". Possessive, so that no text takes more than linear time.
_NUMBER = r"[0-9]++(?:\.[0-9]++)?"
_UNIT = r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)(?![a-z])"
_PIECE = re.compile(rf"({_NUMBER})\s?({_UNIT})", re.IGNORECASE)
_DURATION = re.compile(rf"(?:{_PIECE.pattern}[ ,]{{0,2}})+", re.IGNORECASE)
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}

# "Please retry after 13 seconds", "Try again in 50 seconds", "try again in 6ms"; a date or a clock time is not a wait.
_MESSAGE_WAIT = re.compile(
    rf"\b(?:re-?try|try again)[ -](?:after|in)[ :=]{{1,3}}({_DURATION.pattern}|{_NUMBER}(?![0-9a-z:/-]))", re.IGNORECASE
)

# A number of seconds this large is a point in time (1e9 is in 2001), and above the second one it is in milliseconds.
_EPOCH_SECONDS = 1e9
_EPOCH_MILLISECONDS = 1e11

_RATE_LIMIT = re.compile(r"(?<![a-z])rate[ _-]?limit|too[ _-]?many[ _-]?requests", re.IGNORECASE)
# Azure's two refusals: "have exceeded token rate limit of your current ...", and "call rate limit" for requests.
_WHICH_QUOTA = re.compile(r"\b(token|call) rate limit", re.IGNORECASE)
_INSUFFICIENT_QUOTA = re.compile(r"insufficient_quota|exceeded your current quota", re.IGNORECASE)
_CONTENT_FILTER = re.compile(
    r"content[ _-]filter|responsible_?ai_?policy_?violation|content management policy", re.IGNORECASE
)

_HTTP_429 = 429
_HTTP_408 = 408
_HTTP_403 = 403
_HTTP_400 = 400

# Connection errors and timeouts that do not derive from Python's own, by the package and the name of a base class.
# The SDKs that wrap one of them keep it as __cause__, and need no line of their own.
_CONNECTION_ERRORS = frozenset(
    {
        "openai.APIConnectionError",
        *(
            f"{package}.{name}"
            for package in ("httpx", "httpx2", "httpcore", "httpcore2")
            for name in ("TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError")
        ),
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "requests.ConnectionError",
        "requests.Timeout",
        "requests.ChunkedEncodingError",
        "urllib3.TimeoutError",
        "urllib3.ProtocolError",
        "urllib3.ProxyError",
        "azure.ServiceRequestError",
        "azure.ServiceResponseError",
    }
)


@dataclass(frozen=True, slots=True)
class ServerAdvice:
    """What the service said about its limits; None where it said nothing that can be understood.

    Attributes:
        retry_after: Seconds to wait before the next request.
        remaining_requests: Requests left in the server's window. Azure sends -1 for unknown, which is None here.
        remaining_tokens: Tokens left in the server's window.
        limit_requests: The quota of requests.
        limit_tokens: The quota of tokens.
        reset_requests: Seconds until the quota of requests is whole again.
        reset_tokens: Seconds until the quota of tokens is whole again.
        exhausted: Which quota a refusal was for, "requests" or "tokens".
    """

    retry_after: float | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    limit_requests: int | None = None
    limit_tokens: int | None = None
    reset_requests: float | None = None
    reset_tokens: float | None = None
    exhausted: Literal["requests", "tokens"] | None = None


_SILENCE = ServerAdvice()

# What a decorated function mostly returns, and what never has headers.
_PLAIN = (str, bytes, int, float, bool, list, tuple, dict, type(None))


def advice_from_headers(headers: object, *, now: float | None = None) -> ServerAdvice:
    """Read the headers that speak of limits.

    `retry_after` is what `retry-after-ms`, `x-ms-retry-after-ms` or `retry-after` say, in this order (the first two are
    Azure's, the last is RFC 9110, section 10.2.3). The resets stay apart: services send them with successes too.

    Args:
        headers: Any mapping or `email.message.Message`, in any case, of str or bytes; anything else says nothing.
        now: Seconds since the epoch, against which dates are read; the system's clock by default.

    Example:
        >>> advice_from_headers({"Retry-After": "13", "x-ratelimit-remaining-tokens": "0"}).retry_after
        13.0
    """
    said = _headers_about_limits(headers)
    if not said:
        return _SILENCE
    if now is None:
        now = time.time()
    waits = (
        _milliseconds(said.get("retry-after-ms")),
        _milliseconds(said.get("x-ms-retry-after-ms")),
        _seconds(said.get("retry-after"), now),
    )
    reset_requests = _seconds(said.get("x-ratelimit-reset-requests"), now)
    return ServerAdvice(
        retry_after=next((wait for wait in waits if wait is not None), None),
        remaining_requests=_count(said.get("x-ratelimit-remaining-requests")),
        remaining_tokens=_count(said.get("x-ratelimit-remaining-tokens")),
        limit_requests=_count(said.get("x-ratelimit-limit-requests")),
        limit_tokens=_count(said.get("x-ratelimit-limit-tokens")),
        reset_requests=_seconds(said.get("x-ratelimit-reset"), now) if reset_requests is None else reset_requests,
        reset_tokens=_seconds(said.get("x-ratelimit-reset-tokens"), now),
    )


def advice_from_error(error: BaseException) -> ServerAdvice:
    """Read the headers of an error or of its causes; without a retry-after, their resets and then the messages.

    Of several resets, the one counts whose quota is used up; where that is not known, the latest.

    Example:
        >>> advice_from_error(RuntimeError("Rate limit is exceeded. Try again in 50 seconds.")).retry_after
        50.0
    """
    advice = _SILENCE
    for link in _chain(error):
        advice = advice_from_headers(_attribute(_attribute(link, "response"), "headers"))
        if advice == _SILENCE:
            advice = advice_from_headers(_attribute(link, "headers"))
        if advice != _SILENCE:
            break
    if advice.retry_after is None:
        wait = _wait_until_reset(advice)
        advice = replace(advice, retry_after=_wait_in_messages(error) if wait is None else wait)
    return replace(advice, exhausted=_exhausted(error, advice))


def advice_from_result(result: object) -> ServerAdvice | None:
    """Read the headers of a raw response or a stream; None for a result that carries none.

    Attributes that neither the class nor the instance itself defines are not asked for: a proxy, a lazy record or a
    mock that makes up attributes is left alone.
    """
    if isinstance(result, _PLAIN):
        return None
    headers = _own_attribute(result, "headers")
    if headers is None:
        headers = _own_attribute(_own_attribute(result, "response"), "headers")
    return advice_from_headers(headers) if isinstance(headers, Mapping | Message) else None


def status_code(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, itself or on its response, as `status_code` or `status`.

    Numbers and strings of digits between 100 and 599 count; causes are not looked at.
    """
    for carrier in (error, _attribute(error, "response")):
        for name in ("status_code", "status"):
            value = _attribute(carrier, name)
            if isinstance(value, str) and re.fullmatch("[1-5][0-9][0-9]", value):
                return int(value)
            if isinstance(value, int) and 100 <= value < 600:  # noqa: PLR2004 - the range of HTTP's status codes
                return int(value)
    return None


def is_rate_limit(error: BaseException) -> bool:
    """Tell whether the service refused for its rate limit: waiting helps.

    That is status 429, "rate limit" or "too many requests" in the message, of the error or of any of its causes; but
    never an exhausted quota, a content filter, or one of the kit's own errors.

    Example:
        >>> is_rate_limit(RuntimeError("Requests have exceeded call rate limit of your pricing tier"))
        True
    """
    if _is_ours_or_an_exit(error) or is_insufficient_quota(error) or is_content_filter(error):
        return False
    return any(status_code(link) == _HTTP_429 or _RATE_LIMIT.search(_words(link)) for link in _chain(error))


def is_insufficient_quota(error: BaseException) -> bool:
    """Tell whether a quota is used up that no wait brings back: OpenAI's, or API Management's (403 and "quota")."""
    for link in _chain(error):
        words = _words(link)
        if _INSUFFICIENT_QUOTA.search(words) or ("quota" in words.lower() and status_code(link) == _HTTP_403):
            return True
    return False


def is_content_filter(error: BaseException) -> bool:
    """Tell whether a content filter refused the request or the answer, which is no failure of the service.

    A status other than 400 speaks for itself, whatever its message mentions.
    """
    return any(
        status_code(link) in (None, _HTTP_400) and _CONTENT_FILTER.search(_words(link)) for link in _chain(error)
    )


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may succeed soon: a connection error, a timeout, status 408 or 5xx.

    The error and then its causes are asked, and the first that is one of these, or that carries another status,
    decides. Python's own errors count, and those of openai, httpx, aiohttp, requests, urllib3 and azure-core. The kit's
    own errors never do, although `RateLimitTimeoutError` is a `TimeoutError`; nor do cancellation and exits.

    Example:
        >>> is_transient(ConnectionResetError()), is_transient(ValueError())
        (True, False)
    """
    if _is_ours_or_an_exit(error):
        return False
    for link in _chain(error):
        status = status_code(link)
        if status is not None:
            return status == _HTTP_408 or status >= 500  # noqa: PLR2004 - HTTP's server errors
        if _is_connection_error(link):
            return True
    return False


def is_service_failure(error: BaseException) -> bool:
    """Tell whether an error speaks of an ill service, as a circuit breaker counts it.

    That is what `is_transient` accepts, 408 included since it is a timeout, without rate limits: a service that says
    "too many requests" is well, whatever status it says it with.
    """
    return is_transient(error) and not is_rate_limit(error)


def _headers_about_limits(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping | Message):
        return {}
    try:
        items = [*headers.items()]
    except Exception:  # noqa: BLE001 - a parser that fails on a header must not replace the error that is being judged
        return {}
    said = {}
    for key, value in items:
        name, text = _text(key).lower().replace("x-rate-limit-", "x-ratelimit-"), _text(value)
        if name.startswith(("x-ratelimit-", "retry-after", "x-ms-retry-after")) and len(text) <= _MAX_HEADER:
            said[name] = text.strip()
    return said


def _text(value: object) -> str:
    """Return what a header holds, cut just past the length at which it is still believed."""
    if isinstance(value, str | bytes):
        start = value[: _MAX_HEADER + 1]
        return start if isinstance(start, str) else start.decode("latin-1")
    return str(value) if isinstance(value, int | float) and abs(value) < _EPOCH_MILLISECONDS else ""


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None


def _milliseconds(text: str | None) -> float | None:
    return float(text) / 1_000 if text is not None and re.fullmatch(_NUMBER, text) else None


def _seconds(text: str | None, now: float) -> float | None:
    """Read seconds, a duration such as "1m30s", seconds since the epoch, an HTTP date or an ISO date."""
    if not text or not text.isascii():
        return None
    if re.fullmatch(_NUMBER, text):
        number = float(text)
        if number < _EPOCH_SECONDS:
            return number
        return max(0.0, (number if number < _EPOCH_MILLISECONDS else number / 1_000) - now)
    if _DURATION.fullmatch(text):
        return _duration(text)
    for parse in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text)
            return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)
        except (ValueError, OverflowError):
            continue
    return None


def _duration(text: str) -> float | None:
    total = 0.0
    for number, unit in _PIECE.findall(text):
        in_milliseconds = unit.lower().startswith(("ms", "mil"))
        total += float(number) * (0.001 if in_milliseconds else _UNIT_SECONDS[unit[0].lower()])
    return total if math.isfinite(total) else None


def _wait_until_reset(advice: ServerAdvice) -> float | None:
    resets = [
        (remaining, reset)
        for remaining, reset in (
            (advice.remaining_requests, advice.reset_requests),
            (advice.remaining_tokens, advice.reset_tokens),
        )
        if reset is not None
    ]
    exhausted = [reset for remaining, reset in resets if remaining == 0]
    return max(exhausted or [reset for _, reset in resets], default=None)


def _exhausted(error: BaseException, advice: ServerAdvice) -> Literal["requests", "tokens"] | None:
    for link in _chain(error):
        if found := _WHICH_QUOTA.search(_message(link)):
            return "tokens" if found[1].lower() == "token" else "requests"
    if advice.remaining_tokens == 0:
        return "tokens"
    return "requests" if advice.remaining_requests == 0 else None


def _wait_in_messages(error: BaseException) -> float | None:
    for link in _chain(error):
        if found := _MESSAGE_WAIT.search(_message(link)):
            wait = found[1]
            return _duration(wait if _PIECE.match(wait) else f"{wait}s")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, each once, though they may form a ring."""
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _is_ours_or_an_exit(error: BaseException) -> bool:
    """Tell cancellation and exits, and the kit's own errors, which SDKs wrap if they are raised below them."""
    return not isinstance(error, Exception) or any(isinstance(link, ResilienceError) for link in _chain(error))


def _is_connection_error(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    return any(
        f"{base.__module__.partition('.')[0]}.{base.__name__}" in _CONNECTION_ERRORS for base in type(error).__mro__
    )


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_MESSAGE]
    except Exception:  # noqa: BLE001 - a broken __str__ must not replace the error that is being judged
        return ""


def _words(error: BaseException) -> str:
    """Return the message, and the codes that SDKs keep apart from it, on the error and in its body."""
    words = [_message(error), _attribute(error, "code"), _attribute(error, "type")]
    body = _attribute(error, "body")
    # {"error": {"code": ..., "innererror": {"code": ...}}}, or what is inside "error" alone.
    for _ in range(3):
        if not isinstance(body, Mapping):
            break
        words += [body.get("code"), body.get("type")]
        body = body.get("error") or body.get("innererror") or body.get("inner_error")
    return " ".join(word[:_MAX_MESSAGE] for word in words if isinstance(word, str))


def _attribute(carrier: object, name: str) -> object:
    try:
        return getattr(carrier, name, None)
    except Exception:  # noqa: BLE001 - a property that raises must not replace the error that is being judged
        return None


def _own_attribute(carrier: object, name: str) -> object:
    """Read an attribute past `__getattr__` and `__getattribute__`, with which a class makes attributes up."""
    try:
        return object.__getattribute__(carrier, name)
    except Exception:  # noqa: BLE001 - a result without headers is the common case, and one that raises is none
        return None
