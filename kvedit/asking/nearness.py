"""Which facts a text is nearest to, by the words that they share.

The score is the cosine of two bags of words weighted by their inverse document frequency over the
facts (tf-idf): a word of few facts says much, one of all of them nothing.  In scripts without
spaces pairs of characters stand for words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from kvedit.asking.mentions import UNSPACED
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise

_WORD = re.compile(r"[^\W_]+")


def nearest(text: str, facts: Sequence[Fact]) -> list[tuple[Fact, float]]:
    """All facts that share a word with a text and the cosine, 0 to 1; the nearest first."""
    bags = [Counter(_terms(" ".join(_texts(fact)))) for fact in facts]
    documents = Counter(term for bag in bags for term in bag)
    # A word of all facts still counts a little: a store may hold a single one.
    weights = {term: math.log(1 + len(bags) / count) for term, count in documents.items()}
    query = _weighted(Counter(_terms(text)), weights)
    scores = [_cosine(query, _weighted(bag, weights)) for bag in bags]
    ranked = sorted(zip(facts, scores, strict=True), key=lambda pair: -pair[1])
    return [(fact, score) for fact, score in ranked if score > 0]


def _texts(fact: Fact) -> Iterable[str]:
    return (fact.key, *fact.aliases, fact.description, *fact.prompts, *fact.paraphrases)


def _terms(text: str) -> list[str]:
    terms: list[str] = []
    for word in _WORD.findall(text):
        form = normalise(word)
        if UNSPACED.search(form):
            terms += [form[at : at + 2] for at in range(max(1, len(form) - 1))]
        else:
            terms.append(form)
    return terms


def _weighted(bag: Counter[str], weights: dict[str, float]) -> dict[str, float]:
    return {term: n * weights[term] for term, n in bag.items() if term in weights}


def _cosine(one: dict[str, float], other: dict[str, float]) -> float:
    shared = sum(value * other[term] for term, value in one.items() if term in other)
    length = math.hypot(*one.values()) * math.hypot(*other.values())
    return shared / length if length else 0.0
