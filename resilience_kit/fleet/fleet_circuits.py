"""A circuit that is shared by a fleet: what its process does is told to the others, and theirs is done here too.

The state in each process decides about its calls; the store keeps the last move over the fleet, and the worker thread
sees to it that both come to the same. Moves are ordered by a version that the store gives: an opening or a recovery
counts only on top of the last move that its process knew, a reset always. What is told by publish/subscribe is only
that there is something to look at, so that no message can move a circuit, and a lost one is made good by a later look.

A trial needs one of the fleet's permits. The worker fetches them as long as calls are refused, so that a process
without calls holds none; one that lies unused goes to another process after a while.
"""

import json
import math
import random
import re
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from resilience_kit.errors import StoreContentError
from resilience_kit.fleet.connection import packaged_script
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.fleet.membership import News

# A permit of a process that gives no sign of life ends after so long; the process itself counts on less.
_LEASE = 5.0
_MARGIN = 0.5
# Permits are asked for so long before they are needed, as long as the last refused call is not longer ago than this.
_LEAD = 1.5
_DEMAND = 30.0
# A refused call asks again for a permit no sooner than so long after the last one.
_ASK_AGAIN = 0.05
# What may have been missed is looked up after so long, not by all at once.
_LOOK = (10.0, 20.0)
# An unused permit is kept for so long if others wait, not always the same: who calls in turns would always miss it.
_KEEP = (0.3, 2.0)
# The state outlives what it says by so long.
_KEPT = 3_600
_LONGEST_NAME = 200
_MOST = 2**53
_ERROR_NAME = re.compile(r"[^\W\d]\w{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CircuitNews:
    """How a circuit moved in another process: open for so many seconds, or closed where that is None."""

    seconds: float | None
    failures: int
    reason: str


class LocalCircuit(Protocol):
    """What a shared circuit asks of the one in this process; `lock` is reentrant and guards both."""

    name: str
    lock: Any

    @property
    def trials_in_flight(self) -> int:
        """How many trials are under way."""
        ...

    @property
    def seconds_open(self) -> float | None:
        """Seconds until it lets trials through, 0 or less if it does; None while it is closed."""
        ...

    def follow(self, news: CircuitNews) -> None:
        """Move as another process did; `tell` is called after it."""

    def tell(self) -> None:
        """Tell listeners what happened; called without the lock."""


@dataclass(frozen=True, slots=True)
class _Answer:
    version: int
    moved: int
    state: str
    seconds: float
    failures: int
    error: str
    held: int
    others: int


class SharedCircuit:
    """The fleet's side of one circuit. No method but `sync` asks the store; that is for the worker thread alone.

    Args:
        circuit: The one in this process.
        fleet: Whom it is shared with.
        max_trials: Trials under way at once, over the fleet.
        success_threshold: Trials that must succeed to close it, over the fleet.
    """

    def __init__(self, circuit: LocalCircuit, fleet: Fleet, *, max_trials: int, success_threshold: int) -> None:
        self._circuit = circuit
        self._lock = circuit.lock
        self._connection = fleet.connection
        self._member = fleet.member
        self._max_trials = max_trials
        self._success_threshold = success_threshold
        name = f"circuit:{circuit.name}"
        self._keys = [self._connection.key(name, part) for part in ("state", "trials", "waiting")]
        self._told_name = _told_name(circuit.name)
        # The last move over the fleet that was done here too, and what was done here and is not told.
        self._version = 0
        self._has_looked = False
        self._is_garbled = False
        self._move = ""
        self._failures, self._error = 0, ""
        self._successes = 0
        # Permits, until when they are good for, and how many others wait for one.
        self._held = 0
        self._held_until = -math.inf
        self._kept_until = -math.inf
        self._others = 0
        self._is_given_back = False
        self._refused_at = self._asked_at = self._look_at = -math.inf
        self._is_queued = False
        self._member.on_news("circuit", self._hear)
        self._member.on_listening(self._look_soon)
        self._member.on_beat(self._beat)
        self._member.on_rejoin(self.sync)
        self._look_soon()

    # What the circuit tells, under its lock

    def note_move(self, move: str, *, failures: int = 0, error: str = "") -> None:
        """Take note that calls, or a user, moved the circuit: "open", "recovered" or "reset"."""
        self._forget_permits()
        if move == "open":
            self._refused_at = time.monotonic()
            if self._member.is_lost:
                # It may be this process that is cut off, and not the service: the others see for themselves.
                self._move = "reset" if self._move == "reset" else ""
                return
        self._move = move
        self._failures, self._error = failures, error if _ERROR_NAME.fullmatch(error) else "Exception"

    def note_refusal(self) -> None:
        """Take note that a call was refused, and so that there is a use for permits."""
        self._refused_at = time.monotonic()

    def note_trial_end(self, *, success: bool) -> None:
        """Take note that a trial ended."""
        self._successes += success
        if self._others:
            # at once, else a busy process would use it for call after call, whatever comes of them
            self._held = max(self._held - 1, 0)
            self._is_given_back = True

    def trials_allowed(self) -> int:
        """How many trials may be under way in this process."""
        if self._member.is_lost or self._is_garbled:
            return self._max_trials
        return min(self._held, self._max_trials) if time.monotonic() < self._held_until else 0

    def hurry(self) -> None:
        """Have the worker see to what cannot wait for the next beat; called without the lock."""
        with self._lock:
            if self._is_queued or self._member.is_lost or not (self._has_news or self._is_short(_ASK_AGAIN)):
                return
        self._look_soon()

    # What the member calls

    def sync(self) -> None:
        """Tell the store how it stands here, and do here what was done elsewhere.

        Raises:
            StoreUnavailableError: It is not known whether it was told.
            StoreContentError: There is garbage under a key; the circuit is this process's alone until it is gone.
        """
        began = time.monotonic()
        with self._lock:
            self._is_queued = False
            is_first = not self._has_looked
            move = "" if is_first else self._move
            arguments = self._arguments(move, began)
            self._move = "" if move else self._move
            # at most once: one too few costs a trial, one too many trust
            self._successes = 0
            self._is_given_back = False
            self._asked_at, self._look_at = began, began + random.uniform(*_LOOK)  # noqa: S311 - no secret
        is_done = False
        try:
            reply = self._connection.run_blocking(packaged_script("circuit"), self._keys, arguments)
            answer = _parsed(reply, self._keys[0])
            is_done = True
        except StoreContentError:
            self._is_garbled = True
            raise
        finally:
            if not is_done:
                with self._lock:
                    self._move = self._move or move
        with self._lock:
            self._take(answer, began)
        self._circuit.tell()
        if is_first and self._move:
            # not by way of the queue, which takes nothing more in a process that ends
            self.sync()
        else:
            self.hurry()

    def _beat(self) -> None:
        with self._lock:
            current = time.monotonic()
            if self._held > self._circuit.trials_in_flight and self._others and current >= self._kept_until:
                self._is_given_back = True
            is_due = self._has_news or self._held > 0 or self._circuit.trials_in_flight > 0 or self._is_short(0.0)
            is_due = is_due or current >= self._look_at
        if is_due:
            self.sync()

    def _hear(self, news: News) -> None:
        if news["name"] != self._told_name:
            return
        with self._lock:
            is_due = news.get("moved") is True or self._is_short(0.0)
        if is_due:
            self._look_soon()

    def _look_soon(self) -> None:
        with self._lock:
            if self._is_queued:
                return
            self._is_queued = True
        self._member.soon(self._sync_unless_lost)

    def _sync_unless_lost(self) -> None:
        if self._member.is_lost:
            # it is looked at as soon as the store is back
            with self._lock:
                self._is_queued = False
        else:
            self.sync()

    # Under the lock

    @property
    def _has_news(self) -> bool:
        return bool(self._move or self._successes or self._is_given_back)

    @property
    def _has_demand(self) -> bool:
        seconds = self._circuit.seconds_open
        return seconds is not None and seconds <= _LEAD and time.monotonic() < self._refused_at + _DEMAND

    def _is_short(self, pause: float) -> bool:
        """Whether a permit is to be asked for, where the last time was not less than `pause` ago."""
        return (
            self._has_demand
            and self._circuit.trials_in_flight >= self.trials_allowed()
            and self._held < self._max_trials
            and time.monotonic() >= self._asked_at + pause
        )

    def _arguments(self, move: str, began: float) -> list[str | int]:
        in_flight = min(self._circuit.trials_in_flight, self._max_trials)
        wanted = in_flight
        if self._has_demand and not self._is_given_back:
            wanted = self._max_trials if not self._others else min(in_flight + 1, self._max_trials)
        # those that are given back are not used any more while the store is told
        self._held = min(self._held, wanted)
        seconds = max(0.0, self._circuit.seconds_open or 0.0)
        return [
            self._member.channel,
            self._news(moved=True),
            self._news(moved=False),
            self._member.id,
            self._version,
            move,
            round(min(seconds * 1e6, _MOST / 4)),
            self._failures,
            self._error,
            wanted,
            self._max_trials,
            round(_LEASE * 1e6),
            self._successes,
            self._success_threshold,
            round(min(seconds, 1e9)) + _KEPT,
        ]

    def _news(self, *, moved: bool) -> str:
        return json.dumps({"kind": "circuit", "name": self._told_name, "from": self._member.id, "moved": moved})

    def _take(self, answer: _Answer, began: float) -> None:
        is_first = not self._has_looked
        self._has_looked = True
        self._is_garbled = False
        if answer.version > self._version:
            self._version = answer.version
            # what this process does while it does not know the fleet's state is on top of that
            if answer.moved != 1 and self._move != "reset" and not (is_first and self._move):
                self._move = ""
                self._forget_permits()
                self._circuit.follow(_news_of(answer))
            if answer.moved == 0:
                return
        if self._move:
            # it has moved since
            return
        if answer.held > self._held:
            self._kept_until = time.monotonic() + random.uniform(*_KEEP)  # noqa: S311 - no secret
        self._held = answer.held
        self._held_until = began + _LEASE - _MARGIN
        self._others = answer.others

    def _forget_permits(self) -> None:
        self._held = self._successes = self._others = 0
        self._held_until = -math.inf
        self._is_given_back = False


def _news_of(answer: _Answer) -> CircuitNews:
    where = "" if answer.moved else " in another process"
    if answer.state == "open":
        return CircuitNews(answer.seconds, answer.failures, f"{answer.error}{where}")
    return CircuitNews(None, 0, f"{answer.state}{where}")


def _told_name(name: str) -> str:
    """A name as it is told: news have a greatest length, and names have not."""
    if len(name) <= _LONGEST_NAME:
        return name
    return sha256(name.encode(errors="surrogatepass")).hexdigest()


def _parsed(reply: Any, key: str) -> _Answer:
    """What the script answered, which may be made of what others wrote."""
    try:
        version, moved, state, left, failures, error, held, others = reply
        numbers = (version, moved, left, failures, held, others)
        state, error = state.decode("ascii"), error.decode("ascii")
        is_sound = all(isinstance(number, int) and 0 <= number < _MOST for number in numbers) and (
            state in {"", "recovered", "reset"} or (state == "open" and _ERROR_NAME.fullmatch(error) is not None)
        )
    except (TypeError, ValueError, AttributeError):
        is_sound = False
    if not is_sound:
        raise StoreContentError(f"what lies in the store under {key!r} is not what the kit put there", key=key)
    return _Answer(version, moved, state, left / 1e6, failures, error, held, others)
