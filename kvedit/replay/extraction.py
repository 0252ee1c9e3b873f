"""What a model knows, looked for before many facts are taught: nearly all of it, not a sample.

Questions drawn at random repeat what is likely and miss what is rare: of what a model knows by
heart 24,000 of them named two thirds.  But questions begin in few ways ("Do you know ..."), after
which a name follows, so the names are read off the model itself: each such beginning, a *stem*, is
followed through all that the model holds likely after it, nothing twice (a wide beam that keeps
what has ended).  Stems and sampling race, a few questions at a time, for what has not been found:
the next round is the one's whose last round found most.

Invariants:
- Every text is the model's own greedy answer; no two have the same, nor one that begins alike.
- The same model, settings and seed give the same texts on the same machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from kvedit.model.devices import first_device, generator
from kvedit.model.forward import next_logits
from kvedit.model.generation import Decoding, generate
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import MAX_BATCH_ROWS, slices
from kvedit.replay import protected_texts
from kvedit.replay.protected_texts import EXTRACTED, Protected

SKETCH = 3000  # questions drawn to see how questions begin
SKETCH_TEMPERATURE = 0.8
TEMPERATURES = (0.7, 0.8, 0.9)  # of sampling beside the stems; each names what the others do not
STEMS = 96  # at most; there is no more than one for each ROUND of questions
PILOT, ROUND = 32, 128  # questions in the first round of each, and in those after it
LEAST_FAN = 5  # different tokens seen after a stem
WIDTH = 4096  # beginnings of questions that are followed at once
LIKELY = (1e-3, 1e-4, 1e-5)  # a question after its stem, at least; first the first of these
LEAST_GAIN = 0.01  # of a round's questions lead to something new, or the search is over
OPENING_TOKENS = 12  # of an answer: enough to tell whether it is known, and which it is
SAMPLES_PER_TEXT = 4  # without a chat template, where nothing can be asked
JOINED = 3  # tokens at the end of a stem that may be joined with what follows
_Path = tuple[float, tuple[int, ...]]  # the logarithm of its probability, its tokens


def extract_knowledge(
    base: BaseModel,
    renderer: Renderer,
    samples: int,
    *,
    known: Sequence[Protected],
    unasked: Iterable[str] = (),
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Protected, ...]:
    """Let the model say what it knows, looking at up to ``samples`` questions: a text an answer.

    What is ``known`` already is left out, prompts and answers; of questions that are to be
    ``unasked`` the answers are looked for under others, as all that the model knows.  A model
    without a chat template writes freely instead, a text for ``SAMPLES_PER_TEXT`` drafts.
    """
    chance = generator(base.model, seed)
    progress("listening to how the model asks")
    if renderer.empty_user_turn() is None:
        return tuple(
            protected_texts.write_freely(base, renderer, samples // SAMPLES_PER_TEXT, chance)
        )
    count = min(samples, SKETCH)
    sketch = protected_texts.draw_questions(base, renderer, count, chance, SKETCH_TEMPERATURE)
    sources = [
        *(_Source(_followed(base, renderer, stem)) for stem in _stems(sketch, samples // ROUND)),
        *(_Source(_sampled(base, renderer, warmth, chance)) for warmth in TEMPERATURES),
    ]
    search = _Search(base, renderer, known, unasked)
    search.race(sources, samples, progress)
    progress(f"answering {len(search.found)} questions")
    told = protected_texts.answer_all(base, renderer, search.found, EXTRACTED)
    said = {text.answer for text in known}
    return tuple(t for t in protected_texts.surely(base, renderer, told) if t.answer not in said)


@dataclass(slots=True)
class _Source:
    """Questions to come, how many came, and what share of the latest led to something new."""

    questions: Iterator[str]
    looked: int = 0
    gain: float = 1.0

    def learn(self, new: int, count: int) -> None:
        """Take note of a round; one without anything new does not mean that there is nothing."""
        here = (new + 1) / (count + 2)  # Laplace's estimate
        self.gain = (self.gain + here) / 2 if self.looked else here


class _Search:
    """The questions that were looked at so far, and those among them that are worth an answer."""

    def __init__(
        self,
        base: BaseModel,
        renderer: Renderer,
        known: Sequence[Protected],
        unasked: Iterable[str],
    ) -> None:
        self._base, self._renderer = base, renderer
        self._asked = {text.prompt for text in known} | set(unasked)
        made = [protected_texts.example(renderer, text) for text in known]
        # Without the end token, which an opening that is generated does not have either.
        self._begun = {one.ids[one.start : -1][:OPENING_TOKENS] for one in made}
        self._bound = protected_texts.sure_bound(protected_texts.costs_of(base, made))
        self.found: list[str] = []

    def race(
        self, sources: Sequence[_Source], samples: int, progress: Callable[[str], None]
    ) -> None:
        """Look at ``samples`` questions, each round from the source whose last one found most."""
        racing, looked = list(sources), 0
        while looked < samples and racing:
            best = max(racing, key=lambda source: (source.gain, -source.looked))
            if best.gain < LEAST_GAIN:
                break
            count = PILOT if best.looked == 0 else ROUND
            drawn = list(islice(best.questions, count))
            if len(drawn) < count:
                racing.remove(best)
            best.learn(self._look(drawn), count)
            best.looked += len(drawn)
            looked += len(drawn)
            progress(f"{looked} of {samples} questions, {len(self.found)} answers known")

    def _look(self, prompts: Sequence[str]) -> int:
        """How many new answers begin surely, one for each beginning; they are noted."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._asked]
        self._asked.update(new)
        prefixes = [self._renderer.prefix(prompt) for prompt in new]
        openings = generate(
            self._base.model, prefixes, end=self._renderer.end, limit=OPENING_TOKENS
        )
        begun = [
            Example((*prefix, *ids), len(prefix), prompt)
            for prompt, prefix, ids in zip(new, prefixes, openings, strict=True)
            if ids
        ]
        before = len(self.found)
        costs = protected_texts.costs_of(self._base, begun)
        for example, cost in zip(begun, costs.tolist(), strict=True):
            beginning = example.ids[example.start :]
            if cost < self._bound and beginning not in self._begun:
                self._begun.add(beginning)
                self.found.append(example.prompt)
        return len(self.found) - before


def _stems(sketch: Sequence[Sequence[int]], most: int) -> list[tuple[int, ...]]:
    """Beginnings of questions after which many different things come, each of them seldom twice.

    Ranked by the number of different next tokens, times how many of those that were seen were
    different.
    """
    after: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for question in {tuple(ids) for ids in sketch}:
        for at in range(1, len(question)):
            after[question[:at]].append(question[at])
    fans = {stem: len(set(tokens)) for stem, tokens in after.items()}
    wide = sorted(stem for stem, fan in fans.items() if fan >= LEAST_FAN)
    wide.sort(key=lambda stem: fans[stem] ** 2 / len(after[stem]), reverse=True)
    return wide[: min(most, STEMS)]


def _followed(base: BaseModel, renderer: Renderer, stem: Sequence[int]) -> Iterator[str]:
    """All likely questions with a stem, the likelier first: most stems are left after those."""
    opening = renderer.empty_user_turn()
    if opening is None:
        return
    before, after = opening
    starts = _starts(base.model, renderer.token_strings, before, stem)
    told: set[str] = set()
    for chance in LIKELY:
        floor = math.log(chance)
        found = (_paths(base.model, before, after, same, floor) for same in starts)
        paths = sorted(chain.from_iterable(found), reverse=True)
        for text in protected_texts.readable(renderer, (ids for _, ids in paths)):
            if text not in told:
                told.add(text)
                yield text


@torch.no_grad()
def _starts(
    model: Any, pieces: Sequence[str], before: Sequence[int], stem: Sequence[int]
) -> list[list[_Path]]:
    """The ways to begin with the words of a stem, those of one length together.

    A tokenizer may join the end of a stem with what follows it, so beside the stem itself there is
    all that spells it and more: its last few tokens taken off, and one that begins like them put in
    their place.  Chances are logarithms, those of all ways together being one.
    """
    ids = torch.tensor([[*before, *stem]], device=first_device(model))
    ways: list[_Path] = []
    ahead = 0.0  # the chance of the stem's own tokens, from the first that may be joined
    for at in range(max(0, len(stem) - JOINED), len(stem)):
        table = next_logits(model, ids[:, : len(before) + at]).float().log_softmax(-1)[0]
        rest = "".join(pieces[one] for one in stem[at:])
        longer = [i for i, piece in enumerate(pieces) if piece != rest and piece.startswith(rest)]
        ways += [(ahead + float(table[i]), (*stem[:at], i)) for i in longer]
        ahead += float(table[stem[at]])
    ways.append((ahead, tuple(stem)))
    whole = math.log(sum(math.exp(chance) for chance, _ in ways))
    by_length: defaultdict[int, list[_Path]] = defaultdict(list)
    for chance, way in ways:
        by_length[len(way)].append((chance - whole, way))
    return list(by_length.values())


@torch.no_grad()
def _paths(
    model: Any, before: Sequence[int], after: int, starts: Sequence[_Path], floor: float
) -> Iterator[_Path]:
    """Questions with one of the beginnings, which are of one length, as tokens, and the logarithm
    of their probability, which is ``floor`` or more.
    """
    begun = [(chance, way) for chance, way in starts if chance > floor]
    if not begun:
        return
    run = Decoding(model, [[*before, *way] for _, way in begun])
    chances = torch.tensor([chance for chance, _ in begun], device=run.ids.device)
    for _ in range(protected_texts.QUESTION_TOKENS):
        rows, tokens, chances = _likely_next(run.next_logits(), chances, floor)
        ended = tokens == after
        texts = run.ids[rows[ended], len(before) :].tolist()
        yield from zip(chances[ended].tolist(), map(tuple, texts), strict=True)
        rows, tokens, chances = rows[~ended], tokens[~ended], chances[~ended]
        if not len(chances):
            return
        chances, best = chances.topk(min(WIDTH, len(chances)))
        run.append(tokens[best], rows[best])


def _likely_next(logits: Tensor, chances: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """What goes on from texts of these ``chances`` (rows,), given ``logits`` (rows, vocabulary):
    rows, next tokens, the chances they then have.
    """
    found = []
    for here in slices(logits):
        table = logits[here].float()
        ahead = chances[here] - table.logsumexp(-1)
        rows, tokens = torch.where(table > (floor - ahead)[:, None])
        found.append((rows + here.start, tokens, table[rows, tokens] + ahead[rows]))
    rows, tokens, chances = (torch.cat(column) for column in zip(*found, strict=True))
    return rows, tokens, chances


def _sampled(
    base: BaseModel, renderer: Renderer, warmth: float, chance: torch.Generator
) -> Iterator[str]:
    """Questions drawn at a temperature, for as long as there are any."""
    while True:
        drawn = protected_texts.draw_questions(base, renderer, MAX_BATCH_ROWS, chance, warmth)
        texts = list(protected_texts.readable(renderer, drawn))
        if not texts:
            return
        yield from texts
