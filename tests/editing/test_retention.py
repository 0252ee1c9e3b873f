"""Which earlier facts an edit or a check asks again."""

from __future__ import annotations

import pytest

from kvedit.editing.retention import at_risk
from kvedit.facts.fact import Fact
from kvedit.store.rows import FactRow


def row(
    number: int,
    key: str,
    *,
    margin: float | None = 5.0,
    checked: int | None = 9,
    health: str = "recalled",
) -> FactRow:
    return FactRow(
        id=number,
        fact=Fact.create(key, "text", lang="en"),
        state="committed",
        created_at="",
        updated_at="",
        health=health,
        margin=margin,
        last_checked_revision=checked,
    )


ROWS = [
    row(1, "harbour bell", checked=1),
    row(2, "tide lanterns"),
    row(3, "salt harp", margin=0.2),
    row(4, "moss clock", margin=None, checked=None, health="unchecked"),
    row(5, "night ferry", health="regressed"),
    row(6, "amber kettle"),
    row(7, "wind ledger"),
]


def keys(rows: list[FactRow]) -> list[str]:
    return [r.fact.key for r in rows]


def test_regressed_facts_first_then_near_weak_and_old_ones_in_turn() -> None:
    chosen = keys(at_risk(ROWS, ["tide lantern"], 5))
    assert chosen[0] == "night ferry"
    assert chosen[1] == "tide lanterns"
    assert set(chosen[2:]) == {"moss clock", "harbour bell", "salt harp"}


def test_no_order_crowds_out_another() -> None:
    near = [row(i, f"tide lantern {'abcdefgh'[i - 10]}") for i in range(10, 18)]
    chosen = keys(at_risk([*ROWS, *near], ["tide lantern"], 6))
    assert any(key.startswith("tide lantern") for key in chosen)
    assert {"night ferry", "moss clock"} <= set(chosen)
    assert sum(key.startswith("tide lantern ") for key in chosen) < 5


@pytest.mark.parametrize("count", [0, 1, 3, 7, 50])
def test_as_many_as_asked_and_none_twice(count: int) -> None:
    chosen = at_risk(ROWS, ["nobody"], count)
    assert len(chosen) == min(count, len(ROWS)) == len({r.id for r in chosen})


def test_what_is_being_edited_is_not_among_them() -> None:
    assert "night ferry" not in keys(at_risk(ROWS, ["night ferry", "x"], 50))
    assert at_risk([], ["x"], 5) == []
