"""What happens around the calls: a wall clock that jumps, and errors that nobody could catch."""

import gc
import sys
import threading
import time
from contextlib import contextmanager
from typing import Any


@contextmanager
def jumping_clock(jumps: tuple[tuple[float, float], ...]):
    """Let the wall clock jump; the simulator stands for another machine, and keeps to the right time."""
    real, began = time.time, time.monotonic()

    def jumping() -> float:
        if threading.current_thread().name == "azure-openai-simulator":
            return real()
        passed = time.monotonic() - began
        return real() + sum(seconds for at, seconds in jumps if passed >= at)

    if jumps:
        time.time = jumping
    try:
        yield
    finally:
        time.time = real


@contextmanager
def heard_unraisable(heard: list[str]):
    """Note what goes wrong where nobody can catch it, if it does in the kit."""
    before, before_in_threads = sys.unraisablehook, threading.excepthook

    def hear(unraisable: Any) -> None:
        innermost = unraisable.exc_traceback
        while innermost is not None and innermost.tb_next is not None:
            innermost = innermost.tb_next
        file = "" if innermost is None else innermost.tb_frame.f_code.co_filename
        if "/resilience_kit/" in file:
            heard.append(f"{unraisable.exc_type.__name__} in {file}:{innermost.tb_lineno}: {unraisable.exc_value}")

    def hear_of_thread(died: Any) -> None:
        # that threads die is the plan
        if died.exc_type is not SystemExit:
            heard.append(f"{died.exc_type.__name__} in thread {died.thread.name!r}: {died.exc_value}")

    sys.unraisablehook, threading.excepthook = hear, hear_of_thread
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook, threading.excepthook = before, before_in_threads
