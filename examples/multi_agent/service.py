"""Where the model is: on Azure if the environment says so, else the simulator on this machine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from openai import DEFAULT_MAX_RETRIES, AsyncAzureOpenAI, DefaultAsyncHttpxClient

from examples.multi_agent.offline_responder import respond
from examples.multi_agent.traffic import Traffic
from resilience_kit.stack import RateLimitOptions
from resilience_kit.testing import AzureOpenAISimulator

_NEEDED = ("AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_DEPLOYMENT")
_API_VERSION = "2024-10-21"


class IncompleteEnvironmentError(ValueError):
    """Some of Azure's variables are set, and some are not."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a deployment admits in `period` seconds; a minute on Azure, less where nobody wants to wait."""

    requests: int
    tokens: int
    period: float

    def __str__(self) -> str:
        return f"{self.requests} requests and {self.tokens:,} tokens in {self.period:g} s"

    def limits(self) -> RateLimitOptions:
        """Return what the kit must know of it."""
        return RateLimitOptions(
            requests_per_minute=self.requests,
            tokens_per_minute=self.tokens,
            period=self.period,
            max_concurrent=max(1, self.requests // 3),
            min_interval=self.period / self.requests / 10,
        )


@dataclass(frozen=True, slots=True)
class Service:
    """How to reach the model, and what the kit is told of its quota.

    Attributes:
        endpoint: The URL of the resource.
        api_key: Its key.
        deployment: The name of the model's deployment.
        api_version: The version of the API.
        limits: The quota; empty where the environment says it.
        simulator: None on Azure.
    """

    endpoint: str
    api_key: str = field(repr=False)
    deployment: str
    api_version: str = _API_VERSION
    limits: RateLimitOptions = field(default_factory=RateLimitOptions)
    simulator: AzureOpenAISimulator | None = None

    def client(self, traffic: Traffic, *, protected: bool) -> AsyncAzureOpenAI:
        """Make a client whose traffic is counted; below the kit it does not retry on its own."""
        return AsyncAzureOpenAI(
            azure_endpoint=self.endpoint,
            api_key=self.api_key,
            api_version=self.api_version,
            max_retries=0 if protected else DEFAULT_MAX_RETRIES,
            http_client=DefaultAsyncHttpxClient(
                event_hooks={"request": [traffic.count_request], "response": [traffic.count_response]}
            ),
        )


def azure_service(environment: Mapping[str, str]) -> Service | None:
    """Return the service that the environment names, or None if it names none.

    Raises:
        IncompleteEnvironmentError: It names one by half.
    """
    missing = [name for name in _NEEDED if not environment.get(name)]
    if len(missing) == len(_NEEDED):
        return None
    if missing:
        raise IncompleteEnvironmentError(
            f"to talk to Azure OpenAI, set {' and '.join(missing)} too; to use the simulator, set none of "
            f"{', '.join(_NEEDED)}"
        )
    endpoint, api_key, deployment = (environment[name] for name in _NEEDED)
    api_version = environment.get("AZURE_OPENAI_API_VERSION") or _API_VERSION
    return Service(endpoint, api_key, deployment, api_version)


@contextmanager
def simulated_service(quota: Quota) -> Iterator[Service]:
    """Simulate a deployment with this quota, none of which is used yet."""
    with AzureOpenAISimulator(
        rpm=quota.requests, tpm=quota.tokens, period=quota.period, latency=(0.03, 0.12), responder=respond
    ) as simulator:
        options = simulator.client_options()
        yield Service(
            endpoint=options["azure_endpoint"],
            api_key=options["api_key"],
            deployment="gpt-4o",
            api_version=options["api_version"],
            limits=quota.limits(),
            simulator=simulator,
        )
