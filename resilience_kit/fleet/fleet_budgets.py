"""Budgets that a fleet shares: reserved in the store before a call, and settled there after it.

A call reserves in one round trip. What it used is told by the worker thread of the fleet, or with the next call's
reservation, whichever comes first: no call waits for it. What a process holds has a lease in the store, which is
renewed with the process's signs of life; so what a dead process held is free again after a while.

While the store is lost a process is *alone*: by default it keeps to its share of what was left when it last heard from
the store, and tells what it used when the store is back. Until all have told theirs, each keeps to its share.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resilience_kit.errors import ConfigurationError, StoreUnavailableError
from resilience_kit.fleet.connection import Argument, packaged_script
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.forking import new_lock
from resilience_kit.registry import mode
from resilience_kit.settings import current_settings
from resilience_kit.token_budgets import (
    Amount,
    Budget,
    BudgetConfiguration,
    BudgetStatistics,
    Excess,
    Reservation,
)
from resilience_kit.waiting import Waiting

# What a process holds is free again when it has given no sign of life for so long.
_SCRIPT = packaged_script("checked_calls", "budget")
_LEASE = 10.0
# When the store is back or has lost its state, others may take so long to find out, and to tell what they used.
_SHARES = 4.0
# A store that failed is asked again after so long, where nobody says that it is back.
_RETRY = 1.0
_NANOS = 1_000_000_000
_MICROS = 1_000_000
# The server's clock and this one do not tick as one: who waits for the end waits a little longer.
_MARGIN = 0.002


@dataclass(frozen=True, slots=True)
class _Units:
    """An amount in whole numbers, as the store keeps it."""

    tokens: int = 0
    nanos: int = 0

    def __add__(self, other: "_Units") -> "_Units":
        return _Units(self.tokens + other.tokens, self.nanos + other.nanos)

    def __sub__(self, other: "_Units") -> "_Units":
        return _Units(self.tokens - other.tokens, self.nanos - other.nanos)

    def at_least(self, other: "_Units") -> "_Units":
        return _Units(max(self.tokens, other.tokens), max(self.nanos, other.nanos))


_NONE = _Units()


def _units(amount: Amount) -> _Units:
    return _Units(amount.tokens, round(amount.usd * _NANOS))


@dataclass(frozen=True, slots=True)
class _Message:
    """One message to the store, and what the budget knew when it was sent.

    It is early if another one was under way that gives something back: it may come before that one.
    """

    arguments: Sequence[Argument]
    epoch: str
    generation: int
    released: _Units
    batch: int
    resets: int
    is_known: bool
    is_early: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the script answers: what became of the message, and where the budget stands."""

    verdict: str
    epoch: str
    serial: int
    left: int
    used: _Units
    held: _Units
    held_here: _Units
    shares: float


class FleetBudget(Budget):
    """The one budget of an agent in all processes of a fleet; each keeps to its own limit for what all use.

    Args:
        agent: The name that the processes share it by.
        configuration: What a decorator says of it.
        fleet: This process's way to the store.
    """

    def __init__(self, agent: str, configuration: BudgetConfiguration, fleet: Fleet) -> None:
        super().__init__(agent, configuration)
        self._connection, self._member = fleet.connection, fleet.member
        self._on_failure = current_settings().on_store_failure
        self._keys = [self._connection.key(f"budget:{agent}", part) for part in ("state", "leases")]
        self._limits = (self._limit_tokens, None if self._limit_usd is None else round(self._limit_usd * _NANOS))
        # another budget of this name in this process, as in a test, is another one for the store
        self._holder = secrets.token_hex(8)
        # Not reentrant, unlike settle(): the garbage collector may call that one in the midst of all else here.
        self._guard = new_lock()
        self._settled: deque[tuple[Reservation, _Units]] = deque()
        self._is_telling = False
        # the period in the store; with no epoch, one that only this process knows
        self._epoch, self._serial = "", 0
        self._ends_at: float | None = None
        self._began_at: float | None = None
        self._known_used = self._held_by_others = _NONE
        self._live = 1
        # what calls under way hold, and what the store holds for them by all that it has answered
        self._open = self._acknowledged = _NONE
        self._generation, self._is_unsure = 1, False
        self._released = self._untold = self._batch = _NONE
        self._batch_number, self._is_batch_sent = 0, False
        self._in_flight = self._releasing = 0
        # the number of the last one, until the store has heard of it
        self._resets = self._last_reset = 0
        self._alone_until = -math.inf
        self._is_alone = False
        self._allowance = self._used_alone = _NONE
        self._member.on_beat(self._beat)
        self._member.on_rejoin(self._rejoin)

    async def reserve(self, amount: Amount, waiting: Waiting, *, may_wait: bool) -> Reservation:
        """Hold an amount for a call, over the fleet.

        Raises:
            TokenBudgetExceededError: It is more than is left, and waiting is not allowed or would not help.
            ConfigurationError: Another process has the same budget with another period.
            StoreUnavailableError: The store is gone, and `on_store_failure` is "refuse".
            StoreContentError: What lies in the store under the budget's name is not what the kit put there.
        """
        need = _units(amount)
        outcome: Reservation | tuple[Excess, float | None] | None
        while True:
            if self._must_be_alone():
                outcome = self._reserve_alone(amount, need)
            else:
                outcome = await self._reserve_in_store(amount, need, waiting)
            if isinstance(outcome, Reservation):
                return outcome
            if outcome is not None:
                excess, seconds = outcome
                # where a test skips its waits, the server's clock does not jump ahead
                can_wait = may_wait and not mode.skips_waiting
                await waiting.sleep(self._wait_of(excess, seconds, may_wait=can_wait))

    def settle(self, reservation: Reservation, used: Amount) -> None:
        """Have what was used take the place of what was held, soon and without waiting for it."""
        self._settled.append((reservation, _units(used)))
        # else whoever has it takes them in
        if self._guard.acquire(blocking=False):
            try:
                self._take_in_settled()
            finally:
                self._guard.release()
        self._tell_soon()

    def statistics(self) -> BudgetStatistics:
        """Where the budget stands over the fleet, as last known: at most about a second old while it is in use."""
        with self._guard:
            self._take_in_settled()
            self._turn_if_over()
            used = self._known_used + self._untold + self._batch
            reserved = self._held_by_others + self._open
            return BudgetStatistics(
                self._limit_tokens,
                used.tokens,
                reserved.tokens,
                self._limit_usd,
                used.nanos / _NANOS,
                reserved.nanos / _NANOS,
                None if self._ends_at is None else self._ends_at - time.monotonic(),
            )

    def reset(self) -> None:
        """Start a new period with nothing used, for the whole fleet: as soon as the store hears of it."""
        with self._guard:
            self._take_in_settled()
            self._turn()
            self._last_reset += 1
            self._resets = self._last_reset
        self._tell_soon()

    # In touch with the store

    async def _reserve_in_store(
        self, amount: Amount, need: _Units, waiting: Waiting
    ) -> Reservation | tuple[Excess, float | None] | None:
        """Ask the store once. Returns None if that has to be done again."""
        message = self._message("reserve", need)
        answer = None
        try:
            reply = await self._connection.run(waiting, _SCRIPT, self._keys, message.arguments)
            answer = self._read(reply)
        except StoreUnavailableError as error:
            self._member.lost(error)
            if self._on_failure == "refuse":
                raise
            # for a while even if the member, being closed, takes no note
            self._go_alone(time.monotonic() + _RETRY)
            return None
        finally:
            # cancelled, or never answered: whether it was done is not known
            if answer is None:
                self._unanswered(message)
        with self._guard:
            self._learn(message, answer)
            if answer.verdict == "granted":
                return self._granted(message, answer, amount, need)
            if answer.verdict == "shares":
                shares = answer.shares
            elif answer.verdict == "refused" and not message.is_early:
                excess = self._broken(need, answer.used + answer.held)
                seconds = answer.left / _MICROS + _MARGIN if answer.left > 0 else None
                return None if excess is None else (excess, seconds)
            else:
                return None
        self._go_alone(time.monotonic() + shares)
        return None

    def _granted(self, message: _Message, answer: _Answer, amount: Amount, need: _Units) -> Reservation | None:
        if message.generation != self._generation or answer.epoch != self._epoch:
            # replaced in the store by a newer message, or on its way to be
            return None
        if answer.serial < self._serial:
            return Reservation(amount, -1)
        self._acknowledged += need
        self._open += need
        return Reservation(amount, self._period)

    def _message(self, kind: str, need: _Units = _NONE) -> _Message:
        with self._guard:
            self._take_in_settled()
            self._turn_if_over()
            if self._is_alone and not self._member.is_lost and self._alone_until <= time.monotonic():
                self._is_alone, self._is_unsure = False, True
            if self._is_unsure:
                self._generation += 1
                self._acknowledged, self._released, self._is_unsure = self._open, _NONE, False
            released, self._released = self._released, _NONE
            if self._batch == _NONE != self._untold:
                # one that was sent and not answered is sent again as it was
                self._batch, self._untold = self._untold, _NONE
                self._batch_number += 1
            has_batch = self._batch != _NONE and not self._is_batch_sent
            number, batch = (self._batch_number, self._batch) if has_batch else (0, _NONE)
            self._is_batch_sent |= has_batch
            left = self._left()
            began_at = self._began_at if not self._epoch else None
            arguments: tuple[Argument, ...] = (
                *(kind, self._holder, self._epoch, round((self._seconds or 0) * _MICROS), round(_LEASE * _MICROS)),
                *(self._serial, left, 0 if began_at is None else round((time.monotonic() - began_at) * _MICROS)),
                *(self._resets, round(_SHARES * _MICROS)),
                *(self._known_used.tokens, self._known_used.nanos, self._generation),
                *(self._acknowledged.tokens, self._acknowledged.nanos, released.tokens, released.nanos),
                *(number, batch.tokens, batch.nanos, need.tokens, need.nanos),
                *(-1 if limit is None else limit for limit in self._limits),
            )
            is_early = self._releasing > 0
            self._in_flight += 1
            self._releasing += released != _NONE
            return _Message(
                arguments, self._epoch, self._generation, released, number, self._resets, bool(left), is_early
            )

    def _read(self, reply: Any) -> _Answer:
        if reply[0] == b"per":
            there, here = (f"{it:g}" if it else "None" for it in (reply[1] / _MICROS, self._seconds))
            raise ConfigurationError(
                f"token budget {self.agent!r} has two configurations: per={there} was declared in another process of "
                f"the fleet, and now per={here}. Say the same in both, or use another name; once no process has the "
                "other one, reset_all() starts the budget anew."
            )
        verdict, epoch, serial, left, *amounts, shares = reply
        used, held, held_here = (_Units(*amounts[at : at + 2]) for at in (0, 2, 4))
        return _Answer(verdict.decode(), epoch.decode(), serial, left, used, held, held_here, shares / _MICROS)

    def _unanswered(self, message: _Message) -> None:
        with self._guard:
            self._in_flight -= 1
            self._releasing -= message.released != _NONE
            self._is_unsure = True
            if message.batch == self._batch_number:
                self._is_batch_sent = False
        self._tell_soon()

    def _learn(self, message: _Message, answer: _Answer) -> None:
        self._in_flight -= 1
        self._releasing -= message.released != _NONE
        if message.batch == self._batch_number:
            self._batch, self._is_batch_sent = _NONE, False
        if message.resets == self._resets:
            self._resets = 0
        if message.generation == self._generation:
            self._acknowledged -= message.released
        if not answer.shares:
            # else some may not be back yet, and count still
            self._live = self._member.live
        if self._untold != _NONE:
            self._tell_soon()
        self._adopt(message, answer)

    def _adopt(self, message: _Message, answer: _Answer) -> None:
        """Take the period of an answer for the present one, unless a newer one is known."""
        if answer.epoch != self._epoch:
            if message.epoch != self._epoch:
                # asked before the state was known that is known by now
                return
            if self._epoch and not message.is_known:
                self._turn()
        elif answer.serial < self._serial:
            return
        elif answer.serial > self._serial:
            self._turn()
        is_same = (answer.epoch, answer.serial) == (self._epoch, self._serial)
        self._epoch, self._serial = answer.epoch, answer.serial
        self._known_used = answer.used.at_least(self._known_used) if is_same else answer.used
        self._held_by_others = answer.held - answer.held_here
        self._began_at = None
        self._ends_at = time.monotonic() + answer.left / _MICROS if answer.left >= 0 else None

    # In the worker's thread

    def _beat(self) -> None:
        self._is_telling = False
        with self._guard:
            if not self._in_flight:
                # what the store holds for this process is put right, whatever has happened to it
                self._is_unsure = True
        self._tell("tell")

    def _rejoin(self) -> None:
        self._is_telling = False
        answer = self._tell("rejoin" if self._on_failure == "local" else "tell")
        with self._guard:
            self._alone_until = time.monotonic() + answer.shares

    def _tell_soon(self) -> None:
        if not self._is_telling and not self._member.is_lost:
            self._is_telling = True
            self._member.soon(self._tell_settled)

    def _tell_settled(self) -> None:
        self._is_telling = False
        with self._guard:
            self._take_in_settled()
            has_unsent = self._batch != _NONE and not self._is_batch_sent
            # else a reservation has taken it along
            is_due = has_unsent or self._is_unsure or self._resets or self._released + self._untold != _NONE
        if is_due and not self._member.is_lost:
            self._tell("tell")

    def _tell(self, kind: str) -> _Answer:
        message = self._message(kind)
        answer = None
        try:
            answer = self._read(self._connection.run_blocking(_SCRIPT, self._keys, message.arguments))
        finally:
            if answer is None:
                self._unanswered(message)
        with self._guard:
            self._learn(message, answer)
        return answer

    # Alone

    def _must_be_alone(self) -> bool:
        if self._member.is_lost:
            if self._on_failure == "refuse":
                raise StoreUnavailableError(
                    f"the store at {self._connection.place} is lost, and so token budget {self.agent!r} refuses all "
                    'calls: on_store_failure="refuse"',
                    name=self._connection.prefix,
                    reason="StoreLost",
                )
            self._go_alone(self._alone_until)
            return True
        return self._is_alone and self._alone_until > time.monotonic()

    def _go_alone(self, until: float) -> None:
        with self._guard:
            self._take_in_settled()
            if not self._is_alone:
                taken = self._known_used + self._held_by_others + self._untold + self._batch + self._open
                self._allowance = self._share(taken) + self._open
                self._is_alone, self._used_alone = True, _NONE
            self._alone_until = until

    def _share(self, taken: _Units) -> _Units:
        """What this process may use by itself of what is left."""
        if self._on_failure == "open" and self._member.is_lost:
            taken, live = _NONE, 1
        else:
            live = max(self._live, self._member.live)
        tokens, nanos = self._limits
        return _Units(max(0, (tokens or 0) - taken.tokens) // live, max(0, (nanos or 0) - taken.nanos) // live)

    def _reserve_alone(self, amount: Amount, need: _Units) -> Reservation | tuple[Excess, float | None]:
        with self._guard:
            self._take_in_settled()
            self._turn_if_over()
            left = self._allowance - self._used_alone - self._open
            tokens, nanos = self._limits
            excess = self._broken(need, _Units(tokens or 0, nanos or 0) - left)
            if excess is None:
                if self._began_at is None:
                    self._began_at = time.monotonic()
                    if self._ends_at is None and self._seconds is not None:
                        self._ends_at = self._began_at + self._seconds
                self._open += need
                self._is_unsure = True
                return Reservation(amount, self._period)
            current = time.monotonic()
            ends_at = self._ends_at
            if ends_at is None and self._seconds is not None:
                ends_at = current + self._seconds
            if not self._member.is_lost:
                ends_at = min(self._alone_until, math.inf if ends_at is None else ends_at)
            return excess, None if ends_at is None else max(0.0, ends_at - current) + _MARGIN

    # Under the guard

    def _take_in_settled(self) -> None:
        while self._settled:
            reservation, used = self._settled.popleft()
            if reservation.period == self._period:
                held = _units(reservation.amount)
                self._open -= held
                self._released += held
                self._untold += used
                if self._is_alone:
                    self._used_alone += used
                    self._is_unsure = True

    def _turn_if_over(self) -> None:
        if self._ends_at is not None and self._ends_at <= time.monotonic():
            self._turn()

    def _turn(self) -> None:
        """Begin a period of which nothing is known yet; calls of the one before are settled with that one."""
        self._period += 1
        self._epoch, self._serial = "", 0
        self._ends_at = self._began_at = None
        self._known_used = self._held_by_others = self._open = _NONE
        self._released = self._untold = self._batch = self._used_alone = _NONE
        self._is_unsure, self._is_batch_sent = True, False
        if self._is_alone:
            self._allowance = self._share(_NONE)

    def _left(self) -> int:
        """Microseconds of the known period that are left: -1 without an end, 0 where none is known."""
        if not self._epoch:
            return 0
        if self._seconds is None:
            return -1
        return 0 if self._ends_at is None else max(0, round((self._ends_at - time.monotonic()) * _MICROS))

    def _broken(self, need: _Units, taken: _Units) -> Excess | None:
        tokens, nanos = self._limits
        if tokens is not None and taken.tokens + need.tokens > tokens:
            return need.tokens, tokens, max(0, tokens - taken.tokens), "tokens"
        if nanos is not None and taken.nanos + need.nanos > nanos:
            return need.nanos / _NANOS, nanos / _NANOS, max(0, nanos - taken.nanos) / _NANOS, "USD"
        return None
