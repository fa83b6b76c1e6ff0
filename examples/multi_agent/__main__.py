"""The command line: compare on the simulator, or ask a question; see the package for the rest."""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.multi_agent.comparison import QUESTIONS, Run, run, side_by_side
from examples.multi_agent.processes import NoStoreError, run_processes, shared_store
from examples.multi_agent.service import IncompleteEnvironmentError, Quota, Service, azure_service, simulated_service
from examples.multi_agent.system import Answer, LostAnswer
from examples.multi_agent.telemetry import Telemetry, open_telemetry

_QUOTA = Quota(requests=60, tokens=15_000, period=3.0)
_FEW = 3
_BARE, _KIT = "bare client", "resilience_kit"
_ALONE, _FLEET = "kit, each alone", "kit, one store"
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.multi_agent", description="Agents that share a quota.")
    parser.add_argument("--question", help="ask this instead of the batch")
    parser.add_argument("--compare", action="store_true", help="on Azure: ask the whole batch, without the kit first")
    parser.add_argument("--processes", type=int, metavar="N", help="share the batch out to N processes on one quota")
    options = parser.parse_args(arguments)
    if options.processes is not None and (options.processes < 1 or options.question is not None):
        parser.error("--processes needs a number above 0, and shares out the batch: it goes without --question")
    try:
        azure = azure_service(os.environ)
        if options.processes is not None:
            return _demonstrate_fleet(azure, options.processes, compares=azure is None or options.compare)
        with open_telemetry() as telemetry:
            if options.question is not None:
                return _answer(azure, telemetry, options.question)
            return _demonstrate(azure, telemetry, compares=azure is None or options.compare)
    except (IncompleteEnvironmentError, NoStoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


def _answer(azure: Service | None, telemetry: Telemetry, question: str) -> int:
    with _fresh(azure) as service:
        (answer,) = asyncio.run(run(service, telemetry, [question], protected=True)).answers
    _show(Console(), answer)
    return 1 if isinstance(answer, LostAnswer) else 0


def _demonstrate(azure: Service | None, telemetry: Telemetry, *, compares: bool) -> int:
    questions = QUESTIONS if compares else QUESTIONS[:_FEW]

    async def ask(service: Service, label: str, on_answer: Callable[[], None]) -> Run:
        return await run(service, telemetry, questions, protected=label == _KIT, on_answer=lambda _: on_answer())

    return _compare(azure, "three agents", questions, (_BARE, _KIT) if compares else (_KIT,), ask)


def _demonstrate_fleet(azure: Service | None, processes: int, *, compares: bool) -> int:
    questions = QUESTIONS if compares else QUESTIONS[: max(_FEW, processes)]
    with shared_store() as store:

        async def ask(service: Service, label: str, on_answer: Callable[[], None]) -> Run:
            return await run_processes(
                service,
                questions,
                processes,
                protected=label != _BARE,
                store=store if label == _FLEET else None,
                on_answer=on_answer,
            )

        who = f"{processes} processes of three agents"
        return _compare(azure, who, questions, (_BARE, _ALONE, _FLEET) if compares else (_FLEET,), ask)


def _compare(
    azure: Service | None,
    who: str,
    questions: Sequence[str],
    labels: Sequence[str],
    ask: Callable[[Service, str, Callable[[], None]], Coroutine[Any, Any, Run]],
) -> int:
    """Ask the questions in each of the ways, and show how they went; the last one's answers too."""
    console = Console()
    place = "Azure OpenAI" if azure is not None else f"A simulated Azure OpenAI with {_QUOTA}"
    console.print(f"{place}; {who}, {len(questions)} questions.", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs: dict[str, Run] = {}
    with Progress(*columns, console=console) as progress:
        for label in labels:
            bar = progress.add_task(label, total=len(questions))
            with _fresh(azure) as service:
                runs[label] = asyncio.run(ask(service, label, partial(progress.advance, bar)))
    console.print(side_by_side(runs))
    for answer in runs[labels[-1]].answers[:_FEW]:
        _show(console, answer)
    console.print("\nTo watch it live in a browser: make demo-live", highlight=False)
    return 0


@contextmanager
def _fresh(azure: Service | None) -> Iterator[Service]:
    """Azure as it is, or a simulator of which nothing is used yet."""
    if azure is not None:
        yield azure
    else:
        with simulated_service(_QUOTA) as service:
            yield service


def _show(console: Console, answer: Answer | LostAnswer) -> None:
    """Print a question and its answer; of an error only its type, since its message may quote what was sent."""
    console.print(f"\nQ: {answer.question}", markup=False, highlight=False)
    if isinstance(answer, LostAnswer):
        console.print(f"No answer: {type(answer.error).__name__}", markup=False)
    else:
        console.print(f"A: {answer.text}", markup=False, highlight=False)
        console.print(f"   answered by {', '.join(answer.agents) or 'nobody but the coordinator'}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
