"""What turns events and statistics into something that a person or a system can watch.

A name is imported from its module when it is first used: what it needs is needed only then.
"""

from typing import TYPE_CHECKING

from resilience_kit.lazy_names import lazy_names

if TYPE_CHECKING:
    from resilience_kit.monitoring.alert_delivery import Webhook
    from resilience_kit.monitoring.alert_rules import Rule, Silence, load_rules
    from resilience_kit.monitoring.alerts import Alert, Alerts
    from resilience_kit.monitoring.costs import costs_of
    from resilience_kit.monitoring.fleet_alerts import FleetAlerts
    from resilience_kit.monitoring.fleet_samples import FleetSamples
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.otel import export_to_opentelemetry
    from resilience_kit.monitoring.prometheus import export_to_prometheus
    from resilience_kit.monitoring.report import report_on
    from resilience_kit.monitoring.sampler import Sampler, running_sampler

__all__ = [
    "Alert",
    "Alerts",
    "FleetAlerts",
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
    ".alert_delivery": ("Webhook",),
    ".alert_rules": ("Rule", "Silence", "load_rules"),
    ".alerts": ("Alert", "Alerts"),
    ".costs": ("costs_of",),
    ".fleet_alerts": ("FleetAlerts",),
    ".fleet_samples": ("FleetSamples",),
    ".history": ("History",),
    ".otel": ("export_to_opentelemetry",),
    ".prometheus": ("export_to_prometheus",),
    ".report": ("report_on",),
    ".sampler": ("Sampler", "running_sampler"),
}

# not for type checkers, to which a name that is misspelt is an error so
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
