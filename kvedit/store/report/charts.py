"""The charts of the HTML report, as SVG.

Invariants:
- A chart stays small: at most ``POINTS`` points with intervals, however many checks there were.
- One is left out where there is too little to draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import ceil
from statistics import median
from typing import TYPE_CHECKING

from kvedit.store.report.scores import Check, pooled
from kvedit.store.rows import EditRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

POINTS = 60


def growth(counts: Mapping[int, int]) -> str:
    """How many facts the model held at each revision, the base model's among them."""
    if len(counts) < 3:
        return ""
    figure, axes = _chart()
    axes.step(list(counts), list(counts.values()), where="post")
    axes.set_ylim(bottom=0)
    _over_revisions(axes)
    axes.set_ylabel("facts")
    _in_whole_numbers(axes.yaxis)
    return _svg(figure)


def retention(series: Mapping[str, Sequence[Check]]) -> str:
    """The share recalled at each check, by protocol; many checks are pooled to ``POINTS``."""
    present = {name: checks for name, checks in series.items() if checks}
    if not present:
        return ""
    figure, axes = _chart()
    most = 1
    for name, checks in present.items():
        size = ceil(len(checks) / POINTS)
        most = max(most, size)
        _intervals(
            axes, [pooled(checks[at : at + size]) for at in range(0, len(checks), size)], name
        )
    _over_revisions(axes, "" if most == 1 else f", up to {most} checks a point")
    axes.set_ylabel("%, Wilson 95%")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return _svg(figure)


def _intervals(axes: Axes, checks: Sequence[Check], name: str) -> None:
    scores = [check.score for check in checks]
    rates = [100 * (score.rate or 0.0) for score in scores]
    ends = [score.interval() for score in scores]
    below = [rate - 100 * low for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [100 * high - rate for rate, (_, high) in zip(rates, ends, strict=True)]
    revisions = [check.revision for check in checks]
    errors = [below, above]
    axes.errorbar(revisions, rates, yerr=errors, fmt="o", markersize=3, linewidth=0.8, label=name)


def margins(values: Sequence[float]) -> str:
    """How the facts' logit margins are distributed."""
    if len(values) < 2:
        return ""
    figure, axes = _chart()
    axes.hist(values, bins=min(40, len(values)))
    axes.axvline(0, linestyle=":", linewidth=1)
    axes.set(xlabel="logits", ylabel="facts")
    return _svg(figure)


def norms(edits: Sequence[EditRow]) -> str:
    """The largest and the median relative norm, by revision: growing norms precede a collapse."""
    measured = [(edit.revision, _percentages(edit)) for edit in edits]
    points = sorted((at, norms) for at, norms in measured if at is not None and norms)
    if len(points) < 2:
        return ""
    revisions = [revision for revision, _ in points]
    figure, axes = _chart()
    axes.plot(revisions, [max(norms) for _, norms in points], label="largest")
    axes.plot(revisions, [median(norms) for _, norms in points], label="median")
    axes.set_ylim(bottom=0)
    _over_revisions(axes)
    axes.set_ylabel("% of a matrix's norm")
    axes.legend(fontsize="small")
    return _svg(figure)


def _percentages(edit: EditRow) -> list[float]:
    """The relative norm of each matrix after an edit, %; reports of early versions have none."""
    norms = edit.report.get("relative_norms")
    return [100 * norm for norm in norms.values()] if isinstance(norms, dict) else []


def _chart() -> tuple[Figure, Axes]:
    """A small figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    return figure, figure.subplots()


def _over_revisions(axes: Axes, note: str = "") -> None:
    """Name the horizontal axis."""
    _in_whole_numbers(axes.xaxis)
    axes.set_xlabel(f"revision{note}")


def _in_whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _svg(figure: Figure) -> str:
    """A figure as an ``svg`` element, without notes about the program that drew it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
