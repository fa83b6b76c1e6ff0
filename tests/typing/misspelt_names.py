"""A name that is misspelt is an error for type checkers: strict mypy refuses each ignore below that is not needed."""

from resilience_kit import retry_on_430  # type: ignore[attr-defined]  # this is what is checked
from resilience_kit.azure import ResilientAzureAI  # type: ignore[attr-defined]  # this is what is checked
from resilience_kit.monitoring import Histories  # type: ignore[attr-defined]  # this is what is checked
from resilience_kit.testing import AzureSimulator  # type: ignore[attr-defined]  # this is what is checked

__all__ = ["AzureSimulator", "Histories", "ResilientAzureAI", "retry_on_430"]
