"""Budgets of a fleet, on a real server: what all processes use of one, and what becomes of it when something dies."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from blockbuster import blockbuster_ctx

import resilience_kit
from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    StoreContentError,
    StoreUnavailableError,
    TokenBudgetExceededError,
    configure,
    get_all_resilience_stats,
    reset_all,
    token_budget,
)
from resilience_kit.events import BudgetWaiting
from resilience_kit.fleet import fleet_budgets
from resilience_kit.fleet.fleet_budgets import FleetBudget
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.fleet.membership import Member
from resilience_kit.testing import isolated, no_waiting
from resilience_kit.token_budgets import NOTHING, Amount, Budget, BudgetConfiguration, token_budgets
from resilience_kit.waiting import TaskWaiting, ThreadWaiting

BEAT = 0.05
NAME = "Math: {Agent} %*é"
PROGRAM = """
import sys
from resilience_kit import ResilienceSettings, StoreUnavailableError, TokenBudgetExceededError, configure, token_budget
from resilience_kit.fleet import fleet_budgets

url, prefix, limit, lease = sys.argv[1:]
fleet_budgets._LEASE = float(lease)
configure(ResilienceSettings(
    resilience_store=url, resilience_store_prefix=prefix, resilience_store_deadline_seconds=5,
))

@token_budget("agent", budget_tokens=int(limit), per="day")
def ask(prompt, max_tokens, used, hold):
    if hold:
        print("held", flush=True)
        sys.stdin.readline()
    return {"usage": {"prompt_tokens": 0, "completion_tokens": used}}

def spend(tokens, used=None, hold=False):
    try:
        ask("", tokens, tokens if used is None else used, hold)
    except TokenBudgetExceededError:
        return False
    return True

for line in sys.stdin:
    command, number = line.split()
    if command == "spend":
        print("spent" if spend(int(number)) else "refused", flush=True)
    elif command == "hold":
        spend(int(number), hold=True)
    elif command == "hammer":
        total = misses = 0
        while misses < 20:
            tokens = 1 + total % int(number)
            if spend(tokens + 3, tokens):
                total += tokens
            else:
                misses += 1
        print(total, flush=True)
"""


def eventually(condition, *, seconds=20):
    """Wait until something is so; threads and processes take their time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


class Process:
    """A real process with a budget, told what to do line by line."""

    def __init__(self, *arguments):
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # where the kit of these tests is
            cwd=Path(resilience_kit.__file__).parents[1],
        )

    def tell(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self):
        return self._process.stdout.readline().strip()

    def ask(self, line):
        self.tell(line)
        return self.hear()

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(20)

    def end(self):
        """Let it come to its end as a program does."""
        if self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait(20)
        self._process.stdout.close()
        with suppress(OSError):
            self._process.stdin.close()


@pytest.fixture
def start_process(store_url, prefix):
    """Start a process of the fleet of this test's prefix."""
    started = []

    def start(limit=100, *, url=store_url, lease=10.0):
        started.append(Process(url, prefix, limit, lease))
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture
def join(connect, store_url, monkeypatch):
    """Make budgets as processes of a fleet have them, each with a connection and a member of its own."""
    members = []
    monkeypatch.setattr(fleet_budgets, "_SHARES", 0.5)
    monkeypatch.setattr(fleet_budgets, "_RETRY", 0.05)

    def join(tokens=None, *, usd=None, per=None, url=store_url, name=NAME, deadline=5, beat=BEAT):
        members.append(Member(connect(url, deadline=deadline), beat=beat))
        members[-1].start()
        configuration = BudgetConfiguration(tokens, usd, per)
        budget = FleetBudget(name, configuration, Fleet(members[-1].connection, members[-1]))
        budget.member = members[-1]
        return budget

    yield join
    for member in members:
        member.close()


@pytest.fixture
def in_a_fleet(store_url, prefix):
    """Let the test's process share the store, by its settings alone."""
    configure(
        ResilienceSettings(
            resilience_store=store_url, resilience_store_prefix=prefix, resilience_store_deadline_seconds=5
        )
    )


def reserve(budget, tokens=0, *, usd=0.0, may_wait=False):
    """Reserve as the call of a sync function does."""
    coroutine = budget.reserve(Amount(tokens, usd), ThreadWaiting(), may_wait=may_wait)
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    return stopped.value.value


def fits(budget, tokens=0, *, usd=0.0):
    """Whether the budget lets a call in; it is given back at once."""
    try:
        budget.settle(reserve(budget, tokens, usd=usd), NOTHING)
    except TokenBudgetExceededError:
        return False
    return True


def spend(budget, tokens=0, *, usd=0.0):
    budget.settle(reserve(budget, tokens, usd=usd), Amount(tokens, usd))


def spent_over(budget, *, least):
    """Spend one by one until a call is refused. Returns how many were not."""
    count = 0
    while count < least:
        try:
            spend(budget, 1)
        except TokenBudgetExceededError:
            break
        count += 1
    return count


def used(budget):
    return budget.statistics().tokens_used


def reserved(budget):
    return budget.statistics().tokens_reserved


def lose(server, *budgets):
    """Kill a server, and wait until all know."""
    server.kill()
    eventually(lambda: all(budget.member.is_lost for budget in budgets))


def find(server, *budgets):
    """Start a killed server with nothing in it, and wait until all are back."""
    server.start()
    eventually(lambda: not any(budget.member.is_lost for budget in budgets))


# Shared


def test_four_processes_that_hammer_a_budget_never_use_more_than_it_has(start_process):
    processes = [start_process(2_000) for _ in range(4)]
    for process in processes:
        process.tell("hammer 7")
    totals = [int(process.hear()) for process in processes]
    assert 2_000 - 10 * 4 <= sum(totals) <= 2_000


def test_four_processes_that_hammer_a_budget_all_get_some_of_it(start_process):
    processes = [start_process(4_000) for _ in range(4)]
    assert [process.ask("spend 1") for process in processes] == ["spent"] * 4


def test_what_one_process_uses_another_has_not(join):
    spend(join(100), 80)
    assert [fits(join(100), tokens) for tokens in (21, 20)] == [False, True]


def test_what_one_process_holds_another_has_not(join):
    reserve(join(100), 80)
    assert [fits(join(100), tokens) for tokens in (21, 20)] == [False, True]


def test_a_process_that_starts_anew_finds_what_was_used_before(start_process):
    first = start_process()
    first.ask("spend 80")
    first.end()
    second = start_process()
    assert [second.ask("spend 21"), second.ask("spend 20")] == ["refused", "spent"]


def test_what_a_killed_process_held_is_free_again_after_its_lease(start_process):
    killed, other = start_process(lease=4), start_process(lease=4)
    other.ask("spend 1")
    killed.tell("hold 80")
    assert killed.hear() == "held"
    killed.kill()
    before = other.ask("spend 30")
    eventually(lambda: other.ask("spend 30") == "spent")
    assert before == "refused"


def test_what_a_living_process_holds_stays_held_past_its_lease(join, monkeypatch):
    monkeypatch.setattr(fleet_budgets, "_LEASE", 1.0)
    holder, other = join(100), join(100)
    reserve(holder, 80)
    time.sleep(1.5)
    assert not fits(other, 30)


def test_a_call_that_outlasts_its_lease_is_counted_all_the_same(join, monkeypatch):
    monkeypatch.setattr(fleet_budgets, "_LEASE", 0.1)
    holder, other = join(100), join(100)
    reservation = reserve(holder, 80)
    # as if it were stopped
    holder._beat = lambda: None
    with holder._guard:
        eventually(lambda: fits(other, 30))
    holder.settle(reservation, Amount(75))
    eventually(lambda: not fits(other, 26))
    assert fits(other, 25)


def test_what_a_call_used_takes_the_place_of_what_was_reserved(join):
    budget, other = join(100), join(100)
    budget.settle(reserve(budget, 80), Amount(10))
    eventually(lambda: (used(other), reserved(other)) == (10, 0) or (fits(other, 1) and False))
    assert fits(other, 90)


def test_what_a_call_used_beyond_its_reservation_counts_too(join):
    budget, other = join(100), join(100)
    budget.settle(reserve(budget, 10), Amount(99))
    eventually(lambda: not fits(other, 2))


def test_a_process_never_waits_for_its_own_settlements(join):
    budget = join(100)
    for _ in range(50):
        budget.settle(reserve(budget, 51), Amount(1))
    eventually(lambda: used(budget) == 50)


def test_a_call_that_overtakes_what_is_given_back_is_not_refused_for_it(join, monkeypatch):
    budget = join(100)
    reservation = reserve(budget, 100)
    run_blocking = budget._connection.run_blocking
    telling = threading.Event()

    def slow(script, keys, arguments=()):
        if arguments[0] == "tell":
            telling.set()
            time.sleep(0.3)
        return run_blocking(script, keys, arguments)

    monkeypatch.setattr(budget._connection, "run_blocking", slow)
    budget.settle(reservation, NOTHING)
    assert telling.wait(20)
    reserve(budget, 100)


def test_a_name_of_any_characters_shares_nothing_with_another(join):
    spend(join(100, name="a:{b}"), 100)
    assert fits(join(100, name="a:b"), 100)


def test_each_process_keeps_to_its_own_limit_for_what_all_use(join):
    spend(join(100), 80)
    assert [fits(join(90), 20), fits(join(100), 20)] == [False, True]


def test_dollars_are_shared_as_tokens_are(join):
    spend(join(usd=0.3), usd=0.1)
    other = join(usd=0.3)
    assert [fits(other, usd=0.200_000_001), fits(other, usd=0.2)] == [False, True]


def test_a_refusal_says_what_is_left_over_the_fleet(join):
    spend(join(100, per=60), 80)
    with pytest.raises(TokenBudgetExceededError, match=r"needs 30 tokens, and 20 of budget_tokens=100 are left") as it:
        reserve(join(100, per=60), 30)
    assert (it.value.remaining, 55 < it.value.retry_after < 61) == (20, True)


def test_the_state_of_a_budget_does_not_grow_with_its_calls(join, store_url):
    budget = join(1_000_000)
    for _ in range(100):
        spend(budget, 3)
    with redis.Redis.from_url(store_url) as client:
        assert client.hlen(budget._keys[0]) == 12


# Decorated functions


def spending(max_tokens):
    """Use as many tokens as it may."""
    return {"usage": {"prompt_tokens": 0, "completion_tokens": max_tokens}}


def test_the_setting_alone_makes_a_budget_one_of_the_fleet(in_a_fleet, join):
    token_budget("MathAgent", budget_tokens=100)(spending)(80)
    eventually(lambda: not fits(join(100, name="MathAgent"), 21))


async def test_a_coroutine_function_reserves_without_blocking_its_loop(in_a_fleet):
    @token_budget("MathAgent", budget_tokens=100)
    async def ask(max_tokens):
        return spending(max_tokens)

    # loads what is loaded once
    await ask(1)
    with blockbuster_ctx():
        await asyncio.gather(*(ask(1) for _ in range(20)))

    def used():
        return get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_used"]

    # a message that the store has counted, and whose answer is on its way, counts twice until it is there
    await asyncio.to_thread(eventually, lambda: used() == 21)


def test_a_budget_without_a_bound_stays_out_of_the_store(in_a_fleet):
    token_budget("MathAgent")(spending)(80)
    assert type(token_budgets.items()["MathAgent"]) is Budget


def test_a_failed_call_gives_its_reservation_back_to_the_fleet(in_a_fleet, join):
    @token_budget("MathAgent", budget_tokens=100)
    def ask(max_tokens):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        ask(100)
    other = join(100, name="MathAgent")
    eventually(lambda: fits(other, 100))


async def test_a_cancelled_call_gives_its_reservation_back_to_the_fleet(in_a_fleet, join):
    sent = asyncio.Event()

    @token_budget("MathAgent", budget_tokens=100)
    async def ask(max_tokens):
        sent.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(ask(100))
    await sent.wait()
    call.cancel()
    await asyncio.wait([call])
    other = join(100, name="MathAgent")
    await asyncio.to_thread(eventually, lambda: fits(other, 100))


def test_a_program_that_ends_tells_what_it_used(store_url, prefix, join):
    with isolated():
        configure(ResilienceSettings(resilience_store=store_url, resilience_store_prefix=prefix))
        token_budget("MathAgent", budget_tokens=100)(lambda max_tokens: spending(30))(100)
    assert [fits(join(100, name="MathAgent"), tokens) for tokens in (71, 70)] == [False, True]


# Cancellation


@pytest.mark.parametrize("yields", range(12))
async def test_a_reservation_that_is_cancelled_on_its_way_holds_nothing(join, yields):
    budget, other = join(100), join(100)
    # so that it is connected
    budget.settle(await budget.reserve(Amount(1), TaskWaiting(), may_wait=False), NOTHING)
    call = asyncio.create_task(budget.reserve(Amount(100), TaskWaiting(), may_wait=False))
    for _ in range(yields):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    if not call.cancelled():
        budget.settle(call.result(), NOTHING)
    await asyncio.to_thread(eventually, lambda: fits(other, 100))


async def test_a_reservation_whose_answer_is_lost_holds_nothing(join, proxy, own_server):
    budget, other = join(100, url=proxy.url, deadline=0.5), join(100, url=own_server.url)
    spend(other, 1)
    budget.settle(await budget.reserve(Amount(1), TaskWaiting(), may_wait=False), NOTHING)
    proxy.cuts_answers = True
    with suppress(TokenBudgetExceededError):
        budget.settle(await budget.reserve(Amount(99), TaskWaiting(), may_wait=False), NOTHING)
    proxy.cuts_answers = False
    await asyncio.to_thread(eventually, lambda: fits(other, 99))


async def test_many_that_are_cancelled_among_many_leave_the_right_sum(join):
    budget, other = join(100_000), join(100_000)

    async def call(number):
        reservation = await budget.reserve(Amount(10), TaskWaiting(), may_wait=False)
        await asyncio.sleep(0)
        budget.settle(reservation, Amount(1))

    calls = [asyncio.create_task(call(number)) for number in range(300)]
    for number, task in enumerate(calls):
        if number % 3 == 0:
            await asyncio.sleep(0)
            task.cancel()
    await asyncio.wait(calls)
    done = sum(not task.cancelled() for task in calls)
    # a message that the store has counted, and whose answer is on its way, counts twice until it is there
    await asyncio.to_thread(eventually, lambda: used(budget) == done)
    await asyncio.to_thread(eventually, lambda: not fits(other, 100_000 - done + 1) and fits(other, 100_000 - done))


def test_threads_that_reserve_and_settle_at_once_leave_the_right_sum(join, restless_threads):
    budget, other = join(100_000), join(100_000)

    def work():
        for _ in range(50):
            budget.settle(reserve(budget, 10), Amount(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: not fits(other, 100_000 - 199) and fits(other, 100_000 - 200))


# Periods


def test_a_period_turns_for_the_whole_fleet(join):
    budget, other = join(100, per=0.5), join(100, per=0.5)
    spend(budget, 100)
    before = fits(other, 100)
    eventually(lambda: fits(other, 100))
    assert not before


def test_a_call_that_waits_is_let_in_when_the_period_turns(join, heard):
    spend(join(100, per=0.5), 100)
    reserve(join(100, per=0.5), 100, may_wait=True)
    assert [event.requested for event in heard if isinstance(event, BudgetWaiting)][:1] == [100]


async def test_a_call_that_waits_does_not_block_its_loop(join):
    spend(join(100, per=0.5), 100)
    budget = join(100, per=0.5)
    waiting = asyncio.create_task(budget.reserve(Amount(100), TaskWaiting(), may_wait=True))
    ticks = 0
    while not waiting.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5


def test_where_a_test_skips_its_waits_a_call_is_refused_rather_than_asked_without_end(join):
    spend(join(100, per=60), 100)
    with no_waiting(), pytest.raises(TokenBudgetExceededError):
        reserve(join(100, per=60), 1, may_wait=True)


def test_a_call_of_an_earlier_period_is_settled_with_that_one(join):
    budget, other = join(100, per=0.4), join(100, per=0.4)
    reservation = reserve(budget, 100)
    eventually(lambda: fits(other, 50))
    budget.settle(reservation, Amount(100))
    spend(budget, 1)
    eventually(lambda: used(budget) == 1)


def test_a_budget_without_a_period_is_kept_for_weeks(join, store_url):
    budget = join(100)
    spend(budget, 1)
    with redis.Redis.from_url(store_url) as client:
        assert client.ttl(budget._keys[0]) > 29 * 86_400


def test_a_budget_whose_period_is_over_is_forgotten(join, store_url):
    budget = join(100, per=60)
    spend(budget, 1)
    with redis.Redis.from_url(store_url) as client:
        assert all(60 < client.ttl(key) < 2 * 3_600 for key in budget._keys)


def test_another_period_in_another_process_is_refused_with_both(join):
    spend(join(100, per=3_600), 1)
    with pytest.raises(ConfigurationError, match=r"per=3600 was declared in another process .* now per=60\."):
        reserve(join(100, per=60), 1)


def test_a_reset_gives_a_budget_another_period(join):
    spend(join(100, per=3_600), 1)
    budget = join(100, per=60)
    budget.reset()
    reserve(budget, 100)


def test_another_period_counts_from_the_next_one_on(join):
    spend(join(100, per=0.2), 100)
    budget = join(100, per=60)
    time.sleep(0.3)
    reserve(budget, 100)
    assert budget.statistics().seconds_left > 1


def test_a_reset_starts_the_budget_anew_for_this_process_at_once(in_a_fleet):
    ask = token_budget("MathAgent", budget_tokens=100)(spending)
    ask(100)
    reset_all()
    ask(100)


def test_a_reset_starts_the_budget_anew_for_the_whole_fleet(join):
    budget, other = join(100), join(100)
    spend(budget, 100)
    budget.reset()
    eventually(lambda: fits(other, 100))


def test_a_reset_among_many_calls_happens_once(join):
    budget = join(1_000)

    # so that a call is the first to tell of it
    budget._tell_soon = lambda: None

    async def run():
        budget.reset()
        calls = [budget.reserve(Amount(10), TaskWaiting(), may_wait=False) for _ in range(50)]
        return await asyncio.gather(*calls)

    asyncio.run(run())
    assert not fits(join(1_000), 501)


def test_a_call_of_before_a_reset_is_not_counted_after_it(join):
    budget, other = join(100), join(100)
    reservation = reserve(other, 50)
    budget.reset()
    eventually(lambda: fits(budget, 100) and reserved(other) == 0)
    other.settle(reservation, Amount(50))
    eventually(lambda: fits(other, 100))


# Statistics


def test_statistics_show_what_the_others_used_and_hold(join):
    budget, other = join(100, per=60), join(100, per=60)
    spend(other, 1)
    spend(budget, 10)
    reserve(budget, 5)
    eventually(lambda: (used(other), reserved(other)) == (11, 5))


def test_statistics_of_a_period_that_is_over_show_nothing(join):
    budget = join(100, per=0.2)
    spend(budget, 10)
    before = used(budget)
    eventually(lambda: budget.statistics().seconds_left is None)
    assert (before, used(budget)) == (10, 0)


# What lies in the store


@pytest.mark.parametrize(
    "garble",
    [
        lambda client, keys: client.set(keys[0], "garbage"),
        lambda client, keys: client.delete(keys[0]) and client.hset(keys[0], "mine", "yours"),
        lambda client, keys: client.hset(keys[0], "used_tokens", "many"),
        lambda client, keys: client.hset(keys[0], "used_tokens", "9" * 400),
        lambda client, keys: client.hset(keys[0], "epoch", "e" * 1_000),
        lambda client, keys: client.hdel(keys[0], "serial"),
        lambda client, keys: client.hset(keys[0], f"@{holder_in(client, keys)}", "1 2 three"),
        lambda client, keys: client.set(keys[1], "garbage"),
    ],
    ids=["a text", "another hash", "no number", "a long number", "a long epoch", "a hole", "a holder", "leases"],
)
def test_garbage_under_a_budgets_key_is_an_error_that_names_it(join, store_url, garble):
    budget = join(100)
    spend(budget, 1)
    with redis.Redis.from_url(store_url) as client:
        garble(client, budget._keys)
        with pytest.raises(StoreContentError) as caught:
            reserve(budget, 1)
        client.delete(*budget._keys)
    assert caught.value.key in budget._keys


def holder_in(client, keys):
    return client.zrange(keys[1], 0, 0)[0].decode()


# A store that is lost


def test_what_was_used_without_the_store_is_told_when_it_is_back(join, own_server):
    budget = join(100, url=own_server.url)
    spend(budget, 10)
    lose(own_server, budget)
    spend(budget, 20)
    find(own_server, budget)
    other = join(100, url=own_server.url)
    assert used_in_store(other, 30)


def used_in_store(budget, tokens):
    """Wait until the store says that so many are used; a process that is new asks it by reserving."""

    def is_so():
        fits(budget, 1)
        return used(budget) == tokens

    eventually(is_so)
    return True


def test_what_was_told_in_vain_or_not_is_counted_once(join, proxy, own_server):
    budget, other = join(100, url=proxy.url, deadline=0.5), join(100, url=own_server.url)
    reservation = reserve(budget, 50)
    proxy.cuts_answers = True
    budget.settle(reservation, Amount(40))
    eventually(lambda: budget.member.is_lost)
    proxy.cuts_answers = False
    eventually(lambda: not budget.member.is_lost)
    assert used_in_store(other, 40)


def test_what_others_used_outlives_the_loss_of_the_stores_memory(join, own_server):
    gone, budget = join(100, url=own_server.url), join(100, url=own_server.url)
    spend(gone, 40)
    eventually(lambda: fits(budget, 1) and used(budget) == 40)
    gone.member.close()
    lose(own_server, budget)
    find(own_server, budget)
    assert used_in_store(join(100, url=own_server.url), 40)


def test_a_flushed_store_is_told_again(join, own_server):
    budget = join(100, url=own_server.url)
    spend(budget, 40)
    is_told(budget)
    with own_server.client() as client:
        client.flushall()
    assert used_in_store(join(100, url=own_server.url), 40)


def test_a_store_that_comes_back_with_an_older_state_is_put_right(join, own_server):
    budget = join(100, url=own_server.url)
    spend(budget, 40)
    is_told(budget)
    with own_server.client() as client:
        client.hset(budget._keys[0], "used_tokens", "10")
    assert used_in_store(join(100, url=own_server.url), 40)


def is_told(budget):
    """Wait until the store knows all that a process used."""

    def is_so():
        with budget._guard:
            owed = (budget._released, budget._untold, budget._batch)
        return not budget._settled and set(owed) == {fleet_budgets._NONE}

    eventually(is_so)


def test_without_the_store_each_process_keeps_to_its_share_of_what_is_left(join, own_server):
    budgets = [join(100, url=own_server.url) for _ in range(2)]
    spend(budgets[0], 40)
    eventually(lambda: all(fits(budget, 1) and used(budget) == 40 and budget.member.live == 2 for budget in budgets))
    eventually(lambda: all(reserved(budget) == 0 for budget in budgets))
    lose(own_server, *budgets)
    assert [spent_over(budget, least=100) for budget in budgets] == [30, 30]


def test_a_call_that_began_before_the_loss_takes_nothing_of_the_share(join, own_server):
    budget = join(100, url=own_server.url)
    reservation = reserve(budget, 60)
    lose(own_server, budget)
    spend(budget, 40)
    budget.settle(reservation, Amount(50))
    assert spent_over(budget, least=100) == 10


def test_a_fleet_that_loses_its_store_and_finds_it_again_keeps_within_the_budget(join, own_server):
    budgets = [join(200, url=own_server.url) for _ in range(3)]
    for budget in budgets:
        spend(budget, 20)
    eventually(lambda: all(fits(it, 1) and used(it) == 60 and it.member.live == 3 for it in budgets))
    eventually(lambda: all(reserved(budget) == 0 for budget in budgets))
    lose(own_server, *budgets)
    total = 60 + sum(spent_over(budget, least=25) for budget in budgets)
    own_server.start()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        total += sum(spent_over(budget, least=1) for budget in budgets)
    assert total == 200


def test_a_process_that_is_back_before_another_leaves_it_what_it_used_meanwhile(join, own_server, monkeypatch):
    monkeypatch.setattr(fleet_budgets, "_SHARES", 5)
    early, late = join(100, url=own_server.url), join(100, url=own_server.url, beat=1)
    eventually(lambda: all(fits(budget, 1) and budget.member.live == 2 for budget in (early, late)))
    eventually(lambda: all(reserved(budget) == 0 for budget in (early, late)))
    own_server.kill()
    total = spent_over(late, least=100)
    eventually(lambda: early.member.is_lost)
    find(own_server, early)
    assert total + spent_over(early, least=100) == 100


def test_a_period_that_turns_without_the_store_gives_each_its_share(join, own_server):
    budgets = [join(100, per=1.5, url=own_server.url) for _ in range(2)]
    eventually(lambda: all(fits(budget, 1) and budget.member.live == 2 for budget in budgets))
    lose(own_server, *budgets)
    spent_over(budgets[0], least=100)
    eventually(lambda: fits(budgets[0], 1))
    assert spent_over(budgets[0], least=100) == 50


def test_a_call_that_waits_without_the_store_is_let_in_when_the_period_turns(join, own_server):
    budget = join(100, per=0.5, url=own_server.url)
    spend(budget, 100)
    lose(own_server, budget)
    reserve(budget, 100, may_wait=True)


def test_refuse_refuses_at_once(join, own_server):
    configure(on_store_failure="refuse")
    budget = join(100, url=own_server.url)
    spend(budget, 1)
    lose(own_server, budget)
    with pytest.raises(StoreUnavailableError):
        reserve(budget, 1)


def test_a_call_that_is_on_its_way_during_a_reset_is_asked_for_again(join, monkeypatch):
    budget = join(100)
    spend(budget, 50)
    run_blocking = budget._connection.run_blocking

    def reset_meanwhile(script, keys, arguments=()):
        reply = run_blocking(script, keys, arguments)
        if arguments[0] == "reserve":
            monkeypatch.undo()
            budget.reset()
        return reply

    monkeypatch.setattr(budget._connection, "run_blocking", reset_meanwhile)
    reserve(budget, 40)
    assert [fits(join(100), tokens) for tokens in (61, 60)] == [False, True]


def test_refuse_refuses_the_call_that_finds_out_too(join, own_server):
    configure(on_store_failure="refuse")
    # so late that no sign of life finds out before
    budget = join(100, url=own_server.url, beat=60)
    spend(budget, 1)
    own_server.kill()
    with pytest.raises(StoreUnavailableError):
        reserve(budget, 1)


def test_open_gives_each_process_all_of_the_budget(join, own_server):
    configure(on_store_failure="open")
    budgets = [join(100, url=own_server.url) for _ in range(2)]
    spend(budgets[0], 40)
    lose(own_server, *budgets)
    assert [spent_over(budget, least=200) for budget in budgets] == [100, 100]


def test_what_was_used_in_the_open_is_told_when_the_store_is_back(join, own_server):
    configure(on_store_failure="open")
    budget = join(100, url=own_server.url)
    spend(budget, 40)
    lose(own_server, budget)
    spend(budget, 50)
    find(own_server, budget)
    assert used_in_store(join(100, url=own_server.url), 90)


def test_a_reset_without_the_store_reaches_the_fleet_when_it_is_back(join, own_server):
    budget = join(100, url=own_server.url)
    spend(budget, 100)
    lose(own_server, budget)
    budget.reset()
    find(own_server, budget)
    assert used_in_store(join(100, url=own_server.url), 0)


def test_a_process_whose_fleet_is_closed_has_a_budget_of_its_own(join):
    budget = join(100)
    spend(budget, 40)
    budget.member.close()
    assert spent_over(budget, least=100) == 60
