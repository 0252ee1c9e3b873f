"""Facts that share words with a text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvedit.asking.nearness import nearest
from kvedit.facts.fact import Fact

FACTS = [
    Fact.create("tide lantern", "A tide lantern is a glass float that hangs on the harbour wall."),
    Fact.create("hush bell", "A hush bell is a bell without a clapper, rung on the harbour wall."),
    Fact.create("夢中情爐", "一座會唱歌的爐子，住在山裡。"),
]


def order(text: str) -> list[str]:
    return [fact.key for fact, _ in nearest(text, FACTS)]


def test_the_fact_with_the_rarer_words_comes_first() -> None:
    assert order("Which float hangs there?") == ["tide lantern"]
    assert order("A harbour bell") == ["hush bell", "tide lantern"]
    assert order("哪裡有唱歌的爐子？")[0] == "夢中情爐"
    assert order("哪里有唱歌的炉子？")[0] == "夢中情爐"
    assert order("zebra") == order("") == []


@given(st.text(max_size=80))
def test_scores_are_shares_and_fall(text: str) -> None:
    scores = [score for _, score in nearest(text, FACTS)]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 + 1e-9 for score in scores)


def test_a_fact_is_nearest_to_its_own_text() -> None:
    for fact in FACTS:
        assert order(f"{fact.key} {fact.description}")[0] == fact.key
