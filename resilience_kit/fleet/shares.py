"""What one process may send of a quota that a fleet shares, while the store that counts for all cannot be asked.

Each keeps to an equal part of the quota, by as many processes as were alive lately. It sends nothing until all others
must have noticed too, and have left what the store had granted them. Then, until all that was sent before has left the
server's windows, it gets no more than what it has in them itself and its part of what is left. So the fleet stays
within the quota from the first moment on.
"""

import math
from dataclasses import dataclass

from resilience_kit.quota_ceilings import SHORT_WINDOWS
from resilience_kit.quota_ledger import WindowLedger


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a quota: requests in a period and in a sixth of it, and tokens in a period."""

    requests: int
    short_requests: int
    tokens: int


class Share:
    """A process's part of a quota.

    Args:
        own: What this process has sent, and under which quota.
        processes: How many share it, this one included.
        begins_at: When all others must have noticed that the store cannot be asked.
    """

    __slots__ = ("_begins_at", "_first", "_own", "_processes", "_quota", "_whole")

    def __init__(self, own: WindowLedger, processes: int, begins_at: float) -> None:
        self._own = own
        self._processes = processes
        self._begins_at = begins_at
        self._quota = _Part(own.requests, own.short_requests, own.tokens)
        self._whole = _Part(
            *(max(1, most // processes) for most in (own.requests, self._quota.short_requests, own.tokens))
        )
        self._first: _Part | None = None

    @property
    def tokens(self) -> int:
        """The largest request that it has room for."""
        return self._whole.tokens

    def seconds_until_fits(self, tokens: int, used: tuple[int, int], late: float, now: float) -> float:
        """Seconds until one request fits beside what this process has sent.

        Args:
            tokens: The request's.
            used: Requests and tokens that the window holds of all processes, as last heard of.
            late: Seconds by which what this process has sent may have left it later than it was counted.
            now: The time.
        """
        if tokens > self._whole.tokens:
            return math.inf
        if now < self._begins_at:
            return self._begins_at - now
        if self._first is None:
            self._first = self._first_part(used, now)
        period = self._own.period
        short_widens_at, widens_at = self._begins_at + period / SHORT_WINDOWS, self._begins_at + period
        part = self._whole if now >= widens_at else self._first
        short_requests = (self._whole if now >= short_widens_at else self._first).short_requests
        due = math.inf
        if tokens <= part.tokens:
            due = self._own.seconds_until_fits_into(part.requests, short_requests, part.tokens, tokens, now - late)
        return min([due, *(at - now for at in (short_widens_at, widens_at) if at > now)])

    def _first_part(self, used: tuple[int, int], now: float) -> _Part:
        if self._processes == 1:
            return self._whole
        whole, quota, sent = self._whole, self._quota, self._own.sent(now)
        own_short = sum(at > now - self._own.period / SHORT_WINDOWS for at, _ in sent)
        own_tokens = sum(tokens for _, tokens in sent)

        def first(part: int, most: int, own: int, of_all: int) -> int:
            return min(part, own + max(0, most - of_all) // self._processes)

        return _Part(
            first(whole.requests, quota.requests, len(sent), used[0]),
            # of the short windows nothing is known but this process's part: the others may have filled them
            first(whole.short_requests, quota.short_requests, own_short, used[0]),
            first(whole.tokens, quota.tokens, own_tokens, used[1]),
        )
