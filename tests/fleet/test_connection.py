"""The way to the store, on a real server that is slow, gone, full, flushed or full of what is not ours."""

import asyncio
import gc
import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from blockbuster import blockbuster_ctx

from resilience_kit import ConfigurationError, StoreContentError, StoreUnavailableError
from resilience_kit.fleet.connection import Connection, Script
from resilience_kit.waiting import TaskWaiting, ThreadWaiting

ECHO = Script("echo", "return {KEYS[1], ARGV[1]}")
COUNT = Script("count", "return redis.call('INCR', KEYS[1])")
PUSH = Script("push", "return redis.call('LPUSH', KEYS[1], 1)")
FILL = Script("fill", "return redis.call('SET', KEYS[1], string.rep('x', 100000))")
COMPLAIN = Script("complain", "return redis.error_reply('RESILIENCE_CONTENT ' .. KEYS[2])")
COMPARE = Script("compare", "return tonumber(redis.call('GET', KEYS[1])) < 3")
ENDLESS = Script("endless", "while true do end")
SECRET = "s3cr3t-4242"  # noqa: S105 - what must not leak is what some of these tests are about
USER = "alice-4242"


def ask_in_a_task(connection, *call):
    return asyncio.run(connection.run(TaskWaiting(), *call))


def ask_in_a_thread(connection, *call):
    return connection.run_blocking(*call)


either_way = pytest.mark.parametrize("ask", [ask_in_a_task, ask_in_a_thread], ids=["task", "thread"])


@pytest.fixture
def key(connection):
    return connection.key("limit:chat", "quota")


# Asking


@either_way
def test_a_script_is_given_keys_and_arguments_and_its_answer_comes_back(connection, key, ask):
    assert ask(connection, ECHO, [key], ["é {} \r\n"]) == [key.encode(), "é {} \r\n".encode()]


@either_way
@pytest.mark.parametrize(
    ("argument", "arrived"), [(7, b"7"), (0.1, b"0.1"), (1e-7, b"1e-07"), (b"\0\xff", b"\0\xff"), ("", b"")]
)
def test_an_argument_arrives_as_it_is_written(connection, key, ask, argument, arrived):
    assert ask(connection, ECHO, [key], [argument])[1] == arrived


def test_a_sync_function_asks_without_an_event_loop(connection, key):
    asking = connection.run(ThreadWaiting(), ECHO, [key], ["1"])
    with pytest.raises(StopIteration) as ended:
        asking.send(None)
    assert ended.value.value == [key.encode(), b"1"]


async def test_tasks_at_once_get_each_its_own_answer(connection, key):
    answers = await asyncio.gather(*(connection.run(TaskWaiting(), ECHO, [key], [it]) for it in range(100)))
    assert [int(answer[1]) for answer in answers] == list(range(100))


async def test_tasks_at_once_open_no_more_connections_than_a_server_bears(connect, key, own_server):
    connection = connect(own_server.url, deadline=5)
    await asyncio.gather(*(connection.run(TaskWaiting(), ECHO, [key], [it]) for it in range(200)))
    with own_server.client() as client:
        assert len(client.client_list()) <= 32 + 1


def test_threads_at_once_get_each_its_own_answer(connection, key, restless_threads):
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda it: connection.run_blocking(ECHO, [key], [it]), range(200))
        assert [int(answer[1]) for answer in answers] == list(range(200))


def test_event_loops_one_after_another_may_use_one_connection(connection, key):
    assert [ask_in_a_task(connection, COUNT, [key]) for _ in range(3)] == [1, 2, 3]


def test_event_loops_at_once_may_use_one_connection(connection, key):
    async def count():
        return [await connection.run(TaskWaiting(), COUNT, [key]) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(lambda _: asyncio.run(count()), range(4)))
    assert sorted(itertools.chain(*counts)) == list(range(1, 81))


async def test_nothing_blocks_the_event_loop_not_even_at_first(connection, key):
    with blockbuster_ctx():
        assert await connection.run(TaskWaiting(), ECHO, [key], ["1"])


def test_a_first_call_in_an_event_loop_imports_the_client_elsewhere(store_url):
    program = f"""
import asyncio, sys, threading
from resilience_kit.fleet.connection import Connection, Script
from resilience_kit.waiting import TaskWaiting

class Watch:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "redis":
            assert threading.current_thread() is not threading.main_thread()

async def main():
    connection = Connection({store_url!r}, deadline=5)
    sys.meta_path.insert(0, Watch())
    print(await connection.run(TaskWaiting(), Script("one", "return 1"), []))

assert "redis.asyncio" not in sys.modules
asyncio.run(main())
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    assert (finished.stdout, finished.stderr) == ("1\n", "")


# Keys


def test_a_key_has_the_prefix_the_name_and_the_part(connection, prefix):
    assert connection.key("limit:chat", "quota") == f"{prefix}:{{limit:chat}}:quota"


@pytest.mark.parametrize("name", ["", "a}b", "}", "{", "{}", "%7D", "a b\n", "Übersetzer", "\0", "\ud800"])
@either_way
def test_a_name_may_hold_any_character(connection, ask, name):
    assert ask(connection, COUNT, [connection.key(name, "quota")]) == 1


def test_names_that_differ_have_keys_that_differ(connection):
    names = ["a", "a}", "a{", "a%7D", "a}:b", "a:b", "a}:{b", "a\n", "a\r", "a%0A"]
    keys = {connection.key(name, *parts) for name in names for parts in [(), ("b",), ("b", "c")]}
    assert len(keys) == 3 * len(names)


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", "\n"])
@either_way
def test_an_error_names_the_whole_key_of_a_name_with_line_breaks(connection, ask, name):
    key = connection.key(name, "quota")
    with pytest.raises(StoreContentError) as caught:
        ask(connection, COMPLAIN, ["first", key])
    assert (caught.value.key, "\n" in str(caught.value)) == (key, False)


@pytest.mark.parametrize("name", ["a", "}", "{}", "a}b{c", "{"])
def test_all_keys_of_a_name_are_in_one_slot_of_a_cluster(connection, name):
    def hashed(key):
        inside = key.partition("{")[2].partition("}")[0]
        return inside or key

    assert hashed(connection.key(name, "quota")) == hashed(connection.key(name, "slots"))


# Time


@either_way
def test_a_server_that_says_nothing_is_unavailable_after_the_deadline(connect, own_server, ask):
    connection = connect(own_server.url)
    with own_server.stopped(), pytest.raises(StoreUnavailableError) as caught:
        ask(connection, ECHO, ["key"], ["1"])
    assert caught.value.reason == "TimeoutError"


def test_the_deadline_counts_for_a_connection_that_is_open(connect, own_server):
    connection = connect(own_server.url, deadline=0.5)

    async def ask():
        await connection.run(TaskWaiting(), ECHO, ["key"], ["1"])
        with own_server.stopped(), pytest.raises(StoreUnavailableError, match=r"no answer within 0\.5 s"):
            await connection.run(TaskWaiting(), ECHO, ["key"], ["1"])

    asyncio.run(ask())


async def test_an_answer_that_came_while_the_event_loop_was_busy_is_no_failure_of_the_store(connect, own_server):
    connection = connect(own_server.url, deadline=5)
    await connection.run(TaskWaiting(), ECHO, ["key"], ["1"])
    connection.deadline = 0.2
    asking = asyncio.create_task(connection.run(TaskWaiting(), ECHO, ["key"], ["2"]))
    for _ in range(3):
        await asyncio.sleep(0)
    time.sleep(0.4)  # noqa: ASYNC251 - a loop that is busy is what this is about
    assert await asking == [b"key", b"2"]


@either_way
def test_the_deadline_counts_for_all_of_a_call_and_not_for_each_of_its_steps(connect, proxy, ask, own_server):
    with own_server.client() as client:
        client.config_set("requirepass", SECRET)
    # to log in, to ask, to ask with the script's text: three times there and back
    proxy.delay = 0.2
    connection = connect(f"redis://:{SECRET}@127.0.0.1:{proxy.port}", deadline=0.9)
    with pytest.raises(StoreUnavailableError) as caught:
        ask(connection, ECHO, ["key"], ["1"])
    assert caught.value.reason == "TimeoutError"


@either_way
def test_a_server_that_takes_a_connection_and_hangs_is_unavailable(connect, proxy, ask):
    proxy.is_silent = True
    with pytest.raises(StoreUnavailableError):
        ask(connect(proxy.url), ECHO, ["key"], ["1"])


@either_way
def test_a_call_after_one_that_was_given_up_gets_its_own_answer(connect, own_server, ask):
    connection = connect(own_server.url, deadline=0.5)
    assert ask(connection, ECHO, ["key"], ["first"])
    with own_server.stopped(), pytest.raises(StoreUnavailableError):
        ask(connection, ECHO, ["key"], ["second"])
    connection.deadline = 5
    assert ask(connection, ECHO, ["key"], ["third"])[1] == b"third"


# Failures


@either_way
def test_a_server_that_is_not_there_is_unavailable(connect, own_server, ask):
    own_server.kill()
    with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{own_server.port}: ConnectionError") as caught:
        ask(connect(own_server.url, deadline=5), ECHO, ["key"], ["1"])
    assert (caught.value.name, caught.value.reason) == (connect().prefix, "ConnectionError")


def test_a_command_whose_answer_is_cut_off_is_not_sent_again_by_a_thread(connect, proxy, own_server):
    connection = connect(proxy.url, deadline=5)
    connection.run_blocking(COUNT, ["key"])
    proxy.cuts_answers = True
    with pytest.raises(StoreUnavailableError):
        connection.run_blocking(COUNT, ["key"])
    proxy.cuts_answers = False
    assert connection.run_blocking(COUNT, ["key"]) == 3


async def test_a_command_whose_answer_is_cut_off_is_not_sent_again_by_a_task(connect, proxy, own_server):
    connection = connect(proxy.url, deadline=5)
    await connection.run(TaskWaiting(), COUNT, ["key"])
    proxy.cuts_answers = True
    with pytest.raises(StoreUnavailableError):
        await connection.run(TaskWaiting(), COUNT, ["key"])
    proxy.cuts_answers = False
    assert await connection.run(TaskWaiting(), COUNT, ["key"]) == 3


def test_connections_that_were_closed_while_idle_are_opened_again_unnoticed(connect, proxy):
    connection = connect(proxy.url, deadline=5)

    async def ask_twice():
        await asyncio.gather(*(connection.run(TaskWaiting(), COUNT, ["key"]) for _ in range(3)))
        await asyncio.to_thread(proxy.cut)
        await asyncio.sleep(0.05)
        return [await connection.run(TaskWaiting(), COUNT, ["key"]) for _ in range(3)]

    assert asyncio.run(ask_twice()) == [4, 5, 6]
    connection.run_blocking(COUNT, ["key"])
    proxy.cut()
    assert connection.run_blocking(COUNT, ["key"]) == 8


@either_way
def test_a_server_that_was_killed_and_is_back_is_used_again(connect, own_server, ask):
    connection = connect(own_server.url, deadline=5)
    ask(connection, COUNT, ["key"])
    own_server.restart()
    assert ask(connection, COUNT, ["key"]) == 1


@either_way
def test_a_server_that_has_forgotten_all_scripts_learns_them_again(connect, own_server, ask):
    connection = connect(own_server.url, deadline=5)
    ask(connection, COUNT, ["key"])
    with own_server.client() as client:
        client.script_flush()
        assert ask(connection, COUNT, ["key"]) == 2
        assert client.script_exists(COUNT.digest) == [True]


@either_way
def test_a_server_that_is_full_is_unavailable(connect, start_server, ask):
    connection = connect(start_server(maxmemory="1mb", **{"maxmemory-policy": "noeviction"}).url, deadline=5)
    with pytest.raises(StoreUnavailableError) as caught:
        [ask(connection, FILL, [str(number)]) for number in range(100)]
    assert caught.value.reason == "OutOfMemoryError"


@either_way
def test_a_replica_that_takes_no_writes_is_unavailable(connect, own_server, start_server, ask):
    replica = start_server(replicaof=f"127.0.0.1 {own_server.port}")
    with pytest.raises(StoreUnavailableError) as caught:
        ask(connect(replica.url, deadline=5), COUNT, ["key"])
    assert caught.value.reason == "ReadOnlyError"


def test_a_server_that_is_busy_with_a_script_is_unavailable(connect, start_server):
    server = start_server(**{"busy-reply-threshold": 50})
    with pytest.raises(StoreUnavailableError):
        connect(server.url).run_blocking(ENDLESS, [])
    with pytest.raises(StoreUnavailableError, match="BUSY"):
        connect(server.url, deadline=5).run_blocking(COUNT, ["key"])


@either_way
def test_a_server_that_speaks_another_language_is_unavailable(connect, ask):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(StoreUnavailableError):
                ask(connect(f"redis://127.0.0.1:{server.server_address[1]}"), ECHO, ["key"], ["1"])
        finally:
            server.shutdown()
            thread.join()


@either_way
def test_a_closed_connection_is_unavailable(connection, key, ask):
    ask(connection, ECHO, [key], ["1"])
    connection.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        ask(connection, ECHO, [key], ["1"])


# Content


@either_way
@pytest.mark.parametrize("script", [PUSH, COMPARE], ids=["wrong type", "fails in the script"])
def test_garbage_under_a_key_is_an_error_that_names_it(connection, key, ask, script):
    ask(connection, Script("garble", "redis.call('SET', KEYS[1], 'garbage')"), [key])
    with pytest.raises(StoreContentError) as caught:
        ask(connection, script, [key])
    assert caught.value.key == key
    assert key in str(caught.value)


@either_way
def test_a_script_that_finds_garbage_says_under_which_key(connection, key, ask):
    other = connection.key("limit:a b", "slots")
    with pytest.raises(StoreContentError) as caught:
        ask(connection, COMPLAIN, [key, other])
    assert caught.value.key == other


def test_garbage_is_not_shown(connection, key):
    connection.run_blocking(Script("garble", f"redis.call('SET', KEYS[1], '{SECRET}')"), [key])
    with pytest.raises(StoreContentError) as caught:
        connection.run_blocking(COMPARE, [key])
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# Cancellation and ends


async def test_a_call_that_is_cancelled_leaves_no_answer_to_the_next_one(connect, own_server):
    connection = connect(own_server.url, deadline=5)
    await connection.run(TaskWaiting(), ECHO, ["key"], ["first"])
    with own_server.stopped():
        call = asyncio.create_task(connection.run(TaskWaiting(), ECHO, ["key"], ["cancelled"]))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert (await connection.run(TaskWaiting(), ECHO, ["key"], ["next"]))[1] == b"next"


async def test_a_call_that_is_cancelled_while_it_connects_leaves_nothing(connect, proxy):
    proxy.is_silent = True
    connection = connect(f"redis://:{SECRET}@127.0.0.1:{proxy.port}", deadline=5)
    call = asyncio.create_task(connection.run(TaskWaiting(), ECHO, ["key"], ["cancelled"]))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_calls_that_are_cancelled_give_back_their_connections(connect, own_server):
    connection = connect(own_server.url, deadline=5)
    with own_server.stopped():
        calls = [asyncio.create_task(connection.run(TaskWaiting(), ECHO, ["key"], ["1"])) for _ in range(100)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert (await connection.run(TaskWaiting(), ECHO, ["key"], ["next"]))[1] == b"next"


def open_sockets():
    return {id(it) for it in gc.get_objects() if isinstance(it, socket.socket) and it.fileno() != -1}


def test_an_event_loop_that_ends_leaves_no_socket(connection, key):
    before = open_sockets()

    async def ask():
        await asyncio.gather(*(connection.run(TaskWaiting(), ECHO, [key], [it]) for it in range(5)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(ask())
        gc.collect()
    assert (open_sockets() - before, caught) == (set(), [])


def test_closing_in_an_event_loop_leaves_no_socket(connection, key):
    before = open_sockets()

    async def ask_and_close():
        await asyncio.gather(*(connection.run(TaskWaiting(), ECHO, [key], [it]) for it in range(5)))
        connection.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(ask_and_close())
        gc.collect()
    assert (open_sockets() - before, caught) == (set(), [])


async def test_closing_from_a_thread_closes_what_an_event_loop_has_open(connection, key):
    before = open_sockets()
    await connection.run(TaskWaiting(), ECHO, [key], ["1"])
    assert open_sockets() - before
    await asyncio.to_thread(connection.close)
    await asyncio.sleep(0.05)
    assert open_sockets() - before == set()


def test_closing_leaves_no_socket_of_a_thread(connection, key):
    before = open_sockets()
    connection.run_blocking(ECHO, [key], ["1"])
    assert open_sockets() - before
    connection.close()
    assert open_sockets() - before == set()


# Secrets


@pytest.fixture
def guarded(own_server):
    """A server that wants a password, and knows a user who may do next to nothing."""
    with own_server.client() as client:
        client.execute_command("ACL", "SETUSER", USER, "on", f">{SECRET}", "~*", "+ping", "+client")
        client.config_set("requirepass", f"{SECRET}-of-all")
    return own_server


def all_texts_of(error):
    """All that a person or a tool may get to see of an error."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        frames = [frame for frame in shown.stack if "tests" not in frame.filename and "/asyncio/" not in frame.filename]
        found += [
            str(error),
            repr(error),
            repr(error.args),
            repr(vars(error)),
            repr([frame.locals for frame in frames]),
        ]
        error = error.__cause__ or error.__context__
    return "\n".join(found)


@either_way
@pytest.mark.parametrize(
    "login",
    [f":{SECRET}", f"{USER}:{SECRET}", f"{USER}:{SECRET}-wrong", f"{USER}:{SECRET}%2Fwrong"],
    ids=["wrong password", "no permission", "wrong password of a user", "quoted"],
)
def test_no_error_shows_the_user_or_the_password(connect, guarded, ask, login, caplog):
    caplog.set_level(logging.DEBUG)
    connection = connect(f"redis://{login}@127.0.0.1:{guarded.port}", deadline=5)
    with pytest.raises(StoreUnavailableError) as caught:
        ask(connection, COUNT, ["key"])
    shown = all_texts_of(caught.value) + caplog.text + repr(connection)
    assert (SECRET in shown, USER in shown) == (False, False)
    assert caught.value.reason in {"AuthenticationError", "NoPermissionError"}


@either_way
def test_the_password_is_used(connect, guarded, ask):
    connection = connect(f"redis://:{SECRET}-of-all@127.0.0.1:{guarded.port}", deadline=5)
    assert ask(connection, COUNT, ["key"]) == 1


@pytest.mark.parametrize("url", ["redis://h/1?retry_on_timeout=1", "http://h", "redis://", "nothing"])
def test_a_url_that_cannot_be_used_is_told_at_once(url):
    with pytest.raises(ConfigurationError):
        Connection(url)


def test_without_the_client_it_is_said_what_to_install(monkeypatch):
    for module in ("redis", "redis.connection", "redis.asyncio.connection"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'resilience-kit\[fleet\]'"):
        Connection("redis://localhost")


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("@user_script:1: RESILIENCE_CONTENT key", StoreContentError),
        ("@user_script:1: WRONGTYPE Operation against a key holding the wrong kind of value", StoreContentError),
        ("@user_script:387: @user_script: 387: -OOM command not allowed", StoreUnavailableError),
    ],
)
def test_what_redis_6_says_of_an_error_in_a_script_is_understood(connection, said, kind):
    error = redis.exceptions.ResponseError(f"Error running script (call to f_c918bfba5cf1e6b4): {said}")
    assert type(connection.failure(error, ["key"])) is kind
