"""Prose of the project's own: text that an edit must leave alone, besides what the model says.

Answers of a talking model hardly look like a page of prose, so what protects them leaves the
model's reading of ordinary text free to change (docs/log/2026-11-29.md).  Nothing has to be decoded
for these texts; they only cost their measurement.

What facts have most of are numbers, and a model says the next digit of any number in much the same
way: of sixteen facts' harm to prose, half was in one token of twenty, nearly all digits and months
(docs/log/2026-11-30.md).  So steps are held to sentences that are full of numbers.

Invariants:
- A text that the model cannot read is left out: changes of noise cost nothing.
- The last ``WATCHED`` texts are never protected, so that they can be asked.
"""

import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.replay.protected_texts import CUT, PROSE, Protected, example, mean_losses

SHIPPED_TEXTS = Path(__file__).parents[1] / "data" / "general_texts.txt"
SENTENCES_WITH_NUMBERS = SHIPPED_TEXTS.with_name("sentences_with_numbers.txt")
WATCHED = 12  # texts
WATCHED_TOKENS = 64  # of each
TRIED = 6  # texts: those of all languages come in turn
MAX_LOSS = 6.0  # nats a token: a model that knows its texts by heart has 10 here, 135M parameters 4


def protected(base: BaseModel, renderer: Renderer) -> list[Protected]:
    """The texts to protect, in the languages that the model reads; none for one that reads none."""
    return (
        [_protected(text) for text in _read(renderer)[:-WATCHED]] if reads(base, renderer) else []
    )


def reads(base: BaseModel, renderer: Renderer) -> bool:
    """Whether the model reads prose in any of the languages."""
    texts = [_protected(text) for text in _read(renderer)[:TRIED]]
    losses = mean_losses(base, [example(renderer, text) for text in texts])
    return bool(texts) and float(losses.mean()) < MAX_LOSS


def watched(renderer: Renderer) -> list[Example]:
    """Texts whose perplexity is compared before and after an edit."""
    before = renderer.begin
    rows = (renderer.tokens(text)[:WATCHED_TOKENS] for text in _read(renderer)[-WATCHED:])
    return [Example((before, *ids), 1) for ids in rows]


def sentences_with_numbers(renderer: Renderer, most: int, rng: random.Random) -> list[Example]:
    """So many sentences with numbers, for the divergence in a step."""
    lines = _read(renderer, SENTENCES_WITH_NUMBERS)
    chosen = rng.sample(lines, min(most, len(lines)))
    return [example(renderer, _protected(line)) for line in chosen]


def interleaved(texts: Sequence[Protected], others: Sequence[Protected]) -> list[Protected]:
    """Both in turn: however few there is time to measure, they are of both kinds."""
    pairs = zip_longest(texts, others)
    return [text for text in chain.from_iterable(pairs) if text is not None]


def _read(renderer: Renderer, file: Path = SHIPPED_TEXTS) -> list[str]:
    """The texts in languages that the tokenizer has words for."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(renderer.tokens(line)) < len(line)]


def _protected(text: str) -> Protected:
    return Protected("", text, PROSE + CUT)  # no end token is asked after it
