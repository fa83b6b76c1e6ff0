"""What must hold after any scenario, whatever happened in it. Each check says what is wrong, with the figures."""

import gc
import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai

from examples.multi_agent.model_calls import QUOTA
from resilience_kit import ResilienceError
from resilience_kit.circuits import circuits
from resilience_kit.token_budgets import token_budgets

from .agents import is_answer
from .running import World
from .services import answer_to
from .witness import Death, held, is_failure

# Threads and descriptors that end a little after the last call has: what a loop or a client closed in another thread.
_SETTLING = 3.0
_SHORT_WINDOWS = 6
# Times are compared in floating point.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Baseline:
    """The threads and file descriptors of the process before a scenario."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[str, str]]


def baseline() -> Baseline:
    """Look at what there is."""
    return Baseline(frozenset(threading.enumerate()), frozenset(_descriptors()))


def _descriptors() -> Iterable[tuple[str, str]]:
    folder = Path("/proc/self/fd")
    for link in folder.iterdir() if folder.exists() else ():
        # the one that the folder itself is read by is gone by now
        with suppress(OSError):
            yield link.name, str(link.readlink())


def problems_within(world: World) -> list[str]:
    """What is wrong while the scenario's names are still there."""
    return [
        *_unended(world),
        *_left_in_the_kit(),
        *_over_quota(world),
        *_miscounted_budgets(world),
        *_wrong_circuit(world),
        *world.witness.problems,
        *(f"nobody could catch {text}" for text in world.unraisable),
    ]


def problems_after(before: Baseline) -> list[str]:
    """What a scenario left behind in the process."""
    until = time.monotonic() + _SETTLING
    while True:
        gc.collect()
        now = baseline()
        threads, descriptors = now.threads - before.threads, now.descriptors - before.descriptors
        if not threads and not descriptors:
            return []
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return [
        *(f"left: thread {thread.name!r}" for thread in threads),
        *(f"left: file descriptor {number} on {target}" for number, target in sorted(descriptors)),
    ]


# Every call ended in an answer or its own error


def _unended(world: World) -> Iterable[str]:
    witness = world.witness
    for order in world.orders:
        if order.number in world.abandoned:
            continue
        ending = witness.endings.get(order.number)
        if ending is None:
            yield f"ended: call {order.number} never did"
        elif ending.error is None:
            if not _is_right(world, order, ending.answer):
                yield f"ended: call {order.number} was answered {ending.answer!r}"
        elif not _is_allowed(world, order, ending.error):
            own = witness.last_errors.get(order.number)
            yield f"ended: call {order.number} in {ending.error!r}, while its function raised {own!r}"


def _is_right(world: World, order, text: str) -> bool:
    if world.scenario.kind == "agents":
        return is_answer(order, text)
    whole = answer_to(order.number)
    # what is filtered is empty, and a client's stream may be
    is_part = order.items is not None or "client" in world.scenario.kind
    return whole.startswith(text) if is_part else text in (whole, "")


def _is_allowed(world: World, order, error: BaseException) -> bool:
    if isinstance(error, ResilienceError):
        return True
    if type(error).__name__ == "CancelledError":
        return order.number in world.witness.cancelled
    if type(error) is TimeoutError:
        return order.timeout is not None
    if isinstance(error, SystemExit):
        return order.dies
    # a client's streams are read by whoever asked, and not by what is decorated
    is_read_outside = "client" in world.scenario.kind and order.is_stream
    if world.scenario.kind == "agents":
        # a question is several calls, some at the same time
        is_own = any(error is own for own in world.witness.errors[order.number])
    else:
        is_own = is_read_outside or error is world.witness.last_errors.get(order.number)
    return is_own and isinstance(error, openai.OpenAIError | httpx2.TransportError | Death)


# Nothing is left


def _left_in_the_kit() -> list[str]:
    until = time.monotonic() + _SETTLING
    while True:
        found = list(held())
        if not found or time.monotonic() > until:
            return found
        gc.collect()
        time.sleep(0.005)


# The quota was never exceeded in any window


def _over_quota(world: World) -> Iterable[str]:
    witness, limits = world.witness, world.scenario.limits
    if world.scenario.kind == "cancellation":
        # it makes one call at a time, and most of its functions have no limit
        return
    if world.scenario.kind in ("virtual", "processes"):
        # In virtual time no time passes between the kit's decision and the call. A process that is killed cannot say
        # how its calls ended, but each has said what it was about to send, and when that had been let go.
        sent = sorted(zip(witness.began, witness.tokens_began, strict=True))
        yield from _over(sent, limits, "sent")
    else:
        yield from _over(sorted(witness.admitted), limits, "admitted by the kit")
    if world.scenario.kind == "processes" and not witness.admitted:
        if world.stats is not None and world.stats.requests > len(witness.began):
            yield f"quota: the server saw {world.stats.requests} requests, and only {len(witness.began)} were sent"
        return
    if len(witness.began) != len(witness.admitted):
        yield f"quota: {len(witness.began)} calls were sent, and {len(witness.admitted)} were admitted"
    early = [
        began - at
        for began, (at, _) in zip(sorted(witness.began), sorted(witness.admitted), strict=False)
        if began < at
    ]
    if early:
        yield f"quota: {len(early)} calls were sent before they were admitted, by up to {-min(early):.4f} s"
    if world.stats is not None:
        yield from _over_at_the_server(world)


def _over_at_the_server(world: World) -> Iterable[str]:
    """Look at the server's own record, whose times are those of the arrivals: a request may take longer than the next.

    Every window is made shorter by the most that a request was on its way, so that two that were sent a window apart
    do not count as one window's.
    """
    witness, stats, limits = world.witness, world.stats, world.scenario.limits
    if stats.requests > len(witness.began):
        yield f"quota: the server saw {stats.requests} requests, and only {len(witness.began)} were sent"
    arrived = sorted((admission.time, int(admission.tokens)) for admission in stats.admissions)
    sent = sorted(at for at, _ in witness.admitted)
    # the server admits a part of what is sent: each arrival belongs to one of those sent before it
    lags, index = [], len(sent)
    for time_of_arrival, _ in reversed(arrived):
        index = min(index, len([at for at in sent[:index] if at <= time_of_arrival])) - 1
        if index < 0:
            yield "quota: the server admitted a request that the kit had not"
            return
        lags.append(time_of_arrival - sent[index])
    lag = max(lags, default=0.0)
    yield from _over(arrived, limits, f"admitted by the server (up to {lag:.3f} s after the kit)", lag)


def _over(sent: list[tuple[float, int]], limits, what: str, lag: float = 0.0) -> Iterable[str]:
    windows = (
        ("requests", limits.period, limits.requests, lambda tokens: 1),
        ("requests", limits.period / _SHORT_WINDOWS, max(1, limits.requests // _SHORT_WINDOWS), lambda tokens: 1),
        ("tokens", limits.period, limits.tokens, lambda tokens: tokens),
    )
    for unit, seconds, most, weigh in windows:
        held = most_in(sent, seconds - lag, weigh)
        if held > most:
            yield f"quota: {held} {unit} within {seconds - lag:.4f} s {what}, of {most}"


def most_in(sent: list[tuple[float, int]], seconds: float, weigh) -> float:
    """The most in any window: each one that begins with a request is looked at, from scratch."""
    return (
        max(
            (
                sum(weigh(tokens) for at, tokens in sent if start <= at < start + seconds - _ROUNDING)
                for start, _ in sent
            ),
            default=0,
        )
        if seconds > 0
        else -math.inf
    )


# Budgets add up to what the server charged


def _miscounted_budgets(world: World) -> Iterable[str]:
    witness = world.witness
    budgets = {name: budget for name, budget in token_budgets.items().items() if budget.is_bounded}
    if "whole" in budgets:
        used = budgets["whole"].statistics().tokens_used
        if used != witness.used["whole"]:
            yield f"budget: {used} tokens are counted, and the answers used {witness.used['whole']}"
    if world.charged is None:
        return
    answered = sum(witness.used.values())
    if answered > world.charged:
        yield f"budget: the answers used {answered} tokens, and the server charged {world.charged}"
    # whoever reads a client's stream is not told what it used, unless he asks for it
    is_told = "client" not in world.scenario.kind or not world.scenario.streams
    is_all_received = (
        is_told and not witness.ended_badly and not world.abandoned and world.scenario.kind != "cancellation"
    )
    if is_all_received and answered != world.charged:
        yield f"budget: the server charged {world.charged} tokens, and the answers used {answered}"


# The circuit's state follows from the outcomes


def _wrong_circuit(world: World) -> Iterable[str]:
    circuit = circuits.items().get(QUOTA if world.scenario.kind == "agents" else "chaos")
    if circuit is None or world.scenario.kind == "processes":
        # of a circuit that is shared no one process knows all outcomes
        return
    is_, model = circuit.statistics(), world.witness.model
    if model is None:
        # The order in which threads end their calls is not known, but what never failed never opened.
        errors = [ending.error for ending in world.witness.endings.values() if ending.error is not None]
        if (
            not world.witness.failures
            and not any(map(is_failure, errors))
            and (is_.state != "CLOSED" or is_.failure_count)
        ):
            yield f"circuit: {is_.state} with {is_.failure_count} failures, and no call failed"
        return
    yield from (f"circuit: {problem}" for problem in model.problems)
    is_tried = is_.state == "HALF_OPEN" and model.state == "OPEN"
    if is_.state != model.state and not is_tried:
        yield f"circuit: {is_.state}, and {model.state} by the outcomes"
    elif is_.state == "CLOSED" and is_.failure_count != model.failures:
        yield f"circuit: {is_.failure_count} failures are counted, and there were {model.failures}"
    elif is_.state == "HALF_OPEN" and not is_tried and is_.success_count != model.successes:
        yield f"circuit: {is_.success_count} successes are counted, and there were {model.successes}"
