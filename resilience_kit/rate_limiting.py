"""@rate_limited: no call starts before there is a slot, a distance to the last call, and quota for it."""

import math
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

from resilience_kit import call_tokens, decorating
from resilience_kit.errors import ConfigurationError
from resilience_kit.layers import Call, Guard, Passage
from resilience_kit.priorities import priority_else
from resilience_kit.quota_lessons import Adaptive, rules_of
from resilience_kit.rate_limit_parameters import PERIOD, RateLimitConfiguration
from resilience_kit.rate_limits import RateLimit, Ticket, rate_limits
from resilience_kit.registry import Value, effective
from resilience_kit.validating import check_callable, check_numbers, is_number

P = ParamSpec("P")
R = TypeVar("R")
Tokens = int | float | Callable[..., int | float]


class RateLimiting(Guard):
    """The layer that @rate_limited puts around a function."""

    kind: ClassVar[str] = "rate_limited"

    def __init__(
        self,
        name: str,
        configuration: RateLimitConfiguration,
        *,
        tokens: Tokens | None,
        priority: float,
        max_wait: float | None,
    ) -> None:
        self.name = name
        self._configuration = configuration
        self._tokens = tokens
        self._tokens_of = tokens if callable(tokens) else None
        self._fixed_tokens = None if tokens is None or callable(tokens) else math.ceil(tokens)
        self._priority = priority
        self._max_wait = max_wait
        rate_limits.declare(name, configuration)

    def enter(self, call: Call, /) -> Passage | Coroutine[Any, Any, Passage]:
        """Take a slot and quota, or wait for them."""
        limit = rate_limits.get(self.name, self._configuration)
        call.is_sent = False
        tokens = self._fixed_tokens
        if tokens is None:
            if self._tokens_of is None:
                return self._enter_estimated(limit, call)
            tokens = self._checked(self._tokens_of(*call.args, **call.kwargs))
        return limit.acquire(call, tokens, priority_else(self._priority), self._max_wait)

    async def _enter_estimated(self, limit: RateLimit, call: Call) -> Passage:
        tokens = await call_tokens.estimate(call)
        ticket = limit.acquire(call, tokens, priority_else(self._priority), self._max_wait)
        return ticket if isinstance(ticket, Ticket) else await ticket

    def describe(self) -> dict[str, Value]:
        """The effective parameters, and where each came from."""
        return {
            **rate_limits.describe(self.name, self._configuration),
            "tokens": effective(self._tokens, "estimated"),
            "priority": Value(self._priority, "argument" if self._priority else "default"),
            "max_wait": effective(self._max_wait),
        }

    def _checked(self, tokens: object) -> int:
        if not is_number(tokens) or tokens < 0:
            raise ConfigurationError(
                f"rate limit {self.name!r}: the tokens function returned {tokens!r}: it must be a plain function of "
                "the call's arguments that returns a number of tokens, 0 or more"
            )
        return math.ceil(tokens)


@overload
def rate_limited(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def rate_limited(
    name: str = "default",
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_concurrent: int | None = None,
    min_interval: float | None = None,
    period: float = PERIOD,
    tokens: Tokens | None = None,
    priority: float = 0,
    max_wait: float | None = None,
    adaptive: Adaptive = True,
) -> decorating.Decorator: ...
def rate_limited(
    name: Any = "default",
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_concurrent: int | None = None,
    min_interval: float | None = None,
    period: float = PERIOD,
    tokens: Tokens | None = None,
    priority: float = 0,
    max_wait: float | None = None,
    adaptive: Adaptive = True,
) -> Any:
    """Start no call of the function before there is a slot and quota for it.

    Where a store is set (RESILIENCE_STORE), all of this holds over all processes together.

    Args:
        name: Functions with the same name share one limit, over all threads and event loops.
        requests_per_minute: Calls in any window of `period`, and a sixth of them in any sixth of it. Default:
            REQUESTS_PER_MINUTE, 60.
        tokens_per_minute: Tokens in any window of `period`. Default: TOKENS_PER_MINUTE, 150,000.
        max_concurrent: Calls under way at once; a stream counts until it is read, closed or dropped. A function that
            calls another one needs another name than that one, or both may wait for each other's slots for ever.
            Default: MAX_CONCURRENT_REQUESTS, 3.
        min_interval: Seconds between the starts of two calls. Default: MIN_REQUEST_INTERVAL_MS, 0.1.
        period: Length of the quota's window in seconds: Azure's is 60, a test's is shorter.
        tokens: What a call costs: a number, or a function of the call's own arguments. Default: an estimate from
            `messages`, `input` or `prompt` and `max_tokens` or its kin where the call has them, else 0. A call without
            `max_tokens` counts 16 for its answer.
        priority: Lower is sooner; a step is worth a period of waiting, so that nobody waits for ever. A block of
            `with priority(...)` around the call beats it.
        max_wait: Most seconds to wait; a call that would wait longer is refused at once.
        adaptive: Whether the limit is tightened by what the server says and refuses, and tried upwards again, never
            above what is said here; `QuotaTightened` and `QuotaRelaxed` events say why. "latency" lets fewer calls be
            under way while answers take much longer than usual, too. Or a set of rules, of "retry-after", "slow start",
            "remaining", "limit", "margin", "one-second window", "ceiling" and "latency"; False is none.

    Raises:
        ConfigurationError: An argument cannot work, or the name has another configuration elsewhere.
        RateLimitTimeoutError: From a call: it would wait longer than `max_wait`, or never fits into the quota.

    Example:
        >>> from resilience_kit import rate_limited
        >>> @rate_limited("chat", requests_per_minute=600, tokens_per_minute=100_000)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("What is 2 + 2?")
        'four'

    Source: learn.microsoft.com, "Manage Azure OpenAI in Foundry Models quota": tokens are charged by an estimate
    when a request arrives, and requests are evaluated over 1 or 10 seconds.
    """
    if not isinstance(name, str):
        check_callable("rate_limited", name)
        return rate_limited()(name)
    check_numbers(
        "rate_limited",
        above=0,
        whole=True,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
    )
    check_numbers("rate_limited", above=0, period=period)
    check_numbers("rate_limited", at_least=0, min_interval=min_interval, max_wait=max_wait)
    if not is_number(priority):
        raise ConfigurationError(f"@rate_limited(priority={priority!r}): expected a number; lower is sooner")
    if not callable(tokens):
        check_numbers("rate_limited", at_least=0, tokens=tokens)
    rules_of(adaptive)
    adaptive = adaptive if isinstance(adaptive, bool | str) else tuple(sorted(adaptive))
    layer = RateLimiting(
        name,
        RateLimitConfiguration(
            requests_per_minute,
            tokens_per_minute,
            max_concurrent,
            min_interval,
            None if period == PERIOD else period,
            None if adaptive is True else adaptive,
        ),
        tokens=tokens,
        priority=priority,
        max_wait=max_wait,
    )

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        check_callable("rate_limited", function)
        return decorating.guarded(function, layer)

    return decorate
