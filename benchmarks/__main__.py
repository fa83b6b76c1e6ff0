"""What the kit costs beside what users would write without it, and how well it plans; `make bench` runs it."""

from benchmarks import counting, imports, overhead, planning

if __name__ == "__main__":
    overhead.main()
    counting.main()
    imports.main()
    planning.main()
