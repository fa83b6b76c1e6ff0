"""The error of a circuit, which is one of pybreaker's too; to be imported from `errors`."""

import pybreaker

from resilience_kit.errors import ResilienceError


class CircuitOpenError(ResilienceError, pybreaker.CircuitBreakerError):
    """The circuit is open, or half-open with all its trials taken: nothing was sent.

    Attributes:
        name: The circuit's name.
        retry_after: Seconds until the circuit lets a trial through; while trials are under way 0, in a fleet 0.05.

    Example:
        >>> from resilience_kit import CircuitOpenError, circuit_protected
        >>> @circuit_protected("ill", failure_threshold=1, recovery_timeout=30)
        ... def ask(prompt: str) -> str:
        ...     raise ConnectionError("the service is away")
        >>> for _ in range(2):
        ...     try:
        ...         ask("What is 2 + 2?")
        ...     except CircuitOpenError as error:
        ...         print(error.name, round(error.retry_after, -1))
        ...     except ConnectionError as error:
        ...         print(error)
        the service is away
        ill 30.0
    """

    def __init__(self, message: str, *, name: str, retry_after: float) -> None:
        super().__init__(message)
        self.name = name
        self.retry_after = retry_after
