"""The checks of `resilience-kit doctor` that reach out: to the model's endpoint, and to the store of the fleet.

An endpoint is sent nothing but a TLS handshake: no key, and no request that costs.
"""

import functools
import os
import socket
import ssl
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

from resilience_kit.errors import ConfigurationError, StoreContentError, StoreUnavailableError
from resilience_kit.fleet.connection import Connection, Script
from resilience_kit.monitoring.findings import Check, Finding
from resilience_kit.settings import current_settings

ENDPOINTS = ("AZURE_OPENAI_ENDPOINT", "OPENAI_BASE_URL")
_PORTS = {"http": 80, "https": 443}
_NEAR = frozenset({"localhost", "127.0.0.1", "::1"})

# Seconds for a connection to a server that a call would give up on sooner: slow is another finding than gone.
_PATIENCE = 3.0
_PINGS = 5
# More than this is not what a clock drifts by in a day, and shifts what the dashboard shows of one process.
_MOST_SKEW = 2.0
# What scripts of the kit do all the time: ask for the time, and keep something for a while. Servers before Redis 5
# refuse the two together.
_WRITE = Script("doctor", 'return redis.call("SET", KEYS[1], redis.call("TIME")[1], "PX", 1000)')


def endpoint_checks() -> tuple[Check, ...]:
    """A check for each endpoint that is set, or one that says that none is."""
    variables = [variable for variable in ENDPOINTS if os.environ.get(variable)]
    if not variables:
        return (check_no_endpoint,)
    return tuple(functools.partial(check_endpoint, variable) for variable in variables)


def store_checks() -> tuple[Check, ...]:
    """The checks of the store where one is set; all but the first need that it is reachable."""
    if current_settings().resilience_store is None:
        return (check_no_store,)
    return (check_store, check_store_scripts, check_store_clock, check_store_eviction, check_store_persistence)


# The endpoint


def check_no_endpoint() -> Finding:
    """Nothing to reach."""
    return Finding("endpoint", "ok", f"neither {' nor '.join(ENDPOINTS)} is set: nothing to reach")


def check_endpoint(variable: str) -> Finding:
    """Whether the endpoint in a variable takes a connection."""
    url = _parsed(os.environ[variable])
    if url is None:
        return Finding(
            "endpoint",
            "failed",
            f"{variable} is not a URL with http or https, a host and perhaps a port",
            "Write it as https://name.openai.azure.com.",
        )
    proxy = _proxy_for(url)
    place = f"{variable}, {url.hostname}:{url.port or _PORTS[url.scheme]}"
    if proxy:
        place += f" through the proxy {proxy[0]}:{proxy[1]}"
    try:
        seconds = _seconds_to_connect(url, proxy)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"the certificate does not hold: {error.verify_message}"
        return Finding("endpoint", "failed", f"{place}: {reason}", _advice_on(error))
    if variable == "AZURE_OPENAI_ENDPOINT" and "/openai" in url.path:
        return Finding(
            "endpoint",
            "warning",
            f"{place} is reachable, and its URL has a path with /openai, which clients add themselves",
            "Write the URL without a path.",
        )
    if url.scheme == "http" and url.hostname not in _NEAR:
        return Finding(
            "endpoint", "warning", f"{place} is reachable without TLS: keys are sent to be read", "Write https://."
        )
    limits = ", and nothing behind it was asked" if proxy else ""
    return Finding("endpoint", "ok", f"{place}: connected in {seconds * 1_000:.0f} ms{limits}")


def _parsed(text: str) -> SplitResult | None:
    """The URL, if clients can use it; a port that is no number is found only when it is read."""
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        return None
    return url if url.scheme in _PORTS and url.hostname else None


def _proxy_for(url: SplitResult) -> tuple[str, int] | None:
    """The proxy that clients use for a URL, by HTTPS_PROXY and its kin."""
    proxy = _parsed(urllib.request.getproxies().get(url.scheme, ""))
    if proxy is None or not proxy.hostname or urllib.request.proxy_bypass(url.hostname or ""):
        return None
    return proxy.hostname, proxy.port or _PORTS[proxy.scheme]


def _seconds_to_connect(url: SplitResult, proxy: tuple[str, int] | None) -> float:
    """Open a connection to a server or its proxy, with TLS where it is the server's, and close it."""
    host = url.hostname or ""
    began = time.monotonic()
    with socket.create_connection(proxy or (host, url.port or _PORTS[url.scheme]), timeout=_PATIENCE) as connected:
        if url.scheme == "https" and proxy is None:
            with ssl.create_default_context().wrap_socket(connected, server_hostname=host):
                pass
        return time.monotonic() - began


def _advice_on(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "Compare the host's name with the resource's; without DNS no name is found."
    if isinstance(error, ssl.SSLCertVerificationError):
        return "Where a company's proxy opens TLS, name its certificate in SSL_CERT_FILE."
    if isinstance(error, ssl.SSLError):
        return "Something there does not speak TLS: compare the scheme and the port."
    return "See whether the service is up and a firewall lets this machine out; behind a proxy, set HTTPS_PROXY."


# The store


def check_no_store() -> Finding:
    """Nothing to reach."""
    return Finding("store", "ok", "RESILIENCE_STORE is not set: nothing to reach")


def check_store() -> Finding:
    """Whether the store answers, as what, and how fast."""
    settings = current_settings()
    try:
        with _store() as (connection, ask):
            about = ask("INFO", "server")
            seconds = [_timed(ask, "PING") for _ in range(_PINGS)]
            place = connection.place
    except ConfigurationError as error:
        return Finding("store", "failed", str(error), "Install the extra where the program runs.")
    except StoreUnavailableError as error:
        return Finding(
            "store",
            "failed",
            str(error),
            "See whether the server is up, and compare RESILIENCE_STORE: host, port, user, password, TLS.",
        )
    version = str(about.get("valkey_version") or about.get("redis_version") or "")
    kind = "Valkey" if about.get("valkey_version") else "Redis"
    median, deadline = statistics.median(seconds), settings.resilience_store_deadline_seconds
    found = f"{place}: {kind} {version or 'of unknown version'}, answers in {median * 1_000:.2g} ms"
    if max(seconds) > deadline / 2:
        return Finding(
            "store",
            "warning",
            f"{found}, at worst {max(seconds) * 1_000:.2g} ms: near the {deadline:g} s that a call waits for it",
            "Set RESILIENCE_STORE_DEADLINE_SECONDS higher, or use a store that is nearer.",
        )
    return Finding("store", "ok", found)


def check_store_scripts() -> Finding:
    """Whether the store runs scripts that write, as all of the kit do."""
    try:
        with _store() as (connection, _):
            connection.run_blocking(_WRITE, [connection.key("doctor")])
    except (StoreUnavailableError, StoreContentError) as error:
        return Finding(
            "store scripts",
            "failed",
            str(error),
            "The user of RESILIENCE_STORE needs EVAL, EVALSHA, PUBLISH, SUBSCRIBE and to write keys with the prefix, "
            "on a primary of Redis 5 or newer, or any Valkey, that has memory left.",
        )
    return Finding("store scripts", "ok", "scripts run, and may write")


def check_store_clock() -> Finding:
    """Whether the server's clock and this machine's agree."""
    with _store() as (_, ask):
        before = time.time()
        seconds, micros = ask("TIME")
        after = time.time()
    skew = int(seconds) + int(micros) / 1e6 - (before + after) / 2
    found = f"the server's clock is {abs(skew):.2g} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) <= _MOST_SKEW + (after - before) / 2:
        return Finding("store clock", "ok", found)
    return Finding(
        "store clock",
        "warning",
        f"{found}: limits hold by the server's, and what the fleet's processes report is out of step",
        "Have both synchronise their clocks (NTP).",
    )


def check_store_eviction() -> Finding:
    """Whether the server may throw away keys of the kit when its memory is full."""
    with _store() as (_, ask):
        about = ask("INFO", "memory")
    policy, most = about.get("maxmemory_policy", "unknown"), int(about.get("maxmemory", 0))
    if not most or policy == "noeviction":
        return Finding("store eviction", "ok", f"nothing is evicted (maxmemory={most}, maxmemory-policy={policy})")
    return Finding(
        "store eviction",
        "warning",
        f"maxmemory-policy={policy} may evict what was counted: more than the quota would be sent then",
        "Set maxmemory-policy noeviction, or give the kit a server of its own.",
    )


def check_store_persistence() -> Finding:
    """Whether the server keeps what it holds over a restart."""
    with _store() as (_, ask):
        about = ask("INFO", "persistence")
    if about.get("rdb_last_bgsave_status", "ok") != "ok":
        return Finding(
            "store persistence",
            "warning",
            "the server's last snapshot failed; by its default it then refuses all writes",
            "See its log: the disk is full or may not be written.",
        )
    if about.get("aof_enabled", "0") == "1":
        return Finding("store persistence", "ok", "each write is kept (append-only file)")
    # without it, whether there are snapshots is a matter of its configuration, which few may read
    return Finding(
        "store persistence",
        "ok",
        "no append-only file: a restart may lose what budgets of a day have used; limits and circuits mend themselves",
    )


@contextmanager
def _store() -> Iterator[tuple[Connection, Callable[..., Any]]]:
    """A connection to the store, and how to ask it for what is not a script; all is closed at the end."""
    settings = current_settings()
    url = settings.resilience_store
    if url is None:
        raise ConfigurationError("RESILIENCE_STORE is not set")
    connection = Connection(url.get_secret_value(), prefix=settings.resilience_store_prefix, deadline=_PATIENCE)
    wire = connection.listener()
    failure: Exception | None = None

    def ask(*words: str) -> Any:
        wire.send_command(*words)
        reply = wire.read_response()
        return _fields(reply) if words[0] == "INFO" else reply

    try:
        yield connection, ask
    except (ConfigurationError, StoreUnavailableError, StoreContentError):
        raise
    except Exception as error:
        failure = connection.failure(error)
        if failure is None:
            raise
    finally:
        wire.disconnect()
        connection.close()
    # out here, so that redis-py's error, which may hold the password, is not even its context
    if failure is not None:
        raise failure


def _timed(ask: Callable[..., Any], *words: str) -> float:
    began = time.monotonic()
    ask(*words)
    return time.monotonic() - began


def _fields(reply: Any) -> dict[str, str]:
    """The lines of INFO as a dict."""
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    pairs = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {name: value.strip() for name, _, value in pairs if value}
