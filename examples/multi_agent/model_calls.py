"""How an agent calls the model: the bare client, and the same call with one decorator above it."""

from collections.abc import Sequence
from typing import Literal, Protocol, Required, TypedDict, Unpack

from openai import AsyncAzureOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from resilience_kit import resilient
from resilience_kit.stack import RateLimitOptions

# One deployment has one quota, so that all agents share one name.
QUOTA = "azure-openai"


class ModelRequest(TypedDict, total=False):
    """What the agents ask with; the kit reads from it how many tokens a call will cost."""

    messages: Required[Sequence[ChatCompletionMessageParam]]
    max_tokens: Required[int]
    tools: Sequence[ChatCompletionFunctionToolParam]
    tool_choice: Literal["auto", "required"]


class ModelCall(Protocol):
    """One agent's way to the model."""

    async def __call__(self, **request: Unpack[ModelRequest]) -> ChatCompletion:
        """Ask for a chat completion."""
        ...


def resilient_call(client: AsyncAzureOpenAI, deployment: str, agent: str, limits: RateLimitOptions) -> ModelCall:
    """Return an agent's way to the model with the whole kit around it.

    Args:
        client: Made with `max_retries=0`: there is one retry loop, and it is the kit's.
        deployment: The name of the model's deployment.
        agent: Whose account the tokens go to; "MathAgent" sends no longer prompts than MATH_AGENT_MAX_TOKENS.
        limits: The quota. What it leaves out comes from the environment, see `rate-limiting.env`.
    """

    @resilient(QUOTA, agent=agent, **limits)
    async def call_model(**request: Unpack[ModelRequest]) -> ChatCompletion:
        return await client.chat.completions.create(model=deployment, **request)

    return call_model


def bare_call(client: AsyncAzureOpenAI, deployment: str) -> ModelCall:
    """Return the same without the kit: the SDK alone, with the retries that its client is set to."""

    async def call_model(**request: Unpack[ModelRequest]) -> ChatCompletion:
        return await client.chat.completions.create(model=deployment, **request)

    return call_model
