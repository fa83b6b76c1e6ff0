"""A process that keeps a history until it is killed, or for as many calls as it is told: started by the tests."""

import os
import sys
import time

from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample

place, process, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
history = History(place)
history._interval = 0.05
for number in range(1, calls + 1):
    history.add(Sample(time.time(), 0.0, process, (Reading("agents", "A", {"calls": 1}),)))
    os.write(1, f"{number} {time.time()}\n".encode())
    time.sleep(0.002)
history.close()
