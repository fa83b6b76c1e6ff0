"""Decorators that make calls to Azure OpenAI and other LLM services behave well under rate limits and failures.

A name is imported from its module when it is first used, so that `import resilience_kit` costs next to nothing.
"""

from typing import TYPE_CHECKING

from resilience_kit import events, stats
from resilience_kit.lazy_names import lazy_names
from resilience_kit.monitoring import log_events

if TYPE_CHECKING:
    from resilience_kit.agents import agent
    from resilience_kit.circuit_breaking import circuit_protected, reset_circuit_breakers
    from resilience_kit.errors import (
        CircuitOpenError,
        ConfigurationError,
        RateLimitTimeoutError,
        ResilienceError,
        StackOrderWarning,
        StoreContentError,
        StoreUnavailableError,
        TokenBudgetExceededError,
    )
    from resilience_kit.events import subscribe
    from resilience_kit.planning import Plan, plan
    from resilience_kit.pricing import Price, set_prices
    from resilience_kit.priorities import priority
    from resilience_kit.rate_limiting import rate_limited
    from resilience_kit.retrying import retry_on_429
    from resilience_kit.settings import ResilienceSettings, configure
    from resilience_kit.stack import StackReport, explain, resilient
    from resilience_kit.stats import get_all_resilience_stats, reset_all
    from resilience_kit.token_budgeting import token_budget
    from resilience_kit.token_counting import count_tokens
    from resilience_kit.token_management import RateLimitRisk, TokenManager, token_manager

__all__ = [
    "CircuitOpenError",
    "ConfigurationError",
    "Plan",
    "Price",
    "RateLimitRisk",
    "RateLimitTimeoutError",
    "ResilienceError",
    "ResilienceSettings",
    "StackOrderWarning",
    "StackReport",
    "StoreContentError",
    "StoreUnavailableError",
    "TokenBudgetExceededError",
    "TokenManager",
    "agent",
    "circuit_protected",
    "configure",
    "count_tokens",
    "explain",
    "get_all_resilience_stats",
    "plan",
    "priority",
    "rate_limited",
    "reset_all",
    "reset_circuit_breakers",
    "resilient",
    "retry_on_429",
    "set_prices",
    "subscribe",
    "token_budget",
    "token_manager",
]

_HOMES = {
    ".agents": ("agent",),
    ".circuit_breaking": ("circuit_protected", "reset_circuit_breakers"),
    ".errors": (
        "CircuitOpenError",
        "ConfigurationError",
        "RateLimitTimeoutError",
        "ResilienceError",
        "StackOrderWarning",
        "StoreContentError",
        "StoreUnavailableError",
        "TokenBudgetExceededError",
    ),
    ".events": ("subscribe",),
    ".planning": ("Plan", "plan"),
    ".pricing": ("Price", "set_prices"),
    ".priorities": ("priority",),
    ".rate_limiting": ("rate_limited",),
    ".retrying": ("retry_on_429",),
    ".settings": ("ResilienceSettings", "configure"),
    ".stack": ("StackReport", "explain", "resilient"),
    ".stats": ("get_all_resilience_stats", "reset_all"),
    ".token_budgeting": ("token_budget",),
    ".token_counting": ("count_tokens",),
    ".token_management": ("RateLimitRisk", "TokenManager", "token_manager"),
}

# not for type checkers, to which a name that is misspelt is an error so
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)

# Who counts and who logs; any other listener subscribes in the same way.
events.subscribe(stats.count, tally=stats.tally)
events.subscribe(log_events.log, wants=log_events.wants)
