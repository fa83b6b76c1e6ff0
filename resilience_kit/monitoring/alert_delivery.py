"""How alerts reach people: in the log, by a signed webhook, or by any function; never in the way of a sample.

A webhook's address often is a secret in itself, as its key is: neither is shown or logged.
"""

import hashlib
import hmac
import json
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from resilience_kit import events
from resilience_kit.errors import ConfigurationError
from resilience_kit.forking import new_lock
from resilience_kit.monitoring import log_events
from resilience_kit.retrying import retry_on_429
from resilience_kit.validating import is_number

if TYPE_CHECKING:
    import httpx2

    from resilience_kit.monitoring.alerts import Alert

__all__ = ["Webhook", "verify"]

Deliver = Callable[["Alert"], object]

TIMESTAMP_HEADER = "X-Resilience-Timestamp"
SIGNATURE_HEADER = "X-Resilience-Signature"

_log = logging.getLogger(__name__)
_alerts = logging.getLogger("resilience_kit.alerts")
# Alerts that wait for one receiver; of more, the newest say how it is now.
_MOST_WAITING = 1_000
_FEWEST_CHARACTERS = 16
_FEWEST_ERROR = 300
_LONGEST_TIMESTAMP = 12


def log_alert(alert: "Alert") -> None:
    """Write an alert to the logger `resilience_kit.alerts`: at ERROR where it is critical, INFO when it is over."""
    level = logging.WARNING
    if alert.state == "ok":
        level = logging.INFO
    elif alert.severity == "critical":
        level = logging.ERROR
    log_events.write(_alerts, level, f"alert {alert.state}", alert.to_dict())


class Webhook:
    """Sends alerts to a web server, as JSON with a signature that it can check with `verify`.

    A refusal for the rate, a server error and a lost connection are tried again, with the kit's own `@retry_on_429`.

    Args:
        url: Where to send them. It is neither shown nor logged.
        secret: The key of the signature, at least 16 characters that only the two sides know.
        timeout: Most seconds that the server may be silent.
        max_retries: Attempts after the first.
        max_elapsed: Most seconds from the first attempt to the start of the last.

    Raises:
        ConfigurationError: An argument cannot work; what it holds is not told.

    Example:
        >>> from resilience_kit.monitoring.alert_delivery import Webhook
        >>> Webhook("https://hooks.example.com/T0/B1", secret="from-a-vault-not-from-code")
        <Webhook>
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str,
        timeout: float = 10.0,
        max_retries: int = 5,
        max_elapsed: float = 120.0,
    ) -> None:
        self._url = _checked_url(url)
        # as of a variable that is not set
        if not secret or len(secret) < _FEWEST_CHARACTERS:
            raise ConfigurationError(f"Webhook(secret=...): expected a text of {_FEWEST_CHARACTERS} characters or more")
        if not is_number(timeout) or timeout <= 0:
            raise ConfigurationError(f"Webhook(timeout={timeout!r}): expected seconds above 0")
        self._secret = secret
        self._timeout = timeout
        # all is said here: how the program's own calls are retried is another matter
        self._post = retry_on_429(
            retry_transient=True,
            max_retries=max_retries,
            initial_backoff=1.0,
            max_backoff=30.0,
            backoff_multiplier=2.0,
            max_elapsed=max_elapsed,
        )(self._post_once)

    def __call__(self, alert: "Alert") -> None:
        """Send an alert, and wait until the server has it."""
        # the same in each attempt, so that a receiver can tell a repetition from news
        body = json.dumps({"id": secrets.token_hex(16), **alert.to_dict()}).encode()
        # its retries are none of the program's calls
        with events.heard_only_by(_nobody):
            self._post(body)

    def __repr__(self) -> str:
        return "<Webhook>"

    def _post_once(self, body: bytes) -> None:
        import httpx2

        timestamp = str(int(time.time()))
        headers = {
            "content-type": "application/json",
            TIMESTAMP_HEADER: timestamp,
            SIGNATURE_HEADER: sign(body, timestamp=timestamp, secret=self._secret),
        }
        request = httpx2.Request(
            "POST",
            self._url,
            content=body,
            headers=headers,
            extensions={"timeout": httpx2.Timeout(self._timeout).as_dict()},
        )
        # httpx2 2.16's Client logs the address of each request at INFO; a transport does not. Nor does it follow
        # redirects, which would take an alert to who knows where.
        with httpx2.HTTPTransport() as transport:
            response = transport.handle_request(request)
            response.close()
        if response.status_code >= _FEWEST_ERROR:
            raise WebhookRefusedError(response)


class WebhookRefusedError(Exception):
    """A webhook's server did not take an alert.

    Attributes:
        status_code: Its answer.
        response: The answer's headers, which may say when to come back.
    """

    def __init__(self, response: "httpx2.Response") -> None:
        super().__init__(f"the webhook's server answered {response.status_code}")
        self.status_code = response.status_code
        self.response = response


def sign(body: bytes, *, timestamp: str, secret: str) -> str:
    """The signature of a body that is sent at a time: "sha256=" and HMAC-SHA256 of "timestamp.body" in hex."""
    digest = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


def verify(
    body: bytes,
    *,
    timestamp: str | None,
    signature: str | None,
    secret: str,
    tolerance: float = 300.0,
    now: float | None = None,
) -> bool:
    """Tell whether a request is from a `Webhook` with the same secret, and new.

    It takes the same time however much of a signature is right. A request may come more than once, as its answer may
    be lost: the `id` in its body tells.

    Args:
        body: The request's body as it came, before anything parses it.
        timestamp: Its header `X-Resilience-Timestamp`.
        signature: Its header `X-Resilience-Signature`.
        secret: The key that both sides know.
        tolerance: Most seconds between the two clocks, the way of the request included.
        now: Seconds since the epoch. Default: the system's clock.

    Example:
        >>> from resilience_kit.monitoring.alert_delivery import sign, verify
        >>> signature = sign(b"{}", timestamp="1000", secret="from-a-vault-not-from-code")
        >>> secret = "from-a-vault-not-from-code"
        >>> verify(b"{}", timestamp="1000", signature=signature, secret=secret, now=1010)
        True
        >>> verify(b"[]", timestamp="1000", signature=signature, secret=secret, now=1010)
        False
    """
    if timestamp is None or signature is None or not (timestamp.isascii() and timestamp.isdigit()):
        return False
    expected = sign(body, timestamp=timestamp, secret=secret)
    is_signed = hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))
    sent = float(timestamp) if len(timestamp) <= _LONGEST_TIMESTAMP else math.inf
    return is_signed and abs((time.time() if now is None else now) - sent) <= tolerance


class Courier:
    """Calls one function with alerts, in a thread of its own that lives while there are any.

    A receiver that is slow or dead holds up nobody; what it cannot take is told once until it works again.

    Args:
        deliver: Takes an alert.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._waiting: deque[Alert] = deque(maxlen=_MOST_WAITING)
        self._lock = new_lock()
        self._thread: threading.Thread | None = None
        self._is_failing = False

    def send(self, alert: "Alert") -> None:
        """Have an alert delivered, as soon as those before it are."""
        with self._lock:
            if len(self._waiting) == _MOST_WAITING:
                self._tell("%r takes alerts too slowly: the oldest are dropped", self._name)
            self._waiting.append(alert)
            # a thread of before a fork is not alive in the child
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="resilience-kit-alerts", daemon=True)
                self._thread.start()

    def close(self, timeout: float) -> bool:
        """Wait for what is on its way. Returns whether all was handed over."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    @property
    def _name(self) -> str:
        # by its name: the repr() of a partial holds its arguments, and another one may raise
        return getattr(self._deliver, "__qualname__", type(self._deliver).__qualname__)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                alert = self._waiting.popleft()
            try:
                self._deliver(alert)
            except Exception as error:  # noqa: BLE001 - a receiver may raise anything, and is tried again with the next
                # no message: it may hold an address
                reason = f" ({error.status_code})" if isinstance(error, WebhookRefusedError) else ""
                self._tell("an alert did not reach %r: %s%s", self._name, type(error).__name__, reason)
            else:
                self._is_failing = False

    def _tell(self, message: str, *arguments: Any) -> None:
        if not self._is_failing:
            self._is_failing = True
            _log.warning(message, *arguments)


def _checked_url(url: str) -> str:
    import httpx2

    expected = "Webhook(url=...): expected https:// or http:// and a host, without a user and a password in it"
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        is_fine = is_fine and (parts.port is None or parts.port > 0)
        if is_fine:
            # which has an opinion of its own
            httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        is_fine = False
    if not is_fine:
        # from None: the message of what was raised may hold it
        raise ConfigurationError(expected) from None
    return url


def _nobody(event: events.Event) -> None:
    """Hear of an event, and leave it at that."""
