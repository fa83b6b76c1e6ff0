"""What the kit costs and what it saves; `make bench` runs it, each part side by side with its peers in one run.

The parts on quotas run in real minutes, six for `quota`, and with `--all` seven for `reach` and four for `fleet`;
`fleet_simulation` takes some minutes of work.
"""

import sys

from benchmarks import counting, fleet, fleet_simulation, imports, listening, overhead, planning, quota, reach, waiters

if __name__ == "__main__":
    overhead.main()
    listening.main()
    waiters.main()
    counting.main()
    imports.main()
    planning.main()
    quota.main()
    if "--all" in sys.argv[1:]:
        reach.main()
        fleet.main()
        fleet_simulation.main()
