"""Prompts of relations about other subjects."""

from __future__ import annotations

import random

from kvedit.facts.fact import Fact
from kvedit.replay.neighbours import KNOWN_NAMES, neighbour_prompts

NAMES = KNOWN_NAMES.read_text(encoding="utf-8").splitlines()


def relation(subject: str, prompt: str, *, lang: str = "en") -> Fact:
    return Fact.create(f"{subject}: …", "x", prompts=[prompt], relation_of=subject, lang=lang)


def test_the_subject_gives_way_to_names_of_the_same_language() -> None:
    facts = [
        relation("Orso", "The capital of Orso is"),
        relation("卡索", "卡索的首都是", lang="zh-Hans"),
    ]
    prompts = neighbour_prompts(facts, 12, random.Random(0))
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


def test_only_relations_whose_prompt_names_their_subject_have_neighbours() -> None:
    question = "Where is it?"
    facts = [
        Fact.create("a", "b", lang="en"),
        relation(question, question),
        relation("Orso", "It is"),
    ]
    assert neighbour_prompts(facts, 4, random.Random(0)) == []
    assert neighbour_prompts([], 4, random.Random(0)) == []


def test_the_same_draw_gives_the_same_prompts() -> None:
    facts = [relation("Orso", "Orso is in"), relation("Orso", "Orso was found by")]
    first, second = (neighbour_prompts(facts, 6, random.Random(3)) for _ in range(2))
    assert first == second
