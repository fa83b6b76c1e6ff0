"""Whatever others put into a history, or answer as a dashboard, costs a reader no more than itself."""

import csv
import io
import json
import math
import sqlite3
import time
import zlib
from contextlib import closing
from datetime import UTC

import pytest
from hostile_values import NAMES, NUMBERS, TEXTS, VALUES, examples, is_harmless, nested, told
from hypothesis import given, strategies as st
from rich.console import Console

from resilience_kit.errors import ConfigurationError, ResilienceError
from resilience_kit.monitoring.costs import Costs
from resilience_kit.monitoring.dashboard.figures import RANGES, Figures
from resilience_kit.monitoring.dashboard.past import _Stretch, columns
from resilience_kit.monitoring.dashboard.sources import RecordedProcesses
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample, merge, packed, unpacked
from resilience_kit.monitoring.overview import overview_from_json
from resilience_kit.monitoring.overview_sources import history_reader
from resilience_kit.monitoring.report import Report, report_on, to_csv, to_html
from resilience_kit.monitoring.terminal import drawn, print_once
from resilience_kit.stats import COUNTERS

GAUGES = st.sampled_from(
    [
        *("state", "failure_count", "in_flight", "max_concurrent", "waiting", "paused", "period", "requests_in_window"),
        *(
            "requests_per_minute",
            "tokens_in_window",
            "tokens_per_minute",
            "budget_tokens",
            "tokens_used",
            "seconds_left",
        ),
        *("budget_usd", "usd_used"),
    ]
)
AMOUNTS = st.one_of(
    st.integers(0, 1_000),
    st.floats(0, 1e300),
    st.sampled_from([1e308, 10**308, 2**53, 1e-308, 0, -1, "OPEN", None, True]),
)
READINGS = st.fixed_dictionaries(
    {"section": st.sampled_from(sorted(COUNTERS)), "name": NAMES},
    optional={
        "counters": st.dictionaries(
            st.sampled_from(sorted({it for of in COUNTERS.values() for it in of})), AMOUNTS, max_size=4
        ),
        "gauges": st.dictionaries(GAUGES | TEXTS, AMOUNTS | TEXTS | NUMBERS, max_size=5),
        "histograms": st.dictionaries(
            st.sampled_from(["wait", "answer", "\n"]),
            st.fixed_dictionaries(
                {"counts": st.dictionaries(st.sampled_from(["0", "3", "25", "26", "x"]), AMOUNTS), "total": AMOUNTS}
            ),
            max_size=2,
        ),
    },
)


@st.composite
def samples(draw):
    """What might be a sample of now, as the data of a row."""
    value = {
        "at": draw(st.sampled_from([time.time() - ago for ago in (1, 2, 30, 70)]) | NUMBERS),
        "seconds": draw(st.sampled_from([1, 1, 60, 1e10]) | NUMBERS),
        "process": draw(NAMES),
        "readings": draw(st.lists(READINGS, max_size=3) | st.lists(READINGS | VALUES, max_size=2)),
    }
    return zlib.compress(json.dumps(value, default=repr).encode())


ROWS = st.one_of(samples(), st.binary(max_size=30), TEXTS.filter(str.isascii), st.integers(0, 2**62), st.none())


def history_with(*rows):
    """A history with rows of anything in its table."""
    now = int(time.time())
    with closing(sqlite3.connect("history.sqlite3")) as database, database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("DROP TABLE IF EXISTS resilience_samples")
        database.execute("CREATE TABLE resilience_samples (resolution, start, process, data)")
        database.executemany(
            "INSERT INTO resilience_samples VALUES (?, ?, ?, ?)",
            [
                (each, (now - number) // each * each, "one", row)
                for each in (1, 60, 3_600)
                for number, row in enumerate(rows)
            ],
        )
    return History("history.sqlite3")


@given(VALUES | st.binary(max_size=100) | samples())
@examples(100)
def test_what_is_no_sample_is_refused(data):
    told(ConfigurationError, unpacked, data)


def test_a_number_in_a_row_is_no_length_of_a_sample():
    """bytes(10**13) would be ten terabytes of zeros."""
    with pytest.raises(ConfigurationError):
        unpacked(10**13)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps("[") * 10,
        "[" * 200_000,
        '{"at":' * 100_000,
        "9" * 5_000,
        json.dumps({"at": 1, "seconds": nested(1, times=500)}),
    ],
)
def test_json_that_is_no_sample_is_refused(text):
    with pytest.raises(ConfigurationError):
        unpacked(zlib.compress(text.encode()))


def test_a_sample_that_would_fill_the_memory_is_refused():
    bomb = zlib.compress(b'{"at": 1, "seconds": 1, "process": "' + b"x" * (64 << 20) + b'", "readings": []}', 9)

    assert len(bomb) < 100_000
    with pytest.raises(ConfigurationError):
        unpacked(bomb)


@given(st.lists(ROWS, max_size=4))
@examples(30)
def test_a_page_shows_what_it_can_of_a_history_with_anything_in_it(rows):
    history = history_with(*rows)
    figures = Figures("a title", RecordedProcesses(history), history=history)

    for shown in (figures.now(), figures.now("one"), *map(figures.past, RANGES)):
        json.dumps(shown, allow_nan=False)


def test_a_sample_of_a_thousand_years_costs_a_page_no_more_than_what_it_shows(monkeypatch):
    sample = Sample(time.time(), 1e11, "one", (Reading("agents", "writer", {"calls": 1}),))
    measured = []
    monkeypatch.setattr(_Stretch, "measure", lambda *given: measured.append(given))

    columns([sample], end=math.ceil(sample.at), seconds=60, step=1, window=10)

    assert len(measured) <= 60


@given(st.lists(ROWS, max_size=4))
@examples(30)
def test_a_report_shows_what_it_can_of_a_history_with_anything_in_it(rows):
    report = report_on(history_with(*rows), seconds=3_600, zone=UTC)

    html, table = to_html(report), to_csv(report)

    assert is_harmless(html.replace("\n", ""))
    assert all(map(is_safe_in_a_table, cells(table)))


@given(st.lists(ROWS, max_size=4))
@examples(30)
def test_a_terminal_shows_what_it_can_of_a_history_with_anything_in_it(rows):
    history_with(*rows)
    console = Console(file=io.StringIO(), width=80)

    message = told(ResilienceError, print_once, history_reader("history.sqlite3"), console)

    assert is_harmless((message or console.file.getvalue()).replace("\n", ""))


@given(
    st.fixed_dictionaries(
        {
            "limits": st.lists(
                st.dictionaries(GAUGES | st.just("name"), AMOUNTS | TEXTS, max_size=6) | VALUES, max_size=3
            )
        },
        optional={
            "at": NUMBERS | VALUES,
            "minute": st.dictionaries(st.sampled_from(["requests", "tokens", "wait_p95", "answer_p99"]), AMOUNTS)
            | VALUES,
            "processes": VALUES,
            "alerts": st.lists(
                st.dictionaries(st.sampled_from(["name", "rule", "severity", "message", "since"]), AMOUNTS | TEXTS)
            ),
            "circuits": st.lists(st.dictionaries(GAUGES | st.just("name"), AMOUNTS | TEXTS, max_size=6), max_size=3),
            "agents": st.lists(
                st.dictionaries(st.sampled_from(["name", "calls", "usd", "prompt_tokens"]), AMOUNTS | TEXTS)
            ),
        },
    ),
    st.sampled_from([None, 5]),
)
@examples(80)
def test_whatever_a_dashboard_answers_a_terminal_shows_what_it_can(value, rows):
    overview = overview_from_json(value, source="the dashboard")
    console = Console(file=io.StringIO(), width=80)

    console.print(drawn(overview, width=80, rows=rows))

    assert is_harmless(console.file.getvalue().replace("\n", ""))
    json.dumps(overview.to_dict())


@given(VALUES)
@examples(30)
def test_what_is_no_dashboards_answer_is_refused(value):
    message = told(ConfigurationError, overview_from_json, value, source="the dashboard")

    assert message is None or is_harmless(message)


@pytest.mark.parametrize("content", [b"", b"\0" * 4_096, b"SQLite format 3\0" + b"\xff" * 4_096, b"x", b"[" * 100_000])
def test_a_file_that_is_no_history_is_told_on_one_line(tmp_path, content):
    file = tmp_path / "history.sqlite3"
    file.write_bytes(content)

    with pytest.raises(ConfigurationError) as raised:
        History(file).read(0)

    assert is_harmless(str(raised.value))


def test_what_a_database_says_of_its_tables_names_is_told_on_one_line(caplog):
    with closing(sqlite3.connect("history.sqlite3")) as database:
        database.execute('CREATE TABLE "x\n\x1b[2J fine: all is well" (a)')
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_master SET sql = 'no table'")
        database.commit()
    history = History("history.sqlite3")
    history.add(Sample(time.time(), 1, "one"))
    history.close()

    with pytest.raises(ConfigurationError, match="malformed") as raised:
        history.read(0)

    assert is_harmless(str(raised.value))
    assert caplog.messages
    assert all(map(is_harmless, caplog.messages))


@pytest.mark.parametrize("at", [1e300, -1e300, 1e11])
def test_a_time_that_no_clock_shows_is_shown_all_the_same(at):
    value = {"limits": [], "at": at, "alerts": [{"name": "chat", "since": at}]}
    console = Console(file=io.StringIO(), width=80)

    console.print(drawn(overview_from_json(value, source="the dashboard")))

    assert "chat" in console.file.getvalue()


@pytest.mark.parametrize("most", [5e-324, 1e-308])
def test_a_quota_of_next_to_nothing_is_full(most):
    value = {"limits": [{"name": "chat", "tokens_in_window": 1e308, "tokens_per_minute": most}]}
    console = Console(file=io.StringIO(), width=80)

    console.print(drawn(overview_from_json(value, source="the dashboard")))

    assert "chat" in console.file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "\uff0b1",
        "\uff0d1",
        "\uff201",
        "\x00=1",
        "\ufeff=1",
    ],
)
@pytest.mark.parametrize("where", ["process", "name", "gauge", "value"])
def test_nothing_in_a_table_is_a_formula(where, text):
    gauges = {text: 1.0} if where == "gauge" else {"state": text} if where == "value" else {}
    reading = Reading("agents", text if where == "name" else "writer", {"calls": 1}, gauges)
    sample = Sample(60, 60, text if where == "process" else "one", (reading,))

    assert all(map(is_safe_in_a_table, cells(to_csv(Report(0, 60, 60, (sample,), Costs(60), UTC)))))


def cells(table):
    return [cell for row in csv.reader(io.StringIO(table)) for cell in row]


def is_safe_in_a_table(cell):
    """Whether a program for tables takes a cell for a number or a text, and obeys nothing in it."""
    try:
        float(cell)
    except ValueError:
        text = cell.replace("\n", "").replace("\t", "")
        return is_harmless(text) and not cell.startswith(
            ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
        )
    return True


def test_samples_of_the_largest_numbers_are_added_up():
    """Two of them would be more than a number can be, which no JSON can say."""
    data = [
        packed(
            Sample(at, 1, "one", (Reading("agents", "writer", {"usd": 1e100, "prompt_tokens": 10**100}, {"x": 1e100}),))
        )
        for at in range(100)
    ]

    added = merge(map(unpacked, data))

    json.dumps(added.to_dict(), allow_nan=False)
    assert added.reading("agents", "writer").counter("usd") == pytest.approx(1e102)


@pytest.mark.parametrize("amount", [1e308, 10**308, 1.1e100])
@pytest.mark.parametrize("kind", ["counters", "gauges"])
def test_a_sample_with_numbers_that_cannot_be_added_up_is_refused(kind, amount):
    data = packed(Sample(1, 1, "one", (Reading("agents", "writer", **{kind: {"usd": amount}}),)))

    with pytest.raises(ConfigurationError):
        unpacked(data)
