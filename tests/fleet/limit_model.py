"""What a fleet may send at worst under the grants that it got, counted by hand."""

import itertools
from dataclasses import dataclass, field

from resilience_kit.fleet.limit_store import GivingBack, Outcome, ValkeyLimits, Wish

SECOND = 1_000_000
BEGIN = 1_800_000_000 * SECOND
_names = itertools.count()


@dataclass
class Granted:
    """Calls that may be sent at any time from start to end, in microseconds."""

    start: int
    end: int
    requests: int
    tokens: int
    grant: object = None

    def count(self, window):
        return self.tokens if window.counts_tokens else self.requests


@dataclass
class Fleet:
    """Processes that share one limit of a real store, on a clock that a test moves: the script's text is the same."""

    connection: object
    name: str = field(default_factory=lambda: f"limit {next(_names):06}")
    now: int = BEGIN
    granted: list[Granted] = field(default_factory=list)

    def store(self, process="a"):
        store = ValkeyLimits(self.connection, self.name, process, f"{self.connection.prefix}:news")
        store.now = self.now
        return store

    def ask(self, limits, requests=0, tokens=0, *, process="a", **more):
        grant = self.store(process).reserve_blocking(Wish(limits, requests, tokens, **more))
        if grant.outcome is Outcome.GRANTED and grant.requests + grant.tokens > 0:
            start = self.now + round(grant.wait * SECOND)
            end = start + round(limits.validity * SECOND)
            self.granted.append(Granted(start, end, grant.requests, grant.tokens, grant))
        return grant

    def give_back(self, limits, granted, requests=0, tokens=0, *, process="a"):
        grant = granted.grant
        unsent = GivingBack(grant.epoch, grant.entry, granted.requests, granted.tokens)
        granted.requests = granted.tokens = 0
        return self.ask(limits, requests, tokens, process=process, giving_back=[unsent])


def at_worst(granted, window):
    """The most that any window of that length may hold, whenever within its time each call is sent."""
    length = round(window.seconds * SECOND)
    # a call may be in each window that begins after its start less the length, and no later than its end
    changes = sorted(
        change
        for it in granted
        for change in ((it.start - length + 1, it.count(window)), (it.end + 1, -it.count(window)))
    )
    return max(itertools.accumulate((count for _, count in changes), initial=0))


def fits_at(granted, window, count, earliest):
    """When so much fits into a window of that length, if each call is sent at its start."""
    length = round(window.seconds * SECOND)

    def held(moment):
        return sum(it.count(window) for it in granted if it.start + length > moment)

    moments = sorted({earliest} | {it.start + length for it in granted if it.start + length > earliest})
    return next(moment for moment in moments if count == 0 or held(moment) + count <= window.limit)
