"""One limit of a fleet on a real store: never above the quota in any window, whatever its processes do."""

import struct
from dataclasses import replace
from random import Random

import pytest
import redis
from hypothesis import HealthCheck, given, settings, strategies as st
from limit_model import BEGIN, SECOND, Fleet, Granted, at_worst, fits_at

from resilience_kit.errors import ConfigurationError, StoreContentError
from resilience_kit.fleet.limit_store import (
    NO_SLOTS,
    GivingBack,
    Limits,
    Outcome,
    Sent,
    Slots,
    ValkeyLimits,
    Window,
    Wish,
    limits_of,
)
from resilience_kit.waiting import TaskWaiting, ThreadWaiting

PERIOD = 60.0
LIMITS = limits_of(12, 100, PERIOD)
WITH_FINE = replace(LIMITS, windows=(*LIMITS.windows, Window(PERIOD / 60, 1)))
PACKED_HEADER = struct.Struct("<21d")

on_the_store = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
gaps = st.one_of(st.just(0.0), st.floats(0, 0.5), st.floats(0, 20))
acts = st.lists(
    st.tuples(gaps, st.sampled_from("abc"), st.sampled_from(["ask", "ask", "ask", "give back", "pause"]),
              st.integers(1, 2), st.integers(0, 100), st.integers(0, 3)),
    min_size=10, max_size=60,
)  # fmt: skip


@pytest.fixture
def fleet(connection):
    return Fleet(connection)


@pytest.fixture
def client(store_url):
    with redis.Redis.from_url(store_url) as client:
        yield client


def key(fleet, part):
    return fleet.connection.key(f"limit:{fleet.name}", part)


def act(fleet, limits, acts):
    """Have processes ask, give back what they did not send, and pause, at times of their own."""
    for gap, process, what, requests, tokens, extra in acts:
        fleet.now += round(gap * SECOND)
        unsent = [it for it in fleet.granted if it.requests and it.end > fleet.now]
        if what == "give back" and unsent:
            fleet.give_back(limits, unsent[tokens % len(unsent)], extra % 2, tokens, process=process)
        elif what == "pause":
            fleet.ask(limits, process=process, pause=extra)
        else:
            needed = min(requests, *(window.limit for window in limits.windows))
            fleet.ask(limits, needed, tokens, process=process, extra_requests=extra, extra_tokens=5 * extra)


@pytest.mark.parametrize("limits", [LIMITS, WITH_FINE], ids=["three windows", "four windows"])
@on_the_store
@given(acts=acts)
def test_no_window_ever_holds_more_than_the_quota_whenever_calls_are_sent_within_their_grants(connection, limits, acts):
    fleet = Fleet(connection)

    act(fleet, limits, acts)

    for window in limits.windows:
        assert at_worst(fleet.granted, window) <= window.limit


@pytest.mark.parametrize("seed", range(4))
def test_the_quota_holds_over_many_periods_of_dense_traffic(fleet, seed):
    limits, random = limits_of(600, 14_000, PERIOD), Random(seed)
    for number in range(3_000):
        fleet.now += round(random.expovariate(15) * SECOND) + random.choice([0] * 300 + [90]) * SECOND
        latest = fleet.granted[-1] if number % 40 == 39 else None
        if latest and latest.end > fleet.now:
            fleet.give_back(limits, latest)
        elif fleet.granted and number % 400 > 100:
            # most of the time there is one that waits for its turn
            fleet.now = max(fleet.now, fleet.granted[-1].start)
        extra = random.randrange(3)
        fleet.ask(limits, 1, random.randrange(60), extra_requests=extra, extra_tokens=30 * extra)

    assert 0.9 < max(at_worst(fleet.granted, window) / window.limit for window in limits.windows) <= 1


@on_the_store
@given(acts=acts, tightened=st.tuples(st.integers(1, 12), st.integers(1, 100), st.floats(0, 10)))
def test_no_window_holds_more_than_the_quota_where_a_process_knows_of_less(connection, acts, tightened):
    requests, tokens, margin = tightened
    windows = limits_of(requests, tokens, PERIOD).windows
    windows = (replace(windows[0], seconds=PERIOD + margin), *windows[1:])
    careful, fleet = replace(LIMITS, windows=windows), Fleet(connection)

    for step in acts:
        act(fleet, careful if step[1] == "a" else LIMITS, [step])

    for window in LIMITS.windows:
        assert at_worst(fleet.granted, window) <= window.limit


@on_the_store
@given(calls=st.lists(st.tuples(gaps, st.integers(0, 100)), max_size=50))
def test_no_call_waits_longer_than_the_windows_and_what_grants_last_make_it_wait(connection, calls):
    fleet = Fleet(connection)
    slack = round((LIMITS.validity + LIMITS.resolution) * SECOND)
    for gap, tokens in calls:
        fleet.now += round(gap * SECOND)
        before = [*fleet.granted]
        earliest = max([fleet.now, *(it.start for it in before)])
        due = max(fits_at(before, window, tokens if window.counts_tokens else 1, earliest) for window in LIMITS.windows)

        grant = fleet.ask(LIMITS, 1, tokens)

        if grant.outcome is Outcome.GRANTED:
            assert fleet.granted[-1].start <= due + slack


@on_the_store
@given(
    ages=st.lists(st.tuples(st.floats(0, PERIOD), st.integers(1, 5)), max_size=12),
    calls=st.lists(st.tuples(gaps, st.integers(0, 60)), max_size=20),
)
def test_what_was_sent_without_a_grant_counts_once_it_is_told(connection, ages, calls):
    only_tokens = Limits(PERIOD, (Window(PERIOD, 100, counts_tokens=True),), 100)
    fleet = Fleet(connection)
    fleet.ask(only_tokens, 1, 40)
    fleet.now += round(PERIOD / 2 * SECOND)
    sent = [Sent(age, 0, tokens) for age, tokens in ages]
    fleet.ask(only_tokens, sent=sent)
    fleet.granted += [Granted(at := fleet.now - int(it.seconds_ago * SECOND), at, 0, it.tokens) for it in sent]

    act(fleet, only_tokens, [(gap, "b", "ask", 1, tokens, 0) for gap, tokens in calls])

    assert at_worst(fleet.granted, only_tokens.windows[0]) <= 100


def test_what_is_told_counts_for_what_is_asked_with_it(fleet):
    for _ in range(10):
        fleet.now += 5 * SECOND
        grant = fleet.ask(LIMITS, 1, 5)
    fleet.now += SECOND
    unsent = [GivingBack(grant.epoch, grant.entry, 0, 1)]

    assert fleet.ask(LIMITS, 1, 100, giving_back=unsent, sent=[Sent(0.0, 0, 1)]).wait == 60.25


def test_a_burst_that_fits_goes_at_once_after_an_idle_time(fleet):
    limits = limits_of(60, 1_000, PERIOD)
    for _ in range(30):
        fleet.now += SECOND * 10
        fleet.ask(limits, 1, 30)
    fleet.now += round(2 * PERIOD * SECOND)

    grants = [fleet.ask(limits, 1, 100) for _ in range(10)]

    assert [grant.wait for grant in grants] == [0.0] * 10


def test_a_large_request_is_not_passed_by_small_ones(fleet):
    fleet.ask(LIMITS, 1, 80)
    fleet.now += SECOND
    large = fleet.ask(LIMITS, 1, 90, process="b")

    small = fleet.ask(LIMITS, 1, 1, process="c")

    assert small.wait >= large.wait > PERIOD - 1


def test_who_gave_up_waiting_does_not_hold_up_those_who_come_later(fleet):
    fleet.ask(LIMITS, 1, 80)
    fleet.now += SECOND
    fleet.ask(LIMITS, 1, 90, process="b")
    fleet.give_back(LIMITS, fleet.granted[-1], process="b")

    assert fleet.ask(LIMITS, 1, 20, process="c").wait < 1


def test_what_is_given_back_fits_again(fleet):
    fleet.ask(LIMITS, 1, 60)
    fleet.ask(LIMITS, 1, 40)
    fleet.give_back(LIMITS, fleet.granted[0])

    assert fleet.ask(LIMITS, 1, 60).wait < 11


def test_what_is_given_back_early_in_the_line_does_not_let_others_start_too_soon(fleet):
    only_tokens = Limits(PERIOD, (Window(PERIOD, 100, counts_tokens=True),), 100)
    for _ in range(10):
        fleet.now += 6 * SECOND
        fleet.ask(only_tokens, 1, 10)
    for _ in range(10):
        fleet.ask(only_tokens, 1, 10)

    fleet.give_back(only_tokens, fleet.granted[12], 1, 50)

    assert at_worst(fleet.granted, only_tokens.windows[0]) <= 100


def test_what_was_granted_in_another_life_of_the_state_is_not_given_back(fleet):
    epoch = fleet.ask(LIMITS, 1, 100).epoch

    fleet.ask(LIMITS, giving_back=[GivingBack(epoch + 1, 1, 1, 100)])

    assert fleet.ask(LIMITS, 1, 100).wait >= PERIOD


def test_no_more_is_given_back_than_was_granted(fleet):
    epoch = fleet.ask(LIMITS, 1, 50).epoch

    fleet.ask(LIMITS, giving_back=[GivingBack(epoch, 1, 100, 5_000)])

    assert fleet.ask(LIMITS, 1, 100).tokens_then == 100


def test_extra_is_granted_only_where_all_of_it_may_be_sent_now(fleet):
    first = fleet.ask(LIMITS, 1, 10, extra_requests=1, extra_tokens=60)
    second = fleet.ask(LIMITS, 1, 10, extra_requests=1, extra_tokens=60)

    assert (first.requests, first.tokens) == (2, 70)
    assert (second.requests, second.tokens) == (1, 10)


def test_the_answer_says_what_the_window_holds_at_the_start(fleet):
    fleet.ask(LIMITS, 1, 10)
    fleet.now += SECOND

    grant = fleet.ask(LIMITS, 1, 20)

    assert (grant.requests_then, grant.tokens_then) == (2, 30)


def test_a_request_above_the_largest_never_fits(fleet):
    grant = fleet.ask(LIMITS, 1, 101)

    assert (grant.outcome, grant.wait) == (Outcome.NEVER, float("inf"))


def test_a_request_above_a_limit_that_was_lowered_goes_alone(fleet):
    lowered = replace(LIMITS, windows=limits_of(12, 50, PERIOD).windows)
    fleet.ask(lowered, 1, 10)

    assert PERIOD <= fleet.ask(lowered, 1, 80).wait < PERIOD + 1


def test_nothing_starts_before_a_pause_ends(fleet):
    fleet.ask(LIMITS, pause=7)

    assert fleet.ask(LIMITS, 1, 1).wait == 7


def test_starts_keep_their_distance(fleet):
    limits = replace(LIMITS, min_interval=0.5)

    assert [fleet.ask(limits, 1, 1).wait for _ in range(2)] == [0.0, 0.5]


def test_who_would_wait_for_very_long_asks_again(fleet):
    while (grant := fleet.ask(LIMITS, 1, 100)).outcome is Outcome.GRANTED:
        assert grant.wait <= 4 * PERIOD
    fleet.now += round(grant.wait * SECOND)

    assert grant.outcome is Outcome.ASK_AGAIN
    assert grant.wait < 1.1 * PERIOD
    assert fleet.ask(LIMITS, 1, 100).outcome is Outcome.GRANTED


@pytest.mark.parametrize(
    ("tokens", "least_requests", "least_tokens"), [(20, 0.95, 0), (400, 0, 0.97)], ids=["requests bind", "tokens bind"]
)
def test_hardly_any_of_the_quota_is_lost_to_the_time_that_grants_last(fleet, tokens, least_requests, least_tokens):
    limits = limits_of(600, 150_000, PERIOD)
    while fleet.now < BEGIN + 11 * PERIOD * SECOND:
        fleet.now += round(fleet.ask(limits, 1, tokens).wait * SECOND)
    steady = [it for it in fleet.granted if it.start >= BEGIN + PERIOD * SECOND]

    assert len(steady) >= least_requests * 10 * 600
    assert sum(it.tokens for it in steady) >= least_tokens * 10 * 150_000


def test_the_state_is_as_large_for_large_requests_as_for_small_ones(fleet, client):
    sizes = []
    for weight in (1, 1_000):
        fleet = Fleet(fleet.connection)
        limits = limits_of(600, 600 * weight, PERIOD)
        for _ in range(6_000):
            fleet.now += SECOND // 10
            fleet.ask(limits, 1, weight)
        sizes.append(client.memory_usage(key(fleet, "quota"), samples=0))

    assert sizes[0] == sizes[1] < 20_000


def test_a_limit_that_nobody_uses_is_forgotten(fleet, client):
    fleet.ask(limits_of(12, 100, 1.0), 1, 1)

    assert 2_000 <= client.pttl(key(fleet, "quota")) <= 5_000


def test_what_may_be_sent_for_longer_than_the_period_is_remembered_for_as_long(fleet, client):
    fleet.ask(replace(limits_of(12, 100, 0.1), validity=2.0), 1, 1)

    assert client.pttl(key(fleet, "quota")) >= 2_000


def test_a_limit_that_is_used_for_long_is_forgotten_too(fleet, client):
    limits = limits_of(600, 1_000, 1.0)
    for _ in range(1_000):
        fleet.now += SECOND // 100
        fleet.ask(limits, 1, 1)

    assert 2_000 <= client.pttl(key(fleet, "quota")) <= 5_000


def test_the_stores_own_clock_is_the_clock(fleet):
    store = fleet.store()
    store.now = -1

    assert store.reserve_blocking(Wish(LIMITS, 1, 100)).wait == 0
    assert 59 < store.reserve_blocking(Wish(LIMITS, 1, 100)).wait <= 60.25


@pytest.mark.parametrize("waiting", [TaskWaiting(), ThreadWaiting()], ids=["task", "thread"])
async def test_tasks_and_threads_ask_alike(fleet, waiting):
    grant = await fleet.store().reserve(waiting, Wish(LIMITS, 1, 100))

    assert (grant.outcome, grant.tokens) == (Outcome.GRANTED, 100)


async def test_what_never_fits_is_not_asked_for(fleet, client):
    await fleet.store().reserve(TaskWaiting(), Wish(LIMITS, 1, 101))

    assert not client.exists(key(fleet, "quota"))


@pytest.mark.parametrize("name", ["}{", "a:b", "line\nbreak", "\N{SNOWMAN}", "", "a b\0c"])
def test_a_name_may_hold_any_character(connection, name):
    store = ValkeyLimits(connection, name, "a", "news")

    assert store.reserve_blocking(Wish(LIMITS, 1, 1)).tokens_then == 1


def test_a_window_that_is_longer_than_what_is_kept_is_refused():
    with pytest.raises(ConfigurationError, match=r"1\.25 periods"):
        Limits(PERIOD, (Window(2 * PERIOD, 10),), 10)


# The store loses what it knew


def test_all_keep_to_their_shares_for_a_period_when_the_state_was_lost(fleet, client):
    epoch = fleet.ask(LIMITS, 1, 10).epoch
    client.delete(key(fleet, "quota"))
    fleet.now += SECOND

    first = fleet.ask(LIMITS, 1, 10, known_epoch=epoch)
    newcomer = fleet.ask(LIMITS, 1, 10, process="b")

    assert (first.outcome, first.shares_left, first.tokens) == (Outcome.SHARES, PERIOD, 0)
    assert newcomer.outcome is Outcome.SHARES


def test_who_finds_out_late_that_the_state_was_lost_does_not_begin_shares_again(fleet, client):
    epoch = fleet.ask(LIMITS, 1, 10).epoch
    client.delete(key(fleet, "quota"))
    fleet.now += SECOND
    fleet.ask(LIMITS, known_epoch=epoch)
    fleet.now += round(1.5 * PERIOD * SECOND)

    assert fleet.ask(LIMITS, 1, 10, process="b", known_epoch=epoch).outcome is Outcome.GRANTED


def test_shares_that_have_begun_do_not_begin_again(fleet):
    fleet.ask(LIMITS, begin_shares=PERIOD)
    fleet.now += 10 * SECOND

    assert fleet.ask(LIMITS, process="b", begin_shares=PERIOD).shares_left == PERIOD - 10


def test_when_shares_end_the_store_knows_what_was_sent_meanwhile(fleet):
    fleet.ask(LIMITS, begin_shares=PERIOD)
    fleet.now += round(PERIOD * SECOND)
    fleet.ask(LIMITS, sent=[Sent(1.0, 1, 90)])

    grant = fleet.ask(LIMITS, 1, 20, process="b")

    assert grant.outcome is Outcome.GRANTED
    assert PERIOD - 1 <= grant.wait < PERIOD


def test_when_shares_end_there_is_time_to_tell_the_last_of_them(fleet):
    fleet.ask(LIMITS, begin_shares=PERIOD)
    fleet.now += round(PERIOD * SECOND)

    assert fleet.ask(LIMITS, 1, 1).wait == PERIOD / 240


def test_when_the_stores_clock_was_set_far_back_all_keep_to_their_shares(fleet):
    fleet.ask(LIMITS, 1, 10)
    fleet.now -= 3_600 * SECOND

    assert fleet.ask(LIMITS, 1, 10).outcome is Outcome.SHARES


# Slots


def slots(sequence, wanted=1, *, needed=None, most=3, lease=10.0):
    return Slots(sequence, wanted if needed is None else needed, wanted, most, lease)


@on_the_store
@given(
    steps=st.lists(st.tuples(st.floats(0, 8), st.sampled_from("abcd"), st.integers(0, 3)), max_size=60),
)
def test_processes_never_hold_more_slots_than_there_are(connection, steps):
    fleet, held = Fleet(connection), {}
    for sequence, (gap, process, wanted) in enumerate(steps, start=1):
        fleet.now += round(gap * SECOND)
        grant = fleet.ask(LIMITS, process=process, slots=slots(sequence, wanted))
        held[process] = (grant.slots, fleet.now + 5 * SECOND)
        alive = {it: count for it, (count, until) in held.items() if until > fleet.now}

        assert sum(alive.values()) <= 3


def test_without_a_slot_nothing_is_granted(fleet):
    fleet.ask(LIMITS, 1, 1, slots=slots(1, 3))

    grant = fleet.ask(LIMITS, 1, 1, process="b", slots=slots(1))

    assert (grant.outcome, grant.requests, grant.slots, grant.all_slots) == (Outcome.NO_SLOT, 0, 0, 3)


def test_who_waits_longest_for_a_slot_is_first_to_get_one(fleet):
    fleet.ask(LIMITS, slots=slots(1, 3))
    fleet.now += 1
    fleet.ask(LIMITS, process="b", slots=slots(1))
    fleet.now += 1
    fleet.ask(LIMITS, process="c", slots=slots(1))
    fleet.ask(LIMITS, slots=slots(2, 2))

    assert fleet.ask(LIMITS, process="c", slots=slots(2)).slots == 0
    assert fleet.ask(LIMITS, process="b", slots=slots(2)).slots == 1


def test_the_slots_of_a_process_that_died_go_to_others_when_its_lease_ends(fleet):
    fleet.ask(LIMITS, slots=slots(1, 3))
    fleet.now += 9 * SECOND
    before = fleet.ask(LIMITS, process="b", slots=slots(1))
    fleet.now += 2 * SECOND

    assert before.slots == 0
    assert fleet.ask(LIMITS, process="b", slots=slots(2)).slots == 1


def test_the_slots_of_a_process_that_died_are_not_counted_for_long_where_there_are_plenty(fleet):
    fleet.ask(LIMITS, slots=slots(1, most=100))
    fleet.now += 11 * SECOND

    assert fleet.ask(LIMITS, process="b", slots=slots(1, most=100)).all_slots == 1


def test_a_process_that_died_while_it_waited_holds_up_nobody(fleet):
    fleet.ask(LIMITS, slots=slots(1, 3))
    fleet.ask(LIMITS, process="b", slots=slots(1))
    fleet.now += 9 * SECOND
    fleet.ask(LIMITS, slots=slots(2, 2))
    fleet.now += 2 * SECOND

    assert fleet.ask(LIMITS, process="c", slots=slots(1)).slots == 1


def test_a_process_that_lives_keeps_its_slots_for_longer_than_a_lease(fleet):
    for sequence in range(1, 10):
        fleet.now += 4 * SECOND
        fleet.ask(LIMITS, slots=slots(sequence, 3))

    assert fleet.ask(LIMITS, process="b", slots=slots(1)).slots == 0


def test_a_wish_that_was_overtaken_changes_no_slots(fleet):
    fleet.ask(LIMITS, slots=slots(2, 1))

    assert fleet.ask(LIMITS, slots=slots(1, 3)).slots == 1


def test_no_more_slots_are_had_than_were_needed_where_others_wait(fleet):
    fleet.ask(LIMITS, slots=slots(1, 3))
    fleet.ask(LIMITS, process="b", slots=slots(1))
    fleet.ask(LIMITS, slots=slots(2, 1))

    grant = fleet.ask(LIMITS, process="c", slots=slots(1, 3, needed=1))

    assert (grant.slots, grant.waiting) == (1, 1)


def test_those_who_wait_are_told_of_a_free_slot(fleet, client):
    fleet.ask(LIMITS, slots=slots(1, 3))
    fleet.ask(LIMITS, process="b", slots=slots(1))
    with client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(f"{fleet.connection.prefix}:news")
        listener.get_message(timeout=1)
        fleet.ask(LIMITS, slots=slots(2, 0))

        message = listener.get_message(timeout=1)

    assert message["data"] == f'{{"kind": "slot", "name": "{fleet.name}", "from": "a"}}'.encode()


# Garbage


def header(**changed):
    fields = dict.fromkeys(("version", "epoch", "period"), 1.0) | {f"field {number}": 1.0 for number in range(4, 22)}
    return PACKED_HEADER.pack(*(fields | changed).values())


@pytest.mark.parametrize(
    "content",
    [
        "text",
        b"\xff" * 168,
        header(version=2.0),
        header(epoch=float("nan")),
        header(epoch=float("inf")),
        header(period=-1.0),
        header(period=0.5),
        header(period=1e300),
        header(**{"field 8": 0.0}),
        header(**{"field 9": 1e9}),
        header(**{"field 9": 3.0}),
    ],
)
def test_garbage_in_the_place_of_the_quota_is_an_error_that_names_the_key(fleet, client, content):
    client.set(key(fleet, "quota"), content)

    with pytest.raises(StoreContentError) as error:
        fleet.ask(LIMITS, 1, 100, slots=slots(1))

    assert error.value.key == key(fleet, "quota")
    assert client.get(key(fleet, "quota")) == (content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("part", ["quota", "slots", "leases", "waiting"])
def test_a_value_of_another_type_is_an_error_that_names_the_key(fleet, client, part):
    fleet.ask(LIMITS, 1, 1, process="b", slots=slots(1, 3))
    client.delete(key(fleet, part))
    client.rpush(key(fleet, part), "garbage")

    with pytest.raises(StoreContentError) as error:
        fleet.ask(LIMITS, 1, 1, slots=slots(1))

    assert error.value.key == key(fleet, part)


@pytest.mark.parametrize(
    "packed", [b"", b"1 2 3", struct.pack("<3d", -1, 1, 1), struct.pack("<3d", 1, 1, float("nan"))]
)
def test_garbage_in_the_place_of_slots_is_an_error_that_names_the_key(fleet, client, packed):
    client.hset(key(fleet, "slots"), "a", packed)

    with pytest.raises(StoreContentError) as error:
        fleet.ask(LIMITS, 1, 1, slots=slots(1))

    assert error.value.key == key(fleet, "slots")


def test_entries_that_are_cut_off_are_an_error_that_names_the_key(fleet, client):
    for _ in range(6):
        fleet.now += SECOND * 10
        fleet.ask(LIMITS, 1, 16)
    client.set(key(fleet, "quota"), client.get(key(fleet, "quota"))[:-1])

    with pytest.raises(StoreContentError) as error:
        fleet.ask(LIMITS, giving_back=[GivingBack(BEGIN + 10 * SECOND, 5, 1, 1)])

    assert error.value.key == key(fleet, "quota")


def answer(*numbers):
    return struct.pack("<12q", *numbers, *[0] * (12 - len(numbers)))


@pytest.mark.parametrize(
    "reply",
    [None, b"OK", [0] * 12, answer()[1:], answer(9), answer(0, -1), answer(0, 2**60)],
)
def test_an_answer_that_is_not_the_scripts_is_an_error_that_names_the_key(fleet, reply, monkeypatch):
    monkeypatch.setattr(type(fleet.connection), "run_blocking", lambda *arguments: reply)

    with pytest.raises(StoreContentError) as error:
        fleet.ask(LIMITS, 1, 1, slots=NO_SLOTS)

    assert error.value.key == key(fleet, "quota")
