"""Whose call it is: `with agent("MathAgent"):` accounts the calls inside it to an agent."""

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import TracebackType

from resilience_kit import priorities
from resilience_kit.context_blocks import ContextBlock
from resilience_kit.validating import check_numbers, check_texts


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent at work: its name, the priority of its calls if it has one of its own, and what it works on."""

    name: str
    priority: float | None = None
    context: str | None = None


_current: ContextVar[Agent] = ContextVar("resilience_kit_agent")


class _Block(ContextBlock[Agent]):
    """The block of an agent, and of the priority of its calls if it has one of its own."""

    __slots__ = ("_agent", "_priority")

    def __init__(self, agent: Agent) -> None:
        super().__init__(_current, agent)
        self._agent = agent
        self._priority = None if agent.priority is None else priorities.priority(agent.priority)

    def __enter__(self) -> Agent:
        around = current_agent()
        self._value = self._agent
        if self._agent.context is None and around is not None:
            self._value = replace(self._agent, context=around.context)
        entered = super().__enter__()
        if self._priority is not None:
            self._priority.__enter__()
        return entered

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._priority is not None:
            self._priority.__exit__(error_type, error, traceback)
        super().__exit__(error_type, error, traceback)


def agent(name: str, *, priority: float | None = None, context: str | None = None) -> AbstractContextManager[Agent]:
    """Account the calls made inside to an agent; tasks that are started inside inherit it, and the innermost counts.

    A block with a `yield` in it lasts while the generator waits, for its reader too: put it around the calls alone.

    Args:
        name: The agent's name in statistics. Its longest prompt is that of its own variable, as MATH_AGENT_MAX_TOKENS
            for "MathAgent", and its budget is its own where `token_budget` gives it one.
        priority: The priority of its calls, as `priority()` gives it; lower is sooner. Default: that of the block
            around this one, else the decorator's or the client's.
        context: What the calls are for, as "nightly-report": `token_manager.get_usage_insights()` shows their usage by
            context. Default: that of the block around this one, else "default".

    Raises:
        ConfigurationError: The name or the context is not a text, or the priority not a number; or a block is entered
            that another task is in.

    Example:
        >>> from resilience_kit import agent, get_all_resilience_stats, token_budget
        >>> @token_budget
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> with agent("MathAgent"):
        ...     ask("What is 2 + 2?")
        'four'
        >>> get_all_resilience_stats()["agents"]["MathAgent"]["calls"]
        1
    """
    check_texts("agent", name=name)
    check_numbers("agent", priority=priority)
    if context is not None:
        check_texts("agent", context=context)
    return _Block(Agent(name, priority, context))


def current_agent() -> Agent | None:
    """The agent whose call this is, if anybody said so."""
    return _current.get(None)
