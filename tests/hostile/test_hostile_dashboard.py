"""Whatever a dashboard is asked: it answers, shows nothing to strangers, and goes on serving the others."""

import asyncio
import json
import socket
from urllib.parse import quote_from_bytes, urlsplit

import pytest
from hostile_values import NAMES, TEXTS, VALUES, examples, growth, is_harmless
from hypothesis import given, strategies as st

from resilience_kit import rate_limited
from resilience_kit.monitoring.dashboard import create_app, running
from resilience_kit.testing import isolated

TOKEN = "a-token-that-nobody-guesses"  # noqa: S105 - the tests' own
ORIGIN = (b"origin", b"http://localhost")
BEARER = (b"authorization", f"Bearer {TOKEN}".encode())
COOKIE = b"resilience_kit_dashboard="
HOSTS = [
    "localhost",
    "LOCALHOST:1",
    "localhost:\xb2",
    "[::1",
    "127.0.0.1]",
    "evil.example",
    "",
    ":",
    "[",
    "::",
    "1.2.3.4:x",
]
BYTES = st.binary(max_size=20) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [b"host", b"origin", b"cookie", b"authorization", b"content-length", b"content-type", b"x-forwarded-for"]
        ),
        BYTES
        | st.sampled_from(
            [ORIGIN[1], BEARER[1], b"http://[", b"http://", b"null", b"Bearer", b"bearer \xff", b"chunked", b"-1"]
        )
        | st.sampled_from(HOSTS).map(lambda host: host.encode("latin-1"))
        | BYTES.map(COOKIE.__add__)
        | st.sampled_from([b"9" * 20, b"\xb2.1", b'"\\777"', b"99999999999.", b"-1.x"]).map(COOKIE.__add__),
    ),
    max_size=5,
)
PATHS = st.sampled_from(
    ["/", "/login", "/login/", "/events", "/api/now", "/api/history", "/api/pause", "/api/reset-circuit"]
)
QUERIES = BYTES | st.tuples(st.sampled_from([b"range=", b"process="]), BYTES).map(b"".join).map(quote_from_bytes).map(
    str.encode
)
BODIES = st.one_of(
    BYTES,
    VALUES.map(lambda value: json.dumps({"token": value, "name": value}, default=repr, skipkeys=True).encode()),
    st.sampled_from(
        [b"[" * 4_000, b'{"name":' * 500, b'{"token":"\\ud800"}', b"9" * 4_000, b"x" * 5_000, b'{"token":NaN}']
    ),
)
METHODS = st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS", "TRACE", "get", "\udc80"])


def answer_of(app, method, path, *, query=b"", headers=(), body=b""):
    """What an application answers: status, headers and body; the browser leaves as soon as it has sent all."""
    parts = [{"type": "http.request", "body": body[:2_000], "more_body": True}]
    parts.append({"type": "http.request", "body": body[2_000:], "more_body": False})
    sent = []

    async def receive():
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    return start["status"], start["headers"], b"".join(part.get("body", b"") for part in rest)


@given(METHODS, PATHS | TEXTS.map("/".__add__), QUERIES, HEADERS, BODIES)
@examples(100)
def test_a_request_of_any_kind_is_answered_and_shows_a_stranger_nothing(method, path, query, headers, body):
    with isolated():
        app = create_app(token=TOKEN, controls=True)

        status, told, content = answer_of(app, method, path, query=query, headers=headers, body=body)

    assert 200 <= status < 500
    assert (b"x-content-type-options", b"nosniff") in told
    assert not any(b"\n" in value or b"\r" in value for _, value in told)
    assert b"footer" not in content or b"<!doctype" in content or BEARER[1] in dict(headers).values()


@given(METHODS, PATHS, QUERIES, HEADERS, BODIES)
@examples(100)
def test_a_request_of_any_kind_by_who_has_the_token_is_answered(method, path, query, headers, body):
    kept = [(name, value) for name, value in headers if name not in (b"host", b"authorization")]
    with isolated():
        app = create_app(token=TOKEN, controls=True)

        status, _, _ = answer_of(
            app, method, path, query=query, headers=[(b"host", b"localhost"), BEARER, *kept], body=body
        )

    assert 200 <= status < 500


@given(st.sampled_from(HOSTS).map(lambda host: host.encode("latin-1")) | BYTES, PATHS, BYTES)
@examples(60)
def test_whoever_is_asked_for_nobody_is_sent_elsewhere(host, path, query):
    with isolated():
        status, told, _ = answer_of(create_app(), "GET", f"{path}/", query=query, headers=[(b"host", host)])

    assert status in (200, 400, 404)
    assert b"location" not in dict(told)


@given(BYTES, HEADERS)
@examples(30)
def test_the_right_token_lets_in_whatever_else_is_in_the_request(query, headers):
    kept = [(name, value) for name, value in headers if name not in (b"host", b"origin", b"authorization")]
    own = [(b"host", b"localhost"), ORIGIN, *kept]
    with isolated():
        app = create_app(token=TOKEN)

        status, _, _ = answer_of(
            app, "POST", "/login", query=query, headers=own, body=json.dumps({"token": TOKEN}).encode()
        )

    assert status == 204


@pytest.mark.parametrize("origin", [b"http://[", b"http://[::1", b"http://\xff", b"//", b"http://localhost:\xb2"])
def test_an_origin_that_is_no_url_is_no_own_page(origin):
    headers = [(b"host", b"localhost"), (b"origin", origin)]

    status, _, _ = answer_of(create_app(token=TOKEN), "POST", "/login", headers=headers, body=b"{}")

    assert status == 403


@pytest.mark.parametrize(
    "body", [b'{"token":"\\ud800"}', b"[" * 4_000, b'{"token":' + b"[" * 2_000, b"\xff", b"9" * 4_000]
)
def test_what_cannot_be_a_token_is_not_the_token(body):
    headers = [(b"host", b"localhost"), ORIGIN]

    status, _, _ = answer_of(create_app(token=TOKEN), "POST", "/login", headers=headers, body=body)

    assert status == 401


@given(NAMES, TEXTS)
@examples(60)
def test_names_of_any_kind_are_told_without_what_obeys(name, asked):
    with isolated():
        rate_limited(name, tokens=0)(lambda: "four")()
        app = create_app(token=TOKEN, controls=True)
        headers = [(b"host", b"localhost"), BEARER]

        for path, method in (
            ("/api/now", "GET"),
            ("/events", "GET"),
            ("/api/pause", "POST"),
            ("/api/reset-circuit", "POST"),
        ):
            status, _, content = answer_of(
                app, method, path, headers=headers, body=json.dumps({"name": asked}).encode()
            )
            assert status < 500
            # the only line breaks are those that end a frame
            assert is_harmless(content.decode().replace("\n", ""))


@pytest.mark.parametrize("what", ["headers", "query", "cookie", "body", "path"])
def test_large_requests_take_time_in_proportion(what):
    app = create_app(token=TOKEN, controls=True)

    def make(size):
        value = b"a=b;" * (size // 4)
        headers = [(b"host", b"localhost"), ORIGIN]
        if what == "headers":
            headers += [(b"x-a", b"b")] * (size // 8)
        if what == "cookie":
            headers.append((b"cookie", value))
        query = value.replace(b";", b"&") if what == "query" else b""
        path = "/page/" + "a" * size if what == "path" else "/login"
        return {"path": path, "query": query, "headers": headers, "body": value if what == "body" else b""}

    assert growth(lambda request: answer_of(app, "POST", **request), make, 25_000) < 10


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\nContent-Length: 2\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /%00%ff%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 1_000,
        b"\0" * 1_000,
    ],
)
def test_a_server_that_gets_garbage_goes_on_serving_others(raw, caplog):
    with running(create_app(token=TOKEN), port=0) as url:
        place = urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=20) as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            said = _all_of(client)
        with socket.create_connection((place.hostname, place.port), timeout=20) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert _all_of(client).startswith(b"HTTP/1.1 401")

    assert not said or said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    assert all(is_harmless(record.getMessage()) for record in caplog.records)
    assert "Traceback" not in caplog.text


def _all_of(client):
    parts = []
    try:
        while part := client.recv(65_536):
            parts.append(part)
    except ConnectionError:
        # it may hang up on garbage while that is still on its way
        pass
    return b"".join(parts)
