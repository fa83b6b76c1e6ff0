"""A million calls through the whole stack, one in a hundred with a fault: nothing grows, slows down or is miscounted.

`make soak`, or `python -m benchmarks.soak [--calls N]`. The calls come from threads, from many tasks in two event loops
and from readers of streams. One in 50 goes over real HTTP to the simulator; a million of those would take hours. The
run is in tenths of the same mixture, and all is at rest between two of them: there the memory is measured. At the end
`get_all_resilience_stats()` is compared with the books that the program kept itself.

Memory is what malloc has given out to the whole process, to the byte: for that, Python takes each object from malloc,
and all threads share one heap. What the process has resident is shown beside it; it moves by pages that are half empty.
Shorter passes after the run trace each allocation, without and with a `Sampler` that listens.
"""

import argparse
import asyncio
import ctypes
import gc
import os
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import soak_http, soak_traffic
from benchmarks.soak_traffic import Books
from resilience_kit import get_all_resilience_stats
from resilience_kit.monitoring.sampler import Sampler
from resilience_kit.testing import AzureOpenAISimulator, isolated

_CALLS = 1_000_000
# From a question on after which all faults come, for one attempt and for all.
_QUICK_CALLS, _QUICK_START = 1_000, 2_000
_PARTS = 10
_HTTP_EVERY = 50
_THREADS = 4
# Of the calls without HTTP, in hundredths: those from threads, from tasks of two event loops, and the others.
_BY_THREAD, _BY_TASK, _BY_OTHER_LOOP, _READ_BY_THREAD, _READ_BY_TASK, _IN_OUTAGES = 30, 35, 10, 10, 10, 5
_MOST_GROWTH = 1024 * 1024
_LEAST_SPEED = 0.8
# A part of the traced pass. After so many, each ledger has let go of the last 1,024 requests that it knew before.
_TRACED_CALLS, _TRACED_PARTS_BEFORE = 8_000, 8
# What two more may allocate: four bytes a call.
_MOST_TRACED_GROWTH = 64 * 1024
# What a sampler keeps at most: see its module.
_MOST_READINGS, _MOST_BYTES_OF_READINGS = 50_000, 40 * 1024 * 1024
_ON_MALLOC = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0"}
# As malloc.h has them.
_FIGURES_OF_MALLOC = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip
# What counts what is under way or held, of each section: nothing, when all is at rest.
_HELD = {
    "rate_limiters": ("in_flight", "waiting"),
    "circuit_breakers": ("trials_in_flight",),
    "token_budgets": ("tokens_reserved",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure, what it may be, and whether it is."""

    what: str
    figure: str
    promise: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A tenth of the run: its wall time and its time of all processors in seconds, and the bytes after it."""

    seconds: float
    processor_seconds: float
    allocated: int
    resident: int


class Traffic:
    """Where all calls come from, and the books of those that were made."""

    def __init__(self, pool: ThreadPoolExecutor, azure: AzureOpenAISimulator) -> None:
        self._pool = pool
        self._azure = azure
        self.books = Books()

    def make(self, first: int, calls: int) -> None:
        """Make so many calls, with questions from a number on, and return when all is at rest."""
        over_http = calls // _HTTP_EVERY
        direct = calls - over_http

        def numbers(part: int) -> range:
            return range(first, first + direct * part // 100)

        by_thread, pool = numbers(_BY_THREAD), self._pool
        others = [
            *(pool.submit(soak_traffic.call_from_thread, by_thread[it::_THREADS]) for it in range(_THREADS)),
            pool.submit(soak_traffic.read_from_thread, numbers(_READ_BY_THREAD)),
            pool.submit(soak_traffic.call_in_outages, numbers(_IN_OUTAGES)),
            pool.submit(asyncio.run, soak_traffic.call_from_tasks(iter(numbers(_BY_OTHER_LOOP)))),
        ]

        async def make_here() -> tuple[Books, ...]:
            return await asyncio.gather(
                soak_traffic.call_from_tasks(iter(numbers(_BY_TASK))),
                soak_traffic.read_from_tasks(iter(numbers(_READ_BY_TASK))),
                soak_http.call_over_http(self._azure, iter(range(first, first + over_http))),
            )

        for books in (*asyncio.run(make_here()), *(other.result() for other in others)):
            self.books.update(books)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Start the threads and the server."""
    with soak_http.simulator() as azure, ThreadPoolExecutor(_THREADS + 3) as pool:
        yield Traffic(pool, azure)


def _run(traffic: Traffic, calls: int) -> list[Part]:
    parts = []
    for number in range(_PARTS):
        started, of_processor = time.perf_counter(), time.process_time()
        traffic.make(number * calls // _PARTS, calls // _PARTS)
        seconds, of_processor = time.perf_counter() - started, time.process_time() - of_processor
        _rest()
        parts.append(Part(seconds, of_processor, _allocated(), _resident()))
        print(
            f"{(number + 1) * calls // _PARTS:,} calls: {calls / _PARTS / seconds:,.0f} a second, "
            f"{parts[-1].allocated / 2**20:.2f} MiB allocated, {parts[-1].resident / 2**20:.2f} MiB resident",
            file=sys.stderr,
        )
    return parts


def _start_on_malloc() -> None:
    """Start anew with all memory of Python's in one heap of malloc, without the stores that threads have."""
    if os.environ.get("PYTHONMALLOC") != "malloc":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **_ON_MALLOC})  # noqa: S606 - itself


class _MallocInformation(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIGURES_OF_MALLOC]


def _allocated() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallocInformation
    information = library.mallinfo2()
    return int(information.uordblks + information.hblkhd)


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(kibibytes) * 1024


def _rows_of_run(parts: list[Part], calls: int) -> list[Row]:
    first, last = parts[1], parts[-1]
    before = parts[0]
    growth, resident_growth = last.allocated - before.allocated, last.resident - before.resident
    # what else the machine does may slow one tenth or two
    speed = first.seconds / min(part.seconds for part in parts[-3:])
    by_processor = first.processor_seconds / last.processor_seconds
    return [
        Row(
            f"memory after the first {calls // _PARTS:,} calls",
            f"{before.allocated / 2**20:.1f} MiB allocated, {growth / 2**20:+.3f} MiB at the end; resident "
            f"{before.resident / 2**20:.1f} MiB, {resident_growth / 2**20:+.2f} MiB",
            "less than 1 MiB more allocated",
            growth < _MOST_GROWTH,
        ),
        Row(
            "calls a second, the best of the last three tenths beside the second tenth",
            f"ratio {speed:.2f}; of the last alone {first.seconds / last.seconds:.2f}, by the processor's time "
            f"{by_processor:.2f}",
            f"at least {_LEAST_SPEED}",
            speed >= _LEAST_SPEED,
        ),
    ]


def compared(books: Books) -> list[Row]:
    """A line for each counter: over all names together, but equal only if it is so for each name."""
    shown = get_all_resilience_stats()
    own, kit, unequal = Counter[str](), Counter[str](), set[str]()
    for (section, name, counter), figure in books.items():
        if section != "program":
            counted, line = shown[section][name][counter], f"{section}: {counter}"
            own[line] += figure
            kit[line] += counted
            unequal |= {line} if counted != figure else set()
    own["calls"], own["successes"] = books["program", "", "calls"], books["program", "", "successes"]
    own["failures"] = books["program", "", "failures"]
    refused = sum(kit[f"{section}: calls_refused"] for section in _HELD)
    kit["calls"] = kit["rate_limiters: calls_admitted"] - kit["retries: retries"] + refused
    kit["successes"] = kit["agents: calls"]
    kit["failures"] = kit["calls"] - kit["successes"]
    for section, counters in _HELD.items():
        for counter in counters:
            own[f"{section}: {counter}"] = 0
            kit[f"{section}: {counter}"] = sum(of_name[counter] for of_name in shown[section].values())
    unequal |= {line for line in own if own[line] != kit[line]}
    return [
        Row(line, f"{figure:,} by the program, {kit[line]:,} by the kit", "equal", line not in unequal)
        for line, figure in own.items()
    ]


def _traced(traffic: Traffic) -> list[Row]:
    """Trace what is allocated by parts of the same questions: others would move what is known of texts."""

    def make(parts: int) -> int:
        for _ in range(parts):
            traffic.make(0, _TRACED_CALLS)
        return _traced_bytes()

    tracemalloc.start()
    before = make(_TRACED_PARTS_BEFORE)
    growth = make(2) - before
    with Sampler() as sampler:
        held_before, readings_before = make(1), _readings_of(sampler)
        held, readings = make(2), _readings_of(sampler)
    del sampler
    growth_with_sampler = _traced_bytes() - before - growth
    tracemalloc.stop()
    of_readings = (held - held_before) / (readings - readings_before) * _MOST_READINGS
    return [
        _row_of_growth(f"allocated by {2 * _TRACED_CALLS:,} calls", growth),
        _row_of_growth(f"allocated by {3 * _TRACED_CALLS:,} with a sampler, which has gone", growth_with_sampler),
        Row(
            f"the {_MOST_READINGS:,} readings that a sampler keeps",
            f"{of_readings / 2**20:.1f} MiB, by {readings - readings_before:,} of them",
            f"at most {_MOST_BYTES_OF_READINGS / 2**20:.0f} MiB",
            of_readings <= _MOST_BYTES_OF_READINGS,
        ),
    ]


def _readings_of(sampler: Sampler) -> int:
    return len({id(reading) for sample in sampler.samples() for reading in sample.readings})


def _traced_bytes() -> int:
    _rest()
    return tracemalloc.get_traced_memory()[0]


def _rest() -> None:
    # until the ledgers' windows are empty, which is seen when somebody asks
    time.sleep(1.1 * soak_traffic.PERIOD)
    get_all_resilience_stats()
    gc.collect()


def _row_of_growth(what: str, growth: int) -> Row:
    most = _MOST_TRACED_GROWTH
    return Row(what, f"{growth / 1024:+.1f} KiB", f"less than {most / 1024:.0f} KiB more", growth < most)


def main(arguments: list[str] | None = None) -> int:
    """Print a table of what was promised and what is, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--calls", type=int, default=_CALLS, help="how many, a multiple of 1,000 (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few thousand calls: says nothing of speed and memory")
    given = parser.parse_args(arguments)
    if not given.quick:
        _start_on_malloc()
    with isolated(), traffic() as made:
        if given.quick:
            made.make(_QUICK_START, _QUICK_CALLS)
            rows = compared(made.books)
        else:
            rows = [*_rows_of_run(_run(made, given.calls), given.calls), *compared(made.books), *_traced(made)]
    print("| what | figure | promise | kept |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.figure} | {row.promise} | {'yes' if row.is_kept else 'NO'} |")
    return 0 if all(row.is_kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
