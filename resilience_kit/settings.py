"""Settings from the environment and .env, under the names and defaults of rate-limiting.env."""

import os
import re
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from resilience_kit.errors import ConfigurationError
from resilience_kit.registry import mode
from resilience_kit.store_urls import checked_store_url

__all__ = ["ResilienceSettings", "configure", "current_settings"]

# Above it a float, as of shares and times, does not tell two numbers apart, nor does the store.
_MOST = 2**53
Count = Annotated[int, Field(gt=0, le=_MOST)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

StoreUrl = Annotated[SecretStr, AfterValidator(lambda url: SecretStr(checked_store_url(url.get_secret_value())))]

# What becomes of calls while the store of a fleet is lost.
OnStoreFailure = Literal["local", "refuse", "open"]

_ENV_FILE = ".env"
_AGENTS = "_MAX_TOKENS"
_TOKENS: TypeAdapter[int] = TypeAdapter(Count)
# Where a new word starts in a camel-case name: mathAgent, ADXAgent.
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class ResilienceSettings(BaseSettings):
    """All that can be set from outside; the environment wins over .env, and arguments of a decorator over both.

    An agent's own maximum, as WRITER_MAX_TOKENS for "Writer", is read from the environment and .env alone.

    Raises:
        ConfigurationError: A value is not what was expected; the message names the variable and the value.

    Example:
        >>> from resilience_kit import ResilienceSettings, configure
        >>> configure(ResilienceSettings(requests_per_minute=600, tokens_per_minute=1_000_000))
    """

    model_config = SettingsConfigDict(env_file=_ENV_FILE, env_ignore_empty=True, extra="ignore", frozen=True)

    max_concurrent_requests: Count = 3
    """Calls under way at once."""
    min_request_interval_ms: Seconds = 100
    """Milliseconds between the starts of two calls."""
    requests_per_minute: Count = 60
    """Calls in any minute."""
    tokens_per_minute: Count = 150_000
    """Tokens in any minute, of prompts and of the most that answers may have."""
    max_retries: Annotated[int, Field(ge=0, le=_MOST)] = 3
    """Attempts after the first."""
    initial_backoff_seconds: Seconds = 1.0
    """Seconds before the first retry, where the server names none."""
    max_backoff_seconds: Seconds = 30.0
    """The most seconds before a retry, where the server names none."""
    backoff_multiplier: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """How many times as long the wait before each further retry is."""
    circuit_breaker_failure_threshold: Count = 5
    """Failures in a row that open a circuit."""
    circuit_breaker_recovery_timeout: Seconds = 60.0
    """Seconds that a circuit stays open before a trial."""
    circuit_breaker_success_threshold: Count = 3
    """Trials that must succeed to close a circuit."""
    math_agent_max_tokens: Count = 4_000
    """The longest prompt of the agent "MathAgent" or "math_agent", in tokens."""
    adx_agent_max_tokens: Count = 8_000
    """The longest prompt of the agent "ADXAgent" or "adx_agent", in tokens."""
    coordinator_agent_max_tokens: Count = 10_000
    """The longest prompt of the agent "CoordinatorAgent" or "coordinator_agent", in tokens."""
    resilience_store: StoreUrl | None = None
    """The Valkey or Redis server whose users share limits, circuits and budgets; none: each process has its own."""
    resilience_store_prefix: Annotated[str, Field(pattern=r"^[^\s{}]+$")] = "resilience"
    """What all keys in the store begin with: who has another prefix shares nothing."""
    resilience_store_deadline_seconds: Annotated[float, Field(gt=0, le=3_600, allow_inf_nan=False)] = 0.25
    """Seconds that a call to the store may take."""
    on_store_failure: OnStoreFailure = "local"
    """While the store is gone: keep to a share of each limit, refuse all calls, or use each limit as if alone."""

    _given: frozenset[str] = PrivateAttr(frozenset())
    _variables: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        unknown = values.keys() - type(self).model_fields.keys()
        if unknown:
            raise ConfigurationError(
                f"unknown settings {', '.join(sorted(unknown))}: known are {', '.join(type(self).model_fields)}"
            )
        problems = None
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(_explained(it, str(it["loc"][0]).upper()) for it in error.errors())
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{_ENV_FILE} is not UTF-8 text: {error}") from error
        if problems:
            # pydantic's error holds all values, the store's password too: it must not be this one's cause or context
            raise ConfigurationError(problems)
        self._given = frozenset(values)
        self._variables = {
            name.upper(): value
            for source in (dotenv_values(_ENV_FILE), os.environ)
            for name, value in source.items()
            if value and name.upper().endswith(_AGENTS)
        }

    def source(self, name: str) -> str:
        """Where a setting came from: "configure()", "environment" (or .env) or "default".

        Args:
            name: The setting's name, such as "max_retries".
        """
        if name in self._given:
            return "configure()"
        return "environment" if name in self.model_fields_set else "default"

    def changed(self, changes: dict[str, Any]) -> "ResilienceSettings":
        """These settings with some of them changed, as by configure().

        Args:
            changes: Values by the settings' names.

        Raises:
            ConfigurationError: There is no such setting, or a value is not what was expected.
        """
        if not changes:
            return self
        checked = type(self)(**changes)
        changed = self.model_copy(update={name: getattr(checked, name) for name in changes})
        changed._given = self._given | changes.keys()  # noqa: SLF001 - its own class
        return changed

    def agent_max_tokens(self, agent: str) -> tuple[int | None, str]:
        """The longest prompt that an agent may send, in tokens, and where the figure came from.

        "MathAgent" and "math_agent" both read MATH_AGENT_MAX_TOKENS, and any other agent its own name likewise.

        Args:
            agent: The agent's name.

        Raises:
            ConfigurationError: The agent's variable is not a number above 0.
        """
        variable = agent_variable(agent)
        if variable.lower() in type(self).model_fields:
            return getattr(self, variable.lower()), self.source(variable.lower())
        text = self._variables.get(variable)
        if text is None:
            return None, "default"
        try:
            return _TOKENS.validate_python(text), "environment"
        except ValidationError as error:
            raise ConfigurationError(_explained(error.errors()[0], variable)) from error


def agent_variable(agent: str) -> str:
    """The name of the variable that holds an agent's maximum."""
    words = re.sub(r"[\W_]+", "_", _WORD_START.sub("_", agent)).strip("_")
    return f"{words.upper()}{_AGENTS}"


def _explained(detail: Any, variable: str) -> str:
    """One of pydantic's errors with the variable's name, the value and what was expected."""
    if variable == "RESILIENCE_STORE":
        return f"{variable}: {detail['msg'].removeprefix('Value error, ')}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{variable}={detail['input']!r}: expected {expected}"


def current_settings() -> ResilienceSettings:
    """The settings in force, read from the environment and .env when they are first needed."""
    if mode.settings is None:
        mode.settings = ResilienceSettings()
    return mode.settings


def configure(
    settings: ResilienceSettings | None = None, *, store: str | None = None, on_store_failure: str | None = None
) -> None:
    """Use these settings from now on; a limit that was used before keeps what it was built with.

    Args:
        settings: Where it is silent, the environment, .env and the defaults still count; left out, those in force stay.
        store: The URL of the Valkey or Redis server that a fleet shares, such as `rediss://:password@host:6379/0`.
        on_store_failure: What happens while it is gone: "local" (each process keeps to its share), "refuse" or "open".

    Raises:
        ConfigurationError: `settings` is something else, or a value is not what was expected. A URL is never shown.

    Example:
        >>> from resilience_kit import ResilienceSettings, configure
        >>> configure(ResilienceSettings(max_retries=5), on_store_failure="refuse")
    """
    changes = {
        name: value
        for name, value in {"resilience_store": store, "on_store_failure": on_store_failure}.items()
        if value is not None
    }
    given: Any = current_settings() if settings is None and changes else settings
    if not isinstance(given, ResilienceSettings):
        raise ConfigurationError(f"configure() takes ResilienceSettings(...), not {settings!r}")
    mode.settings = given.changed(changes)
