"""The one way to the store: scripts that run on the server, each within a deadline, asked by a task or by a thread.

redis-py opens the connections, logs in and speaks the protocol. Its clients are left out: they take a third of the
rate of a round trip, and repeat what may have been done; a script that is run twice reserves twice.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from resilience_kit.errors import ConfigurationError, StoreContentError, StoreUnavailableError
from resilience_kit.store_urls import checked_store_url, place_of, secrets_of
from resilience_kit.waiting import Waiting

Argument = str | bytes | int | float
# redis-py types neither of its two kinds of connection whole
_AnyConnection = Any

# Of one event loop; who finds them all taken waits for one, within the deadline.
_MOST_CONNECTIONS = 32
# Of the deadline: an event loop that is so late to end a call was itself what kept the call from ending.
_BUSY = 0.1
# Wrong content, as a script tells it: the code, then the key.
_CONTENT = "RESILIENCE_CONTENT "
# What Redis 6 puts before an error in a script.
_PLACE_IN_SCRIPT = re.compile(r"^Error running script \(call to \w+\): (@user_script: ?\d+: )+-?")
# In a key's name: braces would end the part that says the slot, and line breaks the error that names the key.
_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in "%{}\r\n"})
# What the server says when a command meets a value of another type, or a script fails on what it has read.
_SIGNS_OF_GARBAGE = ("WRONGTYPE ", "ERR user_script:", "user_script:", "ERR Error running script")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the digest that the server knows it by once it has seen it."""

    name: str
    text: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        # the protocol's own name of a script, not a matter of security
        object.__setattr__(self, "digest", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


@cache
def packaged_script(*names: str) -> Script:
    """The script in `name`.lua beside this module; of several names, those before the last are what it begins with."""
    folder = files("resilience_kit.fleet")
    return Script(names[-1], "\n".join(folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in names))


class _LoopConnections:
    """The open connections of one event loop, which closes them when it ends."""

    __slots__ = ("closing", "free", "idle", "is_closed", "lifetime")

    def __init__(self, forget: Callable[[], object]) -> None:
        self.idle: list[_AnyConnection] = []
        self.free = asyncio.Semaphore(_MOST_CONNECTIONS)
        self.is_closed = False
        # a loop that ends closes all generators that were begun in it
        self.lifetime = self._live(forget)
        self.closing: asyncio.Task[None] | None = None

    async def _live(self, forget: Callable[[], object]) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.is_closed = True
            forget()
            try:
                await asyncio.gather(*(it.disconnect() for it in self.idle), return_exceptions=True)
            finally:
                # if that was cancelled, this closes them without waiting
                for connection in self.idle:
                    await connection.disconnect(nowait=True)

    def close_soon(self) -> None:
        """Close them in a task of their loop; a loop that ends before it is done ends it as well."""
        if not self.is_closed:
            self.closing = asyncio.get_running_loop().create_task(self._close())

    async def _close(self) -> None:
        await self.lifetime.aclose()


class Connection:
    """How this process reaches the store, from all its event loops and threads.

    Args:
        url: The server, as in the setting `resilience_store`.
        prefix: What all keys begin with.
        deadline: Seconds that a call may take, connecting included.

    Raises:
        ConfigurationError: The URL has a wrong scheme or shape, or the extra `fleet` is not installed.

    Example:
        >>> from resilience_kit.fleet.connection import Connection
        >>> Connection("redis://:secret@localhost").key("limit:chat", "quota")
        'resilience:{limit:chat}:quota'
    """

    def __init__(self, url: str, *, prefix: str = "resilience", deadline: float = 0.25) -> None:
        try:
            # All of it, and before there is a thread of ours: two threads that import parts of redis-py 8.1 at once may
            # each wait for the other's part.
            for module in ("redis", "redis.connection", "redis.asyncio.connection"):
                import_module(module)
        except ImportError as error:
            raise ConfigurationError("a store needs redis-py: pip install 'resilience-kit[fleet]'") from error
        self.prefix = prefix
        self.deadline = deadline
        self._url = checked_store_url(url)
        self.place = place_of(self._url)
        self._secrets = secrets_of(self._url)
        self._is_closed = False
        self._idle: list[_AnyConnection] = []
        self._by_loop: dict[asyncio.AbstractEventLoop, _LoopConnections] = {}

    def __repr__(self) -> str:
        return f"<Connection to {self.place!r} prefix={self.prefix!r} deadline={self.deadline}>"

    def key(self, name: str, *parts: str) -> str:
        """The key of a part of what lies under a name; all parts of one name are in one slot of a cluster."""
        # what UTF-8 cannot say is escaped too
        tag = name.translate(_ESCAPES)
        text = ":".join((self.prefix, f"{{{tag}}}", *parts))
        return text.encode(errors="backslashreplace").decode()

    async def run(
        self, waiting: Waiting, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Any:
        """Run a script, in the way that the caller waits.

        Returns:
            What the script returned: an int, bytes, None, or a list of them.

        Raises:
            StoreUnavailableError: It was not run, or no answer came within the deadline; it may have been run then.
            StoreContentError: What lies under a key is not what the kit put there.
        """
        if waiting.blocks:
            return self.run_blocking(script, keys, arguments)
        connections = self._by_loop.get(asyncio.get_running_loop())
        try:
            if connections is None:
                connections = await self._enter_loop()
            async with asyncio.timeout(None) as timeout:
                timer = self._end_later(timeout)
                try:
                    async with connections.free:
                        return await self._ask(connections, script, keys, arguments)
                finally:
                    timer.cancel()
        except Exception as error:
            failure = self.failure(error, keys)
            if failure is None:
                raise
        # out here, so that redis-py's error is not even its context
        raise failure

    def run_blocking(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Run a script, and block the thread meanwhile; else as `run`."""
        operands = (len(keys), *keys, *arguments)
        return self._do_blocking(("EVALSHA", script.digest, *operands), ("EVAL", script.text, *operands), keys)

    def publish(self, channel: str, text: str) -> None:
        """Tell all who listen to a channel, and block the thread until the store has it.

        Raises:
            StoreUnavailableError: It is not known to have it.
        """
        self._do_blocking(("PUBLISH", channel, text), (), ())

    def listener(self) -> Any:
        """A new connection, not yet open, for a thread that listens to channels."""
        import redis.connection

        return self._new(redis.connection)

    def failure(self, error: Exception, keys: Sequence[str] = ()) -> StoreUnavailableError | StoreContentError | None:
        """What the kit calls an error of redis-py or of the network; None for one that is neither's."""
        from redis.exceptions import RedisError, ResponseError

        text = _PLACE_IN_SCRIPT.sub("", str(error))
        if isinstance(error, ResponseError) and text.startswith(_CONTENT):
            key = text.removeprefix(_CONTENT)
            # some servers add where in the script it was said
            key = next((known for known in keys if key.startswith(known)), key)
            return StoreContentError(f"what lies in the store under {key!r} is not what the kit put there", key=key)
        if isinstance(error, ResponseError) and text.startswith(_SIGNS_OF_GARBAGE):
            names = ", ".join(keys)
            return StoreContentError(f"what lies in the store under {names!r} is not what the kit put there", key=names)
        # on garbage from the server, its parser raises what int() does, or calls itself too often
        if not isinstance(error, RedisError | OSError | EOFError | ValueError | RecursionError):
            return None
        reason = type(error).__name__
        if isinstance(error, TimeoutError) and not text:
            text = f"no answer within {self.deadline} s"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        # a server says what it likes
        text = text if text.isprintable() else repr(text)
        return StoreUnavailableError(f"the store at {self.place}: {reason}: {text}", name=self.prefix, reason=reason)

    def close(self) -> None:
        """Close what is open: at once what threads used, soon what event loops do. Calls under way may fail."""
        self._is_closed = True
        while self._idle:
            # another thread may take the last one
            with suppress(IndexError):
                self._idle.pop().disconnect()
        for loop, connections in [*self._by_loop.items()]:
            # a loop that is closed by now raises
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(connections.close_soon)

    async def _enter_loop(self) -> _LoopConnections:
        loop = asyncio.get_running_loop()
        connections = self._by_loop.get(loop)
        if connections is None:
            for other in [*self._by_loop]:
                if other.is_closed():
                    self._by_loop.pop(other, None)
            connections = self._by_loop[loop] = _LoopConnections(lambda: self._by_loop.pop(loop, None))
            await anext(connections.lifetime)
        return connections

    def _end_later(self, timeout: asyncio.Timeout) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.deadline

        def end() -> None:
            late = loop.time() - until
            # a loop that was busy has not read what came meanwhile: that is not the store's fault
            timeout.reschedule(loop.time() + (self.deadline if late > _BUSY * self.deadline else 0.0))

        return loop.call_at(until, end)

    async def _ask(
        self, connections: _LoopConnections, script: Script, keys: Sequence[str], arguments: Sequence[Argument]
    ) -> Any:
        from redis.exceptions import NoScriptError

        is_done = False
        connection = connections.idle.pop() if connections.idle else await asyncio.to_thread(self._new_for_loop)
        try:
            reader = connection._reader  # noqa: SLF001 - before 8.0, redis-py has no other way to see that it was closed
            if reader is not None and (reader.at_eof() or reader.exception() is not None):
                await connection.disconnect(nowait=True)
            await connection.send_packed_command([_packed("EVALSHA", script.digest, len(keys), *keys, *arguments)])
            try:
                reply = await connection.read_response()
            except NoScriptError:
                await connection.send_packed_command([_packed("EVAL", script.text, len(keys), *keys, *arguments)])
                reply = await connection.read_response()
            is_done = True
            return reply
        finally:
            # what was cut off, by an error or by cancellation, may have an answer to come: it is not used again
            if is_done and not connections.is_closed:
                connections.idle.append(connection)
            else:
                await connection.disconnect(nowait=True)

    def _new_for_loop(self) -> _AnyConnection:
        """A connection for an event loop, to be made in a thread: redis-py 8.1 reads files for it."""
        import redis.asyncio.connection

        connection = self._new(redis.asyncio.connection, socket_timeout=None)
        if isinstance(connection, redis.asyncio.connection.SSLConnection):
            connection.ssl_context.get()
        return connection

    def _do_blocking(self, command: Sequence[Argument], if_unknown: Sequence[Argument], keys: Sequence[str]) -> Any:
        try:
            return self._ask_blocking(command, if_unknown)
        except Exception as error:
            failure = self.failure(error, keys)
            if failure is None:
                raise
        raise failure

    def _ask_blocking(self, command: Sequence[Argument], if_unknown: Sequence[Argument]) -> Any:
        import redis.connection
        from redis.exceptions import NoScriptError

        until = time.monotonic() + self.deadline
        is_done = False
        try:
            connection = self._idle.pop()
            if _is_stale(connection):
                connection.disconnect()
        except IndexError:
            connection = self._new(redis.connection)

        def log_in(connection: _AnyConnection) -> None:
            _limit(connection, until)
            connection.on_connect()

        try:
            connection.redis_connect_func = log_in
            connection.connect()
            _limit(connection, until)
            connection.send_packed_command([_packed(*command)])
            try:
                reply = connection.read_response()
            except NoScriptError:
                _limit(connection, until)
                connection.send_packed_command([_packed(*if_unknown)])
                reply = connection.read_response()
            is_done = True
            return reply
        finally:
            if is_done and not self._is_closed:
                self._idle.append(connection)
            else:
                connection.disconnect()

    def _new(self, module: Any, **changes: Any) -> _AnyConnection:
        """A connection of one of the two modules of redis-py."""
        if self._is_closed:
            raise module.ConnectionError("closed by this process")
        options = {"connection_class": module.Connection, **module.parse_url(self._url)}
        options |= {"protocol": 2, "socket_connect_timeout": self.deadline, "socket_timeout": self.deadline, **changes}
        return options.pop("connection_class")(**options)


def _packed(*parts: Argument) -> bytes:
    """A command in the server's protocol: redis-py's way takes as long as the rest of the call."""
    texts = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"*%d\r\n%b" % (len(texts), b"".join([b"$%d\r\n%b\r\n" % (len(text), text) for text in texts]))


def _is_stale(connection: _AnyConnection) -> bool:
    """Whether the other side has closed an idle connection, or said what nobody asked."""
    from redis.exceptions import RedisError

    try:
        return bool(connection.can_read(0))
    except (RedisError, OSError):
        return True


def _limit(connection: Any, until: float) -> None:
    """Have a connection wait no longer than the time that is left."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection._sock.settimeout(left)  # noqa: SLF001 - redis-py 8.1 has a timeout for each read, and none for a write
