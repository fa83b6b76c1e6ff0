"""What happened so far, counted from events, beside where each limit, circuit and budget stands: in plain JSON."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from resilience_kit import events
from resilience_kit.registry import all_registries

Counters = dict[str, float]

# Each section's counters at their start, so that a name shows all of them from its first event on.
_SECTIONS: dict[str, Counters] = {
    "rate_limiters": {
        "calls_admitted": 0,
        "calls_delayed": 0,
        "calls_refused": 0,
        "tokens_admitted": 0,
        "seconds_waited": 0.0,
        "tightened_by_server": 0,
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
        "truncations": 0,
        "tokens_truncated": 0,
    },
}


def _admitted(counters: Counters, event: events.Admitted) -> None:
    counters["calls_admitted"] += 1
    counters["tokens_admitted"] += event.tokens
    if event.waited:
        counters["calls_delayed"] += 1
        counters["seconds_waited"] += event.waited


def _retrying(counters: Counters, event: events.Retrying) -> None:
    counters["retries"] += 1
    counters["seconds_waited"] += event.seconds


def _budget_waiting(counters: Counters, event: events.BudgetWaiting) -> None:
    counters["calls_delayed"] += 1
    counters["seconds_waited"] += event.seconds


def _settled(counters: Counters, event: events.BudgetSettled) -> None:
    counters["calls"] += 1
    counters["prompt_tokens"] += event.prompt_tokens
    counters["completion_tokens"] += event.completion_tokens
    counters["tokens_reserved"] += event.reserved
    counters["usd"] += event.usd


def _truncated(counters: Counters, event: events.Truncated) -> None:
    counters["truncations"] += 1
    counters["tokens_truncated"] += event.tokens_before - event.tokens_after


def _one_more(counter: str) -> Callable[[Counters, Any], None]:
    def count_one(counters: Counters, event: events.Event) -> None:
        counters[counter] += 1

    return count_one


_COUNTED: dict[type[events.Event], tuple[str, Callable[[Counters, Any], None]]] = {
    events.Admitted: ("rate_limiters", _admitted),
    events.WaitRefused: ("rate_limiters", _one_more("calls_refused")),
    events.QuotaTightened: ("rate_limiters", _one_more("tightened_by_server")),
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

# Reentrant: the garbage collector may drop a stream, and so end a call, while its thread counts another.
_lock = threading.RLock()
_counters: dict[str, dict[str, Counters]] = {section: {} for section in _SECTIONS}


@contextmanager
def isolated() -> Iterator[None]:
    """Count from zero, and go on with the counters of before at the end."""
    with _lock:
        before = dict(_counters)
        _counters.update({section: {} for section in _SECTIONS})
    try:
        yield
    finally:
        with _lock:
            _counters.update(before)


def count(event: events.Event) -> None:
    """Count an event; subscribed when the package is imported."""
    counted = _COUNTED.get(type(event))
    if counted is None:
        return
    section, add = counted
    with _lock:
        by_name = _counters[section]
        counters = by_name.get(event.name)
        if counters is None:
            counters = by_name[event.name] = dict(_SECTIONS[section])
        add(counters, event)


def get_all_resilience_stats() -> dict[str, Any]:
    """Counters and states of all that has a name, in plain JSON.

    Returns:
        `global_resilience` with the limit and the circuit that are named "default", and beside it `rate_limiters`,
        `circuit_breakers`, `token_budgets` and `agents` by name, and `retries` by function. Waits are in seconds.

    Example:
        >>> from resilience_kit import get_all_resilience_stats
        >>> get_all_resilience_stats()["global_resilience"]["circuit_breaker"]["state"]
        'CLOSED'
    """
    with _lock:
        sections: dict[str, dict[str, dict[str, Any]]] = {
            section: {name: dict(counters) for name, counters in by_name.items()}
            for section, by_name in _counters.items()
        }
    for registry in all_registries:
        for name, item in registry.items().items():
            section = sections[registry.section]
            section[name] = {**asdict(item.statistics()), **_SECTIONS[registry.section], **section.get(name, {})}
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
    with _lock:
        for by_name in _counters.values():
            by_name.clear()
