"""What the store granted to this process: what is left of it, until when it may be used, and what has to go back."""

import math
from collections import deque
from dataclasses import dataclass

from resilience_kit.fleet.limit_store import VALIDITY, GivingBack, Grant, Limits
from resilience_kit.quota_ledger import Sent

# A lease lasts so many seconds at least, or a short period would leave no time to use it; and so many periods at
# most, where calls are seen to come too late for theirs, or as long as an answer may take and that again.
_SHORTEST_VALIDITY, _LONGEST_VALIDITY = 0.02, 1 / 24
# So many calls are asked for at once, at most: those that wait, or as many as came lately.
_MOST_AT_ONCE = 64
# Of the quota, over all processes, that may lie in leases for calls that have not come yet.
_MOST_AHEAD = 1 / 16
# Of the quota, over all processes, that those may take at once who wait behind the next ones.
_MOST_BEHIND = 1 / 4
# A call that was not sent after all is looked for in so many leases.
_REMEMBERED = 8


@dataclass(slots=True)
class Lease:
    """What may be sent from one moment to another, on this process's clock, and what is left of it.

    Attributes:
        epoch: The grant's, as its entry; both are named when something goes back.
        entry: See `epoch`.
        taken_at: When it became the one that calls are sent on.
        starts_at: When it may be used.
        ends_at: When it may not be used any more.
        requests: Requests that are left.
        tokens: Tokens that are left.
        requests_then: Requests in the window of all processes at its start, itself included.
        tokens_then: Tokens in it, likewise.
        left_at: When another one took its place.
        is_used: Whether anything was sent on it.
    """

    epoch: int
    entry: int
    taken_at: float
    starts_at: float
    ends_at: float
    requests: int
    tokens: int
    requests_then: int
    tokens_then: int
    left_at: float = math.inf
    is_used: bool = False

    def covers(self, tokens: int, now: float) -> bool:
        """Whether a request of so many tokens may be sent on it, now or when it starts."""
        return self.requests > 0 and tokens <= self.tokens and now < self.ends_at

    def use(self, tokens: int) -> None:
        """Take a request out of it."""
        self.requests -= 1
        self.tokens -= tokens
        self.is_used = True


class Leases:
    """The lease that calls are sent on, and those before it.

    There is one at a time, so that the time at which a call was sent says on which.

    Args:
        period: The length of the quota's window in seconds.
        deadline: Seconds that the store may take to answer.

    Attributes:
        current: The lease that calls are sent on, if there is one.
        unused: What has to go back to the store.
        validity: Seconds that the next one lasts.
        at_once: Calls to ask for at once: twice as many when a lease was used up, half when it was not.
    """

    def __init__(self, period: float, deadline: float) -> None:
        self.current: Lease | None = None
        self.unused: list[GivingBack] = []
        self.at_once = 1
        self.validity = max(VALIDITY * period, _SHORTEST_VALIDITY)
        self._longest_validity = max(_LONGEST_VALIDITY * period, _SHORTEST_VALIDITY, 2 * deadline)
        self._earlier: deque[Lease] = deque(maxlen=_REMEMBERED)

    def take(self, grant: Grant, *, asked_at: float, validity: float, has_all: bool, now: float) -> None:
        """Begin a lease."""
        self.leave(now)
        self.current = Lease(
            grant.epoch,
            grant.entry,
            now,
            now + grant.wait,
            asked_at + grant.wait + validity,
            grant.requests,
            grant.tokens,
            grant.requests_then,
            grant.tokens_then,
        )
        if not has_all:
            self.at_once = max(1, self.at_once // 2)

    def leave(self, now: float) -> None:
        """End the current one; what is left of it goes back."""
        lease, self.current = self.current, None
        if lease is None:
            return
        lease.left_at = now
        self._earlier.append(lease)
        if not lease.is_used and now >= lease.ends_at:
            # it was over before the call that it was for could be sent: the answer took too long, or this process did
            self.last_longer()
        if lease.requests > 0 or lease.tokens > 0:
            self.unused.append(GivingBack(lease.epoch, lease.entry, lease.requests, lease.tokens))
        if lease.requests > 0:
            self.at_once = max(1, self.at_once // 2)
        elif now < lease.ends_at:
            self.at_once = min(_MOST_AT_ONCE, 2 * self.at_once)

    def of(self, sent: Sent) -> Lease | None:
        """The lease that a request was sent on, if it was sent on one that is remembered."""
        for lease in (self.current, *reversed(self._earlier)):
            if lease is not None and lease.taken_at <= sent.at < lease.left_at:
                return lease
        return None

    def give_back(self, sent: Sent, lease: Lease) -> None:
        """Take a request back that was not sent."""
        if lease is self.current:
            lease.requests += 1
            lease.tokens += sent.tokens
        else:
            self.unused.append(GivingBack(lease.epoch, lease.entry, 1, sent.tokens))

    def last_longer(self) -> None:
        """Have the next ones last longer: a loop that is busy for long comes too late for them."""
        self.validity = min(2 * self.validity, self._longest_validity)

    def more_than(self, tokens: int, behind: list[int], limits: Limits, processes: int) -> list[int]:
        """The tokens of calls to ask for besides: those behind, or as many as came lately, of the next one's size."""
        if limits.min_interval > 0:
            return []
        # those behind are sent at once, and still must not take what others wait for
        part = _MOST_BEHIND if behind else _MOST_AHEAD
        most = self.at_once - 1
        for window in limits.windows:
            room = int(window.limit * part) // processes
            most = min(most, room // max(1, tokens) if window.counts_tokens else room)
        return behind[:most] if behind else [tokens] * most
