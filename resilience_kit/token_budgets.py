"""The budgets that agents share by name: what each may use in a period, has used, and holds for calls under way."""

from dataclasses import dataclass

from resilience_kit import call_tokens, pricing
from resilience_kit.errors import TokenBudgetExceededError
from resilience_kit.events import BudgetRefused, BudgetWaiting, emit
from resilience_kit.forking import new_reentrant_lock
from resilience_kit.registry import Registry, Value, effective
from resilience_kit.waiting import Waiting, now


@dataclass(frozen=True, slots=True)
class BudgetConfiguration:
    """What a decorator says of an agent's budget; None for what has no bound."""

    budget_tokens: int | None = None
    budget_usd: float | None = None
    per: float | None = None


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """Where a budget stands in its period now."""

    budget_tokens: int | None
    tokens_used: int
    tokens_reserved: int
    budget_usd: float | None
    usd_used: float
    usd_reserved: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Amount:
    """What a call asks for, or has used."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens + other.tokens, self.usd + other.usd)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens - other.tokens, self.usd - other.usd)


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is held for one call, in which of the budget's periods."""

    amount: Amount
    period: int


# What is asked for, the limit, what is left and the unit, where an amount breaks a bound.
Excess = tuple[float, float, float, str]


class Budget:
    """The one budget of an agent. A period starts with its first call, and turns when it is over."""

    def __init__(self, agent: str, configuration: BudgetConfiguration) -> None:
        self.agent = agent
        self.parameters = effective_parameters(configuration)
        self._limit_tokens = configuration.budget_tokens
        self._limit_usd = configuration.budget_usd
        self._seconds = configuration.per
        # without a bound there is nothing to count and to reserve
        self.is_bounded = self._limit_tokens is not None or self._limit_usd is not None
        # Reentrant: a stream that the garbage collector drops is settled wherever its thread happens to be.
        self._lock = new_reentrant_lock()
        self._period = 0
        self._period_start: float | None = None
        self._used = NOTHING
        self._reserved = NOTHING
        # Calls of no known usage and no agent but this one's, as they are counted here if nobody hears of them.
        self._unheard_calls = 0

    def amount(self, usage: call_tokens.Usage, usd: float | None) -> Amount:
        """What a usage takes from the budget; one in tokens alone holds no dollars."""
        return Amount(usage.tokens, usd if self._limit_usd is not None and usd is not None else 0.0)

    def check_model(self, model: str) -> None:
        """Make sure that the budget can be kept for a model.

        Raises:
            ConfigurationError: It is one in US dollars, and the model's price is not known.
        """
        if self._limit_usd is not None:
            pricing.check_model(model)

    def statistics(self) -> BudgetStatistics:
        """Where the budget stands now."""
        with self._lock:
            seconds_left = self._turn()
            return BudgetStatistics(
                self._limit_tokens,
                self._used.tokens,
                self._reserved.tokens,
                self._limit_usd,
                self._used.usd,
                self._reserved.usd,
                seconds_left,
            )

    def reset(self) -> None:
        """Start a new period with nothing used."""
        with self._lock:
            self._start_period(None)

    async def reserve(self, amount: Amount, waiting: Waiting, *, may_wait: bool) -> Reservation:
        """Hold an amount for a call.

        Raises:
            TokenBudgetExceededError: It is more than is left, and waiting is not allowed or would not help.
        """
        while True:
            with self._lock:
                seconds = self._turn()
                excess = self._excess(amount)
                if excess is None:
                    if self._period_start is None:
                        self._start_period(now())
                    self._reserved += amount
                    return Reservation(amount, self._period)
            await waiting.sleep(self._wait_of(excess, seconds, may_wait=may_wait))

    def settle(self, reservation: Reservation, used: Amount) -> None:
        """Put what was used in place of what was held; a call of an earlier period is settled with that one."""
        with self._lock:
            if reservation.period == self._period:
                self._reserved -= reservation.amount
                self._used += used

    def count_unheard(self) -> None:
        """Count a call of which nobody hears, and of which nothing is known but that it was made."""
        with self._lock:
            self._unheard_calls += 1

    def take_unheard(self) -> int:
        """How many calls were counted here since this was asked last."""
        with self._lock:
            calls, self._unheard_calls = self._unheard_calls, 0
        return calls

    def _turn(self) -> float | None:
        """Start a new period if this one is over. Returns the seconds that it has left, if it ends at all."""
        if self._seconds is None or self._period_start is None:
            return None
        left = self._period_start + self._seconds - now()
        if left <= 0:
            self._start_period(None)
            return None
        return left

    def _start_period(self, start: float | None) -> None:
        if start is None:
            self._period += 1
            self._used = self._reserved = NOTHING
        self._period_start = start

    def _wait_of(self, excess: Excess, seconds: float | None, *, may_wait: bool) -> float:
        """Say of a call that does not fit that it waits, and how long; raises if it may not, or in vain."""
        requested, limit, remaining, unit = excess
        if not may_wait or seconds is None or requested > limit:
            raise self._refusal(requested, limit, remaining, unit, seconds)
        emit(BudgetWaiting(name=self.agent, seconds=seconds, requested=requested, unit=unit))
        return seconds

    def _excess(self, amount: Amount) -> Excess | None:
        """The first bound that the amount breaks."""
        taken = self._used + self._reserved
        if self._limit_tokens is not None and taken.tokens + amount.tokens > self._limit_tokens:
            return amount.tokens, self._limit_tokens, max(0, self._limit_tokens - taken.tokens), "tokens"
        if self._limit_usd is not None and taken.usd + amount.usd > self._limit_usd:
            return amount.usd, self._limit_usd, max(0.0, self._limit_usd - taken.usd), "USD"
        return None

    def _refusal(
        self, requested: float, limit: float, remaining: float, unit: str, seconds: float | None
    ) -> TokenBudgetExceededError:
        parameter = "budget_tokens" if unit == "tokens" else "budget_usd"
        # dollars are rounded, tokens are whole numbers
        needs, has, left = (f"{it:.6g}" if unit == "USD" else f"{it}" for it in (requested, limit, remaining))
        if requested > limit:
            seconds = None
            text = (
                f"{parameter}={has}: it never fits; shorten the prompt, lower the most that the answer may have, or "
                f"raise {parameter}"
            )
        elif seconds is None:
            text = f"{left} of {parameter}={has} are left; the budget has no period: reset_all() starts it anew"
        else:
            text = f"{left} of {parameter}={has} are left; it turns in {seconds:.0f} s"
        return refusal(
            f"the call needs {needs} {unit}, and {text}",
            agent=self.agent,
            limit=limit,
            requested=requested,
            remaining=remaining,
            unit=unit,
            retry_after=seconds,
        )


def refusal(
    text: str,
    *,
    agent: str,
    limit: float,
    requested: float,
    remaining: float,
    unit: str = "tokens",
    retry_after: float | None = None,
) -> TokenBudgetExceededError:
    """Say that a call is refused, and make the error."""
    emit(BudgetRefused(name=agent, requested=requested, remaining=remaining, unit=unit))
    return TokenBudgetExceededError(
        f"token budget of {agent!r}: {text}",
        agent=agent,
        limit=limit,
        requested=requested,
        remaining=remaining,
        unit=unit,
        retry_after=retry_after,
    )


def effective_parameters(configuration: BudgetConfiguration) -> dict[str, Value]:
    """What a budget is made of."""
    return {
        "budget_tokens": effective(configuration.budget_tokens),
        "budget_usd": effective(configuration.budget_usd),
        "per": effective(configuration.per),
    }


def _built(agent: str, configuration: BudgetConfiguration) -> Budget:
    """The budget of an agent: the fleet's where it has a bound and a store is set, else the process's own."""
    if configuration.budget_tokens is not None or configuration.budget_usd is not None:
        from resilience_kit.settings import current_settings

        if current_settings().resilience_store is not None:
            from resilience_kit.fleet.fleet_budgets import FleetBudget
            from resilience_kit.fleet.fleets import current_fleet

            fleet = current_fleet()
            if fleet is not None:
                return FleetBudget(agent, configuration, fleet)
    return Budget(agent, configuration)


token_budgets: Registry[BudgetConfiguration, Budget] = Registry(
    "token budget", "token_budgets", _built, effective_parameters
)
