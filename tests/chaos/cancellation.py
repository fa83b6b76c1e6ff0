"""One call, cancelled at its first await point, then at its second, and so on until it ends before it is cancelled.

Some are closed there instead, as a coroutine is whose event loop will never run again.
"""

import asyncio
from itertools import count

from resilience_kit import circuit_protected, rate_limited, resilient, retry_on_429, token_budget

from .clients import client_of
from .services import answer_to, piece_of, text_of
from .witness import Ending, held

# A call that has not ended after so many cancellations has no end.
_MOST_POINTS = 300
# One call at a time in 10 ms, so that each has to wait for its turn.
_SLOW = {"requests_per_minute": 6, "period": 0.06, "max_concurrent": 1, "min_interval": 0}
# The libraries below await something when they are closed, which a coroutine that is closed must not.
_OVER_HTTP = ("a client's call", "a client's stream")
_HASTY = {"initial_backoff": 0.002, "max_backoff": 0.004}


class _CancelledAt:
    """An awaitable that runs a coroutine, and at its n-th suspension cancels the task that awaits it, or closes it."""

    def __init__(self, coroutine, point, *, is_closed):
        self._coroutine = coroutine
        self._point = point
        self._is_closed = is_closed
        self.is_reached = False

    def __await__(self):
        points = 0
        value, error = None, None
        while True:
            try:
                yielded = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            points += 1
            value, error = None, None
            if points == self._point:
                self.is_reached = True
                if self._is_closed:
                    self._coroutine.close()
                    raise asyncio.CancelledError
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            try:
                value = yield yielded
            except BaseException as thrown:
                error = thrown


async def cancel_everywhere(world, azure):
    """Cancel a call of each kind at each of its await points."""
    ways = _ways(world, azure)
    for order, (name, call) in zip(world.orders, ways.items(), strict=False):
        for point in count(1):
            is_closed = order.is_dropped and name not in _OVER_HTTP
            step = _CancelledAt(call(order), point, is_closed=is_closed)
            try:
                answer = await asyncio.create_task(_run(step))
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                world.witness.problems.append(f"ended: {name} cancelled at await point {point} ended in {error!r}")
                break
            else:
                if step.is_reached:
                    world.witness.problems.append(f"ended: {name} swallowed its cancellation at await point {point}")
                    break
            await _settle()
            left = list(held())
            if left:
                world.witness.problems += [
                    f"{problem}, after {name} was cancelled at point {point}" for problem in left
                ]
                break
            if not step.is_reached:
                world.witness.endings[order.number] = Ending(order.number, answer)
                break
            if point == _MOST_POINTS:
                world.witness.problems.append(f"ended: {name} has no end after {point} cancellations")
                break


async def _run(step):
    return await step


async def _settle():
    """Let tasks that follow a dropped stream or a closed connection run."""
    for _ in range(200):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            break
        await asyncio.wait(others, timeout=0.01)


def _ways(world, azure):  # noqa: C901 - it is as long as there are ways, and each is one or two lines
    client = client_of(world, azure, "cancelled", is_async=True, timeout=5.0)
    witness = world.witness

    async def ask(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            return answer_to(order.number)

    async def ask_in_vain(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            await asyncio.sleep(0)
            if next(attempts) % 2:
                raise RuntimeError("Rate limit is exceeded. Try again in 3 ms.")
            return answer_to(order.number)

    async def read(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            for piece in answer_to(order.number).partition(" "):
                await asyncio.sleep(0)
                yield piece

    attempts = count(1)
    stack = {**_SLOW, **_HASTY}

    def called(function):
        return lambda order: function(order, [{"role": "user", "content": order.prompt}], order.max_tokens)

    def reading(function):
        async def all_of(order):
            stream = function(order, [{"role": "user", "content": order.prompt}], order.max_tokens)
            return "".join([piece async for piece in stream])

        return all_of

    async def chat(order):
        request = {"model": "gpt-4o", "messages": [{"role": "user", "content": order.prompt}], "max_tokens": 8}
        return text_of(await client.chat.completions.create(**request, user=str(order.number)))

    async def chat_stream(order):
        request = {"model": "gpt-4o", "messages": [{"role": "user", "content": order.prompt}], "max_tokens": 8}
        stream = await client.chat.completions.create(**request, user=str(order.number), stream=True)
        return "".join([piece_of(chunk) async for chunk in stream])

    ways = {
        "@rate_limited": called(rate_limited("cancel limit", tokens=1, **_SLOW)(ask)),
        "@retry_on_429": called(retry_on_429(**_HASTY)(ask_in_vain)),
        "@circuit_protected": called(circuit_protected("cancel circuit")(ask)),
        "@token_budget": called(token_budget("cancel budget", budget_tokens=100, per=0.02, on_exceed="wait")(ask)),
        "@resilient": called(resilient("cancel stack", agent="cancel", budget_tokens=10**9, **stack)(ask_in_vain)),
        "a stream": reading(resilient("cancel stream", agent="cancel", **stack)(read)),
        "a limited stream": reading(rate_limited("cancel reading", **_SLOW)(read)),
        "a client's call": chat,
        "a client's stream": chat_stream,
    }
    # another scenario begins with another one: each has fewer calls than there are ways
    names = list(ways)
    first = world.scenario.seed % len(names)
    return {name: ways[name] for name in names[first:] + names[:first]}
