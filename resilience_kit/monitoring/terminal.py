"""The dashboard's figures in a terminal: `resilience-kit top` draws them again each second, `stats` prints them once.

All names are the users'. They are printed as rich's Text, in which nothing is markup, with their control characters
made visible: a terminal obeys what some of them say.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resilience_kit.errors import ResilienceError
from resilience_kit.monitoring.overview import AgentRow, CircuitRow, LimitRow, Overview, share_of
from resilience_kit.monitoring.visible_text import visible

if TYPE_CHECKING:
    from resilience_kit.monitoring.overview import AlertRow, LastMinute

Read = Callable[[], Overview]

_EVERY = 1.0
# From here on a quota is nearly used, or is; the dashboard's colours say the same.
_NEAR = 0.8
_NARROWEST_BAR, _WIDEST_BAR = 5, 40
_NAME = 18
# Lines of a limit, and of all that is not a row of a table.
_LINES_OF_LIMIT = 2
_LINES_AROUND = 9
_FEWEST_ROWS = 3
_STATE = {"CLOSED": ("closed", "green"), "HALF_OPEN": ("on trial", "yellow"), "OPEN": ("open", "bold red")}
_THOUSAND = 1_000
_MANY = 10_000


def print_once(read: Read, console: Console | None = None) -> None:
    """Print the figures of now, all of them.

    Raises:
        ResilienceError: The source has none.
    """
    out = console or Console()
    out.print(drawn(read(), width=out.width, is_ascii=out.options.ascii_only))


def watch(read: Read, console: Console | None = None, *, every: float = _EVERY) -> None:
    """Draw the figures again and again until Ctrl-C; where the output is no terminal, print them once.

    A source that fails for a while is told above the last figures that it gave.

    Args:
        read: Gives the figures.
        console: Where to draw.
        every: Seconds between two readings.
    """
    out = console or Console()
    if not out.is_terminal:
        print_once(read, out)
        return
    overview = read()
    problem = ""
    # the alternate screen is drawn over from its first line, and what was there before comes back at the end
    with Live(console=out, screen=True, auto_refresh=False) as live:
        try:
            while True:
                rows = out.height - _LINES_AROUND
                live.update(
                    drawn(overview, width=out.width, rows=rows, problem=problem, is_ascii=out.options.ascii_only),
                    refresh=True,
                )
                time.sleep(every)
                try:
                    overview, problem = read(), ""
                except ResilienceError as error:
                    problem = str(error)
        except KeyboardInterrupt:
            return


def drawn(
    overview: Overview, *, width: int = 80, rows: int | None = None, problem: str = "", is_ascii: bool = False
) -> RenderableType:
    """The figures to be printed by rich.

    Args:
        overview: The figures.
        width: Columns of the terminal.
        rows: Lines that the limits, circuits and agents may take together. Default: as many as there are.
        problem: Why they are not new.
        is_ascii: Whether the terminal knows no other characters.
    """
    alerts, circuits, limits, agents = _fitting(overview, rows)
    parts: list[RenderableType] = [_headline(overview)]
    if problem:
        parts.append(Text(f"not new: {visible(problem)}", style="bold yellow"))
    wrong = [*map(_alert, alerts), *map(_circuit, circuits)]
    for line in wrong:
        # where lines are counted, each is one
        line.no_wrap, line.overflow = rows is not None, "ellipsis"
    parts += wrong
    parts += [Text(), _limits(limits, width, is_ascii=is_ascii), Text(_minute(overview.last_minute), style="bold")]
    if agents:
        parts += [Text(), _agents(agents)]
    everyone = len(overview.alerts) + len(_ill(overview)) + len(overview.limits) + len(overview.agents)
    left = everyone - len(alerts) - len(circuits) - len(limits) - len(agents)
    more = f"{left} more rows do not fit. " if left else ""
    when = _clock(overview.at)
    parts += [Text(), Text(f"{more}{when}, {visible(overview.source)}", style="dim")]
    return Group(*parts)


def _fitting(
    overview: Overview, rows: int | None
) -> tuple[Sequence["AlertRow"], Sequence[CircuitRow], Sequence[LimitRow], Sequence[AgentRow]]:
    """As many rows of each as fit; what is wrong comes first, and each kind gets a few."""
    ill = _ill(overview)
    if rows is None:
        return overview.alerts, ill, overview.limits, overview.agents
    left = max(rows, 4 * _FEWEST_ROWS)
    alerts = overview.alerts[: max(_FEWEST_ROWS, left // 4)]
    left -= len(alerts)
    circuits = ill[: max(_FEWEST_ROWS, left // 4)]
    left -= len(circuits)
    limits = overview.limits[: max(1, left // 2 // _LINES_OF_LIMIT)]
    left -= len(limits) * _LINES_OF_LIMIT
    return alerts, circuits, limits, overview.agents[: max(1, left)]


def _ill(overview: Overview) -> list[CircuitRow]:
    return [it for it in overview.circuits if it.state != "CLOSED"]


def _headline(overview: Overview) -> Text:
    ill = _ill(overview)
    is_open = any(it.state == "OPEN" for it in ill)
    waiting = sum(it.waiting for it in overview.limits)
    told = [
        _plural(len(overview.alerts), "alert"),
        _plural(sum(it.state == "OPEN" for it in ill), "open circuit"),
        _plural(sum(it.state == "HALF_OPEN" for it in ill), "circuit", " on trial"),
    ]
    what = ", ".join(it for it in told if it)
    is_critical = is_open or any(it.severity == "critical" for it in overview.alerts)
    line = Text(what or "All is well", style="bold red" if is_critical else "bold yellow" if what else "bold green")
    if waiting:
        line.append(f"; {_plural(waiting, 'call')} waiting for quota", style="default")
    if len(overview.processes) > 1:
        line.append(f"; {len(overview.processes)} processes", style="default")
    return line


def _alert(alert: "AlertRow") -> Text:
    colour = "bold red" if alert.severity == "critical" else "yellow"
    line = Text(f"{visible(alert.severity)} ", style=colour)
    since = "" if alert.since is None else f" since {_clock(alert.since)}"
    line.append(f"{visible(alert.rule)} {visible(alert.name)}{since}: {visible(alert.message)}", style="default")
    return line


def _circuit(circuit: CircuitRow) -> Text:
    word, colour = _STATE.get(circuit.state, (visible(circuit.state), "yellow"))
    line = Text(f"{word} ", style=colour)
    failed, refused = _short(circuit.failure_count), _short(circuit.calls_refused)
    line.append(f"circuit {visible(circuit.name)}: {failed} failed, {refused} refused", style="default")
    return line


def _limits(limits: Iterable[LimitRow], width: int, *, is_ascii: bool) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for _ in range(5):
        table.add_column(no_wrap=True, overflow="ellipsis")
    lines = [line for limit in limits for line in _lines_of(limit)]
    if not lines:
        return Text("No limit is in use yet.", style="dim")
    # the bar takes what the texts leave
    widths = [max(cell_len(text) for text in column) for column in zip(*(texts for texts, _ in lines), strict=True)]
    widths[0] = table.columns[0].width = min(widths[0], _NAME)
    bar = max(_NARROWEST_BAR, min(_WIDEST_BAR, width - sum(widths) - len(table.columns)))
    for (title, kind, used, fact), share in lines:
        table.add_row(Text(title, style="bold"), kind, _bar(share, bar, is_ascii=is_ascii), Text(used), Text(fact))
    return table


def _lines_of(limit: LimitRow) -> Iterator[tuple[tuple[str, str, str, str], float]]:
    """Two lines: a quota in each, and beside it what else there is to know."""
    state = " paused" if limit.paused else ""
    facts = (
        f"in flight {_short(limit.in_flight)}/{_short(limit.max_concurrent)} waiting {_short(limit.waiting)}{state}",
        f"429s {_short(limit.rate_limited)} wait {_seconds(limit.wait_p95)} answer {_seconds(limit.answer_p95)}",
    )
    quotas = (
        ("requests", limit.requests_in_window, limit.requests_per_minute),
        ("tokens", limit.tokens_in_window, limit.tokens_per_minute),
    )
    for number, ((kind, used, most), fact) in enumerate(zip(quotas, facts, strict=True)):
        title = visible(limit.name) if number == 0 else ""
        yield (title, kind, f"{_short(used)}/{_short(most)}", fact), share_of(used, most)


def _bar(share: float, width: int, *, is_ascii: bool) -> Text:
    full, empty = "#." if is_ascii else "█░"
    filled = max(0, round(min(share, 1.0) * width))
    colour = "red" if share >= 1 else "yellow" if share >= _NEAR else "green"
    return Text.assemble((full * filled, colour), (empty * (width - filled), "dim"))


def _minute(minute: "LastMinute") -> str:
    return (
        f"last minute: {_short(minute.requests)} requests, {_short(minute.tokens)} tokens, "
        f"{_short(minute.rate_limited)} 429s, {_short(minute.retries)} retries\n"
        f"wait p50 {_seconds(minute.wait_p50)}, p95 {_seconds(minute.wait_p95)}; answer p50 "
        f"{_seconds(minute.answer_p50)}, p95 {_seconds(minute.answer_p95)}, p99 {_seconds(minute.answer_p99)}"
    )


def _agents(agents: Iterable[AgentRow]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("agent", no_wrap=True, overflow="ellipsis", max_width=28)
    for title in ("calls", "prompt", "answer", "cost", "cut"):
        table.add_column(title, justify="right", no_wrap=True)
    for it in agents:
        cost = "no price" if not it.usd and it.calls_of_unknown_price else f"${it.usd:,.2f}"
        numbers = (it.calls, it.prompt_tokens, it.completion_tokens)
        table.add_row(Text(visible(it.name)), *map(_short, numbers), cost, _short(it.truncations))
    return table


def _short(number: float | None) -> str:
    """A count in few characters."""
    if number is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= max(size, _MANY if unit == "k" else size):
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def _clock(at: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        # a dashboard answers what it likes
        return "--:--:--"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * _THOUSAND:.0f}ms" if seconds < 1 else f"{seconds:.3g}s"


def _plural(count: float, word: str, rest: str = "") -> str:
    return f"{_short(count)} {word}{'' if count == 1 else 's'}{rest}" if count else ""
