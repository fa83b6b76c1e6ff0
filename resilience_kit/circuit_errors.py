"""The error of a circuit, which is one of pybreaker's too; to be imported from `errors`."""

import pybreaker

from resilience_kit.errors import ResilienceError


class CircuitOpenError(ResilienceError, pybreaker.CircuitBreakerError):
    """The circuit is open, or half-open with all its trials taken: nothing was sent.

    Attributes:
        name: The circuit's name.
        retry_after: Seconds until the circuit lets a trial through; 0 while trials are under way, and next to 0 in a fleet.
    """

    def __init__(self, message: str, *, name: str, retry_after: float) -> None:
        super().__init__(message)
        self.name = name
        self.retry_after = retry_after
