"""The time to import the kit, beside that to import openai: each in fresh interpreters, in turn."""

import statistics
import subprocess
import sys

_ROUNDS = 9
_BOUND = 0.2
_EVERYTHING = "from resilience_kit import *"
_TIMED = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"


def _seconds(statement: str) -> float:
    finished = subprocess.run(
        [sys.executable, "-c", _TIMED.format(statement)], check=True, capture_output=True, text=True
    )
    return float(finished.stdout)


def main() -> None:
    """Print the import times in milliseconds, and their ratios."""
    statements = ("import openai", "import resilience_kit", _EVERYTHING)
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(_ROUNDS):
        for statement in statements:
            times[statement].append(_seconds(statement))
    openai, kit, everything = (statistics.median(times[statement]) for statement in statements)
    print(
        f"import: openai {openai * 1e3:.0f} ms, resilience_kit {kit * 1e3:.0f} ms, "
        f"ratio {kit / openai:.2f} (at most {_BOUND}); all public names of it {everything * 1e3:.0f} ms"
    )
