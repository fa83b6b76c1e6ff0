"""Whatever a server says of its limits is advice, or is none: it raises nothing and costs next to nothing."""

import email
import email.policy
import math
from dataclasses import astuple
from types import MappingProxyType, SimpleNamespace

import httpx2
import pytest
from hostile_values import NUMBERS, TEXTS, VALUES, examples, growth
from hypothesis import given, strategies as st

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

ABOUT_LIMITS = [
    "retry-after",
    "Retry-After-Ms",
    "x-ms-retry-after-ms",
    "x-ratelimit-reset",
    *(f"X-RateLimit-{what}-{which}" for what in ("Remaining", "Limit", "Reset") for which in ("Requests", "tokens")),
]
PIECES = st.sampled_from(
    [
        *(
            "1",
            "13",
            "9" * 30,
            "0",
            "-",
            "+",
            ".",
            "e",
            "1e308",
            ":",
            ",",
            " ",
            "  ",
            "ms",
            "s",
            "m",
            "h",
            "d",
            "minutes",
        ),
        *("Tue", "Sunday", "14", "Nov", "-Nov-", "2023", "94", "0000", "9999", "99999", "22:13:20", "24:60:61", "GMT"),
        *("EST", "Z", "+0000", "-9959", "+2400", "+999999", "(", ")", "T", "2023-11-14", "0001-01-01", "9999-12-31"),
        *("W53-7", "nan", "inf"),
    ]
)
WAITS = st.lists(PIECES, max_size=7).map("".join) | st.lists(PIECES, max_size=7).map(" ".join)
SAID = WAITS | TEXTS
HEADERS = st.dictionaries(
    st.sampled_from(ABOUT_LIMITS) | TEXTS,
    SAID | SAID.map(lambda text: text.encode("utf-8", "surrogatepass")) | NUMBERS | st.none(),
    max_size=5,
)
MESSAGES = st.lists(
    st.sampled_from(["Please retry after ", "Try again in ", "retry-after:", "rate limit", "token rate limit", "quota"])
    | WAITS
    | TEXTS,
    max_size=5,
).map("".join)
JUDGES = [
    status_code,
    is_rate_limit,
    is_insufficient_quota,
    is_content_filter,
    is_transient,
    is_service_failure,
]


class Broken:
    """Raises whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError("broken")

    def __len__(self):
        raise RuntimeError("broken")

    def __str__(self):
        raise RuntimeError("broken")


class BrokenMapping(dict):
    """A mapping that cannot be read."""

    def items(self):
        raise RuntimeError("broken")


class BrokenError(Exception):
    """An error of which nothing can be read."""

    def __str__(self):
        raise RuntimeError("broken")

    response = headers = body = code = property(lambda self: 1 / 0)


def is_sound(advice):
    """Whether code may compute with an advice."""
    *numbers, exhausted = astuple(advice)
    return exhausted in (None, "requests", "tokens") and all(
        it is None or (isinstance(it, int | float) and it >= 0 and math.isfinite(it)) for it in numbers
    )


@st.composite
def errors(draw):
    error = draw(st.sampled_from([RuntimeError, OSError, TimeoutError, KeyError, UnicodeDecodeError]))
    error = RuntimeError(draw(MESSAGES)) if error is UnicodeDecodeError else error(draw(MESSAGES))
    for name in draw(st.sets(st.sampled_from(["status_code", "status", "code", "type"]))):
        setattr(error, name, draw(st.integers(-5, 700) | VALUES))
    headers = draw(HEADERS | VALUES | st.builds(Broken) | HEADERS.map(BrokenMapping))
    if draw(st.booleans()):
        error.response = SimpleNamespace(headers=headers, status_code=draw(VALUES | st.integers(400, 600)))
    else:
        error.headers = headers
    error.body = draw(VALUES | st.fixed_dictionaries({"error": VALUES, "code": VALUES, "innererror": VALUES}))
    return error


@given(HEADERS, st.floats(-1e12, 1e12))
@examples(120)
def test_headers_of_any_kind_are_read_as_times_and_counts_that_can_be_computed_with(headers, now):
    assert is_sound(advice_from_headers(headers, now=now))


@given(st.sampled_from(ABOUT_LIMITS), WAITS)
@examples(250)
def test_a_wait_in_any_spelling_is_read_as_a_time_that_can_be_computed_with(name, text):
    assert is_sound(advice_from_headers({name: text}, now=1.7e9))


@given(VALUES)
@examples(50)
def test_what_is_no_headers_says_nothing(value):
    assert isinstance(advice_from_headers(value), ServerAdvice)


@given(st.binary(max_size=200), st.sampled_from([email.policy.compat32, email.policy.default, email.policy.HTTP]))
@examples(100)
def test_headers_that_no_parser_understands_raise_nothing(raw, policy):
    message = email.message_from_bytes(b"Retry-After: " + raw + b"\nContent-Type: " + raw + b"\n\n", policy=policy)

    assert is_sound(advice_from_headers(message))


@given(st.lists(errors(), min_size=1, max_size=3), st.booleans())
@examples(60)
def test_errors_of_any_kind_are_judged_without_another_error(chain, is_ring):
    for error, cause in zip(chain, [*chain[1:], chain[0] if is_ring else None], strict=True):
        error.__cause__ = cause

    for judge in JUDGES:
        assert judge(chain[0]) in (True, False, None) or 100 <= judge(chain[0]) < 600
    assert is_sound(advice_from_error(chain[0]))


@pytest.mark.parametrize("judge", JUDGES)
def test_an_error_of_which_nothing_can_be_read_is_judged_all_the_same(judge):
    assert judge(BrokenError()) in (True, False, None)


def test_headers_that_cannot_be_read_say_nothing():
    error = RuntimeError("Rate limit is exceeded. Try again in 50 seconds.")
    error.headers = BrokenMapping({"retry-after": "13"})

    assert advice_from_error(error).retry_after == 50


def test_headers_that_do_not_say_whether_they_are_empty_replace_no_error():
    error = RuntimeError("Rate limit is exceeded. Try again in 50 seconds.")
    error.response = SimpleNamespace(headers=Broken())

    assert advice_from_error(error).retry_after == 50


@given(VALUES | HEADERS.map(lambda headers: SimpleNamespace(headers=headers)))
@examples(100)
def test_results_of_any_kind_are_left_alone(result):
    advice = advice_from_result(result)

    assert advice is None or is_sound(advice)


@pytest.mark.parametrize(
    "name", ["retry-after", "retry-after-ms", "x-ratelimit-reset-tokens", "x-ratelimit-limit-tokens"]
)
@pytest.mark.parametrize("unit", ["1", "1m", "1 second, ", " ", "-", "Tue, ", "9" * 99 + "."])
def test_a_header_of_any_length_takes_the_same_time(name, unit):
    """25 kB of it and 100 kB alike: no more is looked at than a wait has."""
    times = growth(
        lambda headers: [advice_from_headers(headers, now=0) for _ in range(20)],
        lambda size: {name: (unit * size)[:size]},
        25_000,
    )

    assert times < 3


def test_many_headers_take_time_in_proportion():
    def make(many):
        return httpx2.Headers([(f"x-ratelimit-{number}", "1m" * 1_000) for number in range(many)])

    assert growth(advice_from_headers, make, 1_000) < 10


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "retry after ",
            "retry after 1",
            "retry after 1m",
            "1m ",
            "try again in 1s, ",
            "1" * 40,
            "1.",
            "rate ",
            "rate_",
        ),
        *("token ", "too many ", "too-many-", "exceeded your ", "content ", "responsible ai ", "responsible_ai_", "\n"),
    ],
)
@pytest.mark.parametrize("judge", [advice_from_error, is_rate_limit, is_content_filter, is_insufficient_quota])
def test_no_message_makes_a_pattern_go_back_and_forth(judge, unit):
    """A pattern that tries each beginning with each end takes 16 times as long for a text of four times the length."""
    start = "retry after " if unit.startswith("1") else ""

    def make(size):
        return RuntimeError(start + (unit * size)[:size])

    assert growth(lambda error: [judge(error) for _ in range(5)], make, 1_000) < 10


@pytest.mark.parametrize("judge", [advice_from_error, is_rate_limit, is_transient])
def test_a_long_chain_of_causes_takes_time_in_proportion(judge):
    def make(many):
        error = RuntimeError("the last")
        for _ in range(many):
            cause, error = error, RuntimeError("x" * 100)
            error.__cause__ = cause
        return error

    assert growth(judge, make, 500) < 10


def test_a_body_that_may_not_be_changed_is_read():
    error = RuntimeError("no")
    error.body = MappingProxyType({"error": MappingProxyType({"code": "insufficient_quota"})})

    assert is_insufficient_quota(error)
