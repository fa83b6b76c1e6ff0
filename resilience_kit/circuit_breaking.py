"""@circuit_protected: while the service is ill, calls fail at once instead of adding to its load."""

from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

from resilience_kit import decorating
from resilience_kit.circuits import Admission, Circuit, CircuitConfiguration, circuits
from resilience_kit.errors import CircuitOpenError
from resilience_kit.layers import Call, Guard, Passage
from resilience_kit.registry import Value, effective
from resilience_kit.server_advice import is_service_failure
from resilience_kit.validating import check_callable, check_function, check_numbers

P = ParamSpec("P")
R = TypeVar("R")


def reset_circuit_breakers(name: str | None = None) -> None:
    """Close circuits by hand; where a store is set (RESILIENCE_STORE), in all processes.

    Args:
        name: One circuit's name; None for all.

    Raises:
        ConfigurationError: There is no circuit of that name.

    Example:
        >>> from resilience_kit import reset_circuit_breakers
        >>> reset_circuit_breakers()
    """
    circuits.reset(name)


class _Passage(Admission, Passage):
    __slots__ = ("_circuit", "_is_failure")

    def __init__(self, circuit: Circuit, is_failure: Callable[[BaseException], object]) -> None:
        self._circuit = circuit
        self._is_failure = is_failure
        circuit.admit(self)

    def recheck(self) -> None:
        self._circuit.readmit(self)

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        if error is None:
            self._circuit.settle(self, success=True)
            return
        failed: object = False
        try:
            # Cancellation, KeyboardInterrupt and their like say nothing of the service.
            failed = isinstance(error, Exception) and self._is_failure(error)
        finally:
            self._circuit.settle(self, failure=error if failed else None)


class CircuitProtection(Guard):
    """The layer that @circuit_protected puts around a function."""

    kind: ClassVar[str] = "circuit_protected"

    def __init__(
        self,
        name: str,
        configuration: CircuitConfiguration,
        *,
        is_failure: Callable[[BaseException], object] | None,
        fallback: Callable[..., Any] | None,
    ) -> None:
        self.name = name
        self._configuration = configuration
        self._given_is_failure = is_failure
        self._is_failure = is_failure or is_service_failure
        self._fallback = fallback
        circuits.declare(name, configuration)

    def enter(self, call: Call, /) -> Passage:
        """Let the call in, or refuse it at once."""
        return _Passage(circuits.get(self.name, self._configuration), self._is_failure)

    def substitute(self, refusal: Exception, /) -> Callable[..., Any] | None:
        """The fallback, where this circuit refused the call."""
        return self._fallback if isinstance(refusal, CircuitOpenError) and refusal.name == self.name else None

    def describe(self) -> dict[str, Value]:
        """The effective parameters, and where each came from."""
        return {
            **circuits.describe(self.name, self._configuration),
            "is_failure": effective(self._given_is_failure, "connection errors, timeouts and 5xx"),
            "fallback": effective(self._fallback),
        }


@overload
def circuit_protected(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def circuit_protected(
    name: str = "default",
    *,
    failure_threshold: int | None = None,
    recovery_timeout: float | None = None,
    success_threshold: int | None = None,
    half_open_max_calls: int = 1,
    is_failure: Callable[[BaseException], object] | None = None,
    fallback: Callable[..., Any] | None = None,
) -> decorating.Decorator: ...
def circuit_protected(
    name: Any = "default",
    *,
    failure_threshold: int | None = None,
    recovery_timeout: float | None = None,
    success_threshold: int | None = None,
    half_open_max_calls: int = 1,
    is_failure: Callable[[BaseException], object] | None = None,
    fallback: Callable[..., Any] | None = None,
) -> Any:
    """Stop calling a service that keeps failing, and try it again carefully after a while.

    Connection errors, timeouts and 5xx are failures. Rate limits, other 4xx, errors of the function's own and
    cancellation are neither failures nor successes, and leave all counters alone.

    Args:
        name: Functions with the same name share one circuit, over all threads and event loops; where a store is set
            (RESILIENCE_STORE), over all processes.
        failure_threshold: Failures in a row that open the circuit. Default: CIRCUIT_BREAKER_FAILURE_THRESHOLD, 5.
        recovery_timeout: Seconds that it stays open. Default: CIRCUIT_BREAKER_RECOVERY_TIMEOUT, 60.
        success_threshold: Trials that must succeed to close it, over the whole fleet where a store is set. Default:
            CIRCUIT_BREAKER_SUCCESS_THRESHOLD, 3.
        half_open_max_calls: Trials under way at once while it is half-open, over the whole fleet where a store is set.
        is_failure: Says whether an error is a failure of the service, in place of the rule above.
        fallback: Called with the same arguments in place of a call that the circuit refuses.

    Raises:
        ConfigurationError: An argument cannot work, or the name has another configuration elsewhere.
        CircuitOpenError: From a call: the circuit refused it, and there is no fallback.

    Example:
        >>> from resilience_kit import circuit_protected
        >>> @circuit_protected("chat", failure_threshold=3, recovery_timeout=10)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("What is 2 + 2?")
        'four'
    """
    if not isinstance(name, str):
        check_callable("circuit_protected", name)
        return circuit_protected()(name)
    check_numbers(
        "circuit_protected",
        above=0,
        whole=True,
        failure_threshold=failure_threshold,
        success_threshold=success_threshold,
        half_open_max_calls=half_open_max_calls,
    )
    check_numbers("circuit_protected", at_least=0, recovery_timeout=recovery_timeout)
    check_function("circuit_protected", is_failure=is_failure, fallback=fallback)
    layer = CircuitProtection(
        name,
        CircuitConfiguration(
            failure_threshold,
            recovery_timeout,
            success_threshold,
            None if half_open_max_calls == 1 else half_open_max_calls,
        ),
        is_failure=is_failure,
        fallback=fallback,
    )

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        check_callable("circuit_protected", function)
        return decorating.guarded(function, layer)

    return decorate
