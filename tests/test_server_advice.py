import asyncio
import socket
from email.message import Message
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import httpx2
import openai
import pytest
import requests
import urllib3
from azure.core.exceptions import ServiceRequestError
from hypothesis import given, strategies as st

from resilience_kit.errors import CircuitOpenError, RateLimitTimeoutError, TokenBudgetExceededError
from resilience_kit.server_advice import (
    ServerAdvice,
    advice_from_error,
    advice_from_headers,
    advice_from_result,
    is_content_filter,
    is_insufficient_quota,
    is_rate_limit,
    is_service_failure,
    is_transient,
    status_code,
)

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT

TPM_REFUSAL = (
    "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have exceeded token "
    "rate limit of your current OpenAI S0 pricing tier. Please retry after 13 seconds. Please go here to increase it."
)
PEAK_REFUSAL = (
    "The system is currently experiencing high demand and cannot process your request. Your request exceeds the "
    "maximum usage size allowed during peak load. Please retry after 20 seconds."
)


def sdk_error(status, *, headers=None, **body):
    """The error that the openai SDK makes of a response: the body is what its JSON holds under "error"."""
    request = httpx2.Request("POST", "https://example.openai.azure.com/openai/deployments/d/chat/completions")
    response = httpx2.Response(status, headers=headers, json={"error": body}, request=request)
    kind = {400: openai.BadRequestError, 403: openai.PermissionDeniedError, 429: openai.RateLimitError}.get(
        status, openai.InternalServerError if status >= 500 else openai.APIStatusError
    )
    return kind(f"Error code: {status} - {response.json()}", response=response, body=body)


def caused_by(cause, error=None):
    """An error as a framework raises it `from` another."""
    error = error or RuntimeError("the agent failed")
    error.__cause__ = cause
    return error


def in_a_ring(*errors):
    for error, cause in zip(errors, errors[1:] + errors[:1], strict=True):
        error.__cause__ = cause
    return errors[0]


CONNECTION_LOST = openai.APIConnectionError(request=httpx2.Request("POST", "https://example.com"))
TIMED_OUT = openai.APITimeoutError(request=httpx2.Request("POST", "https://example.com"))
FILTERED = sdk_error(
    400,
    code="content_filter",
    message="The response was filtered due to the prompt triggering content management policy.",
    innererror={"code": "ResponsibleAIPolicyViolation"},
)
NO_QUOTA = sdk_error(429, code="insufficient_quota", message="You exceeded your current quota.", type="requests")
OUR_ERRORS = [
    RateLimitTimeoutError("rate limit: the wait is too long", name="default", retry_after=3.0),
    CircuitOpenError("the circuit is open", name="default", retry_after=3.0),
    TokenBudgetExceededError("rate limit", agent="math", limit=1, requested=2, remaining=1),
]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("13", 13.0),
        ("13.5", 13.5),
        (" 13 ", 13.0),
        ("0", 0.0),
        ("86400", 86_400.0),
        ("13s", 13.0),
        ("1m30s", 90.0),
        ("6m0s", 360.0),
        ("250ms", 0.25),
        ("1h2m3s", 3_723.0),
        ("1d", 86_400.0),
        ("7.66s", 7.66),
        ("1700000010", 10.0),
        ("1700000010000", 10.0),
        ("1600000000", 0.0),
        ("2023-11-14T22:13:30Z", 10.0),
        ("2023-11-14T22:13:30", 10.0),
        ("2023-11-14T21:13:30-01:00", 10.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:30 -0000", 10.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
        (13, 13.0),
        (13.5, 13.5),
        (b"13", 13.0),
    ],
)
@pytest.mark.parametrize("header", ["retry-after", "x-ratelimit-reset-tokens"])
def test_seconds_durations_and_dates_are_read(header, value, seconds):
    advice = advice_from_headers({header: value}, now=NOW)
    assert seconds == (advice.retry_after if header == "retry-after" else advice.reset_tokens)


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "-1", "-0.5", "+5", "nan", "inf", "-inf", "1e5", "1_000", "0x10", "13 s and more", "soon", "1m30"),
        *("١٣", "13\u00a0s", "🕐", "1" * 100_000, "1s" * 50_000, "Tue, 14 Nov 99999999999999 22:13:30 GMT"),
        *("Tue, 14 Nov 2023 22:13:30 +9999999999999999", "0001-01-01T00:00:00+23:59x", "13, 13"),
        *(None, [], float("nan"), float("inf"), 10**5_000, True, b"\xff\xfe", -1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_understood_says_nothing(value):
    names = ("retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "x-ratelimit-remaining-tokens")
    assert advice_from_headers(dict.fromkeys(names, value), now=NOW) == ServerAdvice()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "250", "x-ms-retry-after-ms": "500", "retry-after": "1"}, 0.25),
        ({"x-ms-retry-after-ms": "500", "retry-after": "1"}, 0.5),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
        ({"retry-after-ms": "0", "retry-after": "1"}, 0.0),
        ({"RETRY-AFTER": "7"}, 7.0),
        ({b"Retry-After": b"7"}, 7.0),
        (httpx2.Headers({"Retry-After": "7"}), 7.0),
        (requests.structures.CaseInsensitiveDict({"Retry-After": "7"}), 7.0),
    ],
)
def test_the_first_retry_after_that_can_be_understood_counts_in_any_case(headers, seconds):
    assert advice_from_headers(headers).retry_after == seconds


def test_the_headers_of_urllib_are_read():
    headers = Message()
    headers["Retry-After"] = "7"
    assert advice_from_headers(headers).retry_after == 7.0


@pytest.mark.parametrize(
    "headers", [None, {}, [], "retry-after: 7", Mock(), MagicMock(), {"content-type": "x"}, {1: 2}]
)
def test_what_holds_no_headers_about_limits_says_nothing(headers):
    assert advice_from_headers(headers) == ServerAdvice()


@pytest.mark.parametrize("prefix", ["x-ratelimit", "x-rate-limit"])
def test_what_is_left_is_read_in_both_spellings(prefix):
    headers = {
        f"{prefix}-remaining-requests": "3",
        f"{prefix}-remaining-tokens": "0",
        f"{prefix}-limit-requests": "60",
        f"{prefix}-limit-tokens": "150000",
        f"{prefix}-reset-requests": "1s",
        f"{prefix}-reset-tokens": "6m0s",
    }
    assert advice_from_headers(headers) == ServerAdvice(None, 3, 0, 60, 150_000, 1.0, 360.0)


def test_minus_one_left_means_unknown():
    assert advice_from_headers({"x-ratelimit-remaining-requests": "-1"}).remaining_requests is None


def test_a_reset_without_a_unit_is_the_one_of_requests():
    assert advice_from_headers({"x-ratelimit-reset": "7"}).reset_requests == 7.0


def test_resets_of_a_success_are_no_retry_after():
    assert advice_from_headers({"x-ratelimit-reset-requests": "7"}).retry_after is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "7s"}, 7.0),
        ({"x-rate-limit-reset-requests": "2s", "x-ratelimit-remaining-requests": "0"}, 2.0),
        (
            {
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "7s",
                "x-ratelimit-remaining-tokens": "500",
            },
            2.0,
        ),
        (
            {
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "7s",
                "x-ratelimit-remaining-tokens": "0",
            },
            7.0,
        ),
        ({"retry-after": "1", "x-ratelimit-reset-tokens": "7s"}, 1.0),
    ],
)
def test_without_a_retry_after_the_reset_of_the_exhausted_quota_counts(headers, seconds):
    assert advice_from_error(sdk_error(429, headers=headers, message=TPM_REFUSAL)).retry_after == seconds


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (TPM_REFUSAL, 13.0),
        (PEAK_REFUSAL, 20.0),
        ("Please retry after 86400 seconds.", 86_400.0),
        ("Please retry after 1 second.", 1.0),
        ("Rate limit is exceeded. Try again in 50 seconds.", 50.0),
        ("Rate limit reached for gpt-4o. Limit: 3 / min. Please try again in 6ms. Visit", 0.006),
        ("Please try again in 7.66s. Visit", 7.66),
        ("Please try again in 1m30s.", 90.0),
        ("try again in 250 milliseconds", 0.25),
        ("try again in 1 minute 30 seconds", 90.0),
        ("try again in 2 hours", 7_200.0),
        ("Retry-After: 13", 13.0),
        ("retry after 13.", 13.0),
        ("retry after 2026-11-24", None),
        ("retry after 10:30", None),
        ("retry after the maintenance", None),
        ("entry after 13 seconds", None),
        ("retry after -3 seconds", None),
        ("retry after nan seconds", None),
        (f"retry after {'9' * 400} seconds", None),
        (" " * 5_000 + "retry after 13 seconds", None),
        ("", None),
    ],
)
def test_a_wait_in_the_message_is_read(message, seconds):
    assert advice_from_error(RuntimeError(message)).retry_after == seconds


def test_the_headers_of_a_cause_beat_the_message_of_the_error():
    error = caused_by(sdk_error(429, headers={"retry-after": "7"}), RuntimeError("retry after 13 seconds"))
    assert advice_from_error(error).retry_after == 7.0


def test_the_message_of_a_cause_is_read():
    assert advice_from_error(caused_by(RuntimeError(PEAK_REFUSAL))).retry_after == 20.0


def test_headers_on_the_error_itself_are_read():
    error = RuntimeError()
    error.headers = {"Retry-After": "7"}
    assert advice_from_error(error).retry_after == 7.0


def test_an_error_without_a_word_gives_no_advice():
    assert advice_from_error(ValueError()) == ServerAdvice()


def test_an_error_whose_properties_raise_gives_no_advice():
    assert advice_from_error(_BrokenError()) == ServerAdvice()


def test_causes_in_a_ring_are_looked_at_once():
    assert advice_from_error(in_a_ring(ValueError(), KeyError())) == ServerAdvice()


def test_a_raw_response_gives_advice():
    assert advice_from_result(httpx2.Response(200, headers={"x-ratelimit-remaining-tokens": "9"})).remaining_tokens == 9


def test_a_stream_of_the_sdk_gives_advice():
    response = httpx2.Response(
        200, headers={"x-ratelimit-remaining-tokens": "9"}, request=httpx2.Request("POST", "https://example.com")
    )
    with openai.OpenAI(api_key="none") as client:
        stream = openai.Stream(cast_to=object, response=response, client=client)
        assert advice_from_result(stream).remaining_tokens == 9


class _Proxy:
    __slots__ = ()

    def __getattr__(self, name):
        raise AssertionError(name)


class _BrokenError(Exception):
    def __str__(self):
        raise ValueError("no words")

    @property
    def headers(self):
        raise ValueError("no headers")


@pytest.mark.parametrize(
    "result",
    [
        *(None, "text", b"", 5, [], {"headers": {"retry-after": "7"}}, object(), Mock(), MagicMock()),
        *(_BrokenError(), SimpleNamespace(headers="text"), SimpleNamespace(response=None)),
    ],
)
def test_a_result_without_headers_of_its_own_gives_none(result):
    assert advice_from_result(result) is None


def test_a_proxy_that_makes_up_attributes_is_left_alone():
    assert advice_from_result(_Proxy()) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (sdk_error(429), 429),
        (httpx2.HTTPStatusError("", request=None, response=httpx2.Response(503)), 503),
        (ValueError(), None),
        (SimpleNamespace(status_code=429), 429),
        (SimpleNamespace(status=503), 503),
        (SimpleNamespace(status_code="429"), 429),
        (SimpleNamespace(status_code=None, response=SimpleNamespace(status=429)), 429),
        (SimpleNamespace(response=SimpleNamespace(status_code=429)), 429),
        (SimpleNamespace(status="RESOURCE_EXHAUSTED"), None),
        (SimpleNamespace(status_code=True), None),
        (SimpleNamespace(status_code=0), None),
        (SimpleNamespace(status_code=700), None),
        (SimpleNamespace(status_code=429.0), None),
        (SimpleNamespace(status_code="4290"), None),
        (Mock(), None),
    ],
)
def test_a_status_is_found_on_the_error_or_its_response(error, status):
    assert status_code(error) == status


def test_a_status_on_a_response_that_is_false_is_found():
    response = requests.Response()
    response.status_code = 429
    assert status_code(requests.HTTPError(response=response)) == 429


@pytest.mark.parametrize(
    "error",
    [
        sdk_error(429),
        sdk_error(429, message=TPM_REFUSAL, code="429"),
        sdk_error(429, message=PEAK_REFUSAL),
        RuntimeError("Requests have exceeded call rate limit of your pricing tier"),
        RuntimeError("RATE LIMIT is exceeded"),
        RuntimeError("429 Too Many Requests"),
        RuntimeError("rate_limit_exceeded"),
        caused_by(sdk_error(429)),
        caused_by(caused_by(RuntimeError("rate limit"))),
    ],
)
def test_rate_limits_are_recognised(error):
    assert is_rate_limit(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("separate limits"),
        sdk_error(400, message="bad request"),
        sdk_error(503, message="unavailable"),
        NO_QUOTA,
        caused_by(NO_QUOTA),
        sdk_error(403, message="Token quota is exceeded. Too many requests."),
        FILTERED,
        caused_by(FILTERED, RuntimeError("rate limit of the content filter")),
        *OUR_ERRORS,
        caused_by(OUR_ERRORS[0], RuntimeError("rate limit")),
        asyncio.CancelledError("rate limit"),
        KeyboardInterrupt("rate limit"),
        _BrokenError(),
        in_a_ring(ValueError(), KeyError()),
    ],
)
def test_what_no_wait_helps_is_no_rate_limit(error):
    assert not is_rate_limit(error)


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (NO_QUOTA, True),
        (caused_by(NO_QUOTA), True),
        (sdk_error(429, type="insufficient_quota"), True),
        (openai.APIError("streamed", request=None, body={"error": {"code": "insufficient_quota"}}), True),
        (sdk_error(403, message="Token quota is exceeded. Try again in 3 days."), True),
        (sdk_error(403, message="forbidden"), False),
        (sdk_error(429, message="Quota of tokens per minute: rate limit"), False),
        (openai.APIError("", request=None, body="text"), False),
    ],
)
def test_a_quota_that_no_wait_brings_back_is_recognised(error, exhausted):
    assert is_insufficient_quota(error) is exhausted


@pytest.mark.parametrize(
    ("error", "filtered"),
    [
        (FILTERED, True),
        (caused_by(FILTERED), True),
        (
            openai.BadRequestError(
                "refused",
                response=httpx2.Response(400, request=httpx2.Request("POST", "https://example.com")),
                body={"error": {"innererror": {"code": "ResponsibleAIPolicyViolation"}}},
            ),
            True,
        ),
        (openai.ContentFilterFinishReasonError(), True),
        (sdk_error(503, message="The content filter is unavailable"), False),
        (sdk_error(400, message="bad request"), False),
    ],
)
def test_a_content_filter_is_recognised(error, filtered):
    assert is_content_filter(error) is filtered


TRANSIENT = [
    ConnectionResetError(),
    TimeoutError(),
    socket.gaierror(),
    CONNECTION_LOST,
    TIMED_OUT,
    sdk_error(408),
    sdk_error(500),
    sdk_error(503),
    httpx2.ConnectError(""),
    httpx2.ReadTimeout(""),
    httpx2.RemoteProtocolError(""),
    requests.ConnectionError(),
    requests.ReadTimeout(),
    urllib3.exceptions.ProtocolError(),
    ServiceRequestError("unreachable"),
    caused_by(ConnectionResetError()),
    caused_by(asyncio.CancelledError(), TimeoutError()),
]
LASTING = [
    ValueError(),
    sdk_error(400),
    sdk_error(404),
    httpx2.LocalProtocolError(""),
    requests.exceptions.InvalidURL(),
    caused_by(ConnectionResetError(), sdk_error(400)),
    *OUR_ERRORS,
    caused_by(OUR_ERRORS[1], openai.APIConnectionError(request=None)),
    asyncio.CancelledError(),
    caused_by(ConnectionResetError(), KeyboardInterrupt()),
    GeneratorExit(),
    FILTERED,
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_connection_errors_timeouts_and_5xx_are_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_is_transient_is_a_failure_of_the_service(error):
    assert is_service_failure(error)


@pytest.mark.parametrize("error", [*LASTING, sdk_error(429)], ids=repr)
def test_other_errors_are_not_transient(error):
    assert not is_transient(error)


@pytest.mark.parametrize("error", [*LASTING, sdk_error(429), sdk_error(503, message="rate limit")], ids=repr)
def test_rate_limits_and_other_errors_are_no_failure_of_the_service(error):
    assert not is_service_failure(error)


class _AcmeError(Exception):
    pass


def test_an_error_of_aiohttp_is_recognised_by_its_class_without_importing_it():
    lost = type("ClientConnectionError", (_AcmeError,), {"__module__": "aiohttp.client_exceptions"})
    assert is_transient(lost())


def test_an_error_of_the_same_name_from_elsewhere_is_not_transient():
    lost = type("ClientConnectionError", (_AcmeError,), {"__module__": "acme"})
    assert not is_transient(lost())


NAMES = st.sampled_from(
    ["retry-after", "Retry-After-Ms", "x-ms-retry-after-ms", "x-ratelimit-reset", "x-rate-limit-reset-tokens"]
)
NUMBERS = st.floats() | st.integers()
WORDS = st.text() | st.binary() | NUMBERS | NUMBERS.map(str) | st.datetimes().map(str) | st.none()
PIECES = st.lists(
    st.sampled_from(["retry after ", "try again in ", "1", "9" * 50, ".", "m", "ms", " ", ":", "\x00", "é"])
)


@given(headers=st.dictionaries(NAMES | st.text() | st.binary(), WORDS | PIECES.map("".join)))
def test_whatever_the_headers_hold_the_wait_is_none_or_finite_and_not_negative(headers):
    wait = advice_from_headers(headers, now=NOW).retry_after
    assert wait is None or 0 <= wait < float("inf")


@given(message=PIECES.map("".join) | st.text())
def test_whatever_a_message_says_the_wait_is_none_or_finite_and_not_negative(message):
    wait = advice_from_error(RuntimeError(message)).retry_after
    assert wait is None or 0 <= wait < float("inf")


@given(body=st.recursive(WORDS, lambda inner: st.dictionaries(st.sampled_from(["error", "code", "type"]), inner)))
def test_whatever_a_body_holds_every_question_has_an_answer(body):
    error = openai.APIError("failed", request=None, body=body)
    questions = (is_rate_limit, is_insufficient_quota, is_content_filter, is_transient, is_service_failure)
    assert {question(error) for question in questions} <= {True, False}


@pytest.mark.parametrize(
    ("message", "exhausted"),
    [
        ("Requests to the Operation have exceeded token rate limit of your current OpenAI S0 pricing tier.", "tokens"),
        ("Requests to the Operation have exceeded call rate limit of your current OpenAI S0 pricing tier.", "requests"),
        ("Rate limit is exceeded. Try again in 50 seconds.", None),
    ],
)
def test_the_message_says_which_quota_is_used_up(message, exhausted):
    assert advice_from_error(RuntimeError(message)).exhausted == exhausted


@pytest.mark.parametrize(("header", "exhausted"), [("remaining-tokens", "tokens"), ("remaining-requests", "requests")])
def test_where_the_message_does_not_say_a_remaining_of_zero_does(header, exhausted):
    error = RuntimeError("refused")
    error.headers = {f"x-ratelimit-{header}": "0"}

    assert advice_from_error(error).exhausted == exhausted
