"""The report: a page that needs nothing but itself, and figures to compute with."""

import csv
import io
import re
from datetime import UTC
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from resilience_kit import ConfigurationError, cli
from resilience_kit.monitoring import History, report as report_module, report_on
from resilience_kit.monitoring.charts import Line, chart
from resilience_kit.monitoring.measures import Histogram, Reading, Sample
from resilience_kit.monitoring.report import seconds_of, to_csv, to_html

NOW = 1_795_608_000.0
EVIL = '<script>alert("1")</script>&\'='


def second(before, process="one", name="chat", agent="A"):
    readings = (
        Reading(
            "rate_limiters",
            name,
            {"calls_admitted": 2, "tokens_admitted": 100, "calls_rate_limited": 1},
            {"in_flight": 1, "budget_usd": None},
            {"wait": Histogram.of([0, 3]), "answer": Histogram.of([1, 2])},
        ),
        Reading("circuit_breakers", name, {"times_opened": 1}, {"state": "OPEN"}),
        Reading("retries", name, {"retries": 3, "calls_given_up": 1}),
        Reading("agents", agent, {"calls": 2, "prompt_tokens": 60, "completion_tokens": 30, "usd": 0.25}),
        Reading("models", name, {"calls": 2, "prompt_tokens": 60, "calls_of_unknown_price": 1, "usd": 0.25}),
    )
    return Sample(NOW - before, 1.0, process, readings)


@pytest.fixture
def history(tmp_path):
    """Keep samples."""

    def history(*samples):
        with History(tmp_path / "history.sqlite3", clock=lambda: NOW) as history:
            for sample in sorted(samples, key=lambda sample: sample.at):
                history.add(sample)
        return history

    return history


@pytest.fixture
def report(history):
    """Report on the last ten minutes of some samples, or as the test says."""
    return lambda *samples, **options: report_on(
        history(*samples), **{"seconds": 600, "now": NOW, "zone": UTC, **options}
    )


def rows_of(report):
    return list(csv.DictReader(io.StringIO(to_csv(report))))


class Page(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend(attributes)

    def handle_data(self, data):
        self.texts.append(data)


# How far back


@pytest.mark.parametrize(
    ("since", "seconds"), [("90s", 90), ("30m", 1_800), ("1.5h", 5_400), ("7d", 604_800), (" 2w ", 1_209_600)]
)
def test_how_far_back_is_a_number_and_a_unit(since, seconds):
    assert seconds_of(since) == seconds


@pytest.mark.parametrize("since", ["", "7", "d", "-1d", "0d", "7 days", "1e3d", "9999999999d"])
def test_how_far_back_is_nothing_else(since):
    with pytest.raises(ConfigurationError, match="expected a number and a unit"):
        seconds_of(since)


@pytest.mark.parametrize(
    ("seconds", "step"),
    [(60, 1), (600, 5), (3_600, 10), (7_200, 60), (86_400, 300), (7 * 86_400, 3_600), (366 * 86_400, 604_800)],
)
def test_a_point_stands_for_as_long_as_a_chart_can_show(report, seconds, step):
    assert report(second(1), seconds=seconds).step == step


def test_what_was_before_is_left_out(report):
    found = report(second(700), second(10))
    assert sum(it.reading("agents", "A").counter("calls") for it in found.samples) == 2


# The figures


def test_the_csv_has_a_line_for_each_figure(report):
    measures = {row["measure"]: row["value"] for row in rows_of(report(second(10))) if row["name"] == "chat"}
    assert measures["calls_admitted"] == "2"
    assert measures["in_flight"] == "1"
    assert (measures["wait_count"], measures["wait_seconds"]) == ("2", "3.0")
    assert "budget_usd" not in measures


def test_the_csv_says_when_whose_and_for_how_long(report):
    rows = rows_of(report(second(10, "one"), second(10, "two")))
    assert {(row["at"], row["seconds"], row["process"]) for row in rows} == {
        ("2026-11-25T11:59:50+00:00", "1.000", "one"),
        ("2026-11-25T11:59:50+00:00", "1.000", "two"),
    }


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@x", "\tx"])
def test_a_name_in_the_csv_is_never_a_formula(report, name):
    names = {row["name"] for row in rows_of(report(second(10, name=name)))}
    assert names == {f"'{name}", "A"}


def test_a_name_with_commas_quotes_and_newlines_is_one_field(report):
    name = 'a,"b"\nc'
    assert name in {row["name"] for row in rows_of(report(second(10, name=name)))}


# The page


def test_the_page_shows_the_sums(report):
    texts = " ".join(Page(to_html(report(*(second(before) for before in range(1, 11))))).texts)
    for shown in ("Calls 20", "Tokens used 900", "429s 10", "Retries 30", "Given up 10", "Circuits opened 10"):
        assert shown in texts


def test_the_page_shows_costs_and_names_what_has_no_price(report):
    html = to_html(report(second(10)))
    texts = " ".join(Page(html).texts)
    assert "Today $0.25 This month $0.25" in texts
    assert "at least $0.25" in texts
    assert "No price is known for all calls of chat" in texts


def test_names_on_the_page_are_texts_and_nothing_else(report):
    html = to_html(report(second(10, name=EVIL, agent=EVIL, process=EVIL)))
    page = Page(html)
    assert "script" not in page.tags
    assert EVIL in page.texts


def test_the_page_needs_nothing_but_itself(report):
    html = to_html(report(second(10), second(20)))
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [it for name, it in page.attributes if name in {"src", "href", "style"} or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", html)


def test_the_page_forbids_all_but_its_own_style(report):
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in Page(to_html(report(second(10)))).attributes


def test_the_page_has_a_dark_side(report):
    assert "prefers-color-scheme: dark" in to_html(report(second(10)))


def test_a_page_on_nothing_says_so(report):
    texts = Page(to_html(report(second(10_000)))).texts
    assert texts.count("Nothing was measured.") == 6


def test_a_long_table_ends_with_how_much_more_there_is(report, monkeypatch):
    monkeypatch.setattr(report_module, "_MOST_ROWS", 3)
    page = Page(to_html(report(*(second(10 + number, name=f"chat {number}") for number in range(5)))))
    assert "2 more are in the CSV." in page.texts


# Charts


def points_of(html):
    return re.findall(r'points="([^"]*)"', html)


def test_a_line_breaks_where_nothing_was_measured():
    line = Line("calls", [(0, 1), (1, 2), (2, None), (3, 1), (4, 2)])
    assert len(points_of(chart("calls", [line], span=(0, 4)))) == 2


def test_a_point_alone_is_a_dot():
    assert "<circle" in chart("calls", [Line("calls", [(0, 1)])], span=(0, 4))


def test_a_line_goes_from_left_to_right_and_up_where_values_rise():
    (points,) = points_of(chart("calls", [Line("calls", [(0, 0), (4, 10)])], span=(0, 4)))
    (left, low), (right, high) = ([float(it) for it in point.split(",")] for point in points.split())
    assert left < right
    assert low > high


@pytest.mark.parametrize(
    ("most", "label"), [(0, "1"), (0.3, "0.5"), (3, "5"), (1_000, "1k"), (7e6, "10M"), (2e9, "2G")]
)
def test_an_axis_ends_at_a_round_value(most, label):
    assert f">{label}</text>" in chart("calls", [Line("calls", [(0, most)])], span=(0, 1))


def test_texts_of_a_chart_are_escaped():
    assert "<b>" not in chart("<b>", [Line("<b>", [(0, 1)])], span=(0, 1))


def test_a_missing_step_is_a_gap_and_not_a_line(report):
    without = points_of(to_html(report(second(20), second(15))))
    assert len(points_of(to_html(report(second(300), second(295))))) == 2 * len(without)


# The command


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(cli.app, ["report", *arguments])


def test_the_command_writes_a_page_and_a_csv(run, tmp_path):
    import time

    with History(tmp_path / "kept.sqlite3") as history:
        history.add(Sample(time.time(), 1.0, "one", second(0).readings))
    place, html, csv = (str(tmp_path / name) for name in ("kept.sqlite3", "page.html", "figures.csv"))
    result = run("--since", "12h", "--history", place, "--html", html, "--csv", csv)
    assert result.exit_code == 0, result.output
    assert result.output == f"Wrote {html} and {csv}, of 1 samples.\n"
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert "calls_admitted" in (tmp_path / "figures.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--history", "nowhere.sqlite3"], "there is no history to read at 'nowhere.sqlite3'"),
        (["--since", "a while"], "'a while': expected a number and a unit"),
    ],
)
def test_the_command_says_what_is_wrong(run, arguments, said):
    result = run(*arguments)
    assert (result.exit_code, said in result.output) == (2, True)


def test_the_command_says_where_it_cannot_write(run, history, tmp_path):
    history(second(10))
    result = run("--history", str(tmp_path / "history.sqlite3"), "--html", str(tmp_path / "nowhere" / "page.html"))
    assert (result.exit_code, "cannot write" in result.output) == (2, True)


def test_the_command_says_what_is_missing_for_a_url(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    result = run("--history", "sqlite://")
    assert (result.exit_code, "resilience-kit[cli,history]" in result.output) == (2, True)
