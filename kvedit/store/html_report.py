"""One page about a store: what it holds, how well that is held, and how it came there.

Invariants:
- The page is one file that needs nothing beside it: no script, no font, no network.
- It is read from the store alone; nothing is measured, and the store is not changed.
- Every share stands with its protocol, its number and its interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from kvedit.events import Score
from kvedit.files import write_atomic
from kvedit.store.rows import EditRow, FactRow, ProbeCount
from kvedit.store.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).parents[1] / "data" / "report.html"
KINDS = {
    "recall": "Reliability (recall)",
    "paraphrase": "Generalization (paraphrases)",
    "locality": "Locality",
    "retention": "Retention of earlier facts",
    "portability": "Portability",
}
WEAKEST, LATEST = 30, 200
"""So many facts, and so many edits, stand in the tables that are open at first."""
HEALTH = ("recalled", "regressed", "stale", "unchecked")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found by the probes of one kind, in all checks and in the latest of them."""

    name: str
    protocol: str
    revision: int
    latest: Score
    all: Score


def write(store: Store, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, page(store).encode("utf-8"))


def page(store: Store) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    facts, edits, counts = store.facts(), store.history(), store.probe_counts()
    held = [row for row in facts if row.state == "committed"]
    refusals = store.refusals()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["share"] = share
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        status=store.status(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        states=Counter(row.state for row in facts),
        health=[(name, sum(row.health == name for row in held)) for name in HEALTH],
        recalled=Score(sum(row.health == "recalled" for row in held), len(held)),
        measured=latest(counts),
        weakest=weakest(held)[:WEAKEST],
        refused=[(row, why) for row in facts if (why := refusals.get(row.id))],
        edits=edits[::-1][:LATEST],
        earlier_edits=max(0, len(edits) - LATEST),
        facts=facts,
        seconds=seconds,
        pictures=[
            (title, Markup(drawn)) for title, drawn in _pictures(held, edits, counts) if drawn
        ],
    )


def share(score: Score) -> str:
    """A share with its interval and its number, for a table."""
    if score.rate is None:
        return "-"
    low, high = (100 * end for end in score.interval())
    return f"{100 * score.rate:.1f}% [{low:.1f}, {high:.1f}], {score.passed} of {score.n}"


def latest(counts: Sequence[ProbeCount]) -> list[Measured]:
    """What each kind of probe found, by protocol; the latest revision at which it was asked."""
    found = []
    for kind, name in KINDS.items():
        for protocol in sorted({row.protocol for row in counts if row.kind == kind}):
            own = [row for row in counts if (row.kind, row.protocol) == (kind, protocol)]
            last = max(own, key=lambda row: row.revision)
            whole = Score(sum(row.passed for row in own), sum(row.n for row in own), protocol)
            here = Score(last.passed, last.n, protocol)
            found.append(Measured(name, protocol, last.revision, here, whole))
    return found


def weakest(held: Sequence[FactRow]) -> list[FactRow]:
    """Committed facts, those first that need a look: regressed, unchecked, the smallest lead."""
    order = {name: place for place, name in enumerate(("regressed", "unchecked", "stale"))}
    return sorted(
        held,
        key=lambda row: (
            order.get(row.health, len(order)),
            row.margin if row.margin is not None else float("-inf"),
        ),
    )


def seconds(edit: EditRow) -> str:
    """How long an edit took."""
    spent = edit.report.get("seconds")
    return f"{spent:.1f}" if isinstance(spent, (int, float)) else "-"


# ---- pictures


def _pictures(
    held: Sequence[FactRow], edits: Sequence[EditRow], counts: Sequence[ProbeCount]
) -> list[tuple[str, str]]:
    checks = [row for row in counts if row.kind == "retention" and row.n]
    margins = [row.margin for row in held if row.margin is not None]
    return [
        ("Facts in the model, by revision", _grown(held, edits)),
        ("Earlier facts still recalled, at each check", _kept(checks)),
        ("Smallest lead of each fact's answer, logits", _token_margins(margins)),
        ("Distance of the edited matrices from the base model's", _distances(edits)),
    ]


def _grown(held: Sequence[FactRow], edits: Sequence[EditRow]) -> str:
    """How many of the facts that are in the model now each revision brought."""
    brought = Counter(row.revision for row in held if row.revision is not None)
    revisions = sorted(edit.revision for edit in edits if edit.revision is not None)
    if len(revisions) < 2:
        return ""
    heights = [sum(brought[r] for r in revisions[: i + 1]) for i in range(len(revisions))]

    def draw(axes: Axes) -> None:
        axes.step(revisions, heights, where="post")
        axes.set_xlabel("revision")

    return _svg(draw)


def _kept(checks: Sequence[ProbeCount]) -> str:
    if not checks:
        return ""
    scores = [Score(row.passed, row.n) for row in checks]
    rates = [100 * (score.rate or 0.0) for score in scores]
    ends = [score.interval() for score in scores]
    below = [rate - 100 * low for rate, (low, _) in zip(rates, ends, strict=True)]
    above = [100 * high - rate for rate, (_, high) in zip(rates, ends, strict=True)]

    def draw(axes: Axes) -> None:
        axes.errorbar(
            [row.revision for row in checks], rates, yerr=[below, above], fmt="o", markersize=3,
            linewidth=0.8,
        )  # fmt: skip
        axes.set_xlabel("revision")
        axes.set_ylabel("%, Wilson 95%")

    return _svg(draw)


def _token_margins(margins: Sequence[float]) -> str:
    if len(margins) < 2:
        return ""

    def draw(axes: Axes) -> None:
        axes.hist(margins, bins=min(40, len(margins)))
        axes.axvline(0, linestyle=":", linewidth=1)
        axes.set_ylabel("facts")

    return _svg(draw)


def _distances(edits: Sequence[EditRow]) -> str:
    """How far the weights have moved, by revision; that they grow is how editors collapse."""
    found = [(edit.revision, _shares(edit)) for edit in edits]
    told = sorted((at, shares) for at, shares in found if at is not None and shares)
    if len(told) < 2:
        return ""

    def draw(axes: Axes) -> None:
        revisions = [revision for revision, _ in told]
        axes.plot(revisions, [max(shares) for _, shares in told], label="the farthest")
        axes.plot(revisions, [median(shares) for _, shares in told], label="median")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("revision")
        axes.set_ylabel("% of a matrix's norm")
        axes.legend(fontsize="small")

    return _svg(draw)


def _shares(edit: EditRow) -> list[float]:
    """How far each matrix was from the base model's after an edit, %; an older one does not say."""
    moved = edit.report.get("relative_norms")
    return [100 * share for share in moved.values()] if isinstance(moved, dict) else []


def _svg(draw: Any) -> str:
    """A small picture as an element that HTML takes in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    draw(figure.subplots())
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]
