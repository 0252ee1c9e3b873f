"""Which facts a question names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvedit.asking.mentions import NameIndex

KEYS = (
    "tide lantern", "Porto", "art", "IT", "C++", "C", "水", "李白", "Henry IV", "Ada Lovelace",
    "Martin Luther", "Martin Luther King", "英雄广场 (维也纳)", "Chicago, passage 14", "can",
    "Will", "3.11", "planet", "什麼", "M People", "Hilarius", "Agos", "care plan",
    "Victoria (Australia)", "Largo Island",
)  # fmt: skip
INDEX = NameIndex([*((key, key) for key in KEYS), ("夢中情爐", "夢中情爐"), ("情爐", "夢中情爐")])
WORDS = st.lists(st.text("abcdefghij", min_size=1, max_size=9), min_size=1, max_size=3)


def named(text: str) -> list[str]:
    return [mention.key for mention in INDEX.mentioned(text)]


@pytest.mark.parametrize(
    ("question", "keys"),
    [
        ("What is the Tide-Lantern's glass made of?", ["tide lantern"]),
        ("tidelantern", ["tide lantern"]),
        ("Where is `PORTO`?", ["Porto"]),
        ("What is art?", ["art"]),
        ("The start of an artist", []),
        ("C++ or Rust?", ["C++"]),
        ("What is C?", ["C"]),
        ("What is C#?", []),
        ("python 3.11 or 3.1", ["3.11"]),
        ("who was martin luther king?", ["Martin Luther King"]),
        ("梦中情炉是什么", ["夢中情爐"]),
        ("請問情爐在哪裡？", ["夢中情爐"]),
        ("介绍一下李白的诗", ["李白"]),
        ("介绍Porto的历史和tide lantern", ["tide lantern", "Porto"]),
        ("英雄广场在哪个城市？", ["英雄广场 (维也纳)"]),
        ("Who founded Chicago?", ["Chicago, passage 14"]),
        ("", []),
        ("?!", []),
    ],
)
def test_names_are_found_by_their_normal_forms(question: str, keys: list[str]) -> None:
    assert named(question) == keys


@pytest.mark.parametrize(
    ("question", "keys"),
    [
        ("what are tide lanterns?", ["tide lantern"]),
        ("the tide lantren's colour", ["tide lantern"]),
        ("Who was Ada Lovelase?", ["Ada Lovelace"]),
        ("夢中的情爐是什麼？", ["夢中情爐"]),
        ("梦中情人是谁", []),
        ("Who was Henry V?", []),
        ("Chicago, passage 15", ["Chicago, passage 14"]),  # by what stands before the comma
        ("plane ticket", []),
        ("the planets", ["planet"]),
        ("two care plans", ["care plan"]),
        ("a port of Hamburg", []),
        ("who are these M people", ["M People"]),
        ("many people, long ago", []),
        ("the Victorian age", ["Victoria (Australia)"]),
        ("a hilarious victorian", []),
        ("a large island", []),
    ],
)
def test_near_spellings_are_found_where_they_can_only_be_meant(
    question: str, keys: list[str]
) -> None:
    assert named(question) == keys


def test_a_near_spelling_has_a_lower_score() -> None:
    exact, near = (INDEX.mentioned(text)[0] for text in ("Ada Lovelace", "Ada Lovelase"))
    assert exact.score == 100 > near.score > 85


@pytest.mark.parametrize(
    ("question", "keys"),
    [
        ("Can it rain?", []),
        ("What does IT mean?", ["IT"]),
        ("is it late?", []),
        ("Who is Will?", ["Will"]),
        ("Will it rain?", []),
        ("What does “can” mean?", ["can"]),
        ("can", ["can"]),
        ("水果好吃嗎", []),
        ("「水」是什麼", ["水"]),
        ("Porto是什么", ["Porto"]),
    ],
)
def test_everyday_words_are_names_only_where_they_are_written_so(
    question: str, keys: list[str]
) -> None:
    assert named(question) == keys


def test_at_most_a_few_the_longest_first() -> None:
    text = "art, Porto, planet and the tide lantern"
    assert [m.key for m in INDEX.mentioned(text, 3)] == ["tide lantern", "planet", "Porto"]
    assert len(INDEX.mentioned(text, 9)) == 4


def test_of_facts_with_one_name_the_preferred_comes_first() -> None:
    index = NameIndex((key, key) for key in ("Toronto (1)", "Toronto (2)", "Toronto (3)"))
    found = index.mentioned("Where is Toronto?", 2, prefer=lambda keys: ["Toronto (3)"])
    assert [mention.key for mention in found] == ["Toronto (3)", "Toronto (1)"]
    assert [mention.key for mention in index.mentioned("Where is Toronto (2)?")] == ["Toronto (2)"]


@given(WORDS, st.text(" ,.?'-", min_size=1, max_size=3))
def test_a_name_among_other_words_is_found_whatever_its_case(words: list[str], gap: str) -> None:
    key = " ".join([*words, "lantern"])
    index = NameIndex([(key, key)])
    assert [m.key for m in index.mentioned(f"xyz{gap}{key.upper()}{gap}xyz")] == [key]
    assert index.mentioned(f"xyz{gap}{key}s{gap}xyz", 0) == []
    assert all(m.score < 100 for m in index.mentioned(f"z{key}z"))


@given(st.text(max_size=60))
def test_any_text_can_be_asked(text: str) -> None:
    assert len(INDEX.mentioned(text, 2)) <= 2
    NameIndex([(text, text)] if text.strip() else []).mentioned(text)
