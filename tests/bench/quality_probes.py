"""What ``quality`` asks a model at one time: facts, general questions, choices, natural text.

Invariants:
- A model is asked the same questions in the same batches, whatever trained it, so that rounding
  differs as little as can be between two states.
- Answers are free and greedy; teacher-forced recall stands beside them, in fields of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from rapidfuzz import fuzz
from torch import Tensor

from kvedit.events import Event, Status
from kvedit.model import generation, scoring
from kvedit.model.devices import first_device, padded_rows
from kvedit.model.forward import backbone
from kvedit.model.loading import has_own_code
from kvedit.model.prompts import Example, Renderer
from tests.bench.asking import AskedModel
from tests.bench.quality_material import Choice, Material, Phrasing, prompts_of

Emit = Callable[[Event], None]
_Row = TypeVar("_Row")
CHUNK = 64  # texts that are generated between two lines of progress
FIRST_TOKENS, ANSWER_TOKENS = 12, 64  # of an answer to a general question
SHORTEST_TEXT = 8  # tokens of natural text from which on it is read
MAX_TEXT = 256  # tokens: longer texts are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """For each phrasing whether its fact is recalled exactly, under both protocols; ``likeness`` is
    the share of characters that the generated answer has in common with the text, 0 to 1.
    """

    generated: tuple[bool, ...] = ()
    forced: tuple[bool, ...] = ()
    likeness: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a model says at one time, in the order of the material.

    ``general`` are answers' tokens, at most ``ANSWER_TOKENS``; ``right`` the choices answered
    rightly; ``losses`` the nats and the tokens of each text that was read.
    """

    trained: Recalled = Recalled()
    unseen: Recalled = Recalled()
    general: tuple[tuple[int, ...], ...] = ()
    general_answers: tuple[str, ...] = ()
    untaught_answers: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()
    losses: tuple[tuple[float, int], ...] = ()
    seconds: float = 0.0

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> State:
        """A state that was written as JSON."""
        parts = {name: _tuples(value) for name, value in document.items()}
        recalled = {
            name: Recalled(**{key: _tuples(value) for key, value in document[name].items()})
            for name in ("trained", "unseen")
        }
        return cls(**{**parts, **recalled})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Progress:
    """Says how far a phase has come, and about how long the rest takes."""

    def __init__(self, emit: Emit, phase: str, total: int) -> None:
        self._emit, self._phase, self._total = emit, phase, total
        self._done, self._began = 0, time.monotonic()
        self.step(0)

    def step(self, count: int) -> None:
        """Count what was done."""
        self._done += count
        spent = time.monotonic() - self._began
        left = spent / self._done * (self._total - self._done) if self._done else 0.0
        text = f"about {left:.0f} s left" if left >= 1 else ""
        self._emit(Status(phase=self._phase, step=self._done, total=self._total, text=text))


def measure(
    asked: AskedModel, material: Material, emit: Emit, *, text_tokens: int, facts: bool = True
) -> State:
    """Ask all of it; the base model is not asked for the facts."""
    began = time.monotonic()
    general = answers(asked, material.questions, emit, "general questions")
    untaught = answers(asked, prompts_of(material.untaught), emit, "keys never taught")
    ask = partial(recalled, asked, material, emit)
    return State(
        trained=ask(material.trained, "trained phrasings") if facts else Recalled(),
        unseen=ask(material.unseen, "unseen phrasings") if facts else Recalled(),
        general=tuple(map(tuple, general)),
        general_answers=tuple(map(asked.renderer.answer_text, general)),
        untaught_answers=tuple(map(asked.renderer.answer_text, untaught)),
        right=choose(asked, material.abilities, emit),
        losses=text_losses(asked, material.texts, text_tokens, emit),
        seconds=time.monotonic() - began,
    )


def answers(
    asked: AskedModel, prompts: Sequence[str], emit: Emit, phase: str
) -> list[tuple[int, ...]]:
    """Greedy answers of at most ``ANSWER_TOKENS`` tokens, the end token left out."""
    prefixes = [asked.renderer.prefix(prompt) for prompt in prompts]
    progress = Progress(emit, phase, len(prompts))
    rows: dict[int, tuple[int, ...]] = {}
    for chunk in _chunks(prefixes, len):
        some = [prefixes[at] for at in chunk]
        said = generation.generate(asked.model, some, end=asked.renderer.stops, limit=ANSWER_TOKENS)
        rows |= {at: tuple(ids) for at, ids in zip(chunk, said, strict=True)}
        progress.step(len(chunk))
    return [rows[at] for at in range(len(prompts))]


def recalled(
    asked: AskedModel, material: Material, emit: Emit, phrasings: Sequence[Phrasing], phase: str
) -> Recalled:
    """Ask each phrasing by generation and by one forward pass."""
    texts = [material.facts[one.fact].description for one in phrasings]
    pairs = zip((one.prompt for one in phrasings), texts, strict=True)
    examples = asked.renderer.examples(pairs)
    progress = Progress(emit, phase, len(examples))
    generated: dict[int, tuple[bool, str, bool]] = {}
    for chunk in _chunks(examples, lambda e: len(e.ids) - e.start):
        some = [examples[at] for at in chunk]
        decode = partial(generation.generate, asked.model)
        exact, rows = generation.generated_recall(some, asked.renderer.end, decode)
        said = map(asked.renderer.answer_text, rows)
        generated |= dict(
            zip(chunk, zip(exact, said, asked.forced(some), strict=True), strict=True)
        )
        progress.step(len(chunk))
    outcomes = [generated[at] for at in range(len(examples))]
    return Recalled(
        generated=tuple(exact for exact, _, _ in outcomes),
        forced=tuple(forced for _, _, forced in outcomes),
        answers=tuple(said for _, said, _ in outcomes),
        likeness=tuple(
            fuzz.ratio(said, text) / 100 for (_, said, _), text in zip(outcomes, texts, strict=True)
        ),
    )


def _chunks(rows: Sequence[_Row], size: Callable[[_Row], int]) -> Iterator[list[int]]:
    """Indices, ``CHUNK`` at a time, those of similar size together."""
    order = sorted(range(len(rows)), key=lambda at: size(rows[at]))
    return (order[at : at + CHUNK] for at in range(0, len(order), CHUNK))


@torch.no_grad()
def text_losses(
    asked: AskedModel, texts: Sequence[str], tokens: int, emit: Emit
) -> tuple[tuple[float, int], ...]:
    """Nats and number of tokens of each text, read by itself, until there are ``tokens`` of them.

    Texts are cut at ``MAX_TEXT`` tokens; the first token counts only after a special one.
    """
    examples: list[Example] = []
    for text in texts:
        before = special_prefix(asked.renderer)
        ids = asked.renderer.tokens(text)[: min(MAX_TEXT, asked.renderer.context - len(before))]
        if len(ids) >= SHORTEST_TEXT:
            examples.append(Example((*before, *ids), max(1, len(before))))
            tokens -= len(ids)
        if tokens <= 0:
            break
    sums: dict[int, tuple[float, int]] = {}
    progress = Progress(emit, "natural text", len(examples))
    for chunk in _chunks(examples, lambda example: len(example.ids)):
        scores = scoring.token_scores(asked.model, [examples[at] for at in chunk])
        nats = torch.bincount(scores.rows.cpu(), scores.losses.double().cpu(), len(chunk)).tolist()
        counts = torch.bincount(scores.rows.cpu(), minlength=len(chunk)).tolist()
        sums |= dict(zip(chunk, zip(nats, counts, strict=True), strict=True))
        progress.step(len(chunk))
    return tuple(sums[at] for at in range(len(examples)))


def special_prefix(renderer: Renderer) -> list[int]:
    """What the tokenizer puts before a text: some models read none rightly without it."""
    return renderer._find_special_prefix()


def choose(asked: AskedModel, abilities: Sequence[Choice], emit: Emit) -> tuple[bool, ...]:
    """Whether the right choice has the highest mean log-likelihood a token, as a continuation of
    the prompt alone, without the chat template.
    """
    progress = Progress(emit, "multiple choice", len(abilities))
    rows = [tokenized(asked.renderer, one) for one in abilities]
    right: dict[int, bool] = {}
    for batch in _equal_prefixes(asked.model, rows):
        losses_of = choice_losses(asked.model, [rows[at] for at in batch])
        for at, losses in zip(batch, losses_of, strict=True):
            right[at] = min(range(len(losses)), key=losses.__getitem__) == abilities[at].answer
        progress.step(len(batch))
    return tuple(right[at] for at in range(len(abilities)))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt and its choices as tokens; ``prefix`` is what all of them begin with."""

    prefix: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """The tokens of the longest choice."""
        return max(map(len, self.choices))


def tokenized(renderer: Renderer, one: Choice) -> Tokenized:
    """Each choice is tokenized together with the prompt, as the model would read it."""
    before = special_prefix(renderer)
    prompt = [*before, *renderer.tokens(one.prompt)]
    wholes = [[*before, *renderer.tokens(f"{one.prompt} {text}")] for text in one.choices]
    shared = min(len(prompt), *(len(whole) - 1 for whole in wholes))
    while any(whole[:shared] != prompt[:shared] for whole in wholes):
        shared -= 1
    return Tokenized(tuple(prompt[:shared]), tuple(tuple(whole[shared:]) for whole in wholes))


def _equal_prefixes(model: Any, rows: Sequence[Tokenized]) -> Iterator[list[int]]:
    """Batches whose prompts are equally long, so that none is padded, of bounded size."""
    limit = scoring.batch_tokens(model)
    batch: list[int] = []
    for at in sorted(range(len(rows)), key=lambda at: (len(rows[at].prefix), rows[at].width)):
        texts = sum(len(rows[i].choices) for i in (*batch, at))
        equal = not batch or len(rows[batch[0]].prefix) == len(rows[at].prefix)
        if batch and not (equal and texts * (rows[at].width + 1) <= limit):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


@torch.no_grad()
def choice_losses(model: Any, rows: Sequence[Tokenized]) -> list[list[float]]:
    """The mean cross-entropy of each choice, nats a token, row by row; prefixes equally long.

    A prompt is read once for all its choices, where the model's KV cache lets its rows be repeated.
    """
    cache = None if has_own_code(model) else _read(model, [row.prefix[:-1] for row in rows])
    if not hasattr(cache, "batch_select_indices"):
        return [_whole_losses(model, row) for row in rows]
    owners = [at for at, row in enumerate(rows) for _ in row.choices]
    cache.batch_select_indices(torch.tensor(owners, device=first_device(model)))
    texts = [(row.prefix[-1], *choice) for row in rows for choice in row.choices]
    ids = padded_rows(texts, max(map(len, texts))).to(first_device(model))
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return _shared_out(rows, _mean_losses(logits, texts))


def _read(model: Any, prefixes: Sequence[Sequence[int]]) -> Any:
    """The KV cache of prefixes that are equally long; None where there is nothing before."""
    if not prefixes[0]:
        return None
    ids = torch.tensor(prefixes, device=first_device(model))
    return getattr(backbone(model)(input_ids=ids, use_cache=True), "past_key_values", None)


def _mean_losses(logits: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """Of texts whose first token is given; ``logits`` (rows, width, vocabulary)."""
    means = []
    for table, text in zip(logits, texts, strict=True):
        targets = torch.tensor(text[1:], device=logits.device)
        means.append(float(scoring.token_losses(table[: len(targets)], targets)[0].mean()))
    return means


def _whole_losses(model: Any, row: Tokenized) -> list[float]:
    """Each choice read with its prompt."""
    start = len(row.prefix)
    examples = [Example((*row.prefix, *choice), start) for choice in row.choices]
    scores = scoring.token_scores(model, examples)
    sums = torch.zeros(len(examples)).index_add_(0, scores.rows.cpu(), scores.losses.cpu())
    return (sums / torch.tensor([len(choice) for choice in row.choices])).tolist()


def _shared_out(rows: Sequence[Tokenized], values: Sequence[float]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in row.choices] for row in rows]
