"""Drop-in clients for Azure OpenAI and OpenAI, and a service for Semantic Kernel, that behave well under limits."""

from typing import TYPE_CHECKING

from resilience_kit.lazy_names import lazy_names

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
    ".clients": ("ResilientAsyncAzureOpenAI", "ResilientAsyncOpenAI", "ResilientAzureOpenAI", "ResilientOpenAI"),
    ".semantic_kernel": ("create_resilient_azure_service",),
    "..stats": ("get_all_resilience_stats",),
}

# not for type checkers, to which a name that is misspelt is an error so
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
