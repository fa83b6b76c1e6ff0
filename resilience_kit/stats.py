"""What happened so far, counted from events, beside where each limit, circuit and budget stands: in plain JSON."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from resilience_kit import events
from resilience_kit.agents import current_agent
from resilience_kit.registry import all_registries

Counters = dict[str, float]

# Each section's counters at their start, so that a name shows all of them from its first event on.
_SECTIONS: dict[str, Counters] = {
    "rate_limiters": {
        "calls_admitted": 0,
        "calls_delayed": 0,
        "calls_refused": 0,
        "calls_rate_limited": 0,
        "tokens_admitted": 0,
        "seconds_waited": 0.0,
        "tightened_by_server": 0,
        "relaxed_again": 0,
    },
    "circuit_breakers": {"times_opened": 0, "times_closed": 0, "calls_refused": 0},
    "retries": {"retries": 0, "calls_recovered": 0, "calls_given_up": 0, "seconds_waited": 0.0},
    "token_budgets": {"calls_refused": 0, "calls_delayed": 0, "seconds_waited": 0.0},
    "agents": {
        "calls": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "tokens_reserved": 0,
        "usd": 0.0,
        "calls_of_unknown_price": 0,
        "truncations": 0,
        "tokens_truncated": 0,
    },
    "models": {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "usd": 0.0, "calls_of_unknown_price": 0},
}

# What only rises, until it is reset; all else in a section says where something stands.
COUNTERS: Mapping[str, tuple[str, ...]] = {section: tuple(counters) for section, counters in _SECTIONS.items()}

# An agent's account has more than its section shows: the token manager explains it.
_ACCOUNT: Counters = {
    **_SECTIONS["agents"],
    "calls_measured": 0,
    "largest_call": 0,
    "reserved_tokens_used": 0,
    "risk_checks": 0,
    "tokens_estimated": 0,
}
# Agents and contexts may be named by the users of a program, and models by a server: those that come after so many are
# counted as "other".
_MOST_NAMES = 1_000
_MOST_ACCOUNTS = 10_000
_MINUTE = 60


@dataclass(frozen=True, slots=True)
class Usage:
    """The counters that the token manager explains: of all calls, by agent and by context."""

    total: Counters
    by_agent: dict[str, Counters]
    by_context: dict[str, Counters]
    busiest_minute: int


def _admitted(counters: Counters, values: tuple[Any, ...]) -> None:
    waited, tokens = values
    counters["calls_admitted"] += 1
    counters["tokens_admitted"] += tokens
    if waited:
        counters["calls_delayed"] += 1
        counters["seconds_waited"] += waited


def _retrying(counters: Counters, values: tuple[Any, ...]) -> None:
    _, seconds, *_ = values
    counters["retries"] += 1
    counters["seconds_waited"] += seconds


def _budget_waiting(counters: Counters, values: tuple[Any, ...]) -> None:
    seconds, *_ = values
    counters["calls_delayed"] += 1
    counters["seconds_waited"] += seconds


def _settled(counters: Counters, values: tuple[Any, ...]) -> None:
    reserved, prompt_tokens, completion_tokens, usd, model = values
    _count_call(counters, usd)
    used = prompt_tokens + completion_tokens
    if reserved:
        counters["tokens_reserved"] += reserved
        counters["reserved_tokens_used"] += used
    if used:
        counters["prompt_tokens"] += prompt_tokens
        counters["completion_tokens"] += completion_tokens
        counters["calls_measured"] += 1
        counters["largest_call"] = max(counters["largest_call"], used)
        # asyncio takes 0.05 s to import: paid by the first call, not by `import resilience_kit`
        from resilience_kit.waiting import now

        _counts.minute.add(used, int(now()))
    if model is not None:
        models = _counts.sections["models"]
        of_model = models.get(model) or _new_model(models, model)
        _count_call(of_model, usd)
        of_model["prompt_tokens"] += prompt_tokens
        of_model["completion_tokens"] += completion_tokens


def _count_call(counters: Counters, usd: float | None) -> None:
    counters["calls"] += 1
    if usd is None:
        counters["calls_of_unknown_price"] += 1
    else:
        counters["usd"] += usd


def _new_model(models: dict[str, Counters], model: str) -> Counters:
    key = model if len(models) < _MOST_NAMES else "other"
    return models.setdefault(key, dict(_SECTIONS["models"]))


def _truncated(counters: Counters, values: tuple[Any, ...]) -> None:
    tokens_before, tokens_after, _ = values
    counters["truncations"] += 1
    counters["tokens_truncated"] += tokens_before - tokens_after


def _one_more(counter: str) -> Callable[[Counters, tuple[Any, ...]], None]:
    def count_one(counters: Counters, values: tuple[Any, ...]) -> None:
        counters[counter] += 1

    return count_one


# The section that each is counted in, and how: from the values of its fields but the name.
_COUNTED: dict[type[events.Event], tuple[str, Callable[[Counters, tuple[Any, ...]], None]]] = {
    events.Admitted: ("rate_limiters", _admitted),
    events.RateLimited: ("rate_limiters", _one_more("calls_rate_limited")),
    events.WaitRefused: ("rate_limiters", _one_more("calls_refused")),
    events.QuotaTightened: ("rate_limiters", _one_more("tightened_by_server")),
    events.QuotaRelaxed: ("rate_limiters", _one_more("relaxed_again")),
    events.CircuitOpened: ("circuit_breakers", _one_more("times_opened")),
    events.CircuitClosed: ("circuit_breakers", _one_more("times_closed")),
    events.CircuitRefused: ("circuit_breakers", _one_more("calls_refused")),
    events.Retrying: ("retries", _retrying),
    events.RetriesRecovered: ("retries", _one_more("calls_recovered")),
    events.RetriesExhausted: ("retries", _one_more("calls_given_up")),
    events.BudgetRefused: ("token_budgets", _one_more("calls_refused")),
    events.BudgetWaiting: ("token_budgets", _budget_waiting),
    events.BudgetSettled: ("agents", _settled),
    events.Truncated: ("agents", _truncated),
}


class _Minute:
    """The tokens of the last minute, in whole seconds, and the most that a minute has seen."""

    __slots__ = ("busiest", "seconds", "tokens")

    def __init__(self) -> None:
        self.seconds: deque[list[int]] = deque()
        self.tokens = 0
        self.busiest = 0

    def add(self, tokens: int, second: int) -> None:
        if not self.seconds or self.seconds[-1][0] != second:
            self.seconds.append([second, 0])
            while self.seconds[0][0] <= second - _MINUTE:
                self.tokens -= self.seconds.popleft()[1]
        self.seconds[-1][1] += tokens
        self.tokens += tokens
        self.busiest = max(self.busiest, self.tokens)


@dataclass(slots=True)
class _Counts:
    """All that is counted: by section and name, and of agents by agent and context."""

    sections: dict[str, dict[str, Counters]] = field(default_factory=lambda: {section: {} for section in _SECTIONS})
    accounts: dict[tuple[str, str], Counters] = field(default_factory=dict)
    minute: _Minute = field(default_factory=_Minute)

    def take(self, other: "_Counts") -> None:
        self.sections, self.accounts, self.minute = other.sections, other.accounts, other.minute


# Reentrant: the garbage collector may drop a stream, and so end a call, while its thread counts another.
_lock = threading.RLock()
_counts = _Counts()


def _start_anew() -> None:
    # with the limits, circuits and budgets, which start with nothing in a forked child
    _counts.take(_Counts())
    _lock.release()


if hasattr(os, "register_at_fork"):
    # held over the fork, so that no other thread is in the midst of counting
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_start_anew)


@contextmanager
def isolated() -> Iterator[None]:
    """Count from zero, and go on with the counters of before at the end."""
    with _lock:
        before = replace(_counts)
        _counts.take(_Counts())
    try:
        yield
    finally:
        with _lock:
            _counts.take(before)


def count(event: events.Event) -> None:
    """Count an event; subscribed when the package is imported."""
    name, *values = (getattr(event, field.name) for field in fields(event))
    tally(type(event), name, tuple(values))


def tally(kind: type[events.Event], name: str, values: tuple[Any, ...]) -> None:
    """Count an event from its fields: no record is made for it alone."""
    counted = _COUNTED.get(kind)
    if counted is None:
        return
    section, add = counted
    with _lock:
        if section == "agents":
            # Listeners run in the task or thread of the call, so its context is the current one.
            agent = current_agent()
            context = "default" if agent is None or agent.context is None else agent.context
            counters = _counts.accounts.get((name, context)) or _account(name, context)
        else:
            by_name = _counts.sections[section]
            counters = by_name.get(name) or by_name.setdefault(name, dict(_SECTIONS[section]))
        add(counters, values)


def count_estimate(context: str, tokens: int) -> None:
    """Count a call that somebody asked about before making it."""
    with _lock:
        account = _account("", context)
        account["risk_checks"] += 1
        account["tokens_estimated"] += tokens


def usage() -> Usage:
    """What was used so far."""
    _take_in_unheard()
    with _lock:
        by_agent, by_context = defaultdict[str, list[Counters]](list), defaultdict[str, list[Counters]](list)
        for (agent, context), account in _counts.accounts.items():
            by_context[context].append(account)
            if agent:
                by_agent[agent].append(account)
        return Usage(
            _sum(_counts.accounts.values()),
            {name: _sum(accounts) for name, accounts in by_agent.items()},
            {name: _sum(accounts) for name, accounts in by_context.items()},
            _counts.minute.busiest,
        )


def _take_in_unheard() -> None:
    """Count the calls that budgets counted themselves, since nobody else heard of them."""
    for registry in all_registries:
        if registry.section != "token_budgets":
            continue
        for name, budget in registry.items().items():
            # outside of the lock: a budget may be asked where its own is held
            calls = budget.take_unheard()
            if calls:
                with _lock:
                    account = _account(name, "default")
                    account["calls"] += calls
                    account["calls_of_unknown_price"] += calls


def _account(agent: str, context: str) -> Counters:
    account = _counts.accounts.get((agent, context))
    if account is None:
        agents, contexts = ({key[part] for key in _counts.accounts} for part in (0, 1))
        key = (
            agent if agent in agents or len(agents) < _MOST_NAMES else "other",
            context if context in contexts or len(contexts) < _MOST_NAMES else "other",
        )
        if len(_counts.accounts) >= _MOST_ACCOUNTS:
            key = ("other", "other")
        account = _counts.accounts.setdefault(key, dict(_ACCOUNT))
    return account


def _sum(accounts: Iterable[Counters]) -> Counters:
    total = dict(_ACCOUNT)
    for account in accounts:
        largest = max(total["largest_call"], account["largest_call"])
        total = {name: total[name] + account[name] for name in total} | {"largest_call": largest}
    return total


def get_all_resilience_stats() -> dict[str, Any]:
    """Counters and states of all that has a name, in plain JSON.

    Returns:
        `global_resilience` with the limit and the circuit that are named "default", and beside it `rate_limiters`,
        `circuit_breakers`, `token_budgets`, `agents` and `models` by name, and `retries` by function. Waits are in
        seconds.

    Example:
        >>> from resilience_kit import get_all_resilience_stats
        >>> get_all_resilience_stats()["global_resilience"]["circuit_breaker"]["state"]
        'CLOSED'
    """
    agents = usage().by_agent
    with _lock:
        sections: dict[str, dict[str, dict[str, Any]]] = {
            section: {name: dict(counters) for name, counters in by_name.items()}
            for section, by_name in _counts.sections.items()
        }
        shown = _SECTIONS["agents"]
        sections["agents"] = {name: {key: it[key] for key in shown} for name, it in agents.items()}
    for registry in all_registries:
        for name, item in registry.items().items():
            section = sections[registry.section]
            state, counters = asdict(item.statistics()), section.get(name, _SECTIONS[registry.section])
            # what nobody else listens to is counted where it happens
            section[name] = {**state, **{key: counter + state.get(key, 0) for key, counter in counters.items()}}
    circuit = {"state": "CLOSED", "failure_count": 0, **sections["circuit_breakers"].get("default", {})}
    limiter = sections["rate_limiters"].get("default", dict(_SECTIONS["rate_limiters"]))
    return {"global_resilience": {"circuit_breaker": circuit, "rate_limiter": limiter}, **sections}


def reset_all() -> None:
    """Put all limits, circuits and budgets back to their start, and all counters to zero; what was declared stays.

    Calls that are under way keep their slots.

    Example:
        >>> from resilience_kit import reset_all
        >>> reset_all()
    """
    for registry in all_registries:
        registry.reset()
    _take_in_unheard()
    with _lock:
        _counts.take(_Counts())
