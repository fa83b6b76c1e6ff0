import asyncio
import logging
import subprocess
import sys
from contextlib import suppress

import pytest
import structlog

from resilience_kit import (
    CircuitOpenError,
    RateLimitTimeoutError,
    TokenBudgetExceededError,
    circuit_protected,
    events,
    rate_limited,
    reset_circuit_breakers,
    resilient,
    retry_on_429,
    token_budget,
)
from resilience_kit.monitoring import log_events
from resilience_kit.testing import no_waiting


class TooManyRequestsError(Exception):
    """A 429 of any SDK."""

    status_code = 429


@pytest.fixture(autouse=True)
def debug(caplog):
    """Let all lines of the kit through."""
    caplog.set_level(logging.DEBUG, logger="resilience_kit")


@pytest.fixture
def lines(caplog):
    """All lines so far, as logger, level, text and data; figures that depend on the clock are rounded."""

    def lines():
        return [
            (
                record.name.removeprefix("resilience_kit."),
                record.levelname,
                record.getMessage(),
                {key: round(it, 1) if isinstance(it, float) else it for key, it in record.resilience.items()},
            )
            for record in caplog.records
        ]

    return lines


def failing(*errors):
    """A function that fails with these errors, and then answers."""
    errors = iter(errors)

    def ask():
        for error in errors:
            raise error
        return "four"

    return ask


@pytest.mark.looptime
async def test_an_admitted_call_is_a_debug_line(lines):
    @rate_limited("chat", tokens=10)
    async def ask():
        return "four"

    await ask()
    assert lines()[0] == (
        "rate_limiting",
        "DEBUG",
        "admitted name='chat' waited=0.0 tokens=10",
        {"event": "admitted", "name": "chat", "waited": 0.0, "tokens": 10},
    )


@pytest.mark.looptime
async def test_an_answer_is_a_debug_line(lines):
    @rate_limited("chat", tokens=10)
    async def ask():
        await asyncio.sleep(2)

    await ask()
    assert lines()[1:] == [
        (
            "rate_limiting",
            "DEBUG",
            "answered name='chat' seconds=2.0",
            {"event": "answered", "name": "chat", "seconds": 2.0},
        )
    ]


def test_a_call_that_the_server_refused_is_an_info_line(lines):
    refused = TooManyRequestsError()
    refused.headers = {"retry-after": "7"}
    with suppress(TooManyRequestsError):
        rate_limited("chat")(failing(refused))()
    assert lines()[1] == (
        "rate_limiting",
        "INFO",
        "rate-limited name='chat' retry_after=7.0",
        {"event": "rate-limited", "name": "chat", "retry_after": 7.0},
    )


@pytest.mark.looptime
async def test_a_call_that_waited_is_two_debug_lines(lines):
    @rate_limited("chat", min_interval=2, tokens=10)
    async def ask():
        return "four"

    await ask()
    await ask()
    waiting, admitted, _ = lines()[2:]
    assert waiting == (
        "rate_limiting",
        "DEBUG",
        "waiting name='chat' seconds=2.0 tokens=10 ahead=0",
        {"event": "waiting", "name": "chat", "seconds": 2.0, "tokens": 10, "ahead": 0},
    )
    assert (admitted[1], admitted[3]["event"], admitted[3]["waited"]) == ("DEBUG", "admitted", 2.0)


@pytest.mark.looptime
async def test_a_call_that_the_limit_refused_is_a_warning(lines):
    @rate_limited("chat", min_interval=20, max_wait=5)
    async def ask():
        return "four"

    await ask()
    with suppress(RateLimitTimeoutError):
        await ask()
    assert lines()[-1] == (
        "rate_limiting",
        "WARNING",
        "refused name='chat' seconds=20.0 max_wait=5",
        {"event": "refused", "name": "chat", "seconds": 20.0, "max_wait": 5},
    )


def test_a_limit_that_the_server_tightened_is_an_info_line(lines):
    class Answer:
        headers = {"x-ratelimit-remaining-requests": "5"}  # noqa: RUF012 - as an SDK's raw response has them

    @rate_limited("chat")
    def ask():
        return Answer()

    ask()
    assert lines()[1] == (
        "rate_limiting",
        "INFO",
        "tightened name='chat' reason='remaining' seconds=60.0 tokens=0 requests=54",
        {
            "event": "tightened",
            "name": "chat",
            "reason": "remaining",
            "seconds": 60.0,
            "tokens": 0,
            "requests": 54,
        },
    )


def test_a_retry_that_helped_is_two_info_lines(lines):
    ask = retry_on_429(initial_backoff=4, jitter=False)(failing(TooManyRequestsError()))
    with no_waiting():
        ask()
    name = f"{__name__}.failing.<locals>.ask"
    assert lines() == [
        (
            "retrying",
            "INFO",
            f"retrying name='{name}' attempt=1 seconds=4.0 reason='rate limit' error='TooManyRequestsError' told=False",
            {
                "event": "retrying",
                "name": name,
                "attempt": 1,
                "seconds": 4.0,
                "reason": "rate limit",
                "error": "TooManyRequestsError",
                "told": False,
            },
        ),
        (
            "retrying",
            "INFO",
            f"recovered name='{name}' attempts=2",
            {"event": "recovered", "name": name, "attempts": 2},
        ),
    ]


def test_retries_that_were_given_up_are_a_warning(lines):
    ask = retry_on_429(max_retries=0)(failing(TooManyRequestsError()))
    with suppress(TooManyRequestsError):
        ask()
    name = f"{__name__}.failing.<locals>.ask"
    assert lines() == [
        (
            "retrying",
            "WARNING",
            f"given up name='{name}' attempts=1 reason='max_retries' error='TooManyRequestsError'",
            {
                "event": "given up",
                "name": name,
                "attempts": 1,
                "reason": "max_retries",
                "error": "TooManyRequestsError",
            },
        )
    ]


@pytest.mark.looptime
async def test_a_circuits_life_is_told_from_opened_to_closed(lines):
    outcomes = iter([ConnectionError()])

    @circuit_protected("chat", failure_threshold=1, recovery_timeout=30, success_threshold=1)
    async def ask():
        for error in outcomes:
            raise error
        return "four"

    with suppress(ConnectionError):
        await ask()
    with suppress(CircuitOpenError):
        await ask()
    await asyncio.sleep(30)
    await ask()
    assert lines() == [
        (
            "circuit_breaking",
            "WARNING",
            "opened name='chat' failures=1 error='ConnectionError' seconds=30",
            {"event": "opened", "name": "chat", "failures": 1, "error": "ConnectionError", "seconds": 30},
        ),
        (
            "circuit_breaking",
            "WARNING",
            "refused name='chat' seconds=30.0",
            {"event": "refused", "name": "chat", "seconds": 30.0},
        ),
        ("circuit_breaking", "INFO", "half-opened name='chat'", {"event": "half-opened", "name": "chat"}),
        (
            "circuit_breaking",
            "INFO",
            "closed name='chat' reason='recovered'",
            {"event": "closed", "name": "chat", "reason": "recovered"},
        ),
    ]


def test_a_circuit_that_was_closed_by_hand_says_so(lines):
    with suppress(ConnectionError):
        circuit_protected("chat", failure_threshold=1)(failing(ConnectionError()))()
    reset_circuit_breakers("chat")
    assert lines()[-1][1:3] == ("INFO", "closed name='chat' reason='reset'")


def test_a_truncated_prompt_is_an_info_line(lines):
    token_budget("MathAgent", max_tokens=2, on_exceed="truncate")(lambda prompt: prompt)("one two three")
    assert lines()[0] == (
        "token_budgeting",
        "INFO",
        "truncated name='MathAgent' tokens_before=3 tokens_after=2 removed_messages=0",
        {"event": "truncated", "name": "MathAgent", "tokens_before": 3, "tokens_after": 2, "removed_messages": 0},
    )


def test_a_settled_call_is_a_debug_line(lines):
    ask = token_budget("MathAgent", budget_tokens=100)(lambda prompt, max_tokens: "four")
    ask("one two three", 10)
    assert lines() == [
        (
            "token_budgeting",
            "DEBUG",
            "settled name='MathAgent' reserved=13 prompt_tokens=3 completion_tokens=1 usd=1.75e-05 model='gpt-4o'",
            {
                "event": "settled",
                "name": "MathAgent",
                "reserved": 13,
                "prompt_tokens": 3,
                "completion_tokens": 1,
                "usd": 0.0,
                "model": "gpt-4o",
            },
        )
    ]


def test_a_call_that_the_budget_refused_is_a_warning(lines):
    ask = token_budget("MathAgent", budget_tokens=2)(lambda prompt: "four")
    with suppress(TokenBudgetExceededError):
        ask("one two three")
    assert lines() == [
        (
            "token_budgeting",
            "WARNING",
            "refused name='MathAgent' requested=3 remaining=2 unit='tokens'",
            {"event": "refused", "name": "MathAgent", "requested": 3, "remaining": 2, "unit": "tokens"},
        )
    ]


@pytest.mark.looptime
async def test_a_call_that_waits_for_its_budget_is_an_info_line(lines):
    @token_budget("MathAgent", budget_tokens=3, per="hour", on_exceed="wait")
    async def ask(prompt):
        return {"usage": {"prompt_tokens": 3}}

    await ask("one two three")
    await ask("one two three")
    assert lines()[1] == (
        "token_budgeting",
        "INFO",
        "waiting name='MathAgent' seconds=3600.0 requested=3 unit='tokens'",
        {"event": "waiting", "name": "MathAgent", "seconds": 3600.0, "requested": 3, "unit": "tokens"},
    )


def test_long_fractions_are_cut_in_the_line_and_whole_in_the_data(caplog):
    events.emit(events.Admitted(name="chat", waited=1.23456789, tokens=10))
    (record,) = caplog.records
    assert (record.getMessage(), record.resilience["waited"]) == (
        "admitted name='chat' waited=1.235 tokens=10",
        1.23456789,
    )


def test_a_per_cent_sign_in_a_name_is_just_a_sign(caplog):
    events.emit(events.CircuitHalfOpened(name="100%s"))
    assert caplog.messages == ["half-opened name='100%s'"]


def test_a_newline_in_a_name_cannot_forge_a_line(caplog):
    rate_limited("chat\nWARNING forged", tokens=0)(lambda: "four")()
    assert caplog.messages[0] == "admitted name='chat\\nWARNING forged' waited=0.0 tokens=0"


def test_an_event_of_a_kind_that_has_no_line_is_not_logged(caplog):
    events.emit(events.Event(name="chat"))
    assert caplog.records == []


# Levels


def test_debug_on_one_logger_makes_waits_visible(caplog):
    logging.getLogger("resilience_kit").setLevel(logging.WARNING)
    logging.getLogger("resilience_kit.rate_limiting").setLevel(logging.DEBUG)
    try:
        ask = token_budget(rate_limited("chat", min_interval=1, tokens=0)(lambda: "four"))
        with no_waiting():
            ask()
            ask()
    finally:
        logging.getLogger("resilience_kit.rate_limiting").setLevel(logging.NOTSET)
    assert [message.split()[0] for message in caplog.messages] == [
        *("admitted", "answered"),
        *("waiting", "admitted", "answered"),
    ]


def test_at_info_nothing_is_said_while_all_is_well(caplog):
    caplog.set_level(logging.INFO, logger="resilience_kit")
    ask = resilient("chat", max_tokens=100, budget_tokens=100)(lambda prompt: "four")
    with no_waiting():
        for _ in range(5):
            ask("2 + 2?")
    assert caplog.messages == []


def test_every_line_goes_to_a_logger_beneath_the_kits():
    assert {logger.parent.name for logger, _, _ in log_events._LINES.values()} == {"resilience_kit"}


def run_in_a_fresh_process(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - our own program


WARNING_IN_A_FRESH_PROCESS = """
from resilience_kit import rate_limited, RateLimitTimeoutError
try:
    rate_limited("chat", tokens_per_minute=1, tokens=2)(lambda: "four")()
except RateLimitTimeoutError:
    print("refused")
"""


def test_without_logging_set_up_a_program_prints_nothing():
    finished = run_in_a_fresh_process(WARNING_IN_A_FRESH_PROCESS)
    assert (finished.stdout, finished.stderr) == ("refused\n", "")


def test_with_basic_config_a_program_prints_the_line():
    finished = run_in_a_fresh_process("import logging\nlogging.basicConfig()\n" + WARNING_IN_A_FRESH_PROCESS)
    assert finished.stderr == "WARNING:resilience_kit.rate_limiting:refused name='chat' seconds=None max_wait=None\n"


# The user's structlog


@pytest.fixture
def users_structlog():
    """Set structlog up as a program may, with output that is nothing like ours."""
    log_events._structured.cache_clear()
    said = []

    def own_output(logger, method, fields):
        said.append(fields["event"])
        raise structlog.DropEvent

    structlog.configure(
        processors=[own_output],
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        cache_logger_on_first_use=True,
    )
    yield said
    structlog.reset_defaults()
    log_events._structured.cache_clear()


def test_the_users_structlog_does_not_change_our_lines(users_structlog, caplog):
    rate_limited("chat", tokens=0)(lambda: "four")()
    assert caplog.messages[0] == "admitted name='chat' waited=0.0 tokens=0"


def test_our_lines_do_not_go_through_the_users_structlog(users_structlog):
    rate_limited("chat", tokens=0)(lambda: "four")()
    assert users_structlog == []


def test_the_users_structlog_is_as_it_was(users_structlog):
    before = structlog.get_config()
    rate_limited("chat", tokens=0)(lambda: "four")()
    assert structlog.get_config() == before


def test_what_the_user_bound_for_a_request_stays_out_of_our_lines(caplog):
    with structlog.contextvars.bound_contextvars(prompt="my secret"):
        rate_limited("chat", tokens=0)(lambda: "four")()
    assert "my secret" not in caplog.text
