"""Traffic to forecast: a recorded trace that was summed up to ten minutes, or a made-up one that says so.

    python -m benchmarks.serving_trace ServeGen/data/language/m-small > m-small.csv

sums up the traces of ServeGen (github.com/alibaba/ServeGen, Apache-2.0), which recorded for each client of a model, for
two weeks, the requests per second of each ten minutes, how irregular they were, and how long prompts and answers were.
"""

import ast
import csv
import json
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 600
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Window:
    """Ten minutes of traffic: tokens per minute, and the standard deviation from one minute to the next."""

    tokens: float
    deviation: float


def read(path: Path) -> list[Window]:
    """The windows of a summed-up trace, one a line."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Window(float(row["tokens_per_minute"]), float(row["deviation"])) for row in csv.DictReader(file)]


def made_up(days: int = 7) -> list[Window]:
    """A busy afternoon each day, a level that wanders, and bursts: nobody recorded this."""
    dice = random.Random(4)  # noqa: S311 - the same traffic in each run, no secret
    level = 0.0
    windows = []
    for number in range(days * _DAY // SECONDS):
        hour = number * SECONDS % _DAY / 3_600
        level = 0.97 * level + dice.gauss(0, 0.08)
        daily = 0.2 + max(0.0, math.sin((hour - 7) / 12 * math.pi)) ** 2
        tokens = 20_000 * daily * math.exp(level + dice.gauss(0, 0.1))
        windows.append(Window(tokens, tokens * 0.25))
    return windows


def minutes(windows: Iterable[Window]) -> list[float]:
    """Tokens of each minute, drawn so that each window has its recorded mean and deviation."""
    dice = random.Random(1)  # noqa: S311 - the same traffic in each run, no secret
    drawn = []
    for window in windows:
        variance = window.deviation**2
        for _ in range(SECONDS // 60):
            if window.tokens and variance:
                drawn.append(dice.gammavariate(window.tokens**2 / variance, variance / window.tokens))
            else:
                drawn.append(window.tokens)
    return drawn


def sum_up(folder: Path) -> list[Window]:
    """All clients of a model together. Those of which the folder lacks one of their two files are left out."""
    tokens: dict[int, float] = {}
    variance: dict[int, float] = {}
    for trace in sorted(folder.glob("chunk-*-trace.csv")):
        dataset = trace.with_name(trace.name.replace("-trace.csv", "-dataset.json"))
        if not dataset.is_file():
            continue
        lengths = _mean_lengths(dataset)
        with trace.open(encoding="utf-8", newline="") as file:
            for start, rate, irregularity, *_ in csv.reader(file):
                second = int(float(start))
                length = _length_at(lengths, second)
                requests = float(rate) * 60
                tokens[second] = tokens.get(second, 0.0) + requests * length
                # of a renewal process: the variance of the count is the squared variation of the gaps times its mean
                spread = float(irregularity or 0) ** 2 * requests * length**2
                variance[second] = variance.get(second, 0.0) + spread
    return [Window(tokens[second], math.sqrt(variance[second])) for second in sorted(tokens)]


def _mean_lengths(dataset: Path) -> dict[int, float]:
    """Mean tokens of a prompt with its answer, by the second from which on they count; only where there were any."""
    lengths = {}
    for second, parts in json.loads(dataset.read_text(encoding="utf-8")).items():
        total = 0.0
        for part in ("input_tokens", "output_tokens"):
            shares: dict[int, float] = ast.literal_eval(parts[part])
            if shares:
                total += sum(length * share for length, share in shares.items()) / sum(shares.values())
        if total:
            lengths[int(second)] = total
    return lengths


def _length_at(lengths: dict[int, float], second: int) -> float:
    nearest = min(lengths, key=lambda known: (known > second, abs(known - second)), default=None)
    return 0.0 if nearest is None else lengths[nearest]


if __name__ == "__main__":
    print("tokens_per_minute,deviation")
    for window in sum_up(Path(sys.argv[1])):
        print(f"{window.tokens:.0f},{window.deviation:.0f}")
