"""One process of a fleet for tests: it calls a limited function again and again, and says when it sent what.

It is given a JSON object on its command line, says "ready", begins at the first line of its standard input and ends
when there is no more of it. Each line that it says is a JSON list: what, when, how many tokens. All processes of a
machine share the clock.
"""

import asyncio
import json
import random
import sys
import threading
import time

from resilience_kit import ResilienceError, configure, events, rate_limited
from resilience_kit.fleet import fleets
from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.membership import Member
from resilience_kit.registry import mode
from resilience_kit.settings import current_settings


def say(what, *values):
    sys.stdout.write(json.dumps([what, time.monotonic(), *values]) + "\n")
    sys.stdout.flush()


def join(*, url, prefix, on_store_failure="local", beat=0.1, lease=1.0, deadline=2.0):
    """Join the fleet as the settings say, with faster signs of life."""
    configure(store=url, on_store_failure=on_store_failure)
    settings = current_settings()
    connection = Connection(url, prefix=prefix, deadline=deadline)
    key = (settings.resilience_store, settings.resilience_store_prefix, settings.resilience_store_deadline_seconds)
    mode.fleets[key] = fleets.Fleet(connection, Member(connection, beat=beat, lease=lease))


async def call_on(given, ended):
    """Call from as many tasks as were asked for, until the test has heard enough."""
    sizes = given.get("sizes", [10])
    seconds = given.get("seconds", 0)

    @rate_limited("fleet", tokens=lambda tokens: tokens, **given["limit"])
    async def ask(tokens):
        say("sent", tokens)
        await asyncio.sleep(seconds)
        say("done", tokens)

    async def caller(number):
        chance = random.Random(f"{given.get('seed')} {number}")
        while not ended.is_set():
            try:
                await ask(chance.choice(sizes))
            except ResilienceError as error:
                say("refused", type(error).__name__)
                await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(caller(number)) for number in range(given.get("callers", 8))]
    await asyncio.to_thread(ended.wait)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main():
    given = json.loads(sys.argv[1])
    join(**given["fleet"])
    events.subscribe(lambda event: say(type(event).__name__) if type(event).__name__.startswith("Store") else None)
    say("ready")
    sys.stdin.readline()
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    asyncio.run(call_on(given, ended))


main()
