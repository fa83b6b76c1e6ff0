"""For tests of programs that use the kit: a simulator of Azure OpenAI, and switches for the decorators."""

from typing import TYPE_CHECKING

from resilience_kit.lazy_names import lazy_names
from resilience_kit.testing.modes import disabled, isolated, no_waiting
from resilience_kit.virtual_time import VirtualTimeLoop

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
    "VirtualTimeLoop",
    "disabled",
    "isolated",
    "no_waiting",
]

# The simulator needs the extra `testing`; the switches need nothing, and load without it.
_HOMES = {
    ".exchange": ("SimulatedAnswer", "SimulatedRequest"),
    ".faults": ("Fault",),
    ".simulator": ("AzureOpenAISimulator",),
    ".simulator_stats": ("SimulatorStats",),
}

# not for type checkers, to which a name that is misspelt is an error so
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
