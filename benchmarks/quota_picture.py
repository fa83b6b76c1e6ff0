"""The picture of the quota benchmark: admissions above the line and refusals below it, a panel for each contestant."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.agents import Limits

if TYPE_CHECKING:
    from benchmarks.conditions import Condition
    from benchmarks.quota import Result

# Of Okabe and Ito's palette, which people tell apart however they see colours.
_ADMITTED, _REFUSED = "#0072B2", "#D55E00"
_GREY, _PALE = "#666666", "#DDDDDD"
_BINS_A_WINDOW = 24
_SHOWN_WINDOWS = 6
# What is higher is cut off, so that one storm does not flatten all others; the text tells the sum.
_MOST = 42
_TICK = 30


def draw(path: Path, limits: Limits, best: "Result", results: "dict[Condition, list[Result]]") -> None:
    """Draw all contestants, a column for each condition, into a PNG."""
    columns = [[best, *of_condition] for of_condition in results.values()]
    figure = Figure(figsize=(10, 0.95 * len(columns[0]) + 0.9), facecolor="white")
    panels = figure.subplots(len(columns[0]), len(columns), sharex=True, sharey=True, squeeze=False)
    for column, (condition, of_condition) in enumerate(zip(results, columns, strict=True)):
        for row, result in enumerate(of_condition):
            _panel(panels[row][column], limits, best, result)
        panels[0][column].set_title(
            f"{condition.name}: {condition.meaning}", fontsize=11.5, pad=22, loc="left", color=_GREY
        )
        panels[-1][column].set_xlabel("seconds; a line where the server's window turns", fontsize=9, color=_GREY)
    figure.tight_layout(rect=(0, 0, 1, 0.965), h_pad=0.1, w_pad=2)
    width = f"{limits.period / _BINS_A_WINDOW:g} s"
    figure.legend(
        handles=[
            Patch(color=_ADMITTED, label=f"requests admitted in {width}"),
            Patch(color=_REFUSED, label=f"refused with 429 in {width}"),
        ],
        loc="upper left",
        ncols=2,
        frameon=False,
        fontsize=10.5,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def _panel(axes: Axes, limits: Limits, best: "Result", result: "Result") -> None:
    width = limits.period / _BINS_A_WINDOW
    for times, sign, colour in ((result.admitted_at, 1, _ADMITTED), (result.refused_at, -1, _REFUSED)):
        bins = Counter(int(time / width) for time in times)
        heights = [sign * min(_MOST, count) for count in bins.values()]
        axes.bar([number * width for number in bins], heights, width=width, align="edge", color=colour)
    for window in range(1, _SHOWN_WINDOWS):
        axes.axvline(window * limits.period, color=_PALE, linewidth=0.9, zorder=0)
    axes.axhline(0, color=_GREY, linewidth=0.6)
    axes.set_xlim(0, _SHOWN_WINDOWS * limits.period)
    axes.set_ylim(-1.15 * _MOST, _MOST)
    axes.set_xticks([window * limits.period for window in range(_SHOWN_WINDOWS + 1)])
    axes.set_yticks([-_TICK, 0, _TICK], [f"{_TICK}", "0", f"{_TICK}"])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=_GREY)
    axes.tick_params(axis="y", labelsize=7)
    weight = "bold" if result.name == "resilience_kit" else "normal"
    axes.text(0, 1, result.name, transform=axes.transAxes, fontsize=10.5, fontweight=weight, va="bottom")
    axes.text(1, 1, _summary(best, result), transform=axes.transAxes, fontsize=9.5, ha="right", va="bottom")


def _summary(best: "Result", result: "Result") -> str:
    if result is best:
        return f"{result.seconds:.0f} s"
    refused = f"{len(result.refused_at)} refused"
    if result.lost:
        return f"{refused}, {result.lost} of {len(best.admitted_at)} answers lost"
    return f"{refused}, {result.seconds / best.seconds:.2f} times the best"
