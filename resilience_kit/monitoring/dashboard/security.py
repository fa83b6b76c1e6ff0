"""Who may see the dashboard, and what a browser may do with it.

Without a token, only programs on this machine: no request from another address, and none whose Host header is a name
that an attacker's DNS server could make point here. With one, whoever has it: in the header `Authorization: Bearer`, or
in a cookie that the login form sets. A token is never part of a URL, which logs keep.
"""

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response

from resilience_kit.errors import ConfigurationError

COOKIE = "resilience_kit_dashboard"
SESSION_SECONDS = 7 * 86_400
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
FEWEST_CHARACTERS = 16

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Guard:
    """Decides on requests.

    Attributes:
        token: What those who may see the dashboard have; None where being on this machine is enough.
        allowed_hosts: Names that a Host header may have, without a port; "*" is any.
    """

    token: str | None = field(default=None, repr=False)
    allowed_hosts: Collection[str] = LOOPBACK_NAMES

    def __post_init__(self) -> None:
        check_token(self.token)

    def refusal(self, connection: HTTPConnection) -> Response | None:
        """What to answer to a request that must not even see the login form; None where it may."""
        host = _host(connection)
        names = {name.lower() for name in self.allowed_hosts}
        if "*" not in names and host not in names and not _is_address(host):
            return _plain(400, "The Host header names no allowed host. Allow it with allowed_hosts (--allowed-host).")
        if self.token is None and "*" not in names and not _is_local(connection):
            return _plain(403, "Without a token the dashboard serves this machine only. Give it one.")
        return None

    def knows(self, connection: HTTPConnection) -> bool:
        """Whether a request may see the figures."""
        return self.token is None or self.has_bearer(connection) or self._has_session(connection)

    def may_change(self, connection: HTTPConnection) -> bool:
        """Whether a request may press buttons: it has the token, and no other site's page has sent it."""
        if self.token is None:
            return False
        return self.has_bearer(connection) or (self._has_session(connection) and comes_from_own_page(connection))

    def is_token(self, given: str) -> bool:
        """Whether a token is the right one, in a time that tells nothing of it."""
        return self.token is not None and hmac.compare_digest(
            given.encode(errors="surrogatepass"), self.token.encode(errors="surrogatepass")
        )

    def has_bearer(self, connection: HTTPConnection) -> bool:
        """Whether a request's header has the token."""
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self.is_token(given.strip())

    def let_in(self, connection: HTTPConnection, response: Response) -> None:
        """Set the cookie that shows that the token was given; the token is not in it."""
        expires = int(time.time()) + SESSION_SECONDS
        response.set_cookie(
            COOKIE,
            f"{expires}.{self._seal(expires)}",
            max_age=SESSION_SECONDS,
            path=connection.scope.get("root_path") or "/",
            secure=connection.scope.get("scheme") == "https",
            httponly=True,
            samesite="strict",
        )

    def _has_session(self, connection: HTTPConnection) -> bool:
        expires, _, seal = connection.cookies.get(COOKIE, "").partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) < FEWEST_CHARACTERS):
            return False
        return hmac.compare_digest(seal.encode(), self._seal(int(expires)).encode()) and int(expires) > time.time()

    def _seal(self, expires: int) -> str:
        text = f"resilience_kit dashboard session until {expires}"
        return hmac.new((self.token or "").encode(), text.encode(), hashlib.sha256).hexdigest()


def check_token(token: str | None) -> None:
    """Refuse a token that could be guessed.

    Raises:
        ConfigurationError: It is shorter than 16 characters.
    """
    if token is not None and len(token) < FEWEST_CHARACTERS:
        raise ConfigurationError(
            f"the dashboard's token has {len(token)} characters: expected {FEWEST_CHARACTERS} or more, such as "
            "those of `python -c 'import secrets; print(secrets.token_urlsafe())'`"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def comes_from_own_page(connection: HTTPConnection) -> bool:
    """Whether the browser says that a page of this very origin has sent a request."""
    try:
        origin = urlsplit(connection.headers.get("origin", ""))
    except ValueError:
        return False
    return bool(origin.netloc) and origin.netloc.lower() == connection.headers.get("host", "").lower()


def _host(connection: HTTPConnection) -> str:
    host = connection.headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_address(host: str) -> bool:
    # only a name can be made to point elsewhere
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_local(connection: HTTPConnection) -> bool:
    # a Unix socket has no client address
    return connection.client is None or is_loopback(connection.client.host)


def _plain(status: int, text: str) -> Response:
    return Response(text + "\n", status, media_type="text/plain")
