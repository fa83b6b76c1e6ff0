"""Names and errors with line breaks, escape sequences and the like: no log, scrape, terminal or text obeys them."""

import io
import json
import logging
import time

import pytest
from hostile_values import NAMES, TEXTS, examples, is_harmless, told
from hypothesis import given, strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from resilience_kit import (
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
    reset_circuit_breakers,
    resilient,
    retry_on_429,
    token_budget,
    token_manager,
)
from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.monitoring import export_to_prometheus, log_events
from resilience_kit.monitoring.alert_delivery import log_alert
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule
from resilience_kit.monitoring.alerts import example_alert
from resilience_kit.monitoring.measures import Sample
from resilience_kit.monitoring.overview import overview_of
from resilience_kit.monitoring.sampler import Sampler
from resilience_kit.monitoring.terminal import drawn
from resilience_kit.pausing import pause, resume
from resilience_kit.pricing import isolated as own_prices
from resilience_kit.stack import explain
from resilience_kit.testing import isolated
from resilience_kit.vocabularies import encoding_name

FORGED = "chat\nCRITICAL forged: all is well\r\x1b[2J\u202e\x00\ud800"


class Lines(logging.Handler):
    """Keeps what would be written to a file."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


@pytest.fixture
def lines():
    """All lines that the kit logs meanwhile."""
    handler, logger = Lines(), logging.getLogger("resilience_kit")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def fail_in_all_ways(name, text):
    """Calls that wait, are refused, fail and are retried, under a name, with an error of this text."""
    error = RuntimeError(f"rate limit {text}: retry after 0.001 seconds")
    error.headers = {"retry-after-ms": text, "x-ratelimit-remaining-requests": text}

    @resilient(
        name, agent=name, max_tokens=5, budget_tokens=20, initial_backoff=0.0, max_backoff=0.001, min_interval=0.0
    )
    def ask(prompt):
        raise error

    @circuit_protected(name, failure_threshold=1)
    def fail():
        raise ConnectionError(text)

    @token_budget(f"{name}!", max_tokens=1, model=name)
    def spend(prompt):
        return {"usage": {"prompt_tokens": 1}, "model": text}

    said = [
        told(RuntimeError, ask, "hi"),
        told(ResilienceError, ask, "a long prompt of many words that does not fit"),
        told(ConnectionError, fail),
        told(ResilienceError, fail),
        told(ResilienceError, spend, "a long prompt of many words"),
        told(ResilienceError, spend, "a"),
        told(ConfigurationError, pause, text),
        told(ConfigurationError, resume, text),
        told(ConfigurationError, reset_circuit_breakers, text),
        told(ConfigurationError, rate_limited, name, requests_per_minute=text),
        told(ConfigurationError, retry_on_429, max_retries=text),
        told(ConfigurationError, lambda: rate_limited(name, requests_per_minute=1)(len)),
    ]
    # the function's own errors are its own
    return [it for number, it in enumerate(said) if it is not None and number not in (0, 2)]


@given(NAMES, TEXTS)
@examples(30)
def test_no_line_of_a_log_obeys_a_name(name, text):
    handler, logger = Lines(), logging.getLogger("resilience_kit")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with isolated():
            messages = fail_in_all_ways(name, text)
            encoding_name(f"{name}{text}")
            for rule in (
                *DEFAULT_RULES,
                Rule(name=name[:100], measure="wait_p95_seconds", above=1, names=(text,), advice=text),
            ):
                log_alert(example_alert(rule, time.time()))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    assert len(handler.lines) > len(DEFAULT_RULES)
    assert all(map(is_harmless, handler.lines))
    assert all(map(is_harmless, messages))


def test_a_forged_line_is_part_of_the_line_that_it_is_in(lines):
    log_events.write(logging.getLogger("resilience_kit.rate_limiting"), logging.WARNING, "refused", {"name": FORGED})

    (line,) = lines
    assert is_harmless(line)
    assert repr(FORGED) in line


@given(NAMES, TEXTS)
@examples(10)
def test_a_terminal_and_the_texts_of_the_token_manager_obey_no_name(name, text):
    with isolated(), own_prices(), Sampler() as sampler:
        fail_in_all_ways(name, text)

        @token_budget(f"{name}?", max_tokens=20, on_exceed="truncate")
        def cut(prompt):
            return "four"

        for _ in range(25):
            cut("many words " * 20)
        insights = token_manager.get_usage_insights()
        sampler.stop()
        console = Console(file=io.StringIO(), width=80)
        samples = sampler.samples() or [Sample(1, 1, name)]
        console.print(drawn(overview_of(samples, None, source=text), rows=20, problem=text))
        json.dumps(get_all_resilience_stats(), allow_nan=False)

    assert is_harmless(console.file.getvalue().replace("\n", ""))
    assert all(map(is_harmless, insights["recommendations"]))


@given(NAMES)
@examples(20)
def test_prometheus_reads_what_is_told_of_any_name(name):
    with isolated():
        registry = CollectorRegistry()
        with Sampler() as sampler:
            stop = export_to_prometheus(registry, sampler=sampler)
            rate_limited(name, tokens=0)(lambda: "four")()
            text = generate_latest(registry).decode()
            stop()

    families = {it.name: it for it in text_string_to_metric_families(text)}
    (sample,) = families["resilience_kit_calls_admitted"].samples
    assert (sample.labels, sample.value) == ({"limit": sendable(name)[:100]}, 1) or len(name) > 100


@pytest.mark.parametrize("name", [FORGED, "\ud800", "\n", "\x1b[2J"])
def test_opentelemetry_is_told_of_a_name_what_it_can_send(name):
    from resilience_kit.monitoring import export_to_opentelemetry

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    stop = export_to_opentelemetry(provider)
    rate_limited(name, tokens=0)(lambda: "four")()
    data = json.loads(reader.get_metrics_data().to_json())
    stop()
    provider.shutdown()

    said = [
        value
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        for point in metric["data"]["data_points"]
        for value in point["attributes"].values()
    ]
    assert sendable(name) in said
    assert all(value.encode() for value in said)


def test_a_span_is_told_of_a_name_what_it_can_send():
    from resilience_kit.monitoring import export_to_opentelemetry

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider()
    stop = export_to_opentelemetry(meters, provider)

    @rate_limited("chat\ud800", tokens=0)
    def ask():
        raise ConnectionError("rate limit")

    with provider.get_tracer("tests").start_as_current_span("call"), pytest.raises(ConnectionError):
        ask()
    stop()
    provider.shutdown()
    meters.shutdown()

    (span,) = exporter.get_finished_spans()
    said = [value for event in span.events for value in event.attributes.values() if isinstance(value, str)]
    assert "chat?" in said
    assert all(value.encode() for value in said)


def sendable(name):
    return name.encode("utf-8", "replace").decode()


@given(NAMES, st.integers(1, 100))
@examples(20)
def test_what_is_explained_of_a_name_is_as_many_lines_as_there_are_parameters(name, requests):
    with isolated():
        report = str(explain(resilient(name, requests_per_minute=requests)(lambda prompt: "four")))

    assert is_harmless(report.replace("\n", ""))
    assert len(report.splitlines()) < 60
