"""What the kit costs, beside what users would write without it: run by `make bench`, each figure side by side in one run."""

from benchmarks import imports, overhead

if __name__ == "__main__":
    overhead.main()
    imports.main()
