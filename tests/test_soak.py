"""The soak, with a few thousand of its million calls: nothing is miscounted and nothing is kept."""

import asyncio
import gc
from collections import Counter
from contextlib import nullcontext

import pytest

from benchmarks import soak, soak_traffic
from resilience_kit import reset_all
from resilience_kit.monitoring.sampler import Sampler


@pytest.mark.parametrize("listener", [nullcontext, Sampler], ids=["unheard", "heard by a sampler"])
def test_the_statistics_of_many_calls_with_faults_add_up_exactly(listener, capsys):
    with listener():
        exit_code = soak.main(["--quick"])

    assert exit_code == 0, capsys.readouterr().out


def test_a_soak_whose_books_do_not_agree_with_the_statistics_fails():
    books = soak_traffic.call_from_thread(range(150))
    assert all(row.is_kept for row in soak.compared(books))

    soak_traffic.call_from_thread(range(1))
    assert not all(row.is_kept for row in soak.compared(books))


def call_in_all_ways(numbers):
    soak_traffic.call_from_thread(numbers)
    soak_traffic.read_from_thread(numbers)
    soak_traffic.call_in_outages(numbers)
    asyncio.run(soak_traffic.call_from_tasks(iter(numbers)))
    asyncio.run(soak_traffic.read_from_tasks(iter(numbers)))


def objects_of_the_kit():
    # the ledgers remember the last thousand requests
    reset_all()
    gc.collect()
    kinds = (type(it) for it in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("resilience_kit."))


def test_nothing_of_the_kit_is_left_of_a_call_that_has_ended():
    call_in_all_ways(range(2_400, 2_600))
    before = objects_of_the_kit()
    call_in_all_ways(range(2_400, 2_800))

    assert objects_of_the_kit() - before == Counter()
