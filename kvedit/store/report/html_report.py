"""An HTML report about a store: its facts, their scores and health, and its edits.

Invariants:
- The report is a single file without scripts, fonts or network access.
- It is made from the store alone; nothing is measured, and the store is not changed.
- Every share is given with its protocol, its number of probes and its interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kvedit.events import Score
from kvedit.files import write_atomic
from kvedit.store.rows import EditRow, FactRow, ProbeCount
from kvedit.store.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).parents[2] / "data" / "report.html"
KINDS = {
    "recall": "Recites: reliability (recall)",
    "paraphrase": "Generalization (paraphrases)",
    "locality": "Locality",
    "retention": "Retention of earlier facts",
    "portability": "Answers: portability (held-out questions)",
}
WEAKEST, LATEST = 30, 200
"""The most facts and edits in the tables of the weakest facts and of the latest edits."""
HEALTH = ("recalled", "regressed", "stale", "unchecked")


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores of one kind of probe under one protocol: at its latest revision, and of all."""

    name: str
    protocol: str
    revision: int
    latest: Score
    all: Score


@dataclass(frozen=True, slots=True)
class Gap:
    """The perturbation gap of an edit's texts, and the revision that it made."""

    value: float
    revision: int


def write(store: Store, path: Path) -> None:
    """Write the page; the file is complete or not there.  Raises DiskFullError or KveditError."""
    write_atomic(path, page(store).encode("utf-8"))


def page(store: Store) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    facts, edits, counts = store.facts(), store.history(), store.probe_counts()
    committed = [row for row in facts if row.state == "committed"]
    refusals = store.refusals()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["share"] = share
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        status=store.status(),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        states=Counter(row.state for row in facts),
        health=[(name, sum(row.health == name for row in committed)) for name in HEALTH],
        recalled=Score(sum(row.health == "recalled" for row in committed), len(committed)),
        measured=latest(counts),
        gap=latest_gap(edits),
        weakest=weakest(committed)[:WEAKEST],
        rejected=[(row, reasons) for row in facts if (reasons := refusals.get(row.id))],
        edits=edits[:LATEST],
        earlier_edits=max(0, len(edits) - LATEST),
        facts=facts,
        seconds=seconds,
        charts=[(title, Markup(svg)) for title, svg in _charts(committed, edits, counts) if svg],
    )


def share(score: Score) -> str:
    """A share with its interval and its number, for a table."""
    if score.rate is None:
        return "-"
    low, high = (100 * end for end in score.interval())
    return f"{100 * score.rate:.1f}% [{low:.1f}, {high:.1f}], {score.passed} of {score.n}"


def latest(counts: Sequence[ProbeCount]) -> list[Measured]:
    """The scores of each kind of probe, by protocol, in the order of ``KINDS``."""
    scores = []
    for kind, name in KINDS.items():
        for protocol in sorted({row.protocol for row in counts if row.kind == kind}):
            rows = [row for row in counts if (row.kind, row.protocol) == (kind, protocol)]
            last = max(rows, key=lambda row: row.revision)
            total = Score(sum(row.passed for row in rows), sum(row.n for row in rows), protocol)
            at_last = Score(last.passed, last.n, protocol)
            scores.append(Measured(name, protocol, last.revision, at_last, total))
    return scores


def latest_gap(edits: Sequence[EditRow]) -> Gap | None:
    """That of the newest revision whose edit measured one; the edits come newest first."""
    for edit in edits:
        value = edit.report.get("perturbation_gap")
        if isinstance(value, float) and edit.revision is not None:
            return Gap(value, edit.revision)
    return None


def weakest(committed: Sequence[FactRow]) -> list[FactRow]:
    """Committed facts, weakest first: regressed, unchecked, stale, then by logit margin."""
    order = {name: place for place, name in enumerate(("regressed", "unchecked", "stale"))}

    def rank(row: FactRow) -> tuple[int, float]:
        margin = float("-inf") if row.margin is None else row.margin
        return order.get(row.health, len(order)), margin

    return sorted(committed, key=rank)


def seconds(edit: EditRow) -> str:
    """How long an edit took, in seconds, for a table."""
    spent = edit.report.get("seconds")
    return f"{spent:.1f}" if isinstance(spent, (int, float)) else "-"


def _charts(
    committed: Sequence[FactRow], edits: Sequence[EditRow], counts: Sequence[ProbeCount]
) -> list[tuple[str, str]]:
    checks = [row for row in counts if row.kind == "retention" and row.n]
    margins = [row.margin for row in committed if row.margin is not None]
    return [
        ("Facts in the model, by revision", _growth(committed, edits)),
        ("Earlier facts still recalled, at each check", _retention(checks)),
        ("Smallest logit margin in each fact's answer", _margins(margins)),
        ("Norm of the accumulated deltas, relative to the base matrices", _norms(edits)),
    ]


def _growth(committed: Sequence[FactRow], edits: Sequence[EditRow]) -> str:
    """The facts of today that were in the model at each revision."""
    added = Counter(row.revision for row in committed if row.revision is not None)
    revisions = sorted(edit.revision for edit in edits if edit.revision is not None)
    if len(revisions) < 2:
        return ""
    heights = list(accumulate(added[revision] for revision in revisions))
    figure, axes = _chart()
    axes.step(revisions, heights, where="post")
    axes.set(xlabel="revision")
    return _svg(figure)


def _retention(checks: Sequence[ProbeCount]) -> str:
    if not checks:
        return ""
    scores = [Score(row.passed, row.n) for row in checks]
    rates = [100 * (score.rate or 0.0) for score in scores]
    ends = [score.interval() for score in scores]
    below = [rate - 100 * low for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [100 * high - rate for rate, (_, high) in zip(rates, ends, strict=True)]
    revisions = [row.revision for row in checks]
    figure, axes = _chart()
    axes.errorbar(revisions, rates, yerr=[below, above], fmt="o", markersize=3, linewidth=0.8)
    axes.set(xlabel="revision", ylabel="%, Wilson 95%")
    return _svg(figure)


def _margins(margins: Sequence[float]) -> str:
    if len(margins) < 2:
        return ""
    figure, axes = _chart()
    axes.hist(margins, bins=min(40, len(margins)))
    axes.axvline(0, linestyle=":", linewidth=1)
    axes.set(xlabel="logits", ylabel="facts")
    return _svg(figure)


def _norms(edits: Sequence[EditRow]) -> str:
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
    axes.set(xlabel="revision", ylabel="% of a matrix's norm")
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


def _svg(figure: Figure) -> str:
    """A figure as an ``svg`` element."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]
