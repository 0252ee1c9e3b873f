"""Pictures of what a benchmark figure_, from the JSON that it kept.

Invariants:
- A picture shows what the document says and nothing else: every share with its interval, every
  single measurement where there are several.
- Nothing global is changed: no pyplot, no style, no backend is chosen; matplotlib is imported when
  a picture is drawn, torch never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from kvedit.errors import UsageError
from kvedit.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
HELD = (
    ("committed", "New facts held (ERR)"),
    ("phrasings", "Never-trained phrasings"),
    ("poets", "Base poets kept"),
    ("relations", "Base relations kept"),
)
ASKED = "%, free generation"
SOME_ASKED = (
    "Before the last mark of a line each new fact is asked\n"
    "one phrasing that was trained and one that was not."
)
MARGIN = 1.3
"""Left and right of the first and the last mark; of one mark the axis would show the gaps alone."""
APART = 1.025
"""By so much lines stand apart, or those that hold alike would hide each other."""
FORCED_STYLE: dict[str, Any] = {"linestyle": ":", "marker": ".", "alpha": 0.7}
HOLDS = 95
DOTS: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5, "alpha": 0.6}
DPI = 150


# ---- reading and writing


def measured(document: Document) -> str:
    """Which benchmark a result is of; raises UsageError for one that has no picture."""
    kind = str(document["benchmark"])
    if kind not in _DRAWN:
        raise UsageError(f"{kind} has no picture", hint=f"These have: {', '.join(_DRAWN)}.")
    return kind


def draw(document: Document, path: Path) -> None:
    """Write a picture whole or not at all; PNG, SVG or PDF by the name of the file."""
    buffer = BytesIO()
    figure(document).savefig(buffer, format=path.suffix[1:].lower(), dpi=DPI)
    write_atomic(path, buffer.getvalue())


def figure(document: Document) -> Figure:
    """The picture of a result, as matplotlib has it."""
    kind = measured(document)
    figure_ = _DRAWN[kind](document)
    figure_.suptitle(_title(kind, document), fontsize="medium")
    return figure_


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _title(kind: str, document: Document) -> str:
    """What, of which model, and when and at which commit it was measured."""
    models = document["models"] if kind == "capacity" else (document,)
    names = ", ".join(dict.fromkeys(_name(one) for one in models))
    text = f"{str(document['started'])[:10]} · {document['commit']}"
    return f"python -m tests.bench {kind}: {names}\n{text}"


def _name(result: Document) -> str:
    """The model's name; of a folder its own name alone."""
    name = str(result.get("model", ""))
    return Path(name).name if Path(name).is_absolute() else name


# ---- what is held against the number of facts


def _strategies(document: Document) -> Figure:
    """A line for each way of training."""
    points = document["points"]
    figure_ = _new(12, 7)
    panels = figure_.subplots(2, 3).flatten()
    for axes, (name, title) in zip(panels, HELD, strict=False):
        _curves(axes, points, name, title)
    _seconds_curves(panels[4], points)
    panels[5].set_axis_off()
    _legend(panels[5], panels[0])
    if any(point.get("asked") is not None for point in points):
        panels[5].text(0.5, 0, SOME_ASKED, ha="center", fontsize="small")
    return figure_


def _retain(document: Document) -> Figure:
    """kvedit beside the baseline."""
    points = document["points"]
    figure_ = _new(10, 6.5)
    panels = figure_.subplots(2, 2).flatten()
    recalled = ("tried", "New facts recalled, of all")
    for axes, (name, title) in zip(panels, (recalled, *HELD[1:]), strict=True):
        _curves(axes, points, name, title)
    panels[0].legend(fontsize="small", loc="best")
    return figure_


def _curves(axes: Axes, points: Sequence[Document], name: str, title: str) -> None:
    """One measure by free generation, a line for each method."""
    methods = _methods(points)
    for number, method in enumerate(methods):
        own = [point for point in points if point["method"] == method]
        shift = APART ** (number - (len(methods) - 1) / 2)
        _curve(axes, own, name, "generated", shift, label=method, color=f"C{number}")
    _facts_axis(axes, points)
    _percent_axis(axes, title)


def _curve(
    axes: Axes, points: Sequence[Document], name: str, protocol: str, shift: float, **style: Any
) -> None:
    """A measure against the number of facts, with its intervals."""
    scores = [(point["after"], point[name][protocol]) for point in points]
    asked = [(after, score) for after, score in scores if score["rate"] is not None]
    if not asked:
        return
    rates = [100 * score["rate"] for _, score in asked]
    ends = [[100 * end for end in score["interval"]] for _, score in asked]
    # Rounding may leave an interval's end a hair inside: matplotlib takes no negative bars.
    below = [max(0.0, rate - low) for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [max(0.0, high - rate) for rate, (_, high) in zip(rates, ends, strict=True)]
    given = {"marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 1, **style}
    axes.errorbar([after * shift for after, _ in asked], rates, yerr=[below, above], **given)


def _seconds_curves(axes: Axes, points: Sequence[Document]) -> None:
    """Seconds a fact so far, a line for each method."""
    for number, method in enumerate(_methods(points)):
        own = [p for p in points if p["method"] == method and p.get("seconds") is not None]
        x, y = [p["after"] for p in own], [p["seconds"] for p in own]
        axes.plot(x, y, marker="o", markersize=4, color=f"C{number}", label=method)
    _facts_axis(axes, points)
    axes.set_title("Seconds a fact", fontsize="medium")
    axes.set_ylim(bottom=0)


def _methods(points: Sequence[Document]) -> list[str]:
    return list(dict.fromkeys(str(point["method"]) for point in points))


def _facts_axis(axes: Axes, points: Sequence[Document]) -> None:
    """Facts on a scale of doublings, marked where there is room."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    marks = sorted({point["after"] for point in points})
    axes.xaxis.set_major_locator(FixedLocator(_spaced(marks)))
    if marks:
        axes.set_xlim(marks[0] / MARGIN, marks[-1] * MARGIN)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("facts trained")
    axes.grid(alpha=0.3)


def _spaced(values: Sequence[float], factor: float = 1.3) -> list[float]:
    """Those of some ascending values that are far enough apart to be read; the last always."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or value * factor <= kept[-1]:
            kept.append(value)
    return kept[::-1]


def _percent_axis(axes: Axes, title: str) -> None:
    """From just below the lowest interval to 100%: what matters often lies in the last few."""
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(ASKED)
    lowest = axes.dataLim.y0 if axes.has_data() else 0.0
    span = max(5.0, 100.0 - lowest)
    axes.set_ylim(max(0.0, 100.0 - span) - 0.05 * span, 100.0 + 0.05 * span)


def _legend(where: Axes, source: Axes) -> None:
    """The lines' names in a panel of their own."""
    handles, labels = source.get_legend_handles_labels()
    if handles:
        where.legend(handles, labels, loc="center", fontsize="medium", frameon=False)


# ---- capacity


def _capacity(document: Document) -> Figure:
    """Models beside each other: what they hold, and the bits that come to."""
    models = document["models"]
    figure_ = _new(12, 4.5)
    held, a_parameter, most = figure_.subplots(1, 3, width_ratios=(2, 1, 1))
    for number, one in enumerate(models):
        _both_protocols(held, one, f"C{number}", APART ** (2 * number))
    held.axhline(HOLDS, color="grey", linewidth=1, linestyle="--")
    _facts_axis(held, [point for one in models for point in one["points"]])
    _percent_axis(held, "New facts held, of all given")
    held.set_ylabel("%")
    held.legend(fontsize="small", loc="best")
    _bars(a_parameter, models, [one["stored_bits"] / one["touched"] for one in models], "{:.2g}")
    a_parameter.set_title("Bits stored a touched parameter", fontsize="medium")
    _bars(most, models, [one["largest"] for one in models], "{:.0f}")
    _more(most, models)
    most.set_title(f"Most facts with {HOLDS}% held", fontsize="medium")
    return figure_


def _both_protocols(axes: Axes, one: Document, colour: str, shift: float) -> None:
    """What a model holds, by free generation and teacher-forced."""
    label = f"{_name(one)}, {one['parameters'] / 1e6:.1f}M"
    forced = {"label": f"{label}, teacher-forced", "color": colour, **FORCED_STYLE}
    _curve(axes, one["points"], "tried", "generated", shift, label=label, color=colour)
    _curve(axes, one["points"], "tried", "forced", shift * APART, **forced)


def _bars(axes: Axes, models: Sequence[Document], values: Sequence[float], form: str) -> None:
    """A bar for each model, with its number."""
    places = range(len(models))
    drawn = axes.bar(places, values, color=[f"C{number}" for number in places], width=0.6)
    axes.bar_label(drawn, labels=[form.format(value) for value in values], padding=2)
    axes.set_xticks(list(places), [f"{one['parameters'] / 1e6:.1f}M" for one in models])
    axes.set_xlabel("parameters of the model")
    axes.margins(y=0.15)


def _more(axes: Axes, models: Sequence[Document]) -> None:
    """Where nothing was lost yet the number is a lower bound, and says so."""
    for label, one in zip(axes.texts, models, strict=True):
        if not one["fell"]:
            label.set_text(f"{label.get_text()} or more")


# ---- speed


def _speed(document: Document) -> Figure:
    """Seconds, ratios to the baseline, and where the time goes."""
    figure_ = _new(13, 4.5)
    seconds, ratios, shares = figure_.subplots(1, 3, width_ratios=(1, 1, 1.6))
    _seconds(seconds, document)
    _ratios(ratios, document)
    _shares(shares, _divided(document))
    return figure_


def _seconds(axes: Axes, document: Document) -> None:
    """Single facts as dots, their median as a line; ingest, which has no single facts, its mean."""
    ingested = document["ingested"]
    each = ingested["seconds"] / max(1, ingested["committed"])
    rows = [("one by one", [edit["seconds"] for edit in document["edits"]]), ("ingest", [each])]
    rows += [("baseline", [edit["seconds"] for edit in document["baseline"]])]
    for place, (_, values) in enumerate(rows):
        _spread(axes, place, values, f"{median(values):.1f} s" if values else "")
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(-0.5, len(rows) - 0.2)
    axes.set_title("Seconds a fact (line: median; ingest: mean)", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")


def _spread(axes: Axes, place: int, values: Sequence[float], label: str) -> None:
    """Dots, and a line with its number at their median."""
    if not values:
        return
    axes.plot([place] * len(values), values, color=f"C{place}", **DOTS)
    middle = median(values)
    axes.hlines(middle, place - 0.3, place + 0.3, color=f"C{place}", linewidth=2)
    axes.annotate(label, (place + 0.33, middle), fontsize="small", va="center")


def _ratios(axes: Axes, document: Document) -> None:
    """Above 1 the baseline takes longer."""
    ingest = document.get("ingest_ratio")
    whole = [ingest["value"]] if ingest else []
    rows = (("one by one,\npaired", document["ratios"]), ("ingest", whole))
    for place, (_, values) in enumerate(rows):
        _spread(axes, place, values, f"{median(values):.2f}" if values else "")
    for place, estimate in enumerate((document.get("ratio"), ingest)):
        if estimate:
            axes.vlines(place, estimate["low"], estimate["high"], color=f"C{place}", linewidth=1)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(-0.5, len(rows) - 0.3)
    axes.set_title("Baseline's seconds / kvedit's", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")


def _divided(document: Document) -> dict[str, dict[str, float]]:
    """Each kind of work, its tasks (train) profiled below it: the seconds of its parts."""
    edits = document["edits"]
    names = dict.fromkeys(name for edit in edits for name in edit["timings"])
    single = {n: mean(edit["timings"].get(n, 0.0) for edit in edits) for n in names}
    ingested = document["ingested"]
    group = document.get("group_task") or {"facts": 0, "parts": {}}
    rows = {
        "one by one": single,
        "- its training": document["task"]["parts"],
        "ingest": ingested["parts"],
        f"- of {group['facts']} facts": group["parts"],
    }
    return {name: parts for name, parts in rows.items() if sum(parts.values()) > 0}


def _shares(axes: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A bar to 100% for each kind of work; a part has one colour in all of them."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    lefts = dict.fromkeys(rows, 0.0)
    for number, name in enumerate(names):
        widths = [100 * parts.get(name, 0.0) / sum(parts.values()) for parts in rows.values()]
        drawn = axes.barh(
            list(rows), widths, left=list(lefts.values()), color=f"C{number}", label=name
        )
        percentages = [f"{width:.0f}" if width >= 4 else "" for width in widths]
        axes.bar_label(drawn, percentages, label_type="center", fontsize="small")
        lefts = {row: lefts[row] + width for row, width in zip(rows, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time")
    axes.set_title("Where the time goes", fontsize="medium")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _field(document: Document) -> Figure:
    """A line for each method."""
    from tests.bench.field import plot

    figure_ = _new(14, 8)
    plot.draw(document, figure_)
    return figure_


_DRAWN = {
    "field": _field,
    "strategies": _strategies,
    "levers": _strategies,
    "retain": _retain,
    "capacity": _capacity,
    "speed": _speed,
}
