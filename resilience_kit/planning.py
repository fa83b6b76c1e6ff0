"""plan(): what a workload will get out of a quota, and which settings it needs for that, before anything is sent."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from resilience_kit.errors import ConfigurationError
from resilience_kit.registry import mode
from resilience_kit.testing.server_windows import RequestWindow, TokenWindow
from resilience_kit.validating import is_number
from resilience_kit.workload_simulation import MINUTE, Limits, Range, Workload, simulate

BindingLimit = Literal["agents", "requests_per_minute", "tokens_per_minute", "max_concurrent", "min_interval"]

# What there is beyond the mean need of slots and of starts a minute: calls come in bursts, and some take longer.
_HEADROOM = 1.5
# More calls would take more than some seconds to simulate; a waiting agent looks at its queue about once a minute, and
# so many looks take the time of a call.
_MOST_CALLS = 20_000
_LOOKS_PER_CALL = 4
_FEWEST_MINUTES = 2
_LONGEST_WAIT = 30 * MINUTE
# Of requests, tokens or seconds: with more, a sum would leave the range of whole numbers that a float knows.
_MOST = 10**12

_ADVICE: dict[BindingLimit, str] = {
    "agents": "the quota has room for more agents",
    "requests_per_minute": "fewer and larger calls would get more done, or more requests per minute",
    "tokens_per_minute": "shorter prompts, a lower max_tokens or more tokens per minute would let more calls through",
    "max_concurrent": "more slots would let more calls through",
    "min_interval": "a shorter interval would let more calls through",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a workload will get out of a quota; `str()` is for reading.

    Attributes:
        requests_per_minute: Calls a minute that the server admits.
        tokens_per_minute: Tokens a minute of their prompts and answers.
        requests_used: The share, 0 to 1, of the quota's requests that is used.
        tokens_used: The share, 0 to 1, of the quota's tokens that the calls are charged for.
        wait_p50: Seconds in the kit's queue, of the median call.
        wait_p95: Seconds in the kit's queue that 95 % of the calls stay below.
        wait_p99: Seconds in the kit's queue that 99 % of the calls stay below.
        latency_p50: Seconds from a call to its answer, the queue and retries included, of the median call.
        latency_p95: Seconds from a call to its answer that 95 % of the calls stay below.
        refusals: 429s of the whole run; the kit retries them.
        minutes: How long the run was, its warm-up included.
        binding_limit: What holds the throughput back: "requests_per_minute", "tokens_per_minute", "max_concurrent" or
            "min_interval"; "agents" if nothing does, and the agents ask for no more.
        settings: What to put into rate-limiting.env, by name.
        recommended: The plan with these settings, if `max_concurrent` or `min_interval` was given and is another.

    Example:
        >>> from resilience_kit import plan
        >>> planned = plan(
        ...     requests_per_minute=60,
        ...     tokens_per_minute=150_000,
        ...     agents=8,
        ...     prompt_tokens=200,
        ...     output_tokens=100,
        ...     latency=1,
        ... )
        >>> f"{planned.requests_used:.0%} of the requests, limited by {planned.binding_limit}"
        '100% of the requests, limited by requests_per_minute'
    """

    requests_per_minute: float
    tokens_per_minute: float
    requests_used: float
    tokens_used: float
    wait_p50: float
    wait_p95: float
    wait_p99: float
    latency_p50: float
    latency_p95: float
    refusals: int
    minutes: float
    binding_limit: BindingLimit
    settings: dict[str, float]
    recommended: "Plan | None" = None

    def __str__(self) -> str:
        if self.recommended is None:
            lines = _figures(self)
        else:
            lines = ["As it is", *_figures(self), "", "As recommended", *_figures(self.recommended)]
        return "\n".join([*lines, "", *(f"{name}={value:.10g}" for name, value in self.settings.items())])


def plan(
    *,
    requests_per_minute: int,
    tokens_per_minute: int,
    agents: int,
    prompt_tokens: float | Range,
    output_tokens: float | Range,
    latency: float | Range,
    max_concurrent: int | None = None,
    min_interval: float | None = None,
    max_tokens: int | None = None,
    calls_per_minute: float | None = None,
    minutes: float = 10,
    token_window: TokenWindow = "fixed",  # noqa: S107 - tokens of text, no secret
    request_window: RequestWindow = 10,
    seed: int = 0,
) -> Plan:
    """Foresee what agents will get out of a quota: throughput, waits, 429s, what holds them back, and the settings.

    The workload runs in virtual time through the kit's own limiter and retries, against the arithmetic of the
    simulator; it sends nothing, and the process's limits, settings and statistics know nothing of it. It takes a
    second, or some: of a workload of more than 20,000 calls fewer minutes are simulated, and if that is not enough, a
    part, with agents, slots and quota divided alike. In an event loop, use `await asyncio.to_thread(plan, ...)`.

    What has a range is drawn from it evenly.

    Args:
        requests_per_minute: The quota's requests.
        tokens_per_minute: The quota's tokens.
        agents: How many ask, each with one call at a time; 10,000 at most.
        prompt_tokens: Tokens of a prompt: a number, or the least and the most.
        output_tokens: Tokens of an answer: a number, or the least and the most.
        latency: Seconds from the sending of a call to its answer: a number, or the least and the most.
        max_concurrent: Calls under way at once. Default: as many as the throughput needs by Little's law, and half as
            many again.
        min_interval: Seconds between the starts of two calls. Default: 0, as the limiter keeps to the quota without.
        max_tokens: What calls ask for as `max_tokens`, and are charged for. Default: the most of `output_tokens`.
        calls_per_minute: Calls that each agent starts, at random times, or later where the one before takes longer.
            Default: the next as soon as it has its answer.
        minutes: How long to measure, 1 to 60, or less where there are too many calls; it follows a warm-up of a
            minute, or of one call of each agent if that is longer.
        token_window: Whether the server counts tokens anew each minute, "fixed", or those of the last, "sliding".
        request_window: Over how many seconds the server evaluates requests too: 10 or 1.
        seed: Another seed draws other random times and tokens; the same gives the same plan.

    Raises:
        ConfigurationError: An argument cannot work, or a call is larger than the quota.

    Example:
        >>> from resilience_kit import plan
        >>> planned = plan(
        ...     requests_per_minute=600,
        ...     tokens_per_minute=150_000,
        ...     agents=64,
        ...     prompt_tokens=(200, 2_000),
        ...     output_tokens=(100, 900),
        ...     latency=(1, 3),
        ... )
        >>> planned.binding_limit
        'tokens_per_minute'
        >>> planned.settings["MAX_CONCURRENT_REQUESTS"]
        4
    """
    if mode.disabled or mode.skips_waiting:
        raise ConfigurationError(
            "plan() needs the limiter that disabled() and no_waiting() switch off: call it outside"
        )
    _check("requests_per_minute", requests_per_minute, 1, _MOST, whole=True)
    _check("tokens_per_minute", tokens_per_minute, 1, _MOST, whole=True)
    _check("agents", agents, 1, 10_000, whole=True)
    _check("minutes", minutes, 1, 60)
    _check("seed", seed, 0, _MOST, whole=True)
    _check("max_concurrent", max_concurrent, 1, _MOST, whole=True, optional=True)
    _check("max_tokens", max_tokens, 0, _MOST, whole=True, optional=True)
    _check("min_interval", min_interval, 0, _MOST, optional=True)
    _check("calls_per_minute", calls_per_minute, 0.1, _MOST, optional=True)
    _check_choice("token_window", token_window, get_args(TokenWindow))
    _check_choice("request_window", request_window, get_args(RequestWindow))
    output = _range("output_tokens", output_tokens)
    if max_tokens is not None and max_tokens < output[1]:
        raise ConfigurationError(
            f"plan(max_tokens={max_tokens!r}): an answer may have {output[1]:g} tokens: say as many"
        )
    workload = Workload(
        agents=int(agents),
        calls_per_minute=calls_per_minute,
        prompt_tokens=_range("prompt_tokens", prompt_tokens),
        output_tokens=output,
        max_tokens=math.ceil(output[1] if max_tokens is None else max_tokens),
        latency=_range("latency", latency),
    )
    largest = math.ceil(workload.prompt_tokens[1]) + workload.max_tokens
    if largest > tokens_per_minute:
        raise ConfigurationError(
            f"plan(tokens_per_minute={tokens_per_minute!r}): a call may be charged for {largest} tokens, prompt and "
            "max_tokens, and would never fit: shorten the prompt, lower max_tokens, or plan for a larger quota"
        )
    unheld = Limits(
        requests_per_minute=int(requests_per_minute),
        tokens_per_minute=int(tokens_per_minute),
        token_window=token_window,
        request_window=request_window,
        max_concurrent=workload.agents,
        min_interval=0.0,
    )
    recommended = _recommended(workload, unheld, max_concurrent, min_interval)
    limits = replace(
        recommended,
        max_concurrent=recommended.max_concurrent if max_concurrent is None else int(max_concurrent),
        min_interval=recommended.min_interval if min_interval is None else min_interval,
    )
    settings = _settings(recommended)
    planned = _planned(workload, limits, minutes, seed, settings)
    if limits == recommended:
        return planned
    return replace(planned, recommended=_planned(workload, recommended, minutes, seed, settings))


def _recommended(workload: Workload, unheld: Limits, max_concurrent: int | None, min_interval: float | None) -> Limits:
    """What is given, unless it is too tight for what quota and agents allow; slots by Little's law."""
    rates = _rates(workload, unheld)
    calls_per_minute = min(rates.values())
    slots = math.ceil(_HEADROOM * calls_per_minute * _mean(workload.latency) / MINUTE)
    if calls_per_minute == rates["agents"]:
        # what the quota has room for need not wait for a slot
        slots = workload.agents
    interval = min_interval or 0.0
    return replace(
        unheld,
        max_concurrent=max(min(slots, workload.agents), 1, int(max_concurrent or 1)),
        min_interval=interval if interval * calls_per_minute * _HEADROOM <= MINUTE else 0.0,
    )


def _rates(workload: Workload, limits: Limits) -> dict[BindingLimit, float]:
    """Calls a minute that each limit would let through if it were the only one."""
    latency = _mean(workload.latency)
    asked = math.inf if workload.calls_per_minute is None else workload.agents * workload.calls_per_minute
    return {
        "agents": min(asked, _ratio(workload.agents * MINUTE, latency)),
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": _ratio(limits.tokens_per_minute, _mean(workload.prompt_tokens) + workload.max_tokens),
        "max_concurrent": _ratio(limits.max_concurrent * MINUTE, latency),
        "min_interval": _ratio(MINUTE, limits.min_interval),
    }


def _planned(workload: Workload, limits: Limits, minutes: float, seed: int, settings: dict[str, float]) -> Plan:
    rates = _rates(workload, limits)
    binding = min(rates, key=lambda limit: rates[limit])
    # when each agent had one call, the queue is as long as it will be
    turn = _mean(workload.latency) if binding == "agents" else workload.agents * MINUTE / rates[binding]
    if turn > _LONGEST_WAIT:
        raise ConfigurationError(
            f"plan(agents={workload.agents}): with this {binding} each would have an answer every "
            f"{turn / MINUTE:.0f} minutes; plan for so few that it is every {_LONGEST_WAIT / MINUTE:.0f} at most"
        )
    warm_up = max(MINUTE, turn)
    calls_a_minute = rates[binding] + workload.agents / _LOOKS_PER_CALL
    affordable = math.floor((_MOST_CALLS / calls_a_minute) - warm_up / MINUTE)
    minutes = min(minutes, max(affordable, _FEWEST_MINUTES))
    run = warm_up / MINUTE + minutes
    scale, workload, scaled = _scaled(workload, limits, calls_a_minute * run)
    outcome = simulate(workload, scaled, warm_up=warm_up, seconds=minutes * MINUTE, seed=seed)
    per_minute = scale / minutes
    return Plan(
        requests_per_minute=outcome.calls * per_minute,
        tokens_per_minute=outcome.tokens * per_minute,
        requests_used=outcome.calls / minutes / scaled.requests_per_minute,
        tokens_used=outcome.charged_tokens / minutes / scaled.tokens_per_minute,
        wait_p50=_percentile(outcome.waits, 50),
        wait_p95=_percentile(outcome.waits, 95),
        wait_p99=_percentile(outcome.waits, 99),
        latency_p50=_percentile(outcome.latencies, 50),
        latency_p95=_percentile(outcome.latencies, 95),
        refusals=round(outcome.refusals * scale),
        minutes=run,
        binding_limit=binding,
        settings=dict(settings),
    )


def _scaled(workload: Workload, limits: Limits, calls: float) -> tuple[float, Workload, Limits]:
    """How many times too large a workload of so many calls is, and the part of it that is not, on as large a quota."""
    if calls <= _MOST_CALLS:
        return 1.0, workload, limits
    at_once = min(workload.agents, limits.max_concurrent)
    part = int(at_once * _MOST_CALLS / calls)
    if part == 0:
        raise ConfigurationError(
            f"plan() would have to simulate {calls:,.0f} calls, {at_once} at once, and {_MOST_CALLS:,} take seconds: "
            "plan for a longer latency or a smaller quota"
        )
    scale = at_once / part
    # a whole number in each short window too, as there is, or nearly, in the large quota
    windows = 60 // limits.request_window
    return (
        scale,
        replace(workload, agents=round(workload.agents / scale)),
        replace(
            limits,
            requests_per_minute=max(1, round(limits.requests_per_minute / scale / windows)) * windows,
            tokens_per_minute=math.ceil(limits.tokens_per_minute / scale),
            max_concurrent=round(limits.max_concurrent / scale),
            min_interval=limits.min_interval * scale,
        ),
    )


def _figures(it: Plan) -> list[str]:
    return [
        f"throughput    {it.requests_per_minute:,.1f} calls and {it.tokens_per_minute:,.0f} tokens a minute",
        f"quota in use  {it.requests_used:.0%} of the requests, {it.tokens_used:.0%} of the tokens",
        f"in the queue  {it.wait_p50:,.1f} s p50, {it.wait_p95:,.1f} s p95, {it.wait_p99:,.1f} s p99",
        f"whole call    {it.latency_p50:,.1f} s p50, {it.latency_p95:,.1f} s p95",
        f"429s          {it.refusals:,} in {it.minutes:,.0f} minutes",
        f"limited by    {it.binding_limit}: {_ADVICE[it.binding_limit]}",
    ]


def _settings(limits: Limits) -> dict[str, float]:
    return {
        "REQUESTS_PER_MINUTE": limits.requests_per_minute,
        "TOKENS_PER_MINUTE": limits.tokens_per_minute,
        "MAX_CONCURRENT_REQUESTS": limits.max_concurrent,
        "MIN_REQUEST_INTERVAL_MS": limits.min_interval * 1_000,
    }


def _check(name: str, value: object, least: float, most: float, *, whole: bool = False, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not is_number(value) or not least <= value <= most or (whole and value != int(value)):
        expected = "a whole number" if whole else "a number"
        raise ConfigurationError(f"plan({name}={value!r}): expected {expected} from {least:,} to {most:,}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"plan({name}={value!r}): expected {' or '.join(map(repr, choices))}")


def _range(name: str, value: Any) -> Range:
    match value:
        case [least, most]:
            pass
        case _:
            least = most = value
    if not is_number(least) or not is_number(most) or not 0 <= least <= most <= _MOST:
        raise ConfigurationError(
            f"plan({name}={value!r}): expected a number, 0 or more, or the least and the most, as in {name}=(1, 3)"
        )
    return (float(least), float(most))


def _mean(ends: Range) -> float:
    return sum(ends) / 2


def _ratio(amount: float, each: float) -> float:
    return amount / each if each else math.inf


def _percentile(seconds: list[float], percent: int) -> float:
    """The value that so many per cent stay at or below; 0 if there is none."""
    return sorted(seconds)[math.ceil(len(seconds) * percent / 100) - 1] if seconds else 0.0
