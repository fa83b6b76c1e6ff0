"""The limit against a server that counts in other ways than it thinks: few refusals, all of the quota used.

Virtual time, and the simulator's own arithmetic for the server. Each request takes a while to get there, another one
each time, so that calls do not arrive as far apart as they were sent.
"""

import asyncio
import random

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


class Server:
    """Azure as far as its quota goes; `charge` is what it takes a request for, of what the client takes it for."""

    def __init__(self, token_window, *, request_window, charge=1.0, requests=REQUESTS):
        self.quota = ServerQuota(
            -17.0,
            request_limit=requests,
            token_limit=TOKENS,
            period=PERIOD,
            token_window=token_window,
            request_window=request_window,
            count_refused=False,
        )
        self.charge = charge
        self.random = random.Random(7)
        self.admitted, self.refused = [], []

    async def ask(self, tokens):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.random.uniform(0.005, 0.08))
        refusal = self.quota.admit(loop.time(), tokens * self.charge)
        if refusal is not None:
            self.refused.append(loop.time())
            raise RefusalError(refusal)
        self.admitted.append((loop.time(), tokens * self.charge))
        await asyncio.sleep(self.random.uniform(0.5, 3))


async def saturate(server, tokens_of_a_call):
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
        await server.ask(tokens)

    async def agent():
        while loop.time() < WINDOWS * PERIOD:
            await ask(tokens_of_a_call())

    await asyncio.gather(*(agent() for _ in range(AGENTS)))


def refused_after_the_first_window(server):
    return sum(time > PERIOD for time in server.refused)


def share_of_the_quota(server, quota, weight=lambda tokens: tokens):
    """What was admitted in the windows after the first, as a share of all that fits into so many."""
    admitted = sum(weight(tokens) for time, tokens in server.admitted if PERIOD < time <= WINDOWS * PERIOD)
    return admitted / (quota * (WINDOWS - 1))


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
