"""@resilient: the four decorators in their order, and explain(), which tells what stands around a function.

This is the only module that knows all four.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, overload

from resilience_kit import decorating
from resilience_kit.circuit_breaking import circuit_protected
from resilience_kit.errors import ConfigurationError
from resilience_kit.layers import name_of
from resilience_kit.quota_lessons import Adaptive
from resilience_kit.rate_limiting import Tokens, rate_limited
from resilience_kit.registry import Value
from resilience_kit.retrying import STACKED, retried
from resilience_kit.stack_order import StackProblem, find_problems
from resilience_kit.token_budgeting import OnExceed, Per, token_budget
from resilience_kit.validating import check_callable

__all__ = ["RateLimitOptions", "StackReport", "explain", "resilient"]

P = ParamSpec("P")
R = TypeVar("R")


class RateLimitOptions(TypedDict, total=False):
    """The parameters of `rate_limited`."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    min_interval: float | None
    period: float
    tokens: Tokens | None
    priority: float
    max_wait: float | None
    adaptive: Adaptive


class RetryOptions(TypedDict, total=False):
    """The parameters of `retry_on_429`."""

    max_retries: int | None
    initial_backoff: float | None
    max_backoff: float | None
    backoff_multiplier: float | None
    jitter: bool
    retry_transient: bool
    retry_if: Callable[[BaseException], object] | None
    max_elapsed: float | None
    max_retry_after: float
    retry_budget: float | None


class CircuitOptions(TypedDict, total=False):
    """The parameters of `circuit_protected`."""

    failure_threshold: int | None
    recovery_timeout: float | None
    success_threshold: int | None
    half_open_max_calls: int
    is_failure: Callable[[BaseException], object] | None
    fallback: Callable[..., Any] | None


class BudgetOptions(TypedDict, total=False):
    """The parameters of `token_budget`."""

    max_tokens: int | None
    budget_tokens: int | None
    budget_usd: float | None
    per: Per
    model: str
    on_exceed: OnExceed
    argument: str
    shared: bool | None


class ResilientOptions(RateLimitOptions, RetryOptions, CircuitOptions, BudgetOptions, total=False):
    """The parameters of all four decorators."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of a stack.

    Attributes:
        kind: The decorator, such as "rate_limited".
        name: The name that it shares state under; of `retry_on_429`, the function's.
        parameters: By name, each with its `value` and its `source`: "argument", "environment", "configure()" or
            "default". Durations are in seconds.
    """

    kind: str
    name: str
    parameters: dict[str, Value]

    def __str__(self) -> str:
        lines = [f"@{self.kind} {self.name!r}"]
        lines += [f"    {name} = {value}" for name, value in self.parameters.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class StackReport:
    """What stands around a function; `str()` of it is for reading.

    Attributes:
        function: The function's name.
        layers: Its layers, outermost first.
        warnings: What is wrong with their order, each with a `code` and a `message`.

    Example:
        >>> from resilience_kit import explain, retry_on_429
        >>> @retry_on_429(max_retries=5)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> print(explain(ask).layers[0].parameters["max_retries"])
        5 (argument)
    """

    function: str
    layers: tuple[LayerReport, ...]
    warnings: tuple[StackProblem, ...]

    def __str__(self) -> str:
        layers = [str(layer) for layer in self.layers] or ["no layers: nothing protects it"]
        return "\n".join([self.function, *layers, *(f"warning {warning}" for warning in self.warnings)])


def explain(function: Callable[..., Any]) -> StackReport:
    """Tell the layers around a function, outermost first, and what is wrong with their order.

    Args:
        function: A function or method; other people's decorators may stand between the kit's.

    Returns:
        A report for reading (`print`) and for code: `layers` with each parameter's value and source (argument,
        environment, configure() or default), and `warnings` with stable codes.

    Raises:
        ConfigurationError: It is not a function.

    Example:
        >>> from resilience_kit import explain, resilient
        >>> @resilient("chat", max_retries=5)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> [layer.kind for layer in explain(ask).layers]
        ['token_budget', 'retry_on_429', 'circuit_protected', 'rate_limited']
    """
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(f"explain() takes a decorated function or method, not {function!r}")
    # a method of a resilient client's, as client.chat.completions.create: what it goes through stands in the client
    client = getattr(getattr(function, "__self__", None), "_client", None)
    function = getattr(client, "resilient_request", function)
    layers = decorating.stacked_layers(function)
    return StackReport(
        name_of(function),
        tuple(LayerReport(layer.kind, layer.name, layer.describe()) for layer in layers),
        tuple(find_problems(layers, function)),
    )


@overload
def resilient(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def resilient(
    name: str = "default", *, agent: str | None = None, **options: Unpack[ResilientOptions]
) -> decorating.Decorator: ...
def resilient(name: Any = "default", *, agent: str | None = None, **options: Any) -> Any:
    """Put the whole stack around a function: token budget, retries, circuit and rate limit, outermost first.

    Connection errors, timeouts, 408 and 5xx are retried too, unless `retry_transient=False`; and retries are at most a
    fifth of the calls of a minute, unless `retry_budget` says otherwise: None is no bound.

    Args:
        name: The name of both the rate limit and the circuit: functions with the same name share them.
        agent: The name of the token budget, and of the agent in statistics. Default: "default".
        **options: Any parameter of `rate_limited`, `retry_on_429`, `circuit_protected` and `token_budget`.

    Raises:
        ConfigurationError: An argument cannot work, or a name has another configuration elsewhere.

    Example:
        >>> from resilience_kit import resilient
        >>> @resilient("chat", agent="MathAgent", requests_per_minute=600, max_retries=5)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("What is 2 + 2?")
        'four'
    """
    if not isinstance(name, str):
        check_callable("resilient", name)
        return resilient()(name)
    known = ResilientOptions.__annotations__
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigurationError(f"@resilient({unknown[0]}=...): no such parameter; there are {', '.join(known)}")
    limit = rate_limited(name, **_picked(options, RateLimitOptions))
    circuit = circuit_protected(name, **_picked(options, CircuitOptions))
    retry = retried(replace(STACKED, **_picked(options, RetryOptions)), STACKED)
    budget = token_budget("default" if agent is None else agent, **_picked(options, BudgetOptions))

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        check_callable("resilient", function)
        return budget(retry(circuit(limit(function))))

    return decorate


def _picked(options: dict[str, Any], of: type) -> dict[str, Any]:
    return {name: options[name] for name in of.__annotations__ if name in options}
