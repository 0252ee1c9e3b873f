"""Which earlier facts an edit or a check asks again: those most likely to be lost."""

from __future__ import annotations

from collections.abc import Sequence

from kvedit.facts.keys import similar
from kvedit.store.rows import FactRow


def at_risk(rows: Sequence[FactRow], keys: Sequence[str], count: int) -> list[FactRow]:
    """The earlier facts most likely to be lost: nearest keys, lowest margins, longest unchecked.

    Regressed facts come first; the three orders then take turns, so that none crowds out another.
    ``keys`` are those being edited, which are not among the answer.
    """
    others = [row for row in rows if row.fact.key not in keys]
    by_key = {row.fact.key: row for row in others}
    nearest = [by_key[hit.key] for key in keys for hit in similar(key, by_key, limit=count)]
    weakest = sorted(others, key=lambda row: (row.margin is not None, row.margin or 0.0, row.id))
    oldest = sorted(others, key=lambda row: (row.last_checked_revision or -1, row.id))
    chosen = {row.id: row for row in others if row.health == "regressed"}
    for turn in range(len(others)):
        for order in (nearest, weakest, oldest):
            if turn < len(order) and len(chosen) < count:
                chosen.setdefault(order[turn].id, order[turn])
    return list(chosen.values())[:count]
