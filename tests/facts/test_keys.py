"""Which keys are the same, which are close, and which only look so."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvedit.facts.keys import (
    contains_answer,
    did_you_mean,
    exact_form,
    in_words,
    naming,
    normalise,
    similar,
)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
@example("1.!5")
@example("薴")  # one conversion gives 苧, a second 苎
@example("ßẞﬁΐ乾坤著作裏")
def test_normalise_is_idempotent(key: str) -> None:
    assert normalise(normalise(key)) == normalise(key)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_a_form_with_signs_is_idempotent_and_tells_more_apart(key: str) -> None:
    form = exact_form(key)
    assert exact_form(form) == form
    assert exact_form(key.upper().lower()) == exact_form(exact_form(key.upper().lower()))
    assert normalise(form) == normalise(key)


@pytest.mark.parametrize("pair", ["A-1 A1", ".NET NET", "后 後", "C C++", "U.S. US"])
def test_signs_and_scripts_count_in_the_exact_form(pair: str) -> None:
    one, other = pair.split()
    assert exact_form(one) != exact_form(other)
    assert exact_form(f" {one.upper()}\u200b ") == exact_form(one.lower())


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=10))
def test_a_visible_key_never_becomes_empty(key: str) -> None:
    assert normalise(key)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(categories=["L", "N"]), max_size=20))
def test_width_and_composition_do_not_matter(key: str) -> None:
    assert normalise(unicodedata.normalize("NFD", key)) == normalise(key)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("夢中情爐", "梦中情炉"),
        ("Ｔｉｍ Berners-Lee", "tim berners lee"),
        ("《夢中情爐》", "夢中情爐"),
        ("1,000", "1000"),
        ("STRASSE", "straße"),
        ("a\u200bb", "ab"),
    ],
)
def test_the_same_key_written_in_two_ways(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("C", "C++"), ("C", "C#"), ("3.11", "311"), ("?!", "!!"), ("résumé", "resume")],
)
def test_signs_that_distinguish_names_stay(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_only_the_same_key_scores_100() -> None:
    hits = similar("Lee, Tim Berners", ["Tim Berners-Lee", "lee tim berners", "Ada Lovelace"])
    assert [(hit.key, hit.score) for hit in hits] == [
        ("lee tim berners", 100.0),
        ("Tim Berners-Lee", 99.0),
    ]


def test_similar_names_come_best_first() -> None:
    hits = similar("Isaac Newton", ["Sir Isaac Newton", "Isaac Newtom", "Albert Einstein"])
    assert [hit.key for hit in hits] == ["Isaac Newtom", "Sir Isaac Newton"]
    assert all(85 <= hit.score < 100 for hit in hits)


@pytest.mark.parametrize("threshold", [85.0, 50.0])
def test_short_names_that_share_all_but_one_character_are_not_close(threshold: float) -> None:
    names = ["李賀", "杜白", "孟浩燃", "王浩然", "Car"]
    assert similar("李白", names, threshold=threshold) == []
    assert similar("孟浩然", names, threshold=threshold) == []
    assert similar("Cat", names, threshold=threshold) == []


def test_short_names_are_close_when_one_contains_the_other_or_they_are_equal() -> None:
    hits = similar("蘇東坡", ["苏东坡", "蘇東坡集"])
    assert [hit.key for hit in hits] == ["苏东坡", "蘇東坡集"]


def test_limit_and_repetitions() -> None:
    names = [f"knowledge {n}" for n in range(9)]
    assert len(similar("knowledge", names, threshold=60, limit=4)) == 4
    assert len(similar("same", ["same", "same"])) == 1


def test_did_you_mean_is_looser_and_has_no_short_rule() -> None:
    assert did_you_mean("孟浩燃", ["王維", "孟浩然"]) == ["孟浩然"]
    assert did_you_mean("learning_rat", ["seed", "learning_rate"]) == ["learning_rate"]
    assert did_you_mean("zzz", ["王維", "seed"]) == []
    assert did_you_mean("", ["seed"]) == []


@pytest.mark.parametrize(
    ("key", "text", "names"),
    [
        ("Art", "What is art?", True),
        ("Art", "What is Artemis, the start?", False),
        ("C++", "Is C++ a language?", True),
        ("C++", "Is C a language?", False),
        ("李白", "請介紹李白。", True),
        ("鳳凰", "凤凰是什麼？", True),
        ("李白", "請介紹杜甫。", False),
        ("Rome (city)", "The mayor of Rome (city) is", True),
    ],
)
def test_a_text_names_a_key_as_words_of_its_own(key: str, text: str, names: bool) -> None:
    assert naming([key, "Ada Lovelace"])(text) is names
    assert not naming([])(text)


@pytest.mark.parametrize(
    ("answer", "text", "contained"),
    [
        ("four", "It has Four divisions.", True),
        ("four", "It has fourteen divisions.", False),
        ("The Higher Learning Commission", "by the higher-learning commission", True),
        ("22,680,010", "about 22,680,010 people", True),
        ("22,680,010", "about 22,680,011 people", False),
        ("a", "Is it a?", True),
        ("the", "of the", True),
        ("苏东坡", "這是蘇東坡的詩。", True),
        ("李白", "杜甫", False),
        ("?", "what?", True),
        ("C++", "in C++ and C", True),
    ],
)
def test_an_answer_stands_in_a_text_as_words_of_its_own(
    answer: str, text: str, contained: bool
) -> None:
    assert contains_answer(text, answer) is contained


@given(st.text(min_size=1, max_size=30).filter(str.strip))
def test_a_text_contains_itself(text: str) -> None:
    assert contains_answer(text, text)


@given(st.lists(st.text("abc", min_size=1), max_size=5))
def test_a_few_keys_are_all_named(keys: list[str]) -> None:
    assert in_words(keys) == ", ".join(keys)


def test_of_thousands_of_keys_the_first_are_named() -> None:
    keys = [f"fact {n}" for n in range(1, 3001)]
    assert in_words(keys[:6]) == "fact 1, fact 2, fact 3, fact 4, fact 5 and 1 more"
    assert in_words(keys) == "fact 1, fact 2, fact 3, fact 4, fact 5 and 2,995 more"
