"""What the clients' constructors take, for type checkers: the openai SDK's own arguments beside those of @resilient."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx2
from openai import NotGiven, Timeout

from resilience_kit.stack import ResilientOptions


class _ClientOptions(ResilientOptions, total=False):
    admin_api_key: str | None
    organization: str | None
    project: str | None
    webhook_secret: str | None
    websocket_base_url: str | httpx2.URL | None
    workload_identity: Any
    timeout: float | Timeout | NotGiven | None
    default_headers: Mapping[str, str] | None
    default_query: Mapping[str, object] | None


class _SyncOptions(_ClientOptions, total=False):
    api_key: str | Callable[[], str] | None
    http_client: httpx2.Client | None


class _AsyncOptions(_ClientOptions, total=False):
    api_key: str | Callable[[], Awaitable[str]] | None
    http_client: httpx2.AsyncClient | None


class _OpenAIOptions(_ClientOptions, total=False):
    base_url: str | httpx2.URL | NotGiven | None
    data_residency: Any
    provider: Any


class _AzureOptions(_ClientOptions, total=False):
    azure_endpoint: str | None
    azure_deployment: str | None
    azure_ad_token: str | None
    api_version: str | None
    base_url: str | None


class OpenAIOptions(_SyncOptions, _OpenAIOptions, total=False):
    """The arguments of `ResilientOpenAI`."""


class AsyncOpenAIOptions(_AsyncOptions, _OpenAIOptions, total=False):
    """The arguments of `ResilientAsyncOpenAI`."""


class AzureOpenAIOptions(_SyncOptions, _AzureOptions, total=False):
    """The arguments of `ResilientAzureOpenAI`."""

    azure_ad_token_provider: Callable[[], str] | None


class AsyncAzureOpenAIOptions(_AsyncOptions, _AzureOptions, total=False):
    """The arguments of `ResilientAsyncAzureOpenAI`."""

    azure_ad_token_provider: Callable[[], str | Awaitable[str]] | None
