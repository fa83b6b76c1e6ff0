"""What the kit costs and what it saves; `make bench` runs it, each part side by side with its peers in one run.

The parts on quotas run in real minutes, six for `quota` and seven for `reach`, which comes only with `--all`.
"""

import sys

from benchmarks import counting, imports, listening, overhead, planning, quota, reach, waiters

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
