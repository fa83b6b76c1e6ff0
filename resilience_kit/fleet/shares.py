"""What one process may send of a quota that a fleet shares, while the store that counts for all cannot be asked.

Each keeps to an equal part of the quota, by as many processes as were alive when the store was last heard of. For a
first period it gets no more than what it has sent and its part of what was left: what the others sent is still in the
server's windows, and so the fleet stays within the quota from the first moment on.
"""

import math
from dataclasses import dataclass

from resilience_kit.quota_ledger import WindowLedger


@dataclass(frozen=True, slots=True)
class Share:
    """A process's part of a quota: of requests and tokens in a period, and for a first period less.

    Attributes:
        requests: Requests of the share.
        tokens: Tokens of the share; a request of more never fits.
        first_requests: Requests until it widens.
        first_tokens: Tokens until it widens.
        widens_at: When it becomes the whole share.
    """

    requests: int
    tokens: int
    first_requests: int = 0
    first_tokens: int = 0
    widens_at: float = -math.inf

    def seconds_until_fits(self, own: WindowLedger, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens fits beside what this process has sent."""
        if tokens > self.tokens:
            return math.inf
        if now >= self.widens_at:
            return own.seconds_until_fits_into(self.requests, self.tokens, tokens, now)
        until_widened = self.widens_at - now
        if tokens > self.first_tokens:
            return until_widened
        return min(until_widened, own.seconds_until_fits_into(self.first_requests, self.first_tokens, tokens, now))


def share_of(own: WindowLedger, processes: int, used: tuple[int, int] | None, now: float) -> Share:
    """A process's share.

    Args:
        own: What this process has sent, and under which quota.
        processes: How many share it, this one included.
        used: Requests and tokens that the window holds of all processes, as last heard of; None where all have kept
            to their shares for a period.
        now: The time.
    """
    requests, tokens = max(1, own.requests // processes), max(1, own.tokens // processes)
    if used is None or processes == 1:
        return Share(requests, tokens)
    sent = own.sent(now)
    own_requests, own_tokens = len(sent), sum(tokens for _, tokens in sent)
    return Share(
        requests,
        tokens,
        min(requests, own_requests + max(0, own.requests - used[0]) // processes),
        min(tokens, own_tokens + max(0, own.tokens - used[1]) // processes),
        now + own.period,
    )
