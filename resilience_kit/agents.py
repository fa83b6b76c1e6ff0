"""Whose call it is: `with agent("MathAgent"):` accounts the calls inside it to an agent."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from resilience_kit.validating import check_numbers, check_texts


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent at work: its name, the priority of its calls if it has one of its own, and what it works on."""

    name: str
    priority: float | None = None
    context: str | None = None


_current: ContextVar[Agent | None] = ContextVar("resilience_kit_agent", default=None)


@contextmanager
def agent(name: str, *, priority: float | None = None, context: str | None = None) -> Iterator[Agent]:
    """Account the calls made inside to an agent; tasks that are started inside inherit it, and the innermost counts.

    Args:
        name: The agent's name in statistics. Its longest prompt is that of its own variable, as MATH_AGENT_MAX_TOKENS
            for "MathAgent", and its budget is its own where `token_budget` gives it one.
        priority: The priority of its calls, in place of the decorator's or the client's; lower is sooner.
        context: What the calls are for, as "nightly-report": `token_manager.get_usage_insights()` shows their usage by
            context. Default: that of the block around this one, else "default".

    Raises:
        ConfigurationError: The name or the context is not a text, or the priority not a number.

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
    around = current_agent()
    if context is not None:
        check_texts("agent", context=context)
    elif around is not None:
        context = around.context
    entered = Agent(name, priority, context)
    token = _current.set(entered)
    try:
        yield entered
    finally:
        _current.reset(token)


def current_agent() -> Agent | None:
    """The agent whose call this is, if anybody said so."""
    return _current.get()
