"""@resilient, explain(), and the warnings about orders that do harm."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import sys

import openai
import pytest

from resilience_kit import (
    ConfigurationError,
    ResilienceSettings,
    StackOrderWarning,
    circuit_protected,
    configure,
    explain,
    rate_limited,
    resilient,
    retry_on_429,
    token_budget,
)
from resilience_kit.stack import BudgetOptions, CircuitOptions, RateLimitOptions, ResilientOptions, RetryOptions
from resilience_kit.testing import no_waiting

RETRYING_CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1", max_retries=2)
PATIENT_CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1", max_retries=0)


class ServerError(Exception):
    status_code = 500


def ask(text="four"):
    return text


def layers_of(function):
    return [layer.kind for layer in explain(function).layers]


def codes_of(function):
    return [problem.code for problem in explain(function).warnings]


@contextlib.contextmanager
def warned_of(code):
    """Expect one warning of this code, at a line of this file."""
    with pytest.warns(StackOrderWarning) as caught:
        yield
    assert [warning.message.code for warning in caught] == [code]
    assert str(caught[0].message).startswith(f"{code}: ")
    assert caught[0].filename == __file__


# --- what the caller sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "refusal"),
    [
        ({"failure_threshold": 2}, "CircuitOpenError: circuit 'chat' is open"),
        ({"requests_per_minute": 12, "max_wait": 1}, "RateLimitTimeoutError: rate limit 'chat'"),
    ],
)
def test_a_retry_that_is_refused_leaves_the_callers_error_to_be_the_functions_own(bound, refusal):
    errors = []

    @resilient("chat", initial_backoff=0, min_interval=0, **bound)
    def fail():
        errors.append(ConnectionError("the service is down"))
        raise errors[-1]

    with pytest.raises(ConnectionError) as raised:
        fail()
    assert raised.value is errors[1]
    (note,) = raised.value.__notes__
    assert note.startswith(f"resilience_kit: attempt 3 was refused: {refusal}")


# --- orders that do harm ---------------------------------------------------------------------------------------------


RIGHT_ORDER = (token_budget, retry_on_429, circuit_protected, rate_limited)
HARMFUL = {
    "limiter-outside-retry": (rate_limited, retry_on_429),
    "circuit-outside-retry": (circuit_protected, retry_on_429),
    "two-retries": (retry_on_429, retry_on_429),
    "budget-inside-retry": (retry_on_429, token_budget),
    "same-limiter-twice": (rate_limited, rate_limited),
}
each_harmful_order = pytest.mark.parametrize(("code", "order"), HARMFUL.items(), ids=HARMFUL)


@each_harmful_order
def test_a_harmful_order_is_warned_of_where_it_is_written(code, order):
    above, below = order
    beneath = below()(ask)

    with warned_of(code):
        above()(beneath)


@each_harmful_order
def test_a_harmful_order_of_bare_decorators_is_warned_of_where_it_is_written(code, order):
    above, below = order
    beneath = below(ask)

    with warned_of(code):
        above(beneath)


@each_harmful_order
@pytest.mark.parametrize("binding", [staticmethod, classmethod])
def test_a_harmful_order_around_a_static_or_class_method_is_warned_of_where_it_is_written(code, order, binding):
    above, below = order
    beneath = below(binding(ask))

    with warned_of(code):
        above(beneath)


@each_harmful_order
@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
def test_explain_lists_a_harmful_order(code, order):
    above, below = order

    assert codes_of(above(below(ask))) == [code]


@each_harmful_order
@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
def test_a_foreign_decorator_in_between_hides_no_harmful_order(code, order):
    above, below = order
    beneath = below(ask)

    @functools.wraps(beneath)
    def logged(*args):
        return beneath(*args)

    assert codes_of(above(logged)) == [code]


def test_a_warning_points_at_the_decorators_line():
    with pytest.warns(StackOrderWarning) as caught:

        @rate_limited(
            "chat",
        )
        @retry_on_429
        def decorated():
            pass

    assert caught[0].lineno == decorated.__wrapped__.__wrapped__.__code__.co_firstlineno


def test_resilient_around_a_retry_warns_where_it_is_written():
    beneath = retry_on_429(ask)

    with pytest.warns(StackOrderWarning) as caught:
        resilient(beneath)

    assert {warning.filename for warning in caught} == {__file__}
    assert sorted(warning.message.code for warning in caught) == [
        "circuit-outside-retry",
        "limiter-outside-retry",
        "two-retries",
    ]


def test_a_problem_is_warned_of_once_and_not_for_each_layer_above_it():
    with pytest.warns(StackOrderWarning):
        beneath = rate_limited("chat")(retry_on_429(ask))

    token_budget(beneath)


def test_two_limits_with_different_names_are_fine():
    assert codes_of(rate_limited("tenant")(rate_limited("deployment")(ask))) == []


@pytest.mark.parametrize(
    "order",
    [order for count in (1, 2, 3, 4) for order in itertools.combinations(RIGHT_ORDER, count)],
    ids=lambda order: " ".join(decorator.__name__ for decorator in order),
)
def test_the_right_order_is_not_warned_of(order):
    decorated = ask
    for decorator in reversed(order):
        decorated = decorator(decorated)

    assert codes_of(decorated) == []
    assert layers_of(decorated) == [decorator.__name__ for decorator in order]


# --- clients that retry on their own ---------------------------------------------------------------------------------


def test_row_14_a_retrying_client_in_the_globals_is_warned_of():
    def complete(text):
        return RETRYING_CLIENT.chat.completions.create(text)

    with warned_of("client-retries"):
        decorated = rate_limited(complete)

    assert codes_of(decorated) == ["client-retries"]


def test_row_14_a_retrying_client_in_the_closure_is_warned_of():
    client = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:1")

    async def complete(text):
        return await client.chat.completions.create(text)

    with warned_of("client-retries"):
        decorated = resilient(complete)

    assert "AsyncOpenAI retries 2 times" in explain(decorated).warnings[0].message


def test_row_14_a_retrying_client_behind_a_bound_method_is_warned_of():
    with warned_of("client-retries"):
        rate_limited(RETRYING_CLIENT.chat.completions.create)


class Agent:
    def __init__(self, client):
        self.client = client

    @rate_limited("agent")
    def ask(self, text):
        return self.client.chat.completions.create(text)


def test_row_14_explain_sees_the_retrying_client_of_a_methods_object():
    """When the method was decorated there was no object yet."""
    assert codes_of(Agent(RETRYING_CLIENT).ask) == ["client-retries"]


def test_row_14_a_client_that_does_not_retry_is_fine():
    def complete(text):
        return PATIENT_CLIENT.chat.completions.create(text)

    decorated = rate_limited(complete)

    assert codes_of(decorated) == []
    assert codes_of(Agent(PATIENT_CLIENT).ask) == []


@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
def test_one_client_that_retries_is_enough_to_say_so_once():
    other = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1")

    def complete(text):
        return RETRYING_CLIENT, other

    assert codes_of(rate_limited(complete)) == ["client-retries"]


def test_a_function_without_layers_is_not_warned_of_its_client():
    assert codes_of(lambda: RETRYING_CLIENT) == []


def test_a_function_that_calls_itself_can_be_decorated():
    """Its closure is still empty when it is decorated."""

    @rate_limited("chat", min_interval=0)
    def count_down(number):
        return number and count_down(number - 1)

    assert count_down(2) == 0


def test_a_callable_without_code_can_be_decorated():
    assert codes_of(rate_limited(len)) == []


def test_without_openai_there_are_no_clients_to_look_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "openai")

    assert codes_of(Agent(RETRYING_CLIENT).ask) == []


# --- explain() -------------------------------------------------------------------------------------------------------


def test_explain_names_the_function_and_its_layers_outermost_first():
    decorated = retry_on_429(rate_limited("chat")(ask))

    report = explain(decorated)

    assert report.function == f"{__name__}.ask"
    assert [(layer.kind, layer.name) for layer in report.layers] == [
        ("retry_on_429", f"{__name__}.ask"),
        ("rate_limited", "chat"),
    ]


def test_explain_of_a_bound_method_names_its_layers():
    assert layers_of(Agent(PATIENT_CLIENT).ask) == ["rate_limited"]


def test_explain_looks_through_foreign_decorators():
    inner = rate_limited("chat")(ask)

    @functools.wraps(inner)
    def logged(*args):
        return inner(*args)

    assert layers_of(retry_on_429(logged)) == ["retry_on_429", "rate_limited"]


def test_explain_of_a_bare_function_says_that_nothing_protects_it():
    report = explain(ask)

    assert (report.layers, report.warnings) == ((), ())
    assert str(report) == f"{__name__}.ask\nno layers: nothing protects it"


@pytest.mark.parametrize("given", [Agent, "ask", None, 4], ids=["class", "string", "None", "number"])
def test_explain_refuses_what_is_not_a_function(given):
    with pytest.raises(ConfigurationError, match="explain"):
        explain(given)


@pytest.mark.parametrize(
    ("decorator", "parameter", "variable", "default"),
    [
        (rate_limited, "requests_per_minute", "REQUESTS_PER_MINUTE", 60),
        (rate_limited, "tokens_per_minute", "TOKENS_PER_MINUTE", 150_000),
        (rate_limited, "max_concurrent", "MAX_CONCURRENT_REQUESTS", 3),
        (retry_on_429, "max_retries", "MAX_RETRIES", 3),
        (retry_on_429, "initial_backoff", "INITIAL_BACKOFF_SECONDS", 1),
        (retry_on_429, "max_backoff", "MAX_BACKOFF_SECONDS", 30),
        (retry_on_429, "backoff_multiplier", "BACKOFF_MULTIPLIER", 2),
        (circuit_protected, "failure_threshold", "CIRCUIT_BREAKER_FAILURE_THRESHOLD", 5),
        (circuit_protected, "recovery_timeout", "CIRCUIT_BREAKER_RECOVERY_TIMEOUT", 60),
        (circuit_protected, "success_threshold", "CIRCUIT_BREAKER_SUCCESS_THRESHOLD", 3),
    ],
)
def test_explain_says_where_a_value_comes_from(decorator, parameter, variable, default, monkeypatch):
    def value_of(function):
        value = explain(function).layers[0].parameters[parameter]
        return value.value, value.source

    silent = decorator()(ask)
    assert value_of(silent) == (default, "default")
    monkeypatch.setenv(variable, "8")
    configure(ResilienceSettings())
    assert value_of(silent) == (8, "environment")
    configure(ResilienceSettings(**{variable.lower(): 9}))
    assert value_of(silent) == (9, "configure()")
    assert value_of(decorator(**{parameter: 7})(ask)) == (7, "argument")


def test_the_interval_is_told_in_seconds_wherever_it_comes_from(monkeypatch):
    def interval():
        return str(explain(rate_limited(ask)).layers[0].parameters["min_interval"])

    assert interval() == "0.1 (default)"
    monkeypatch.setenv("MIN_REQUEST_INTERVAL_MS", "250")
    configure(ResilienceSettings())
    assert interval() == "0.25 (environment)"


def test_an_agents_maximum_is_told_with_its_source(monkeypatch):
    def maximum(**arguments):
        decorated = token_budget("WriterAgent", **arguments)(lambda prompt: prompt)
        return str(explain(decorated).layers[0].parameters["max_tokens"])

    assert maximum() == "None (default)"
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "700")
    configure(ResilienceSettings())
    assert maximum() == "700 (environment)"
    assert maximum(max_tokens=70) == "70 (argument)"


def test_a_limit_in_use_keeps_the_values_that_it_was_built_with():
    decorated = rate_limited("chat")(ask)
    decorated()

    configure(ResilienceSettings(requests_per_minute=7))

    assert explain(decorated).layers[0].parameters["requests_per_minute"].value == 60


def test_a_report_reads_well():
    decorated = rate_limited("chat", requests_per_minute=600)(ask)

    lines = str(explain(decorated)).splitlines()

    assert lines[:3] == [
        f"{__name__}.ask",
        "@rate_limited 'chat'",
        "    requests_per_minute = 600 (argument)",
    ]


@pytest.mark.filterwarnings("ignore::resilience_kit.StackOrderWarning")
def test_a_report_ends_with_its_warnings():
    report = str(explain(rate_limited("chat")(retry_on_429(ask))))

    assert report.splitlines()[-1] == (
        "warning limiter-outside-retry: @rate_limited('chat') is above @retry_on_429, so retries skip the limit: "
        "put it below"
    )


# --- @resilient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decorator", "options"),
    [
        (rate_limited, RateLimitOptions),
        (retry_on_429, RetryOptions),
        (circuit_protected, CircuitOptions),
        (token_budget, BudgetOptions),
    ],
)
def test_resilient_knows_every_parameter_of_a_decorator_and_its_type(decorator, options):
    taken = {
        name: parameter.annotation
        for name, parameter in inspect.signature(decorator).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }

    assert options.__annotations__ == taken


@pytest.mark.parametrize(
    ("parameter", "value"),
    {
        "requests_per_minute": 7,
        "tokens_per_minute": 7,
        "max_concurrent": 7,
        "min_interval": 7,
        "period": 7,
        "tokens": 7,
        "priority": 7,
        "max_wait": 7,
        "adaptive": False,
        "max_retries": 7,
        "initial_backoff": 7,
        "max_backoff": 7,
        "backoff_multiplier": 7,
        "jitter": False,
        "retry_transient": False,
        "retry_if": bool,
        "max_elapsed": 7,
        "max_retry_after": 7,
        "retry_budget": 0.5,
        "failure_threshold": 7,
        "recovery_timeout": 7,
        "success_threshold": 7,
        "half_open_max_calls": 7,
        "is_failure": bool,
        "fallback": ask,
        "max_tokens": 7,
        "budget_tokens": 7,
        "budget_usd": 7,
        "per": 7,
        "model": "gpt-4",
        "on_exceed": "truncate",
        "argument": "text",
        "shared": True,
    }.items(),
)
def test_resilient_hands_each_parameter_to_its_decorator(parameter, value):
    options = {"argument": "text", parameter: value}

    layers = explain(resilient(**options)(ask)).layers

    assert [layer.parameters[parameter].value for layer in layers if parameter in layer.parameters] == [value]


def test_every_parameter_of_resilient_is_in_the_test_above():
    tested = test_resilient_hands_each_parameter_to_its_decorator.pytestmark[0].args[1]

    assert {name for name, _ in tested} == set(ResilientOptions.__annotations__)


def test_resilient_refuses_a_parameter_that_none_of_the_four_has():
    with pytest.raises(ConfigurationError, match=r"@resilient\(retries=\.\.\.\): no such parameter.*max_retries"):
        resilient(retries=3)


@pytest.mark.parametrize("given", [4, None, Agent], ids=["number", "None", "class"])
def test_resilient_refuses_what_is_neither_a_name_nor_a_function(given):
    with pytest.raises(ConfigurationError, match="@resilient was"):
        resilient(given)


def test_called_resilient_refuses_to_decorate_what_is_not_a_function():
    with pytest.raises(ConfigurationError, match="@resilient was"):
        resilient("chat")(4)


def test_resilient_stacks_the_four_in_the_order_that_works():
    report = explain(resilient("chat", agent="MathAgent")(ask))

    assert [(layer.kind, layer.name) for layer in report.layers] == [
        ("token_budget", "MathAgent"),
        ("retry_on_429", f"{__name__}.ask"),
        ("circuit_protected", "chat"),
        ("rate_limited", "chat"),
    ]
    assert report.warnings == ()


def test_bare_resilient_uses_the_default_names():
    layers = explain(resilient(ask)).layers

    assert [layer.name for layer in layers] == ["default", f"{__name__}.ask", "default", "default"]


def test_resilient_retries_a_failing_server():
    errors = [ServerError()]

    @resilient
    def answer():
        if errors:
            raise errors.pop()
        return "four"

    with no_waiting():
        assert answer() == "four"


def test_explain_tells_the_defaults_of_resilient_as_defaults():
    parameters = explain(resilient(ask)).layers[1].parameters

    assert {name for name, value in parameters.items() if value.source != "default"} == set()
    assert str(parameters["retry_transient"]) == "True (default)"


def test_resilient_leaves_a_failing_server_alone_if_it_is_told_to():
    @resilient(retry_transient=False)
    def answer():
        raise ServerError

    with pytest.raises(ServerError):
        answer()


@pytest.mark.looptime
async def test_one_resilient_decorator_serves_several_functions():
    protect = resilient("chat")

    @protect
    async def first():
        return "one"

    @protect
    def second():
        return "two"

    assert (await first(), await asyncio.to_thread(second)) == ("one", "two")
    assert [layers_of(function) for function in (first, second)] == [layers_of(first)] * 2
