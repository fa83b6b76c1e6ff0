"""The three agents: one computes, one queries, and one picks those two and joins what they found."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.chat import (
    ChatCompletion,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionMessageParam,
)

from examples.multi_agent import calculator, telemetry
from examples.multi_agent.model_calls import ModelCall

# Azure charges each request with these when it arrives, however short the answer is: no more than an answer needs.
_MOST_ANSWER_TOKENS = 200
# A model that has not answered after so many calls goes in circles.
_MOST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model may call: a function of one text, which may block, and says with a ValueError what is wrong."""

    name: str
    description: str
    parameter: str
    run: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one agent found."""

    agent: str
    text: str


class ToolAgent:
    """An agent that answers with the help of one tool."""

    def __init__(self, name: str, task: str, tool: Tool, call_model: ModelCall) -> None:
        self.name = name
        self.task = task
        self._tool = tool
        self._call_model = call_model

    async def answer(self, question: str) -> Finding:
        """Let the model use the tool until it answers."""
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": f"You are {self.name}. {self.task} Then answer in one sentence."},
            {"role": "user", "content": question},
        ]
        tool = _function_tool(self._tool.name, self._tool.description, self._tool.parameter, {"type": "string"})
        for _ in range(_MOST_TURNS):
            completion = await self._call_model(messages=messages, tools=[tool], max_tokens=_MOST_ANSWER_TOKENS)
            calls = _tool_calls(completion)
            if not calls:
                return Finding(self.name, _text(completion))
            messages.append({"role": "assistant", "tool_calls": [_as_request(call) for call in calls]})
            results = await asyncio.gather(*map(self._use_tool, calls))
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": result}
                for call, result in zip(calls, results, strict=True)
            ]
        return Finding(self.name, "I found no answer.")

    async def _use_tool(self, call: ChatCompletionMessageFunctionToolCall) -> str:
        argument = _arguments(call).get(self._tool.parameter)
        if not isinstance(argument, str):
            return f"error: {self._tool.name} needs a text, {self._tool.parameter}"
        try:
            # In a thread, so that neither a long computation nor a database holds up the other agents.
            return await asyncio.to_thread(self._tool.run, argument)
        except ValueError as error:
            return f"error: {error}"


class MathAgent(ToolAgent):
    """Computes."""

    def __init__(self, call_model: ModelCall) -> None:
        notation = "Exact arithmetic in Python's notation: + - * / // % ** sqrt sin cos tan exp log abs pi e"
        tool = Tool("calculate", notation, "expression", calculator.calculate)
        super().__init__("MathAgent", "Compute the arithmetic in the question with the tool.", tool, call_model)


class ADXAgent(ToolAgent):
    """Queries a database of Azure Data Explorer."""

    def __init__(self, call_model: ModelCall, database: telemetry.Telemetry) -> None:
        tables = f"Run a KQL query on these tables: {database.tables}"
        tool = Tool("run_kql", tables, "query", lambda query: telemetry.run_kql(database, query))
        super().__init__("ADXAgent", "Look up what the question asks of telemetry with one query.", tool, call_model)


class CoordinatorAgent:
    """Picks the agents for a question, and joins their findings into one answer."""

    name = "CoordinatorAgent"

    def __init__(self, call_model: ModelCall, agents: Sequence[ToolAgent]) -> None:
        self._call_model = call_model
        self._agents = agents

    async def pick(self, question: str) -> list[ToolAgent]:
        """Ask the model who can help; nobody is an answer too."""
        names = [agent.name for agent in self._agents]
        duties = "\n".join(f"{agent.name}: {agent.task}" for agent in self._agents)
        schema: dict[str, object] = {"type": "array", "items": {"type": "string", "enum": names}}
        completion = await self._call_model(
            messages=[
                {"role": "system", "content": f"You are {self.name}. Pick all agents that can help.\n{duties}"},
                {"role": "user", "content": question},
            ],
            tools=[_function_tool("pick_agents", "Pick the agents.", "agents", schema)],
            tool_choice="required",
            max_tokens=_MOST_ANSWER_TOKENS,
        )
        picked = [name for call in _tool_calls(completion) for name in _arguments(call).get("agents") or ()]
        return [agent for agent in self._agents if agent.name in picked]

    async def join(self, question: str, findings: Sequence[Finding]) -> str:
        """Ask the model for one answer from all findings."""
        found = [f"{finding.agent}: {finding.text}" for finding in findings] or ["No agent could help."]
        completion = await self._call_model(
            messages=[
                {"role": "system", "content": f"You are {self.name}. Answer from the agents' findings alone."},
                {"role": "user", "content": "\n".join([question, *found])},
            ],
            max_tokens=_MOST_ANSWER_TOKENS,
        )
        return _text(completion)


def _function_tool(
    name: str, description: str, parameter: str, schema: dict[str, object]
) -> ChatCompletionFunctionToolParam:
    parameters: dict[str, object] = {"type": "object", "properties": {parameter: schema}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _tool_calls(completion: ChatCompletion) -> list[ChatCompletionMessageFunctionToolCall]:
    calls = completion.choices[0].message.tool_calls or []
    return [call for call in calls if call.type == "function"]


def _as_request(call: ChatCompletionMessageFunctionToolCall) -> ChatCompletionMessageFunctionToolCallParam:
    """A call as it goes back to the model, so that the tool's result has something to refer to."""
    function = call.function
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": function.name, "arguments": function.arguments},
    }


def _arguments(call: ChatCompletionMessageFunctionToolCall) -> dict[str, Any]:
    """What the model wrote as arguments; nothing if that is not a JSON object."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _text(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""
