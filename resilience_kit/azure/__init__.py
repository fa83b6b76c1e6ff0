"""Drop-in clients for Azure OpenAI and OpenAI, and a service for Semantic Kernel, that behave well under limits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience_kit.azure.clients import (
        ResilientAsyncAzureOpenAI,
        ResilientAsyncOpenAI,
        ResilientAzureOpenAI,
        ResilientOpenAI,
    )
    from resilience_kit.azure.semantic_kernel import create_resilient_azure_service
    from resilience_kit.stats import get_all_resilience_stats

__all__ = [
    "ResilientAsyncAzureOpenAI",
    "ResilientAsyncOpenAI",
    "ResilientAzureOpenAI",
    "ResilientOpenAI",
    "create_resilient_azure_service",
    "get_all_resilience_stats",
]

# openai takes half a second to import, and Semantic Kernel is an extra: each loads when a name of its is first used.
_HOMES = {
    "ResilientAsyncAzureOpenAI": "resilience_kit.azure.clients",
    "ResilientAsyncOpenAI": "resilience_kit.azure.clients",
    "ResilientAzureOpenAI": "resilience_kit.azure.clients",
    "ResilientOpenAI": "resilience_kit.azure.clients",
    "create_resilient_azure_service": "resilience_kit.azure.semantic_kernel",
    "get_all_resilience_stats": "resilience_kit.stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
