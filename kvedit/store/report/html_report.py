"""An HTML report about a store: its facts, their scores and health, and its edits.

Invariants:
- The report is a single file without scripts, fonts or network access.
- It is made from the store alone; nothing is measured, and the store is not changed.
- Every share is given with its protocol, its number of probes and its interval.
- No path of the machine stands in it, and it stays small: what is cut is said to be cut, and of
  edits and facts the latest are shown.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from kvedit.events import Score
from kvedit.files import write_atomic
from kvedit.store import integrity
from kvedit.store.report import charts
from kvedit.store.report.scores import FORCED, GENERATED, Check, checks, pooled
from kvedit.store.report.texts import clipped, fitting, folder_name, model_name, without_paths
from kvedit.store.rows import EditRow, FactRow, ProbeCount
from kvedit.store.store import Store

TEMPLATE = Path(__file__).parents[2] / "data" / "report.html"
KINDS = {
    "recall": "Recites: reliability (recall)",
    "paraphrase": "Generalization (paraphrases)",
    "locality": "Locality",
    "retention": "Retention of earlier facts",
    "portability": "Answers: portability (held-out questions)",
}
WEAKEST, LATEST, REJECTED, FACTS = 30, 200, 200, 3000
"""The most rows in the tables of the weakest facts, the edits, the rejected and all facts."""
FACTS_BYTES = 3_000_000  # of the texts in the table of all facts
DESCRIPTION, REASONS, KEY = 200, 500, 60
"""The most characters of a description, of an edit's reasons, and of a key in a list of keys."""
HEALTH = ("recalled", "regressed", "stale", "unchecked")
RECALLED = ("recalled", "stale")  # at the last check, which may be long ago


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores of one kind of probe under one protocol: at its latest revision, and of all.

    ``latest_ties`` and ``all_ties`` are how many of the probes were numerical ties.
    """

    name: str
    protocol: str
    revision: int
    latest: Score
    all: Score
    latest_ties: int = 0
    all_ties: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """The perturbation gap of an edit's texts, and the revision that it made."""

    value: float
    revision: int


def write(store: Store, path: Path) -> None:
    """Write the page; the file is complete or not there.  Raises DiskFullError or KveditError."""
    write_atomic(path, page(store).encode("utf-8", "replace"))


def page(store: Store) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"share": share, "ties": ties, "number": number, "clipped": clipped}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    facts, edits, counts = store.facts(), store.history(), store.probe_counts()
    committed = [row for row in facts if row.state == "committed"]
    status = integrity.status(store)
    return template.render(
        status=status,
        name=folder_name(str(store.path)),
        model=model_name(str(status["model_name"] or "model unknown")),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        states=Counter(row.state for row in facts),
        health=[(name, sum(row.health == name for row in committed)) for name in HEALTH],
        recalled=Score(sum(row.health in RECALLED for row in committed), len(committed)),
        measured=latest(counts),
        has_ties=any(row.ties for row in counts),
        gap=latest_gap(edits),
        charts=_charts(store, committed, edits, counts),
        seconds=seconds,
        **_tables(store, facts, committed, edits),
    )


def _tables(
    store: Store, facts: Sequence[FactRow], committed: Sequence[FactRow], edits: Sequence[EditRow]
) -> dict[str, Any]:
    """The rows of the tables, and how many there are of which only some are shown."""
    refusals, shortened = store.refusals(), _shortened(store)
    rejected = [(row, shortened(refusals[row.id])) for row in facts[::-1] if refusals.get(row.id)]
    return {
        "weakest": weakest(committed)[:WEAKEST],
        "committed": len(committed),
        "rejected": rejected[:REJECTED],
        "all_rejected": len(rejected),
        "edits": [(edit, about(edit), shortened(edit.reasons)) for edit in edits[:LATEST]],
        "earlier_edits": max(0, len(edits) - LATEST),
        "facts": (shown := latest_facts(facts)),
        "has_cut": any(len(row.fact.description) > DESCRIPTION for row in shown),
        "all_facts": len(facts),
        "description": DESCRIPTION,
    }


def _shortened(store: Store) -> Callable[[Sequence[str]], str]:
    """Reasons for a table: without paths, and not longer than can be read."""
    known = [os.path.abspath(store.path), store.meta("model_path") or ""]
    beginning = 40 * REASONS  # enough of them, were most of it paths
    return lambda reasons: clipped(
        without_paths(clipped("; ".join(reasons), beginning), known), REASONS
    )


def about(edit: EditRow) -> str:
    """What an edit was about: its first keys; of an erasure how many facts."""
    if edit.kind == "erase" or not edit.keys:
        return str(edit.report.get("key") or "")
    more = f" and {len(edit.keys) - 6} more" if len(edit.keys) > 6 else ""
    return ", ".join(clipped(key, KEY) for key in edit.keys[:6]) + more


def latest_facts(facts: Sequence[FactRow]) -> list[FactRow]:
    """The latest facts that a page has room for, in the order they came."""

    def size(row: FactRow) -> int:
        texts = (row.fact.key, clipped(row.fact.description, DESCRIPTION))
        return sum(len(escape(text).encode("utf-8", "replace")) for text in texts)

    newest = facts[: -FACTS - 1 : -1]
    return list(fitting(((size(row), row) for row in newest), FACTS_BYTES))[::-1]


def number(count: int) -> str:
    """A count with its thousands apart."""
    return f"{count:,}"


def share(score: Score) -> str:
    """A share with its interval and its number, for a table."""
    if score.rate is None:
        return "-"
    low, high = (100 * end for end in score.interval())
    return f"{100 * score.rate:.1f}% [{low:.1f}, {high:.1f}], {score.passed} of {score.n}"


def ties(count: int, n: int) -> str:
    """How many of ``n`` probes were numerical ties, for a table; empty for none."""
    if count == n:
        return "; numerical ties only" if n else ""
    return f"; {count} numerical tie{'s' * (count > 1)}" if count else ""


def latest(counts: Sequence[ProbeCount]) -> list[Measured]:
    """The scores of each kind of probe, by protocol, in the order of ``KINDS``."""
    return [
        _measured(name, protocol, of_protocol)
        for kind, name in KINDS.items()
        for protocol, of_protocol in checks(counts, kind).items()
        if of_protocol
    ]


def _measured(name: str, protocol: str, every: Sequence[Check]) -> Measured:
    last, total = every[-1], pooled(every)
    protocol = GENERATED if total.ties == total.n else protocol  # nothing else is left of it
    at_last, of_all = (Score(one.passed, one.n, protocol) for one in (last, total))
    return Measured(name, protocol, last.revision, at_last, of_all, last.ties, total.ties)


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
    store: Store,
    committed: Sequence[FactRow],
    edits: Sequence[EditRow],
    counts: Sequence[ProbeCount],
) -> list[tuple[str, str]]:
    """Titles and SVG of the charts that there is something to draw for."""
    from markupsafe import Markup

    erased = any(edit.kind == "erase" and edit.state == "committed" for edit in edits)
    left_out = " (erased facts are counted nowhere)" if erased else ""
    retention = checks(counts, "retention")
    retention[FORCED + ", numerical ties generated"] = retention.pop(FORCED)
    every = [
        (f"Facts in the model, by revision{left_out}", charts.growth(store.held_counts())),
        ("Earlier facts still recalled, at each check", charts.retention(retention)),
        (
            "Smallest logit margin in each fact's answer",
            charts.margins([row.margin for row in committed if row.margin is not None]),
        ),
        ("Norm of the accumulated deltas, relative to the base matrices", charts.norms(edits)),
    ]
    return [(title, Markup(svg)) for title, svg in every if svg]
