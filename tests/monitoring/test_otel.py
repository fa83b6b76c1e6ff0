"""OpenTelemetry: what its SDK receives, with its own exporters in memory."""

import asyncio
import importlib
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from resilience_kit import (
    CircuitOpenError,
    RateLimitTimeoutError,
    TokenBudgetExceededError,
    agent,
    circuit_protected,
    events,
    rate_limited,
    resilient,
    retry_on_429,
    token_budget,
)
from resilience_kit.monitoring import metric_names, otel
from resilience_kit.monitoring.otel import export_to_opentelemetry
from resilience_kit.testing import no_waiting


class TooManyRequestsError(Exception):
    """A 429 of any SDK."""

    status_code = 429


def broken():
    raise ConnectionError


def refused():
    raise TooManyRequestsError


class Exported:
    """What was exported so far, by name."""

    def __init__(self):
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.spans = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = self.tracers.get_tracer("a program")

    def metrics(self):
        data = self.reader.get_metrics_data()
        scopes = [] if data is None else [scope for each in data.resource_metrics for scope in each.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name):
        return {frozenset(point.attributes.items()): point for point in self.metrics()[name].data.data_points}

    def told(self, name):
        """The events of the program's own span of a name."""
        (span,) = [span for span in self.spans.get_finished_spans() if span.name == name]
        return [(event.name, dict(event.attributes)) for event in span.events]


@pytest.fixture
def exported():
    exported = Exported()
    exported.stop = export_to_opentelemetry(exported.meters, exported.tracers)
    yield exported
    exported.stop()
    exported.meters.shutdown()
    exported.tracers.shutdown()


def answer(prompt):
    return {"model": "gpt-4o", "usage": {"prompt_tokens": 30, "completion_tokens": 5}}


def attributes(**more):
    return {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "azure.ai.openai", **more}


# Metrics


def test_tokens_are_counted_by_the_semantic_conventions(exported):
    token_budget("MathAgent")(answer)("2 + 2?")
    exported.stop()

    points = exported.points("gen_ai.client.token.usage")
    exported_of = {
        kind: frozenset(
            attributes(
                **{"gen_ai.request.model": "gpt-4o", "gen_ai.agent.name": "MathAgent", "gen_ai.token.type": kind}
            ).items()
        )
        for kind in ("input", "output")
    }
    assert {kind: (points[key].sum, points[key].count) for kind, key in exported_of.items()} == {
        "input": (30, 1),
        "output": (5, 1),
    }
    assert exported.metrics()["gen_ai.client.token.usage"].unit == "{token}"


def test_buckets_are_those_that_the_conventions_recommend(exported):
    resilient("chat", agent="MathAgent")(answer)("2 + 2?")
    exported.stop()

    (duration,) = exported.points("gen_ai.client.operation.duration").values()
    (usage, _) = exported.points("gen_ai.client.token.usage").values()
    assert duration.explicit_bounds == tuple(
        pytest.approx(bound)
        for bound in (*(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64), *(1.28 * 2**n for n in range(7)))
    )
    assert usage.explicit_bounds == tuple(4**power for power in range(14))


@pytest.mark.looptime
async def test_durations_are_in_seconds_from_admission_to_the_end_of_the_answer(exported):
    @rate_limited("chat", tokens=0)
    async def ask():
        await asyncio.sleep(3)

    await ask()
    exported.stop()

    points = exported.points("gen_ai.client.operation.duration")
    assert points[frozenset(attributes(**{"resilience_kit.limit": "chat"}).items())].sum == 3
    assert exported.metrics()["gen_ai.client.operation.duration"].unit == "s"


@pytest.mark.looptime
async def test_waits_are_a_histogram(exported):
    @rate_limited("chat", tokens=0, min_interval=2)
    async def ask():
        return "four"

    for _ in range(3):
        await ask()
    exported.stop()

    (point,) = exported.points("resilience_kit.wait").values()
    assert (point.count, round(point.sum, 3), dict(point.attributes)) == (2, 4, {"resilience_kit.limit": "chat"})


def test_all_that_is_counted_is_observed(exported):
    ask = resilient("chat", agent="MathAgent", budget_tokens=1_000, budget_usd=5.0, per="day")(answer)
    ask("2 + 2?")

    metrics = exported.metrics()
    # there are only those that have a value: nothing waited, and nothing was recorded yet
    assert {name for name in metrics if name.startswith("resilience_kit.")} == {
        metric.opentelemetry for metric in (*metric_names.METRICS, metric_names.CIRCUIT_STATE)
    }
    (admitted,) = metrics["resilience_kit.calls_admitted"].data.data_points
    assert (admitted.value, dict(admitted.attributes)) == (1, {"resilience_kit.limit": "chat"})
    assert metrics["resilience_kit.calls_admitted"].data.is_monotonic
    assert not hasattr(metrics["resilience_kit.calls_in_flight"].data, "is_monotonic")
    (limit,) = metrics["resilience_kit.budget_limit.usd"].data.data_points
    assert (limit.value, metrics["resilience_kit.budget_limit.usd"].unit) == (5, "USD")


def test_two_exporters_are_told_apart_by_what_they_say_of_the_calls(exported):
    meters = MeterProvider([reader := InMemoryMetricReader()])
    stop = export_to_opentelemetry(meters, operation="embeddings", provider="openai")
    token_budget("MathAgent")(answer)("2 + 2?")
    stop()

    (resource,) = reader.get_metrics_data().resource_metrics
    (usage,) = [it for it in resource.scope_metrics[0].metrics if it.name == "gen_ai.client.token.usage"]
    said = dict(usage.data.data_points[0].attributes)
    assert (said["gen_ai.operation.name"], said["gen_ai.provider.name"]) == ("embeddings", "openai")
    meters.shutdown()


def test_names_are_bounded_in_number_and_length(exported, monkeypatch):
    monkeypatch.setattr(metric_names, "MOST_VALUES", 2)
    for name in ("a" * 5_000, "b", "c", "d"):
        rate_limited(name, tokens=0)(lambda: "four")()

    points = exported.points("resilience_kit.calls_admitted")
    by_name = {dict(key)["resilience_kit.limit"]: point.value for key, point in points.items()}
    assert list(by_name.values()) == [1, 1, 2]
    assert {"b", "other"} < by_name.keys()
    assert max(map(len, by_name)) == 100


def test_of_a_call_of_unknown_use_no_tokens_are_recorded(exported):
    with agent("MathAgent"):
        token_budget(lambda prompt: None)("2 + 2?")
    exported.stop()

    assert "gen_ai.client.token.usage" not in exported.metrics()


def test_what_is_queued_is_recorded_without_waiting_for_the_end(monkeypatch):
    monkeypatch.setattr(otel, "_SECOND", 0.01)
    exported = Exported()
    stop = export_to_opentelemetry(exported.meters, exported.tracers)
    token_budget("MathAgent")(answer)("2 + 2?")
    try:
        assert any("gen_ai.client.token.usage" in exported.metrics() or time.sleep(0.01) for _ in range(3_000))
    finally:
        stop()
        exported.meters.shutdown()


def test_what_is_told_as_a_record_counts_as_well(exported):
    events.emit(events.Admitted(name="chat", waited=2.5, tokens=1))
    exported.stop()

    (point,) = exported.points("resilience_kit.wait").values()
    assert point.sum == 2.5


def test_when_it_is_ended_nothing_is_observed_and_nothing_heard(exported):
    exported.stop()
    exported.stop()
    token_budget("MathAgent")(answer)("2 + 2?")
    with exported.tracer.start_as_current_span("mine"):
        events.emit(events.CircuitHalfOpened(name="chat"))

    assert exported.metrics() == {}
    assert exported.told("mine") == []


# Spans


@pytest.mark.looptime
async def test_a_wait_is_an_event_and_a_span_beneath_the_current_one(exported):
    @rate_limited("chat", tokens=7, min_interval=2)
    async def ask():
        return "four"

    await ask()
    with exported.tracer.start_as_current_span("mine") as mine:
        await ask()

    assert exported.told("mine") == [
        (
            "resilience_kit.waiting",
            {
                "resilience_kit.name": "chat",
                "resilience_kit.seconds": pytest.approx(2, abs=0.01),
                "resilience_kit.tokens": 7,
                "resilience_kit.ahead": 0,
            },
        )
    ]
    (wait,) = [span for span in exported.spans.get_finished_spans() if span.name == "resilience_kit.wait"]
    assert wait.parent.span_id == mine.get_span_context().span_id
    assert (wait.end_time - wait.start_time) / 1e9 == pytest.approx(2, abs=0.01)
    assert dict(wait.attributes) == {
        "resilience_kit.name": "chat",
        "resilience_kit.waited": pytest.approx(2, abs=0.01),
        "resilience_kit.tokens": 7,
    }


def test_a_call_that_does_not_wait_adds_nothing_to_the_span(exported):
    with exported.tracer.start_as_current_span("mine"):
        resilient("chat", agent="MathAgent")(answer)("2 + 2?")

    assert exported.told("mine") == []
    assert len(exported.spans.get_finished_spans()) == 1


def test_a_span_is_told_of_refusals_by_the_server_and_of_retries(exported):
    outcomes = iter([TooManyRequestsError("my secret prompt")])

    @retry_on_429(initial_backoff=4, jitter=False)
    @rate_limited("chat", tokens=0)
    def ask():
        for error in outcomes:
            raise error
        return "four"

    with no_waiting(), exported.tracer.start_as_current_span("mine"):
        ask()

    told = exported.told("mine")
    names = [name.removeprefix("resilience_kit.") for name, _ in told]
    assert [name for name in names if name != "waiting"] == ["rate_limited", "retrying", "retries_recovered"]
    (retrying,) = [said for name, said in told if name == "resilience_kit.retrying"]
    assert retrying["resilience_kit.error"] == "TooManyRequestsError"
    assert retrying["resilience_kit.told"] is False
    assert "my secret prompt" not in repr(told)


@pytest.mark.parametrize(
    ("ask", "error", "names"),
    [
        (
            lambda: rate_limited("chat", tokens=2, tokens_per_minute=1)(lambda: None),
            RateLimitTimeoutError,
            ["wait_refused"],
        ),
        (
            lambda: circuit_protected("chat", failure_threshold=1)(broken),
            ConnectionError,
            ["circuit_opened"],
        ),
        (
            lambda: token_budget("A", budget_tokens=1)(lambda prompt="one two": None),
            TokenBudgetExceededError,
            ["budget_refused"],
        ),
        (
            lambda: token_budget("A", max_tokens=2, on_exceed="truncate")(lambda prompt="one two three": None),
            None,
            ["truncated"],
        ),
        (lambda: retry_on_429(max_retries=0)(refused), TooManyRequestsError, ["retries_exhausted"]),
    ],
    ids=["limit", "circuit", "budget", "truncation", "retries"],
)
def test_a_span_is_told_of_what_goes_otherwise_than_planned(exported, ask, error, names):
    with exported.tracer.start_as_current_span("mine"), suppress(*([error] if error else [])):
        ask()()

    assert [name.removeprefix("resilience_kit.") for name, _ in exported.told("mine")] == names


def test_a_span_is_told_of_an_open_circuit(exported):
    ask = circuit_protected("chat", failure_threshold=1)(broken)
    with suppress(ConnectionError):
        ask()
    with exported.tracer.start_as_current_span("mine"), suppress(CircuitOpenError):
        ask()

    assert [name for name, _ in exported.told("mine")] == ["resilience_kit.circuit_refused"]


def test_where_no_span_is_recording_no_record_of_a_call_is_made(exported):
    spans = otel._Spans(exported.tracer)

    assert not spans.wants(events.Admitted)
    with trace.use_span(trace.NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)):
        assert not spans.wants(events.Admitted)
        spans.hear(events.CircuitHalfOpened(name="chat"))
    with exported.tracer.start_as_current_span("mine"):
        assert spans.wants(events.Admitted)
        assert not spans.wants(events.BudgetSettled)


def test_each_event_that_a_span_is_told_of_is_one_of_the_kits():
    assert all(issubclass(getattr(events, name), events.Event) for name in metric_names.SPAN_EVENTS)


# Without an SDK, and with an older API


def test_without_an_sdk_a_program_runs_and_ends_as_before():
    program = (
        "import resilience_kit as kit\n"
        "from resilience_kit.monitoring.otel import export_to_opentelemetry\n"
        "export_to_opentelemetry()\n"
        "print(kit.resilient('chat')(lambda prompt: 'four')('2 + 2?'))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - our own program

    assert (finished.stdout, finished.stderr) == ("four\n", "")


def test_what_is_queued_at_the_end_of_a_program_is_still_recorded():
    program = (
        "import resilience_kit as kit\n"
        "from opentelemetry.sdk.metrics import MeterProvider\n"
        "from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader\n"
        "from resilience_kit.monitoring.otel import export_to_opentelemetry\n"
        "export_to_opentelemetry(MeterProvider([PeriodicExportingMetricReader(ConsoleMetricExporter())]))\n"
        "kit.token_budget('MathAgent')(lambda prompt: {'usage': {'prompt_tokens': 30}})('2 + 2?')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - our own program

    assert "gen_ai.client.token.usage" in finished.stdout


def test_without_the_api_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, otel.__name__)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'resilience-kit\[otel\]'"):
        importlib.import_module(otel.__name__)


def test_an_api_without_advice_on_buckets_gets_none(exported):
    class OlderMeter:
        def create_histogram(self, name, unit="", description=""):
            return name, unit, description

    assert otel._histogram(OlderMeter(), "name", "s", "text", (1.0,)) == ("name", "s", "text")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_forked_child_goes_on_recording():
    program = (
        "import os, resilience_kit as kit\n"
        "from opentelemetry.sdk.metrics import MeterProvider\n"
        "from opentelemetry.sdk.metrics.export import InMemoryMetricReader\n"
        "from resilience_kit.monitoring.otel import export_to_opentelemetry\n"
        "reader = InMemoryMetricReader()\n"
        "stop = export_to_opentelemetry(MeterProvider([reader]))\n"
        "child = os.fork()\n"
        "if child:\n"
        "    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "kit.token_budget('MathAgent')(lambda prompt: {'usage': {'prompt_tokens': 30}})('2 + 2?')\n"
        "stop()\n"
        "print('gen_ai.client.token.usage' in reader.get_metrics_data().to_json(), flush=True)\n"
        "os._exit(0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - our own program

    assert finished.stdout == "True\n"
