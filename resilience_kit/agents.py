"""Whose call it is: `with agent("MathAgent"):` accounts the calls inside it to an agent."""

from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from types import TracebackType

from resilience_kit.validating import check_numbers, check_texts


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent at work: its name, the priority of its calls if it has one of its own, and what it works on."""

    name: str
    priority: float | None = None
    context: str | None = None


_current: ContextVar[Agent | None] = ContextVar("resilience_kit_agent", default=None)


class _Block(AbstractContextManager[Agent]):
    """The block of an agent. It is no decorator: a coroutine function would only be called inside, and run outside."""

    __slots__ = ("_agent", "_token")

    _token: Token[Agent | None]

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def __enter__(self) -> Agent:
        around = current_agent()
        entered = self._agent
        if entered.context is None and around is not None:
            entered = replace(entered, context=around.context)
        self._token = _current.set(entered)
        return entered

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # a generator may be ended in another context, where there is nothing to put back
        with suppress(ValueError):
            _current.reset(self._token)


def agent(name: str, *, priority: float | None = None, context: str | None = None) -> AbstractContextManager[Agent]:
    """Account the calls made inside to an agent; tasks that are started inside inherit it, and the innermost counts.

    A block with a `yield` in it lasts while the generator waits, for its reader too: put it around the calls alone.

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
    if context is not None:
        check_texts("agent", context=context)
    return _Block(Agent(name, priority, context))


def current_agent() -> Agent | None:
    """The agent whose call this is, if anybody said so."""
    return _current.get()
