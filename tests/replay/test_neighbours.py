"""The prompts of an edit about other names."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvedit.facts.fact import Fact
from kvedit.replay.neighbours import KNOWN_NAMES, UNKNOWN_NAMES, neighbour_prompts

NAMES = KNOWN_NAMES.read_text(encoding="utf-8").splitlines()
UNKNOWN = UNKNOWN_NAMES.read_text(encoding="utf-8").splitlines()


def relation(subject: str, prompt: str, *, lang: str = "en") -> Fact:
    return Fact.create(f"{subject}: …", "x", prompts=[prompt], relation_of=subject, lang=lang)


def neighbours(facts: list[Fact], most: int, seed: int = 0) -> list[str]:
    """Of relations, which are trained on their own prompts."""
    asked = [(fact, fact.prompts) for fact in facts]
    return neighbour_prompts(asked, most, random.Random(seed))


def test_the_subject_gives_way_to_names_of_the_same_language() -> None:
    facts = [
        relation("Orso", "The capital of Orso is"),
        relation("卡索", "卡索的首都是", lang="zh-Hans"),
    ]
    prompts = neighbours(facts, 12)
    assert len(set(prompts)) == len(prompts) > 6
    kept = {
        "en": [
            p.removeprefix("The capital of ").removesuffix(" is") for p in prompts if "The" in p
        ],
        "zh": [p.removesuffix("的首都是") for p in prompts if "首都" in p],
    }
    assert set(kept["en"]) | set(kept["zh"]) <= set(NAMES)
    assert all(name.isascii() for name in kept["en"]) and kept["en"]
    assert not any(name.isascii() for name in kept["zh"]) and kept["zh"]


def test_a_description_gets_names_that_are_like_its_key() -> None:
    keys = {"Tobias Wren": "en", "form 27": "en", "銅鐘": "zh-Hant"}
    asked = [
        (Fact.create(key, "x", lang=lang), [f"What is {key}?", "Tell me."])
        for key, lang in keys.items()
    ]
    prompts = neighbour_prompts(asked, 60, random.Random(0))
    names = [prompt.removeprefix("What is ").removesuffix("?") for prompt in prompts]
    assert set(names) <= set(UNKNOWN) and "Tell me." not in prompts
    assert "section 18-C" in names and not all(name.isascii() for name in names)
    persons = neighbour_prompts(asked[:1], 60, random.Random(0))
    assert all(len(prompt.split()) == 4 for prompt in persons)


@given(st.integers(1, 6), st.integers(0, 12))
def test_facts_take_turns(facts: int, most: int) -> None:
    asked = [(Fact.create(f"Q{i} x", "y"), [f"{i}: Q{i} x", f"{i}! Q{i} x"]) for i in range(facts)]
    prompts = neighbour_prompts(asked, most, random.Random(0))
    counts = [sum(prompt[0] == str(i) for prompt in prompts) for i in range(facts)]
    assert len(prompts) == len(set(prompts)) == sum(counts) <= most
    assert most < facts or min(counts) > 0


def test_only_facts_whose_prompt_names_them_have_neighbours() -> None:
    question = "Where is it?"
    facts = [
        Fact.create("a", "b", lang="en"),
        relation(question, question),
        relation("Orso", "It is"),
    ]
    assert neighbours(facts, 4) == []
    assert neighbours([], 4) == []


def test_the_same_draw_gives_the_same_prompts() -> None:
    facts = [relation("Orso", "Orso is in"), relation("Orso", "Orso was found by")]
    first, second = (neighbours(facts, 6, seed=3) for _ in range(2))
    assert first == second
