"""Whatever the environment, .env and arguments hold: settings that work, or one error that names what is wrong."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest
from hostile_values import NUMBERS, TEXTS, VALUES, examples, growth, is_harmless, told
from hypothesis import given, strategies as st

from resilience_kit import configure, rate_limited, resilient, retry_on_429
from resilience_kit.errors import ConfigurationError, StoreUnavailableError
from resilience_kit.fleet.connection import Connection, packaged_script
from resilience_kit.settings import ResilienceSettings, agent_variable
from resilience_kit.store_urls import checked_store_url, place_of, secrets_of
from resilience_kit.testing import isolated

NAMES = sorted(name.upper() for name in ResilienceSettings.model_fields)
LENGTHS = st.sampled_from(
    ["", "9" * 400, "9" * 5_000, "1e308", "-1e308", "1e400", "nan", "inf", "0", "-1", "1_0", "0x10"]
)
GIVEN = TEXTS | LENGTHS | NUMBERS.map(str)
PIECES_OF_FILES = st.sampled_from(
    [b"\n", b"'", b'"', b"export ", b"${", b"}", b"\\", b"\\x", b"\\N{x}", b"\\ud800", b":-", b"#"]
)
PIECES_OF_URLS = st.sampled_from(
    [
        *(
            "redis",
            "rediss",
            "unix",
            "valkey",
            "://",
            ":",
            "/",
            "//",
            "@",
            "?",
            "#",
            "&",
            "=",
            "%00",
            "%zz",
            "%2F",
            "[",
        ),
        *(
            "127.0.0.1",
            ":1",
            ":0",
            ":99999",
            "::1",
            "[::1]",
            "localhost.",
            "..",
            "a" * 70,
            "/0",
            "/٣",
            "/99999999999",
            "]",
        ),
        *("db=", "username=", "password=", "ssl_cert_reqs=none", "ssl_ca_certs=/nowhere", "client_name=%0d%0aFLUSHALL"),
    ]
)
# What a test may reach: nothing, at once.
ON_THIS_MACHINE = re.compile(r"(redis|rediss|unix)://(\[?::1\]?|127\.0\.0\.1)?:?[01]?([/?].*)?", re.DOTALL)


def fits_into_an_environment(text):
    try:
        return "\0" not in os.fsencode(text).decode("latin-1")
    except UnicodeEncodeError:
        return False


@given(st.sampled_from(NAMES), GIVEN.filter(fits_into_an_environment))
@examples(150)
def test_a_variable_of_any_kind_is_a_setting_or_an_error_with_its_name(name, text):
    with mock.patch.dict(os.environ, {name: text}):
        message = told(ConfigurationError, ResilienceSettings)

    assert message is None or (name in message and is_harmless(message))


@given(st.sampled_from(NAMES), VALUES)
@examples(150)
def test_a_value_of_any_kind_is_a_setting_or_an_error_with_its_name(name, value):
    message = told(ConfigurationError, ResilienceSettings, **{name.lower(): value})

    assert message is None or (name in message and is_harmless(message))


@given(TEXTS.filter(bool), GIVEN.filter(fits_into_an_environment))
@examples(100)
def test_an_agents_variable_of_any_kind_is_a_maximum_or_an_error_with_its_value(agent, text):
    variable = agent_variable(agent)
    if not fits_into_an_environment(variable) or variable in NAMES:
        return
    with mock.patch.dict(os.environ, {variable: text}):
        message = told(ConfigurationError, ResilienceSettings().agent_max_tokens, agent)

    assert message is None or (repr(text) in message and is_harmless(message))


@given(
    st.lists(
        st.binary(max_size=20)
        | PIECES_OF_FILES
        | st.sampled_from([f"\n{name}=".encode() for name in NAMES])
        | GIVEN.map(lambda text: text.encode("utf-8", "surrogatepass")),
        max_size=8,
    ).map(b"".join)
)
@examples(150)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # an escape that Python does not know, in quotes
def test_an_env_file_of_any_bytes_is_settings_or_an_error(content):
    Path(".env").write_bytes(content)

    message = told(ConfigurationError, ResilienceSettings)

    assert message is None or is_harmless(message)


@pytest.mark.parametrize("unit", ["A='", 'A="', "export ", "=", "\\'", "A=\\", "#", "A\n", "A=1\n", "'"])
def test_an_env_file_takes_time_in_proportion(unit):
    def make(size):
        Path(".env").write_text((unit * size)[:size], encoding="utf-8")

    assert growth(lambda _: ResilienceSettings(), make, 1_000) < 10


@pytest.mark.parametrize(
    "variable", ["REQUESTS_PER_MINUTE", "TOKENS_PER_MINUTE", "MAX_RETRIES", "MAX_CONCURRENT_REQUESTS"]
)
def test_a_number_that_nothing_can_compute_with_is_refused_at_once(monkeypatch, variable):
    monkeypatch.setenv(variable, "9" * 400)

    with pytest.raises(ConfigurationError, match=variable):
        ResilienceSettings()


def test_a_deadline_that_no_socket_can_wait_for_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RESILIENCE_STORE_DEADLINE_SECONDS", "1e300")

    with pytest.raises(ConfigurationError, match="RESILIENCE_STORE_DEADLINE_SECONDS"):
        ResilienceSettings()


@given(
    st.sampled_from(["requests_per_minute", "tokens_per_minute", "max_concurrent_requests", "max_retries"]),
    NUMBERS | st.sampled_from([2**53, 2**53 - 1, 1]),
)
@examples(50)
def test_what_settings_take_a_call_can_use(name, number):
    def call():
        configure(ResilienceSettings(**{name: number}))
        return resilient("chat")(lambda: "four")()

    with isolated():
        message = told(ConfigurationError, call)

    assert message is None or name.upper() in message


@given(
    st.sampled_from(["requests_per_minute", "tokens_per_minute", "max_concurrent", "min_interval", "max_wait"]), VALUES
)
@examples(80)
def test_what_a_decorator_takes_a_call_can_use(name, value):
    def call():
        return rate_limited("chat", **{name: value})(lambda: "four")()

    with isolated():
        message = told(ConfigurationError, call)

    assert message is None or is_harmless(message)


def test_a_backoff_longer_than_any_clock_counts_does_not_replace_the_functions_own_error(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)

    @retry_on_429(initial_backoff=1e308, max_backoff=1e308, jitter=False, max_retries=1)
    def ask():
        raise ConnectionError("rate limit")

    with pytest.raises(ConnectionError, match="rate limit"):
        ask()
    # time.sleep() counts nanoseconds in 64 bits
    assert slept[0] < 2**63 / 1e9


@given(st.lists(PIECES_OF_URLS | TEXTS, max_size=8).map("".join))
@examples(200)
def test_a_store_url_of_any_kind_is_refused_or_can_be_asked(url):
    message = told(ConfigurationError, checked_store_url, url)
    if message is not None:
        assert is_harmless(message)
        return
    checked = checked_store_url(url)
    place_of(checked)
    assert all(isinstance(secret, str) and secret for secret in secrets_of(checked))
    connection = Connection(checked, deadline=0.25)
    if ON_THIS_MACHINE.fullmatch(checked):
        with pytest.raises(StoreUnavailableError):
            connection.run_blocking(packaged_script("heartbeat"), ["members"], ["one", 0])
    connection.close()
