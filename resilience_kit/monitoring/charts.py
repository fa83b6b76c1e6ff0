"""Line charts as inline SVG: no script, no file beside it, and colours from the page's own style."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from html import escape
from itertools import groupby

_WIDTH, _HEIGHT = 720, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 8, 10, 24
_DAY = 86_400

# What a line goes through: seconds since the epoch, and a value; None where there is none, and a gap is drawn.
Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart, and what it shows in a word or two."""

    label: str
    points: Sequence[Point]


def chart(title: str, lines: Sequence[Line], *, span: tuple[float, float], zone: tzinfo | None = None) -> str:
    """Draw lines over time, from 0 up.

    Args:
        title: What it shows, with its unit.
        lines: Four at most: the page has colours for so many.
        span: Where time begins and ends, in seconds since the epoch.
        zone: Of the times that are written. Default: this machine's zone.

    Returns:
        A `figure` of HTML, with all texts escaped.

    Example:
        >>> from resilience_kit.monitoring.charts import Line, chart
        >>> "<polyline" in chart("calls", [Line("admitted", [(0, 1), (60, 3)])], span=(0, 60))
        True
    """
    values = [value for line in lines for _, value in line.points if value is not None]
    most = _nice(max(values, default=0.0))
    start, end = span
    drawn = [
        shape
        for number, line in enumerate(lines)
        for shape in _shapes(line.points, number, lambda at, value: (_x(at, start, end), _y(value, most)))
    ]
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {_y(value, most):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{_y(value, most) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        for value in (0, most / 2, most)
    )
    times = "".join(
        f'<text x="{_x(at, start, end):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">'
        f"{_time(at, end - start, zone)}</text>"
        for at, anchor in ((start, "start"), ((start + end) / 2, "middle"), (end, "end"))
    )
    legend = "".join(f'<span class="key s{number}">{escape(line.label)}</span>' for number, line in enumerate(lines))
    note = "" if values else '<p class="none">Nothing was measured.</p>'
    return (
        f"<figure><figcaption>{escape(title)} {legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{grid}{times}{''.join(drawn)}</svg>{note}</figure>"
    )


def _shapes(points: Sequence[Point], number: int, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """A line in as many pieces as there are gaps, and one more."""
    shapes = []
    for is_there, run in groupby(points, key=lambda point: point[1] is not None):
        if is_there:
            places = [place(at, value) for at, value in run if value is not None]
            if len(places) == 1:
                shapes.append(f'<circle class="s{number}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2"/>')
            else:
                text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                shapes.append(f'<polyline class="s{number}" points="{text}"/>')
    return shapes


def _x(at: float, start: float, end: float) -> float:
    share = (at - start) / (end - start) if end > start else 0.0
    return _LEFT + min(1.0, max(0.0, share)) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, most: float) -> float:
    return _HEIGHT - _BOTTOM - value / most * (_HEIGHT - _TOP - _BOTTOM)


def _nice(value: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    if value < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999_999)


def _short(value: float) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:g}{unit}"
    return f"{value:g}"


def _time(at: float, seconds: float, zone: tzinfo | None) -> str:
    form = "%H:%M:%S" if seconds < _DAY / 24 else "%a %H:%M" if seconds <= 2 * _DAY else "%d %b %H:%M"
    return datetime.fromtimestamp(at, zone).strftime(form)
