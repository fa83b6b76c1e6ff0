"""OpenTelemetry (extra `otel`, the API alone): metrics of calls, and events on the span that a call belongs to.

    pip install 'resilience-kit[otel]' opentelemetry-sdk
    python examples/with_otel.py

Which SDK and which exporter there are is the program's choice; without any, nothing is recorded, and nothing fails.
"""

from importlib.util import find_spec

from opentelemetry import metrics, trace

from resilience_kit import rate_limited
from resilience_kit.monitoring import export_to_opentelemetry


@rate_limited("chat", requests_per_minute=600, min_interval=0)
def ask(prompt: str) -> str:
    """Stand here for the call of your model."""
    return "An answer"


def main() -> None:
    """Ask within a span; with an SDK, the metrics are printed at the end."""
    if find_spec("opentelemetry.sdk") is None:
        print("No SDK is installed, so nothing is recorded: pip install opentelemetry-sdk")
    else:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

        metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(ConsoleMetricExporter())]))

    export_to_opentelemetry()
    with trace.get_tracer("my-program").start_as_current_span("answer a user"):
        for number in range(1, 4):
            print(ask(f"Question {number}"))


if __name__ == "__main__":
    main()
