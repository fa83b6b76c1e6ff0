"""Where the store is: the URL of a Valkey or Redis server, checked without ever being shown."""

from urllib.parse import parse_qsl, unquote, urlsplit

from resilience_kit.errors import ConfigurationError

_SCHEMES = {"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss", "unix": "unix"}
# redis-py takes any argument of its connections from a URL, those included that would let it send a script twice.
_OPTIONS = frozenset(
    {
        "client_name",
        "db",
        "password",
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "username",
    }
)
_CERTIFICATES = frozenset({"none", "optional", "required"})
_EXPECTED = (
    "expected redis://[[user]:password@]host[:port][/database], rediss://... for TLS, or unix://[[user]:password@]/path"
)


def checked_store_url(url: str) -> str:
    """The URL as redis-py takes it; valkey:// and valkeys:// are other words for redis:// and rediss://.

    Raises:
        ConfigurationError: It has a wrong scheme or shape. No part of it is shown: any may be of a password.
    """
    problem = _problem(url)
    if problem is not None:
        raise ConfigurationError(f"{problem}; the value is not shown, as it may hold a password")
    scheme, _, rest = url.partition("://")
    return f"{_SCHEMES[scheme.lower()]}://{rest}"


def secrets_of(url: str) -> frozenset[str]:
    """The user's name and password in a URL, as they are written there and as they are sent."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    written = (parts.username, parts.password, options.get("username"), options.get("password"))
    return frozenset(it for text in written if text for it in (text, unquote(text)))


def place_of(url: str) -> str:
    """The server of a URL, without user and password: its host and port, or its path."""
    parts = urlsplit(url)
    place = unquote(parts.path) if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
    return place if place.isprintable() else repr(place)


def _problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        scheme = _SCHEMES.get(parts.scheme) if "://" in url else None
        place = parts.path if scheme == "unix" else parts.hostname
        _ = parts.port  # which is read, and may not be a number, only now
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        # its text would quote a part of the URL
        return _EXPECTED
    database = options.get("db", parts.path.strip("/") if scheme != "unix" else "")
    if scheme is None or not place or parts.fragment or (database and not database.isdecimal()):
        return f"{_EXPECTED} (in a password, write %23 for #, %2F for /, %3F for ? and %40 for @)"
    if not options.keys() <= _OPTIONS:
        return f"unknown options after the ?: known are {', '.join(sorted(_OPTIONS))}"
    if options.get("ssl_cert_reqs", "none") not in _CERTIFICATES:
        return f"ssl_cert_reqs: expected one of {', '.join(sorted(_CERTIFICATES))}"
    if scheme != "rediss" and any(name.startswith("ssl_") for name in options):
        return "options of TLS need rediss://"
    return None
