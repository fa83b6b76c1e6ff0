import asyncio

from resilience_kit.fleet.connection import Script
from resilience_kit.waiting import TaskWaiting

ECHO = Script("echo", "return {KEYS[1], ARGV[1]}")


async def test_a_script_runs_from_a_task(connection):
    assert await connection.run(TaskWaiting(), ECHO, ["k"], [1.5]) == [b"k", b"1.5"]


def test_a_script_runs_from_a_thread(connection):
    assert connection.run_blocking(ECHO, ["k"], [1.5]) == [b"k", b"1.5"]


def test_proxy(connect, proxy, own_server):
    c = connect(proxy.url, deadline=5)
    assert c.run_blocking(ECHO, ["k"], [1.5]) == [b"k", b"1.5"]
    assert asyncio.run(c.run(TaskWaiting(), ECHO, ["k"], [1.5])) == [b"k", b"1.5"]
    proxy.cut()
    assert c.run_blocking(ECHO, ["k"], [1.5]) == [b"k", b"1.5"]
    own_server.restart()
    assert c.run_blocking(ECHO, ["k"], [1.5]) == [b"k", b"1.5"]
