"""What the gate says."""

from __future__ import annotations

import pytest

from kvedit.config import GateConfig, TrainingConfig
from kvedit.editing.gate import Checks, refusals, to_train_again
from kvedit.events import Score


def checks(**changes: object) -> Checks:
    sound: dict[str, object] = {
        "recall": Score(10, 10),
        "paraphrase": Score(8, 8),
        "locality": Score(20, 20),
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
        ({"paraphrase": Score(5, 8)}, ("unseen phrasings", "5 of 8", "75%")),
        ({"locality": Score(18, 20)}, ("locality", "18 of 20", "95%")),
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
    assert bool(refusals(found, GATE, significant=True)) == refused
    assert bool(refusals(found, GATE)) == (kept < 31)
    assert refusals(checks(locality=Score(0, 0)), GATE, significant=True) == ()


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


def test_what_was_missed_is_trained_by_a_larger_margin_up_to_the_target() -> None:
    config = TrainingConfig(min_margin=0.25, target_margin=2.0)
    missed = checks(paraphrase=Score(5, 8))
    margins = []
    for _ in range(3):
        config = to_train_again(config, missed, GATE)
        margins.append(config.min_margin)
    assert margins == [1.0, 2.0, 2.0]
    strict = TrainingConfig(min_margin=3.0, target_margin=2.0)
    assert to_train_again(strict, missed, GATE).min_margin == 3.0
    lost = to_train_again(strict, checks(lost=("a",), retention=Score(5, 6)), GATE)
    assert lost.min_margin == 3.0 and lost.penalty_weight == strict.penalty_weight
    harmed = to_train_again(strict, checks(locality=Score(18, 20)), GATE)
    assert harmed.penalty_weight > strict.penalty_weight
