"""What the kit costs beside what users would write without it; `make bench` runs it, side by side in one run."""

from benchmarks import imports, overhead

if __name__ == "__main__":
    overhead.main()
    imports.main()
