"""Intervals, exact match and fluency."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.metrics import (
    bootstrap,
    exact,
    harmonic_mean,
    ngram_entropy,
    normalised,
    normalised_exact,
    rouge_l_recall,
    wilson,
    word_f1,
    words,
)


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


def test_normalised_answers_differ_in_words_alone() -> None:
    assert normalised("  The  Ｒｏｍｅ, a City!\n") == "rome city"
    assert normalised("「北京」。") == "北京"
    assert normalised_exact("the Rome.", "Rome") and not normalised_exact("Romes", "Rome")
    assert normalised_exact("!", "!") and not normalised_exact("?", "!"), "nothing is left of both"


@given(st.text())
def test_normalising_twice_changes_no_more(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_the_harmonic_mean_is_that_of_the_papers() -> None:
    assert harmonic_mean([1.0, 0.5, 0.5]) == pytest.approx(0.6)
    assert harmonic_mean([]) == harmonic_mean([1.0, 0.0]) == 0.0


@given(st.lists(st.floats(0.01, 1), min_size=1))
def test_the_harmonic_mean_lies_between_the_least_and_the_mean(shares: list[float]) -> None:
    value = harmonic_mean(shares)
    assert min(shares) - 1e-9 <= value <= sum(shares) / len(shares) + 1e-9


def test_rouge_l_recall_of_known_texts() -> None:
    assert rouge_l_recall("police kill the gunman", "police killed the gunman") == 22 / 24
    assert rouge_l_recall("北海京城", "北京城") == 1.0 and rouge_l_recall("x", "") == 1.0


@settings(deadline=None)  # the library loads slowly
@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_rouge_l_recall_is_the_librarys(answer: str, expected: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return list(text)

    score = scorer.RougeScorer(["rougeL"], tokenizer=Characters()).score(expected, answer)
    assert rouge_l_recall(answer, expected) == pytest.approx(score["rougeL"].recall)


def test_word_f1_of_known_texts() -> None:
    assert word_f1("It is the copper bell.", "a Copper bell") == pytest.approx(2 * 2 / (4 + 2))
    assert word_f1("bell bell", "bell") == pytest.approx(2 / 3)
    assert word_f1("銅鐘", "銅") == pytest.approx(2 / 3)
    assert word_f1("glass", "copper") == word_f1("the", "copper") == word_f1("glass", "") == 0
    assert word_f1("The.", "") == 1


@given(st.text(max_size=20), st.text(max_size=20))
def test_word_f1_is_symmetric_and_a_share(answer: str, expected: str) -> None:
    assert 0 <= word_f1(answer, expected) == word_f1(expected, answer) <= 1
    assert word_f1(answer, answer) == 1


def test_words_of_both_scripts() -> None:
    assert words("It's 北京, the CITY_2") == ["it", "s", "北", "京", "the", "city", "2"]
