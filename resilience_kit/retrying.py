"""@retry_on_429: one retry loop that waits as long as the server says.

tenacity decides on waiting and stopping. The first attempt runs outside of it, and a failed one is handed to it as
its attempt 1: tenacity 9.2.1 costs some 35 µs a call when nothing fails. Its decorator is not used: it does not retry
generators, and its statistics are shared by concurrent calls.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

import tenacity

from resilience_kit import decorating
from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.events import RetriesExhausted, RetriesRecovered, Retrying, emit
from resilience_kit.layers import Attempt, Attempts, Call, Repeater, name_of
from resilience_kit.registry import Value, effective, mode
from resilience_kit.retry_budgets import FEWEST_RETRIES, NothingDeclared, RetryBudget, retry_budgets
from resilience_kit.server_advice import (
    advice_from_error,
    is_content_filter,
    is_insufficient_quota,
    is_rate_limit,
    is_transient,
)
from resilience_kit.validating import check_callable, check_function, check_numbers
from resilience_kit.waiting import now

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_RETRY_AFTER = 120.0


@dataclass(frozen=True, slots=True)
class RetryConfiguration:
    """What a decorator says of retries; None for what it leaves to the settings."""

    max_retries: int | None = None
    initial_backoff: float | None = None
    max_backoff: float | None = None
    backoff_multiplier: float | None = None
    jitter: bool = True
    retry_transient: bool = False
    retry_if: Callable[[BaseException], object] | None = None
    max_elapsed: float | None = None
    max_retry_after: float = LONGEST_RETRY_AFTER
    retry_budget: float | None = None


# What is left out of @retry_on_429, and of @resilient and the clients.
BARE = RetryConfiguration()
STACKED = RetryConfiguration(retry_transient=True, retry_budget=0.2)

_NOTHING = NothingDeclared()
_SETTINGS = {
    "max_retries": "max_retries",
    "initial_backoff": "initial_backoff_seconds",
    "max_backoff": "max_backoff_seconds",
    "backoff_multiplier": "backoff_multiplier",
}


class RetryLoop(Repeater):
    """The layer that @retry_on_429 puts around a function."""

    kind: ClassVar[str] = "retry_on_429"

    def __init__(self, name: str, configuration: RetryConfiguration, defaults: RetryConfiguration = BARE) -> None:
        self.name = name
        self.configuration = configuration
        self._defaults = defaults
        self.has_limit_beneath = defaults is STACKED
        self._values: tuple[object, dict[str, Any]] | None = None

    def enter(self, call: Call, /) -> Attempts:
        """Count the call; its first attempt costs no more."""
        values, started, budget = self.values(), call.now(), None
        if values["retry_budget"] is not None:
            budget = retry_budgets.get(self.name, _NOTHING)
            budget.count_call(started)
        return _Attempts(self, values, budget, started)

    def values(self) -> dict[str, Any]:
        """The effective values, read at a call's start: a bad setting stops the first one, not the first that fails."""
        if self._values is None or self._values[0] is not mode.settings:
            values = {name: parameter.value for name, parameter in self.describe().items()}
            self._values = mode.settings, values
        return self._values[1]

    def reason(self, error: BaseException) -> str | None:
        """Why an error is retried: "rate limit", "transient" or "retry_if"; None if it is not."""
        if (
            isinstance(error, ResilienceError)
            or not isinstance(error, Exception)
            or is_insufficient_quota(error)
            or is_content_filter(error)
        ):
            return None
        if is_rate_limit(error):
            return "rate limit"
        if self.configuration.retry_transient and is_transient(error):
            return "transient"
        if self.configuration.retry_if is not None and self.configuration.retry_if(error):
            return "retry_if"
        return None

    def describe(self) -> dict[str, Value]:
        """The effective parameters, and where each came from."""
        values = {}
        for field in fields(self.configuration):
            value = getattr(self.configuration, field.name)
            if field.name in _SETTINGS:
                values[field.name] = effective(value, setting=_SETTINGS[field.name])
            else:
                is_default = value == getattr(self._defaults, field.name)
                values[field.name] = Value(value, "default" if is_default else "argument")
        return values


class _Attempts(Attempts):
    """The attempts of one call: nothing more than notes, unless the first one fails."""

    __slots__ = ("_budget", "_loop", "_started", "_values")

    def __init__(self, loop: RetryLoop, values: dict[str, Any], budget: RetryBudget | None, started: float) -> None:
        self._loop = loop
        self._values = values
        self._budget = budget
        self._started = started

    def repeat(self, call: Call, error: BaseException, attempt: Attempt, /) -> Coroutine[Any, Any, Any] | None:
        if self._budget is not None and isinstance(error, ResilienceError):
            self._budget.forget_call(self._started)
        reason = self._loop.reason(error)
        if reason is None:
            return None
        return self._repeat(call, error, attempt, _Story(self._loop, self._values, self._budget, self._started, reason))

    async def _repeat(self, call: Call, failed: BaseException | None, attempt: Attempt, story: "_Story") -> Any:
        async def next_attempt() -> Any:
            nonlocal failed
            if failed is not None:
                error, failed = failed, None
                raise error
            call.is_sent = False
            return await attempt(call)

        controller = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(story.is_retried),
            wait=story.wait,
            stop=story.stop,
            before_sleep=story.tell,
            sleep=call.waiting.sleep,
            reraise=True,
        )
        try:
            result: Any = await controller(next_attempt)
        except Exception as error:
            if call.is_sent or not isinstance(error, ResilienceError):
                story.give_up(error)
                raise
            refusal = error
        else:
            emit(RetriesRecovered(name=self._loop.name, attempts=story.attempts + 1))
            return result
        # a layer beneath let no further attempt through: what the caller needs to know is what failed before
        raise story.error_before(refusal)


class _Story:
    """How the retries of one call go: tenacity asks it how long to wait and when to stop."""

    def __init__(
        self, loop: RetryLoop, values: dict[str, Any], budget: RetryBudget | None, started: float, reason: str
    ) -> None:
        self._loop = loop
        self._budget = budget
        self._started = started
        self._values = values
        self._reason: str | None = reason
        backoff = tenacity.wait_random_exponential if self._values["jitter"] else tenacity.wait_exponential
        self._backoff = backoff(
            multiplier=self._values["initial_backoff"],
            max=self._values["max_backoff"],
            exp_base=self._values["backoff_multiplier"],
        )
        self._told: float | None = None
        self._bound: str | None = None
        self._error: BaseException | None = None
        self.attempts = 0

    def is_retried(self, error: BaseException) -> bool:
        """Whether another attempt may follow; the first attempt was asked about before tenacity came in."""
        if self.attempts:
            self._reason = self._loop.reason(error)
        return self._reason is not None

    def wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds to wait: the server's word, else the backoff."""
        self.attempts = state.attempt_number
        self._error = _error_of(state)
        self._told = advice_from_error(self._error).retry_after
        return self._backoff(state) if self._told is None else self._told

    def stop(self, state: tenacity.RetryCallState) -> bool:
        """Whether a bound was reached."""
        values = self._values
        if state.attempt_number > values["max_retries"]:
            self._bound = "max_retries"
        elif self._told is not None and self._told > values["max_retry_after"]:
            self._bound = "max_retry_after"
        elif values["max_elapsed"] is not None and now() - self._started + state.upcoming_sleep > values["max_elapsed"]:
            self._bound = "max_elapsed"
        elif self._is_over_budget():
            self._bound = "retry_budget"
        return self._bound is not None

    def _is_over_budget(self) -> bool:
        # A rate limit that all callers wait out multiplies no outage, and to refuse the retry would lose an answer that
        # is certain to come: where the server names the wait, or a limit beneath makes all of them wait.
        is_waited_out = self._told is not None or self._loop.has_limit_beneath
        if self._budget is None or (self._reason == "rate limit" and is_waited_out):
            return False
        values = self._values
        return not self._budget.take(values["retry_budget"], max(FEWEST_RETRIES, values["max_retries"]))

    def tell(self, state: tenacity.RetryCallState) -> None:
        """Say that another attempt follows."""
        emit(
            Retrying(
                name=self._loop.name,
                attempt=state.attempt_number,
                seconds=state.upcoming_sleep,
                reason=self._reason or "",
                error=type(_error_of(state)).__name__,
                told=self._told is not None,
            )
        )

    def error_before(self, refusal: ResilienceError) -> BaseException:
        """The function's own last error, with a note on why it was not tried again."""
        error = self._error or refusal
        error.add_note(f"resilience_kit: attempt {self.attempts + 1} was refused: {type(refusal).__name__}: {refusal}")
        return error

    def give_up(self, error: Exception) -> None:
        """Note on the last error how it came to it."""
        if self._bound is None:
            # The last attempt failed with something that is not retried.
            error.add_note(
                f"resilience_kit: attempt {self.attempts + 1}, {now() - self._started:.1f} s after the first"
            )
            return
        error.add_note(
            f"resilience_kit: gave up after {self.attempts} attempts in {now() - self._started:.1f} s "
            f"({self._bound}={self._values[self._bound]!r})"
        )
        emit(
            RetriesExhausted(
                name=self._loop.name, attempts=self.attempts, reason=self._bound, error=type(error).__name__
            )
        )


def _error_of(state: tenacity.RetryCallState) -> BaseException:
    error = None if state.outcome is None else state.outcome.exception()
    if error is None:  # pragma: no cover - tenacity asks only after a failed attempt; this tells the type checker
        raise AssertionError
    return error


@overload
def retry_on_429(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def retry_on_429(
    *,
    max_retries: int | None = None,
    initial_backoff: float | None = None,
    max_backoff: float | None = None,
    backoff_multiplier: float | None = None,
    jitter: bool = True,
    retry_transient: bool = False,
    retry_if: Callable[[BaseException], object] | None = None,
    max_elapsed: float | None = None,
    max_retry_after: float = LONGEST_RETRY_AFTER,
    retry_budget: float | None = None,
) -> decorating.Decorator: ...
def retry_on_429(
    function: Any = None,
    /,
    *,
    max_retries: int | None = None,
    initial_backoff: float | None = None,
    max_backoff: float | None = None,
    backoff_multiplier: float | None = None,
    jitter: bool = True,
    retry_transient: bool = False,
    retry_if: Callable[[BaseException], object] | None = None,
    max_elapsed: float | None = None,
    max_retry_after: float = LONGEST_RETRY_AFTER,
    retry_budget: float | None = None,
) -> Any:
    """Try a call again when the server refuses it for its rate, after the wait that the server names.

    A rate limit is a status 429 on the error or its response, or "rate limit" or "too many requests" in its message
    or that of a cause. `insufficient_quota`, content filters and an open circuit are never retried. A generator is
    retried until its first item is out. At the end the function's own last error is raised, with a note, also where a
    layer beneath refuses a retry.

    Args:
        function: The function, where the decorator is used bare.
        max_retries: Attempts after the first. Default: MAX_RETRIES, 3.
        initial_backoff: Seconds before the first retry where the server names none. Default:
            INITIAL_BACKOFF_SECONDS, 1.
        max_backoff: Most seconds of backoff; the server's word may be longer. Default: MAX_BACKOFF_SECONDS, 30.
        backoff_multiplier: Growth of the backoff from retry to retry. Default: BACKOFF_MULTIPLIER, 2.
        jitter: Draw the backoff at random between 0 and its value, so that callers do not come back together.
        retry_transient: Retry connection errors, timeouts, 408 and 5xx too.
        retry_if: Says of any other error whether it is retried.
        max_elapsed: Most seconds from the first attempt to the start of the last.
        max_retry_after: A server that names a longer wait in seconds is not waited for: its error is raised at once.
        retry_budget: Most retries as a share of the function's calls in the last minute, above 0 to 1, so that an
            outage is not multiplied. Past it the function's own error is raised at once. It always allows 10 in a
            minute, or `max_retries` if that is more; and it counts no retry after a rate limit that all callers wait
            out: one for which the server named the wait, and any in `@resilient`. Default: no bound.

    Raises:
        ConfigurationError: An argument cannot work.

    Example:
        >>> from resilience_kit import retry_on_429
        >>> @retry_on_429(max_retries=5, max_elapsed=60)
        ... def ask(prompt: str) -> str:
        ...     return "four"
        >>> ask("What is 2 + 2?")
        'four'

    Sources: full jitter as in the AWS Architecture Blog, "Exponential Backoff And Jitter"; the budget as in Finagle's
    RetryBudget (a share of requests beside a minimum for clients with few) and Envoy's retry_budget, both 20 %.
    """
    if function is not None:
        check_callable("retry_on_429", function)
        return retry_on_429()(function)
    return retried(
        RetryConfiguration(
            max_retries=max_retries,
            initial_backoff=initial_backoff,
            max_backoff=max_backoff,
            backoff_multiplier=backoff_multiplier,
            jitter=jitter,
            retry_transient=retry_transient,
            retry_if=retry_if,
            max_elapsed=max_elapsed,
            max_retry_after=max_retry_after,
            retry_budget=retry_budget,
        )
    )


def retried(given: RetryConfiguration, defaults: RetryConfiguration = BARE) -> decorating.Decorator:
    """Make the decorator of a configuration, for which `defaults` is what was left out.

    Raises:
        ConfigurationError: A value cannot work.
    """
    check_numbers("retry_on_429", at_least=0, whole=True, max_retries=given.max_retries)
    check_numbers(
        "retry_on_429",
        at_least=0,
        initial_backoff=given.initial_backoff,
        max_backoff=given.max_backoff,
        max_elapsed=given.max_elapsed,
        max_retry_after=given.max_retry_after,
    )
    check_numbers("retry_on_429", at_least=1, backoff_multiplier=given.backoff_multiplier)
    check_numbers("retry_on_429", above=0, retry_budget=given.retry_budget)
    if given.retry_budget is not None and given.retry_budget > 1:
        raise ConfigurationError(
            f"@retry_on_429(retry_budget={given.retry_budget!r}): expected a share of calls, 1 or less"
        )
    check_function("retry_on_429", retry_if=given.retry_if)

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        check_callable("retry_on_429", function)
        return decorating.guarded(function, RetryLoop(name_of(function), given, defaults))

    return decorate
