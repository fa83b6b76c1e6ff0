"""What turns events and statistics into something that a person or a system can watch.

A name is imported from its module when it is first used: what it needs is needed only then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience_kit.monitoring.costs import costs_of
    from resilience_kit.monitoring.fleet_samples import FleetSamples
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.report import report_on
    from resilience_kit.monitoring.sampler import Sampler, running_sampler

__all__ = [
    "FleetSamples",
    "History",
    "Sampler",
    "costs_of",
    "report_on",
    "running_sampler",
]

_HOMES = {
    "FleetSamples": "fleet_samples",
    "History": "history",
    "Sampler": "sampler",
    "costs_of": "costs",
    "report_on": "report",
    "running_sampler": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
