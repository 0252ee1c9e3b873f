"""Which earlier facts are checked, and what the gate says."""

from __future__ import annotations

import pytest

from kvedit.config import GateConfig
from kvedit.editing.gate import Checks, at_risk, refusals
from kvedit.events import Score
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


def checks(**changes: object) -> Checks:
    sound: dict[str, object] = {
        "recall": Score(10, 10),
        "paraphrase": Score(8, 8),
        "unmoved": Score(20, 20),
        "retention": Score(6, 6),
        "lost": (),
    }
    return Checks(**(sound | changes))  # type: ignore[arg-type]


GATE = GateConfig(min_recall=1.0, min_paraphrase=0.75, min_locality=0.95, min_retention=1.0)


def test_all_sound_no_reason() -> None:
    assert refusals(checks(), GATE) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recall": Score(9, 10)}, ("recall", "9 of 10", "100%")),
        ({"paraphrase": Score(5, 8)}, ("never-trained", "5 of 8", "75%")),
        ({"unmoved": Score(18, 20)}, ("locality", "18 of 20", "95%")),
        ({"retention": Score(4, 6), "lost": ("a", "b")}, ("lost: a, b", "4 of 6", "100%")),
    ],
)
def test_each_probe_can_refuse_and_says_why(
    change: dict[str, object], words: tuple[str, ...]
) -> None:
    reasons = refusals(checks(**change), GATE)
    assert len(reasons) == 1
    assert all(word in reasons[0] for word in words)


def test_at_the_threshold_it_passes() -> None:
    assert refusals(checks(paraphrase=Score(6, 8), locality=Score(19, 20)), GATE) == ()


def test_nothing_probed_is_nothing_missed() -> None:
    assert refusals(checks(locality=Score(0, 0), retention=Score(0, 0)), GATE) == ()


@pytest.mark.parametrize(("kept", "refused"), [(32, False), (30, False), (28, False), (27, True)])
def test_a_large_lesson_is_not_refused_by_chance(kept: int, refused: bool) -> None:
    """Of 32 probes 28 are within the interval of 95%, 27 are not (Wilson)."""
    found = checks(locality=Score(kept, 32))
    assert bool(refusals(found, GATE, surely=True)) == refused
    assert bool(refusals(found, GATE)) == (kept < 31)
    assert refusals(checks(locality=Score(0, 0)), GATE, surely=True) == ()


def test_every_reason_is_given_and_long_lists_are_cut() -> None:
    bad = checks(
        recall=Score(0, 10),
        paraphrase=Score(0, 8),
        locality=Score(0, 20),
        retention=Score(0, 7),
        lost=tuple("abcdefg"),
    )
    reasons = refusals(bad, GATE)
    assert len(reasons) == 4
    assert "earlier facts lost: a, b, c, d, e and 2 more (0 of 7 kept" in reasons[3]
