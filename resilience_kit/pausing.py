"""Holding all new calls of a rate limit back for a while, by hand."""

from resilience_kit.errors import ConfigurationError
from resilience_kit.rate_limits import RateLimit, rate_limits
from resilience_kit.registry import listed


def pause(name: str = "default") -> None:
    """Let new calls of a rate limit wait until `resume`, in this process; those that are under way go on.

    A call that has a `max_wait` gives up after it, as it does where no slot becomes free. `reset_all()` ends a pause.

    Args:
        name: The limit's name.

    Raises:
        ConfigurationError: No limit of that name is in use.

    Example:
        >>> from resilience_kit import get_all_resilience_stats, rate_limited
        >>> from resilience_kit.pausing import pause, resume
        >>> @rate_limited("reports")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("2 + 2?")
        'four'
        >>> pause("reports")
        >>> get_all_resilience_stats()["rate_limiters"]["reports"]["paused"]
        1
        >>> resume("reports")
    """
    _in_use(name).pause()


def resume(name: str = "default") -> None:
    """Let the calls of a paused rate limit go on, in the order in which they came; nothing where it is not paused.

    Args:
        name: The limit's name.

    Raises:
        ConfigurationError: No limit of that name is in use.

    Example:
        >>> from resilience_kit import rate_limited
        >>> from resilience_kit.pausing import resume
        >>> @rate_limited("mails")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("2 + 2?")
        'four'
        >>> resume("mails")
    """
    _in_use(name).pause(paused=False)


def _in_use(name: str) -> RateLimit:
    found = rate_limits.items().get(name)
    if found is None:
        raise ConfigurationError(f"no rate limit {name!r} is in use. Known names: {listed(rate_limits.items())}")
    return found
