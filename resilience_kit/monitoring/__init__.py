"""What turns events and statistics into something that a person or a system can watch.

A name is imported from its module when it is first used: what it needs is needed only then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience_kit.monitoring.alert_delivery import Webhook
    from resilience_kit.monitoring.alert_rules import Rule, Silence, load_rules
    from resilience_kit.monitoring.alerts import Alert, Alerts
    from resilience_kit.monitoring.costs import costs_of
    from resilience_kit.monitoring.fleet_samples import FleetSamples
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.otel import export_to_opentelemetry
    from resilience_kit.monitoring.prometheus import export_to_prometheus
    from resilience_kit.monitoring.report import report_on
    from resilience_kit.monitoring.sampler import Sampler, running_sampler

__all__ = [
    "Alert",
    "Alerts",
    "FleetSamples",
    "History",
    "Rule",
    "Sampler",
    "Silence",
    "Webhook",
    "costs_of",
    "export_to_opentelemetry",
    "export_to_prometheus",
    "load_rules",
    "report_on",
    "running_sampler",
]

_HOMES = {
    "Alert": "alerts",
    "Alerts": "alerts",
    "FleetSamples": "fleet_samples",
    "History": "history",
    "Rule": "alert_rules",
    "Sampler": "sampler",
    "Silence": "alert_rules",
    "Webhook": "alert_delivery",
    "costs_of": "costs",
    "export_to_opentelemetry": "otel",
    "export_to_prometheus": "prometheus",
    "load_rules": "alert_rules",
    "report_on": "report",
    "running_sampler": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
