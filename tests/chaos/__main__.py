"""Runs seeds: python -m tests.chaos --seeds 0:2000 --jobs 2, or --seed 17 to replay one."""

import argparse
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable

from .invariants import baseline, problems_after, problems_within
from .running import prepare, run, warm_up, world_of
from .scenario import KINDS, Scenario, draw


def outcome_of(scenario: Scenario) -> tuple[list[str], Counter[str]]:
    """Run a scenario; returns all that is wrong after it, and what its calls came to."""
    prepare(scenario.kind)
    before = baseline()
    with world_of(scenario) as world:
        try:
            run(world)
        except Exception as error:
            # what no call ended in, but the scenario itself
            world.witness.problems.append("".join(traceback.format_exception(error)))
        problems = problems_within(world)
        endings = Counter([*map(str, world.witness.endings.values()), *world.ended_elsewhere])
        endings["attempts"] = len(world.witness.began)
    # an error of the SDK's holds its response, and that its connection
    del world
    return problems + problems_after(before), endings


def report(scenario: Scenario, problems: list[str]) -> str:
    """Tell of a failure, and how to see it again."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    replay = f"replay: .venv/bin/python -m tests.chaos --seed {scenario.seed}"
    return f"seed {scenario.seed} FAILED\n{lines}\n    {scenario}\n{replay}"


def run_seeds(seeds: Iterable[int], kind: str | None, *, is_shown: bool, stops: bool) -> int:
    """Run them one after the other, and say how it went; returns how many failed."""
    warm_up()
    failed, ran, seconds, all_endings = 0, Counter(), Counter(), Counter()
    for seed in seeds:
        scenario = draw(seed)
        if kind not in (None, scenario.kind):
            continue
        began = time.monotonic()
        problems, endings = outcome_of(scenario)
        all_endings += endings
        ran[scenario.kind] += 1
        seconds[scenario.kind] += time.monotonic() - began
        if problems:
            failed += 1
            print(report(scenario, problems), flush=True)
            if stops:
                break
        elif is_shown:
            print(f"    {scenario}\nall that was promised holds")
    for name, times in sorted(ran.items()):
        print(f"{times:5} {name:13} {seconds[name] / times:.2f} s each")
    print("calls: " + ", ".join(f"{count} {ending}" for ending, count in all_endings.most_common()))
    print(f"{ran.total()} scenarios, {failed} failed", flush=True)
    return failed


def run_in_processes(seeds: range, kind: str | None, jobs: int) -> int:
    """Share the seeds out to so many processes; returns how many of those saw a failure."""
    parts = [seeds[first::jobs] for first in range(jobs)]
    chosen = [] if kind is None else ["--kind", kind]
    command = [sys.executable, "-m", "tests.chaos", *chosen, "--seeds"]
    running = [subprocess.Popen([*command, f"{part.start}:{part.stop}:{part.step}"]) for part in parts]
    return sum(process.wait() != 0 for process in running)


def main() -> int:
    """Run what the command line says; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", default="0:2000", help="from:to, or from:to:step")
    parser.add_argument("--seed", type=int, help="one alone, with its plan")
    parser.add_argument("--kind", choices=KINDS, help="those of one kind alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    given = parser.parse_args()
    if given.seed is not None:
        return run_seeds([given.seed], None, is_shown=True, stops=True) > 0
    seeds = range(*map(int, given.seeds.split(":")))
    if given.jobs > 1:
        return run_in_processes(seeds, given.kind, given.jobs) > 0
    return run_seeds(seeds, given.kind, is_shown=False, stops=given.stop) > 0


if __name__ == "__main__":
    sys.exit(main())
