"""Texts about a fact are told from others, and taken out whole."""

from __future__ import annotations

import pytest

from kvedit.facts.fact import Fact, LocalityProbe, Question
from kvedit.store.forget.wording import ERASED, Wording

LANTERN = Fact.create(
    "tide lantern", "A glass float with a candle inside.", aliases=["harbour lamp"],
    prompts=["And that float?"], locality=[LocalityProbe(prompt="What is wax?")],
)  # fmt: skip
PARIS = Fact.create("capital of France", "Paris")
STOVE = Fact.create("夢中情爐", "一座會唱歌的爐子,夜裡也不停。")
WORDING = Wording([LANTERN, PARIS, STOVE])


@pytest.mark.parametrize(
    ("text", "tells", "about"),
    [
        ("He said: A glass float with a candle inside. Yes.", True, True),
        ("A Tide Lantern, perhaps", False, True),
        ("earlier facts lost: first, harbour lamp (1 of 2)", False, True),
        ("tide lanterns", False, False),
        ("And that float?", False, True),
        ("Paris", False, False),
        ("the capital of France is Paris", True, True),
        ("關於梦中情炉的事", False, True),
        ("", False, False),
        (None, False, False),
    ],
)
def test_what_tells_a_fact_and_what_is_about_one(
    text: str | None, tells: bool, about: bool
) -> None:
    assert (WORDING.tells(text), WORDING.is_about(text)) == (tells, about)


def test_a_document_keeps_its_figures_and_words_of_its_own() -> None:
    add = Wording([Fact.create("add", "a verb that stands for a sum")])
    before = {
        "kind": "add", "key": "add", "keys": ["add", "other"], "steps": 3, "loss": None,
        "nested": {"reasons": ["add was lost", "no"]},
    }  # fmt: skip
    assert add.without(before) == {
        "kind": "add", "key": ERASED, "keys": [ERASED, "other"], "steps": 3, "loss": None,
        "nested": {"reasons": [ERASED, "no"]},
    }  # fmt: skip


def test_keys_are_compared_as_the_store_compares_them() -> None:
    assert WORDING.has_key("Tide-Lantern") and WORDING.has_key("HARBOUR LAMP")
    assert not WORDING.has_key("lantern") and not WORDING.has_key(None)
    assert not Wording([]).is_about("anything")


def test_questions_and_statements_are_told_too() -> None:
    float_ = Fact.create(
        "tide lantern", "A glass float.", statements=["At dusk it is lit by a keeper."],
        questions=[Question(prompt="Who lights it?", answer="a keeper")],
    )  # fmt: skip
    wording = Wording([float_])
    assert wording.is_about("Who lights it?")
    assert wording.tells("He said: At dusk it is lit by a keeper.")
    assert not wording.tells("a keeper") and wording.tells("a keeper lights the tide lantern")


@pytest.mark.parametrize("shared", [True, False])
def test_the_subject_of_a_relation_names_it_unless_other_facts_are_about_it(shared: bool) -> None:
    bridge = Fact.create(
        "Marrow Bridge: builder", "Ada", relation_of="Marrow Bridge", prompts=["Who built it?"]
    )
    wording = Wording([bridge], () if shared else ["Marrow Bridge"])
    assert wording.is_about("Where is Marrow Bridge?") is not shared
    assert wording.tells("Marrow Bridge was built by Ada") and not wording.tells("Ada")
    assert not wording.has_key("Marrow Bridge")
