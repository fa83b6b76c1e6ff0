"""This process among those that share a store: how many there are, what they tell each other, and whether it is there.

Two threads do all that no call may wait for. The worker says every second that the process lives, and sends what it
tells the others; the listener hears what they tell. Both end with the process, whatever the store does.
"""

import json
import logging
import queue
import random
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from resilience_kit import events
from resilience_kit.errors import StoreContentError, StoreUnavailableError
from resilience_kit.fleet.connection import Connection, packaged_script
from resilience_kit.forking import new_lock

News = dict[str, Any]

_BEAT = 1.0
# A process that says nothing for so long counts as dead.
_LEASE = 5.0
# The others' beats must not fall together, least of all when a store is back.
_JITTER = 0.2
# Of so many beats the one counts that saw most: a store that was started anew knows those alone that are back.
_COUNTS = 5
# Where nothing was heard for so long, the listener asks whether the store is there; it ends without an answer.
_SILENCE = 10.0
_POLL = 1.0
_MOST_UNSENT = 1_000
_LONGEST_NEWS = 4_096

_log = logging.getLogger("resilience_kit.fleet")


class Member:
    """This process in its fleet.

    All functions that are given to it run in one of its threads; what they raise is logged and dropped.

    Args:
        connection: The store; it is closed with the member.
        beat: Seconds between two signs of life.
        lease: Seconds after the last one that the others count it as dead.

    Attributes:
        id: 16 hexadecimal digits, of this process alone.
        live: How many processes there were lately by the store's word, this one included.
        noticed_within: Seconds in which all processes notice that the store is lost, or has lost what it knew.
        was_cut_off: Whether the listener has lost its connection before: the store may have been started anew since.
    """

    def __init__(self, connection: Connection, *, beat: float = _BEAT, lease: float = _LEASE) -> None:
        self.id = secrets.token_hex(8)
        self.live = 1
        self._counts: deque[int] = deque(maxlen=_COUNTS)
        self.was_cut_off = False
        self.connection = connection
        self.channel = f"{connection.prefix}:news"
        self._beat = beat
        self.noticed_within = beat + connection.deadline
        self._lease = lease
        self._members = connection.key("members")
        self._lock = new_lock()
        self._lost_at: float | None = None
        self._end = threading.Event()
        self._has_warned: set[str] = set()
        # None ends the worker
        self._unsent: queue.SimpleQueue[tuple[str, str] | Callable[[], object] | None] = queue.SimpleQueue()
        self._threads: tuple[threading.Thread, ...] = ()
        self._ear: Any = None
        self._at_lost: list[Callable[[], object]] = []
        self._at_beat: list[Callable[[], object]] = []
        self._at_rejoin: list[Callable[[], object]] = []
        self._at_leave: list[Callable[[], object]] = []
        self._at_listening: list[Callable[[], object]] = []
        self._at_news: dict[str, list[Callable[[News], object]]] = {}

    def __repr__(self) -> str:
        state = "closed" if self._end.is_set() else "lost" if self.is_lost else "in touch"
        return f"<Member {self.id} {state} live={self.live} of {self.connection.prefix!r}>"

    @property
    def is_lost(self) -> bool:
        """Whether the store failed, and has not answered since: nobody asks it meanwhile but the worker."""
        return self._lost_at is not None

    def lost(self, error: Exception) -> None:
        """Take note that a call to the store failed; told once, by whoever sees it first."""
        with self._lock:
            if self._lost_at is not None:
                return
            self._lost_at = time.monotonic()
        if self._end.is_set():
            # it is this process that has left, for good
            return
        for function in [*self._at_lost]:
            self.soon(function)
        reason = error.reason if isinstance(error, StoreUnavailableError) else type(error).__name__
        events.emit(events.StoreLost(name=self.connection.prefix, error=reason))

    def tell(self, channel: str, text: str) -> None:
        """Have the worker publish a text soon; while the store is lost, and after 1,000 unsent ones, it is dropped."""
        if self._unsent.qsize() < _MOST_UNSENT and not self._end.is_set():
            self._unsent.put((channel, text))

    def tell_news(self, kind: str, name: str, **values: Any) -> None:
        """Tell all other members something about a name; it must fit into 4,096 bytes of JSON."""
        self.tell(self.channel, json.dumps({**values, "kind": kind, "name": name, "from": self.id}))

    def soon(self, function: Callable[[], object]) -> None:
        """Have the worker call a function soon, also while the store is lost; after close() it is dropped."""
        if not self._end.is_set():
            self._unsent.put(function)

    def on_beat(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have the worker call a function after each sign of life. Returns what ends that, as all of these do."""
        return _added(self._at_beat, function)

    def on_lost(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have the worker call a function soon after the store was lost."""
        return _added(self._at_lost, function)

    def on_rejoin(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have the worker call a function when a lost store answers, just before `is_lost` ends."""
        return _added(self._at_rejoin, function)

    def on_leave(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have the worker call a function before the process leaves the fleet, unless the store is lost."""
        return _added(self._at_leave, function)

    def on_listening(self, function: Callable[[], object]) -> Callable[[], None]:
        """Have the listener call a function whenever it begins to listen: what was told before, it has not heard."""
        return _added(self._at_listening, function)

    def on_news(self, kind: str, function: Callable[[News], object]) -> Callable[[], None]:
        """Have the listener call a function with all news of a kind from others: `kind`, `name`, `from` and the rest.

        Those three are texts; the rest may be anything that JSON can say.
        """
        return _added(self._at_news.setdefault(kind, []), function)

    def start(self) -> None:
        """Begin to live, if that is not so yet."""
        with self._lock:
            if self._threads or self._end.is_set():
                return
            self._threads = tuple(
                threading.Thread(target=target, name=f"resilience-kit-{target.__name__[1:]}", daemon=True)
                for target in (self._work, self._listen)
            )
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Send what is unsent, leave the fleet and end both threads; in an event loop, without waiting for that."""
        import asyncio

        with self._lock:
            if self._end.is_set():
                return
            self._end.set()
        self._unsent.put(None)
        self._wake_listener()
        if not self._threads:
            self.connection.close()
        elif asyncio._get_running_loop() is None:  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
            for thread in self._threads:
                if thread is not threading.current_thread():
                    # two calls to the store at most
                    thread.join(3 * self.connection.deadline + _POLL)

    # The worker

    def _work(self) -> None:
        next_beat = time.monotonic()
        while True:
            left = next_beat - time.monotonic()
            if left <= 0:
                self._live()
                next_beat = time.monotonic() + self._beat * random.uniform(1 - _JITTER, 1)  # noqa: S311 - no secret
                continue
            try:
                message = self._unsent.get(timeout=left)
            except queue.Empty:
                continue
            if message is None:
                break
            if callable(message):
                self._call(message)
            elif not self.is_lost:
                self._ask(self.connection.publish, *message)
        for function in [*self._at_leave]:
            if self.is_lost or not self._call(function):
                break
        if not self.is_lost:
            # else the others find out by its lease
            self._ask(self.connection.run_blocking, packaged_script("heartbeat"), [self._members], [self.id, 0])
        self.connection.close()

    def _live(self) -> None:
        """Say that this process lives, and do what is to be done about the answer."""
        lease = round(self._lease * 1_000)
        live = self._ask(self.connection.run_blocking, packaged_script("heartbeat"), [self._members], [self.id, lease])
        if not isinstance(live, int):
            return
        self._counts.append(live)
        self.live = max(1, *self._counts)
        lost_at = self._lost_at
        if lost_at is not None:
            if not all(self._call(function) for function in [*self._at_rejoin]):
                return
            self._lost_at = None
            events.emit(events.StoreRejoined(name=self.connection.prefix, seconds=time.monotonic() - lost_at))
        for function in [*self._at_beat]:
            if not self._call(function):
                break

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the store answers; None if it is lost, or what it has is of no use."""
        try:
            return function(*arguments)
        except StoreContentError as error:
            self._warn_once(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread must live to find the store again
            self.lost(error)
        return None

    def _call(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call a function of somebody else's. Returns False if it found that the store is lost."""
        try:
            function(*arguments)
        except StoreUnavailableError as error:
            self.lost(error)
            return False
        except StoreContentError as error:
            self._warn_once(str(error))
        except Exception as error:  # noqa: BLE001 - the thread serves others too
            name = getattr(function, "__qualname__", type(function).__qualname__)
            self._warn_once(f"{name!r} raised {type(error).__name__} in a thread of the fleet")
        return True

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned and len(self._has_warned) < _MOST_UNSENT:
            self._has_warned.add(text)
            _log.warning("%s", text)

    # The listener

    def _listen(self) -> None:
        while not self._end.is_set():
            try:
                ear = self._ear = self.connection.listener()
                try:
                    ear.connect()
                    ear.send_command("SUBSCRIBE", self.channel)
                    ear.read_response()
                    for function in [*self._at_listening]:
                        self._call(function)
                    # from now on, to listen anew is to have been away
                    self.was_cut_off = True
                    self._hear_all(ear)
                finally:
                    ear.disconnect()
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread must live to listen again
                # the worker finds out whether it is the store that is gone, or this one connection
                if self.connection.failure(error) is None and not self._end.is_set():
                    self._warn_once(f"listening to the channel {self.channel!r} failed with {type(error).__name__}")
            self._end.wait(self._beat * random.uniform(1 - _JITTER, 1))  # noqa: S311 - no secret

    def _hear_all(self, ear: Any) -> None:
        heard_at, has_asked = time.monotonic(), False
        while not self._end.is_set():
            if ear.can_read(_POLL):
                message = ear.read_response()
                heard_at, has_asked = time.monotonic(), False
                if isinstance(message, list) and message[0] == b"message":
                    self._hear(message[-1])
            elif time.monotonic() - heard_at > _SILENCE:
                if has_asked:
                    raise TimeoutError
                ear.send_command("PING")
                has_asked = True

    def _hear(self, data: bytes) -> None:
        news = _parsed(data)
        if news is None:
            self._warn_once(f"what was told on the channel {self.channel!r} is not from this kit, and was dropped")
        elif news["from"] != self.id:
            for function in [*self._at_news.get(news["kind"], ())]:
                self._call(function, news)

    def _wake_listener(self) -> None:
        # not yet connected, or just closed
        with suppress(OSError, AttributeError):
            self._ear._sock.shutdown(socket.SHUT_RDWR)  # noqa: SLF001 - redis-py's disconnect() is not for another thread


def _added(functions: list[Any], function: Any) -> Callable[[], None]:
    functions.append(function)

    def end() -> None:
        # ended twice
        with suppress(ValueError):
            functions.remove(function)

    return end


def _parsed(data: Any) -> News | None:
    """News as they were told; None for anything else."""
    if not isinstance(data, bytes) or len(data) > _LONGEST_NEWS:
        return None
    try:
        news = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(news, dict) and all(isinstance(news.get(name), str) for name in ("kind", "name", "from")):
        return news
    return None
