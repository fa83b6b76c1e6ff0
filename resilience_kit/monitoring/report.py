"""A report on what was measured: a page of HTML that needs nothing beside it, and the figures behind it as CSV."""

import csv
import io
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from html import escape

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.charts import Line, Point, chart
from resilience_kit.monitoring.costs import Costs, Spending, costs_of
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Histogram, Reading, Sample, merge, merge_by, start_of
from resilience_kit.monitoring.visible_text import visible, visible_lines

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_SINCE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([smhdw])")
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
# As many points as a line can show.
_MOST_POINTS = 360
_STEPS = (1, 5, 10, 30, 60, 300, 900, 1_800, 3_600, 3 * 3_600, 6 * 3_600, 86_400, 7 * 86_400)
# A table's first ones; the CSV has all.
_MOST_ROWS = 100
# A program for tables may take what begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# As long as a name of a history may be.
_LONGEST = 1_000

_STYLE = """
:root { color-scheme: light dark; --text: #1d2530; --faint: #5b6675; --line: #d5dae1; --back: #ffffff; --card: #f5f7f9;
  --s0: #0b66c3; --s1: #b3430e; --s2: #1a7f37; --s3: #8250df; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --faint: #9aa5b4; --line: #333c48; --back: #14181e;
  --card: #1d232b; --s0: #6cb1ff; --s1: #ff9d66; --s2: #56d071; --s3: #c19bff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } p.faint, .none { color: var(--faint); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem; }
dl div { background: var(--card); border-radius: .4rem; padding: .5rem .75rem; }
dt { color: var(--faint); font-size: .85rem; } dd { margin: 0; font-size: 1.2rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.5; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); } polyline.s2 { stroke: var(--s2); }
polyline.s3 { stroke: var(--s3); }
circle.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); }
circle.s3 { fill: var(--s3); }
.key { font-size: .85rem; margin-left: .75rem; } .key::before { content: "\\25cf"; margin-right: .3em; }
.key.s0::before { color: var(--s0); } .key.s1::before { color: var(--s1); } .key.s2::before { color: var(--s2); }
.key.s3::before { color: var(--s3); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured in a stretch of time.

    Attributes:
        start: Its beginning, in seconds since the epoch.
        end: Its end.
        step: Seconds that one point of a chart stands for.
        samples: Of each process, by `step`, the oldest first.
        costs: Of the day and the month that `end` is in.
        zone: Of the times that are written; None for this machine's.
    """

    start: float
    end: float
    step: float
    samples: tuple[Sample, ...]
    costs: Costs
    zone: tzinfo | None = None


def seconds_of(since: str) -> float:
    """The seconds that "90s", "30m", "12h", "7d" or "2w" say.

    Raises:
        ConfigurationError: It says something else, or nothing above 0.

    Example:
        >>> from resilience_kit.monitoring.report import seconds_of
        >>> seconds_of("7d")
        604800.0
    """
    found = _SINCE.fullmatch(since.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigurationError(f'{since!r}: expected a number and a unit, such as "30m", "12h", "7d" or "2w"')
    return seconds


def report_on(
    history: History, *, seconds: float = 7 * _DAY, zone: tzinfo | None = None, now: float | None = None
) -> Report:
    """Read what was measured in the last while; it blocks meanwhile.

    Args:
        history: Where it was kept.
        seconds: How far back.
        zone: Of the times that are written, and of the costs' days. Default: this machine's zone.
        now: Seconds since the epoch. Default: by the clock.

    Raises:
        ConfigurationError: The history cannot be read.

    Example:
        >>> from resilience_kit.monitoring.history import History
        >>> from resilience_kit.monitoring.measures import Sample
        >>> from resilience_kit.monitoring.report import report_on, to_html
        >>> with History("report.sqlite3", clock=lambda: 61) as history:
        ...     history.add(Sample(at=60, seconds=1, process="one"))
        >>> "<svg" in to_html(report_on(history, seconds=60, now=61))
        True
    """
    end = time.time() if now is None else now
    # nothing was measured before, and no calendar goes back as far as some would
    start = max(0.0, end - seconds)
    step = next((it for it in _STEPS if seconds / it <= _MOST_POINTS), math.ceil(seconds / _MOST_POINTS / _DAY) * _DAY)
    # what is kept for so long, and read in no time
    resolution = _HOUR if seconds > 2 * _DAY else _MINUTE if seconds > _HOUR else 1
    step = max(step, resolution)
    by_process: dict[str, list[Sample]] = {}
    for sample in history.read(start - start % resolution, end, resolution=resolution):
        by_process.setdefault(sample.process, []).append(sample)
    merged = [sample for samples in by_process.values() for sample in merge_by(samples, step)]
    samples = tuple(sorted(merged, key=lambda sample: (sample.at, sample.process)))
    return Report(start, end, step, samples, costs_of(history, zone=zone, now=end), zone)


def to_csv(report: Report) -> str:
    """The figures as CSV: one line for each that is not 0, of each process and step.

    Example:
        >>> from resilience_kit.monitoring.costs import Costs
        >>> from resilience_kit.monitoring.report import Report, to_csv
        >>> to_csv(Report(0, 60, 60, (), Costs(60))).splitlines()
        ['at,seconds,process,section,name,measure,value']
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("at", "seconds", "process", "section", "name", "measure", "value"))
    for sample in report.samples:
        at = datetime.fromtimestamp(sample.at, UTC).isoformat(timespec="seconds")
        for reading in sample.readings:
            whose = at, f"{sample.seconds:.3f}", _plain(sample.process), _plain(reading.section), _plain(reading.name)
            writer.writerows(
                (*whose, _plain(name), _plain(value) if isinstance(value, str) else value)
                for name, value in _figures(reading)
            )
    return text.getvalue()


def to_html(report: Report) -> str:
    """The report as a page: it needs no other file and no network, and runs no script."""
    total = merge(report.samples) if report.samples else Sample(report.end, 0.0, "")
    span = f"{_written(report.start, report.zone)} to {_written(report.end, report.zone)}"
    processes = len({sample.process for sample in report.samples})
    whose = f"{processes} {'process' if processes == 1 else 'processes'}"
    parts = [
        f"<h1>LLM calls, {escape(span)}</h1>",
        f'<p class="faint">{whose}, one point for each {_length(report.step)}.</p>',
        _headline(total),
        "<h2>Costs</h2>",
        _costs(report.costs),
        "<h2>Over time</h2>",
        *_charts(report),
        "<h2>Who and what</h2>",
        *_tables(total),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>LLM calls, {escape(span)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _headline(total: Sample) -> str:
    waits, answers = _histogram(total, "wait"), _histogram(total, "answer")
    rows = (
        ("Calls", _count(_counter(total, "rate_limiters", "calls_admitted"))),
        ("Tokens used", _count(_tokens(total))),
        ("Waited (95 %)", _duration(waits.percentile(0.95))),
        ("Answered in (50 %)", _duration(answers.percentile(0.5))),
        ("Answered in (95 %)", _duration(answers.percentile(0.95))),
        ("429s", _count(_counter(total, "rate_limiters", "calls_rate_limited"))),
        ("Retries", _count(_counter(total, "retries", "retries"))),
        ("Given up", _count(_counter(total, "retries", "calls_given_up"))),
        ("Circuits opened", _count(_counter(total, "circuit_breakers", "times_opened"))),
        ("Prompts cut", _count(_counter(total, "agents", "truncations"))),
    )
    return _list(rows)


def _costs(costs: Costs) -> str:
    projected = "unknown" if costs.projected_usd is None else _usd(costs.projected_usd)
    rows = (
        ("Today", _spent(costs.today)),
        ("This month", _spent(costs.month)),
        ("By the month's end", projected),
    )
    parts = [
        _list(rows),
        f'<p class="faint">The last figure is made from {escape(costs.projected_from)}.</p>',
    ]
    if costs.unpriced_models:
        names = ", ".join(map(_escaped, costs.unpriced_models))
        parts.append(f"<p>No price is known for all calls of {names}: what they cost comes on top.</p>")
    if costs.unpriced_agents:
        names = ", ".join(map(_escaped, costs.unpriced_agents))
        parts.append(f"<p>Calls of these agents have no known price, or did not say what they used: {names}.</p>")
    for title, today, month in (
        ("Agent", costs.today_by_agent, costs.month_by_agent),
        ("Model", costs.today_by_model, costs.month_by_model),
    ):
        rows_of = [
            (name, _spent(today.get(name, Spending())), _spent(it), _count(it.calls_of_unknown_price))
            for name, it in sorted(month.items(), key=lambda item: -item[1].known_usd)
        ]
        parts.append(_table((title, "Today", "This month", "Calls without a price"), rows_of))
    return "".join(parts)


def _charts(report: Report) -> Iterator[str]:
    samples = _with_gaps(report)

    def line(label: str, value: Callable[[Sample], float | None]) -> Line:
        points: list[Point] = [(at, None if sample is None else value(sample)) for at, sample in samples]
        return Line(label, points)

    def a_minute(section: str, counter: str) -> Callable[[Sample], float]:
        return lambda sample: _counter(sample, section, counter) * _MINUTE / max(sample.seconds, 1.0)

    def share(histogram: str, of: float) -> Callable[[Sample], float | None]:
        return lambda sample: _histogram(sample, histogram).percentile(of)

    groups = (
        (
            "Tokens per minute",
            [
                line("admitted", a_minute("rate_limiters", "tokens_admitted")),
                line("used", lambda sample: _tokens(sample) * _MINUTE / max(sample.seconds, 1.0)),
            ],
        ),
        (
            "Calls per minute",
            [
                line("admitted", a_minute("rate_limiters", "calls_admitted")),
                line("delayed", a_minute("rate_limiters", "calls_delayed")),
                line("refused", a_minute("rate_limiters", "calls_refused")),
            ],
        ),
        (
            "Refusals by the server and retries, per minute",
            [
                line("429s", a_minute("rate_limiters", "calls_rate_limited")),
                line("retries", a_minute("retries", "retries")),
            ],
        ),
        ("Seconds waited", [line("50 %", share("wait", 0.5)), line("95 %", share("wait", 0.95))]),
        (
            "Seconds to the answer",
            [
                line("50 %", share("answer", 0.5)),
                line("95 %", share("answer", 0.95)),
                line("99 %", share("answer", 0.99)),
            ],
        ),
        ("US dollars per hour, where the price is known", [line("spent", _usd_an_hour)]),
    )
    for title, lines in groups:
        yield chart(title, lines, span=(report.start, report.end), zone=report.zone)


def _with_gaps(report: Report) -> list[tuple[float, Sample | None]]:
    """All processes together, with nothing in between where steps are missing."""
    points: list[tuple[float, Sample | None]] = []
    last: float | None = None
    for sample in merge_by(report.samples, report.step):
        begin = start_of(sample, report.step)
        if last is not None and begin > last + report.step * 1.5:
            points.append((last + report.step, None))
        points.append((sample.at, sample))
        last = begin
    return points


def _tables(total: Sample) -> Iterator[str]:
    limits = [
        (
            it.name,
            _count(it.counter("calls_admitted")),
            _count(it.counter("tokens_admitted")),
            _count(it.counter("calls_delayed")),
            _duration(it.histogram("wait").percentile(0.95)),
            _duration(it.histogram("answer").percentile(0.95)),
            _count(it.counter("calls_rate_limited")),
            _count(it.counter("calls_refused")),
        )
        for it in _sorted(total, "rate_limiters", "calls_admitted")
    ]
    yield _table(("Limit", "Calls", "Tokens", "Delayed", "Waited (95 %)", "Answered (95 %)", "429s", "Refused"), limits)
    circuits = [
        (
            it.name,
            str(it.gauges.get("state", "")),
            _count(it.counter("times_opened")),
            _count(it.counter("calls_refused")),
        )
        for it in _sorted(total, "circuit_breakers", "times_opened")
    ]
    yield _table(("Circuit", "State", "Opened", "Calls refused"), circuits)
    retries = [
        (
            it.name,
            _count(it.counter("retries")),
            _count(it.counter("calls_recovered")),
            _count(it.counter("calls_given_up")),
        )
        for it in _sorted(total, "retries", "retries")
    ]
    yield _table(("Retried function", "Retries", "Recovered", "Given up"), retries)
    for title, section in (("Agent", "agents"), ("Model", "models")):
        rows = [
            (
                it.name,
                _count(it.counter("calls")),
                _count(it.counter("prompt_tokens")),
                _count(it.counter("completion_tokens")),
                _spent(_spending(it)),
                _count(it.counter("truncations")),
            )
            for it in _sorted(total, section, "calls")
        ]
        yield _table((title, "Calls", "Prompt tokens", "Answer tokens", "Cost", "Prompts cut"), rows)


def _figures(reading: Reading) -> Iterator[tuple[str, float | str]]:
    yield from reading.counters.items()
    yield from ((name, value) for name, value in reading.gauges.items() if value is not None)
    for name, histogram in reading.histograms.items():
        yield f"{name}_count", histogram.count
        yield f"{name}_seconds", histogram.total
        for share in (0.5, 0.95, 0.99):
            seconds = histogram.percentile(share)
            if seconds is not None:
                yield f"{name}_p{share * 100:.0f}", seconds


def _sorted(total: Sample, section: str, counter: str) -> list[Reading]:
    return sorted(total.of(section).values(), key=lambda it: (-it.counter(counter), it.name))


def _counter(sample: Sample, section: str, counter: str) -> float:
    return sum(it.counter(counter) for it in sample.readings if it.section == section)


def _tokens(sample: Sample) -> float:
    return _counter(sample, "agents", "prompt_tokens") + _counter(sample, "agents", "completion_tokens")


def _usd_an_hour(sample: Sample) -> float:
    return _counter(sample, "agents", "usd") * _HOUR / max(sample.seconds, 1.0)


def _histogram(sample: Sample, name: str) -> Histogram:
    total = Histogram()
    for reading in sample.readings:
        if name in reading.histograms:
            total = total.add(reading.histograms[name])
    return total


def _spending(reading: Reading) -> Spending:
    unknown = round(reading.counter("calls_of_unknown_price"))
    usd = float(reading.counter("usd"))
    return Spending(round(reading.counter("calls")), known_usd=usd, calls_of_unknown_price=unknown)


def _spent(spending: Spending) -> str:
    if spending.usd is None:
        return "unknown"
    return f"{'at least ' if spending.calls_of_unknown_price else ''}{_usd(spending.usd)}"


def _usd(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.4g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EM DASH}"
    return f"{seconds * 1_000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _length(seconds: float) -> str:
    for unit, name in ((_DAY, "day"), (_HOUR, "hour"), (_MINUTE, "minute")):
        if seconds >= unit and seconds % unit == 0:
            return name if seconds == unit else f"{seconds / unit:g} {name}s"
    return "second" if seconds == 1 else f"{seconds:g} seconds"


def _written(at: float, zone: tzinfo | None) -> str:
    local = datetime.fromtimestamp(at, zone)
    return local.strftime("%Y-%m-%d %H:%M")


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(it)}</dd></div>" for name, it in rows) + "</dl>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(it)}</th>' for it in heads)
    shown = "".join(f"<tr>{''.join(f'<td>{_escaped(it)}</td>' for it in row)}</tr>" for row in rows[:_MOST_ROWS])
    more = f'<p class="faint">{len(rows) - _MOST_ROWS} more are in the CSV.</p>' if len(rows) > _MOST_ROWS else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table></div>{more}'


def _escaped(text: str) -> str:
    return escape(visible(text, longest=_LONGEST))


def _plain(text: str) -> str:
    # line breaks and tabs are data; a carriage return, which csv does not quote, ends a line for some readers
    shown = "\t".join(map(visible_lines, text.split("\t")))
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
