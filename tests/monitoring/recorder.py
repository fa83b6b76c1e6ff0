"""A process that keeps a history until it is killed, or for as many calls as it is told: started by the tests.

It may be told to kill itself when it writes a row, counted from its start: what it has not committed is on disk then.
"""

import os
import secrets
import signal
import sys
import time

from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample

place, process, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
history = History(place)
if len(sys.argv) > 4:
    left = [int(sys.argv[4])]
    opened = history._table._open

    def count(statement):
        left[0] -= statement.startswith("INSERT")
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def open_and_count():
        writer = opened()
        # nothing is held back until the end of a transaction
        writer.execute("PRAGMA cache_size = 1")
        writer.set_trace_callback(count)
        return writer

    history._table._open = open_and_count
# written all the time, and much at once: whoever is killed is killed while it writes
history._interval = 0
others = tuple(Reading("agents", secrets.token_hex(90), {"calls": 1}) for _ in range(100))
for number in range(1, calls + 1):
    history.add(Sample(time.time(), 0.0, process, (Reading("models", "A", {"calls": 1}), *others)))
    os.write(1, f"{number} {time.time()}\n".encode())
    time.sleep(0.002)
history.close()
