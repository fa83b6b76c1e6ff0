"""What a fleet's store does for one rate limit: it grants, takes back, and holds the slots of all processes.

The promise is the one that holds in a single process: never more than the quota in any window that the server may
use. The script beside this file keeps it, on the store's clock and in one round trip. A grant is a lease on some of
the quota, good for a short time from its start on: who sends within that time never goes above the quota, whatever
all others do.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from resilience_kit.errors import ConfigurationError, StoreContentError
from resilience_kit.fleet.connection import Connection, packaged_script
from resilience_kit.quota_ceilings import FINE_WINDOWS, SHORT_WINDOWS
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.waiting import Waiting

SCRIPT = packaged_script("checked_calls", "limit")
# Of a period: how long a grant is good for, and how far apart grants are that the store tells apart.
VALIDITY = RESOLUTION = 1 / 240
# The script keeps a hint for each window.
_MOST_WINDOWS = 4
_MICROSECONDS = 1_000_000
# Doubles, the script's numbers, are exact below it.
_MOST_NUMBER = 2**53 - 1
_REPLY = struct.Struct("<12q")
# No period and no pause is longer than so many seconds: sums of times stay exact.
_LONGEST = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Window:
    """What may lie in any window of some length.

    Attributes:
        seconds: The window's length, with whatever margin was learnt.
        limit: The most that it may hold.
        counts_tokens: Whether it counts tokens, and not requests.
    """

    seconds: float
    limit: int
    counts_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """The quota as a process knows it, perhaps tightened by what the server said.

    Attributes:
        period: The length of the quota's window in seconds; one of `windows` is of this length.
        windows: Four at most, in the same order each time.
        largest_tokens: A request of more never fits. One of less does, alone in a window if that is limited to less.
        min_interval: Seconds between the starts of two grants.
        validity: Seconds from a grant's start in which what it grants may be sent.
        resolution: Grants whose starts are within so many seconds are one entry in the store.
    """

    period: float
    windows: tuple[Window, ...]
    largest_tokens: int
    min_interval: float = 0.0
    validity: float = 0.25
    resolution: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.period <= _LONGEST or not 0 < len(self.windows) <= _MOST_WINDOWS:
            raise ConfigurationError(f"a limit needs a period and 1 to {_MOST_WINDOWS} windows, not {self!r}")
        if any(window.seconds > 1.25 * self.period for window in self.windows):
            raise ConfigurationError(f"no window may be longer than 1.25 periods, as one is in {self!r}")


def limits_of(requests: int, tokens: int, period: float, *, min_interval: float = 0.0) -> Limits:
    """The windows of a quota: requests over the period and a sixth of it, and tokens over the period.

    Args:
        requests: Most requests in any window of `period` seconds.
        tokens: Most tokens in any window of `period` seconds.
        period: Seconds.
        min_interval: Seconds between the starts of two grants.

    Example:
        >>> limits_of(60, 10_000, 60.0).windows[1]
        Window(seconds=10.0, limit=10, counts_tokens=False)
    """
    short = Window(period / SHORT_WINDOWS, max(1, requests // SHORT_WINDOWS))
    windows = (Window(period, requests), short, Window(period, tokens, counts_tokens=True))
    return Limits(period, windows, tokens, min_interval, VALIDITY * period, RESOLUTION * period)


def limits_known(own: WindowLedger, tokens: int, min_interval: float, validity: float, now: float) -> Limits:
    """The windows of a quota by all that a process has learnt of it.

    Args:
        own: What it has learnt.
        tokens: Those of the request that is asked for: if a ceiling is lower, it fits into an empty window.
        min_interval: Seconds between the starts of two grants.
        validity: Seconds that a grant is good for.
        now: The time.
    """
    in_force = own.lessons.in_force(now)
    requests = max(1, in_force.requests)

    def window(parts: int, limit: int, *, counts_tokens: bool = False) -> Window:
        seconds = own.period / parts
        return Window(seconds + own.lessons.margin_of(seconds), max(1, limit), counts_tokens)

    windows = [
        window(1, requests),
        window(SHORT_WINDOWS, requests // SHORT_WINDOWS),
        window(1, max(tokens, in_force.tokens), counts_tokens=True),
    ]
    if in_force.fine_requests is not None:
        windows.append(window(FINE_WINDOWS, min(in_force.fine_requests, math.ceil(requests / FINE_WINDOWS))))
    return Limits(own.period, tuple(windows), own.tokens, min_interval, validity, RESOLUTION * own.period)


@dataclass(frozen=True, slots=True)
class GivingBack:
    """What was granted and was not sent: the grant's `epoch` and `entry`, and how much of it."""

    epoch: int
    entry: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent without a grant: how many seconds ago at least, and how much."""

    seconds_ago: float
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of one process, as a total: a wish that gets lost is put right by the next.

    Attributes:
        sequence: Rises with each wish of the process; one that was overtaken on its way changes no slots.
        needed: How many it must hold, this wish's included. Where it can't, nothing else is granted either, and the
            process waits in the store for its turn.
        wanted: How many it would hold; no less than `needed`. Those that it holds beyond are given back.
        most: The most that all processes may hold.
        lease: Seconds until its slots go to others, if nothing is heard of it.
    """

    sequence: int
    needed: int
    wanted: int
    most: int
    lease: float


NO_SLOTS = Slots(sequence=0, needed=0, wanted=0, most=0, lease=0.0)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a process asks for and tells. One that asks for nothing is for what it tells, or for the answer's numbers.

    Attributes:
        limits: The quota as the process knows it.
        requests: Requests that it needs, all at once.
        tokens: Tokens that it needs with them.
        extra_requests: Requests that it takes too if all of it may be sent now.
        extra_tokens: Tokens that it takes too with them.
        slots: Its slots, `NO_SLOTS` if they are not limited. It is a total, and so gives back what is not wanted:
            a process that ends wants none.
        giving_back: What it did not send of earlier grants.
        sent: What it sent without a grant, while the store was away or all kept to their shares.
        pause: Seconds before which nothing starts, since the server refused something.
        begin_shares: Seconds for which all processes keep to their shares, unless they do already.
        known_epoch: The epoch of the last answer; 0 if there was none in the last two periods, after which a state
            that nobody uses is forgotten. If the store has lost what it knew, all keep to their shares for a period.
    """

    limits: Limits
    requests: int = 0
    tokens: int = 0
    extra_requests: int = 0
    extra_tokens: int = 0
    slots: Slots = NO_SLOTS
    giving_back: Sequence[GivingBack] = ()
    sent: Sequence[Sent] = ()
    pause: float = 0.0
    begin_shares: float = 0.0
    known_epoch: int = 0


class Outcome(IntEnum):
    """What became of a wish. Slots are as the answer says in any case."""

    GRANTED = 0
    NO_SLOT = 1
    ASK_AGAIN = 2
    SHARES = 3
    NEVER = 4


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a wish.

    Attributes:
        outcome: Nothing but slots is granted unless it is `GRANTED`: there was no slot, or the line is so long that
            the process has to ask again after `wait`, or all keep to their shares for `shares_left`, or it never fits.
        entry: What to name when something is given back. It never falls within an epoch: if it does, the store was
            set back to what it was before.
        wait: Seconds from the answer until it may be sent. It may be sent until `validity` later, counted from before
            the wish was told, and no more then.
        requests: Requests that are granted.
        tokens: Tokens that are granted with them.
        requests_then: Requests in the period's window at the start, these included.
        tokens_then: Tokens in the period's window at the start, these included.
        slots: How many slots the process holds.
        all_slots: How many all processes hold, if the wish spoke of slots.
        waiting: How many processes wait for a slot.
        shares_left: Seconds for which every process keeps to its share, and reports what it sends.
        epoch: Which life of the store's state this is; it changes when the state is lost.
    """

    outcome: Outcome
    entry: int
    wait: float
    requests: int
    tokens: int
    requests_then: int
    tokens_then: int
    slots: int
    all_slots: int
    waiting: int
    shares_left: float
    epoch: int


class LimitStore(Protocol):
    """One rate limit of a fleet."""

    async def reserve(self, waiting: Waiting, wish: Wish) -> Grant:
        """Grant what fits, now or after a wait. It counts from then on, sent or not, unless it is given back."""
        ...

    def reserve_blocking(self, wish: Wish) -> Grant:
        """As `reserve`, from a thread."""
        ...


class ValkeyLimits:
    """One rate limit of a fleet on Valkey or Redis.

    Args:
        connection: The way to the store.
        name: The limit's name.
        process: What this process is called in the fleet.
        channel: Where others are told that a slot has become free.
    """

    __slots__ = ("_channel", "_connection", "_keys", "_news", "_process", "now")

    def __init__(self, connection: Connection, name: str, process: str, channel: str) -> None:
        self._connection = connection
        self._process = process
        self._channel = channel
        self._news = json.dumps({"kind": "slot", "name": name, "from": process})
        parts = ("quota", "slots", "leases", "waiting")
        self._keys = tuple(connection.key(f"limit:{name}", part) for part in parts)
        # The store's own clock, or microseconds on the clock of a simulation.
        self.now = -1

    async def reserve(self, waiting: Waiting, wish: Wish) -> Grant:
        """Grant what fits, now or after a wait.

        Raises:
            StoreUnavailableError: The store did not answer in time. Whether it granted something is unknown.
            StoreContentError: Something else is under the limit's keys.
        """
        if _never_fits(wish):
            return _NEVER
        return self._grant(await self._connection.run(waiting, SCRIPT, self._keys, self._arguments(wish)))

    def reserve_blocking(self, wish: Wish) -> Grant:
        """As `reserve`, from a thread."""
        if _never_fits(wish):
            return _NEVER
        return self._grant(self._connection.run_blocking(SCRIPT, self._keys, self._arguments(wish)))

    def _arguments(self, wish: Wish) -> list[str | bytes | int]:
        limits, slots = wish.limits, wish.slots
        numbers = [
            slots.sequence,
            wish.known_epoch,
            _micro(limits.period),
            _micro(limits.validity),
            _micro(limits.resolution),
            _micro(limits.min_interval),
            wish.requests,
            wish.tokens,
            wish.extra_requests,
            wish.extra_tokens,
            slots.needed,
            slots.wanted,
            slots.most,
            _micro(slots.lease),
            _micro(wish.pause),
            _micro(wish.begin_shares),
            len(limits.windows),
            len(wish.giving_back),
            len(wish.sent),
        ]
        for window in limits.windows:
            numbers += (_micro(window.seconds), window.counts_tokens, window.limit)
        for unsent in wish.giving_back:
            numbers += (unsent.epoch, unsent.entry, unsent.requests, unsent.tokens)
        for sent in wish.sent:
            # later than it was, rather than sooner
            numbers += (math.floor(sent.seconds_ago * _MICROSECONDS), sent.requests, sent.tokens)
        # packed, since each argument costs both ends more than eight bytes do
        packed = struct.pack(f"<{len(numbers)}d", *numbers)
        return [self.now, self._channel, self._news, self._process, packed]

    def _grant(self, reply: Any) -> Grant:
        if not isinstance(reply, bytes) or len(reply) != _REPLY.size:
            raise self._content_error()
        numbers = _REPLY.unpack(reply)
        if min(numbers) < 0 or max(numbers) > _MOST_NUMBER:
            raise self._content_error()
        outcome, entry, wait, requests, tokens, requests_then, tokens_then, slots, all_slots, waiting, left, epoch = (
            numbers
        )
        if outcome > Outcome.SHARES:
            raise self._content_error()
        return Grant(
            outcome=Outcome(outcome),
            entry=entry,
            wait=wait / _MICROSECONDS,
            requests=requests,
            tokens=tokens,
            requests_then=requests_then,
            tokens_then=tokens_then,
            slots=slots,
            all_slots=all_slots,
            waiting=waiting,
            shares_left=left / _MICROSECONDS,
            epoch=epoch,
        )

    def _content_error(self) -> StoreContentError:
        key = self._keys[0]
        return StoreContentError(f"what lies under {key!r} is not what the kit put there", key=key)


_NEVER = Grant(Outcome.NEVER, 0, math.inf, 0, 0, 0, 0, 0, 0, 0, 0.0, 0)


def _never_fits(wish: Wish) -> bool:
    if wish.tokens > wish.limits.largest_tokens:
        return True
    return any(not window.counts_tokens and wish.requests > window.limit for window in wish.limits.windows)


def _micro(seconds: float) -> int:
    return math.ceil(seconds * _MICROSECONDS)
