"""What each decorator takes: the words with which it refuses, the least that it accepts, and what explain() tells."""

import pytest

from resilience_kit import ConfigurationError, circuit_protected, explain, rate_limited, retry_on_429, token_budget
from resilience_kit.testing import isolated

RULES = "'ceiling', 'latency', 'limit', 'margin', 'one-second window', 'remaining', 'retry-after', 'slow start'"
COUNT = "expected a whole number above 0, or None for the setting"
COUNT_OR_ZERO = "expected a whole number, 0 or more, or None for the setting"
SECONDS = "expected a number, 0 or more, or None for the setting"
ABOVE_ZERO = "expected a number above 0, or None for the setting"
SAY_ARGUMENT = "say argument= with the parameter that holds its prompt"
PERIODS = 'expected "minute", "hour", "day", seconds above 0, or None'


def ask(prompt="", messages=()):
    """Something that every decorator can be put on."""


def parameters_of(decorator, **arguments):
    return {
        name: (value.value, value.source)
        for name, value in explain(decorator(**arguments)(ask)).layers[0].parameters.items()
    }


@pytest.mark.parametrize(
    ("decorator", "arguments", "words"),
    [
        (rate_limited, {"requests_per_minute": 0}, f"@rate_limited(requests_per_minute=0): {COUNT}"),
        (rate_limited, {"requests_per_minute": 1.5}, f"@rate_limited(requests_per_minute=1.5): {COUNT}"),
        (rate_limited, {"tokens_per_minute": 0}, f"@rate_limited(tokens_per_minute=0): {COUNT}"),
        (rate_limited, {"max_concurrent": 0}, f"@rate_limited(max_concurrent=0): {COUNT}"),
        (rate_limited, {"period": 0}, f"@rate_limited(period=0): {ABOVE_ZERO}"),
        (rate_limited, {"min_interval": -1}, f"@rate_limited(min_interval=-1): {SECONDS}"),
        (rate_limited, {"max_wait": -1}, f"@rate_limited(max_wait=-1): {SECONDS}"),
        (rate_limited, {"tokens": -1}, f"@rate_limited(tokens=-1): {SECONDS}"),
        (rate_limited, {"priority": "high"}, "@rate_limited(priority='high'): expected a number; lower is sooner"),
        (
            rate_limited,
            {"adaptive": "slowly"},
            f"adaptive='slowly': expected True, False, \"latency\" for all rules, or some of [{RULES}]",
        ),
        (
            retry_on_429,
            {"max_retries": -1},
            f"@retry_on_429(max_retries=-1): {COUNT_OR_ZERO}",
        ),
        (
            retry_on_429,
            {"max_retries": 1.5},
            f"@retry_on_429(max_retries=1.5): {COUNT_OR_ZERO}",
        ),
        (retry_on_429, {"initial_backoff": -1}, f"@retry_on_429(initial_backoff=-1): {SECONDS}"),
        (retry_on_429, {"max_backoff": -1}, f"@retry_on_429(max_backoff=-1): {SECONDS}"),
        (retry_on_429, {"max_elapsed": -1}, f"@retry_on_429(max_elapsed=-1): {SECONDS}"),
        (retry_on_429, {"max_retry_after": -1}, f"@retry_on_429(max_retry_after=-1): {SECONDS}"),
        (
            retry_on_429,
            {"backoff_multiplier": 0.5},
            "@retry_on_429(backoff_multiplier=0.5): expected a number, 1 or more, or None for the setting",
        ),
        (retry_on_429, {"retry_budget": 0}, f"@retry_on_429(retry_budget=0): {ABOVE_ZERO}"),
        (
            retry_on_429,
            {"retry_budget": 1.5},
            "@retry_on_429(retry_budget=1.5): expected a share of calls, 1 or less",
        ),
        (retry_on_429, {"retry_if": "yes"}, "@retry_on_429(retry_if='yes'): expected a function, or None"),
        (circuit_protected, {"failure_threshold": 0}, f"@circuit_protected(failure_threshold=0): {COUNT}"),
        (circuit_protected, {"failure_threshold": 1.5}, f"@circuit_protected(failure_threshold=1.5): {COUNT}"),
        (circuit_protected, {"success_threshold": 0}, f"@circuit_protected(success_threshold=0): {COUNT}"),
        (circuit_protected, {"half_open_max_calls": 0}, f"@circuit_protected(half_open_max_calls=0): {COUNT}"),
        (circuit_protected, {"recovery_timeout": -1}, f"@circuit_protected(recovery_timeout=-1): {SECONDS}"),
        (circuit_protected, {"is_failure": "x"}, "@circuit_protected(is_failure='x'): expected a function, or None"),
        (
            circuit_protected,
            {"fallback": "sorry"},
            "@circuit_protected(fallback='sorry'): expected a function, or None",
        ),
        (token_budget, {"max_tokens": 0}, f"@token_budget(max_tokens=0): {COUNT}"),
        (token_budget, {"max_tokens": 1.5}, f"@token_budget(max_tokens=1.5): {COUNT}"),
        (token_budget, {"budget_tokens": 0}, f"@token_budget(budget_tokens=0): {COUNT}"),
        (token_budget, {"budget_usd": 0}, f"@token_budget(budget_usd=0): {ABOVE_ZERO}"),
        (token_budget, {"model": ""}, "@token_budget(model=''): expected text"),
        (token_budget, {"argument": ""}, "@token_budget(argument=''): expected text"),
        (
            token_budget,
            {"on_exceed": "Raise"},
            '@token_budget(on_exceed=\'Raise\'): expected "raise", "truncate" or "wait"',
        ),
        (token_budget, {"per": "week"}, f"@token_budget(per='week'): {PERIODS}"),
        (token_budget, {"per": 0}, f"@token_budget(per=0): {PERIODS}"),
        (
            token_budget,
            {"on_exceed": "wait"},
            '@token_budget(on_exceed="wait"): say per=, or there is nothing to wait for',
        ),
        (
            token_budget,
            {"max_tokens": 9, "argument": "question"},
            f"@token_budget(argument='question'): {__name__}.ask takes no question: {SAY_ARGUMENT}",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_refusal_names_decorator_parameter_and_value_and_says_what_was_expected(decorator, arguments, words):
    with pytest.raises(ConfigurationError) as refused:
        decorator(**arguments)(ask)

    assert str(refused.value) == words


def test_a_prompt_that_cannot_be_seen_is_refused_with_the_names_that_were_looked_for():
    def translate(text):
        return text

    translate.__qualname__ = "translate"

    with pytest.raises(ConfigurationError) as refused:
        token_budget(max_tokens=9)(translate)

    assert str(refused.value) == (
        f"@token_budget(max_tokens=9): {__name__}.translate takes no messages or input or prompt: {SAY_ARGUMENT}"
    )


@pytest.mark.parametrize(
    ("decorator", "parameter", "least"),
    [
        (rate_limited, "requests_per_minute", 1),
        (rate_limited, "tokens_per_minute", 1),
        (rate_limited, "max_concurrent", 1),
        (rate_limited, "min_interval", 0),
        (rate_limited, "period", 0.5),
        (rate_limited, "tokens", 0),
        (rate_limited, "max_wait", 0),
        (retry_on_429, "max_retries", 0),
        (retry_on_429, "initial_backoff", 0),
        (retry_on_429, "max_backoff", 0),
        (retry_on_429, "backoff_multiplier", 1),
        (retry_on_429, "max_elapsed", 0),
        (retry_on_429, "max_retry_after", 0),
        (retry_on_429, "retry_budget", 0.01),
        (retry_on_429, "retry_budget", 1),
        (circuit_protected, "failure_threshold", 1),
        (circuit_protected, "recovery_timeout", 0),
        (circuit_protected, "success_threshold", 1),
        (circuit_protected, "half_open_max_calls", 2),
        (token_budget, "max_tokens", 1),
        (token_budget, "budget_tokens", 1),
        (token_budget, "budget_usd", 0.01),
        (token_budget, "per", 0.5),
    ],
)
def test_the_bounds_of_a_parameter_are_accepted_and_told_as_an_argument(decorator, parameter, least):
    assert parameters_of(decorator, **{parameter: least})[parameter] == (least, "argument")


@pytest.mark.parametrize(
    ("decorator", "parameter", "given"),
    [
        (rate_limited, "adaptive", False),
        (rate_limited, "adaptive", "latency"),
        (rate_limited, "priority", 2),
        (retry_on_429, "jitter", False),
        (retry_on_429, "retry_transient", True),
        (retry_on_429, "retry_if", bool),
        (circuit_protected, "is_failure", bool),
        (circuit_protected, "fallback", ask),
        (token_budget, "model", "gpt-4"),
        (token_budget, "on_exceed", "truncate"),
        (token_budget, "argument", "prompt"),
        (token_budget, "shared", False),
    ],
)
def test_a_choice_that_was_made_is_told_as_an_argument(decorator, parameter, given):
    assert parameters_of(decorator, **{parameter: given})[parameter] == (given, "argument")


def test_only_some_of_the_rules_of_adaptation_are_told_in_order():
    told = parameters_of(rate_limited, adaptive={"retry-after", "limit"})["adaptive"]

    assert told == (("limit", "retry-after"), "argument")


@pytest.mark.parametrize(
    ("decorator", "defaults"),
    [
        (
            rate_limited,
            {
                "requests_per_minute": 60,
                "tokens_per_minute": 150_000,
                "max_concurrent": 3,
                "min_interval": 0.1,
                "period": 60.0,
                "adaptive": True,
                "tokens": "estimated",
                "priority": 0,
                "max_wait": None,
            },
        ),
        (
            retry_on_429,
            {
                "max_retries": 3,
                "initial_backoff": 1.0,
                "max_backoff": 30.0,
                "backoff_multiplier": 2.0,
                "jitter": True,
                "retry_transient": False,
                "retry_if": None,
                "max_elapsed": None,
                "max_retry_after": 120.0,
                "retry_budget": None,
            },
        ),
        (
            circuit_protected,
            {
                "failure_threshold": 5,
                "recovery_timeout": 60.0,
                "success_threshold": 3,
                "half_open_max_calls": 1,
                "is_failure": "connection errors, timeouts and 5xx",
                "fallback": None,
            },
        ),
        (
            token_budget,
            {
                "max_tokens": None,
                "budget_tokens": None,
                "budget_usd": None,
                "per": None,
                "model": "gpt-4o",
                "on_exceed": "raise",
                "shared": True,
                "argument": "messages or input or prompt",
            },
        ),
    ],
    ids=lambda what: getattr(what, "__name__", ""),
)
def test_what_is_left_out_is_told_as_a_default(decorator, defaults):
    assert parameters_of(decorator) == {name: (value, "default") for name, value in defaults.items()}


NAMED = [
    (rate_limited, "requests_per_minute", "rate limit"),
    (circuit_protected, "failure_threshold", "circuit"),
    (token_budget, "budget_tokens", "token budget"),
]


@pytest.mark.parametrize(("decorator", "parameter", "kind"), NAMED)
def test_two_configurations_of_one_name_are_refused_with_both_and_the_name(decorator, parameter, kind):
    decorator("chat", **{parameter: 7})

    with pytest.raises(ConfigurationError, match=f"{kind} 'chat' has two configurations: {parameter}=7 .*=8"):
        decorator("chat", **{parameter: 8})


@pytest.mark.parametrize(("decorator", "parameter", "kind"), NAMED)
def test_two_names_have_configurations_of_their_own(decorator, parameter, kind):
    decorator("chat", **{parameter: 7})

    assert explain(decorator("batch", **{parameter: 8})(ask)).layers[0].parameters[parameter].value == 8


@pytest.mark.parametrize(("decorator", "parameter", "kind"), NAMED)
def test_what_one_function_says_of_a_name_is_told_of_all_that_have_it(decorator, parameter, kind):
    decorator("chat", **{parameter: 7})

    assert explain(decorator("chat")(ask)).layers[0].parameters[parameter].value == 7


@pytest.mark.parametrize(("decorator", "parameter", "kind"), NAMED)
def test_a_function_that_was_decorated_in_isolation_tells_its_values_after_it_too(decorator, parameter, kind):
    with isolated():
        decorated = decorator("isolated", **{parameter: 7})(ask)

    assert explain(decorated).layers[0].parameters[parameter].value == 7


def test_a_tokens_function_may_say_zero():
    assert rate_limited("chat", tokens=lambda *_: 0)(ask)() is None


def test_a_tokens_function_that_says_nonsense_is_refused_with_what_it_must_be():
    with pytest.raises(ConfigurationError) as refused:
        rate_limited("chat", tokens=lambda *_: "many")(ask)()

    assert str(refused.value) == (
        "rate limit 'chat': the tokens function returned 'many': it must be a plain function of the call's arguments "
        "that returns a number of tokens, 0 or more"
    )


EXAMPLES = [
    (rate_limited, 'name="chat"'),
    (circuit_protected, 'name="chat"'),
    (retry_on_429, "max_retries=5"),
    (token_budget, 'agent="MathAgent"'),
]


@pytest.mark.parametrize(("decorator", "example"), EXAMPLES)
@pytest.mark.parametrize(
    "put_on", [lambda decorator: decorator(4), lambda decorator: decorator()(4)], ids=["bare", "called"]
)
def test_what_is_no_function_is_refused_with_how_to_write_it(decorator, example, put_on):
    with pytest.raises(ConfigurationError) as refused:
        put_on(decorator)

    assert str(refused.value) == (
        f"@{decorator.__name__} was given 4, which is neither a function nor a name: put it on a function, or write "
        f"its parameters by name, as in @{decorator.__name__}({example})"
    )


@pytest.mark.parametrize("decorator", [rate_limited, circuit_protected, token_budget])
def test_what_is_not_named_shares_the_name_default(decorator):
    assert [explain(put_on(ask)).layers[0].name for put_on in (decorator, decorator())] == ["default", "default"]
