"""A chat service for Semantic Kernel on the resilient client: one quota for all services, and an account an agent."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Unpack

from resilience_kit.azure.clients import ResilientAsyncAzureOpenAI
from resilience_kit.errors import ConfigurationError

if TYPE_CHECKING:
    from semantic_kernel.connectors.ai.open_ai import AzureChatCompletion

    from resilience_kit.stack import ResilientOptions

_API_VERSION = "2024-10-21"


def create_resilient_azure_service(
    service_id: str,
    api_key: str | None = None,
    endpoint: str | None = None,
    deployment_name: str | None = None,
    agent_name: str | None = None,
    *,
    name: str = "default",
    api_version: str = _API_VERSION,
    ad_token: str | None = None,
    ad_token_provider: Callable[[], str | Awaitable[str]] | None = None,
    **options: "Unpack[ResilientOptions]",
) -> "AzureChatCompletion":
    """Make a chat service for a kernel whose calls go through @resilient.

    Args:
        service_id: The service's name in the kernel.
        api_key: The key, if there is no token of Entra ID.
        endpoint: The URL of the Azure OpenAI resource.
        deployment_name: The deployment that answers.
        agent_name: Whose calls these are, outside of `with agent("..."):`. Default: "default".
        name: The name of the rate limit and of the circuit: services and clients with the same name share them.
        api_version: The version of Azure's API.
        ad_token: A token of Entra ID.
        ad_token_provider: A function, async or not, that returns a token of Entra ID; it is asked for each request.
        **options: Any parameter of `resilient`.

    Raises:
        ConfigurationError: An argument cannot work, or a name has another configuration elsewhere.
        ImportError: Semantic Kernel is not installed (extra `semantic-kernel`).

    Example:
        >>> from resilience_kit.azure import create_resilient_azure_service
        >>> service = create_resilient_azure_service(
        ...     "math", "KEY", "https://example.openai.azure.com", "gpt-4o", "MathAgent", requests_per_minute=600
        ... )
        >>> service.service_id
        'math'
    """
    try:
        from semantic_kernel.connectors.ai.open_ai import AzureChatCompletion
    except ImportError as error:
        raise ImportError(
            "create_resilient_azure_service needs Semantic Kernel: pip install 'resilience-kit[semantic-kernel]'"
        ) from error
    if api_key is not None and (ad_token is not None or ad_token_provider is not None):
        # openai 3.57 refuses both in words about its own arguments, and older ones send one of them
        raise ConfigurationError(
            f"create_resilient_azure_service({service_id!r}) was given a key and a token: leave out api_key, or "
            "ad_token and ad_token_provider"
        )
    client = ResilientAsyncAzureOpenAI(
        name=name,
        agent=agent_name,
        api_key=api_key,
        azure_endpoint=endpoint,
        azure_deployment=deployment_name,
        api_version=api_version,
        azure_ad_token=ad_token,
        azure_ad_token_provider=ad_token_provider,
        **options,
    )
    return AzureChatCompletion(service_id=service_id, deployment_name=deployment_name, async_client=client)
