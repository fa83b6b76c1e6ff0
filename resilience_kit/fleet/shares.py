"""What one process may send of a quota that a fleet shares, while the store that counts for all cannot be asked.

Each keeps to an equal part of the quota, by as many processes as were alive when the store was last heard of. Until
all that was sent before has left the server's windows, it gets no more than what it has in them itself and its part of
what was left: so the fleet stays within the quota from the first moment on.
"""

import math
from dataclasses import dataclass

from resilience_kit.quota_ceilings import SHORT_WINDOWS
from resilience_kit.quota_ledger import WindowLedger


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a quota: requests in a period and in a sixth of it, and tokens in a period."""

    requests: int
    short_requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Share:
    """A process's part of a quota.

    Attributes:
        whole: What it has in the end; a request of more tokens never fits.
        first: What it has of the windows that began before the share.
        began_at: When the share began.
        period: The length of the quota's window in seconds.
    """

    whole: Part
    first: Part
    began_at: float
    period: float

    @property
    def tokens(self) -> int:
        """The largest request that it has room for."""
        return self.whole.tokens

    def seconds_until_fits(self, own: WindowLedger, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens fits beside what this process has sent."""
        if tokens > self.whole.tokens:
            return math.inf
        short_widens_at = self.began_at + self.period / SHORT_WINDOWS
        widens_at = self.began_at + self.period
        at_present = self.whole if now >= widens_at else self.first
        short_requests = (self.whole if now >= short_widens_at else self.first).short_requests
        due = math.inf
        if tokens <= at_present.tokens:
            due = own.seconds_until_fits_into(at_present.requests, short_requests, at_present.tokens, tokens, now)
        later = [at - now for at in (short_widens_at, widens_at) if at > now]
        return min(due, *later) if later else due


def share_of(own: WindowLedger, processes: int, used: tuple[int, int], now: float) -> Share:
    """A process's share.

    Args:
        own: What this process has sent, and under which quota.
        processes: How many share it, this one included.
        used: Requests and tokens that the window holds of all processes, as last heard of.
        now: The time.
    """
    short = max(1, own.requests // SHORT_WINDOWS)
    whole = Part(*(max(1, most // processes) for most in (own.requests, short, own.tokens)))
    if processes == 1:
        return Share(whole, whole, now, own.period)
    sent = own.sent(now)
    own_short = sum(at > now - own.period / SHORT_WINDOWS for at, _ in sent)
    own_tokens = sum(tokens for _, tokens in sent)

    def first(part: int, quota: int, own_part: int, of_all: int) -> int:
        return min(part, own_part + max(0, quota - of_all) // processes)

    return Share(
        whole,
        Part(
            first(whole.requests, own.requests, len(sent), used[0]),
            # of the short windows nothing is known but this process's part: the others may have filled them
            first(whole.short_requests, short, own_short, used[0]),
            first(whole.tokens, own.tokens, own_tokens, used[1]),
        ),
        now,
        own.period,
    )
