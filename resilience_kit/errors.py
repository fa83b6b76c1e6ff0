"""The errors that the kit raises.

    ResilienceError
    ├── ConfigurationError (ValueError)                      written wrongly: the message says what to write
    ├── RateLimitTimeoutError (TimeoutError)                 the wait for a slot would be longer than allowed
    ├── CircuitOpenError (pybreaker.CircuitBreakerError)     the service is ill: nothing was sent
    └── TokenBudgetExceededError                             more tokens or money than the agent may use
    StackOrderWarning (UserWarning)                          decorators that are stacked in a harmful order

What the decorated function itself raises is never replaced by one of these.
"""

from typing import Any

import pybreaker


def _restored(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def _reduced(error: BaseException) -> tuple[Any, ...]:
    """How an error is pickled and copied: Python would call its constructor without the keywords that it needs."""
    return _restored, (type(error), error.args), vars(error)


class ResilienceError(Exception):
    """Whatever the kit itself raises; catch it to catch them all."""

    __reduce__ = _reduced


class ConfigurationError(ResilienceError, ValueError):
    """An argument, a setting or a combination of decorators that cannot work."""


class RateLimitTimeoutError(ResilienceError, TimeoutError):
    """The wait for a slot would be longer than the caller allows.

    Attributes:
        name: The limit's name.
        retry_after: Seconds until the request would be admitted; None if it never would be.
    """

    def __init__(self, message: str, *, name: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.name = name
        self.retry_after = retry_after


class CircuitOpenError(ResilienceError, pybreaker.CircuitBreakerError):
    """The circuit is open, or half-open with all its trials taken: nothing was sent.

    Attributes:
        name: The circuit's name.
        retry_after: Seconds until the circuit lets a trial through; 0 while trials are under way.
    """

    def __init__(self, message: str, *, name: str, retry_after: float) -> None:
        super().__init__(message)
        self.name = name
        self.retry_after = retry_after


class TokenBudgetExceededError(ResilienceError):
    """A call would use more than its agent may: nothing was sent.

    Attributes:
        agent: The agent's name.
        limit: What the agent may use, in `unit`.
        requested: What the call asked for, in `unit`.
        remaining: What is left, in `unit`.
        unit: "tokens" or "USD".
        retry_after: Seconds until the budget's period turns; None if it does not, or if that would not help.
    """

    def __init__(
        self,
        message: str,
        *,
        agent: str,
        limit: float,
        requested: float,
        remaining: float,
        unit: str = "tokens",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.agent = agent
        self.limit = limit
        self.requested = requested
        self.remaining = remaining
        self.unit = unit
        self.retry_after = retry_after


class StackOrderWarning(UserWarning):
    """Decorators are stacked in an order that does harm; `code` says which, and stays the same over releases."""

    __reduce__ = _reduced

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
