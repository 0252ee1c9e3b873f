"""Intervals, exact match and fluency."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.metrics import bootstrap, exact, ngram_entropy, wilson


def test_wilson_gives_the_published_interval() -> None:
    low, high = wilson(15, 20)
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)


def test_wilson_knows_nothing_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("passed", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(passed: int, n: int) -> None:
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(passed, n)


@settings(max_examples=50)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_narrows_with_n(counts: tuple[int, int]) -> None:
    passed, n = counts
    low, high = wilson(passed, n)
    assert 0 <= low <= passed / n <= high <= 1
    wide_low, wide_high = wilson(passed * 4, n * 4)
    assert wide_high - wide_low < high - low


def test_bootstrap_holds_the_statistic_and_depends_on_the_seed_alone() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]

    def draw(rng: random.Random) -> float:
        return sorted(rng.choices(values, k=5))[2]

    low, high = bootstrap(draw, seed=1)
    assert 1.0 <= low < 3.0 < high <= 100.0
    assert bootstrap(draw, seed=1) == (low, high)
    assert bootstrap(lambda rng: 7.0) == (7.0, 7.0)


def test_exact_ignores_white_space_around_only() -> None:
    assert exact(" a b\n", "a b")
    assert not exact("a  b", "a b")
    assert not exact("A b", "a b")


def test_entropy_of_known_texts() -> None:
    # Bigrams ab, bc: 1 bit x 2/3; one trigram: 0 bits; the mean of the two.
    assert ngram_entropy("a b c") == pytest.approx(1 / 3)
    assert ngram_entropy("") == ngram_entropy("one") == 0.0


def test_repetition_lowers_entropy_in_both_scripts() -> None:
    assert ngram_entropy("the cat sat on a mat today") > ngram_entropy("the cat " * 4)
    assert ngram_entropy("床前明月光疑是地上霜") > ngram_entropy("明月明月明月明月明月")
