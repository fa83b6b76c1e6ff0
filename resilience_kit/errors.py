"""The errors that the kit raises.

    ResilienceError
    ├── ConfigurationError (ValueError)                      written wrongly: the message says what to write
    ├── RateLimitTimeoutError (TimeoutError)                 the wait for a slot would be longer than allowed
    ├── CircuitOpenError (pybreaker.CircuitBreakerError)     the service is ill: nothing was sent
    ├── TokenBudgetExceededError                             more tokens or money than the agent may use
    ├── StoreUnavailableError                                the store of the fleet did not do what it was asked
    └── StoreContentError                                    what lies in the store is not what the kit put there
    StackOrderWarning (UserWarning)                          decorators that are stacked in a harmful order

What the decorated function itself raises is never replaced by one of these.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience_kit.circuit_errors import (
        CircuitOpenError as CircuitOpenError,  # noqa: PLC0414 - strict type checkers take only such a name for exported
    )


def _restored(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def _reduced(error: BaseException) -> tuple[Any, ...]:
    """How an error is pickled and copied: Python would call its constructor without the keywords that it needs."""
    return _restored, (type(error), error.args), vars(error)


class ResilienceError(Exception):
    """Whatever the kit itself raises; catch it to catch them all.

    Example:
        >>> from resilience_kit import ResilienceError, rate_limited
        >>> @rate_limited("small", tokens_per_minute=100, tokens=200)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> try:
        ...     ask("What is 2 + 2?")
        ... except ResilienceError as error:
        ...     print(type(error).__name__)
        RateLimitTimeoutError
    """

    __reduce__ = _reduced


class ConfigurationError(ResilienceError, ValueError):
    """An argument, a setting or a combination of decorators that cannot work; the message says what to write.

    Example:
        >>> from resilience_kit import ConfigurationError, retry_on_429
        >>> try:
        ...     retry_on_429(max_retries=-1)
        ... except ConfigurationError as error:
        ...     print(error)
        @retry_on_429(max_retries=-1): expected a whole number, 0 or more, or None for the setting
    """


class RateLimitTimeoutError(ResilienceError, TimeoutError):
    """The wait for a slot would be longer than the caller allows: nothing was sent.

    Attributes:
        name: The limit's name.
        retry_after: Seconds until the call would be admitted; None if it never would be, or if nobody knows, since a
            slot has to become free.

    Example:
        >>> from resilience_kit import RateLimitTimeoutError, rate_limited
        >>> @rate_limited("few", requests_per_minute=6, max_wait=2)  # one in each ten seconds
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> try:
        ...     ask("What is 2 + 2?"), ask("And 3 + 3?")
        ... except RateLimitTimeoutError as error:
        ...     print(error.name, round(error.retry_after, -1))
        few 10.0
    """

    def __init__(self, message: str, *, name: str, retry_after: float | None) -> None:
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

    Example:
        >>> from resilience_kit import TokenBudgetExceededError, token_budget
        >>> @token_budget("Writer", budget_tokens=1_000)
        ... def ask(prompt: str, max_tokens: int = 2_000) -> str:
        ...     return "four"
        >>> try:
        ...     ask("What is 2 + 2?")
        ... except TokenBudgetExceededError as error:
        ...     print(error.agent, error.remaining, error.unit, error.retry_after)
        Writer 1000 tokens None
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


class StoreUnavailableError(ResilienceError):
    """The store is gone, slow, full, or refuses to do what it is asked.

    No error of redis-py is its cause: the frames of such a one hold the password, and some tools show them.

    Attributes:
        name: The prefix of the fleet's keys; of a rate limit that refuses its calls, the limit's.
        reason: In one word, such as "TimeoutError", "ConnectionError", "OutOfMemoryError" or "lost".

    Example:
        >>> from resilience_kit import StoreUnavailableError, configure, rate_limited
        >>> configure(store="redis://127.0.0.1:1", on_store_failure="refuse")  # nobody listens there
        >>> @rate_limited("chat")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> try:
        ...     ask("What is 2 + 2?")
        ... except StoreUnavailableError as error:
        ...     print(error.name)
        chat
    """

    def __init__(self, message: str, *, name: str, reason: str) -> None:
        super().__init__(message)
        self.name = name
        self.reason = reason


class StoreContentError(ResilienceError):
    """What lies in the store under a key of the kit is not what the kit put there.

    Attributes:
        key: The key; several, with commas between them, where the store does not say which one it is.

    Example:
        >>> from resilience_kit import StoreContentError, rate_limited
        >>> @rate_limited("chat")
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> try:
        ...     ask("What is 2 + 2?")
        ... except StoreContentError as error:
        ...     print(f"look who else writes to {error.key}")
        'four'
    """

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


class StackOrderWarning(UserWarning):
    """Decorators are stacked in an order that does harm.

    Attributes:
        code: Which harm it is, as "limiter-outside-retry"; it stays the same over releases.

    Example:
        >>> import warnings
        >>> from resilience_kit import StackOrderWarning, rate_limited, retry_on_429
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", StackOrderWarning)
        ...     @rate_limited("chat")
        ...     @retry_on_429
        ...     def ask(prompt: str) -> str:
        ...         return "four"
        >>> caught[0].message.code
        'limiter-outside-retry'
    """

    __reduce__ = _reduced

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def __getattr__(name: str) -> Any:
    # its base is pybreaker's, and pybreaker 1.4.1 imports redis where it can: importing the kit would take 0.2 s more
    if name == "CircuitOpenError":
        from resilience_kit.circuit_errors import CircuitOpenError

        return CircuitOpenError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
