"""What the kit counts and does, for OpenTelemetry: metrics, and events on a program's spans. Needs the extra `otel`.

Only OpenTelemetry's API is used: where a program sets up no SDK, nothing is made. A call pays for a queue: recording a
measurement takes opentelemetry-sdk 1.45 some 10 µs, so a thread does it. A span is told of waits, retries, refusals and
circuits in the call itself, and only where one is recording.
"""

import atexit
import inspect
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from resilience_kit import events, stats
from resilience_kit.events import Admitted, Answered, BudgetSettled, Event
from resilience_kit.monitoring import metric_names
from resilience_kit.monitoring.measures import BOUNDS
from resilience_kit.monitoring.metric_names import CIRCUIT_STATE, METRICS, Metric, names_by_section, states

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation
    from opentelemetry.trace import TracerProvider
except ImportError as error:
    raise ImportError(f"{error}: pip install 'resilience-kit[otel]'") from error

_SECOND = 1.0
# More calls than a process can make in two seconds: only a thread that was held up for longer loses the oldest.
_MOST_QUEUED = 200_000
_PATIENCE = 5.0
_SCOPE = "resilience_kit"

_log = logging.getLogger("resilience_kit.monitoring")

# What a span is told of: a call that is admitted is shown as the span of its wait.
_SHOWN = frozenset({Admitted, *(getattr(events, name) for name in metric_names.SPAN_EVENTS)})

Attributes = Mapping[str, str | int | float | bool]
_Queued = tuple[type[Event], str, tuple[Any, ...]]


def export_to_opentelemetry(
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    *,
    operation: str = "chat",
    provider: str = "azure.ai.openai",
) -> Callable[[], None]:
    """Send all that the kit counts, and tell the spans of a program what its calls wait for.

    The metrics `gen_ai.client.token.usage` and `gen_ai.client.operation.duration` are those of the semantic conventions
    for generative AI. All else that `get_all_resilience_stats()` has is named `resilience_kit.…`. The span that is
    current when a call waits, is refused or tries again gets an event; a wait is also a span of its own beneath it.

    Args:
        meter_provider: Default: the one that is set for the process.
        tracer_provider: Default: the one that is set for the process.
        operation: The attribute `gen_ai.operation.name`: what the calls are for, as "chat" or "embeddings".
        provider: The attribute `gen_ai.provider.name`: who serves them, as "openai".

    Returns:
        A function that ends it; calling it again does nothing. A program that ends needs not call it: what was counted
        last is still sent, by providers that were there before this was called.

    Example:
        >>> from resilience_kit.monitoring.otel import export_to_opentelemetry
        >>> stop = export_to_opentelemetry()
        >>> stop()
    """
    common = {metric_names.OPERATION_NAME: operation, metric_names.PROVIDER_NAME: provider}
    meters = _Metrics(metrics.get_meter(_SCOPE, meter_provider=meter_provider), common)
    spans = _Spans(trace.get_tracer(_SCOPE, tracer_provider=tracer_provider))
    end_spans = events.subscribe(spans.hear, wants=spans.wants)
    end_metrics = events.subscribe(meters.hear, tally=meters.tally, times_answers=True)

    # before those who export end, if they were there first: the last to register is the first to be called
    atexit.register(meters.flush)

    def stop() -> None:
        end_spans()
        end_metrics()
        atexit.unregister(meters.flush)
        meters.close()

    return stop


class _Metrics:
    """Observes what is counted, and records what was queued, in a thread of its own."""

    def __init__(self, meter: Meter, common: Attributes) -> None:
        self._common = common
        self._names = names_by_section()
        self._shown: tuple[float, dict[str, Any]] = (-1.0, {})
        self._is_open = True
        self._has_failed = False
        self._tokens = _histogram(
            meter,
            metric_names.TOKEN_USAGE,
            "{token}",
            "Number of input and output tokens used.",
            metric_names.TOKEN_USAGE_BOUNDS,
        )
        self._durations = _histogram(
            meter,
            metric_names.OPERATION_DURATION,
            "s",
            "GenAI operation duration.",
            metric_names.OPERATION_DURATION_BOUNDS,
        )
        wait = metric_names.WAIT
        self._waits = _histogram(meter, wait.opentelemetry, wait.opentelemetry_unit, wait.text, BOUNDS)
        for metric in (*METRICS, CIRCUIT_STATE):
            self._observe(meter, metric)
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._queue: deque[_Queued] = deque(maxlen=_MOST_QUEUED)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._end,), name="resilience-kit-otel", daemon=True)
        self._thread.start()

    def start_anew(self) -> None:
        """Go on in a forked child: the thread is the parent's, and so is what it has not recorded yet."""
        if self._is_open:
            self._start()

    def flush(self) -> None:
        """Record what is left, and end the thread."""
        self._end.set()
        self._thread.join(_PATIENCE)

    def close(self) -> None:
        """Record what is left, and show nothing from now on."""
        self._is_open = False
        self.flush()

    # What a call pays for

    def tally(self, kind: type[Event], name: str, values: tuple[Any, ...]) -> None:
        if kind is Answered or kind is BudgetSettled or (kind is Admitted and values[0]):
            self._queue.append((kind, name, values))

    def hear(self, event: Event) -> None:
        name, *values = (getattr(event, field.name) for field in fields(event))
        self.tally(type(event), name, tuple(values))

    # Its thread

    def _run(self, end: threading.Event) -> None:
        while not end.wait(_SECOND):
            self._record_queued()
        self._record_queued()

    def _record_queued(self) -> None:
        for _ in range(len(self._queue)):
            try:
                self._record(*self._queue.popleft())
            except Exception as error:  # noqa: BLE001 - an SDK may raise anything, and is asked again
                if not self._has_failed:
                    self._has_failed = True
                    _log.warning("recording a measurement raised %s", type(error).__name__)

    def _record(self, kind: type[Event], name: str, values: tuple[Any, ...]) -> None:
        if kind is BudgetSettled:
            self._record_usage(name, values)
            return
        limit = {_attribute("limit"): self._names["rate_limiters"].shown(name)}
        if kind is Answered:
            self._durations.record(values[0], {**self._common, **limit})
        else:
            self._waits.record(values[0], limit)

    def _record_usage(self, agent: str, values: tuple[Any, ...]) -> None:
        _, prompt_tokens, completion_tokens, _, model = values
        if model is None:
            # nothing is known of the use
            return
        attributes = {
            **self._common,
            metric_names.REQUEST_MODEL: self._names["models"].shown(model),
            metric_names.AGENT_NAME: self._names["agents"].shown(agent),
        }
        for kind, tokens in (("input", prompt_tokens), ("output", completion_tokens)):
            self._tokens.record(tokens, {**attributes, metric_names.TOKEN_TYPE: kind})

    # What is asked for by whoever exports

    def _observe(self, meter: Meter, metric: Metric) -> None:
        create = meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
        create(
            metric.opentelemetry,
            callbacks=[lambda options: self._observations(metric, options)],
            unit=metric.opentelemetry_unit,
            description=metric.text,
        )

    def _observations(self, metric: Metric, options: CallbackOptions) -> Iterable[Observation]:
        # the API has no way to take a callback back
        if not self._is_open:
            return []
        at, shown = self._shown
        # one look serves all that are asked for together
        if time.monotonic() - at > _SECOND / 2:
            shown = stats.get_all_resilience_stats()
            self._shown = (time.monotonic(), shown)
        names, section = self._names[metric.section], shown[metric.section]
        found = states(section, names) if metric is CIRCUIT_STATE else metric.values(section, names)
        keys = [_attribute(label) for label in metric.labels]
        return [Observation(value, dict(zip(keys, labels, strict=True))) for labels, value in found.items()]


class _Spans:
    """Tells the current span what happens to the call."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def wants(self, kind: type[Event]) -> bool:
        return kind in _SHOWN and trace.get_current_span().is_recording()

    def hear(self, event: Event) -> None:
        span = trace.get_current_span()
        if not span.is_recording():
            return
        if isinstance(event, Admitted):
            if event.waited:
                self._show_wait(event)
        elif type(event) in _SHOWN:
            span.add_event(metric_names.SPAN_EVENTS[type(event).__name__], _attributes(event))

    def _show_wait(self, event: Admitted) -> None:
        # it is over: what the call does next is not beneath it
        end = time.time_ns()
        start = end - round(event.waited * 1e9)
        span = self._tracer.start_span(metric_names.WAIT_SPAN, start_time=start, attributes=_attributes(event))
        span.end(end)


def _attributes(event: Event) -> dict[str, str | int | float | bool]:
    values = {_attribute(field.name): getattr(event, field.name) for field in fields(event)}
    return {
        key: metric_names.sendable(value[: metric_names.LONGEST_VALUE]) if isinstance(value, str) else value
        for key, value in values.items()
        if value is not None
    }


def _attribute(name: str) -> str:
    return f"{metric_names.PREFIX}.{name}"


def _histogram(meter: Meter, name: str, unit: str, text: str, bounds: Iterable[float]) -> Histogram:
    # opentelemetry-api has this advice for the SDK since 1.30
    if "explicit_bucket_boundaries_advisory" not in inspect.signature(meter.create_histogram).parameters:
        return meter.create_histogram(name, unit=unit, description=text)
    return meter.create_histogram(name, unit=unit, description=text, explicit_bucket_boundaries_advisory=[*bounds])


_all: "weakref.WeakSet[_Metrics]" = weakref.WeakSet()


def _start_anew() -> None:
    for each in [*_all]:
        each.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
