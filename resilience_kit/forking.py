"""Locks that nobody holds in a forked child: the threads that held them in its parent are not there to give them back.

All long-lived locks of the kit are made here, but for the few that a fork has to wait for.
"""

import os
import threading
import weakref
from typing import Any

_locks: "weakref.WeakSet[Any]" = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A lock as `threading.Lock()` makes it, that is free in a forked child.

    Example:
        >>> from resilience_kit.forking import new_lock
        >>> with new_lock():
        ...     ...
        Ellipsis
    """
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_reentrant_lock() -> Any:
    """The same as `threading.RLock()` makes it, whose type has no public name."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_all() -> None:
    for lock in [*_locks]:
        # as CPython's own logging and threading do: it has no public way to free a lock in its place
        lock._at_fork_reinit()  # noqa: SLF001 - see above


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
