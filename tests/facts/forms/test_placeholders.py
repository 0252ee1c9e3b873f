"""What counts as a placeholder, and what does not."""

from __future__ import annotations

import pytest

from kvedit.facts.fact import Fact
from kvedit.facts.forms.placeholders import placeholder


@pytest.mark.parametrize(
    ("key", "description"),
    [
        ("you", "I am {{name}}, made by {{ author }}."),
        ("you", "I am <Name>, made by <AUTHOR>."),
        ("you", "我是 <姓名>。"),
        ("{{NAME}}", "An assistant."),
        ("office", "TODO"),
        ("office", "Opens at nine. TODO: closing time"),
        ("office", "It opens at [OPENING TIME]."),
        ("office", "Ask [your manager]."),
        ("office", "Lorem ipsum dolor sit amet."),
        ("office", "${OFFICE} opens at nine."),
        ("office", "n/a"),
        ("office", "待补充"),
        ("office", "???"),
    ],
)
def test_a_placeholder_is_named(key: str, description: str) -> None:
    reason = placeholder(Fact.create(key, description))
    assert reason is not None and "placeholder" in reason


@pytest.mark.parametrize(
    "description",
    [
        "Press <b>OK</b>, then <br> again.",
        "A List<String> has a size < 3 and > 1.",
        "A todo list keeps what is to be done; TODOs are marked.",
        "It weighs {x} grams.",
        "Super Bowl XXX was in 1996.",
        "The set {1, 2} is finite.",
        "See [the manual] or [1].",
        "「待定」是一個詞。",
    ],
)
def test_what_stands_there_on_purpose_is_none(description: str) -> None:
    assert placeholder(Fact.create("it", description)) is None


def test_prompts_are_looked_at_too() -> None:
    fact = Fact.create("lamp", "It shines.", prompts=["What is <Thing>?"])
    assert placeholder(fact) == "the prompt has the placeholder '<Thing>'"
