"""Rules, URLs and arguments of any kind: what works, or one error that says on one line what is wrong."""

import re
import tomllib
from pathlib import Path

import httpx2
import pytest
from hostile_values import NUMBERS, TEXTS, VALUES, examples, is_harmless, told
from hypothesis import example, given, strategies as st
from typer.testing import CliRunner

from resilience_kit.cli import app
from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.alert_delivery import Webhook, sign, verify
from resilience_kit.monitoring.alert_rules import Rule, load_rules
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Sample
from resilience_kit.monitoring.report import report_on, seconds_of, to_html
from resilience_kit.pricing import Price, set_prices

SECRET = "a-secret-that-nobody-guesses"  # noqa: S105 - the tests' own
KEYS = ["measure", "above", "clears_at", "for_seconds", "over_seconds", "least_calls", "severity", "names", "advice"]
TOML_VALUES = st.sampled_from(
    [
        *(
            "1",
            "-1",
            "0.5",
            "nan",
            "inf",
            "1e400",
            "9" * 400,
            "9" * 5_000,
            "true",
            "''",
            '"\\u001b[2J"',
            "[]",
            "{}",
            "[[]]",
        ),
        *("2027-01-31T08:00:00Z", "2027-01-31", "08:00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"),
        *("'wait_p95_seconds'", "'critical'", "['chat']", "[1]", "'circuit-open'", "{a=1}", "[" * 2_000, "{a=" * 2_000),
    ]
)
TOML_LINES = st.one_of(
    st.sampled_from(
        [
            *("[rules.circuit-open]", '[rules."a\\nb\\u001b[2J"]', "[rules]", "[[rules]]", "[[silences]]", "rules = 1"),
            *(
                "silences = 1",
                "keep_defaults = false",
                "keep_defaults = 1",
                "[rules.rate-limited]",
                "x" + ".y" * 1_000 + "=1",
            ),
        ]
    ),
    st.tuples(st.sampled_from([*KEYS, "enabled", "until", "rule", "name", '"\\u001b"', "\x1b"]), TOML_VALUES).map(
        " = ".join
    ),
    TEXTS,
)
URLS = st.lists(
    st.sampled_from(
        [
            *(
                "https",
                "http",
                "HTTPS",
                "ftp",
                "://",
                ":",
                "/",
                "//",
                "@",
                "?",
                "#",
                "[",
                "]",
                "[::1]",
                "example.com",
                ":443",
            ),
            *(
                ":0",
                ":99999",
                ":\xb2",
                "%00",
                "%zz",
                " ",
                "\n",
                "\t",
                "xn--",
                "\u2488com",
                "\uff10",
                "a" * 300,
                ".",
                "é.example",
            ),
        ]
    )
    | TEXTS,
    max_size=7,
).map("".join)


@given(st.lists(TOML_LINES, max_size=6).map("\n".join))
@example('[rules]\n"\\u001b" = 1')
@examples(80)
def test_a_file_of_rules_of_any_kind_is_rules_or_an_error_on_one_line(text):
    Path("alerts.toml").write_text(text, encoding="utf-8", errors="replace")

    message = told(ConfigurationError, load_rules, "alerts.toml")

    assert message is None or (message.startswith("alerts.toml: ") and is_harmless(message))


@given(st.binary(max_size=50))
@examples(50)
def test_a_file_of_any_bytes_is_rules_or_an_error(content):
    Path("alerts.toml").write_bytes(content)

    told(ConfigurationError, load_rules, "alerts.toml")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5_000,
        "a = " + "{a = " * 5_000,
        "[rules.x]\nmeasure = 'wait_p95_seconds'\nabove = " + "1" * 5_000,
        "[[silences]]\nuntil = 2027-01-31T08:00:00Z\nrule = []",
        "[[silences]]\nuntil = 2027-01-31T08:00:00Z\nrule = {}",
        "x" + ".y" * 3_000 + " = 1",
        '[rules."\\u001b[2J\\n"]\nmeasure = 1\nabove = 1',
        '"\\u001b[2J\\n" = 1',
    ],
)
def test_rules_that_no_parser_takes_are_an_error_on_one_line(text):
    Path("alerts.toml").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError, match=r"alerts\.toml") as raised:
        load_rules("alerts.toml")

    assert is_harmless(str(raised.value))


@pytest.mark.parametrize("path", ["a\0b", "\udc80", "", "/", "a" * 5_000])
def test_a_path_that_leads_nowhere_is_an_error(path):
    with pytest.raises(ConfigurationError):
        load_rules(path)


@given(
    st.fixed_dictionaries(
        {"name": VALUES, "measure": VALUES, "above": VALUES}, optional=dict.fromkeys(KEYS[2:], VALUES)
    )
)
@examples(60)
def test_a_rule_of_any_kind_is_one_or_an_error_on_one_line(values):
    message = told(ConfigurationError, Rule, **values)

    assert message is None or is_harmless(message)


@given(URLS)
@examples(80)
def test_a_webhook_is_refused_or_can_be_sent_to(url):
    message = told(ConfigurationError, Webhook, url, secret=SECRET)

    if message is None:
        httpx2.Request("POST", url)
    else:
        assert is_harmless(message)
        assert len(url) < 9 or url not in message


@pytest.mark.parametrize(
    "url", ["https://a\nb.com", "https://\u2488com", "https://a/" + "x" * 70_000, "https://a/\x00", "https://\x7f/"]
)
def test_an_address_that_no_request_can_have_is_refused_where_it_is_written(url):
    with pytest.raises(ConfigurationError, match="Webhook"):
        Webhook(url, secret=SECRET)


@given(st.binary(max_size=20), TEXTS, TEXTS | st.just("sha256="), NUMBERS.filter(lambda it: isinstance(it, float)))
@examples(60)
def test_a_signature_of_any_kind_is_not_taken(body, timestamp, signature, now):
    assert not verify(body, timestamp=timestamp, signature=signature, secret=SECRET, now=now)


def test_a_signature_of_a_time_that_is_no_time_is_not_taken():
    for timestamp in ("9" * 5_000, "\u0663", "-1", "1e9", " 1", "0" * 30):
        assert not verify(
            b"", timestamp=timestamp, signature=sign(b"", timestamp=timestamp, secret=SECRET), secret=SECRET
        )


@given(TEXTS | st.from_regex(r"\d{1,7}(\.\d{1,4})?[smhdw]", fullmatch=True))
@examples(60)
def test_a_stretch_of_time_of_any_kind_is_reported_on_or_refused(since):
    message = told(ConfigurationError, seconds_of, since)
    if message is not None:
        assert is_harmless(message)
        return
    with History("since.sqlite3", clock=lambda: 61) as history:
        history.add(Sample(60, 1, "one"))

    assert to_html(report_on(history, seconds=seconds_of(since)))


@given(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=2))
@examples(40)
def test_prices_of_any_kind_are_prices_or_an_error_on_one_line(prices):
    message = told(ConfigurationError, set_prices, prices)

    assert is_harmless(message)


@given(VALUES, VALUES, VALUES)
@examples(60)
def test_a_price_of_any_kind_is_one_or_an_error_on_one_line(prompts, answers, cached):
    message = told(ConfigurationError, Price, prompts, answers, cached)

    assert message is None or is_harmless(message)


WORDS = st.sampled_from(
    [
        *(
            "explain",
            "plan",
            "report",
            "alerts",
            "check",
            "test",
            "stats",
            "top",
            "--once",
            "--json",
            "--url",
            "--history",
        ),
        *("--since", "--rules", "--rule", "--webhook", "--rpm", "--tpm", "--agents", "--latency", "--prompt-tokens"),
        *(
            "--output-tokens",
            "--process",
            "1",
            "nan",
            "inf",
            "1e400",
            "-1",
            "1-",
            "0-nan",
            "9" * 5_000,
            "999999w",
            "7d",
        ),
        *(
            "http://[",
            "http://127.0.0.1:1",
            "sqlite://",
            "nothing://",
            "alerts.toml",
            "os.path:join",
            ":",
            "a..b:c",
            ".",
            "x:",
        ),
    ]
)


@given(st.lists(WORDS | TEXTS, max_size=6))
@examples(30)
def test_a_command_line_of_any_kind_ends_without_a_traceback(arguments):
    Path("alerts.toml").write_text('[rules."a\\u001b[2J"]\nmeasure = "wait_p95_seconds"\nabove = 1', encoding="utf-8")

    result = CliRunner().invoke(app, arguments)

    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (0, 1, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["alerts", "check", "alerts.toml"],
        ["alerts", "test", "--rules", "alerts.toml", "--rule", "a\x1b[2J"],
        ["alerts", "test", "--rules", "alerts.toml", "--rule", "none"],
        ["alerts", "test", "--rule", "\x1b[2J"],
        ["alerts", "check", "\x1b[2J"],
        ["explain", "\x1b[2J:x"],
        ["report", "--since", "\x1b[2J"],
        ["report", "--history", "\x1b[2J.sqlite3"],
        ["stats", "--history", "\x1b[2J.sqlite3"],
        ["stats", "--url", "http://\x1b[2J/"],
        ["dashboard", "--host", "\x1b[2J", "--history", "x"],
        ["dashboard", "--token-file", "\x1b[2J"],
    ],
)
def test_no_command_tells_a_terminal_what_to_do(arguments):
    Path("alerts.toml").write_text('[rules."a\\u001b[2J"]\nmeasure = "wait_p95_seconds"\nabove = 1', encoding="utf-8")

    result = CliRunner().invoke(app, arguments)

    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert shows_no_controls(result.output)


@pytest.mark.parametrize("host", ["a" * 70, "..", "[::1", "::1::"])
@pytest.mark.parametrize("command", ["dashboard", "simulator"])
def test_a_host_that_is_none_is_told(monkeypatch, command, host):
    monkeypatch.setenv("RESILIENCE_DASHBOARD_TOKEN", SECRET)

    result = CliRunner().invoke(app, [command, "--host", host, "--port", "0"])

    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2


def shows_no_controls(output):
    return is_harmless(re.sub(r"[\n─-╿]", "", output))


def test_toml_is_what_the_tests_take_it_for():
    assert tomllib.loads('[rules."a\\u001b[2J"]') == {"rules": {"a\x1b[2J": {}}}
