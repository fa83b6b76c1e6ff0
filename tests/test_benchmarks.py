"""What the benchmarks of quotas measure against: the best that is possible."""

import itertools
import random
from dataclasses import replace

import pytest

from benchmarks import fleet, fleet_simulation
from benchmarks.agents import Limits, mixed_orders, order
from benchmarks.oracle import QuotaChange, best_possible
from resilience_kit import configure
from resilience_kit.testing import isolated
from resilience_kit.testing.server_windows import ServerQuota

PERIOD, TOKENS = 60.0, 150_000


def quota(token_window="fixed"):  # noqa: S107 - tokens of text, no secret
    return ServerQuota(
        0.0,
        request_limit=600,
        token_limit=TOKENS,
        period=PERIOD,
        token_window=token_window,
        request_window=10,
        count_refused=False,
    )


def tokens_of_windows(admissions, windows):
    sums = [0.0] * windows
    for admission in admissions:
        sums[int(admission.time / PERIOD)] += admission.tokens
    return sums


@pytest.mark.parametrize("token_window", ["fixed", "sliding"])
def test_the_best_is_nearly_all_of_the_quota_as_soon_as_each_window_begins(token_window):
    best = best_possible(quota(token_window), mixed_orders(), period=PERIOD, until=4 * PERIOD)

    assert all(0.99 * TOKENS <= tokens <= TOKENS for tokens in tokens_of_windows(best.admissions, 4))
    assert all(admission.time % PERIOD < PERIOD / 3 for admission in best.admissions)


def test_the_best_ends_with_the_last_answer():
    best = best_possible(quota(), itertools.islice(mixed_orders(), 200), period=PERIOD)

    assert len(best.admissions) == 200
    assert best.admissions[-1].time < best.finished < 2 * PERIOD


def test_the_best_knows_what_changes():
    changes = [QuotaChange(PERIOD, 600, TOKENS / 2), QuotaChange(2 * PERIOD, 600, TOKENS)]
    best = best_possible(quota(), mixed_orders(), period=PERIOD, until=3 * PERIOD, changes=changes)

    assert tokens_of_windows(best.admissions, 3) == pytest.approx([TOKENS, TOKENS / 2, TOKENS], rel=0.01)


def test_an_order_knows_what_the_server_charges():
    assert order(random.Random(1), words=500, max_tokens=40).tokens == 540
    assert order(random.Random(1), words=500, max_tokens=None, absent=16).tokens == 516


def test_a_fleet_of_real_processes_loses_no_answer(capsys):
    fleet.main(["--quick"])

    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("| one quota in a store")]
    assert row.split("|")[5].strip() == "0"
    assert "LimitStore.reserve" in printed


def test_a_fleet_in_virtual_time_is_refused_nothing(capsys):
    fleet_simulation.main(["--quick"])

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    assert all(row.split("|")[3].strip() == "0, 0" for row in rows)


def one_of_two_fifths_among_small_ones():
    for number, small in enumerate(mixed_orders()):
        yield replace(small, tokens=60_000) if number % 100 == 20 else small


def test_the_best_lets_small_orders_pass_a_large_one_that_does_not_fit_yet():
    best = best_possible(quota(), one_of_two_fifths_among_small_ones(), period=PERIOD, until=4 * PERIOD)

    assert all(0.97 * TOKENS <= tokens <= TOKENS for tokens in tokens_of_windows(best.admissions, 4))


def test_the_best_in_turn_lets_no_order_pass_another():
    orders = list(itertools.islice(one_of_two_fifths_among_small_ones(), 300))
    best = best_possible(quota(), iter(orders), period=PERIOD, in_turn=True)

    assert [admission.tokens for admission in best.admissions] == [order.tokens for order in orders]


def test_many_processes_use_all_of_a_quota_and_none_gets_much_more_than_another():
    with fleet.store() as url, isolated():
        configure(store=url)
        for processes, most in ((16, 2), (64, 4)):
            outcome = fleet_simulation.Simulation(url, processes, Limits(), periods=3).run()
            assert outcome.tokens > 0.95 * 3 * TOKENS
            assert max(outcome.admitted) < most * min(outcome.admitted)
