import os
import re
import subprocess
import traceback
from pathlib import Path

import pytest
from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    TokenBudgetExceededError,
    configure,
    explain,
    get_all_resilience_stats,
    rate_limited,
    retry_on_429,
    token_budget,
)
from resilience_kit.settings import current_settings
from resilience_kit.store_urls import checked_store_url

ENV_FILE = Path(__file__).parent.parent / "rate-limiting.env"
# What a process that is alone does not set: the file has it as comments.
STORE = {
    "RESILIENCE_STORE": None,
    "RESILIENCE_STORE_PREFIX": "resilience",
    "RESILIENCE_STORE_DEADLINE_SECONDS": 0.25,
    "ON_STORE_FAILURE": "local",
}


def numbers(values):
    return {name: float(value) for name, value in values.items()}


def defaults():
    return {
        name.upper(): float(field.default)
        for name, field in ResilienceSettings.model_fields.items()
        if name.upper() not in STORE
    }


@pytest.fixture
def env_file(tmp_path):
    """Write lines into the .env of the folder that the test runs in."""
    return lambda *lines: (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")


def test_the_file_of_settings_read_as_a_dotenv_file_says_the_defaults():
    assert numbers(dotenv_values(ENV_FILE)) == defaults()


def test_the_file_of_settings_sourced_by_a_shell_says_the_defaults():
    printed = subprocess.run(
        ["/bin/sh", "-c", "set -a; . ./rate-limiting.env; set +a; env -0"],
        cwd=ENV_FILE.parent,
        env={"PATH": os.defpath},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    exported = dict(line.split("=", 1) for line in printed.split("\0") if line)
    assert numbers({name: exported[name] for name in defaults()}) == defaults()


def test_the_file_of_settings_copied_to_dotenv_changes_no_setting(env_file):
    env_file(ENV_FILE.read_text(encoding="utf-8"))
    assert ResilienceSettings().model_dump() == {
        name: field.default for name, field in ResilienceSettings.model_fields.items()
    }


def test_the_comment_on_agents_in_the_file_of_settings_is_true(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "77")
    assert ResilienceSettings().agent_max_tokens("WriterAgent") == (77, "environment")


def test_dotenv_wins_over_the_default(env_file):
    env_file("MAX_RETRIES=4")
    assert ResilienceSettings().max_retries == 4


def test_the_environment_wins_over_dotenv(env_file, monkeypatch):
    env_file("MAX_RETRIES=4")
    monkeypatch.setenv("MAX_RETRIES", "5")
    assert ResilienceSettings().max_retries == 5


def test_an_argument_of_the_settings_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "5")
    assert ResilienceSettings(max_retries=6).max_retries == 6


def test_an_argument_of_a_decorator_wins_over_configure():
    configure(ResilienceSettings(max_retries=6))
    (layer,) = explain(retry_on_429(max_retries=7)(len)).layers
    assert str(layer.parameters["max_retries"]) == "7 (argument)"


def test_configured_settings_still_read_what_they_do_not_say(monkeypatch):
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "7")
    configure(ResilienceSettings(max_retries=6))
    assert current_settings().requests_per_minute == 7


def test_a_variable_may_be_written_in_lower_case(monkeypatch):
    monkeypatch.setenv("max_retries", "5")
    assert ResilienceSettings().max_retries == 5


@pytest.mark.parametrize("variable", ["MAX_RETRIES", "MATH_AGENT_MAX_TOKENS"])
def test_an_empty_variable_is_as_good_as_none(monkeypatch, variable):
    monkeypatch.setenv(variable, "")
    assert getattr(ResilienceSettings(), variable.lower()) == defaults()[variable]


def test_an_empty_variable_of_an_agent_leaves_dotenv_alone(env_file, monkeypatch):
    env_file("WRITER_AGENT_MAX_TOKENS=55")
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "")
    assert ResilienceSettings().agent_max_tokens("WriterAgent") == (55, "environment")


@pytest.mark.parametrize(
    ("given", "source"), [({}, "default"), ({"max_retries": 6}, "configure()")], ids=["nothing", "configured"]
)
def test_the_source_of_a_setting_is_known(given, source):
    assert ResilienceSettings(**given).source("max_retries") == source


def test_dotenv_and_the_environment_are_one_source(env_file):
    env_file("MAX_RETRIES=4")
    assert ResilienceSettings().source("max_retries") == "environment"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MAX_CONCURRENT_REQUESTS", "three", "integer"),
        ("MAX_CONCURRENT_REQUESTS", "0", "greater than 0"),
        ("REQUESTS_PER_MINUTE", "-60", "greater than 0"),
        ("TOKENS_PER_MINUTE", "1.5", "integer"),
        ("MAX_RETRIES", "-1", "greater than or equal to 0"),
        ("INITIAL_BACKOFF_SECONDS", "nan", "finite number"),
        ("MAX_BACKOFF_SECONDS", "inf", "finite number"),
        ("MIN_REQUEST_INTERVAL_MS", "-0.1", "greater than or equal to 0"),
        ("BACKOFF_MULTIPLIER", "0.5", "greater than or equal to 1"),
        ("CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "1 minute", "number"),
        ("MATH_AGENT_MAX_TOKENS", "lots", "integer"),
    ],
)
def test_the_error_names_the_variable_the_value_and_what_was_expected(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        ResilienceSettings()
    message = str(caught.value)
    assert message.startswith(f"{variable}={value!r}: expected ")
    assert expected in message


def test_all_bad_values_are_told_at_once(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "some")
    monkeypatch.setenv("TOKENS_PER_MINUTE", "many")
    with pytest.raises(ConfigurationError, match=r"TOKENS_PER_MINUTE='many'.*; MAX_RETRIES='some'"):
        ResilienceSettings()


def test_a_bad_value_in_dotenv_is_told_alike(env_file):
    env_file("MAX_RETRIES=some")
    with pytest.raises(ConfigurationError, match=r"^MAX_RETRIES='some': expected "):
        ResilienceSettings()


def test_a_dotenv_that_is_not_text_is_told_alike(tmp_path):
    (tmp_path / ".env").write_bytes("MAX_RETRIES=3  # trois réessais".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"\.env.*UTF-8"):
        ResilienceSettings()


def test_a_bad_argument_is_told_alike():
    with pytest.raises(ConfigurationError, match=r"^MAX_RETRIES=-1: expected greater than or equal to 0$"):
        ResilienceSettings(max_retries=-1)


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigurationError, match=r"unknown settings max_retrys: known are .*\bmax_retries\b"):
        ResilienceSettings(max_retrys=1)


def test_a_bad_value_stops_the_first_call_with_its_name(monkeypatch):
    ask = rate_limited(lambda: "four")
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "unlimited")
    with pytest.raises(ConfigurationError, match=r"^REQUESTS_PER_MINUTE='unlimited'"):
        ask()


def test_settings_cannot_be_changed_under_a_limit_that_uses_them():
    with pytest.raises(ValueError, match="frozen"):
        current_settings().max_retries = 9


@pytest.mark.parametrize(
    ("agent", "tokens"),
    [
        ("MathAgent", 4_000),
        ("math_agent", 4_000),
        ("mathAgent", 4_000),
        ("math-agent", 4_000),
        ("Math Agent", 4_000),
        (" math.agent ", 4_000),
        ("ADXAgent", 8_000),
        ("AdxAgent", 8_000),
        ("CoordinatorAgent", 10_000),
    ],
)
def test_the_three_agents_have_their_defaults_however_they_are_spelled(agent, tokens):
    assert ResilienceSettings().agent_max_tokens(agent) == (tokens, "default")


@pytest.mark.parametrize(
    ("agent", "variable"),
    [
        ("WriterAgent", "WRITER_AGENT_MAX_TOKENS"),
        ("writer_agent", "WRITER_AGENT_MAX_TOKENS"),
        ("writer", "WRITER_MAX_TOKENS"),
        ("KQLWriter", "KQL_WRITER_MAX_TOKENS"),
        ("GPT4Writer", "GPT4_WRITER_MAX_TOKENS"),
        ("sales.report v2", "SALES_REPORT_V2_MAX_TOKENS"),
        ("Übersetzer", "ÜBERSETZER_MAX_TOKENS"),
    ],
)
def test_any_other_agent_reads_its_own_name_by_the_same_rule(monkeypatch, agent, variable):
    monkeypatch.setenv(variable, "123")
    assert ResilienceSettings().agent_max_tokens(agent) == (123, "environment")


def test_an_agent_without_a_variable_has_no_maximum():
    assert ResilienceSettings().agent_max_tokens("WriterAgent") == (None, "default")


def test_an_agents_variable_may_stand_in_dotenv(env_file):
    env_file("WRITER_AGENT_MAX_TOKENS=55")
    assert ResilienceSettings().agent_max_tokens("WriterAgent") == (55, "environment")


def test_an_agents_variable_in_the_environment_wins_over_dotenv(env_file, monkeypatch):
    env_file("WRITER_AGENT_MAX_TOKENS=55")
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "66")
    assert ResilienceSettings().agent_max_tokens("WriterAgent") == (66, "environment")


def test_the_source_of_an_agents_maximum_can_be_configure():
    assert ResilienceSettings(math_agent_max_tokens=9).agent_max_tokens("MathAgent") == (9, "configure()")


@pytest.mark.parametrize("text", ["4_000", " 4000 ", "4000.0"])
def test_any_agents_variable_is_read_like_that_of_the_math_agent(monkeypatch, text):
    monkeypatch.setenv("MATH_AGENT_MAX_TOKENS", text)
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", text)
    settings = ResilienceSettings()
    assert settings.agent_max_tokens("WriterAgent") == settings.agent_max_tokens("MathAgent")


@pytest.mark.parametrize("text", ["lots", "0", "-5", "1.5", "nan"])
def test_a_bad_variable_stops_the_agent_that_asks(monkeypatch, text):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", text)
    settings = ResilienceSettings()
    with pytest.raises(ConfigurationError, match=f"^WRITER_AGENT_MAX_TOKENS='{text}': expected "):
        settings.agent_max_tokens("WriterAgent")


def test_a_bad_variable_stops_no_other_agent(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "lots")
    assert ResilienceSettings().agent_max_tokens("MathAgent") == (4_000, "default")


@pytest.fixture
def times_read(monkeypatch):
    """Count how often settings are made."""
    times = []
    make = BaseSettings.__init__
    monkeypatch.setattr(BaseSettings, "__init__", lambda *args, **values: (times.append(1), make(*args, **values)))
    return times


def test_settings_are_not_read_when_a_function_is_decorated(times_read):
    token_budget("MathAgent")(retry_on_429(rate_limited("chat")(lambda prompt: "four")))
    assert times_read == []


def test_settings_are_read_once_at_the_first_call(times_read):
    ask = token_budget("MathAgent")(rate_limited("chat", min_interval=0)(lambda prompt: "four"))
    for _ in range(3):
        ask("2 + 2?")
    assert times_read == [1]


def test_a_variable_set_after_decoration_counts(monkeypatch):
    ask = rate_limited("chat")(lambda: "four")
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "7")
    ask()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_per_minute"] == 7


def test_a_variable_set_after_the_first_call_does_not_count(monkeypatch):
    ask = rate_limited("chat", min_interval=0)(lambda: "four")
    ask()
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "7")
    ask()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_per_minute"] == 60


def test_a_limit_in_use_keeps_what_it_was_built_with():
    ask = rate_limited("chat", min_interval=0)(lambda: "four")
    configure(ResilienceSettings(requests_per_minute=30))
    ask()
    configure(ResilienceSettings(requests_per_minute=90))
    ask()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_per_minute"] == 30


def test_a_limit_that_is_used_later_takes_the_new_ones():
    configure(ResilienceSettings(requests_per_minute=30))
    configure(ResilienceSettings(requests_per_minute=90))
    rate_limited("chat")(lambda: "four")()
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["requests_per_minute"] == 90


def test_an_agents_maximum_holds_from_the_next_call_on():
    ask = token_budget("MathAgent")(lambda prompt: "four")
    ask("What is two and two?")
    configure(ResilienceSettings(math_agent_max_tokens=1))
    with pytest.raises(TokenBudgetExceededError, match="max_tokens=1"):
        ask("What is two and two?")


@pytest.mark.parametrize("other", [{"max_retries": 5}, None, ResilienceSettings], ids=["dict", "None", "the class"])
def test_configure_refuses_anything_but_settings(other):
    with pytest.raises(ConfigurationError, match=r"^configure\(\) takes ResilienceSettings\(\.\.\.\), not "):
        configure(other)


# The store of a fleet

SECRET = "s3cr3t-4242"  # noqa: S105 - what must not leak is what these tests are about
USER = "alice-4242"


def test_the_file_of_settings_has_the_store_as_comments_with_the_defaults():
    lines = re.findall(r"^# (\w+)=(.*)$", ENV_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: value for name, value in lines if name != "RESILIENCE_STORE"} == {
        name: str(default) for name, default in STORE.items() if default is not None
    }
    checked_store_url(dict(lines)["RESILIENCE_STORE"])


def test_without_a_word_there_is_no_store():
    settings = ResilienceSettings()
    assert {name: getattr(settings, name.lower()) for name in STORE} == STORE


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("redis://localhost", "redis://localhost"),
        ("redis://localhost:6380/3", "redis://localhost:6380/3"),
        ("REDIS://localhost", "redis://localhost"),
        ("valkey://localhost", "redis://localhost"),
        ("valkeys://localhost", "rediss://localhost"),
        (
            "rediss://user:pass%2Fword@[::1]:6380?ssl_cert_reqs=none",
            "rediss://user:pass%2Fword@[::1]:6380?ssl_cert_reqs=none",
        ),
        ("unix:///run/valkey.sock?db=1", "unix:///run/valkey.sock?db=1"),
        ("unix://user:password@/run/valkey.sock", "unix://user:password@/run/valkey.sock"),
    ],
)
def test_a_store_is_a_url_of_valkey_or_redis(monkeypatch, written, taken):
    monkeypatch.setenv("RESILIENCE_STORE", written)
    assert ResilienceSettings().resilience_store.get_secret_value() == taken


WRONG_URLS = [
    f"{USER}:{SECRET}@localhost:6379",
    f"http://{USER}:{SECRET}@localhost",
    f"redis:{USER}:{SECRET}@localhost",
    f"redis:/{USER}:{SECRET}@localhost",
    f"redis://{USER}:{SECRET}@",
    f"redis://{USER}:{SECRET}@localhost:port",
    f"redis://{USER}:{SECRET}@localhost:99999",
    f"redis://{USER}:{SECRET}@localhost/one",
    f"redis://{USER}:{SECRET}@localhost?db=one",
    f"redis://{USER}:{SECRET}/x@localhost",
    f"redis://{USER}:{SECRET}?x@localhost",
    f"redis://{USER}:{SECRET}#x@localhost",
    f"redis://{USER}:12?{SECRET}@localhost",
    f"redis://{USER}:12?{SECRET}=1@localhost",
    f"redis://{USER}:{SECRET}@[localhost",
    f"redis://{USER}:{SECRET}@localhost?retry_on_timeout=true",
    f"redis://{USER}:{SECRET}@localhost?socket_timeout=60",
    f"redis://{USER}:{SECRET}@localhost?ssl_cert_reqs=none",
    f"rediss://{USER}:{SECRET}@localhost?ssl_cert_reqs=maybe",
    f"unix://{USER}:{SECRET}@",
]
of_each_wrong_url = pytest.mark.parametrize("url", WRONG_URLS)


def everything_shown_by(error):
    """All texts of an error and of what led to it; of frames, those of the kit alone."""
    texts = []
    while error is not None:
        shown = traceback.TracebackException.from_exception(error)
        texts += [str(error), repr(error), repr(error.args), repr(vars(error)), *shown.format()]
        error = error.__cause__ or error.__context__
    return "".join(texts)


@of_each_wrong_url
def test_a_wrong_url_in_the_environment_stops_at_once_and_shows_no_user_and_no_password(monkeypatch, url):
    monkeypatch.setenv("RESILIENCE_STORE", url)
    with pytest.raises(ConfigurationError, match=r"^RESILIENCE_STORE: ") as caught:
        ResilienceSettings()
    shown = everything_shown_by(caught.value)
    assert (SECRET in shown, USER in shown) == (False, False)


@of_each_wrong_url
def test_a_wrong_url_in_code_stops_at_once_and_shows_no_user_and_no_password(url):
    with pytest.raises(ConfigurationError, match=r"^RESILIENCE_STORE: ") as caught:
        configure(store=url)
    assert (SECRET in str(caught.value), USER in str(caught.value)) == (False, False)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_another_wrong_value_beside_the_store_does_not_show_it(monkeypatch):
    monkeypatch.setenv("RESILIENCE_STORE", f"redis://{USER}:{SECRET}@localhost")
    monkeypatch.setenv("MAX_RETRIES", "some")
    with pytest.raises(ConfigurationError, match="MAX_RETRIES='some'") as caught:
        ResilienceSettings()
    assert SECRET not in everything_shown_by(caught.value)


def test_settings_do_not_show_the_password(monkeypatch):
    monkeypatch.setenv("RESILIENCE_STORE", f"redis://{USER}:{SECRET}@localhost")
    configure(ResilienceSettings())
    settings = current_settings()
    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()} {vars(settings)}"
    assert (SECRET in shown, USER in shown) == (False, False)
    assert SECRET not in repr(settings.__pydantic_private__)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RESILIENCE_STORE_PREFIX", "a{b}"),
        ("RESILIENCE_STORE_PREFIX", "a b"),
        ("RESILIENCE_STORE_DEADLINE_SECONDS", "0"),
        ("RESILIENCE_STORE_DEADLINE_SECONDS", "inf"),
        ("ON_STORE_FAILURE", "panic"),
    ],
)
def test_a_wrong_setting_of_the_store_is_told_with_its_name_and_value(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=re.escape(f"{variable}={value!r}: expected ")):
        ResilienceSettings()


def test_an_empty_store_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("RESILIENCE_STORE", "")
    assert ResilienceSettings().resilience_store is None


def test_a_store_can_be_configured_alone_and_leaves_the_other_settings(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "5")
    configure(ResilienceSettings(requests_per_minute=7))
    configure(store="valkey://localhost")
    settings = current_settings()
    assert (settings.max_retries, settings.requests_per_minute) == (5, 7)
    assert settings.resilience_store.get_secret_value() == "redis://localhost"
    assert settings.source("resilience_store") == settings.source("requests_per_minute") == "configure()"
    assert settings.source("max_retries") == "environment"


def test_configuring_what_happens_without_the_store_leaves_the_store():
    configure(store="redis://localhost")
    configure(on_store_failure="open")
    assert current_settings().resilience_store.get_secret_value() == "redis://localhost"
    assert current_settings().on_store_failure == "open"


def test_a_store_can_be_configured_beside_settings():
    configure(ResilienceSettings(max_retries=6), store="redis://localhost", on_store_failure="refuse")
    settings = current_settings()
    assert (settings.max_retries, settings.on_store_failure) == (6, "refuse")
    assert settings.resilience_store is not None


def test_configure_refuses_an_unknown_behaviour_without_the_store():
    with pytest.raises(ConfigurationError, match=r"^ON_STORE_FAILURE='panic': expected 'local', 'refuse' or 'open'$"):
        configure(on_store_failure="panic")


def test_configure_refuses_to_do_nothing():
    with pytest.raises(ConfigurationError, match=r"^configure\(\) takes ResilienceSettings"):
        configure()
