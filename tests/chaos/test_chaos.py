"""A few of the seeds that `make chaos` runs, some of each kind."""

import gc
from itertools import count, islice

import pytest

from .__main__ import outcome_of, report
from .running import run, warm_up, world_of
from .scenario import KINDS, draw

# As many as a suite has time for.
SEEDS_OF = {
    "virtual": 12,
    "tasks": 4,
    "threads": 3,
    "async client": 2,
    "sync client": 2,
    "cancellation": 1,
    "loops": 1,
    "agents": 1,
    "store": 1,
    "processes": 1,
}


def seeds_of(kind):
    return islice((seed for seed in count() if draw(seed).kind == kind), SEEDS_OF[kind])


@pytest.fixture(autouse=True, scope="module")
def warmed_up():
    warm_up()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"{kind}-{seed}") for kind in KINDS for seed in seeds_of(kind)])
def test_all_that_was_promised_holds_after_a_scenario_of(seed):
    scenario = draw(seed)
    problems, _ = outcome_of(scenario)
    assert not problems, report(scenario, problems)


def test_a_seed_in_virtual_time_repeats_to_the_last_step():
    def story(seed):
        with world_of(draw(seed)) as world:
            run(world)
        endings = world.witness.endings.values()
        return [(it.number, it.answer, repr(it.error)) for it in endings], world.witness.began

    seed = next(seeds_of("virtual"))
    assert story(seed) == story(seed)
