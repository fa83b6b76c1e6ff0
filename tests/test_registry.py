import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    circuit_protected,
    configure,
    get_all_resilience_stats,
    rate_limited,
    reset_circuit_breakers,
    token_budget,
)
from resilience_kit.circuit_breaking import CircuitConfiguration, circuits
from resilience_kit.rate_limit_parameters import RateLimitConfiguration
from resilience_kit.rate_limits import rate_limits
from resilience_kit.registry import mode, start_anew
from resilience_kit.settings import current_settings
from resilience_kit.testing import isolated, no_waiting


def answer():
    return "four"


def limit_of(name):
    return get_all_resilience_stats()["rate_limiters"][name]


@pytest.mark.parametrize(
    ("decorator", "parameter"),
    [(rate_limited, "requests_per_minute"), (circuit_protected, "failure_threshold"), (token_budget, "budget_tokens")],
)
def test_two_declarations_that_contradict_each_other_are_refused_at_decoration_with_both_shown(decorator, parameter):
    decorator("chat", **{parameter: 100})
    with pytest.raises(
        ConfigurationError, match=rf"'chat' has two configurations: {parameter}=100 .* and now {parameter}=200\. "
    ):
        decorator("chat", **{parameter: 200})


def test_two_declarations_that_contradict_each_other_leave_the_first_as_it_was():
    ask = rate_limited("chat", requests_per_minute=100)(answer)
    with pytest.raises(ConfigurationError):
        rate_limited("chat", requests_per_minute=200, tokens_per_minute=5)
    ask()
    assert (limit_of("chat")["requests_per_minute"], limit_of("chat")["tokens_per_minute"]) == (100, 150_000)


def test_two_declarations_that_are_equal_share_one_limit():
    for _ in range(2):
        rate_limited("chat", requests_per_minute=100, min_interval=0)(answer)()
    assert limit_of("chat")["requests_in_window"] == 2


def test_two_declarations_that_complete_each_other_make_one_limit():
    ask = rate_limited("chat", requests_per_minute=100)(answer)
    rate_limited("chat", tokens_per_minute=1_000)
    ask()
    assert (limit_of("chat")["requests_per_minute"], limit_of("chat")["tokens_per_minute"]) == (100, 1_000)


def test_two_declarations_of_which_one_says_nothing_share_what_the_other_says():
    bare = rate_limited("chat")(answer)
    rate_limited("chat", requests_per_minute=100)
    bare()
    assert limit_of("chat")["requests_per_minute"] == 100


def test_two_declarations_of_which_one_is_bare_share_the_name_default():
    bare = rate_limited(answer)
    rate_limited(requests_per_minute=100)
    bare()
    assert limit_of("default")["requests_per_minute"] == 100


def test_declarations_of_different_kinds_do_not_meet():
    rate_limited("chat", requests_per_minute=100)(circuit_protected("chat")(token_budget("chat")(answer)))()
    stats = get_all_resilience_stats()
    assert all("chat" in stats[section] for section in ("rate_limiters", "circuit_breakers", "token_budgets"))


def test_a_declaration_of_a_name_in_use_is_refused_if_it_adds_something_and_says_what_to_do():
    rate_limited("chat", requests_per_minute=100)(answer)()
    with pytest.raises(
        ConfigurationError,
        match=r"rate limit 'chat' is in use already: this declaration adds tokens_per_minute=5 to "
        r"requests_per_minute=100\. Say it where the name is used first, or use another name\.",
    ):
        rate_limited("chat", tokens_per_minute=5)


def test_a_declaration_of_a_name_in_use_that_was_used_bare_is_told_that_the_defaults_are_in_use():
    rate_limited("chat")(answer)()
    with pytest.raises(ConfigurationError, match="adds tokens_per_minute=5 to the defaults"):
        rate_limited("chat", tokens_per_minute=5)


@pytest.mark.parametrize("said", [{}, {"requests_per_minute": 100}], ids=["nothing", "the same"])
def test_a_declaration_of_a_name_in_use_joins_it_if_it_says_nothing_new(said):
    rate_limited("chat", requests_per_minute=100, min_interval=0)(answer)()
    rate_limited("chat", **said)(answer)()
    assert limit_of("chat")["requests_in_window"] == 2


def test_a_reset_of_an_unknown_name_tells_the_known_ones():
    circuit_protected("chat")(answer)()
    circuit_protected("search")
    with pytest.raises(ConfigurationError, match=r"there is no circuit 'caht'\. Known names: chat, search$"):
        reset_circuit_breakers("caht")


def test_a_reset_by_name_where_nothing_has_a_name_says_so():
    with pytest.raises(ConfigurationError, match="Known names: none yet"):
        reset_circuit_breakers("chat")


def test_a_reset_of_a_name_that_is_declared_but_was_never_called_does_nothing():
    circuit_protected("chat")
    reset_circuit_breakers("chat")
    assert circuits.items() == {}


def test_threads_that_use_a_name_first_at_the_same_moment_get_one_object(restless_threads):
    together = threading.Barrier(8)

    def first_use(_):
        together.wait()
        return [circuits.get(f"circuit {number}", CircuitConfiguration()) for number in range(50)]

    with ThreadPoolExecutor(8) as threads:
        used = list(threads.map(first_use, range(8)))
    assert all(len(set(circuits_of_a_name)) == 1 for circuits_of_a_name in zip(*used, strict=True))


def test_the_parameters_of_a_name_are_known_before_its_first_use():
    rate_limits.declare("chat", RateLimitConfiguration(requests_per_minute=100))
    assert rate_limits.describe("chat", RateLimitConfiguration())["requests_per_minute"].value == 100


def test_the_parameters_of_a_name_in_use_are_those_that_it_was_built_with():
    rate_limited("chat")(answer)()
    configure(ResilienceSettings(requests_per_minute=100))
    assert rate_limits.describe("chat", RateLimitConfiguration())["requests_per_minute"].value == 60


def test_a_forked_child_does_not_wait_for_the_slots_of_its_parents_threads():
    script = """
import os, threading
from resilience_kit import rate_limited

holding, done = threading.Event(), threading.Event()

@rate_limited("chat", max_concurrent=1, min_interval=0, max_wait=0.1)
def ask(hold):
    if hold:
        holding.set()
        done.wait(5)

thread = threading.Thread(target=ask, args=[True])
thread.start()
holding.wait(5)
child = os.fork()
if child == 0:
    ask(False)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - the script above

    assert run.stdout == "7\n", run.stderr


def test_what_starts_anew_has_all_its_quota_and_keeps_what_was_declared():
    ask = rate_limited("chat", requests_per_minute=1)(answer)
    ask()
    start_anew()
    ask()

    assert limit_of("chat")["requests_in_window"] == 1
    assert limit_of("chat")["requests_per_minute"] == 1


def test_isolated_starts_with_no_names():
    rate_limited("chat")(answer)()
    with isolated():
        assert get_all_resilience_stats()["rate_limiters"] == {}


def test_isolated_lets_a_name_be_declared_otherwise():
    rate_limited("chat", requests_per_minute=100)(answer)()
    with isolated():
        rate_limited("chat", requests_per_minute=200)(answer)()
        assert limit_of("chat")["requests_per_minute"] == 200


def test_isolated_keeps_the_time_that_was_skipped_in_it_to_itself():
    ask = rate_limited("chat", requests_per_minute=1)(lambda: "four")
    before = mode.seconds_skipped
    with isolated(), no_waiting():
        ask()
        ask()

    assert mode.seconds_skipped == before


def test_isolated_forgets_what_was_declared_in_it():
    with isolated():
        rate_limited("chat", requests_per_minute=200)
    rate_limited("chat", requests_per_minute=100)(answer)()
    assert limit_of("chat")["requests_per_minute"] == 100


def test_isolated_keeps_what_was_declared_of_a_function_before_it():
    bare = rate_limited("chat")(answer)
    rate_limited("chat", requests_per_minute=100)
    with isolated(), isolated():
        bare()
        assert limit_of("chat")["requests_per_minute"] == 100


def test_isolated_tells_what_was_declared_of_a_function_before_it():
    rate_limited("chat", requests_per_minute=100)
    with isolated():
        assert rate_limits.describe("chat", RateLimitConfiguration())["requests_per_minute"].value == 100


def test_isolated_gives_names_counters_and_settings_back_even_when_the_test_raises():
    configure(ResilienceSettings(min_request_interval_ms=0))
    ask = rate_limited("chat")(answer)
    ask()
    ask()
    before = get_all_resilience_stats()["rate_limiters"], current_settings()

    def failing_test():
        with isolated():
            configure(ResilienceSettings(requests_per_minute=1))
            ask()
            raise AssertionError

    with pytest.raises(AssertionError):
        failing_test()
    assert (get_all_resilience_stats()["rate_limiters"], current_settings()) == before


def test_isolated_reads_the_settings_anew(monkeypatch):
    configure(ResilienceSettings(requests_per_minute=1))
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "7")
    with isolated():
        assert current_settings().requests_per_minute == 7


def test_a_private_name_is_not_told_in_statistics():
    with rate_limits.private("chat"):
        rate_limited("chat")(answer)()
        assert get_all_resilience_stats()["rate_limiters"].get("chat", {}).get("in_flight") is None


def test_a_private_name_is_not_reset_with_the_others():
    with rate_limits.private("chat"):
        ask = rate_limited("chat", requests_per_minute=60)(answer)
        ask()
        limit = rate_limits.get("chat", RateLimitConfiguration())
        rate_limits.reset()
        assert limit.statistics().requests_in_window == 1


def test_a_private_name_is_forgotten_at_its_end():
    with rate_limits.private("chat"):
        rate_limited("chat", requests_per_minute=1)(answer)()
    rate_limited("chat", requests_per_minute=2)(answer)()
    assert limit_of("chat")["requests_in_window"] == 1


def test_a_private_name_whose_end_another_threads_test_in_isolation_sees_is_forgotten_outside_of_it_too():
    with ExitStack() as private:
        private.enter_context(rate_limits.private("chat"))
        rate_limited("chat", requests_per_minute=1)(answer)()
        with isolated():
            private.close()
    assert "chat" not in rate_limits.items()
    rate_limited("chat", requests_per_minute=2)(answer)
