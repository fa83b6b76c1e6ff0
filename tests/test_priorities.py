"""`priority=` and `with priority(...)`: who goes first under saturation, and that nobody waits for ever.

The bounds follow from one rule: a step of priority is worth one period. A call that has waited for that long is behind
nobody who comes later, so what it waits for then is what waits already, and room in the server's window.
"""

import asyncio
from contextlib import asynccontextmanager, nullcontext

import pytest

from resilience_kit import ConfigurationError, agent, priority, rate_limited
from resilience_kit.priorities import priority_else

pytestmark = pytest.mark.looptime

PERIOD = 60.0
SIXTH = PERIOD / 6


class Limited:
    """A function under a limit, and whom it has served, in their order."""

    def __init__(self, *, seconds=0.0, **limit):
        self.served = []
        self.seconds = seconds
        limit = {"requests_per_minute": 6, "max_concurrent": 100, "min_interval": 0, **limit}
        self.ask = rate_limited("chat", tokens=lambda _, tokens=0: tokens, **limit)(self._answer)

    async def _answer(self, label, tokens=0):
        self.served.append(label)
        await asyncio.sleep(self.seconds)

    async def order_of(self, *calls):
        """The order in which calls are served that wait for the same room; each is a label and its block."""
        tasks = [asyncio.create_task(self.ask("takes the room that there is"))]
        for label, block in calls:
            with block:
                tasks.append(asyncio.create_task(self.ask(label)))
        await asyncio.gather(*tasks)
        return self.served[1:]

    @asynccontextmanager
    async def saturated(self, *, agents, urgency, tokens=0):
        """Agents ask all the time, each again as soon as it has its answer."""

        async def work():
            with priority(urgency):
                while True:
                    await self.ask("busy", tokens)

        tasks = [asyncio.create_task(work()) for _ in range(agents)]
        await asyncio.sleep(PERIOD)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def seconds_of(call):
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(20 * PERIOD):
        await call
    return loop.time() - started


# Who goes first


async def test_under_saturation_what_is_urgent_goes_before_all_that_came_sooner():
    background, urgent = (("background", priority(1)) for _ in range(5)), (("urgent", priority(0)) for _ in range(3))

    assert await Limited().order_of(*background, *urgent) == ["urgent"] * 3 + ["background"] * 5


async def test_what_is_urgent_gets_the_next_slot_that_is_free():
    limited = Limited(seconds=1, max_concurrent=1, requests_per_minute=600)
    calls = ("background", priority(1)), ("usual", nullcontext()), ("urgent", priority(-1))

    assert await limited.order_of(*calls) == ["urgent", "usual", "background"]


async def test_a_fraction_of_a_step_counts_too():
    calls = ("later", priority(0.02)), ("sooner", priority(0.01))

    assert await Limited().order_of(*calls) == ["sooner", "later"]


# Nobody waits for ever


@pytest.mark.parametrize("steps", [1, 2, 3.5])
async def test_the_wait_of_a_low_priority_has_a_bound_under_saturation(steps):
    agents, a_sixth_of_the_quota = 20, 10
    limited = Limited(requests_per_minute=60)
    async with limited.saturated(agents=agents, urgency=0):
        with priority(steps):
            waited = await seconds_of(limited.ask("low"))

    overtaken = steps * PERIOD
    those_ahead_by_then = agents / a_sixth_of_the_quota * SIXTH
    assert overtaken <= waited <= overtaken + those_ahead_by_then + SIXTH


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_large_request_is_served_within_a_bound_among_small_ones_that_may_be_more_urgent(steps):
    agents, small, quota = 20, 20, 1_000
    # small ones one by one, so that room for a large one comes only if it is kept
    limited = Limited(requests_per_minute=6_000, tokens_per_minute=quota, min_interval=1)
    async with limited.saturated(agents=agents, urgency=-steps, tokens=small):
        waited = await seconds_of(limited.ask("large", 0.4 * quota))

    # the small ones that are ahead fit into one window, and once it is first nothing goes before there is room for it
    assert agents * small <= quota
    assert waited <= steps * PERIOD + PERIOD + PERIOD


# What a block says


async def test_a_block_beats_the_decorators_priority():
    calls = ("usual", priority(0)), ("as decorated", nullcontext()), ("urgent", priority(-6))

    assert await Limited(priority=-5).order_of(*calls) == ["urgent", "as decorated", "usual"]


async def order_beside_one_of_priority_0(*blocks):
    """Whether a call goes first that is made inside of blocks, or one of priority 0 that waits since before."""
    limited = Limited()
    first = asyncio.create_task(limited.ask("takes the room that there is"))
    usual = asyncio.create_task(limited.ask("usual"))
    await asyncio.sleep(0)
    outer, inner = blocks
    with outer, inner:
        inside = asyncio.create_task(limited.ask("inside"))
    await asyncio.gather(first, usual, inside)
    return limited.served[1:]


@pytest.mark.parametrize(
    ("outer", "inner", "goes_first"),
    [
        (lambda: priority(1), lambda: priority(-1), "inside"),
        (lambda: priority(-1), lambda: priority(1), "usual"),
        (lambda: agent("Urgent", priority=-1), lambda: priority(1), "usual"),
        (lambda: priority(1), lambda: agent("Urgent", priority=-1), "inside"),
        (lambda: priority(-1), lambda: agent("Silent"), "inside"),
        (lambda: agent("Urgent", priority=-1), lambda: agent("Silent"), "inside"),
    ],
    ids=[
        "inner -1",
        "inner 1",
        "agent, then 1",
        "1, then agent",
        "-1, then an agent without",
        "agent -1, then without",
    ],
)
async def test_the_innermost_priority_counts_whoever_says_it(outer, inner, goes_first):
    assert (await order_beside_one_of_priority_0(outer(), inner()))[0] == goes_first


@pytest.mark.parametrize(
    "inner", [lambda: priority(9), lambda: agent("Background", priority=9)], ids=["priority", "agent"]
)
async def test_after_a_block_the_one_around_it_counts_again(inner):
    limited = Limited()
    tasks = [asyncio.create_task(limited.ask(label)) for label in ("takes the room that there is", "usual")]
    await asyncio.sleep(0)
    with priority(-1):
        with inner():
            pass
        tasks.append(asyncio.create_task(limited.ask("urgent")))
    tasks.append(asyncio.create_task(limited.ask("outside")))
    await asyncio.gather(*tasks)

    assert limited.served[1:] == ["urgent", "usual", "outside"]


async def test_tasks_that_are_started_inside_keep_the_priority_after_the_block():
    limited = Limited()

    async def later():
        await asyncio.sleep(1)
        await limited.ask("urgent")

    with priority(-1):
        started_inside = asyncio.create_task(later())
    await asyncio.gather(*(limited.ask(label) for label in ("first", "usual")), started_inside)

    assert limited.served == ["first", "urgent", "usual"]


async def test_a_thread_that_is_started_inside_has_the_priority():
    with priority(-1):
        assert await asyncio.to_thread(priority_else, 0) == -1


async def test_a_generator_that_is_ended_in_another_context_ends_without_an_error():
    async def write():
        with priority(-1):
            yield "It"
            yield "is"

    failed = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    words = write()
    assert await anext(words) == "It"
    await asyncio.create_task(words.aclose())
    assert failed == []


@pytest.mark.parametrize("make", [lambda: priority(-1), lambda: agent("MathAgent")], ids=["priority", "agent"])
def test_a_block_that_is_open_is_not_entered_again_for_it_would_be_left_open(make):
    block = make()
    with block, pytest.raises(ConfigurationError, match="entered already"):
        block.__enter__()
    with block:
        pass


def test_a_priority_cannot_be_put_on_a_function_which_would_run_outside_of_the_block():
    with pytest.raises(TypeError, match="not callable"):

        @priority(-1)
        async def work():
            pass


@pytest.mark.parametrize("value", ["high", None, True, float("nan"), float("inf"), 10**400], ids=str)
def test_a_priority_is_a_number(value):
    with pytest.raises(ConfigurationError, match=r"priority\("):
        priority(value)
