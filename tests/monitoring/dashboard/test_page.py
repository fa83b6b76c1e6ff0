"""The page in a real browser, while real calls are made."""

import asyncio
import threading
import time

import pytest
from starlette.applications import Starlette

from examples.multi_agent.comparison import QUESTIONS, run
from examples.multi_agent.service import Quota, simulated_service
from examples.multi_agent.telemetry import open_telemetry
from resilience_kit import Price, circuit_protected, get_all_resilience_stats, rate_limited, resilient, set_prices
from resilience_kit.errors import CircuitOpenError
from resilience_kit.monitoring.dashboard import create_app, streaming
from resilience_kit.monitoring.dashboard.app import application_of
from resilience_kit.monitoring.dashboard.figures import Figures
from resilience_kit.monitoring.dashboard.security import Guard
from resilience_kit.monitoring.dashboard.sources import RecordedProcesses
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample
from resilience_kit.testing.background_server import BackgroundServer

TOKEN = "a-token-that-nobody-guesses"
MARKUP = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"

each_screen = pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])


def answering(name="chat", agent="MathAgent", **parameters):
    options = {"requests_per_minute": 600, "tokens_per_minute": 60_000, "min_interval": 0, **parameters}

    @resilient(name, agent=agent, model="gpt-4o", **options)
    def ask(messages, max_tokens=100):
        return {"model": "gpt-4o", "usage": {"prompt_tokens": 120, "completion_tokens": 30}}

    return ask


def ask_some(times=7, **options):
    ask = answering(**options)
    for _ in range(times):
        ask([{"role": "user", "content": "What is 2 + 2?"}])


def open_circuit(name="search"):
    @circuit_protected(name, failure_threshold=1)
    def fail():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    return fail


def count_in(text):
    return int(text.replace(",", ""))


def is_said(browser, selector, text, seconds=10):
    return browser.until(
        "return document.querySelector(arguments[0])?.innerText.includes(arguments[1])", selector, text, seconds=seconds
    )


# Figures


def test_the_figures_of_an_agent_are_those_of_the_statistics(serve, browser):
    set_prices({"gpt-4o": Price(2.5, 10)})
    ask_some(7)
    browser.open(serve())
    stats = get_all_resilience_stats()["agents"]["MathAgent"]
    cells = browser.run("return Array.from(document.querySelectorAll('#agents td'), it => it.textContent)")
    calls, tokens, prompt, completion = map(count_in, cells[:4])
    assert (calls, prompt, completion) == (stats["calls"], stats["prompt_tokens"], stats["completion_tokens"])
    assert tokens == prompt + completion
    assert float(cells[4].strip("$")) == pytest.approx(stats["usd"], abs=0.0001)


def test_the_figures_of_a_limit_are_those_of_the_statistics(serve, browser):
    ask_some(7)
    browser.open(serve())
    stats = get_all_resilience_stats()["rate_limiters"]["chat"]
    texts = browser.run("return Array.from(document.querySelectorAll('.gauge b'), it => it.parentElement.textContent)")
    requests, tokens = ([count_in(part) for part in text.split(" of ")] for text in texts)
    assert requests == [stats["requests_in_window"], stats["requests_per_minute"]]
    assert tokens == [stats["tokens_in_window"], stats["tokens_per_minute"]]


def test_the_page_follows_while_calls_are_made(serve, browser):
    ask = answering()
    browser.open(serve())
    ends = threading.Event()

    def keep_asking():
        while not ends.wait(0.05):
            ask([{"role": "user", "content": "What is 2 + 2?"}])

    asking = threading.Thread(target=keep_asking)
    asking.start()
    browser.until("return Number(document.querySelector('#agents td')?.textContent) >= 10")
    ends.set()
    asking.join()
    calls = get_all_resilience_stats()["agents"]["MathAgent"]["calls"]
    browser.until("return Number(document.querySelector('#agents td')?.textContent) === arguments[0]", calls)


def test_the_page_tells_what_the_statistics_tell_while_the_multi_agent_example_runs(serve, browser):
    def told():
        agents = get_all_resilience_stats()["agents"].values()
        return [sum(agent[key] for agent in agents) for key in ("calls", "prompt_tokens", "completion_tokens")]

    def shown():
        columns = "[1, 3, 4].map((column) => [...document.querySelectorAll(`#agents tr > :nth-child(${column + 1})`)]"
        return browser.run(f"return {columns}.reduce((sum, it) => sum + Number(it.textContent.replace(/,/g, '')), 0))")

    def ask():
        with open_telemetry({}) as telemetry, simulated_service(Quota(600, 100_000, 5.0)) as service:
            asyncio.run(run(service, telemetry, QUESTIONS[:12], protected=True))

    browser.open(serve())
    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        # counts only rise, so what is on the page was so a second ago at the earliest
        page, statistics = shown(), told()
        assert all(one <= other for one, other in zip(page, statistics, strict=True))
    asking.join()
    assert told()[0] > 12
    deadline = time.monotonic() + 10
    while shown() != told():
        assert time.monotonic() < deadline


def test_one_of_several_processes_can_be_chosen(browser):
    history = History("history.sqlite3")
    for process, calls in (("one", 3), ("two", 4)):
        reading = Reading("agents", "MathAgent", {"calls": calls, "prompt_tokens": 10, "completion_tokens": 1})
        history.add(Sample(time.time(), 1.0, process, (reading,)))
    history.close()
    app = application_of(Figures("Title", RecordedProcesses(history), history=history), Guard())
    server = BackgroundServer(app, "127.0.0.1", 0)
    try:
        browser.look()
        browser.driver.get(server.endpoint)
        calls = "return document.querySelector('#agents td')?.textContent === arguments[0]"
        browser.until(calls, "7")
        browser.run(
            "const it = document.querySelector('#process'); it.value = 'two'; it.dispatchEvent(new Event('change'))"
        )
        browser.until(calls, "4")
    finally:
        server.close()


def test_calls_that_wait_and_calls_under_way_are_shown(serve, browser):
    ends = threading.Event()

    @rate_limited("slow", max_concurrent=1, min_interval=0)
    def wait():
        ends.wait(30)

    calls = [threading.Thread(target=wait) for _ in range(3)]
    for call in calls:
        call.start()
    try:
        browser.open(serve())
        is_said(browser, ".limit dl", "1 of 1")
        is_said(browser, "#verdict", "2 calls wait")
    finally:
        ends.set()
        for call in calls:
            call.join()


def test_the_charts_show_what_was_used(serve, browser):
    client = serve()
    ask_some(7)
    time.sleep(1.1)
    browser.open(client)
    browser.click("#ranges button:nth-child(1)")
    label = "return document.querySelector('#chart-requests .plot').getAttribute('aria-label')"
    told = browser.until(f"{label.replace('return ', 'const it = ')}; return /sent [1-9]/.test(it) && it")
    assert "429s 0" in told


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_each_range_is_drawn_without_a_complaint(serve, browser, number):
    browser.open(serve())
    browser.click(f"#ranges button:nth-child({number})")
    browser.until("return document.querySelectorAll('#chart-tokens canvas').length === 1")
    assert browser.complaints() == []


# What is wrong


def test_nothing_wrong_is_said_first(serve, browser):
    ask_some()
    browser.open(serve())
    assert browser.text("#verdict") == "All is well."


def test_a_circuit_that_opens_is_told_within_two_seconds(serve, browser):
    ask_some()
    browser.open(serve())
    fail = open_circuit()
    is_said(browser, "#verdict", "Circuit search is open", seconds=2)
    with pytest.raises(CircuitOpenError):
        fail()
    is_said(browser, "#circuits .open", "1 refused")
    assert browser.driver.title == "(1) resilience_kit"


def test_an_alert_that_fires_is_shown_with_its_advice(serve, browser):
    @resilient("spent", agent="Spender", budget_tokens=100, per="day", min_interval=0)
    def ask(prompt):
        return {"usage": {"prompt_tokens": 90, "completion_tokens": 5}}

    client = serve()
    ask("2 + 2?")
    browser.open(client)
    is_said(browser, "#alerts", "budget-used")
    is_said(browser, "#alerts", "Spender")


# The link


def test_the_page_recovers_when_the_server_dies_and_returns(browser):
    app = create_app()
    server = BackgroundServer(app, "127.0.0.1", 0)
    port = int(server.endpoint.rpartition(":")[2])
    try:
        browser.look()
        browser.driver.get(server.endpoint)
        is_said(browser, "#link", "live")
    finally:
        server.close()
    is_said(browser, "#link", "no answer since")
    ask_some(3)
    server = BackgroundServer(app, "127.0.0.1", port)
    try:
        is_said(browser, "#link", "live", seconds=20)
        is_said(browser, "#agents", "MathAgent")
    finally:
        server.close()


def test_the_page_comes_back_after_a_server_that_was_too_busy(serve, browser, monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_STREAMS", 0)
    browser.look()
    browser.driver.get(str(serve().base_url))
    browser.until("return performance.getEntriesByType('resource').some((it) => it.name.includes('/events'))")
    monkeypatch.setattr(streaming, "_MOST_STREAMS", 64)
    is_said(browser, "#link", "live")


def test_nothing_is_asked_of_another_machine(serve, browser):
    ask_some()
    client = serve()
    browser.requests()
    browser.open(client)
    browser.click("#ranges button:nth-child(3)")
    time.sleep(1.5)
    asked = browser.requests()
    assert len(asked) >= 8
    assert [url for url in asked if not url.startswith((str(client.base_url), "data:"))] == []


def test_nothing_is_built_while_nobody_looks(browser):
    built = []

    from resilience_kit.monitoring.dashboard import figures

    original = figures.Figures.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figures, "now", lambda self, process=None: built.append(1) or original(self, process))
        server = BackgroundServer(create_app(), "127.0.0.1", 0)
        try:
            browser.look()
            browser.driver.get(server.endpoint)
            is_said(browser, "#link", "live")
            browser.driver.get("about:blank")
            time.sleep(1.2)
            before = len(built)
            time.sleep(2.2)
            assert (before > 0, len(built) - before) == (True, 0)
        finally:
            server.close()


def test_it_works_under_a_path_of_another_application(browser):
    ask_some()
    outer = Starlette()
    outer.mount("/ops/resilience", create_app(token=TOKEN))
    server = BackgroundServer(outer, "127.0.0.1", 0)
    try:
        browser.look()
        browser.driver.get(f"{server.endpoint}/ops/resilience")
        browser.driver.find_element("css selector", "#token").send_keys(TOKEN, "\n")
        is_said(browser, "#agents", "MathAgent")
        assert browser.driver.get_cookies()[0]["path"] == "/ops/resilience"
    finally:
        server.close()


# The policy, and names that are markup


def test_the_page_keeps_to_its_policy(serve, browser):
    ask_some()
    browser.open(serve())
    browser.run("return document.querySelector('.bar i').style.width")
    assert browser.complaints() == []


def test_a_name_that_is_markup_is_shown_as_text(serve, browser):
    ask_some(agent=MARKUP, name=MARKUP)
    open_circuit(MARKUP + "2")
    browser.open(serve(title=MARKUP))
    is_said(browser, "#agents", "<script>")
    is_said(browser, ".limit h3", "<img src=x")
    is_said(browser, "#circuits", "<img src=x")
    inserted = browser.run("return document.querySelectorAll('img, script:not([src])').length")
    assert (inserted, browser.driver.title.endswith(MARKUP)) == (0, True)


# Buttons


def test_a_wrong_token_is_told_and_the_right_one_shows_the_page(serve, browser):
    client = serve(token=TOKEN)
    browser.look()
    browser.driver.get(str(client.base_url))
    field = browser.driver.find_element("css selector", "#token")
    field.send_keys("wrong\n")
    is_said(browser, "[role=alert]", "not the token")
    field.clear()
    field.send_keys(TOKEN, "\n")
    is_said(browser, "#link", "live")
    assert TOKEN not in browser.driver.current_url


def test_a_session_that_is_over_leads_to_the_login_form(serve, browser, monkeypatch):
    monkeypatch.setattr(streaming, "_LONGEST_STREAM", 1.0)
    log_in(browser, serve(token=TOKEN))
    browser.driver.delete_all_cookies()
    browser.until("return document.querySelector('#token') !== null")


def log_in(browser, client):
    browser.look()
    browser.driver.get(str(client.base_url))
    browser.driver.find_element("css selector", "#token").send_keys(TOKEN, "\n")
    is_said(browser, "#link", "live")


def test_buttons_pause_and_resume_a_limit(serve, browser):
    ask_some()
    log_in(browser, serve(token=TOKEN, controls=True))
    browser.click("[aria-label='Pause the limit chat']")
    is_said(browser, ".limit .badge", "paused")
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["paused"] == 1
    browser.click("[aria-label='Resume the limit chat']")
    browser.until("return document.querySelector('.limit .badge').hidden")
    assert get_all_resilience_stats()["rate_limiters"]["chat"]["paused"] == 0


def test_a_button_resets_a_circuit(serve, browser):
    open_circuit()
    log_in(browser, serve(token=TOKEN, controls=True))
    browser.click("[aria-label='Reset the circuit search']")
    is_said(browser, "#verdict", "All is well")


def test_without_controls_there_is_no_button_for_a_limit_or_a_circuit(serve, browser):
    ask_some()
    open_circuit()
    browser.open(serve())
    assert browser.run("return document.querySelectorAll('.limit button, #circuits button').length") == 0


# All eyes


@each_screen
def test_no_serious_accessibility_problem_is_found(serve, browser, width, dark):
    ask_some()
    open_circuit()
    browser.open(serve(token=None), width=width, dark=dark)
    is_said(browser, "#verdict", "is open")
    assert browser.accessibility_problems() == []


def test_the_login_form_has_no_serious_accessibility_problem(serve, browser):
    browser.look()
    browser.driver.get(str(serve(token=TOKEN).base_url))
    assert browser.accessibility_problems() == []


def test_a_phone_needs_no_scrolling_sideways(serve, browser):
    ask_some(agent="An agent with a rather long name", name="a-limit-with-a-rather-long-name-in-one-word-that-is-long")
    browser.open(serve(), width=390)
    assert browser.run("return document.documentElement.scrollWidth") == 390


def test_the_switch_changes_the_theme_and_a_later_visit_remembers(serve, browser):
    client = serve()
    browser.open(client)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(ground)
    browser.click("#theme")
    dark = browser.run(ground)
    browser.open(client)
    assert (dark != light, browser.run(ground)) == (True, dark)
