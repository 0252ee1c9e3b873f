"""Which earlier facts to check, and whether an edit may be committed.

Invariants:
- Nothing here touches the model or the store: facts and outcomes come in, choices go out.
- The gate gives reasons, in words, for every no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvedit.config import GateConfig
from kvedit.events import Score
from kvedit.facts.keys import in_words, similar
from kvedit.store.rows import FactRow


def at_risk(rows: Sequence[FactRow], keys: Sequence[str], count: int) -> list[FactRow]:
    """The earlier facts most likely to be lost: nearest keys, lowest margins, longest unchecked.

    Regressed facts come first; the three orders then take turns, so that none crowds out another.
    ``keys`` are those being edited, which are not among the answer.
    """
    others = [row for row in rows if row.fact.key not in keys]
    by_key = {row.fact.key: row for row in others}
    near = [by_key[hit.key] for key in keys for hit in similar(key, by_key, limit=count)]
    weak = sorted(others, key=lambda row: (row.margin is not None, row.margin or 0.0, row.id))
    old = sorted(others, key=lambda row: (row.last_checked_revision or -1, row.id))
    chosen = {row.id: row for row in others if row.health == "regressed"}
    for turn in range(len(others)):
        for order in (near, weak, old):
            if turn < len(order) and len(chosen) < count:
                chosen.setdefault(order[turn].id, order[turn])
    return list(chosen.values())[:count]


@dataclass(frozen=True, slots=True)
class Checks:
    """What was found on the merged, cast weights.

    ``lost`` are the earlier facts that were recalled before and are not now; ``locality`` the
    locality probes that still have their answers, of those that had them before the edit.
    """

    recall: Score
    paraphrase: Score
    locality: Score
    retention: Score
    lost: tuple[str, ...]


def refusals(checks: Checks, gate: GateConfig, *, surely: bool = False) -> tuple[str, ...]:
    """Why the edit must not be committed; empty when it may.

    ``surely``: locality probes, which are few, refuse it only for more than chance explains.
    """
    reasons = [
        _below("recall probes", checks.recall, gate.min_recall),
        _below("never-trained phrasings", checks.paraphrase, gate.min_paraphrase),
        _below("locality probes", checks.locality, gate.min_locality, surely=surely),
    ]
    if misses(checks.retention, gate.min_retention):
        reasons.append(
            f"earlier facts lost: {in_words(checks.lost)} ({checks.retention.passed} of"
            f" {checks.retention.n} kept, {gate.min_retention:.0%} needed)"
        )
    return tuple(reason for reason in reasons if reason)


def _below(what: str, score: Score, wanted: float, *, surely: bool = False) -> str:
    if not misses(score, wanted, surely=surely):
        return ""
    return f"{what}: {score.passed} of {score.n} passed, {wanted:.0%} needed"


def misses(score: Score, wanted: float, *, surely: bool = False) -> bool:
    """Whether a score is below the share that is wanted, ``surely`` with its whole 95% interval; an
    empty one never is.
    """
    if score.rate is None:
        return False
    return (score.interval()[1] if surely else score.rate) < wanted
