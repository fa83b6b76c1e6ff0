"""Who may see the dashboard, and what a browser may do with it: real requests to the real application."""

import json
import socket

import httpx2
import pytest

from resilience_kit import circuit_protected, get_all_resilience_stats, rate_limited
from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.dashboard import create_app, security
from resilience_kit.monitoring.dashboard.app import application_of
from resilience_kit.monitoring.dashboard.figures import Figures
from resilience_kit.monitoring.dashboard.security import HEADERS, Guard, is_loopback
from resilience_kit.monitoring.dashboard.serving import check_address
from resilience_kit.monitoring.dashboard.sources import OwnProcess
from resilience_kit.monitoring.sampler import running_sampler

TOKEN = "a-token-that-nobody-guesses"
BEARER = {"authorization": f"Bearer {TOKEN}"}

each_page = pytest.mark.parametrize("path", ["/", "/page/dashboard.js", "/api/now", "/nowhere"])
each_figure = pytest.mark.parametrize("path", ["/api/now", "/api/history", "/events"])


def origin_of(client):
    return str(client.base_url).rstrip("/")


def log_in(client, **headers):
    return client.post("/login", json={"token": TOKEN}, headers={"origin": origin_of(client), **headers})


def asked_from(address, path="/api/now", **options):
    """Ask the application in the name of a client with another address."""
    transport = httpx2.ASGITransport(create_app(**options), client=(address, 50_000))

    async def ask():
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path, headers=BEARER)

    return ask()


# Addresses


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_an_address_that_others_reach_needs_a_token(host):
    with pytest.raises(ConfigurationError, match=r"RESILIENCE_DASHBOARD_TOKEN.*SSH tunnel"):
        check_address(host, has_token=False)
    check_address(host, has_token=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_this_machine_alone_needs_no_token(host):
    check_address(host, has_token=False)


def test_a_name_that_looks_like_this_machine_is_not_it():
    assert not is_loopback("127.0.0.1.example.com")


async def test_without_a_token_nobody_elsewhere_is_served():
    assert (await asked_from("192.168.1.5")).status_code == 403
    assert (await asked_from("127.0.0.1")).status_code == 200


async def test_with_a_token_those_elsewhere_are_served():
    assert (await asked_from("192.168.1.5", token=TOKEN)).status_code == 200


async def test_an_application_may_decide_itself_who_comes():
    assert (await asked_from("192.168.1.5", allowed_hosts=["*"])).status_code == 200


# Host headers


@each_page
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.evil.example"]
)
def test_a_name_that_somebody_pointed_here_is_refused(serve, host, path):
    assert serve().get(path, headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:99", "10.1.2.3:80"])
def test_this_machine_by_its_names_and_addresses_is_served(serve, host):
    assert serve().get("/", headers={"host": host}).status_code == 200


def test_a_name_that_was_allowed_is_served(serve):
    assert serve(allowed_hosts=["Dash.example"]).get("/", headers={"host": "dash.example:8766"}).status_code == 200


# The token


@each_figure
@pytest.mark.parametrize(
    "given",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"cookie": "resilience_kit_dashboard=9.9"}],
)
def test_without_the_token_there_are_no_figures(serve, path, given):
    assert serve(token=TOKEN).get(path, headers=given).status_code == 401


def test_a_token_in_the_url_is_not_looked_at(serve):
    assert serve(token=TOKEN).get("/api/now", params={"token": TOKEN}).status_code == 401


def test_the_token_in_the_header_shows_the_figures(serve):
    assert serve(token=TOKEN).get("/api/now", headers=BEARER).status_code == 200


def test_without_the_token_the_page_is_a_login_form(serve):
    answer = serve(token=TOKEN).get("/")
    assert (answer.status_code, 'type="password"' in answer.text) == (401, True)


def test_the_login_form_sets_a_cookie_that_shows_the_figures(serve):
    client = serve(token=TOKEN)
    assert log_in(client).status_code == 204
    assert client.get("/api/now").status_code == 200


def test_the_cookie_is_for_this_page_alone_and_has_no_token_in_it(serve):
    cookie = log_in(serve(token=TOKEN)).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie


def test_a_cookie_of_another_token_is_worth_nothing(serve):
    cookie = log_in(serve(token=TOKEN)).headers["set-cookie"].partition(";")[0]
    assert serve(token=TOKEN + "2").get("/api/now", headers={"cookie": cookie}).status_code == 401


def test_nobody_makes_a_cookie_last_longer(serve):
    cookie = log_in(serve(token=TOKEN)).headers["set-cookie"].partition(";")[0]
    name, _, value = cookie.partition("=")
    later = f"{name}={int(value.partition('.')[0]) + 1}.{value.partition('.')[2]}"
    assert serve(token=TOKEN).get("/api/now", headers={"cookie": later}).status_code == 401


def test_a_cookie_that_is_too_old_shows_nothing(serve, monkeypatch):
    monkeypatch.setattr(security, "SESSION_SECONDS", -1)
    client = serve(token=TOKEN)
    cookie = log_in(client).headers["set-cookie"].partition(";")[0]
    assert client.get("/api/now", headers={"cookie": cookie}).status_code == 401


def test_a_wrong_token_does_not_log_in(serve):
    client = serve(token=TOKEN)
    answer = client.post("/login", json={"token": "wrong"}, headers={"origin": origin_of(client)})
    assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://127.0.0.1:1"])
def test_another_site_cannot_log_in(serve, origin):
    assert log_in(serve(token=TOKEN), origin=origin).status_code == 403


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"token": 5}', b'{"token":"' + b"x" * 10_000 + b'"}', "ü".encode()]
)
def test_a_body_that_is_no_login_does_not_log_in(serve, body):
    client = serve(token=TOKEN)
    assert client.post("/login", content=body, headers={"origin": origin_of(client)}).status_code == 401


def test_a_token_that_can_be_guessed_is_refused():
    with pytest.raises(ConfigurationError, match=r"has 6 characters: expected 16 or more"):
        create_app(token="secret")


def test_the_token_is_in_no_message_and_no_page(serve):
    client = serve(token=TOKEN)
    texts = [client.get(path, headers=BEARER).text for path in ("/", "/api/now", "/api/history")]
    assert all(TOKEN not in text for text in texts)


# What a browser may do


@each_page
def test_every_answer_has_the_strict_policy(serve, path):
    headers = serve().get(path).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS


def test_a_refusal_has_the_strict_policy_too(serve):
    headers = serve().get("/", headers={"host": "evil.example"}).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize("page", ["index.html", "login.html"])
def test_no_page_has_a_script_or_a_style_in_it(serve, page):
    text = serve(token=TOKEN).get("/", headers=BEARER if page == "index.html" else {}).text
    assert "<style" not in text
    assert "style=" not in text
    assert all(part.startswith(" src=") for part in text.split("<script")[1:])


def test_pages_name_no_other_machine(serve):
    text = serve().get("/").text
    assert "//" not in text


@pytest.mark.parametrize("name", ["..%2fapp.py", "../app.py", "index.html", "uplot.md", "%00"])
def test_no_file_but_the_pages_own_is_served(serve, name):
    assert serve().get(f"/page/{name}").status_code == 404


def test_a_range_that_there_is_not_is_told(serve):
    answer = serve().get("/api/history", params={"range": "year"})
    assert (answer.status_code, "minute, hour, day, week" in answer.json()["error"]) == (400, True)


async def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message["type"])

    async def receive():
        return {"type": "websocket.connect"}

    await create_app()({"type": "websocket", "path": "/events", "headers": []}, receive, send)
    assert sent == ["websocket.close"]


# Buttons


def press(client, button="pause", name="chat", **headers):
    return client.post(f"/api/{button}", json={"name": name}, headers=headers)


def use_limit(name="chat"):
    rate_limited(name)(lambda: "four")()


def is_paused(name="chat"):
    return get_all_resilience_stats()["rate_limiters"][name]["paused"] == 1


def test_controls_need_a_token():
    with pytest.raises(ConfigurationError, match="needs a token"):
        create_app(controls=True)


def test_a_button_pauses_a_limit_and_another_one_resumes_it(serve):
    use_limit()
    client = serve(token=TOKEN, controls=True)
    assert press(client, **BEARER).status_code == 204
    assert is_paused()
    assert press(client, "resume", **BEARER).status_code == 204
    assert not is_paused()


def test_a_button_resets_a_circuit(serve):
    @circuit_protected("search", failure_threshold=1)
    def fail():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert press(serve(token=TOKEN, controls=True), "reset-circuit", "search", **BEARER).status_code == 204
    assert get_all_resilience_stats()["circuit_breakers"]["search"]["state"] == "CLOSED"


def test_there_are_no_buttons_without_controls(serve):
    use_limit()
    assert press(serve(token=TOKEN), **BEARER).status_code == 404
    assert not is_paused()


async def test_buttons_without_a_token_are_not_pressed():
    use_limit()
    figures = Figures("Title", OwnProcess(running_sampler))
    transport = httpx2.ASGITransport(application_of(figures, Guard(), has_controls=True))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = await client.post("/api/pause", json={"name": "chat"}, headers={"origin": "http://127.0.0.1"})
    assert (answer.status_code, is_paused()) == (403, False)


def test_a_button_needs_the_token(serve):
    use_limit()
    assert press(serve(token=TOKEN, controls=True)).status_code == 401
    assert not is_paused()


def test_a_button_works_with_the_cookie_on_the_own_page(serve):
    use_limit()
    client = serve(token=TOKEN, controls=True)
    log_in(client)
    assert press(client, origin=origin_of(client)).status_code == 204


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "https://evil.example:443"])
def test_another_sites_page_presses_no_button_with_the_cookie(serve, origin):
    use_limit()
    client = serve(token=TOKEN, controls=True)
    log_in(client)
    assert press(client, **({} if origin is None else {"origin": origin})).status_code == 403
    assert not is_paused()


def test_a_button_for_what_is_not_there_says_so(serve):
    answer = press(serve(token=TOKEN, controls=True), name="nothing", **BEARER)
    assert (answer.status_code, "nothing" in json.loads(answer.text)["error"]) == (404, True)


def test_a_button_is_not_pressed_by_a_link(serve):
    assert serve(token=TOKEN, controls=True).get("/api/pause", headers=BEARER).status_code == 405


def test_the_port_of_a_dashboard_is_this_machines_alone(serve):
    port = serve().base_url.port
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in own:
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"http://{address}:{port}/", trust_env=False)
