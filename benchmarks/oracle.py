"""The best possible: what agents get from a quota if they know the server's books, now and for ever.

It is computed and not run: each agent sends what it has at the very moment at which the server has room for it, and no
message takes any time. So each window's quota is spent as soon as it is there, and nothing is ever refused.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.agents import AGENTS, Limits, Order, seconds_to_answer
from resilience_kit.testing.server_windows import ServerQuota
from resilience_kit.testing.simulator_stats import Admission

# Added to each wait, so that rounding does not make it end just before there is room.
_TICK = 1e-6


@dataclass(frozen=True, slots=True)
class QuotaChange:
    """From some time on, the server has another quota."""

    at: float
    requests: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Best:
    """What the server would have admitted, and when the last answer would have been there."""

    admissions: tuple[Admission, ...]
    finished: float


def server_of(quota: Limits, origin: float = 0.0) -> ServerQuota:
    """The server's books: tokens in a fixed window that began at `origin`, requests in sliding ones."""
    return ServerQuota(
        origin,
        request_limit=quota.requests,
        token_limit=quota.tokens,
        period=quota.period,
        token_window="fixed",  # noqa: S106 - tokens of text, no secret
        request_window=10,
        count_refused=False,
    )


def best_possible(
    quota: ServerQuota,
    orders: Iterator[Order],
    *,
    period: float,
    start: float = 0.0,
    until: float = math.inf,
    changes: Iterable[QuotaChange] = (),
    in_turn: bool = False,
) -> Best:
    """Work the orders off against the server's own arithmetic, without a server.

    Args:
        quota: The server's books, with what they hold at the start.
        orders: What is to be asked.
        period: The length of the window, which the answers' durations scale with.
        start: When the agents begin, on the clock of `quota`.
        until: When to stop, if there are orders without end.
        changes: Other quotas, in the order of their times.
        in_turn: Whether orders are sent first come, first served, so that small ones wait behind a large one.
    """
    to_come = list(changes)
    waiting: list[Order] = []
    answers: list[float] = []  # a heap of the times at which agents are free again
    admissions: list[Admission] = []
    now = finished = start
    while now < until:
        while to_come and to_come[0].at <= now:
            change = to_come.pop(0)
            quota.request_limit, quota.token_limit = change.requests, change.tokens
        while answers and answers[0] <= now:
            finished = heapq.heappop(answers)
        waiting += itertools.islice(orders, AGENTS - len(answers) - len(waiting))
        waits = []
        for order in tuple(waiting):
            refusal = quota.admit(now, order.tokens)
            if refusal is None:
                waiting.remove(order)
                admissions.append(Admission(now, order.tokens))
                heapq.heappush(answers, now + seconds_to_answer(order.max_tokens, period))
            else:
                waits.append(now + refusal.retry_after)
                if in_turn:
                    break
        events = [*waits, *answers[:1], *(change.at for change in to_come[:1])]
        if not waiting and not answers:
            break
        now = min(events) + _TICK
    return Best(tuple(admissions), finished)
