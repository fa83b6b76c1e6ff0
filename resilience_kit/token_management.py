"""What the counters mean: how near a call is to its rate limit, and which settings do not suit what is used."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from resilience_kit import stats
from resilience_kit.errors import ConfigurationError
from resilience_kit.rate_limit_parameters import RateLimitConfiguration
from resilience_kit.rate_limits import RateLimit, rate_limits
from resilience_kit.registry import Value, listed
from resilience_kit.settings import agent_variable, current_settings
from resilience_kit.stats import Counters
from resilience_kit.validating import check_texts, is_number

RiskLevel = Literal["low", "medium", "high", "critical"]

# Above which share of the window, and above which wait in lengths of it: the worst level that is met counts.
_THRESHOLDS: tuple[tuple[RiskLevel, float, float], ...] = (
    ("critical", 1, 1 / 2),
    ("high", 0.8, 1 / 6),
    ("medium", 0.5, 1 / 20),
)
# Evidence: fewer calls than these say nothing, and less of a thing than this is no reason to change a setting.
_ENOUGH_CALLS = 10
_MANY_CUT = 5.0
_LONG_WAIT = 1.0
_LITTLE_USED = 50.0

_VARIABLES = {
    "requests_per_minute": "REQUESTS_PER_MINUTE",
    "tokens_per_minute": "TOKENS_PER_MINUTE",
    "max_concurrent": "MAX_CONCURRENT_REQUESTS",
}


@dataclass(frozen=True, slots=True)
class RateLimitRisk:
    """What a call would meet at its rate limit now.

    Attributes:
        level: "medium" where the share is above 0.5 or the wait above a twentieth of the window (3 s of a minute),
            "high" above 0.8 or a sixth (10 s), "critical" above 1 or a half (30 s), else "low".
        share: How much of the window's quota would be used with this call, of requests or of tokens, whichever is
            more: 1 is all of it.
        projected_wait: Seconds until the call would start, those that wait now before it; infinite if it never fits.
            Not known is what it waits for a free slot.
        advice: What to do, with the setting or the parameter to change.
        name: The limit's name.
        context: What the call is for.
        estimated_tokens: What the call was said to need, in tokens.

    Example:
        >>> from resilience_kit import token_manager
        >>> risk = token_manager.check_rate_limit_risk(4_000, "nightly-report")
        >>> risk.level
        'low'
    """

    level: RiskLevel
    share: float
    projected_wait: float
    advice: str
    name: str
    context: str
    estimated_tokens: float

    def __str__(self) -> str:
        return (
            f"{self.level} risk for {self.context!r} at the rate limit {self.name!r}: "
            f"{self.estimated_tokens:g} tokens fill it to {self.share:.0%}; {self.advice}"
        )


class TokenManager:
    """Tells the risk of a call before it, and what to change after many.

    It keeps nothing of its own: it reads the limits and the counters, so it knows all calls from the first one on, and
    `reset_all()` and `isolated()` are its own as well. Use the shared instance, `token_manager`.

    Example:
        >>> from resilience_kit import token_manager
        >>> print(token_manager.check_rate_limit_risk(200_000).advice)
        it never fits: lower max_tokens or shorten the prompt, or raise TOKENS_PER_MINUTE=150000
    """

    def check_rate_limit_risk(
        self, estimated_tokens: float, context: str = "default", *, name: str = "default"
    ) -> RateLimitRisk:
        """Tell how near a call would be to its rate limit, without making it or taking anything from the quota.

        Args:
            estimated_tokens: What the call needs, its answer included, in tokens.
            context: What the call is for; `get_usage_insights()` counts what is asked here by it.
            name: The rate limit. Before its first use it is judged by what was declared of it, else by the settings.

        Raises:
            ConfigurationError: The tokens are not a number, or below 0; the context or the name is no text.

        Example:
            >>> from resilience_kit.token_management import token_manager
            >>> risk = token_manager.check_rate_limit_risk(4_000, "nightly-report")
            >>> risk.level, risk.projected_wait
            ('low', 0.0)
            >>> print(token_manager.check_rate_limit_risk(100_000).advice)
            it fits now and leaves little: lower max_tokens or shorten the prompt, or raise TOKENS_PER_MINUTE=150000
        """
        if not is_number(estimated_tokens) or estimated_tokens < 0:
            raise ConfigurationError(
                f"check_rate_limit_risk(estimated_tokens={estimated_tokens!r}): expected a number, 0 or more"
            )
        check_texts("check_rate_limit_risk", context=context, name=name)
        tokens = math.ceil(estimated_tokens)
        stats.count_estimate(context, tokens)
        parameters = rate_limits.describe(name, RateLimitConfiguration())
        # What is not in use yet is judged by a twin: to use it here would fix its parameters before all are declared.
        limit = rate_limits.items().get(name) or RateLimit(
            name, RateLimitConfiguration(**{key: parameter.value for key, parameter in parameters.items()})
        )
        now = limit.statistics()
        shares = {
            "requests_per_minute": (now.requests_in_window + 1) / now.requests_per_minute,
            "tokens_per_minute": (now.tokens_in_window + tokens) / now.tokens_per_minute,
        }
        tighter = max(shares, key=lambda quota: shares[quota])
        wait = limit.seconds_until_served(tokens)
        level = _level(shares[tighter], wait / now.period)
        return RateLimitRisk(
            level=level,
            share=shares[tighter],
            projected_wait=wait,
            advice=_advice(level, tighter, shares[tighter], wait, parameters),
            name=name,
            context=context,
            estimated_tokens=estimated_tokens,
        )

    def get_usage_insights(self) -> dict[str, Any]:
        """Tell what the calls of the agents used, and what should be changed, in plain JSON.

        What is counted are the calls under `@token_budget` or `@resilient`. Their tokens are known where the response
        tells its usage, or where the agent has a budget.

        Returns:
            All is 0 before the first call, and counts since then or since `reset_all()`:

            - `calls` that came to a good end, and their `tokens`;
            - `truncation_rate`: per cent of the calls whose prompt was cut;
            - `peak_usage`: tokens of the largest call; `peak_usage_per_minute`: of all calls that ended within 60 s;
            - `mean_usage`: tokens of a call, of those whose tokens are known;
            - `estimate_accuracy`: tokens that were used, in per cent of those that a budget held for them;
            - `by_agent`: the same of each, with its `max_tokens` and the source of that: "environment", "configure()"
              or "default"; a decorator's own `max_tokens` goes before it;
            - `by_context`: the same of each `agent(..., context=...)`, with the `risk_checks` of it and the
              `mean_estimate` that these asked about;
            - `recommendations`: sentences that name what to change; none before there are ten calls to judge by.

            Of agents and contexts beyond the first 1,000 the sum is shown, as "other".

        Raises:
            ConfigurationError: The variable of an agent's maximum is not a number above 0.

        Example:
            >>> from resilience_kit import agent, token_budget
            >>> from resilience_kit.token_management import token_manager
            >>> @token_budget
            ... def ask(prompt: str) -> dict[str, dict[str, int]]:
            ...     return {"usage": {"prompt_tokens": 8, "completion_tokens": 2}}
            >>> with agent("MathAgent", context="nightly-report"):
            ...     answer = ask("What is 2 + 2?")
            >>> insights = token_manager.get_usage_insights()
            >>> insights["peak_usage"], insights["by_context"]["nightly-report"]["calls"]
            (10, 1)
            >>> insights["by_agent"]["MathAgent"]["max_tokens"], insights["recommendations"]
            (4000, [])
        """
        usage = stats.usage()
        return {
            **_account(usage.total),
            "peak_usage_per_minute": usage.busiest_minute,
            "by_agent": {name: _account(it) | _maximum(name) for name, it in usage.by_agent.items()},
            "by_context": {name: _account(it) | _estimates(it) for name, it in usage.by_context.items()},
            "recommendations": [*_about_agents(usage.by_agent), *_about_limits()],
        }


token_manager = TokenManager()


def _level(share: float, wait_in_periods: float) -> RiskLevel:
    for level, above_share, above_wait in _THRESHOLDS:
        if share > above_share or wait_in_periods > above_wait:
            return level
    return "low"


def _advice(level: RiskLevel, quota: str, share: float, wait: float, parameters: dict[str, Value]) -> str:
    if wait == math.inf:
        return (
            "it never fits: lower max_tokens or shorten the prompt, "
            f"or raise {_written('tokens_per_minute', parameters)}"
        )
    if level == "low":
        return "send it"
    start = f"it starts in {wait:.1f} s" if wait else "it fits now and leaves little"
    if level != _level(share, 0):
        return (
            f"{start}, since calls wait before it, came in a burst, or the server asked for a pause: send it later, "
            f"or raise {_written('requests_per_minute', parameters)}, of which a sixth may go in a sixth of the window"
        )
    remedy = "send fewer calls" if quota == "requests_per_minute" else "lower max_tokens or shorten the prompt"
    return f"{start}: {remedy}, or raise {_written(quota, parameters)}"


def _account(counters: Counters) -> dict[str, Any]:
    tokens = counters["prompt_tokens"] + counters["completion_tokens"]
    return {
        "calls": counters["calls"],
        "tokens": tokens,
        # a call that failed was cut all the same, and is none of the calls that came to a good end
        "truncation_rate": _per_cent(counters["truncations"], max(counters["calls"], counters["truncations"])),
        "peak_usage": counters["largest_call"],
        "mean_usage": _mean(tokens, counters["calls_measured"]),
        "estimate_accuracy": _per_cent(counters["reserved_tokens_used"], counters["tokens_reserved"]),
    }


def _maximum(agent: str) -> dict[str, Any]:
    tokens, source = current_settings().agent_max_tokens(agent)
    return {"max_tokens": tokens, "max_tokens_source": source}


def _estimates(counters: Counters) -> dict[str, Any]:
    checks = counters["risk_checks"]
    return {"risk_checks": checks, "mean_estimate": _mean(counters["tokens_estimated"], checks)}


def _about_agents(agents: dict[str, Counters]) -> Iterator[str]:
    for agent, counters in agents.items():
        account, who = _account(counters), listed((agent,))
        if max(counters["calls"], counters["truncations"]) < _ENOUGH_CALLS:
            continue
        if account["truncation_rate"] >= _MANY_CUT:
            yield (
                f"{who}: {account['truncation_rate']:.0f} % of its prompts were cut, by "
                f"{counters['tokens_truncated'] / counters['truncations']:.0f} tokens on average: raise "
                f"{_written_maximum(agent)}"
            )
        if 0 < account["estimate_accuracy"] < _LITTLE_USED:
            yield (
                f"{who}: {100 - account['estimate_accuracy']:.0f} % of the tokens that were reserved for its calls "
                "were never used: lower the max_tokens of its requests"
            )


def _about_limits() -> Iterator[str]:
    for name, counters in stats.get_all_resilience_stats()["rate_limiters"].items():
        calls = counters["calls_admitted"]
        if calls < _ENOUGH_CALLS or counters["seconds_waited"] / calls < _LONG_WAIT:
            continue
        parameters = rate_limits.describe(name, RateLimitConfiguration())
        spent = {"requests_per_minute": calls, "tokens_per_minute": counters["tokens_admitted"]}
        tighter = max(spent, key=lambda quota: spent[quota] / parameters[quota].value)
        yield (
            f"{listed((name,))}: calls wait {counters['seconds_waited'] / calls:.0f} s on average for "
            f"{_written(tighter, parameters)} or a free slot: raise it if the server allows more, raise "
            f"{_written('max_concurrent', parameters)} if calls take long, or send less"
        )


def _written(parameter: str, parameters: dict[str, Value]) -> str:
    """A parameter as it would be written where it is to be changed: in the code, or in the environment."""
    value = parameters[parameter]
    return f"{parameter if value.source == 'argument' else _VARIABLES[parameter]}={value.value}"


def _written_maximum(agent: str) -> str:
    tokens, _ = current_settings().agent_max_tokens(agent)
    if tokens is None:
        return "the max_tokens of its @token_budget"
    return f"{agent_variable(agent)}={tokens}, or the max_tokens of its @token_budget if that has one"


def _per_cent(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def _mean(total: float, number: float) -> float:
    return round(total / number, 1) if number else 0.0
