"""Runs a scenario: its calls, with all that is to happen to them and around them."""

import asyncio
import gc
import logging
import random
import threading
import time
import warnings
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from anyio._backends._asyncio import _task_states

from examples.multi_agent.offline_responder import respond
from resilience_kit import pricing, resilient, token_counting
from resilience_kit.testing import isolated
from resilience_kit.virtual_time import VirtualTimeLoop

from . import agents, fleet
from .cancellation import cancel_everywhere
from .clients import ask_async, ask_blocking, clients_of
from .disturbances import heard_unraisable, jumping_clock
from .scenario import Order, Scenario, draw, orders_of
from .services import (
    MODEL,
    AsyncService,
    SyncService,
    VirtualService,
    read_all,
    read_all_blocking,
    simulator_of,
    text_of,
)
from .witness import CircuitModel, Death, Ending, Witness, clock, without_frames

NAME = "chaos"
# Whatever happens, all calls have ended after so many seconds, or one of them never will.
PATIENCE = 30.0


@dataclass(slots=True)
class World:
    """A scenario that is being run, and all that belongs to it.

    Attributes:
        abandoned: The calls that nobody can say the end of: their loop was closed or their process is another one.
        ended_elsewhere: What calls in other processes came to.
        slowest: The longest that a call in another process took to begin after the kit had let it go.
        unraisable: What went wrong in the kit where nobody can catch it.
        stats: The simulator's record at the end.
        charged: What the service says that its answers used.
    """

    scenario: Scenario
    witness: Witness
    orders: list[Order]
    azure: Any = None
    abandoned: set[int] = field(default_factory=set)
    ended_elsewhere: list[str] = field(default_factory=list)
    slowest: float = 0.0
    unraisable: list[str] = field(default_factory=list)
    stats: Any = None
    charged: float | None = None


def warm_up() -> None:
    """Load what a process loads once, so that it does not look like something that a scenario left."""
    token_counting.load(MODEL)
    pricing.load(MODEL)
    # what is loaded stays: looking through it again after each scenario would take most of the time
    gc.collect()
    gc.freeze()
    # of a connection that a closed loop has left, it says that it cannot be closed any more
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextmanager
def world_of(scenario: Scenario):
    """Make all that a scenario needs, and clean up after it."""
    random.seed(scenario.seed)
    given = scenario.resilience
    has_model = scenario.kind in ("virtual", "tasks", "agents")
    # the example leaves the number of trials to the default
    trials = 1 if scenario.kind == "agents" else given.half_open_max_calls
    model = CircuitModel(given.failure_threshold, given.recovery_timeout, given.success_threshold, trials, clock)
    world = World(scenario, Witness(clock, model if has_model else None), orders_of(scenario))
    with ExitStack() as stack:
        stack.enter_context(isolated())
        stack.enter_context(world.witness.watching_admissions())
        stack.enter_context(jumping_clock(scenario.disturbances.clock_jumps))
        stack.enter_context(heard_unraisable(world.unraisable))
        yield world


def run(world: World) -> None:
    """Run a scenario to its end."""
    try:
        _RUNS[world.scenario.kind](world)
    finally:
        world.witness.let_go()


def prepare(kind: str) -> None:
    """Start what a process starts once, so that it does not look like something that a scenario left."""
    for start in {
        "agents": [agents.telemetry],
        "store": [fleet.store],
        "processes": [fleet.store, fleet.processes],
    }.get(kind, ()):
        start()


# What the calls go through


def options_of(scenario: Scenario) -> dict[str, Any]:
    """The parameters of @resilient."""
    limits, given = scenario.limits, scenario.resilience
    return {
        "requests_per_minute": limits.requests,
        "tokens_per_minute": limits.tokens,
        "period": limits.period,
        "max_concurrent": limits.max_concurrent,
        "min_interval": limits.min_interval,
        "max_wait": limits.max_wait,
        "adaptive": limits.adaptive,
        "max_retries": given.max_retries,
        "initial_backoff": given.backoff,
        "max_backoff": 4 * given.backoff,
        "max_retry_after": 2.0,
        "failure_threshold": given.failure_threshold,
        "recovery_timeout": given.recovery_timeout,
        "success_threshold": given.success_threshold,
        "half_open_max_calls": given.half_open_max_calls,
        "budget_tokens": given.budget_tokens,
    }


def agent_of(order: Order) -> str:
    """Whose call it is: nobody knows what a stream that is left has used, so that those have a budget of their own."""
    may_be_cut_short = order.cancelled_after is not None or order.timeout is not None
    is_left = order.items is not None or order.dies or (order.pause > 0 and may_be_cut_short)
    return "part" if order.is_stream and is_left else "whole"


def _tokens(order: Order, messages: Any, max_tokens: int) -> int:
    return order.tokens


def _arguments(order: Order) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": order.prompt}], "max_tokens": order.max_tokens}


def _async_functions(world: World, service: Any, agent: str) -> tuple[Any, Any]:
    protect = resilient(NAME, agent=agent, tokens=_tokens, **options_of(world.scenario))
    witness = world.witness

    @protect
    async def ask(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            answer = await service.ask(order)
            if order.dies:
                raise Death
            witness.use(agent, answer.usage.total_tokens)
            return answer

    @protect
    async def read(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            used = 0
            async with aclosing(service.read(order)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if order.dies:
                        raise Death
                    used = chunk.usage.total_tokens if chunk.usage else used
            witness.use(agent, used)

    return ask, read


def _sync_functions(world: World, service: Any, agent: str) -> tuple[Any, Any]:
    protect = resilient(NAME, agent=agent, tokens=_tokens, **options_of(world.scenario))
    witness = world.witness

    @protect
    def ask(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            answer = service.ask(order)
            if order.dies:
                raise SystemExit
            witness.use(agent, answer.usage.total_tokens)
            return answer

    @protect
    def read(order, messages, max_tokens):
        with witness.function(order.number, order.tokens):
            used = 0
            for chunk in service.read(order):
                yield chunk
                used = chunk.usage.total_tokens if chunk.usage else used
            witness.use(agent, used)

    return ask, read


# Callers


async def drive(world: World, order: Order, functions: dict[str, Any], ask: Any = None) -> None:
    """Make one call as its order says, and note what it came to."""
    task = asyncio.current_task()
    await asyncio.sleep(order.start)
    timer = None
    if order.cancelled_after is not None:
        timer = asyncio.get_running_loop().call_later(order.cancelled_after, _cancel, world, order, task)
    ending = Ending(order.number)
    try:
        async with asyncio.timeout(order.timeout):
            ending.answer = await (ask or _ask)(order, functions)
    except GeneratorExit:
        # the loop was closed under it
        raise
    except BaseException as error:
        ending.error = without_frames(error)
    finally:
        if timer is not None:
            timer.cancel()
    world.witness.endings[order.number] = ending


async def _ask(order: Order, functions: dict[str, Any]) -> str:
    ask, read = functions[agent_of(order)]
    if order.is_stream:
        return await read_all(order, read(order, **_arguments(order)))
    return text_of(await ask(order, **_arguments(order)))


def _cancel(world: World, order: Order, task: Any) -> None:
    world.witness.cancelled.add(order.number)
    task.cancel()


def drive_blocking(world: World, order: Order, functions: dict[str, Any], ask: Any = None) -> None:
    """Make one call in this thread, which dies if the order says so."""
    time.sleep(order.start)
    ending = Ending(order.number)
    try:
        ending.answer = (ask or _ask_blocking)(order, functions)
    except BaseException as error:
        ending.error = without_frames(error)
        if isinstance(error, SystemExit):
            raise
    finally:
        world.witness.endings[order.number] = ending


def _ask_blocking(order: Order, functions: dict[str, Any]) -> str:
    ask, read = functions[agent_of(order)]
    if not order.is_stream:
        return text_of(ask(order, **_arguments(order)))
    return read_all_blocking(order, read(order, **_arguments(order)))


# Kinds


def _run_tasks(world: World) -> None:
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        asyncio.run(
            _all_in_tasks(world, world.orders, AsyncService(azure.client_options(), world.scenario.client_timeout))
        )
        _note_stats(world)


def _run_virtual(world: World) -> None:
    service = VirtualService(world.scenario)
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(_all_in_tasks(world, world.orders, service))
    world.charged = service.charged


async def _all_in_tasks(world: World, orders: list[Order], service: Any) -> None:
    functions = {agent: _async_functions(world, service, agent) for agent in ("whole", "part")}
    tasks = [asyncio.create_task(drive(world, order, functions)) for order in orders]
    await asyncio.wait(tasks, timeout=PATIENCE)
    await _end_stragglers(world)
    await service.close()


async def _end_stragglers(world: World) -> None:
    """Wait for what follows a dropped stream; a task that has no end is a finding."""
    gc.collect()
    until = asyncio.get_running_loop().time() + PATIENCE / 10
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        if asyncio.get_running_loop().time() > until:
            world.witness.problems.append(f"tasks are left: {sorted(map(repr, others))}")
            break
        await asyncio.wait(others, timeout=0.05)


def _run_threads(world: World) -> None:
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        service = SyncService(azure.client_options(), world.scenario.client_timeout)
        functions = {agent: _sync_functions(world, service, agent) for agent in ("whole", "part")}
        _in_threads(drive_blocking, [(world, order, functions) for order in world.orders])
        service.close()
        _note_stats(world)


def _run_async_clients(world: World) -> None:
    async def all_calls() -> None:
        clients = clients_of(world, azure, is_async=True)
        tasks = [asyncio.create_task(drive(world, order, clients, ask_async)) for order in world.orders]
        await asyncio.wait(tasks, timeout=PATIENCE)
        await _end_stragglers(world)
        for client in clients.values():
            await client.close()

    with simulator_of(world.scenario) as azure:
        world.azure = azure
        asyncio.run(all_calls())
        _note_stats(world)


def _run_sync_clients(world: World) -> None:
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        clients = clients_of(world, azure, is_async=False)
        _in_threads(drive_blocking, [(world, order, clients, ask_blocking) for order in world.orders])
        gc.collect()
        for client in clients.values():
            client.close()
        _note_stats(world)


def _run_agents(world: World) -> None:
    with simulator_of(world.scenario, respond) as azure:
        world.azure = azure
        asyncio.run(agents.ask_all(world, azure, drive, _end_stragglers, PATIENCE))
        _note_stats(world)


def _run_store(world: World) -> None:
    fleet.join(world.scenario, fleet.store().url, fleet.prefix_of(world.scenario))
    with fleet.disturbed(world.scenario, fleet.store().disturb):
        _run_tasks(world)


def _run_processes(world: World) -> None:
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        fleet.run_processes(world, azure, PATIENCE)
        _note_stats(world)


def call_in_child(seed: int, part: slice, store: tuple[str, str], options: Any, say: Any) -> list[str]:
    """Make a part of a scenario's calls as one process of a fleet; returns what is wrong after them."""
    from .invariants import problems_within

    with world_of(draw(seed)) as world:
        world.witness.say = say
        world.orders = world.orders[part]
        fleet.join(world.scenario, *store)
        fleet.meet_the_others()
        say("met")
        asyncio.run(_all_in_tasks(world, world.orders, AsyncService(options, world.scenario.client_timeout)))
        world.witness.let_go()
        for ending in world.witness.endings.values():
            say("ended", str(ending))
        return problems_within(world)


def _run_cancellation(world: World) -> None:
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        asyncio.run(cancel_everywhere(world, azure))
        _note_stats(world)


def _in_threads(function: Any, arguments: list[Any]) -> None:
    """Call a function in threads, with each of the arguments, until all have ended or one never will."""
    threads = [threading.Thread(target=function, args=given, daemon=True) for given in arguments]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _run_loops(world: World) -> None:
    """A loop that is closed over its calls, one beside it, and one after it."""
    with simulator_of(world.scenario) as azure:
        world.azure = azure
        timeout = world.scenario.client_timeout
        parts = [world.orders[first::3] for first in range(3)]

        def closed_early() -> None:
            for at, _ in world.scenario.disturbances.interruptions:
                _close_over(world, [parts[0].pop() for _ in range(len(parts[0]) // 2 + 1) if parts[0]], azure, at)

        def beside() -> None:
            asyncio.run(_all_in_tasks(world, parts[1], AsyncService(azure.client_options(), timeout)))

        with warnings.catch_warnings():
            # a loop that is closed over its connections leaves them to the garbage collector, which says so
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            # only where no loop runs: a client of the SDK that is collected in one tries to close itself there
            gc.disable()
            _in_threads(lambda run: run(), [(closed_early,), (beside,)])
            gc.enable()
            world.witness.let_go()
            gc.collect()
        asyncio.run(_all_in_tasks(world, parts[0] + parts[2], AsyncService(azure.client_options(), timeout)))
        _note_stats(world)


def _close_over(world: World, orders: list[Order], azure: Any, seconds: float) -> None:
    loop = asyncio.new_event_loop()
    # it would say of each task that it was destroyed
    loop.set_exception_handler(lambda loop, context: None)

    async def begin() -> None:
        service = AsyncService(azure.client_options(), world.scenario.client_timeout)
        functions = {agent: _async_functions(world, service, "part") for agent in ("whole", "part")}
        tasks.extend(loop.create_task(drive(world, order, functions)) for order in orders)

    # a loop holds its tasks weakly
    tasks: list[Any] = []
    loop.run_until_complete(begin())
    loop.call_later(seconds, loop.stop)
    loop.run_forever()
    loop.close()
    # anyio 4.16 keeps what it knows of a task under a weak reference to the task, and knows the task's cancel scope,
    # which holds the task: one whose loop is closed inside a scope would stay for ever, and the call's slot with it.
    for task in [*_task_states]:
        if task.get_loop() is loop:
            del _task_states[task]
    tasks.clear()
    world.abandoned |= {order.number for order in orders} - world.witness.endings.keys()


def _note_stats(world: World) -> None:
    """Take the simulator's record once it has seen all clients leave."""
    until = time.monotonic() + 2.0
    while world.azure.stats.in_flight and time.monotonic() < until:
        time.sleep(0.005)
        gc.collect()
    world.stats = world.azure.stats
    world.charged = world.stats.prompt_tokens + world.stats.completion_tokens


_RUNS = {
    "virtual": _run_virtual,
    "tasks": _run_tasks,
    "threads": _run_threads,
    "loops": _run_loops,
    "cancellation": _run_cancellation,
    "agents": _run_agents,
    "store": _run_store,
    "processes": _run_processes,
    "async client": _run_async_clients,
    "sync client": _run_sync_clients,
}
