"""Samples of many processes by way of a store: what each puts there, and what is made of it."""

import secrets
import subprocess
import sys
import threading
import time

import pytest
import redis

from resilience_kit import ResilienceSettings, StoreUnavailableError, configure, rate_limited
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.fleet.membership import Member
from resilience_kit.monitoring import fleet_samples
from resilience_kit.monitoring.fleet_samples import FleetSamples, added_up
from resilience_kit.monitoring.measures import Histogram, Reading, Sample, packed
from resilience_kit.monitoring.sampler import Sampler

PROGRAM = """
import sys
from resilience_kit import ResilienceSettings, configure, rate_limited
from resilience_kit.monitoring import FleetSamples, Sampler

url, prefix, calls = sys.argv[1:]
configure(ResilienceSettings(resilience_store=url, resilience_store_prefix=prefix, resilience_store_deadline_seconds=5))
ask = rate_limited("chat", requests_per_minute=600, min_interval=0, tokens=10)(lambda: "four")
sampler = Sampler([FleetSamples().add])
sampler.start()
for _ in range(int(calls)):
    ask()
print("called", flush=True)
sys.stdin.read()
"""


def eventually(tell, *, seconds=20):
    """Wait until something is told; threads and processes take their time."""
    deadline = time.monotonic() + seconds
    while not (told := tell()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)
    return told


def read_of(samples, processes):
    """What is told as soon as it is told of so many processes."""

    def tell():
        told = samples.read()
        return told if len(told) == processes else None

    return eventually(tell)


@pytest.fixture
def join(connect, store_url):
    """Join the fleet of this test's prefix, as a process would."""
    members = []

    def join(url=store_url, *, deadline=5):
        connection = connect(url, deadline=deadline)
        members.append(Member(connection, beat=0.02))
        members[-1].start()
        return FleetSamples(Fleet(connection, members[-1]))

    yield join
    for member in members:
        member.close()


@pytest.fixture
def client(store_url):
    with redis.Redis.from_url(store_url) as client:
        yield client
        client.connection_pool.disconnect()


def sample(at, calls=1, process="one", **gauges):
    return Sample(at, 1.0, process, (Reading("agents", "A", {"calls": calls}, gauges, {"wait": Histogram.of([at])}),))


def calls_of(sample):
    return sample.reading("agents", "A").counter("calls")


def test_a_sample_is_read_by_another_process_as_it_was_added(join):
    given = sample(5.5, 3, state="OPEN")
    join().add(given)
    (told,) = eventually(join().read)
    assert (told.process, told.samples, told.total) == ("one", (given,), given)


def test_the_newest_minute_of_seconds_is_kept_with_the_sum_of_all(join):
    samples = join()
    for at in range(100):
        samples.add(sample(at))
    eventually(lambda: not samples._unsent)
    (told,) = samples.read()
    assert [it.at for it in told.samples] == list(range(40, 100))
    assert calls_of(told.total) == 100


def test_as_many_seconds_are_read_as_are_asked_for(join):
    samples = join()
    for at in range(10):
        samples.add(sample(at))
    eventually(lambda: not samples._unsent)
    assert [it.at for it in samples.read(3)[0].samples] == [7, 8, 9]


def test_processes_are_told_apart_and_added_up(join):
    one, two = join(), join()
    one.add(sample(1, 1, "one", in_flight=2))
    two.add(sample(1, 2, "two", in_flight=3))
    told = read_of(one, 2)
    assert [(it.process, calls_of(it.total)) for it in told] == [("one", 1), ("two", 2)]
    total = added_up(told)
    assert (calls_of(total), total.reading("agents", "A").gauges) == (3, {"in_flight": 5})


def test_two_processes_of_one_name_stay_two(join):
    for _ in range(2):
        join().add(sample(1, in_flight=2))
    samples = join()
    told = read_of(samples, 2)
    assert len({it.process for it in told}) == 2
    assert all(it.process.startswith("one-") and it.samples[0].process == it.process for it in told)
    assert added_up(told).reading("agents", "A").gauges == {"in_flight": 4}


def test_nothing_is_added_up_to_nothing():
    assert added_up([]) is None


def test_where_no_store_is_set_nothing_is_put_anywhere():
    samples = FleetSamples()
    samples.add(sample(1))
    assert samples.read() == []


def test_a_process_that_tells_nothing_more_is_forgotten_with_its_keys(join, client, prefix, monkeypatch):
    monkeypatch.setattr(fleet_samples, "_LEASE", 200)
    gone, stays = join(), join()
    gone.add(sample(1, process="gone"))
    stays.add(sample(1, process="stays"))
    read_of(stays, 2)
    gone.close()
    assert [it.process for it in read_of(stays, 1)] == ["stays"]
    stays.close()
    eventually(lambda: not client.keys(f"{prefix}:{{samples}}*"))


def test_what_lies_in_the_store_is_bounded(join, client, prefix):
    samples = join()
    for at in range(500):
        samples.add(sample(at))
        if at % 50 == 0:
            eventually(lambda: not samples._unsent)
    eventually(lambda: not samples._unsent)
    sizes = {key: client.memory_usage(key) for key in client.keys(f"{prefix}:{{samples}}*")}
    assert len(sizes) == 3
    assert sum(sizes.values()) < 20_000


def test_a_sample_that_is_too_large_is_left_out_and_told_once(join, caplog, monkeypatch):
    monkeypatch.setattr(fleet_samples, "_MOST_BYTES", 1_000)
    samples = join()
    large = Sample(1, 1, "one", tuple(Reading("agents", secrets.token_hex(40)) for _ in range(100)))
    for it in (large, large, sample(2)):
        samples.add(it)
    assert [it.at for it in eventually(samples.read)[0].samples] == [2]
    assert [record.getMessage() for record in caplog.records if "too large" in record.getMessage()] == [
        "a sample is too large to be shown to the fleet: too many names have come together"
    ]


def test_a_sample_that_was_sent_twice_counts_once(join, client, prefix):
    samples = join()
    samples.add(sample(1))
    eventually(samples.read)
    (key,) = (key for key in client.keys(f"{prefix}:{{samples}}:*") if not key.endswith(b":total"))
    client.rpush(key, packed(sample(1)))
    assert [it.at for it in samples.read()[0].samples] == [1]


# Garbage


def key_of(prefix, *parts):
    return ":".join((prefix, "{samples}", *parts))


@pytest.mark.parametrize("kind", ["text", "list", "sample", "total"])
def test_what_a_process_did_not_put_there_is_dropped_and_named_once(join, client, prefix, caplog, kind):
    samples = join()
    samples.add(sample(1))
    eventually(samples.read)
    other = "0123456789abcdef"
    keys = key_of(prefix, other), key_of(prefix, other, "total")
    client.zadd(key_of(prefix), {other: 10**14})
    if kind == "text":
        client.set(keys[0], "garbage")
        client.set(keys[1], packed(sample(1)))
    elif kind == "list":
        client.rpush(keys[0], packed(sample(1)))
        client.rpush(keys[1], packed(sample(1)))
    else:
        client.rpush(keys[0], b"garbage" if kind == "sample" else packed(sample(1)))
        client.set(keys[1], b"garbage" if kind == "total" else packed(sample(1)))
    for _ in range(2):
        assert [it.process for it in samples.read()] == ["one"]
    assert caplog.messages == [
        f"what lies in the store under {keys[0]!r} is not what the kit put there, and was left out"
    ]


def test_a_process_that_is_going_is_no_garbage(join, client, prefix, caplog):
    samples = join()
    client.zadd(key_of(prefix), {"0123456789abcdef": 10**14})
    assert samples.read() == []
    assert caplog.messages == []


def test_a_member_that_is_none_is_dropped_and_named_once(join, client, prefix, caplog):
    samples = join()
    samples.add(sample(1))
    eventually(samples.read)
    client.zadd(key_of(prefix), {b"\xff{}:../*": 10**14, "x" * 10_000: 10**14})
    for _ in range(2):
        assert [it.process for it in samples.read()] == ["one"]
    assert len(caplog.messages) == 1


def test_an_index_that_is_no_index_is_told_and_harms_no_one(join, client, prefix, caplog):
    client.set(key_of(prefix), "garbage")
    samples = join()
    samples.add(sample(1))
    eventually(lambda: caplog.messages)
    assert samples.read() == []
    assert rate_limited("chat")(lambda: "four")() == "four"


# A store that is gone


def test_a_store_that_is_lost_is_told_to_readers_at_once(join, own_server):
    samples = join(own_server.url)
    samples.add(sample(1))
    eventually(samples.read)
    own_server.kill()
    with pytest.raises(StoreUnavailableError):
        samples.read()
    with pytest.raises(StoreUnavailableError, match="is lost"):
        samples.read()


def test_what_happened_while_the_store_was_gone_is_there_when_it_is_back(join, own_server):
    samples = join(own_server.url)
    samples.add(sample(1))
    eventually(samples.read)
    own_server.kill()
    for at in range(2, 200):
        samples.add(sample(at))
    own_server.start()

    def told():
        try:
            return samples.read()
        except StoreUnavailableError:
            return None

    (found,) = eventually(told)
    assert [it.at for it in found.samples] == list(range(140, 200))
    assert calls_of(found.total) == 199


def test_adding_never_waits_for_the_store(join, own_server):
    samples = join(own_server.url)
    samples.add(sample(1))
    eventually(samples.read)
    added = threading.Event()

    def add():
        for at in range(2, 100):
            samples.add(sample(at))
        added.set()

    with own_server.stopped():
        threading.Thread(target=add).start()
        assert added.wait(10)
    assert len(samples._unsent) <= 60


# By the settings


def test_the_fleet_of_the_settings_is_told_of_real_processes(store_url, prefix):
    configure(
        ResilienceSettings(
            resilience_store=store_url, resilience_store_prefix=prefix, resilience_store_deadline_seconds=5
        )
    )
    processes = [
        subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", PROGRAM, store_url, prefix, str(calls)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for calls in (3, 5)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "called\n"
        samples = FleetSamples()
        ask = rate_limited("chat", requests_per_minute=600, min_interval=0, tokens=10)(lambda: "four")
        with Sampler([samples.add], process="mine"):
            ask()

            def all_calls():
                told = samples.read()
                counted = added_up(told).of("rate_limiters").get("chat") if told else None
                return counted is not None and counted.counter("calls_admitted") == 9 and told

            told = eventually(all_calls)
        assert len({it.process for it in told}) == 3
    finally:
        for process in processes:
            process.communicate()
