"""How urgent calls are: `with priority(-1):` gives those inside a priority, in place of that of their decorators."""

from contextlib import AbstractContextManager
from contextvars import ContextVar

from resilience_kit.context_blocks import ContextBlock
from resilience_kit.errors import ConfigurationError
from resilience_kit.validating import is_number

_current: ContextVar[float] = ContextVar("resilience_kit_priority")

# The priority that the innermost block gives, else the one that is passed. All that a call pays is this one look-up.
priority_else = _current.get


def priority(value: float) -> AbstractContextManager[float]:
    """Give the calls made inside a priority, in place of that of their decorators or client; the innermost counts.

    Tasks that are started inside inherit it, and so does `asyncio.to_thread`. `agent(..., priority=)` says the same of
    an agent's calls, and an `agent` without a priority changes none. A block with a `yield` in it lasts while the
    generator waits, for its reader too: put it around the calls alone.

    A step of priority is worth one period of waiting (60 s): calls of priority 1 are overtaken by those of priority 0
    that come within the first minute of their wait, and by none that come later. So nobody waits for ever; and within
    a priority it is first come, first served, whatever the size.

    Args:
        value: Lower is sooner, and 0 what is said of nobody. Fractions are of a period.

    Raises:
        ConfigurationError: It is not a number, or a block is entered that another task is in.

    Example:
        >>> from resilience_kit import priority, rate_limited
        >>> @rate_limited("chat")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> with priority(-1):  # somebody sits and waits for this one
        ...     ask("What is 2 + 2?")
        'four'
    """
    if not is_number(value):
        raise ConfigurationError(f"priority({value!r}): expected a number; lower is sooner, and 0 is the default")
    return ContextBlock(_current, value)
