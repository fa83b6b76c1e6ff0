"""Rules from Python and from a file: what is said holds, and what cannot work stops at once."""

import pytest

from resilience_kit import ConfigurationError
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule, Silence, load_rules


@pytest.fixture
def load(tmp_path):
    def load(text):
        file = tmp_path / "alerts.toml"
        file.write_text(text, encoding="utf-8")
        return load_rules(file)

    return load


def test_an_empty_file_leaves_the_default_rules(load):
    assert load("").rules == DEFAULT_RULES


def test_a_default_rule_is_changed_where_the_file_says_so_and_nowhere_else(load):
    rules = {
        rule.name: rule for rule in load("[rules.slow-waits]\nabove = 20\nclears_at = 3\nnames = ['chat']\n").rules
    }
    (default,) = [rule for rule in DEFAULT_RULES if rule.name == "slow-waits"]

    changed = rules["slow-waits"]
    assert (changed.above, changed.clears_at, changed.names) == (20, 3, ("chat",))
    assert (changed.measure, changed.for_seconds) == (default.measure, default.for_seconds)
    assert [rule for rule in rules.values() if rule.name != "slow-waits"] == [
        rule for rule in DEFAULT_RULES if rule.name != "slow-waits"
    ]


def test_a_default_bound_that_is_moved_takes_the_other_one_along(load):
    rules = {rule.name: rule for rule in load("[rules.slow-waits]\nabove = 2\n").rules}

    assert rules["slow-waits"].clears_at == 1


def test_a_rule_of_ones_own_comes_after_the_default_ones(load):
    own = load("[rules.nightly]\nmeasure = 'rate_limited_share'\nabove = 0.2\nseverity = 'critical'\n").rules[-1]

    assert own == Rule(name="nightly", measure="rate_limited_share", above=0.2, severity="critical")


def test_a_rule_can_be_switched_off(load):
    assert "truncations" not in {rule.name for rule in load("[rules.truncations]\nenabled = false\n").rules}


def test_all_default_rules_can_be_switched_off(load):
    assert load("keep_defaults = false\n").rules == ()


def test_a_silence_ends_at_the_time_that_the_file_says(load):
    one = "[[silences]]\nrule = 'slow-waits'\nname = 'chat'\nuntil = 1970-01-01T02:00:00+01:00\n"
    all_of_a_day = "[[silences]]\nuntil = 1970-01-02T00:00:00Z\n"

    assert load(one + all_of_a_day).silences == (
        Silence(until=3_600.0, rule="slow-waits", name="chat"),
        Silence(until=86_400.0),
    )


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("keep_defaults = 1", "keep_defaults", "1", "true or false"),
        ("rule = 1", "rule", "1", "one of the keys keep_defaults, rules, silences"),
        ("rules = 1", "rules", "1", "[rules.circuit-open]"),
        ("rules.x = 1", "rules.x", "1", "a table, [rules.x]"),
        ("silences = 1", "silences", "1", "[[silences]]"),
        ("silences = [1]", "silences[0]", "1", "a table, [[silences]]"),
        ("[rules.circuit-open]\nabov = 1", "rules.circuit-open.abov", "1", "above"),
        ("[rules.circuit-open]\nabove = 'x'", "rules.circuit-open.above", "'x'", "a number"),
        ("[rules.circuit-open]\nabove = true", "rules.circuit-open.above", "True", "a number"),
        ("[rules.circuit-open]\nabove = nan", "rules.circuit-open.above", "nan", "a number"),
        ("[rules.circuit-open]\nclears_at = 31", "rules.circuit-open.clears_at", "31", "not larger than `above`"),
        ("[rules.circuit-open]\nfor_seconds = -1", "rules.circuit-open.for_seconds", "-1", "seconds, 0 or more"),
        ("[rules.circuit-open]\nclear_for_seconds = '5m'", "rules.circuit-open.clear_for_seconds", "'5m'", "seconds"),
        ("[rules.circuit-open]\nover_seconds = 0", "rules.circuit-open.over_seconds", "0", "1 or more"),
        ("[rules.circuit-open]\nover_seconds = 604801", "rules.circuit-open.over_seconds", "604801", "a week"),
        ("[rules.circuit-open]\nleast_calls = 1.5", "rules.circuit-open.least_calls", "1.5", "a whole number"),
        ("[rules.circuit-open]\nseverity = 'bad'", "rules.circuit-open.severity", "'bad'", "one of warning, critical"),
        ("[rules.circuit-open]\nnames = 'chat'", "rules.circuit-open.names", "'chat'", "texts"),
        ("[rules.circuit-open]\nnames = [1]", "rules.circuit-open.names", "(1,)", "texts"),
        ("[rules.circuit-open]\nadvice = 1", "rules.circuit-open.advice", "1", "a text"),
        ("[rules.circuit-open]\nenabled = 'no'", "rules.circuit-open.enabled", "'no'", "true or false"),
        ("[rules.circuit-open]\nmeasure = 'x'", "rules.circuit-open.measure", "'x'", "one of circuit_open_seconds, "),
        ("[rules.circuit-open]\nmeasure = []", "rules.circuit-open.measure", "[]", "one of circuit_open_seconds, "),
        ("[rules.circuit-open]\nseverity = {}", "rules.circuit-open.severity", "{}", "one of warning, critical"),
        ("[[silences]]\nname = 'x'", "silences[0].until", "None", "as 2027-01-31T08:00:00Z"),
        ("[[silences]]\nuntil = 2027-01-31T08:00:00", "silences[0].until", "2027, 1, 31", "its offset"),
        ("[[silences]]\nuntil = 2027-01-31", "silences[0].until", "2027, 1, 31", "a date with a time"),
        ("[[silences]]\nuntil = 2027-01-31T08:00:00Z\nrule = 'x'", "silences[0].rule", "'x'", "one of budget-runs-out"),
        ("[[silences]]\nuntil = 2027-01-31T08:00:00Z\nname = 1", "silences[0].name", "1", "a text"),
        ("[[silences]]\nfrom = 1", "silences[0].from", "1", "one of the keys name, rule, until"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_the_key_the_value_and_what_was_expected(load, text, key, value, expected):
    with pytest.raises(ConfigurationError) as refused:
        load(text)

    message = str(refused.value)
    assert f"alerts.toml: {key} = " in message
    assert value in message
    assert expected in message.partition(": expected ")[2]


@pytest.mark.parametrize(
    ("text", "missing"), [("[rules.own]\nabove = 1", "measure"), ("[rules.own]\nmeasure = 'wait_p95_seconds'", "above")]
)
def test_a_rule_of_ones_own_says_what_it_looks_at_and_its_bound(load, text, missing):
    with pytest.raises(ConfigurationError, match=f"alerts.toml: rules.own: {missing} is missing: expected "):
        load(text)


def test_a_file_that_is_not_toml_is_refused_with_the_place(load):
    with pytest.raises(ConfigurationError, match=r"alerts\.toml: expected TOML: .*line 2"):
        load("keep_defaults = true\nrules = ]\n")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "alerts.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"alerts\.toml: expected TOML"):
        load_rules(tmp_path / "alerts.toml")


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match=r"^missing\.toml: cannot be read: No such file or directory$"):
        load_rules("missing.toml")


def test_a_rule_in_python_is_checked_in_the_same_way():
    with pytest.raises(ConfigurationError, match=r"^Rule\(for_seconds=-1\): expected seconds, 0 or more"):
        Rule(name="own", measure="wait_p95_seconds", above=1, for_seconds=-1)


def test_a_rule_needs_a_name_of_reasonable_length():
    with pytest.raises(ConfigurationError, match="expected a text of 100 characters at most"):
        Rule(name="x" * 101, measure="wait_p95_seconds", above=1)
