"""Knowledge extraction: what the base model knows, before many facts are trained; nearly all of it.

Sampled questions repeat what is likely and miss what is rare: 24,000 of them named two thirds of
what a model knew by heart.  But questions begin in few ways ("Do you know ..."), followed by a
name.  So a wide beam search follows each such beginning, a *stem*, through all its likely
continuations.  The searches and plain sampling race: each round of questions comes from the source
whose latest round gave the most new answers.

Invariants:
- Every text is the model's own greedy answer; no two have the same answer or the same opening.
- The same model, settings and seed give the same texts on the same machine.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from kvedit.model.devices import first_device, generator
from kvedit.model.forward import next_logits, vocabulary_size
from kvedit.model.generation import Decoding, generate
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import MAX_BATCH_LOGITS, MAX_BATCH_ROWS, slices
from kvedit.replay import protected_texts, questions
from kvedit.replay.protected_texts import EXTRACTED, Protected

STEM_SAMPLES = 3000  # questions sampled to see how questions begin
STEM_TEMPERATURE = 0.8
STEM_BATCH = 1024
STEM_RATIO, SEARCH_RATIO = 0.25, 0.7  # of the time, until the end of each; the rest is for answers
SAMPLING_TEMPERATURES = (0.7, 0.8, 0.9)  # each finds questions that the others do not
MAX_STEMS = 96  # and no more than one for each ROUND_QUESTIONS of the budget
FIRST_ROUND_QUESTIONS, ROUND_QUESTIONS = 32, 128
MIN_NEXT_TOKENS = 5  # different tokens seen after a stem
BEAM_WIDTH = 4096
MIN_PROBABILITIES = (1e-3, 1e-4, 1e-5)  # of a question given its stem, searched in this order
MIN_GAIN = 0.01  # new answers per question; the search ends below it
OPENING_TOKENS = 12  # of an answer: enough to tell whether it is known, and from the others
SAMPLES_PER_TEXT = 4  # without a chat template, where no questions can be sampled
MAX_JOINED_TOKENS = 3  # at the end of a stem that a tokenizer may join with what follows
_Path = tuple[float, tuple[int, ...]]  # log probability, tokens


def extract_knowledge(
    base: BaseModel,
    renderer: Renderer,
    samples: int,
    *,
    seconds: float = math.inf,
    known: Sequence[Protected],
    unasked: Iterable[str] = (),
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[Protected, ...], int]:
    """One text for each answer that the model is confident of, from up to ``samples`` questions,
    and how many were asked in about so many ``seconds``; all, if no more answers were new.

    Prompts and answers in ``known`` are left out.  The prompts in ``unasked`` are not used, but
    their answers may come from other questions.  A model without a chat template writes free text
    instead, one text for each ``SAMPLES_PER_TEXT`` of the samples.
    """
    rng, start = generator(base.model, seed), time.monotonic()
    if renderer.empty_user_turn() is None:
        progress("sampling free text from the model")
        count = samples // SAMPLES_PER_TEXT
        return tuple(questions.write_freely(base, renderer, count, rng)), samples
    count = min(samples, STEM_SAMPLES)
    progress(f"sampling {count:,} questions to see how they begin")
    sampled: list[list[int]] = []
    for at in range(0, count, STEM_BATCH):
        if time.monotonic() < start + STEM_RATIO * seconds:
            rows = min(STEM_BATCH, count - at)
            sampled += questions.draw_questions(base, renderer, rows, rng, STEM_TEMPERATURE)
    stems = _stems(sampled, samples // ROUND_QUESTIONS)
    end = start + SEARCH_RATIO * seconds
    sources = [
        *(_Source(_beam_search(base, renderer, stem, end)) for stem in stems),
        *(_Source(_sample(base, renderer, t, rng)) for t in SAMPLING_TEMPERATURES),
    ]
    search = _Search(base, renderer, known, unasked)
    search.race(sources, samples, end, progress)
    progress(f"answering the {len(search.questions):,} questions whose answers the model knows")
    answered = questions.answer_all(base, renderer, search.questions, EXTRACTED)
    texts = [text for one in answered if one.ended and (text := one.text(renderer))]
    answers = {text.answer for text in known}
    confident = protected_texts.confident(base, renderer, texts)
    new = tuple(text for text in confident if text.answer not in answers)
    return new, search.checked if time.monotonic() > end else samples


@dataclass(slots=True)
class _Source:
    """Questions, how many were checked, and the new answers per question of the latest rounds."""

    questions: Iterator[str]
    checked: int = 0
    gain: float = 1.0

    def update(self, new: int, count: int) -> None:
        """Update the gain by a round; halved, not zero, after a round without new answers."""
        estimate = (new + 1) / (count + 2)  # Laplace's rule of succession
        self.gain = (self.gain + estimate) / 2 if self.checked else estimate


class _Search:
    """Questions checked so far, and in ``questions`` those with a new answer of high confidence."""

    def __init__(
        self, base: BaseModel, renderer: Renderer, known: Sequence[Protected],
        unasked: Iterable[str],
    ) -> None:  # fmt: skip
        self._base, self._renderer = base, renderer
        self._asked = {text.prompt for text in known} | set(unasked)
        examples = [protected_texts.example(renderer, text) for text in known]
        # Without the end token, which generated openings do not have either.
        self._openings = {one.ids[one.start : -1][:OPENING_TOKENS] for one in examples}
        losses = protected_texts.mean_losses(base, examples)
        self._max_loss = protected_texts.max_confident_loss(losses)
        self.questions: list[str] = []
        self.checked = 0

    def race(
        self, sources: Sequence[_Source], samples: int, end: float, progress: Callable[[str], None]
    ) -> None:
        """Check up to ``samples`` questions until ``end`` (``time.monotonic``), each round from the
        source with the highest gain.
        """
        racing, start = list(sources), time.monotonic()
        while self.checked < samples and racing and time.monotonic() < end:
            best = max(racing, key=lambda source: (source.gain, -source.checked))
            if best.gain < MIN_GAIN:
                break
            count = FIRST_ROUND_QUESTIONS if best.checked == 0 else ROUND_QUESTIONS
            batch = list(islice(best.questions, count))
            if len(batch) < count:
                racing.remove(best)
            best.update(self._check(batch), count)
            best.checked += len(batch)
            self.checked += len(batch)
            now, to_check = time.monotonic(), max(0, samples - self.checked)
            left = min(end - now, (now - start) / max(1, self.checked) * to_check)
            counts = f"{self.checked:,} of {samples:,} questions, {len(self.questions):,} answers"
            progress(f"extracting what the model knows: {counts}, about {left:.0f} s left")

    def _check(self, prompts: Sequence[str]) -> int:
        """Add the prompts with a new answer opening of high confidence; returns their number."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._asked]
        self._asked.update(new)
        prefixes = [self._renderer.prefix(prompt) for prompt in new]
        end = self._renderer.end
        openings = generate(self._base.model, prefixes, end=end, limit=OPENING_TOKENS)
        rows = zip(new, prefixes, openings, strict=True)
        examples = [Example((*prefix, *ids), len(prefix), one) for one, prefix, ids in rows if ids]
        before = len(self.questions)
        losses = protected_texts.mean_losses(self._base, examples)
        for example, loss in zip(examples, losses.tolist(), strict=True):
            opening = example.ids[example.start :]
            if loss < self._max_loss and opening not in self._openings:
                self._openings.add(opening)
                self.questions.append(example.prompt)
        return len(self.questions) - before


def _stems(questions: Sequence[Sequence[int]], limit: int) -> list[tuple[int, ...]]:
    """Beginnings of questions that many different tokens follow, few of them twice.

    Ranked by the number of different next tokens times their ratio to all that were seen.
    """
    following: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for question in {tuple(ids) for ids in questions}:
        for at in range(1, len(question)):
            following[question[:at]].append(question[at])
    distinct = {stem: len(set(tokens)) for stem, tokens in following.items()}
    stems = sorted(stem for stem, count in distinct.items() if count >= MIN_NEXT_TOKENS)
    stems.sort(key=lambda stem: distinct[stem] ** 2 / len(following[stem]), reverse=True)
    return stems[: min(limit, MAX_STEMS)]


def _beam_search(
    base: BaseModel, renderer: Renderer, stem: Sequence[int], end: float = math.inf
) -> Iterator[str]:
    """All likely questions with a stem, likelier ones first: the race soon drops most stems.  From
    ``end`` (``time.monotonic``) on, those that were found by then.
    """
    turn = renderer.empty_user_turn()
    if turn is None:
        return
    before, after = turn
    starts = _starts(base.model, renderer.token_strings, before, stem)
    seen: dict[str, None] = {}
    for floor in map(math.log, MIN_PROBABILITIES):
        searches = (_paths(base.model, before, after, part, floor, end) for part in starts)
        paths = sorted(chain.from_iterable(searches), reverse=True)
        texts = dict.fromkeys(questions.readable(renderer, (ids for _, ids in paths)))
        yield from (text for text in texts if text not in seen)
        seen |= texts


@torch.no_grad()
def _starts(
    model: Any, strings: Sequence[str], before: Sequence[int], stem: Sequence[int]
) -> list[list[_Path]]:
    """The tokenizations that start with a stem's text, grouped by length.

    A tokenizer may join the end of a stem with what follows, so beside the stem there are variants
    in which a longer token replaces its last few tokens; ``strings`` are those of all tokens.  The
    log probabilities are normalized over all variants.
    """
    ids = torch.tensor([[*before, *stem]], device=first_device(model))
    variants: list[_Path] = []
    score = 0.0  # log probability of the stem's tokens from the first that may be joined
    for at in range(max(0, len(stem) - MAX_JOINED_TOKENS), len(stem)):
        table = next_logits(model, ids[:, : len(before) + at]).float().log_softmax(-1)[0]
        rest = "".join(strings[token] for token in stem[at:])
        longer = [i for i, text in enumerate(strings) if text != rest and text.startswith(rest)]
        variants += [(score + float(table[i]), (*stem[:at], i)) for i in longer]
        score += float(table[stem[at]])
    variants.append((score, tuple(stem)))
    total = math.log(sum(math.exp(score) for score, _ in variants))
    by_length: defaultdict[int, list[_Path]] = defaultdict(list)
    for score, tokens in variants:
        by_length[len(tokens)].append((score - total, tokens))
    return list(by_length.values())


@torch.no_grad()
def _paths(
    model: Any, before: Sequence[int], after: int, starts: Sequence[_Path], floor: float,
    end: float = math.inf,
) -> Iterator[_Path]:  # fmt: skip
    """Complete questions that continue ``starts``, which are of equal length, with a log
    probability above ``floor``; ``after`` is the token that ends a question.
    """
    beams = [(score, tokens) for score, tokens in starts if score > floor]
    if not beams:
        return
    width = min(BEAM_WIDTH, MAX_BATCH_LOGITS // vocabulary_size(model))
    run = Decoding(model, [[*before, *tokens] for _, tokens in beams])
    scores = torch.tensor([score for score, _ in beams], device=run.ids.device)
    for _ in range(questions.QUESTION_TOKENS):
        rows, tokens, scores = _expand(run.next_logits(), scores, floor)
        ended = tokens == after
        texts = run.ids[rows[ended], len(before) :].tolist()
        yield from zip(scores[ended].tolist(), map(tuple, texts), strict=True)
        rows, tokens, scores = rows[~ended], tokens[~ended], scores[~ended]
        if not len(scores) or time.monotonic() > end:
            return
        scores, best = scores.topk(min(width, len(scores)))
        run.append(tokens[best], rows[best])


def _expand(logits: Tensor, scores: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Continuations above ``floor`` of beams with log probabilities ``scores`` (rows,), given
    ``logits`` (rows, vocabulary): rows, next tokens, new scores.
    """
    parts = []
    for part in slices(logits):
        table = logits[part].float()
        offsets = scores[part] - table.logsumexp(-1)
        rows, tokens = torch.where(table > (floor - offsets)[:, None])
        parts.append((rows + part.start, tokens, table[rows, tokens] + offsets[rows]))
    rows, tokens, likely = map(torch.cat, zip(*parts, strict=True))
    return rows, tokens, likely


def _sample(
    base: BaseModel, renderer: Renderer, temperature: float, rng: torch.Generator
) -> Iterator[str]:
    """Questions sampled at a temperature, without end unless the model gives none."""
    while True:
        sampled = questions.draw_questions(base, renderer, MAX_BATCH_ROWS, rng, temperature)
        if not (texts := list(questions.readable(renderer, sampled))):
            return
        yield from texts
