"""A circuit over a fleet: what opens or closes it in one process does so in all, and trials are limited over all."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

import resilience_kit
from resilience_kit import (
    CircuitOpenError,
    ResilienceSettings,
    circuit_protected,
    configure,
    get_all_resilience_stats,
    reset_circuit_breakers,
)
from resilience_kit.events import CircuitClosed, CircuitOpened
from resilience_kit.fleet.connection import Script, packaged_script
from resilience_kit.fleet.fleets import current_fleet

# A process that does what it is told, line by line: one circuit, and calls that end as they are told.
PROGRAM = """
import json, sys, threading, time

import resilience_kit
from resilience_kit import CircuitOpenError, circuit_protected, events
from resilience_kit.circuits import circuits
from resilience_kit.fleet import fleet_circuits

options = json.loads(sys.argv[1])
fleet_circuits._LEASE = options.pop("lease")
fleet_circuits._LOOK = options.pop("look")
name = options.pop("name")
heard = []


@events.subscribe
def hear(event):
    heard.append([type(event).__name__, getattr(event, "error", getattr(event, "reason", ""))])


entered, leave, ended = threading.Event(), threading.Event(), threading.Event()
outcomes = {"succeed": None, "fail": ConnectionError(), "neither": ValueError()}


@circuit_protected(name, **options)
def call(work):
    work()


def end_as(outcome):
    if outcomes[outcome] is not None:
        raise outcomes[outcome]


def attempt(work):
    try:
        call(work)
    except CircuitOpenError as error:
        return error.retry_after
    except (ConnectionError, ValueError):
        pass
    return "sent"


def begin():
    entered.clear(), leave.clear(), ended.clear()
    result = []

    def work():
        entered.set()
        leave.wait()
        end_as(result.pop())

    def run():
        answer = attempt(work)
        if answer != "sent":
            result.append(answer)
            entered.set()
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    entered.wait()
    begin.result = result
    return result[0] if result else "sent"


def end(outcome):
    begin.result.append(outcome)
    leave.set()
    ended.wait()
    return "ended"


def hammer(seconds):
    spans = []
    until = time.monotonic() + seconds

    def work():
        began = time.monotonic()
        time.sleep(0.01)
        spans.append([began, time.monotonic()])
        raise ValueError

    def run():
        while time.monotonic() < until:
            if attempt(work) != "sent":
                time.sleep(0.002)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spans


def state():
    circuit = circuits.items().get(name)
    return "unused" if circuit is None else circuit.statistics().state


commands = {
    "call": lambda outcome: attempt(lambda: end_as(outcome)),
    "begin": begin,
    "end": end,
    "hammer": hammer,
    "state": state,
    "reset": lambda: resilience_kit.reset_circuit_breakers(name),
    "heard": lambda: heard,
}
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    command, *arguments = json.loads(line)
    print(json.dumps(commands[command](*arguments)), flush=True)
"""


def eventually(condition, *, seconds=30):
    """Wait until something is so; threads and processes take their time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


class Process:
    """A process of the fleet that does one thing at a time, as it is told."""

    def __init__(self, url, prefix, *, deadline, **options):
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", PROGRAM, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                # the same kit as here
                "PYTHONPATH": str(Path(resilience_kit.__file__).parents[1]),
                "RESILIENCE_STORE": url,
                "RESILIENCE_STORE_PREFIX": prefix,
                "RESILIENCE_STORE_DEADLINE_SECONDS": str(deadline),
            },
        )

    def hear(self):
        return json.loads(self._process.stdout.readline())

    def begin(self, command, *arguments):
        """Give a command, and do not wait for what it returns."""
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()

    def do(self, command, *arguments):
        self.begin(command, *arguments)
        return self.hear()

    @property
    def state(self):
        return self.do("state")

    def signal(self, number):
        self._process.send_signal(number)

    def open(self):
        """Use the circuit, and fail."""
        assert self.do("call", "fail") == "sent"
        assert self.state == "OPEN"

    def end(self):
        self._process.stdin.close()

    def close(self):
        self.signal(signal.SIGCONT)
        self.end()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture
def processes(store_url, prefix):
    """Start processes that share the circuit of this test's prefix, and have used it once."""
    started = []

    def start(count, *, url=store_url, deadline=5, lease=5, look=(1_000, 1_000), name="chat", **options):
        options = {"look": look, "failure_threshold": 1, "recovery_timeout": 60, "success_threshold": 1, **options}
        new = [Process(url, prefix, deadline=deadline, lease=lease, name=name, **options) for _ in range(count)]
        started.extend(new)
        for process in new:
            assert process.hear() == "ready"
        return new

    yield start
    for process in started:
        process.close()


def in_use(processes):
    """Have each use its circuit once, and know the fleet's."""
    for process in processes:
        assert process.do("call", "succeed") == "sent"
    return processes


def gets_through(process, command="call", *arguments):
    """Try until a call is sent."""
    eventually(lambda: process.do(command, *arguments) == "sent")


@pytest.fixture
def key(connection):
    return lambda part, name="chat": connection.key(f"circuit:{name}", part)


@pytest.fixture
def client(store_url):
    with redis.Redis.from_url(store_url) as client:
        yield client


# Told


@pytest.mark.parametrize("name", ["chat", "a b:{c}\n%s\x00 ü\ud800", "n" * 5_000], ids=["plain", "odd", "long"])
def test_a_circuit_that_opens_in_one_process_opens_in_all(processes, name):
    one, *others = in_use(processes(3, name=name))
    one.open()
    for other in others:
        eventually(lambda other=other: other.state == "OPEN")


def test_a_told_process_refuses_for_as_long_as_the_first(processes):
    one, other = in_use(processes(2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    left = one.do("call", "succeed")
    assert left - 5 < other.do("call", "succeed") <= left + 0.5


def test_a_told_process_says_where_its_circuit_was_opened(processes):
    one, other = in_use(processes(2))
    one.open()
    eventually(lambda: ["CircuitOpened", "ConnectionError in another process"] in other.do("heard"))


def test_a_told_process_does_not_tell_again(processes, client, prefix):
    with client.pubsub() as ear:
        ear.subscribe(f"{prefix}:news")
        all_three = in_use(processes(3))
        all_three[0].open()
        for process in all_three:
            eventually(lambda process=process: process.state == "OPEN")
        time.sleep(1.5)
        all_three[0].do("reset")
        for process in all_three:
            eventually(lambda process=process: process.state == "CLOSED")
        time.sleep(1.5)
        told = []
        while message := ear.get_message(timeout=0.1):
            told.append(message)
    assert len([message for message in told if message["type"] == "message"]) == 2


def test_a_process_that_starts_late_finds_the_circuit_open_for_the_time_that_is_left(processes):
    (one,) = in_use(processes(1))
    one.open()
    time.sleep(1)
    (late,) = in_use(processes(1))
    eventually(lambda: late.state == "OPEN")
    left = one.do("call", "succeed")
    assert left - 5 < late.do("call", "succeed") <= left + 0.5


def test_a_circuit_that_opens_before_its_process_knows_the_fleets_is_told_too(processes, own_server):
    (one,) = in_use(processes(1, url=own_server.url, deadline=60))
    one.open()
    one.do("reset")
    with own_server.client() as client:
        eventually(lambda: b"reset" in [client.hget(key, "state") for key in client.scan_iter(match="*:state")])
    (late,) = processes(1, url=own_server.url, deadline=60)
    with own_server.stopped():
        late.open()
    eventually(lambda: one.state == "OPEN")


def test_a_process_that_missed_the_news_looks_again_by_itself(processes, connection, key):
    sent(connection, key, known=0, move="open")
    (one,) = in_use(processes(1, look=(0.2, 0.5)))
    eventually(lambda: one.state == "OPEN")
    # not heard by anybody
    version, *_ = sent(connection, key, known=0, move="reset")
    eventually(lambda: one.state == "CLOSED")
    sent(connection, key, known=version, move="open")
    eventually(lambda: one.state == "OPEN")


# Closed by hand


def test_a_reset_in_one_process_closes_the_circuit_in_all(processes):
    one, other = in_use(processes(2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    other.do("reset")
    eventually(lambda: one.state == "CLOSED")
    assert ["CircuitClosed", "reset in another process"] in one.do("heard")


def test_a_reset_in_a_process_whose_circuit_is_closed_is_told_too(processes, connection, client, key):
    (one,) = in_use(processes(1))
    # not heard by anybody
    sent(connection, key, known=0, move="open")
    one.do("reset")
    eventually(lambda: client.hget(key("state"), "state") == b"reset")


def test_a_reset_in_a_process_that_has_not_used_the_circuit_closes_it_in_all(processes):
    one, idle = processes(2)
    one.open()
    idle.do("reset")
    eventually(lambda: one.state == "CLOSED")


def test_a_process_that_ends_after_a_reset_has_told_it(processes, own_server):
    (one,) = in_use(processes(1, url=own_server.url, deadline=5))
    one.open()
    (brief,) = processes(1, url=own_server.url, deadline=60)
    with own_server.stopped():
        brief.do("call", "succeed")
        brief.do("reset")
        brief.end()
        # it is ending when the store answers what it asked first
        time.sleep(0.5)
    eventually(lambda: one.state == "CLOSED")


def sent(connection, key, *, known, move, process="p", wanted=0, most=1, successes=0):
    """What the store answers a process that says how it stands."""
    texts = ["channel", "{}", "{}", process, known, move, 60_000_000, 1, "ConnectionError"]
    arguments = [*texts, wanted, most, 5_000_000, successes, 2, 100]
    return connection.run_blocking(packaged_script("circuit"), [key("state"), key("trials"), key("waiting")], arguments)


def test_a_reset_beats_an_opening_of_before_that_arrives_later(connection, key):
    version, *_ = sent(connection, key, known=0, move="open")
    reset, *_ = sent(connection, key, known=version, move="reset")
    assert sent(connection, key, known=version, move="open")[:3] == [reset, 0, b"reset"]


def test_a_reset_beats_an_opening_that_its_process_did_not_know(connection, key):
    sent(connection, key, known=0, move="open")
    assert sent(connection, key, known=0, move="reset")[1:3] == [1, b"reset"]


def test_versions_go_on_where_they_were_in_a_store_that_lost_all(connection, key, client):
    version, *_ = sent(connection, key, known=0, move="open")
    client.delete(key("state"))
    assert sent(connection, key, known=version, move="open")[0] > version


# Trials


def test_no_more_trials_than_allowed_are_under_way_over_the_fleet(processes):
    three = in_use(processes(3, recovery_timeout=0.2, half_open_max_calls=2))
    three[0].open()
    for process in three:
        eventually(lambda process=process: process.state != "CLOSED")
        process.begin("hammer", 4)
    spans = [span for process in three for span in process.hear()]
    steps = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    assert max(itertools.accumulate(step for _, step in steps)) == 2


def test_trials_go_round_among_the_processes_that_want_one(processes):
    three = in_use(processes(3, recovery_timeout=0.2))
    three[0].open()
    for process in three:
        eventually(lambda process=process: process.state != "CLOSED")
        process.begin("hammer", 4)
    assert [process for process in three if not process.hear()] == []


def test_a_process_waits_for_no_permit_that_another_does_not_use(processes):
    one, other = in_use(processes(2, recovery_timeout=0.2))
    one.open()
    gets_through(one, "call", "neither")
    gets_through(other, "call", "succeed")
    eventually(lambda: one.state == "CLOSED")


def test_a_trial_that_fails_opens_the_circuit_in_all_anew(processes):
    one, other = in_use(processes(2, recovery_timeout=2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    gets_through(other, "begin")
    eventually(lambda: one.do("call", "succeed") == 0.05)
    other.do("end", "fail")
    eventually(lambda: one.do("call", "succeed") > 0.05)


def test_trials_that_succeed_in_several_processes_count_together(processes):
    one, other = in_use(processes(2, recovery_timeout=0.2, success_threshold=2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    gets_through(one, "call", "succeed")
    gets_through(other, "call", "succeed")
    eventually(lambda: (one.state, other.state) == ("CLOSED", "CLOSED"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_permit_of_a_process_that_is_gone_is_free_after_its_lease(processes, number):
    one, other = in_use(processes(2, recovery_timeout=0.2, lease=2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    gets_through(one, "begin")
    one.signal(number)
    gets_through(other, "call", "succeed")


def test_a_process_that_was_stopped_does_not_use_its_permit_of_before(processes):
    one, other = in_use(processes(2, recovery_timeout=0.2, lease=2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    gets_through(one, "call", "neither")
    one.signal(signal.SIGSTOP)
    gets_through(other, "begin")
    one.signal(signal.SIGCONT)
    assert one.do("call", "succeed") != "sent"


def test_a_long_trial_keeps_its_permit_for_longer_than_its_lease(processes):
    one, other = in_use(processes(2, recovery_timeout=0.2, lease=2))
    one.open()
    eventually(lambda: other.state == "OPEN")
    gets_through(one, "begin")
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert other.do("call", "succeed") != "sent"
        time.sleep(0.02)


# The store is gone


def test_circuits_go_on_without_the_store_and_are_shared_again_when_it_is_back(processes, own_server):
    one, other = in_use(processes(2, url=own_server.url, recovery_timeout=0.5))
    own_server.kill()
    for process in (one, other):
        eventually(lambda process=process: ["StoreLost", "ConnectionError"] in process.do("heard"))
    one.open()
    gets_through(one, "call", "succeed")
    assert (one.state, other.state) == ("CLOSED", "CLOSED")
    own_server.start()
    for process in (one, other):
        eventually(lambda process=process: ["StoreRejoined", ""] in process.do("heard"))
    one.open()
    eventually(lambda: ["CircuitOpened", "ConnectionError in another process"] in other.do("heard"))


def test_an_opening_of_a_process_that_is_cut_off_is_its_own(processes, own_server):
    one, other = in_use(processes(2, url=own_server.url))
    own_server.kill()
    eventually(lambda: ["StoreLost", "ConnectionError"] in one.do("heard"))
    one.open()
    own_server.start()
    eventually(lambda: ["StoreRejoined", ""] in one.do("heard"))
    time.sleep(1.5)
    assert other.state == "CLOSED"


def test_a_reset_while_the_store_is_gone_is_told_when_it_is_back(processes, own_server):
    one, other = in_use(processes(2, url=own_server.url))
    one.open()
    eventually(lambda: other.state == "OPEN")
    own_server.kill()
    eventually(lambda: ["StoreLost", "ConnectionError"] in one.do("heard"))
    one.do("reset")
    own_server.start()
    eventually(lambda: other.state == "CLOSED")


def test_a_process_that_had_lost_the_store_does_what_it_missed_as_soon_as_it_is_back(processes, own_server, proxy):
    (one,) = in_use(processes(1, url=own_server.url))
    (other,) = in_use(processes(1, url=proxy.url, deadline=0.5))
    one.open()
    eventually(lambda: other.state == "OPEN")
    one.do("reset")
    eventually(lambda: other.state == "CLOSED")
    proxy.is_silent = True
    eventually(lambda: ["StoreLost", "TimeoutError"] in other.do("heard"))
    one.open()
    time.sleep(0.5)
    proxy.is_silent = False
    # its listener finds out only after 10 s
    eventually(lambda: other.state == "OPEN", seconds=9)


def test_no_call_waits_for_a_store_that_does_not_answer(processes, own_server):
    one, other = in_use(processes(2, url=own_server.url, deadline=60, recovery_timeout=0.2))
    with own_server.stopped():
        one.open()
        assert one.do("call", "succeed") != "sent"
        time.sleep(0.3)
        # its time has come, but nobody has said that it may try
        assert one.do("call", "succeed") == 0.05
        assert other.do("call", "succeed") == "sent"
    gets_through(one, "call", "succeed")


# In this process


@pytest.fixture
def here(store_url, prefix):
    """Have this process be in the fleet, and return a call that is protected."""
    configure(
        ResilienceSettings(
            resilience_store=store_url, resilience_store_prefix=prefix, resilience_store_deadline_seconds=5
        )
    )

    @circuit_protected("chat", failure_threshold=1, recovery_timeout=0, success_threshold=1)
    def call(error=None):
        if error:
            raise error

    return call


def shown():
    return get_all_resilience_stats()["circuit_breakers"]["chat"]


def test_a_circuit_with_garbage_under_its_key_is_this_processs_own(here, client, key, heard, caplog):
    client.set(key("state"), "garbage")
    with caplog.at_level(logging.WARNING, "resilience_kit.fleet"):
        here()
        eventually(lambda: key("state") in caplog.text)
    with pytest.raises(ConnectionError):
        here(ConnectionError())
    here()
    assert [type(event) for event in heard if isinstance(event, CircuitOpened | CircuitClosed)] == [
        CircuitOpened,
        CircuitClosed,
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        {"state": "ajar"},
        {"version": "-1"},
        {"version": "9" * 17},
        {"until": "soon"},
        {"error": "no name"},
        {"error": "x" * 1_000},
        {"successes": "1e3"},
    ],
    ids=str,
)
def test_garbage_in_a_field_is_told_by_its_key(here, connection, key, caplog, garbage):
    sent(connection, key, known=0, move="open")
    (put,) = garbage.items()
    connection.run_blocking(Script("put", "return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"), [key("state")], put)
    with caplog.at_level(logging.WARNING, "resilience_kit.fleet"):
        here()
        eventually(lambda: key("state") in caplog.text)
    assert shown()["state"] == "CLOSED"


@pytest.mark.parametrize("part", ["trials", "waiting"])
def test_garbage_under_a_key_of_permits_is_told_by_that_key(here, client, key, caplog, part):
    client.set(key(part), "garbage")
    with caplog.at_level(logging.WARNING, "resilience_kit.fleet"):
        here()
        eventually(lambda: repr(key(part)) in caplog.text)


def test_a_circuit_is_shared_again_when_the_garbage_is_gone(here, client, key, caplog):
    client.set(key("state"), "garbage")
    with caplog.at_level(logging.WARNING, "resilience_kit.fleet"):
        here()
        eventually(lambda: key("state") in caplog.text)
    client.delete(key("state"))
    with pytest.raises(ConnectionError):
        here(ConnectionError())
    eventually(lambda: client.hget(key("state"), "state") == b"open")


@pytest.mark.parametrize(
    "news",
    [
        "garbage",
        json.dumps({"kind": "circuit", "name": "chat", "from": "x", "moved": True, "state": "open", "version": 10**15}),
        json.dumps({"kind": "circuit", "name": "chat", "from": "x", "moved": [1]}),
        json.dumps({"kind": "circuit", "name": "chat", "from": "x"}),
    ],
)
def test_no_message_moves_a_circuit_by_itself(here, client, key, prefix, news):
    here()
    eventually(lambda: client.pubsub_numsub(f"{prefix}:news")[0][1] == 1)
    client.publish(f"{prefix}:news", news)
    reset_circuit_breakers("chat")
    eventually(lambda: client.hget(key("state"), "state") == b"reset")
    assert (shown()["state"], shown()["times_opened"]) == ("CLOSED", 0)


def test_a_permit_that_ends_in_the_far_future_is_none_of_ours(connection, client, key):
    client.zadd(key("trials"), {"x:1": 1e300})
    assert sent(connection, key, known=0, move="", wanted=1)[6] == 1


def test_a_circuit_that_was_opened_elsewhere_is_counted_as_opened(here, connection, key, heard):
    here()
    eventually(lambda: current_fleet().member.live == 1)
    sent(connection, key, known=0, move="open")
    client_news = json.dumps({"kind": "circuit", "name": "chat", "from": "x", "moved": True})
    current_fleet().member.connection.publish(current_fleet().member.channel, client_news)
    eventually(lambda: shown()["times_opened"] == 1)
    with pytest.raises(CircuitOpenError):
        here()
