"""What a limit asks about a quota that a fleet shares: short leases on what the store granted to this process.

A `RateLimit` keeps its own queue, and asks here before it starts a call. A lease says how much may be sent from one
moment to another; the store counts all of it until the last of it has left the server's windows, so that no window
holds more than the quota, however late within its lease a call is sent. What a lease has left when it ends goes back.
While the store cannot be asked, a share of the quota stands in for it.

A limit calls this under its lock, but for `ask`, which waits for the store. What comes from the fleet's own threads
takes that lock for itself.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from resilience_kit.errors import ResilienceError, StoreContentError, StoreUnavailableError
from resilience_kit.fleet import limit_store
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.fleet.leases import Leases
from resilience_kit.fleet.limit_store import (
    NO_SLOTS,
    Grant,
    Limits,
    LimitStore,
    Outcome,
    Slots,
    Wish,
    limits_known,
)
from resilience_kit.fleet.membership import News
from resilience_kit.fleet.refusal_news import as_news, from_news, of_all_processes
from resilience_kit.fleet.shares import Share
from resilience_kit.quota_ledger import Sent, WindowLedger
from resilience_kit.quota_lessons import Correction
from resilience_kit.registry import mode
from resilience_kit.server_advice import ServerAdvice
from resilience_kit.settings import OnStoreFailure
from resilience_kit.waiting import Waiting, now

# Seconds until the slots of a process that is not heard of any more go to others.
SLOT_LEASE = 5.0
# Seconds after which a process that waits for a slot asks again, though nobody told it that one is free.
_SLOT_POLL = 0.5
# Seconds that all processes have to tell what they sent when a store is back: two beats, and time to notice.
_REJOINING = 3.0
# Of a period, that is silent at most before the store takes over again.
_MOST_QUIET = 1 / 8
# A wish is kept short.
_MOST_TOLD = 64


class FleetLedger:
    """What a limit asks about its quota where a fleet shares it: a `QuotaLedger` that at times has to ask the store.

    Args:
        name: The limit's name.
        own: What this process sends, and what it learns of the quota.
        store: The limit in the store.
        fleet: This process's way into the fleet.
        max_concurrent: Calls under way at once, of all processes.
        min_interval: Seconds between the starts of two calls, of all processes.
        on_failure: What happens while the store is lost.
        lock: The limit's.
        in_flight: Tells how many calls this process has under way.
        look: Serves the limit's queue.
    """

    def __init__(
        self,
        name: str,
        own: WindowLedger,
        store: LimitStore,
        fleet: Fleet,
        *,
        max_concurrent: int,
        min_interval: float,
        on_failure: OnStoreFailure,
        lock: threading.Lock,
        in_flight: Callable[[], int],
        look: Callable[[], None],
    ) -> None:
        self._name = name
        self._own = own
        self._store = store
        self._fleet = fleet
        self._member = fleet.member
        self._max_concurrent = max_concurrent
        self._min_interval = min_interval
        self._on_failure = on_failure
        self._lock = lock
        self._in_flight = in_flight
        self._look = look
        self._leases = Leases(own.period, fleet.connection.deadline)
        self._asked_at = self._asking_until = self._ask_at = -math.inf
        # How many calls this process may have under way by the store's word, and until when.
        self._slots = 0
        self._slots_end_at = -math.inf
        self._sequence = 0
        self._wants_slot = self._others_want_slots = False
        # What the store said last: which life of its state this is, and what the window holds.
        self._epoch = 0
        self._used = (0, 0)
        self._heard_at = -math.inf
        self._share: Share | None = None
        # until when the store has all processes keep to their shares
        self._shares_until = -math.inf
        # What was sent in a share and the store has not been told of: when, and how many tokens.
        self._unreported: deque[tuple[float, int]] = deque()
        self._pause_until = -math.inf
        self._garbage: StoreContentError | None = None
        self._is_tidied_soon = False
        self._member.on_lost(look)
        self._member.on_beat(self._tidy)
        self._member.on_rejoin(self._rejoin)
        self._member.on_leave(self._give_all_back)
        self._member.on_listening(self._hear_again)
        self._member.on_news("slot", self._hear_of_slots)
        self._member.on_news("refused", self._hear_of_refusal)

    # What any ledger does.

    def reset(self) -> None:
        """Forget what this process knows; what the fleet knows, it keeps."""
        self._own.reset()
        self._leases.leave(now())
        self._share = None
        self._unreported.clear()

    def copy(self) -> WindowLedger:
        """A ledger with this process's part of the content, to look ahead in: it takes no less."""
        return self._own.copy()

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now, of all processes, as last heard of."""
        requests, tokens = self._own.used(now)
        if now < self._heard_at + self._own.period:
            requests, tokens = max(requests, self._used[0]), max(tokens, self._used[1])
        return requests, tokens

    def seconds_until_fits(self, tokens: int, now: float) -> float | None:
        """Seconds until one request of so many tokens may fit into every window; None where the store has to say."""
        own = self._own
        due = math.inf if self._refuses else own.seconds_until_fits(tokens, now)
        if due == math.inf or mode.skips_waiting:
            # where a test skips its waits, the server's clock does not jump ahead
            return due
        share = self._share_at(now)
        if self._in_flight() >= self._slots_at(now):
            return None
        if share is not None:
            return max(due, self._due_in_share(share, tokens, now))
        lease = self._leases.current
        if lease is not None and lease.covers(tokens, now):
            return max(due, lease.starts_at - now)
        # What this process has sent itself lies in the fleet's windows too: a place among all is taken before that has
        # left them. A pause that the server asked for is waited out first.
        if due > own.seconds_until_fits_into(own.requests, own.short_requests, own.tokens, tokens, now):
            return due
        return None

    def commit(self, tokens: int, now: float) -> Sent:
        """Count a request that is sent now."""
        sent = self._own.commit(tokens, now)
        lease = self._leases.current
        if self._share is not None or lease is None or mode.skips_waiting:
            self._unreported.append((now, tokens))
            while self._unreported[0][0] < now - self._own.period:
                self._unreported.popleft()
            self._tidy_soon()
        else:
            lease.use(tokens)
            # what of a lease is not sent yet counts: it may arrive before this one
            sent.requests_then = max(sent.requests_then, lease.requests_then)
            sent.tokens_then = max(sent.tokens_then, lease.tokens_then)
        return sent

    def give_back(self, sent: Sent) -> None:
        """Count a request no more: it was not sent."""
        self._own.give_back(sent)
        lease = self._leases.of(sent)
        if lease is None:
            # what was reported already counts on, which errs on the safe side
            with suppress(ValueError):
                self._unreported.remove((sent.at, sent.tokens))
        else:
            self._leases.give_back(sent, lease)
            if lease is not self._leases.current:
                self._tidy_soon()

    def answered(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Count what the server knows and the fleet does not."""
        self._own.answered(advice, sent, now)

    def refused(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Learn from the refusal of a request, and have all processes learn from it."""
        seen = of_all_processes(self._own.count_refused(advice, sent, now), sent)
        self._own.lessons.refused(advice, seen, now)
        self._pause_until = self._own.lessons.paused_until
        self._tidy_soon()
        self._member.tell_news("refused", self._name, **as_news(advice, seen, now))

    def news(self) -> list[Correction]:
        """What has been learnt since this was asked last."""
        return self._own.news()

    # What a limit needs besides.

    def refusal(self, tokens: int) -> ResilienceError | None:
        """Why the call that is next is refused, if it is."""
        garbage, self._garbage = self._garbage, None
        if garbage is not None:
            return garbage
        if self._refuses:
            return self._unavailable("the store does not answer: try later, or say on_store_failure='local'", "lost")
        share = self._share_at(now())
        if share is not None and tokens > share.tokens and self._member.is_lost:
            return self._unavailable(
                f"a call of {tokens} tokens is more than {share.tokens}, this process's share of the quota, and the "
                "store that could grant more does not answer: try later",
                "share",
            )
        return None

    def is_late(self, sent: Sent) -> bool:
        """Whether a request was held up until its lease had ended, so that it must not be sent on it."""
        lease = None if mode.skips_waiting else self._leases.of(sent)
        is_late = lease is not None and now() >= lease.ends_at
        if is_late:
            self._leases.last_longer()
        return is_late

    def is_asking(self, since: float) -> bool:
        """Whether the store has been asked and has not answered; no longer than a call to it may take, from `since`."""
        current = now()
        return current < self._asking_until and current < since + self._fleet.connection.deadline

    def freed(self) -> None:
        """Note that a call of this process has ended."""
        if self._wants_slot:
            # to ask again is to give this one to whoever has waited for longer
            self._ask_at = -math.inf
        elif self._others_want_slots:
            self._tidy_soon()

    def nobody_waits(self) -> None:
        """Note that the last one that waited has gone."""
        lease = self._leases.current
        if self._wants_slot or (lease is not None and lease.starts_at > now()):
            self._wants_slot = False
            self._leases.leave(now())
            self._tidy_soon()

    def wish(self, tokens: int, behind: Iterable[int]) -> Wish | None:
        """What to ask the store, so that the next call may start; None where it was asked, or said when to ask."""
        current = now()
        if self._share is not None or current < max(self._asking_until, self._ask_at):
            return None
        self._asked_at = current
        self._asking_until = current + 2 * self._fleet.connection.deadline
        self._leases.leave(now())
        limits = self._limits(tokens, current)
        needed = wanted = self._in_flight() + 1
        extra: list[int] = []
        if not self._others_want_slots:
            next_ones = [*islice(behind, self._leases.at_once - 1)]
            extra = self._leases.more_than(tokens, next_ones, limits, self._processes)
            wanted = max(needed, min(needed + len(extra), self._max_concurrent))
        return self._wish(
            limits, needed, wanted, requests=1, tokens=tokens, extra_requests=len(extra), extra_tokens=sum(extra)
        )

    async def ask(self, waiting: Waiting, wish: Wish) -> None:
        """Ask the store, and have the limit's queue served with the answer."""
        asked_at = now()
        try:
            grant = await self._store.reserve(waiting, wish)
            with self._lock:
                self._take(grant, wish, asked_at)
        except StoreContentError as error:
            self._garbage = error
        except StoreUnavailableError as error:
            self._member.lost(error)
        finally:
            self._asking_until = -math.inf
        self._look()
        # where nobody waits any more, there is none to refuse
        self._garbage = None

    def _wish(self, limits: Limits, needed: int, wanted: int, **values: Any) -> Wish:
        self._sequence += 1
        unused, self._leases.unused = self._leases.unused[:_MOST_TOLD], self._leases.unused[_MOST_TOLD:]
        current = now()
        pause, self._pause_until = max(0.0, self._pause_until - current), -math.inf
        return Wish(
            limits,
            slots=Slots(self._sequence, needed, wanted, self._max_concurrent, SLOT_LEASE),
            giving_back=unused,
            pause=pause,
            # a state that nobody has used for two periods may be forgotten without any harm
            known_epoch=self._epoch if current < self._heard_at + 2 * self._own.period else 0,
            **values,
        )

    def _take(self, grant: Grant, wish: Wish, asked_at: float) -> None:
        current = now()
        if wish.slots.sequence == self._sequence:
            # the store begins a new lease when half of one has passed
            self._slots, self._slots_end_at = grant.slots, asked_at + SLOT_LEASE / 2
        if wish.requests:
            self._wants_slot = grant.outcome is Outcome.NO_SLOT
        self._others_want_slots = grant.waiting > self._wants_slot
        is_granted = grant.outcome is Outcome.GRANTED and grant.requests > 0
        if self._is_another_life(grant.epoch):
            self._shares_until = asked_at + (grant.shares_left or self._rejoining)
            # by what was known of the others before
            self._share_at(current)
            return
        self._used = grant.requests_then, grant.tokens_then
        if grant.outcome is Outcome.SHARES:
            self._shares_until = asked_at + grant.shares_left
        elif is_granted:
            has_all = grant.requests == wish.requests + wish.extra_requests
            self._leases.take(grant, asked_at=asked_at, validity=wish.limits.validity, has_all=has_all, now=current)
        elif wish.requests:
            # what has ended since it was asked is not known to the store
            has_freed = self._in_flight() + 1 < wish.slots.needed
            self._ask_at = current + (grant.wait if not self._wants_slot else 0.0 if has_freed else _SLOT_POLL)

    def _slots_at(self, now: float) -> int:
        """How many calls this process may have under way."""
        if self._share is not None:
            return max(1, self._max_concurrent // self._processes)
        return self._slots if now < self._slots_end_at else 0

    def _limits(self, tokens: int, now: float) -> Limits:
        return limits_known(self._own, tokens, self._min_interval, self._leases.validity, now)

    # The share that stands in for the store.

    @property
    def _refuses(self) -> bool:
        return self._member.is_lost and self._on_failure == "refuse"

    @property
    def _processes(self) -> int:
        return 1 if self._member.is_lost and self._on_failure == "open" else self._member.live

    @property
    def _rejoining(self) -> float:
        """Seconds that all processes have to tell what they sent."""
        return min(self._own.period, _REJOINING)

    def _due_in_share(self, share: Share, tokens: int, now: float) -> float:
        left = self._shares_until - now
        quiet = min(self._fleet.connection.deadline, self._own.period * _MOST_QUIET)
        if 0 < left < quiet and not self._member.is_lost:
            # the store has to be told of the last that is sent before it grants anything
            return left
        due = share.seconds_until_fits(tokens, self.used(now), self._leases.validity, now)
        if due == math.inf and left > 0 and not self._member.is_lost:
            # it is larger than the share, and the store is back and grants again when the shares end
            return left
        return due

    def _share_at(self, now: float) -> Share | None:
        if not self._member.is_lost and now >= self._shares_until:
            self._share = None
        elif self._share is None:
            self._leases.leave(now)
            alone = self._processes == 1
            self._share = Share(self._own, self._processes, now if alone else now + self._member.noticed_within)
        return self._share

    def _is_another_life(self, epoch: int) -> bool:
        """Whether the store has lost what it knew when it was heard last; it is told again then."""
        current = now()
        is_another = self._epoch not in (0, epoch) and current < self._heard_at + 2 * self._own.period
        self._epoch, self._heard_at = epoch, current
        if is_another:
            self._unreported = deque(self._own.sent(current))
            self._tidy_soon()
        return is_another

    # What the fleet's threads call; they may wait for the store.

    def _tidy_soon(self) -> None:
        if not self._is_tidied_soon:
            self._is_tidied_soon = True
            self._member.soon(self._tidy)

    def _tidy(self) -> None:
        """Tell the store what it should know: what was sent in a share, what was not sent, which slots are free."""
        self._is_tidied_soon = False
        if not self._member.is_lost:
            try:
                self._tell_store()
            finally:
                self._look()

    def _rejoin(self) -> None:
        """Be back, as all others: before the store grants anything it has to know what was sent meanwhile."""
        self._slots = 0
        self._tell_store(begin_shares=self._rejoining)

    def _give_all_back(self) -> None:
        """Keep nothing that others could use: this process ends."""
        with self._lock:
            self._leases.leave(now())
            if not self._slots and not self._leases.unused:
                return
            self._slots = in_flight = self._in_flight()
            wish = self._wish(self._limits(0, now()), in_flight, in_flight)
        self._store.reserve_blocking(wish)

    def _tell_store(self, *, begin_shares: float = 0.0) -> None:
        asked_at = now()
        with self._lock:
            lease = self._leases.current
            if lease is not None and asked_at >= lease.ends_at:
                self._leases.leave(now())
            # who waits for a slot keeps its place, and who asks says it all with that
            keeps_still = self._wants_slot or asked_at < self._asking_until
            in_flight = held = self._in_flight()
            is_used = in_flight > 0 or self._slots > 0 or asked_at < self._asked_at + 2 * self._own.period
            if not self._unreported and not begin_shares and (keeps_still or not is_used):
                return
            sent = [self._unreported.popleft() for _ in range(min(len(self._unreported), _MOST_TOLD))]
            if self._leases.current is not None:
                # who waits for its lease to start needs its slots then, or would ask again, behind all others
                held = max(in_flight, min(self._slots, in_flight + self._leases.current.requests))
            wish = self._wish(
                self._limits(0, asked_at),
                in_flight,
                held,
                begin_shares=begin_shares,
                # as on a lease: a call may leave a little later than it is counted
                sent=[
                    limit_store.Sent(max(0.0, asked_at - at - self._leases.validity), 1, tokens) for at, tokens in sent
                ],
            )
            if keeps_still:
                wish = replace(wish, slots=NO_SLOTS)
            else:
                # what is free is on its way back
                self._slots = min(self._slots, held)
        try:
            grant = self._store.reserve_blocking(wish)
        except BaseException:
            self._unreported.extendleft(reversed(sent))
            raise
        with self._lock:
            self._take(grant, wish, asked_at)
        if self._unreported:
            self._tidy_soon()

    def _hear_again(self) -> None:
        """Be careful with a store that was away for a moment: it may have been set back to what it knew before."""
        if self._member.was_cut_off and not self._member.is_lost:
            self._rejoin()

    def _hear_of_slots(self, news: News) -> None:
        if news["name"] == self._name:
            if self._wants_slot:
                self._ask_at = -math.inf
                self._look()
            else:
                self._others_want_slots = True
                self._tidy_soon()

    def _hear_of_refusal(self, news: News) -> None:
        if news["name"] != self._name:
            return
        with self._lock:
            current = now()
            advice, seen = from_news(news, current)
            self._own.lessons.refused(advice, seen, current)
            self._leases.leave(current)
        self._look()

    def _unavailable(self, text: str, reason: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"rate limit {self._name!r}: {text}", name=self._name, reason=reason)
