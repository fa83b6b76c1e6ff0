"""Prometheus: real scrapes over HTTP, and the files in contrib/ against what is scraped."""

import importlib
import json
import re
import sys
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx2
import pytest
import yaml
from hypothesis import given, strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest, make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families

from resilience_kit import ConfigurationError, circuit_protected, rate_limited, resilient, retry_on_429, token_budget
from resilience_kit.monitoring import metric_names
from resilience_kit.monitoring.metric_names import CIRCUIT_STATE, HISTOGRAMS, METRICS, Names
from resilience_kit.monitoring.prometheus import export_to_prometheus
from resilience_kit.monitoring.sampler import Sampler, running_sampler
from resilience_kit.stats import COUNTERS
from resilience_kit.testing import no_waiting

CONTRIB = Path(__file__).parents[2] / "contrib"
DASHBOARD = json.loads((CONTRIB / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((CONTRIB / "prometheus-alerts.yml").read_text(encoding="utf-8"))


class QuietHandler(WSGIRequestHandler):
    """Serves without a line for each request."""

    def log_message(self, *arguments):
        pass


@pytest.fixture
def scrape():
    """Export to a registry of the test's own, and scrape it over HTTP: all samples by name and labels."""
    registry = CollectorRegistry()
    with Sampler() as sampler:
        stop = export_to_prometheus(registry, sampler=sampler)
        server = make_server("127.0.0.1", 0, make_wsgi_app(registry), handler_class=QuietHandler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def scrape(*, after_sample=False):
            if after_sample:
                sampler.stop()
            text = httpx2.get(f"http://127.0.0.1:{server.server_port}/metrics").raise_for_status().text
            return {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }

        scrape.registry, scrape.stop = registry, stop
        yield scrape
        stop()
        server.shutdown()
        server.server_close()
        thread.join()


def labelled(**labels):
    return frozenset(labels.items())


class TooManyRequestsError(Exception):
    """A 429 of any SDK."""

    status_code = 429


def use_everything():
    """Have each counter and gauge of the kit show something."""

    def answer(prompt):
        return {"model": "gpt-4o", "usage": {"prompt_tokens": 30, "completion_tokens": 5}}

    resilient("chat", agent="MathAgent", budget_tokens=1_000, budget_usd=5.0, per="day")(answer)("2 + 2?")
    outcomes = iter([TooManyRequestsError()])

    @retry_on_429(max_retries=3)
    @rate_limited("other", tokens=0)
    def ask():
        for error in outcomes:
            raise error
        return "four"

    with no_waiting():
        ask()


# What is scraped


def test_what_is_counted_is_scraped(scrape):
    use_everything()
    scraped = scrape()

    assert scraped["resilience_kit_calls_admitted_total", labelled(limit="chat")] == 1
    assert scraped["resilience_kit_calls_rate_limited_total", labelled(limit="other")] == 1
    assert scraped["resilience_kit_calls_in_flight_limit", labelled(limit="chat")] == 3
    assert scraped["resilience_kit_agent_tokens_total", labelled(agent="MathAgent", kind="prompt")] == 30
    assert scraped["resilience_kit_agent_tokens_total", labelled(agent="MathAgent", kind="completion")] == 5
    assert scraped["resilience_kit_model_calls_total", labelled(model="gpt-4o")] == 1
    assert scraped["resilience_kit_budget_used_tokens", labelled(agent="MathAgent")] == 35
    assert scraped["resilience_kit_budget_limit_usd", labelled(agent="MathAgent")] == 5


def test_a_scrape_shows_what_is_now(scrape):
    ask = rate_limited("chat", tokens=0)(lambda: scrape()["resilience_kit_calls_in_flight", labelled(limit="chat")])

    assert ask() == 1
    assert scrape()["resilience_kit_calls_in_flight", labelled(limit="chat")] == 0


def test_waits_and_answers_are_histograms(scrape):
    ask = rate_limited("chat", tokens=0, min_interval=5)(lambda: "four")
    with no_waiting():
        ask()
        ask()
    scraped = scrape(after_sample=True)

    def buckets(name):
        return {
            dict(labels)["le"]: value
            for (each, labels), value in scraped.items()
            if each == f"resilience_kit_{name}_bucket"
        }

    waits = buckets("wait_seconds")
    assert (waits["0.001"], waits["3.2"], waits["5.6"], waits["+Inf"]) == (1, 1, 2, 2)
    assert scraped["resilience_kit_wait_seconds_sum", labelled(limit="chat")] == pytest.approx(5, abs=0.1)
    assert scraped["resilience_kit_wait_seconds_count", labelled(limit="chat")] == 2
    assert buckets("answer_seconds")["+Inf"] == 2


def test_a_circuit_is_in_one_of_its_states(scrape):
    def broken():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        circuit_protected("chat", failure_threshold=1)(broken)()

    shown = {
        dict(labels)["state"]: value
        for (name, labels), value in scrape().items()
        if name == "resilience_kit_circuit_state"
    }
    assert shown == {"CLOSED": 0, "HALF_OPEN": 0, "OPEN": 1}


def test_a_budget_without_a_bound_has_no_limit(scrape):
    token_budget("MathAgent")(lambda prompt: "four")("2 + 2?")

    assert not any(name == "resilience_kit_budget_limit_tokens" for name, _ in scrape())


# Names


def test_each_counter_of_the_stats_is_exported_or_is_the_sum_of_a_histogram():
    exported = {(metric.section, source) for metric in METRICS for source in metric.sources}
    counted = {(section, counter) for section, counters in COUNTERS.items() for counter in counters}

    assert counted - exported == {("rate_limiters", "seconds_waited")}
    assert {
        (metric.section, *metric.sources) for metric in METRICS if metric.kind == "counter" and not metric.label
    } <= counted


def test_names_of_metrics_follow_the_rules_of_prometheus():
    names = [metric.prometheus for metric in (*METRICS, CIRCUIT_STATE, *HISTOGRAMS)]

    assert len(names) == len(set(names))
    for name in names:
        assert re.fullmatch(r"resilience_kit(_[a-z]+)+", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))


def test_names_that_try_to_break_the_format_stay_values(scrape):
    nasty = 'a"} 1\n# TYPE x counter\nx_total{b="\\'
    rate_limited(nasty, tokens=0)(lambda: "four")()

    assert scrape()["resilience_kit_calls_admitted_total", labelled(limit=nasty)] == 1


def test_a_name_that_is_no_text_does_not_break_the_scrape(scrape):
    rate_limited("chat \ud800", tokens=0)(lambda: "four")()

    assert scrape()["resilience_kit_calls_admitted_total", labelled(limit="chat ?")] == 1


def test_names_are_bounded_in_number_and_what_is_more_is_added_up(scrape, monkeypatch):
    monkeypatch.setattr(metric_names, "MOST_VALUES", 2)
    for name in ("a", "b", "c", "d"):
        rate_limited(name, tokens=0)(lambda: "four")()
    scraped = scrape(after_sample=True)

    for metric in ("calls_admitted_total", "wait_seconds_count"):
        shown = {labels: value for (name, labels), value in scraped.items() if name == f"resilience_kit_{metric}"}
        assert shown == {labelled(limit="a"): 1, labelled(limit="b"): 1, labelled(limit="other"): 2}


def test_long_names_are_cut_and_still_told_apart(scrape):
    for end in ("x", "y"):
        rate_limited("a" * 200 + end, tokens=0)(lambda: "four")()
    shown = {dict(labels)["limit"] for name, labels in scrape() if name == "resilience_kit_calls_admitted_total"}

    assert len(shown) == 2
    assert {len(name) for name in shown} == {100}


@given(names=st.lists(st.text(st.characters(exclude_categories=())), max_size=20))
def test_the_same_name_is_always_shown_in_the_same_way(names):
    book = Names()
    shown = [book.shown(name) for name in names]

    assert [book.shown(name) for name in names] == shown
    for each in shown:
        assert len(each) <= metric_names.LONGEST_VALUE
        each.encode()


# The registry


def test_a_registry_has_them_once(scrape):
    with pytest.raises(ConfigurationError, match="in this registry already"):
        export_to_prometheus(scrape.registry)


def test_when_it_is_stopped_they_are_gone_and_can_be_exported_again(scrape):
    scrape.stop()
    scrape.stop()
    assert scrape() == {}

    with Sampler() as sampler:
        export_to_prometheus(scrape.registry, sampler=sampler)()


def test_metrics_of_the_programs_own_stand_beside_them(scrape):
    Counter("questions", "Questions.", registry=scrape.registry).inc()

    assert scrape()["questions_total", frozenset()] == 1


def test_nobody_can_register_a_metric_of_the_same_name(scrape):
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Counter("resilience_kit_calls_admitted", "Ours.", registry=scrape.registry)


def test_without_a_registry_it_is_the_one_of_the_process():
    stop = export_to_prometheus()
    try:
        assert b"resilience_kit_calls_admitted" in generate_latest()
        assert running_sampler().is_running
    finally:
        stop()
        running_sampler().stop()
    assert b"resilience_kit_calls_admitted" not in generate_latest()


def test_without_the_client_the_extra_is_named(monkeypatch):
    name = "resilience_kit.monitoring.prometheus"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install 'resilience-kit\[prometheus\]'"):
        importlib.import_module(name)


# What ships in contrib/

TARGETS = [
    pytest.param(target["expr"], target["legendFormat"], id=panel["title"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
RULES = [pytest.param(rule, id=rule["alert"]) for group in ALERTS["groups"] for rule in group["rules"]]
# What Prometheus and Grafana add themselves.
_OF_PROMETHEUS = {"instance", "job"}
_METRIC = re.compile(r"(resilience_kit_\w+)(?:\{([^}]*)\})?")


@pytest.fixture
def labels_of(scrape):
    """The labels of each series that a scrape shows."""
    use_everything()
    # two samples, so that the histograms have what was just done
    shown = scrape(after_sample=True)
    return {name: {label for label, _ in labels} for name, labels in shown}


def check(expression, labels_of):
    """Each metric is exported, each label is one of its own, and each grouping one of all that it groups."""
    found = _METRIC.findall(expression)
    assert found
    for name, selectors in found:
        assert name in labels_of
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors)) <= labels_of[name] | _OF_PROMETHEUS
    groupings = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    for name, _ in found:
        # of buckets, and of nothing else
        assert groupings - {"le"} <= labels_of[name] | _OF_PROMETHEUS
    assert ("le" in groupings) == any(name.endswith("_bucket") for name, _ in found)
    assert expression.count("(") == expression.count(")")
    return groupings


@pytest.mark.parametrize(("expression", "legend"), TARGETS)
def test_each_panel_asks_for_what_is_exported(labels_of, expression, legend):
    groupings = check(expression, labels_of)

    is_one = expression.startswith("sum(")
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) == (set() if is_one else groupings - {"le"})


@pytest.mark.parametrize("rule", RULES)
def test_each_alert_rule_asks_for_what_is_exported(labels_of, rule):
    groupings = check(rule["expr"], labels_of)

    text = json.dumps(rule["annotations"])
    assert set(re.findall(r"\$labels\.(\w+)", text)) == groupings - {"le"}
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_a_check_of_what_is_not_exported_fails(labels_of):
    for expression in (
        "resilience_kit_calls_admited_total",
        'resilience_kit_calls_admitted_total{agent="x"}',
        "sum by (agent) (resilience_kit_calls_admitted_total)",
    ):
        with pytest.raises(AssertionError):
            check(expression, labels_of)


def test_each_variable_of_the_dashboard_asks_for_what_is_exported(labels_of):
    (query,) = [each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    (name,) = re.findall(r"label_values\((\w+), instance\)", query)

    assert name in labels_of


def test_panels_of_the_dashboard_do_not_lie_on_each_other():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_rules_for_prometheus_have_the_bounds_of_the_kits_own():
    from resilience_kit.monitoring.alert_rules import DEFAULT_RULES

    own = {rule.name.replace("-", ""): rule for rule in DEFAULT_RULES}
    shipped = {rule.values[0]["alert"].removeprefix("ResilienceKit").lower(): rule.values[0] for rule in RULES}

    assert own.keys() - shipped.keys() == {"forecastabovequota"}
    for name, rule in shipped.items():
        assert rule["labels"]["severity"] == own[name].severity
        if name == "circuitopen":
            assert rule["for"] == "30s"
            assert own[name].above == 30
        else:
            assert re.search(rf"> {own[name].above:g}( |$)", rule["expr"])
