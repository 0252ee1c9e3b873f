"""The picture of ``field``: each score against the number of edits, a line a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("reliability", "Reliability, generated"),
    ("generalization", "Generalization, generated"),
    ("locality", "Locality: answer unchanged"),
    ("harmonic", "Harmonic mean of the three"),
    ("trr", "TRR: unedited keys still answered"),
)
STYLES = ("-", "--", ":")
COLOURS = 10  # of matplotlib's cycle; then the next style
APART = 1.02  # lines that hold alike would hide each other


def draw(document: Mapping[str, Any], figure: Figure) -> None:
    """Fill a figure: five panels and the legend; a method that was edited once has a dot."""
    panels = figure.subplots(2, 3).flatten()
    for axes, (name, title) in zip(panels, PANELS, strict=False):
        for number, row in enumerate(document["rows"]):
            _line(axes, row, name, number)
        _base(axes, document["base"][name])
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(-3, 103)
        axes.set_xscale("log")
        axes.set_xticks(document["marks"], [str(mark) for mark in document["marks"]])
        axes.minorticks_off()
        axes.set_xlabel("edits (bars: 95% intervals; dashed: base model)")
        axes.set_ylabel("%")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[5].set_axis_off()
    panels[5].legend(handles, labels, fontsize="small", loc="center", ncols=2)


def _line(axes: Axes, row: Mapping[str, Any], name: str, number: int) -> None:
    """Values with their 95% intervals, in per cent."""
    points = [(point["after"], *_value(point[name])) for point in row["points"]]
    known = [(after, value, low, high) for after, value, low, high in points if value is not None]
    place = APART**number
    axes.errorbar(
        [after * place for after, *_ in known], [value for _, value, *_ in known],
        yerr=[[max(0.0, value - low) for _, value, low, _ in known],
              [max(0.0, high - value) for _, value, _, high in known]],
        label=f"{row['method']} ({row['way']})", marker="o", markersize=4, elinewidth=0.6,
        color=f"C{number % COLOURS}", linestyle=STYLES[number // COLOURS % len(STYLES)],
    )  # fmt: skip


def _base(axes: Axes, score: Mapping[str, Any]) -> None:
    value, *_ = _value(score)
    if value is not None:
        axes.axhline(value, color="grey", linewidth=1, linestyle="--")


def _value(score: Mapping[str, Any]) -> tuple[float | None, float, float]:
    """Value and interval of a score or a mean, in per cent."""
    value = score.get("rate", score.get("value"))
    low, high = (100 * bound for bound in score["interval"])
    return (None if value is None else 100 * value), low, high
