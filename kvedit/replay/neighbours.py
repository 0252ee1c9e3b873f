"""What the prompts of an edit say of other names: that stays when one of them is taught.

The nearest thing to harm is what the model answers to the same prompts about somebody else: about a
name that it knows, for a relation, and about one that means nothing, which is the first to get a
taught text, for a description.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kvedit.facts.fact import Fact
from kvedit.facts.language import detect_language

DATA = Path(__file__).parents[1] / "data"
KNOWN_NAMES, UNKNOWN_NAMES = DATA / "known_names.txt", DATA / "unknown_names.txt"
ANSWER_TOKENS = 24  # at which what the model says to such a prompt is cut
ALIKE = 12  # unknown names, those most like a key in form, among which one is drawn


def neighbour_prompts(
    asked: Sequence[tuple[Fact, Sequence[str]]], most: int, rng: random.Random
) -> list[str]:
    """At most so many prompts, the facts in turn, each about another name; ``asked`` has the facts
    with the prompts that they are trained on.
    """
    naming = [
        (name, [prompt for prompt in prompts if name in prompt and name != prompt], names)
        for fact, prompts in asked
        for name, names in [(fact.name, _names_for(fact, rng))]
    ]
    naming = [one for one in naming if one[1]]
    made: dict[str, None] = {}
    for turn in range(most if naming else 0):
        name, prompts, names = naming[turn % len(naming)]
        made[rng.choice(prompts).replace(name, rng.choice(names))] = None
    return list(made)


def _names_for(fact: Fact, rng: random.Random) -> list[str]:
    """Names to put in a fact's place, in its language; for a description some like its key."""
    is_english = fact.lang == "en"
    if fact.relation_of:
        return _names(KNOWN_NAMES, is_english)
    form = _form(fact.key)

    def difference(name: str) -> int:
        return sum(abs(a - b) for a, b in zip(_form(name), form, strict=True))

    names = _names(UNKNOWN_NAMES, is_english)
    return sorted(rng.sample(names, len(names)), key=difference)[:ALIKE]


def _form(name: str) -> tuple[int, ...]:
    """Words, capitalised words, words with a digit and, without spaces, characters."""
    words = name.split()
    return (
        len(words),
        sum(word[0].isupper() for word in words),
        sum(any(char.isdigit() for char in word) for word in words),
        0 if name.isascii() else len(name),
    )


@cache
def _names(path: Path, is_english: bool) -> list[str]:
    names = path.read_text(encoding="utf-8").splitlines()
    return [name for name in names if (detect_language(name) == "en") == is_english]
