"""@circuit_protected in its corners: which circuit is closed by hand, and what counts where nobody can say."""

import pytest

from resilience_kit import circuit_protected, get_all_resilience_stats, reset_circuit_breakers


def circuits():
    return {name: stats["state"] for name, stats in get_all_resilience_stats()["circuit_breakers"].items()}


def open_circuits(*names):
    for name in names:

        @circuit_protected(name, failure_threshold=1)
        def fail():
            raise ConnectionError

        with pytest.raises(ConnectionError):
            fail()


def test_one_circuit_is_closed_by_hand_and_the_others_stay_open():
    open_circuits("chat", "batch")

    reset_circuit_breakers("chat")

    assert circuits() == {"chat": "CLOSED", "batch": "OPEN"}


def test_all_circuits_are_closed_by_hand_where_none_is_named():
    open_circuits("chat", "batch")

    reset_circuit_breakers()

    assert circuits() == {"chat": "CLOSED", "batch": "CLOSED"}


def test_an_error_of_which_is_failure_cannot_say_what_it_is_counts_as_no_failure():
    def is_failure(error):
        raise KeyError("mine")

    @circuit_protected("chat", failure_threshold=1, is_failure=is_failure)
    def ask():
        raise ConnectionError

    with pytest.raises(KeyError, match="mine"):
        ask()

    assert circuits() == {"chat": "CLOSED"}
