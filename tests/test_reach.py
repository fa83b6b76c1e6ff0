"""The limit against a server that counts in other ways than it thinks: few refusals, all of the quota used.

Virtual time, and the simulator's own arithmetic for the server. Each request takes a while to get there, another one
each time, so that calls do not arrive as far apart as they were sent.
"""

import asyncio
import itertools
import random
from collections import deque

import pytest

from resilience_kit import resilient
from resilience_kit.testing.server_windows import ServerQuota

pytestmark = pytest.mark.looptime

REQUESTS, TOKENS, PERIOD, AGENTS = 600, 150_000, 60.0, 64
WINDOWS = 5


class RefusalError(Exception):
    """What a client raises for Azure's 429."""

    status_code = 429

    def __init__(self, refusal):
        kind = "call" if refusal.reason == "requests" else "token"
        super().__init__(f"Requests have exceeded {kind} rate limit of your current OpenAI S0 pricing tier.")
        self.headers = {"retry-after-ms": str(refusal.retry_after * 1_000)}


class Answer:
    """What a client returns, as far as the limit looks at it."""

    def __init__(self, headers):
        self.headers = headers


class Server:
    """Azure as far as its quota goes.

    `charge` is what it takes a request for, of what the client takes it for, or `fixed_charge` whatever that is. Its
    headers are "off", "remaining" alone or "full", and those of so many answers before where they lag.
    """

    def __init__(
        self,
        token_window,
        *,
        request_window,
        charge=1.0,
        requests=REQUESTS,
        headers="off",
        lag=0,
        fixed_charge=None,
        longest_way=0.08,
    ):
        self.quota = ServerQuota(
            -17.0,
            request_limit=requests,
            token_limit=TOKENS,
            period=PERIOD,
            token_window=token_window,
            request_window=request_window,
            count_refused=False,
        )
        self.charge, self.fixed_charge = charge, fixed_charge
        self.headers, self.levels = headers, deque(maxlen=lag + 1)
        self.longest_way = longest_way
        self.random = random.Random(7)
        self.admitted, self.refused = [], []

    async def ask(self, tokens):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.random.uniform(0.005, self.longest_way))
        charged = tokens * self.charge if self.fixed_charge is None else self.fixed_charge
        refusal = self.quota.admit(loop.time(), charged)
        if refusal is not None:
            self.refused.append(loop.time())
            raise RefusalError(refusal)
        self.admitted.append((loop.time(), charged))
        headers = self.level_headers(loop.time())
        await asyncio.sleep(self.random.uniform(0.5, 3))
        return Answer(headers)

    def level_headers(self, now):
        self.levels.append(self.quota.level(now))
        level, headers = self.levels[0], {}
        for what in ("requests", "tokens") if self.headers != "off" else ():
            headers[f"x-ratelimit-remaining-{what}"] = str(int(getattr(level, f"remaining_{what}")))
            if self.headers == "full":
                headers[f"x-ratelimit-limit-{what}"] = str(int(getattr(level, f"{what.removesuffix('s')}_limit")))
                headers[f"x-ratelimit-reset-{what}"] = f"{getattr(level, f'reset_{what}'):.3f}"
        return headers


async def saturate(server, tokens_of_a_call, *, agents=AGENTS, windows=WINDOWS):
    """Ask as fast as the limit lets all agents, for some windows. An answer that is lost ends the test."""
    loop = asyncio.get_running_loop()

    @resilient(
        "chat",
        requests_per_minute=REQUESTS,
        tokens_per_minute=TOKENS,
        max_concurrent=64,
        min_interval=0,
        tokens=lambda tokens: tokens,
        max_retries=20,
    )
    async def ask(tokens):
        return await server.ask(tokens)

    async def agent():
        while loop.time() < windows * PERIOD:
            await ask(tokens_of_a_call())

    await asyncio.gather(*(agent() for _ in range(agents)))


async def share_a_third(server, *, windows):
    """Use a third of the tokens in another program, evenly, which asks no limit; returns what it was admitted for."""
    loop, admitted = asyncio.get_running_loop(), []
    while loop.time() < windows * PERIOD:
        await asyncio.sleep(700 / (TOKENS / 3 / PERIOD) * server.random.uniform(0.5, 1.5))
        if server.quota.admit(loop.time(), 700) is None:
            admitted.append((loop.time(), 700))
    return admitted


def set_quota(server, share):
    server.quota.request_limit, server.quota.token_limit = share * REQUESTS, share * TOKENS


def refused_after_the_first_window(server):
    return sum(time > PERIOD for time in server.refused)


def refused_between(server, first, last):
    """How many were refused in some of the windows."""
    return sum(first * PERIOD < time <= last * PERIOD for time in server.refused)


def share_of_the_quota(server, quota, weight=lambda tokens: tokens, windows=WINDOWS):
    """What was admitted in the windows after the first, as a share of all that fits into so many."""
    admitted = sum(weight(tokens) for time, tokens in server.admitted if PERIOD < time <= windows * PERIOD)
    return admitted / (quota * (windows - 1))


windows = pytest.mark.parametrize(
    ("token_window", "request_window"), [("fixed", 1), ("fixed", 10), ("sliding", 1), ("sliding", 10)]
)


@windows
async def test_tokens_are_used_to_the_last_and_next_to_nothing_is_refused(token_window, request_window):
    server = Server(token_window, request_window=request_window)
    await saturate(server, lambda: server.random.randint(200, 3_000))

    assert refused_after_the_first_window(server) <= 0.01 * len(server.admitted)
    assert share_of_the_quota(server, TOKENS) >= 0.95


@windows
async def test_a_server_that_counts_a_quarter_more_is_found_out(token_window, request_window):
    server = Server(token_window, request_window=request_window, charge=1.25)
    await saturate(server, lambda: server.random.randint(200, 3_000))

    assert refused_after_the_first_window(server) <= 0.03 * len(server.admitted)
    assert share_of_the_quota(server, TOKENS) >= 0.95


@pytest.mark.parametrize(("request_window", "share"), [(1, 0.93), (10, 0.99)])
async def test_requests_are_used_to_the_last_and_none_is_refused_after_the_first_window(request_window, share):
    server = Server("fixed", request_window=request_window)
    await saturate(server, lambda: 10)

    assert refused_after_the_first_window(server) == 0
    assert share_of_the_quota(server, REQUESTS, weight=lambda _: 1) >= share


@pytest.mark.parametrize("longest_way", [0.03, 0.055])
async def test_with_windows_of_a_second_calls_that_take_up_to_fifty_milliseconds_longer_are_not_refused(longest_way):
    server = Server("fixed", request_window=1, longest_way=longest_way)
    await saturate(server, lambda: 10)

    assert refused_after_the_first_window(server) == 0
    assert share_of_the_quota(server, REQUESTS, weight=lambda _: 1) >= 0.95


# What the kit promises in each mode of the server, on a network that takes 5 to 30 ms.

headers = pytest.mark.parametrize(("headers", "lag"), [("off", 0), ("remaining", 0), ("full", 0), ("full", 8)])
headers_or_none = pytest.mark.parametrize(("headers", "lag"), [("off", 0), ("full", 8)])


def server_of(token_window, request_window, headers, lag, **options):
    return Server(token_window, request_window=request_window, headers=headers, lag=lag, longest_way=0.03, **options)


@windows
@headers
async def test_nearly_nothing_is_refused_and_all_tokens_are_used(token_window, request_window, headers, lag):
    server = server_of(token_window, request_window, headers, lag)
    await saturate(server, lambda: server.random.randint(200, 3_000), agents=16, windows=3)

    assert refused_after_the_first_window(server) == 0
    assert share_of_the_quota(server, TOKENS, windows=3) >= 0.95


# With windows of a second their margin leaves a part of each unused.
@pytest.mark.parametrize(("request_window", "share"), [(1, 0.95), (10, 0.98)])
@headers
async def test_requests_are_used_whatever_the_headers_say(request_window, share, headers, lag):
    server = server_of("sliding", request_window, headers, lag)
    await saturate(server, lambda: 10, windows=2)

    assert refused_after_the_first_window(server) == 0
    assert share_of_the_quota(server, REQUESTS, weight=lambda _: 1, windows=2) >= share


@windows
@headers
async def test_absent_max_tokens_that_are_charged_dearly_are_found_out(token_window, request_window, headers, lag):
    server = server_of(token_window, request_window, headers, lag, fixed_charge=128_000)
    await saturate(server, lambda: server.random.randint(200, 3_000), agents=16, windows=10)

    # the second window is asked for as much as the first, of which one refusal may have been a whim of the server's
    assert refused_between(server, 1, 2) <= 6
    # and from then on each trial of more than one request costs one, where no header says that there is no room
    assert refused_between(server, 2, 10) <= (3 if headers == "off" else 0)
    assert share_of_the_quota(server, 128_000, windows=10) == 1


@windows
@headers_or_none
async def test_one_large_request_among_small_ones_is_refused_no_more_than_they(
    token_window, request_window, headers, lag
):
    server, count = server_of(token_window, request_window, headers, lag), itertools.count()

    def tokens_of_a_call():
        return 60_000 if next(count) % 115 == 114 else server.random.randint(200, 3_000)

    await saturate(server, tokens_of_a_call, agents=16, windows=8)

    assert refused_after_the_first_window(server) <= 1
    # what is free stays so until it is enough for the large one, or that would never get its turn
    assert share_of_the_quota(server, TOKENS, windows=8) >= 0.85


@windows
@headers_or_none
async def test_a_window_that_somebody_else_has_filled_is_no_lasting_loss(token_window, request_window, headers, lag):
    server = server_of(token_window, request_window, headers, lag)
    server.quota.admit(0.0, 0.6 * TOKENS)
    await saturate(server, lambda: server.random.randint(200, 3_000), agents=16, windows=4)

    assert refused_after_the_first_window(server) <= 1
    assert share_of_the_quota(server, TOKENS, windows=4) >= 0.95


# How much another program leaves varies, and is found out by asking for too much now and then; a window of a second
# that the other program has a part in looks like a longer one that is full.
@pytest.mark.parametrize(("request_window", "refused"), [(1, 0.04), (10, 0.03)])
@pytest.mark.parametrize("token_window", ["fixed", "sliding"])
@headers_or_none
async def test_what_another_program_leaves_is_used(token_window, request_window, refused, headers, lag):
    server = server_of(token_window, request_window, headers, lag)
    _, others = await asyncio.gather(
        saturate(server, lambda: server.random.randint(200, 3_000), agents=16, windows=6),
        share_a_third(server, windows=6),
    )
    taken = sum(tokens for time, tokens in others if PERIOD < time <= 6 * PERIOD)

    assert refused_after_the_first_window(server) <= refused * len(server.admitted)
    assert share_of_the_quota(server, TOKENS, windows=6) >= 0.95 * (1 - taken / (TOKENS * 5))


# Without a header nobody says that the quota is whole again: that is found out after 300 requests, which takes some
# windows of half the quota. A sliding window that is halved is overfull at first, and refuses all that ask.
@pytest.mark.parametrize(("headers", "share"), [("off", 0.7), ("full", 0.95)], ids=["off", "full"])
@windows
async def test_a_quota_that_is_halved_and_doubled_back_is_followed(token_window, request_window, headers, share):
    server, loop = server_of(token_window, request_window, headers, 0), asyncio.get_running_loop()
    loop.call_at(3 * PERIOD, set_quota, server, 0.5)
    loop.call_at(6 * PERIOD, set_quota, server, 1)
    await saturate(server, lambda: server.random.randint(200, 3_000), agents=16, windows=10)

    assert refused_after_the_first_window(server) <= 0.04 * len(server.admitted)
    # two windows, three halves, and four
    assert share_of_the_quota(server, TOKENS, windows=10) * 9 >= share * 7.5
