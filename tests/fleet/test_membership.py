"""Processes that share a store: how many live, what they tell each other, and what becomes of one that loses it."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time

import pytest
import redis
from blockbuster import blockbuster_ctx

from resilience_kit import ConfigurationError, ResilienceSettings, StoreUnavailableError, configure, registry
from resilience_kit.events import StoreLost, StoreRejoined
from resilience_kit.fleet.connection import Script
from resilience_kit.fleet.fleets import current_fleet
from resilience_kit.fleet.membership import Member
from resilience_kit.testing import isolated

BEAT = 0.05
_SCORES = Script("scores", "return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')")
_NOW = Script("now", "local now = redis.call('TIME') return now[1] * 1000 + math.floor(now[2] / 1000)")
_TTL = Script("ttl", "return redis.call('PTTL', KEYS[1])")
_GARBLE = Script("garble", "return redis.call('SET', KEYS[1], 'garbage')")
PROGRAM = """
import sys, time
from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.membership import Member

url, prefix, lease = sys.argv[1:]
member = Member(Connection(url, prefix=prefix, deadline=5), beat=0.05, lease=float(lease))
member.start()
print("started", flush=True)
sys.stdin.read()
member.close()
"""


def eventually(condition, *, seconds=20):
    """Wait until something is so; threads and processes take their time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


@pytest.fixture
def join(connect, store_url):
    """Join the fleet of this test's prefix, as a process would."""
    members = []

    def join(url=store_url, *, beat=BEAT, lease=5, deadline=5):
        members.append(Member(connect(url, deadline=deadline), beat=beat, lease=lease))
        members[-1].start()
        return members[-1]

    yield join
    for member in members:
        member.close()


@pytest.fixture
def processes(store_url, prefix):
    """Start real processes that join the fleet of this test's prefix."""
    started = []

    def start(count, *, lease=1.0):
        new = [
            subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-c", PROGRAM, store_url, prefix, str(lease)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        started.extend(new)
        for process in new:
            assert process.stdout.readline() == "started\n"
        return new

    yield start
    for process in started:
        process.stdin.close()
        process.send_signal(signal.SIGCONT)
        process.wait(10)
        process.stdout.close()


def ears_of(members):
    """How many listen to the members' channel."""
    with redis.Redis.from_url(members[0].connection._url) as client:
        ((_, count),) = client.pubsub_numsub(members[0].channel)
        return count


def names(heard, kind):
    return [event for event in heard if isinstance(event, kind)]


# Counting


def test_a_member_that_is_alone_counts_itself(join):
    member = join()
    assert member.live == 1


def test_a_member_has_an_id_of_16_hexadecimal_digits(join):
    assert len(join().id) == len(bytes.fromhex(join().id)) * 2 == 16


def test_members_count_each_other(join):
    members = [join() for _ in range(3)]
    eventually(lambda: [member.live for member in members] == [3, 3, 3])


def test_one_that_leaves_is_not_counted_any_more(join):
    first, second = join(lease=60), join(lease=60)
    eventually(lambda: first.live == 2)
    second.close()
    eventually(lambda: first.live == 1)


def test_processes_count_each_other(join, processes):
    member = join()
    processes(3)
    eventually(lambda: member.live == 4)


def test_a_process_that_ends_is_not_counted_any_more(join, processes):
    member = join()
    (process,) = processes(1, lease=60)
    eventually(lambda: member.live == 2)
    process.stdin.close()
    eventually(lambda: member.live == 1)


def test_a_process_that_is_killed_is_counted_until_its_lease_ends(join, processes):
    member = join()
    process, *_ = processes(2, lease=1.5)
    eventually(lambda: member.live == 3)
    process.kill()
    process.wait()
    time.sleep(3 * BEAT)
    assert member.live == 3
    eventually(lambda: member.live == 2)


def test_a_process_that_is_stopped_for_longer_than_its_lease_is_counted_again_when_it_goes_on(join, processes):
    member = join()
    (process,) = processes(1, lease=0.5)
    eventually(lambda: member.live == 2)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: member.live == 1)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: member.live == 2)


def test_fleets_with_other_prefixes_are_not_counted(join, connect, prefix):
    other = Member(connect(prefix=f"{prefix}-other", deadline=5), beat=BEAT)
    other.start()
    member = join()
    beats = []
    member.on_beat(lambda: beats.append(member.live))
    eventually(lambda: len(beats) > 2)
    other.close()
    assert set(beats) == {1}


def test_the_count_goes_by_the_clock_of_the_server(join, connection):
    member = join(lease=5)
    eventually(lambda: connection.run_blocking(_SCORES, [connection.key("members")]))
    (_, expiry), now = connection.run_blocking(_SCORES, [connection.key("members")]), connection.run_blocking(_NOW, [])
    assert 0 < int(expiry) - int(now) <= 5_000
    assert member.live == 1


def test_members_that_all_died_leave_nothing_for_ever(join, connection):
    join(lease=5)
    key = connection.key("members")
    eventually(lambda: 0 < connection.run_blocking(_TTL, [key]) <= 10_000)


# News


def test_news_reach_all_others_and_not_the_one_who_tells(join):
    heard = {}
    members = [join() for _ in range(3)]
    for member in members:
        member.on_news("opened", heard.setdefault(member.id, []).append)
    eventually(lambda: ears_of(members) == 3)
    members[0].tell_news("opened", "chat", seconds=1.5)
    eventually(lambda: all(heard[member.id] for member in members[1:]))
    news = {"kind": "opened", "name": "chat", "from": members[0].id, "seconds": 1.5}
    assert [heard[member.id] for member in members] == [[], [news], [news]]


def test_news_of_a_kind_that_nobody_knows_are_ignored(join, caplog):
    first, second, heard = join(), join(), []
    second.on_news("known", heard.append)
    eventually(lambda: ears_of([first, second]) == 2)
    first.tell_news("unknown", "chat")
    first.tell_news("known", "chat")
    eventually(lambda: heard)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff",
        b"garbage",
        b"[1]",
        b'"text"',
        b"{}",
        b'{"kind": 1, "name": "chat", "from": "x"}',
        b'{"kind": "known", "name": null, "from": "x"}',
        b"[" * 4_000,
        b'{"kind": "known", "name": "chat", "from": "x", "long": "' + b"x" * 5_000 + b'"}',
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    ],
    ids=lambda garbage: garbage[:40].decode(errors="replace"),
)
def test_garbage_on_the_channel_is_dropped_and_told_once_without_its_text(join, connection, caplog, garbage):
    member, heard = join(), []
    member.on_news("known", heard.append)
    eventually(lambda: ears_of([member]) == 1)
    for _ in range(3):
        connection._do_blocking(("PUBLISH", member.channel, garbage), (), ())
    connection.publish(member.channel, json.dumps({"kind": "known", "name": "chat", "from": "another"}))
    eventually(lambda: heard)
    assert caplog.messages == [f"what was told on the channel {member.channel!r} is not from this kit, and was dropped"]
    assert len(heard) == 1


def test_one_that_hears_and_raises_keeps_nothing_from_the_others(join, caplog):
    first, second, heard = join(), join(), []

    def refuse(news):
        raise ValueError(news)

    second.on_news("opened", refuse)
    second.on_news("opened", heard.append)
    eventually(lambda: ears_of([first, second]) == 2)
    first.tell_news("opened", "my secret")
    first.tell_news("opened", "my secret")
    eventually(lambda: len(heard) == 2)
    (message,) = caplog.messages
    assert "refuse' raised ValueError in a thread of the fleet" in message
    assert "secret" not in message


def test_one_that_listens_again_after_its_connection_was_cut_is_told_so(join, proxy):
    began = []
    member = join(proxy.url)
    member.on_listening(lambda: began.append(1))
    eventually(lambda: ears_of([member]) == 1)
    before = len(began)
    proxy.cut()
    eventually(lambda: len(began) > before)


def test_what_is_told_is_never_waited_for(join, own_server):
    member = join(own_server.url, deadline=2)
    with own_server.stopped():
        started = time.monotonic()
        for number in range(2_000):
            member.tell(member.channel, str(number))
        assert time.monotonic() - started < 2
        assert member._unsent.qsize() <= 1_000


def test_what_was_told_before_the_end_is_sent(join):
    first, second, heard = join(), join(), []
    second.on_news("opened", heard.append)
    eventually(lambda: ears_of([first, second]) == 2)
    first.tell_news("opened", "chat")
    first.close()
    eventually(lambda: heard)


# Lost and back


def test_a_store_that_is_gone_is_told_once(join, own_server, heard):
    member = join(own_server.url)
    beats = []
    member.on_beat(lambda: beats.append(1))
    eventually(lambda: beats)
    own_server.kill()
    eventually(lambda: member.is_lost)
    for _ in range(3):
        member.lost(StoreUnavailableError("gone", name="x", reason="TimeoutError"))
    time.sleep(5 * BEAT)
    assert names(heard, StoreLost) == [StoreLost(name=member.connection.prefix, error="ConnectionError")]
    assert names(heard, StoreRejoined) == []


def test_a_store_that_is_back_is_told_once(join, own_server, heard):
    member = join(own_server.url)
    eventually(lambda: ears_of([member]) == 1)
    own_server.kill()
    eventually(lambda: member.is_lost)
    own_server.start()
    eventually(lambda: not member.is_lost)
    time.sleep(5 * BEAT)
    (rejoined,) = names(heard, StoreRejoined)
    assert rejoined.name == member.connection.prefix
    assert rejoined.seconds > 0
    assert len(names(heard, StoreLost)) == 1


def test_a_store_that_hangs_is_lost_and_is_back_when_it_goes_on(join, own_server, heard):
    member = join(own_server.url, deadline=0.1)
    eventually(lambda: ears_of([member]) == 1)
    with own_server.stopped():
        eventually(lambda: member.is_lost)
    eventually(lambda: not member.is_lost)
    assert names(heard, StoreLost)[0].error == "TimeoutError"


def test_a_store_may_be_gone_from_the_start(join, own_server, heard):
    own_server.kill()
    member = join(own_server.url)
    eventually(lambda: member.is_lost)
    assert member.live == 1
    own_server.start()
    eventually(lambda: not member.is_lost)


def test_whoever_sees_first_that_the_store_is_gone_tells_it(join, heard):
    member = join(beat=60)
    eventually(lambda: ears_of([member]) == 1)
    member.lost(StoreUnavailableError("gone", name="x", reason="OutOfMemoryError"))
    assert (member.is_lost, names(heard, StoreLost)[0].error) == (True, "OutOfMemoryError")


def test_the_count_of_before_is_kept_while_the_store_is_gone(join, own_server):
    first, second = join(own_server.url), join(own_server.url)
    eventually(lambda: first.live == second.live == 2)
    own_server.kill()
    eventually(lambda: first.is_lost)
    assert first.live == 2


def test_those_who_wait_for_the_store_are_called_before_others_ask_it_again(join, own_server):
    member, seen = join(own_server.url), []
    member.on_rejoin(lambda: seen.append(member.is_lost))
    eventually(lambda: ears_of([member]) == 1)
    own_server.restart()
    member.lost(StoreUnavailableError("gone", name="x", reason="TimeoutError"))
    eventually(lambda: seen and not member.is_lost)
    # twice where a sign of life failed while the server was started anew
    assert set(seen) == {True}


def test_those_who_have_to_do_without_the_store_are_told_when_it_is_lost(join, own_server):
    member, seen = join(own_server.url), []
    member.on_lost(lambda: seen.append(member.is_lost))
    own_server.kill()
    eventually(lambda: seen)
    assert seen == [True]


def test_nothing_is_called_at_a_beat_while_the_store_is_gone(join, own_server):
    member, beats = join(own_server.url), []
    member.on_beat(lambda: beats.append(member.is_lost))
    eventually(lambda: beats)
    own_server.kill()
    eventually(lambda: member.is_lost)
    before = len(beats)
    time.sleep(4 * BEAT)
    assert len(beats) - before <= 1
    assert True not in beats


def test_one_that_finds_the_store_gone_at_a_beat_need_not_say_so(join, heard):
    def fail():
        raise StoreUnavailableError("gone", name="x", reason="TimeoutError")

    member = join()
    end = member.on_beat(fail)
    eventually(lambda: names(heard, StoreLost))
    end()
    end()
    eventually(lambda: not member.is_lost)


def test_one_that_raises_at_a_beat_does_not_end_the_beats(join, caplog):
    def fail():
        raise ZeroDivisionError

    member, beats = join(), []
    member.on_beat(fail)
    member.on_beat(lambda: beats.append(1))
    eventually(lambda: len(beats) > 3)
    assert len(caplog.messages) == 1


def test_garbage_where_the_members_are_is_told_once_with_the_key(join, connection, caplog):
    key = connection.key("members")
    connection.run_blocking(_GARBLE, [key])
    beats = threading.Event()
    member = join()
    member.on_beat(beats.set)
    eventually(lambda: caplog.messages)
    time.sleep(4 * BEAT)
    (message,) = caplog.messages
    assert key in message
    assert (member.is_lost, member.live) == (False, 1)


# Ends


def fleet_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("resilience-kit-")]


def test_closing_ends_both_threads(join):
    member = join()
    eventually(lambda: ears_of([member]) == 1)
    assert len(fleet_threads()) == 2
    member.close()
    assert fleet_threads() == []


def test_closing_twice_or_unstarted_does_nothing(join, connect):
    member = join()
    member.close()
    member.close()
    member.start()
    Member(connect()).close()
    assert fleet_threads() == []


def test_closing_is_not_held_up_by_a_store_that_hangs(join, own_server):
    member = join(own_server.url, deadline=0.2)
    eventually(lambda: ears_of([member]) == 1)
    with own_server.stopped():
        member.close()
        assert fleet_threads() == []


def test_closing_in_an_event_loop_does_not_block_it(join):
    member = join()
    eventually(lambda: ears_of([member]) == 1)

    async def close():
        with blockbuster_ctx():
            member.close()

    asyncio.run(close())
    eventually(lambda: fleet_threads() == [])


def test_a_program_ends_though_its_store_hangs(own_server, tmp_path):
    program = f"""
from resilience_kit import configure
from resilience_kit.fleet.connection import Script
from resilience_kit.fleet.fleets import current_fleet
configure(store={own_server.url!r})
current_fleet()
input()
"""
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(0.5)
        with own_server.stopped():
            _, said = process.communicate("\n", timeout=20)
    assert (process.returncode, said) == (0, "")


# The fleet of the settings


@pytest.fixture
def fleet(store_url, prefix, monkeypatch):
    """The fleet by the environment, as a program would have it."""
    monkeypatch.setenv("RESILIENCE_STORE", store_url)
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", prefix)
    monkeypatch.setenv("RESILIENCE_STORE_DEADLINE_SECONDS", "5")
    return current_fleet()


def test_without_a_store_there_is_no_fleet_and_no_thread():
    assert (current_fleet(), fleet_threads()) == (None, [])


def test_the_fleet_is_that_of_the_settings(fleet, prefix):
    assert (fleet.connection.prefix, fleet.connection.deadline) == (prefix, 5)


def test_a_process_has_one_fleet(fleet):
    assert current_fleet() is fleet
    assert len(fleet_threads()) == 2


def test_threads_that_ask_at_once_get_one_fleet(store_url, prefix, restless_threads):
    configure(store=store_url)
    fleets = []
    threads = [threading.Thread(target=lambda: fleets.append(current_fleet())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(fleet) for fleet in fleets}) == 1
    assert len(fleet_threads()) == 2


def test_other_settings_are_another_fleet(fleet, store_url, prefix):
    configure(ResilienceSettings(resilience_store_prefix=f"{prefix}-other"), store=store_url)
    assert current_fleet() is not fleet


def test_a_test_in_isolation_has_a_fleet_of_its_own_which_ends_with_it(fleet, store_url):
    with isolated():
        configure(store=store_url)
        own = current_fleet()
        assert own is not fleet
    assert len(fleet_threads()) == 2
    assert current_fleet() is fleet
    assert "closed" in repr(own.member)


async def test_a_fleet_may_be_joined_and_left_in_an_event_loop(store_url, prefix):
    with isolated():
        configure(store=store_url)
        with blockbuster_ctx():
            assert current_fleet().member.live == 1
            registry.mode.fleets.popitem()[1].close()


def test_a_fork_has_a_fleet_of_its_own_and_leaves_its_parents_alone(store_url, prefix):
    program = f"""
import os, time
from resilience_kit import configure, ResilienceSettings
from resilience_kit.fleet.connection import Script
from resilience_kit.fleet.connection import Script
from resilience_kit.fleet.fleets import current_fleet

settings = ResilienceSettings(resilience_store_prefix={prefix!r}, resilience_store_deadline_seconds=5)
configure(settings, store={store_url!r})
parent = current_fleet()
while parent.member.live != 1 or not parent.connection._idle:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    own = current_fleet()
    assert own is not parent and own.member.id != parent.member.id
    while own.member.live != 2:
        time.sleep(0.01)
    own.close()
    os._exit(0)
print(os.waitpid(child, 0)[1])
assert not parent.member.is_lost
print(parent.connection.run_blocking(Script("one", "return 1"), []))
"""
    # from 3.12 on, Python warns of any fork while there are threads
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - our own program
    assert (finished.stdout, finished.stderr) == ("0\n1\n", "")


def test_no_text_of_the_process_shows_the_password(own_server, caplog, heard):
    caplog.set_level(logging.DEBUG)
    configure(store=f"redis://alice-4242:s3cr3t-4242@127.0.0.1:{own_server.port}")
    fleet = current_fleet()
    eventually(lambda: fleet.member.is_lost)
    shown = repr([fleet, registry.mode, heard]) + caplog.text + repr([vars(record) for record in caplog.records])
    assert names(heard, StoreLost)
    assert ("4242" in shown) is False


def test_without_the_client_the_first_use_says_what_to_install(monkeypatch):
    for module in ("redis", "redis.connection", "redis.asyncio.connection"):
        monkeypatch.setitem(sys.modules, module, None)
    configure(store="redis://localhost")
    with pytest.raises(ConfigurationError, match="pip install"):
        current_fleet()
