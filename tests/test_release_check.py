"""What `make release-check` judges; the run itself takes minutes, and is not a test."""

import pytest

from tools import release_check
from tools.release_check import CheckFailedError, NotCheckedError, Release, compare, reason_for


@pytest.mark.parametrize(
    "licences",
    [
        ["MIT"],
        ["MIT License"],
        ["Apache-2.0"],
        ["BSD-3-Clause"],
        ["BSD License", "Apache Software License"],
        ["Apache-2.0 OR GPL-3.0-only"],
        ["(MIT AND Python-2.0)"],
        ["Apache-2.0 WITH LLVM-exception"],
    ],
)
def test_a_licence_that_asks_for_a_notice_at_most_is_allowed(licences):
    assert reason_for(licences) == "a notice at most"


def test_the_strictest_licence_of_several_counts():
    assert reason_for(["MIT AND MPL-2.0"]).startswith("copyleft by file")


@pytest.mark.parametrize(
    "licences", [[], ["GPL-3.0-only"], ["AGPL-3.0-or-later"], ["MIT AND GPL-2.0-only"], ["UNKNOWN"], ["Proprietary"]]
)
def test_a_licence_that_asks_for_more_or_is_not_known_is_not_allowed(licences):
    assert reason_for(licences) is None


def test_files_that_are_missing_or_too_many_are_named():
    with pytest.raises(CheckFailedError, match=r"missing: \['b'\]; not expected: \['c'\]"):
        compare({"a", "c"}, {"a", "b"})


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 0), (NotCheckedError("no network"), 2), (CheckFailedError("broken"), 1)]
)
def test_the_exit_code_is_green_only_if_all_was_checked(tmp_path, raised, code):
    def check():
        if raised:
            raise raised
        return "all is well"

    release = Release(tmp_path)
    release._row("one", lambda: "all is well")
    release._row("another", check)
    assert release._table() == code


def test_each_extra_has_something_to_run():
    assert release_check.COMMANDS.keys() == {"", *release_check.EXTRAS}


def test_what_a_program_says_last_is_told_when_it_fails():
    with pytest.raises(CheckFailedError, match="the reason"):
        release_check.run(release_check.sys.executable, "-c", "raise SystemExit('the reason')")
