"""The checks of `resilience-kit doctor` that look at the settings: each variable, and what contradicts what."""

import difflib
import math
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import SecretStr

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.findings import Check, Finding
from resilience_kit.settings import ResilienceSettings, current_settings
from resilience_kit.store_urls import place_of

_ENV_FILE = ".env"
_AGENTS = "_MAX_TOKENS"
# How like a known variable's name another one must be to count as a slip of the pen.
_ALIKE = 0.88
# Hardly a model's answer takes less, in seconds.
_QUICK_ANSWER = 1.0
# The least that a call with an estimate counts: a token of prompt, and 16 for an answer without max_tokens.
_SMALLEST_CALL = 17
_LOOPBACK = ("127.", "localhost", "::1")


def settings_checks() -> tuple[Check, ...]:
    """The checks of settings that can be read, as `check_settings` has found."""
    return (
        check_misspelled_variables,
        check_agent_variables,
        check_request_rate,
        check_concurrency,
        check_tokens_per_request,
        check_backoff,
        check_store_settings,
    )


def check_settings() -> Finding:
    """Whether all variables can be read, and where each value came from."""
    try:
        settings = current_settings()
    except ConfigurationError as error:
        return Finding("settings", "failed", str(error), "Correct the variable, in the environment or in .env.")
    details = tuple(
        f"{name.upper()} = {_shown(getattr(settings, name))} ({source_of(settings, name)})"
        for name in type(settings).model_fields
    )
    count = sum(source_of(settings, name) != "default" for name in type(settings).model_fields)
    has_file = "" if os.path.exists(_ENV_FILE) else f", and no {_ENV_FILE} in this folder"  # noqa: PTH110 - a folder too
    return Finding("settings", "ok", f"{count} of {len(details)} set, the rest are defaults{has_file}", details=details)


def check_misspelled_variables() -> Finding:
    """Whether a variable looks like one of the kit's and is not."""
    known = {name.upper() for name in ResilienceSettings.model_fields}
    slips = []
    for name in sorted({name.upper() for name in (*os.environ, *dotenv_values(_ENV_FILE))} - known):
        alike = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
        # any agent may have a variable
        if alike and not name.endswith(_AGENTS):
            slips.append(f"{name} is not read: did you mean {alike[0]}?")
    if not slips:
        return Finding("misspelled variables", "ok", "none")
    return Finding("misspelled variables", "warning", " ".join(slips), "Rename or remove them.")


def check_agent_variables() -> Finding:
    """Whether the variables of agents can be read, and the prompts that they allow fit into the quota."""
    settings = current_settings()
    names = {name.upper() for name in (*dotenv_values(_ENV_FILE), *os.environ)}
    names |= {name.upper() for name in type(settings).model_fields}
    details, wrong, too_long = [], [], []
    for variable in sorted(name for name in names if name.endswith(_AGENTS) and name != _AGENTS):
        agent = variable.removesuffix(_AGENTS)
        try:
            tokens, _ = settings.agent_max_tokens(agent)
        except ConfigurationError as error:
            wrong.append(str(error))
            continue
        if tokens is not None:
            details.append(f"{variable} = {tokens}")
            if tokens > settings.tokens_per_minute:
                too_long.append(variable)
    if wrong:
        return Finding(
            # another program's variable may end in the same word
            "agent variables",
            "warning",
            "; ".join(wrong),
            "Correct it: if there is such an agent, its first call raises.",
            (*details,),
        )
    if too_long:
        return Finding(
            "agent variables",
            "warning",
            f"{', '.join(too_long)} above TOKENS_PER_MINUTE={settings.tokens_per_minute}: such a prompt never fits",
            f"Set at most {settings.tokens_per_minute}, less what the answer may take.",
            (*details,),
        )
    return Finding("agent variables", "ok", f"{len(details)} agents have a longest prompt", details=(*details,))


def check_request_rate() -> Finding:
    """Whether the distance between calls leaves the requests per minute within reach."""
    settings = current_settings()
    interval, requests = settings.min_request_interval_ms, settings.requests_per_minute
    reachable = math.inf if interval == 0 else 60_000 / interval
    if reachable >= requests:
        return Finding("request rate", "ok", f"{requests} requests per minute are within reach")
    return Finding(
        "request rate",
        "warning",
        f"MIN_REQUEST_INTERVAL_MS={interval:g} lets {reachable:.0f} calls start in a minute: "
        f"REQUESTS_PER_MINUTE={requests} is out of reach",
        f"Set MIN_REQUEST_INTERVAL_MS={math.floor(60_000 / requests)} or less.",
    )


def check_concurrency() -> Finding:
    """Whether so many calls at once can use the requests per minute."""
    settings = current_settings()
    at_once, requests = settings.max_concurrent_requests, settings.requests_per_minute
    seconds = at_once * 60 / requests
    if seconds >= _QUICK_ANSWER:
        return Finding(
            "concurrency", "ok", f"{at_once} at once use all requests if answers take {seconds:.3g} s or less"
        )
    return Finding(
        "concurrency",
        "warning",
        f"MAX_CONCURRENT_REQUESTS={at_once} uses REQUESTS_PER_MINUTE={requests} only if answers take {seconds:.2g} s",
        f"Set {math.ceil(requests / 60 * 2)} for answers of 2 s; `resilience-kit plan` tells what yours need.",
    )


def check_tokens_per_request() -> Finding:
    """Whether the tokens per minute are enough for so many requests."""
    settings = current_settings()
    tokens, requests = settings.tokens_per_minute, settings.requests_per_minute
    if tokens >= requests * _SMALLEST_CALL:
        return Finding("tokens per request", "ok", f"{tokens / requests:.0f} tokens for each request of a full minute")
    return Finding(
        "tokens per request",
        "warning",
        f"TOKENS_PER_MINUTE={tokens} leaves {tokens / requests:.2g} tokens for each of REQUESTS_PER_MINUTE={requests}",
        "Compare both with the quota of the deployment: one may have been taken for the other.",
    )


def check_backoff() -> Finding:
    """Whether the waits between attempts can grow."""
    settings = current_settings()
    first, most = settings.initial_backoff_seconds, settings.max_backoff_seconds
    if first <= most:
        return Finding("backoff", "ok", f"from {first:g} s to {most:g} s, over {settings.max_retries} retries")
    return Finding(
        "backoff",
        "warning",
        f"INITIAL_BACKOFF_SECONDS={first:g} is above MAX_BACKOFF_SECONDS={most:g}: no wait is longer than the latter",
        "Exchange the two.",
    )


def check_store_settings() -> Finding:
    """Whether the settings of the store are of use together."""
    settings = current_settings()
    url = settings.resilience_store
    if url is None:
        idle = [name.upper() for name in _store_names() if source_of(settings, name) != "default"]
        if idle:
            return Finding(
                "store settings",
                "warning",
                f"{', '.join(idle)} without RESILIENCE_STORE: each process has limits of its own",
                "Set RESILIENCE_STORE, or remove the others.",
            )
        return Finding("store settings", "ok", "no store: each process has limits of its own")
    parts = urlsplit(url.get_secret_value())
    is_near = parts.scheme == "unix" or (parts.hostname or "").startswith(_LOOPBACK)
    if parts.scheme == "redis" and not is_near:
        return Finding(
            "store settings",
            "warning",
            f"the connection to {place_of(url.get_secret_value())} is not encrypted, its password included",
            "Write rediss:// where the server speaks TLS.",
        )
    return Finding(
        "store settings", "ok", f"{place_of(url.get_secret_value())}, {settings.on_store_failure} without it"
    )


def source_of(settings: ResilienceSettings, name: str) -> str:
    """Where a setting came from, the file told from the environment."""
    source = settings.source(name)
    if source != "environment":
        return source
    return source if any(it.upper() == name.upper() and value for it, value in os.environ.items()) else _ENV_FILE


def _store_names() -> Iterator[str]:
    return (name for name in ResilienceSettings.model_fields if "store" in name and name != "resilience_store")


def _shown(value: object) -> str:
    """A value to read: of a URL, the place alone."""
    if isinstance(value, SecretStr):
        return place_of(value.get_secret_value())
    return "none" if value is None else str(value)
