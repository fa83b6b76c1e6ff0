"""The agents together: pick, let those who were picked work at the same time, join."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from openai import AsyncAzureOpenAI, OpenAIError

from examples.multi_agent.agents import ADXAgent, CoordinatorAgent, MathAgent
from examples.multi_agent.model_calls import QUOTA, ModelCall, bare_call, resilient_call
from examples.multi_agent.telemetry import Telemetry
from resilience_kit import ResilienceError, get_all_resilience_stats, reset_circuit_breakers
from resilience_kit.stack import RateLimitOptions


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and which agents found it."""

    question: str
    text: str
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LostAnswer:
    """A question that got no answer, because a call of the model failed."""

    question: str
    error: OpenAIError | ResilienceError


class MultiAgentSystem:
    """Three agents on one deployment. It is an async context manager, and closes its client at the end.

    Args:
        client: Made with `max_retries=0`, unless `protected` is False.
        deployment: The name of the model's deployment.
        telemetry: What the ADX agent queries.
        limits: The quota that the agents share; what it leaves out comes from the environment.
        protected: Whether there is a kit around each call; False is for comparing.
    """

    def __init__(
        self,
        client: AsyncAzureOpenAI,
        deployment: str,
        telemetry: Telemetry,
        *,
        limits: RateLimitOptions | None = None,
        protected: bool = True,
    ) -> None:
        def way_to_model(agent: str) -> ModelCall:
            if protected:
                return resilient_call(client, deployment, agent, limits or {})
            return bare_call(client, deployment)

        self._client = client
        agents = (MathAgent(way_to_model("MathAgent")), ADXAgent(way_to_model("ADXAgent"), telemetry))
        self._coordinator = CoordinatorAgent(way_to_model("CoordinatorAgent"), agents)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, question: str) -> Answer:
        """Answer one question.

        Raises:
            OpenAIError: The model could not be asked.
            ResilienceError: The kit refused a call.
        """
        agents = await self._coordinator.pick(question)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(agent.answer(question)) for agent in agents]
        except ExceptionGroup as failures:
            # The others were cancelled: one error says as much as the group, and is easier to catch.
            raise failures.exceptions[0] from None
        findings = [task.result() for task in tasks]
        text = await self._coordinator.join(question, findings)
        return Answer(question, text, tuple(finding.agent for finding in findings))

    async def ask_all(
        self,
        questions: Sequence[str],
        *,
        concurrency: int,
        on_answer: Callable[[Answer | LostAnswer], None] = lambda _: None,
    ) -> list[Answer | LostAnswer]:
        """Answer many questions.

        Args:
            questions: What to ask.
            concurrency: How many to work on at once.
            on_answer: Called with each answer as it comes.

        Returns:
            The answers, in the order of the questions.
        """
        free = asyncio.Semaphore(concurrency)

        async def ask_one(question: str) -> Answer | LostAnswer:
            async with free:
                answer: Answer | LostAnswer
                try:
                    answer = await self.ask(question)
                except (OpenAIError, ResilienceError) as error:
                    answer = LostAnswer(question, error)
            on_answer(answer)
            return answer

        return await asyncio.gather(*map(ask_one, questions))

    def get_resilience_stats(self) -> dict[str, Any]:
        """Return the kit's statistics; `global_resilience` describes the quota and circuit that the agents share."""
        stats = get_all_resilience_stats()
        circuit = stats["circuit_breakers"].get(QUOTA, stats["global_resilience"]["circuit_breaker"])
        limiter = stats["rate_limiters"].get(QUOTA, stats["global_resilience"]["rate_limiter"])
        return {**stats, "global_resilience": {"circuit_breaker": circuit, "rate_limiter": limiter}}

    def reset_circuit_breakers(self) -> None:
        """Close the agents' circuit, so that calls go out again at once."""
        reset_circuit_breakers(QUOTA)
