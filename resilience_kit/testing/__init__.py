"""For tests of programs that use the kit: a simulator of Azure OpenAI, and switches for the decorators."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resilience_kit.testing.modes import disabled, isolated, no_waiting

if TYPE_CHECKING:
    from resilience_kit.testing.exchange import SimulatedAnswer, SimulatedRequest
    from resilience_kit.testing.faults import Fault
    from resilience_kit.testing.simulator import AzureOpenAISimulator
    from resilience_kit.testing.simulator_stats import SimulatorStats

__all__ = [
    "AzureOpenAISimulator",
    "Fault",
    "SimulatedAnswer",
    "SimulatedRequest",
    "SimulatorStats",
    "disabled",
    "isolated",
    "no_waiting",
]

# The simulator needs the extra `testing`; the switches need nothing, and load without it.
_HOMES = {
    "AzureOpenAISimulator": "simulator",
    "Fault": "faults",
    "SimulatedAnswer": "exchange",
    "SimulatedRequest": "exchange",
    "SimulatorStats": "simulator_stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
