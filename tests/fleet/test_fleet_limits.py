"""Limits that several processes share: real processes, a real store, and what each of them sent when."""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from resilience_kit import (
    RateLimitTimeoutError,
    StoreContentError,
    get_all_resilience_stats,
    rate_limited,
)
from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.fleets import Fleet, current_fleet
from resilience_kit.fleet.limit_store import ValkeyLimits, Wish, limits_of
from resilience_kit.fleet.membership import Member
from resilience_kit.registry import mode
from resilience_kit.settings import current_settings
from resilience_kit.testing import no_waiting

PROGRAM = Path(__file__).parent / "caller_process.py"
# 60 requests in 2 seconds, ten in a sixth of that, and 3,000 tokens.
QUOTA = {"requests_per_minute": 60, "tokens_per_minute": 3_000, "period": 2.0, "max_concurrent": 100, "min_interval": 0}


@dataclass
class Caller:
    """A process of the fleet, and what it said."""

    process: subprocess.Popen
    said: list = field(default_factory=list)

    def listen(self):
        with self.process.stdout as lines:
            for line in lines:
                # a process that is killed may not end its line
                with suppress(ValueError):
                    self.said.append(json.loads(line))

    def heard(self, what):
        return [values for kind, *values in list(self.said) if kind == what]


@pytest.fixture
def start(prefix):
    """Start processes that share a limit; they begin to call when all of them are there."""
    callers = []

    def start(count, url, limit=QUOTA, fleet=None, **given):
        new = []
        for number in range(count):
            arguments = {
                "fleet": {"url": url, "prefix": prefix, **(fleet or {})},
                "limit": limit,
                "seed": len(callers) + number,
                **given,
            }
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, str(PROGRAM), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            caller = Caller(process)
            threading.Thread(target=caller.listen, daemon=True).start()
            new.append(caller)
        callers.extend(new)
        for caller in new:
            eventually(lambda caller=caller: caller.heard("ready"))
        for caller in new:
            caller.process.stdin.write("go\n")
            caller.process.stdin.flush()
        return new

    yield start
    for caller in callers:
        with suppress(OSError):
            caller.process.stdin.close()
    for caller in callers:
        try:
            caller.process.wait(10)
        except subprocess.TimeoutExpired:
            caller.process.kill()
            caller.process.wait()


def eventually(is_true, seconds=20):
    """Wait until something is true, which it has to become."""
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it has not become true"
        time.sleep(0.02)


def most_in(callers, seconds, weigh=lambda tokens: 1):
    """The most that any window of so many seconds held of what all of them sent."""
    sent = sorted(values for caller in callers for values in caller.heard("sent"))
    most = held = first = 0
    for at, tokens in sent:
        held += weigh(tokens)
        while sent[first][0] <= at - seconds:
            held -= weigh(sent[first][1])
            first += 1
        most = max(most, held)
    return most


def assert_within_quota(callers, limit=QUOTA):
    requests, tokens, period = limit["requests_per_minute"], limit["tokens_per_minute"], limit["period"]
    most = (
        most_in(callers, period),
        most_in(callers, period / 6),
        most_in(callers, period, weigh=lambda tokens: tokens),
    )
    is_within = all(held <= bound for held, bound in zip(most, (requests, requests // 6, tokens), strict=True))
    assert is_within, (most, story(callers, limit))


def story(callers, limit=QUOTA):
    """What happened around the fullest sixth of a period: for whoever reads a failure."""
    length = limit["period"] / 6
    sent = sorted((at, number) for number, caller in enumerate(callers) for at, _ in caller.heard("sent"))
    fullest = max(range(len(sent)), key=lambda end: sum(sent[end][0] - length < at <= sent[end][0] for at, _ in sent))
    end = sent[fullest][0]
    moves = [(round(at - end, 3), number) for at, number in sent if end - 2 * length < at < end + length]
    told = [
        (round(at - end, 3), number, kind)
        for number, caller in enumerate(callers)
        for kind, at, *_ in list(caller.said)
        if kind.startswith("Store") or kind == "refused"
    ]
    return f"{moves} {told}"


def sent_by(callers):
    return sum(len(caller.heard("sent")) for caller in callers)


def test_no_window_of_the_quota_holds_more_than_one_quota_of_all_processes(start, store_url):
    callers = start(4, store_url, sizes=[10, 20, 50, 200])
    eventually(lambda: sent_by(callers) >= 120)
    assert_within_quota(callers)


def test_a_fleet_uses_all_of_the_requests(start, store_url):
    callers = start(3, store_url)
    eventually(lambda: sent_by(callers) >= 60)
    first, *_, last = sorted(at for caller in callers for at, _ in caller.heard("sent"))[:60]
    # ten at once, five times a third of a second, and what the leases and a busy machine take
    assert last - first < 3 * 5 * QUOTA["period"] / 6


def test_each_process_gets_its_part(start, store_url):
    callers = start(3, store_url)
    eventually(lambda: sent_by(callers) >= 120)
    counts = sorted(len(caller.heard("sent")) for caller in callers)
    assert counts[-1] <= 2 * counts[0]


def test_a_large_request_is_not_starved_by_the_small_ones_of_others(start, store_url):
    small = start(2, store_url, limit={**QUOTA, "requests_per_minute": 6_000}, sizes=[60])
    eventually(lambda: sent_by(small) >= 40)
    [large] = start(1, store_url, limit={**QUOTA, "requests_per_minute": 6_000}, sizes=[2_400], callers=1)
    before = sent_by(small)
    eventually(lambda: large.heard("sent"))
    # it waits for what had been sent to leave the window, and not for the others to pause: 50 fit into a window
    assert sent_by(small) - before <= 3 * 50


def test_slots_are_shared(start, store_url):
    limit = {**QUOTA, "requests_per_minute": 6_000, "tokens_per_minute": 10**6, "max_concurrent": 3}
    callers = start(3, store_url, limit=limit, seconds=0.05)
    eventually(lambda: sent_by(callers) >= 60)
    moves = sorted(
        [(at, 1) for caller in callers for at, _ in caller.heard("sent")]
        + [(at, -1) for caller in callers for at, _ in caller.heard("done")]
    )
    under_way = [sum(move for _, move in moves[: end + 1]) for end in range(len(moves))]
    assert max(under_way) == 3
    assert all(caller.heard("done") for caller in callers)


def test_the_slots_of_a_process_that_is_killed_go_to_others(start, store_url):
    limit = {**QUOTA, "max_concurrent": 1}
    [holder] = start(1, store_url, limit=limit, callers=1, seconds=1_000)
    eventually(lambda: holder.heard("sent"))
    [other] = start(1, store_url, limit=limit, callers=1)
    time.sleep(0.5)
    assert not other.heard("sent")
    holder.process.kill()
    eventually(lambda: other.heard("sent"))


def test_a_process_that_stood_still_for_longer_than_its_lease_sends_nothing_on_it(start, store_url):
    callers = start(2, store_url)
    eventually(lambda: sent_by(callers) >= 20)
    for _ in range(5):
        # at any moment: between a grant and its use too
        os.kill(callers[0].process.pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(callers[0].process.pid, signal.SIGCONT)
        time.sleep(0.3)
    assert_within_quota(callers)


def test_a_store_that_forgot_its_scripts_is_given_them_again(start, own_server):
    callers = start(2, own_server.url)
    for _ in range(3):
        before = sent_by(callers)
        with own_server.client() as client:
            client.script_flush()
        eventually(lambda before=before: sent_by(callers) >= before + 10)
    assert not [caller for caller in callers if caller.heard("StoreLost")]


def test_processes_keep_to_their_shares_while_the_store_is_gone_and_come_back_without_a_burst(start, own_server):
    callers = start(3, own_server.url)
    eventually(lambda: sent_by(callers) >= 60)
    own_server.kill()
    eventually(lambda: all(caller.heard("StoreLost") for caller in callers))
    during = sent_by(callers)
    eventually(lambda: sent_by(callers) >= during + 60)
    own_server.start()
    eventually(lambda: all(caller.heard("StoreRejoined") for caller in callers))
    after = sent_by(callers)
    eventually(lambda: sent_by(callers) >= after + 90)
    assert_within_quota(callers)
    assert [len(caller.heard("StoreLost")) for caller in callers] == [1, 1, 1]


def test_a_store_that_is_full_counts_as_gone_until_it_has_room(start, own_server):
    callers = start(2, own_server.url)
    eventually(lambda: sent_by(callers) >= 20)
    with own_server.client() as client:
        client.config_set("maxmemory", 1)
        eventually(lambda: all(caller.heard("StoreLost") for caller in callers))
        client.config_set("maxmemory", 0)
    eventually(lambda: all(caller.heard("StoreRejoined") for caller in callers))
    before = sent_by(callers)
    eventually(lambda: sent_by(callers) >= before + 60)
    assert_within_quota(callers)


def test_a_store_that_is_slow_counts_as_gone(start, proxy):
    callers = start(2, f"redis://127.0.0.1:{proxy.port}", fleet={"deadline": 0.3})
    eventually(lambda: sent_by(callers) >= 20)
    proxy.delay = 1
    eventually(lambda: all(caller.heard("StoreLost") for caller in callers))
    before = sent_by(callers)
    eventually(lambda: sent_by(callers) >= before + 30)
    assert_within_quota(callers)


def test_a_refusal_that_one_process_meets_makes_all_of_them_wait(start, store_url):
    callers = start(2, store_url, refused_at=10)
    eventually(lambda: any(caller.heard("429") for caller in callers))
    refused_at = min(at for caller in callers for at, *_ in caller.heard("429"))
    eventually(lambda: any(at > refused_at + 1 for caller in callers for at, _ in caller.heard("sent")))
    # news takes its time on a busy machine, and what was granted before is on its way
    early = [at for caller in callers for at, _ in caller.heard("sent") if refused_at + 0.5 < at < refused_at + 0.9]
    assert not early


def test_a_store_that_lost_all_it_knew_lets_no_burst_through(start, own_server):
    callers = start(3, own_server.url)
    for _ in range(3):
        before = sent_by(callers)
        eventually(lambda before=before: sent_by(callers) >= before + 40)
        with own_server.client() as client:
            client.flushall()
    assert_within_quota(callers)


def test_a_connection_that_is_cut_in_the_middle_of_commands_costs_no_more_than_a_share(start, proxy):
    callers = start(2, f"redis://127.0.0.1:{proxy.port}")
    for _ in range(3):
        before = sent_by(callers)
        proxy.cut()
        eventually(lambda before=before: sent_by(callers) >= before + 30)
    assert_within_quota(callers)


def test_a_call_is_refused_at_once_where_the_store_is_needed_and_gone(start, own_server):
    callers = start(2, own_server.url, fleet={"on_store_failure": "refuse"})
    eventually(lambda: sent_by(callers) >= 10)
    own_server.kill()
    eventually(lambda: all(caller.heard("refused") for caller in callers))
    assert {name for caller in callers for _, name in caller.heard("refused")} == {"StoreUnavailableError"}
    before = sent_by(callers)
    time.sleep(0.5)
    assert sent_by(callers) == before
    own_server.start()
    eventually(lambda: sent_by(callers) > before)


def test_each_process_has_all_of_the_quota_where_the_user_wants_that_of_a_store_that_is_gone(start, own_server):
    callers = start(2, own_server.url, fleet={"on_store_failure": "open"})
    eventually(lambda: sent_by(callers) >= 20)
    own_server.kill()
    eventually(lambda: all(caller.heard("StoreLost") for caller in callers))
    eventually(lambda: most_in(callers, QUOTA["period"] / 6) > 10)
    assert all(most_in([caller], QUOTA["period"]) <= 60 for caller in callers)


# In one process


@pytest.fixture
def fleet(store_url, prefix, monkeypatch):
    """The fleet of this process, in a store that has time enough."""
    monkeypatch.setenv("RESILIENCE_STORE", store_url)
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", prefix)
    monkeypatch.setenv("RESILIENCE_STORE_DEADLINE_SECONDS", "5")
    return current_fleet()


@pytest.fixture
def usage(fleet):
    """What the store counts in the window of the limit "fleet": requests, tokens and slots of all."""
    store = ValkeyLimits(fleet.connection, "fleet", "a test", fleet.member.channel)

    def usage():
        grant = store.reserve_blocking(Wish(limits_of(60, 3_000, 60.0)))
        return grant.requests_then, grant.tokens_then

    return usage


def test_nothing_is_shared_where_no_store_is_set():
    @rate_limited("fleet", min_interval=0)
    def ask():
        return "four"

    ask()
    assert current_fleet() is None


async def test_a_call_counts_for_the_whole_fleet(usage):
    @rate_limited("fleet", tokens=70, min_interval=0, requests_per_minute=60)
    async def ask():
        return "four"

    assert await ask() == "four"
    requests, tokens = usage()
    # the leases may hold a few more than were sent
    assert requests >= 1
    assert tokens == 70 * requests


def test_a_thread_asks_the_store_as_a_task_does(usage):
    @rate_limited("fleet", tokens=70, min_interval=0)
    def ask():
        return "four"

    assert [ask() for _ in range(3)] == ["four"] * 3
    assert usage()[0] >= 3


def test_threads_share_a_limit_with_each_other_and_the_fleet(fleet):
    @rate_limited("fleet", tokens=10, min_interval=0, requests_per_minute=6_000, max_concurrent=50)
    def ask():
        return "four"

    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == ["four"] * 20


def test_two_event_loops_share_a_limit_with_each_other(fleet):
    @rate_limited("fleet", tokens=10, min_interval=0, requests_per_minute=6_000, max_concurrent=50)
    async def ask():
        return "four"

    async def many():
        return await asyncio.gather(*(ask() for _ in range(10)))

    answers = []
    threads = [threading.Thread(target=lambda: answers.extend(asyncio.run(many()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == ["four"] * 20


async def test_a_call_that_is_cancelled_while_it_waits_gives_its_place_in_the_store_back(usage):
    @rate_limited("fleet", tokens=lambda tokens: tokens, min_interval=0, requests_per_minute=600)
    async def ask(tokens):
        return "four"

    await ask(100_000)
    waiting = asyncio.create_task(ask(90_000))
    await asyncio.to_thread(eventually, lambda: usage()[1] == 190_000)
    waiting.cancel()
    await asyncio.to_thread(eventually, lambda: usage()[1] == 100_000)


async def test_a_call_that_is_cancelled_while_the_store_is_asked_leaves_no_slot(fleet):
    @rate_limited("fleet", tokens=10, min_interval=0, requests_per_minute=6_000, max_concurrent=1)
    async def ask():
        return "four"

    for _ in range(20):
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    assert await ask() == "four"


async def test_the_way_to_the_store_is_no_wait_for_a_slot(fleet):
    @rate_limited("fleet", requests_per_minute=12, min_interval=0, max_wait=0)
    async def ask():
        return "four"

    assert [await ask(), await ask()] == ["four", "four"]
    with pytest.raises(RateLimitTimeoutError):
        await ask()


async def test_a_wait_that_is_longer_than_allowed_ends(fleet):
    @rate_limited("fleet", tokens=100_000, min_interval=0, max_wait=0.2)
    async def ask():
        return "four"

    await ask()
    with pytest.raises(RateLimitTimeoutError):
        await ask()


async def test_garbage_under_a_key_of_a_limit_is_an_error_that_names_the_key(fleet, store_url):
    key = fleet.connection.key("limit:fleet", "quota")
    with redis.Redis.from_url(store_url) as client:
        client.set(key, "garbage")

    @rate_limited("fleet", min_interval=0)
    async def ask():
        return "four"

    with pytest.raises(StoreContentError, match="quota") as raised:
        await ask()
    assert raised.value.key == key


async def test_garbage_that_a_cancelled_call_met_is_no_error_of_a_later_call(fleet, store_url):
    key = fleet.connection.key("limit:fleet", "quota")

    @rate_limited("fleet", min_interval=0)
    async def ask():
        return "four"

    with redis.Redis.from_url(store_url) as client:
        client.set(key, "garbage")
        asking = asyncio.create_task(ask())
        for _ in range(2):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.sleep(0.2)
        client.delete(key)
    assert await ask() == "four"


async def test_statistics_tell_of_the_whole_fleet(fleet):
    other = ValkeyLimits(fleet.connection, "fleet", "another process", fleet.member.channel)
    other.reserve_blocking(Wish(limits_of(60, 150_000, 60.0), requests=3, tokens=300))

    @rate_limited("fleet", tokens=70, min_interval=0)
    async def ask():
        return "four"

    await ask()
    statistics = get_all_resilience_stats()["rate_limiters"]["fleet"]
    assert statistics["tokens_in_window"] >= 370


def test_a_process_that_ends_gives_its_slots_and_leases_back(fleet, store_url):
    @rate_limited("fleet", tokens=10, min_interval=0, requests_per_minute=6_000, max_concurrent=50)
    def ask():
        return "four"

    for _ in range(20):
        ask()
    fleet.close()
    quota, slots = (fleet.connection.key("limit:fleet", part) for part in ("quota", "slots"))
    with redis.Redis.from_url(store_url) as client:
        assert struct.unpack("<dd", client.hget(slots, "all")) == (0, 0)
        # the eleventh and twelfth number of the header: requests and tokens of all
        assert struct.unpack_from("<dd", client.get(quota), 11 * 8) == (20, 200)


async def test_an_answer_that_takes_longer_than_a_lease_lasts_is_asked_for_again_with_a_longer_one(
    proxy, prefix, monkeypatch
):
    monkeypatch.setenv("RESILIENCE_STORE", f"redis://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", prefix)
    monkeypatch.setenv("RESILIENCE_STORE_DEADLINE_SECONDS", "5")
    proxy.delay = 0.05

    @rate_limited("fleet", tokens=10, min_interval=0, period=1.0)
    async def ask():
        return "four"

    assert await asyncio.wait_for(ask(), 10) == "four"


async def test_a_process_that_is_held_back_by_slow_answers_does_not_ask_the_store_again_and_again(
    own_server, prefix, monkeypatch
):
    monkeypatch.setenv("RESILIENCE_STORE", own_server.url)
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", prefix)
    monkeypatch.setenv("RESILIENCE_STORE_DEADLINE_SECONDS", "5")

    @rate_limited("fleet", tokens=1, min_interval=0, requests_per_minute=6_000, max_concurrent=10, adaptive="latency")
    async def ask(seconds):
        await asyncio.sleep(seconds)

    for seconds in (0.01, 0.1):
        await asyncio.gather(*(ask(seconds) for _ in range(20)))
    calls = [asyncio.create_task(ask(60)) for _ in range(12)]
    with own_server.client() as client:

        def asked():
            return client.info("commandstats")["cmdstat_evalsha"]["calls"]

        await asyncio.sleep(0.2)
        before = asked()
        await asyncio.sleep(0.3)
        assert get_all_resilience_stats()["rate_limiters"]["fleet"]["in_flight"] < 10
        assert asked() - before < 20
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.fixture
def fleet_with_beat(store_url, prefix, monkeypatch):
    """As `fleet`, with signs of life more or less often."""

    def join(beat):
        monkeypatch.setenv("RESILIENCE_STORE", store_url)
        settings = current_settings()
        connection = Connection(store_url, prefix=prefix, deadline=5)
        key = (settings.resilience_store, settings.resilience_store_prefix, settings.resilience_store_deadline_seconds)
        mode.fleets[key] = Fleet(connection, Member(connection, beat=beat))
        return current_fleet()

    return join


async def test_a_call_that_waits_for_its_start_keeps_its_place_among_those_of_other_processes(fleet_with_beat):
    lively_fleet = fleet_with_beat(0.1)
    other = ValkeyLimits(lively_fleet.connection, "fleet", "another process", lively_fleet.member.channel)
    limits = limits_of(60, 1_000, 60.0)

    @rate_limited("fleet", tokens=10, tokens_per_minute=1_000, min_interval=0)
    async def ask():
        return "four"

    other.reserve_blocking(Wish(limits, requests=1, tokens=1_000))
    asking = asyncio.create_task(ask())
    await asyncio.to_thread(eventually, lambda: other.reserve_blocking(Wish(limits)).tokens_then == 1_010)
    # starts when the call has left the window, two periods from now
    other.reserve_blocking(Wish(limits, requests=1, tokens=995))
    # some signs of life
    await asyncio.sleep(0.5)
    last = other.reserve_blocking(Wish(limits, requests=1, tokens=5))
    asking.cancel()
    assert last.wait < 150


@pytest.mark.parametrize("has_asked", [True, False])
async def test_a_test_that_skips_its_waits_does_not_wait_for_the_servers_clock(fleet, has_asked):
    @rate_limited("fleet", tokens=10, requests_per_minute=6, min_interval=0)
    async def ask():
        return "four"

    if has_asked:
        await ask()
    with no_waiting():
        assert [await ask() for _ in range(40)] == ["four"] * 40


async def test_a_process_that_has_left_its_fleet_has_its_share(fleet):
    @rate_limited("fleet", tokens=10, min_interval=0, requests_per_minute=6_000)
    async def ask():
        return "four"

    await ask()
    await asyncio.to_thread(fleet.close)
    assert await asyncio.wait_for(ask(), 10) == "four"


async def test_a_call_that_has_waited_as_long_as_it_may_is_told_how_long_the_line_of_the_fleet_is(fleet):
    other = ValkeyLimits(fleet.connection, "fleet", "another process", fleet.member.channel)
    other.reserve_blocking(Wish(limits_of(60, 1_000, 60.0), requests=1, tokens=1_000))

    @rate_limited("fleet", tokens=10, tokens_per_minute=1_000, min_interval=0, max_wait=0.5)
    async def ask():
        return "four"

    with pytest.raises(RateLimitTimeoutError) as refused:
        await ask()
    assert refused.value.retry_after > 30


async def test_a_call_that_is_larger_than_a_share_waits_for_a_store_that_is_back(fleet):
    other = ValkeyLimits(fleet.connection, "fleet", "another process", fleet.member.channel)
    another = Member(Connection(fleet.connection._url, prefix=fleet.connection.prefix, deadline=5))
    another.start()
    await asyncio.to_thread(eventually, lambda: fleet.member.live == 2)
    other.reserve_blocking(Wish(limits_of(60, 1_000, 60.0), begin_shares=1.0))

    @rate_limited("fleet", tokens=900, tokens_per_minute=1_000, min_interval=0)
    async def ask():
        return "four"

    try:
        assert await asyncio.wait_for(ask(), 20) == "four"
    finally:
        await asyncio.to_thread(another.close)


async def test_a_call_that_ends_while_the_store_is_asked_for_a_slot_makes_room_for_the_next(fleet_with_beat):
    fleet_with_beat(60)

    @rate_limited("fleet", tokens=1, min_interval=0, requests_per_minute=6_000, max_concurrent=1)
    async def ask():
        return "four"

    assert await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(20))), 10) == ["four"] * 20
