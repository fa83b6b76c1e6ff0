"""What a check of `resilience-kit doctor` found, and how checks are run: each alone, and each to an end."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: The check's name.
        verdict: "ok", "warning" (it works, and something is not as it should be) or "failed".
        found: What it saw; never a key, a password or the user of a URL.
        advice: What to do about it; empty where nothing is.
        details: More of what it saw, one thing each.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    details: tuple[str, ...] = ()


Check = Callable[[], Finding]


def run_check(check: Check, *, deadline: float) -> Finding:
    """What a check finds; one that raises, or finds nothing in time, has failed.

    Args:
        check: The check, a function with a name or a partial of one.
        deadline: Seconds that it may take. What takes longer, such as asking for a name's address, cannot be ended,
            and goes on in a thread that ends with the process.
    """
    name = name_of(check)
    found: list[Finding] = []

    def find() -> None:
        try:
            found.append(check())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other checks count
            # its type alone: its text may hold what the user keeps secret
            raised = type(error).__name__
            found.append(
                Finding(name, "failed", f"the check raised {raised}", "Please report it, it is the kit's fault.")
            )

    thread = threading.Thread(target=find, name=f"resilience-kit-doctor-{name}", daemon=True)
    thread.start()
    thread.join(deadline)
    if found:
        return found[0]
    return Finding(name, "failed", f"no answer within {deadline:g} s", "See whether the network lets this machine out.")


def name_of(check: Check) -> str:
    """A check's name: its function's, as it is read."""
    function = check.func if isinstance(check, functools.partial) else check
    return getattr(function, "__name__", type(function).__name__).strip("_").removeprefix("check_").replace("_", " ")
