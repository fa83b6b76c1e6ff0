"""What the kit costs beside what users would write without it; `make bench` runs it, side by side in one run."""

from benchmarks import counting, imports, overhead, waiters

if __name__ == "__main__":
    overhead.main()
    waiters.main()
    counting.main()
    imports.main()
