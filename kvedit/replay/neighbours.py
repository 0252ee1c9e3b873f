"""What a relation's prompt says of other subjects: that stays when one of them is taught.

A relation is trained on its own prompt, so the nearest thing to forget is what the model answers to
the same prompt about somebody else.  Such prompts are made with names that most models know.
"""

import random
from collections.abc import Iterable
from pathlib import Path

from kvedit.facts.fact import Fact
from kvedit.facts.language import detect_language

KNOWN_NAMES = Path(__file__).parents[1] / "data" / "known_names.txt"
ANSWER_TOKENS = 24  # at which what the model says to such a prompt is cut


def neighbour_prompts(facts: Iterable[Fact], most: int, rng: random.Random) -> list[str]:
    """At most so many prompts, the relations among the facts in turn, each about another name."""
    asked = [
        (prompt, fact.relation_of, fact.lang == "en")
        for fact in facts
        for prompt in fact.prompts
        if fact.relation_of and fact.relation_of in prompt and fact.relation_of != prompt
    ]
    rng.shuffle(asked)
    names: dict[bool, list[str]] = {True: [], False: []}
    for name in KNOWN_NAMES.read_text(encoding="utf-8").splitlines():
        names[detect_language(name) == "en"].append(name)
    made: dict[str, None] = {}
    for turn in range(most if asked else 0):
        prompt, subject, is_english = asked[turn % len(asked)]
        made[prompt.replace(subject, rng.choice(names[is_english]))] = None
    return list(made)
