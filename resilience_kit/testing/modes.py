"""Switches for tests: decorators off, waits skipped, names of their own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from resilience_kit import pricing, registry, stats


@contextmanager
def disabled() -> Iterator[None]:
    """Let decorated functions be called as if they were bare.

    Example:
        >>> from resilience_kit import rate_limited
        >>> from resilience_kit.testing import disabled
        >>> @rate_limited("chat", requests_per_minute=1)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> with disabled():
        ...     [ask("2 + 2?") for _ in range(3)]
        ['four', 'four', 'four']
    """
    before, registry.mode.disabled = registry.mode.disabled, True
    try:
        yield
    finally:
        registry.mode.disabled = before


@contextmanager
def no_waiting() -> Iterator[None]:
    """Take all decisions, and sleep for none: where a call would wait, the kit's clock jumps ahead instead.

    What waits for another call rather than for time, such as a free slot, still waits for that call.

    Example:
        >>> from resilience_kit import rate_limited
        >>> from resilience_kit.testing import no_waiting
        >>> @rate_limited("chat", requests_per_minute=1)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> with no_waiting():
        ...     [ask("2 + 2?") for _ in range(3)]
        ['four', 'four', 'four']
    """
    before, registry.mode.skips_waiting = registry.mode.skips_waiting, True
    try:
        yield
    finally:
        registry.mode.skips_waiting = before


@contextmanager
def isolated() -> Iterator[None]:
    """Give a test names, counters, settings and a fleet of its own; those of before are back after it.

    A function that was decorated before it keeps what its decorators say, and starts with all its quota.
    It holds for the whole process: two that overlap in different threads undo each other.

    Example:
        >>> from resilience_kit.testing import isolated
        >>> with isolated():
        ...     ...  # no limit, circuit or budget has been used yet
        Ellipsis
    """
    settings, registry.mode.settings = registry.mode.settings, None
    fleets, registry.mode.fleets = registry.mode.fleets, {}
    skipped = registry.mode.seconds_skipped
    with ExitStack() as stack:
        for kind in registry.all_registries:
            stack.enter_context(kind.isolated())
        stack.enter_context(stats.isolated())
        stack.enter_context(pricing.isolated())
        try:
            yield
        finally:
            registry.mode.settings = settings
            own, registry.mode.fleets = registry.mode.fleets, fleets
            for fleet in own.values():
                fleet.close()
            registry.mode.seconds_skipped = skipped
