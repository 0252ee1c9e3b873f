"""Protected texts: control texts and locality probes, what of them counts, and which are known.

Nobody has the training data of a model from a hub, so the texts come from the model (see
``questions`` and ``sampling``) or from the user.

Invariants:
- Of a text that was cut the end is not known: no end token follows it.
- Of a locality probe the tokens that the model was not sure of are given, not asked.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvedit.errors import InvalidFactError
from kvedit.files import read_text
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import token_scores

EXTRACTED = "extracted"  # the source of texts from knowledge extraction; never probed
INVENTED = "invented"  # the source of answers about names that mean nothing
PROSE = "prose"  # the source of shipped texts that answer no question
MODEL_SOURCES = frozenset(
    {"drawn", "shipped", "free", "asked", INVENTED, PROSE, EXTRACTED}
)  # texts that no user gave
CUT = ", cut"  # after the source: the answer goes on
_AFTER = re.compile(", after ([0-9]+)$")  # after that: so many tokens are given
KNOWN_LOSS = 0.1  # nats a token: the model knows an answer whose mean loss is below it


@dataclass(frozen=True, slots=True)
class Protected:
    """A prompt with the answer that must not change; ``prompt`` is empty for free text."""

    prompt: str
    answer: str
    source: str

    @property
    def origin(self) -> str:
        """The source without what it says of the answer's tokens."""
        name = self.source.partition(CUT)[0]
        return name if name in MODEL_SOURCES else self.source

    @property
    def is_cut(self) -> bool:
        """Whether the answer goes on."""
        return self.origin != self.source

    @property
    def given(self) -> int:
        """How many of the answer's first tokens are given, not asked."""
        given = _AFTER.search(self.source) if self.is_cut else None
        return int(given[1]) if given else 0


def after(tokens: int) -> str:
    """What follows the source of a cut text of which so many tokens are given."""
    return f", after {tokens}"


@dataclass(frozen=True, slots=True)
class ProtectedSet:
    """Control texts, for the Fisher moments and the KL, and locality probes, only ever probed."""

    control: tuple[Protected, ...]
    locality: tuple[Protected, ...]


def example(renderer: Renderer, text: Protected) -> Example:
    """A protected text as tokens; free text begins after the model's own first token."""
    if text.prompt:
        whole = renderer.example(text.prompt, text.answer, ended=not text.is_cut)
        return replace(whole, start=whole.start + text.given)
    ids = (renderer.begin, *renderer.tokens(text.answer)[: renderer.context - 2])
    return Example(ids if text.is_cut else (*ids, renderer.end), 1, "", text.answer)


def known(base: BaseModel, renderer: Renderer, texts: Sequence[Protected]) -> tuple[Protected, ...]:
    """The user's texts, and of the model's own one for each answer that it is confident of.

    Many sampled answers are guesses.  Protecting those costs more than protecting knowledge, since
    a guess hangs on numerical ties.  Extracted texts were filtered when they were extracted.
    """
    given = [text for text in texts if text.origin not in MODEL_SOURCES]
    answers = {text.answer for text in given}
    rest = [text for text in texts if text.origin in MODEL_SOURCES and text.answer not in answers]
    sampled = [text for text in rest if text.origin != EXTRACTED]
    by_answer = {text.answer: text for text in confident(base, renderer, sampled)}
    for text in rest:
        if text.origin == EXTRACTED:
            by_answer.setdefault(text.answer, text)
    return (*given, *by_answer.values())


def confident(
    base: BaseModel, renderer: Renderer, texts: Sequence[Protected]
) -> tuple[Protected, ...]:
    """The texts whose answers the model is confident of, one for each answer."""
    losses = mean_losses(base, [example(renderer, text) for text in texts])
    bound = max_confident_loss(losses)
    by_answer: dict[str, Protected] = {}
    for text, loss in zip(texts, losses.tolist(), strict=True):
        if loss < bound:
            by_answer.setdefault(text.answer, text)
    return tuple(by_answer.values())


def max_confident_loss(losses: torch.Tensor) -> float:
    """The mean loss below which an answer counts as confident: the median of ``losses`` for a model
    that is confident of few answers.
    """
    return max(KNOWN_LOSS, float(losses.median())) if len(losses) else KNOWN_LOSS


@torch.no_grad()
def mean_losses(base: BaseModel, examples: Sequence[Example]) -> torch.Tensor:
    """(N,): the mean cross-entropy of each answer's tokens, nats a token."""
    if not examples:
        return torch.empty(0)
    scores = token_scores(base.model, examples)
    sums = torch.zeros(len(examples)).index_add_(0, scores.rows.cpu(), scores.losses.cpu())
    return sums / torch.tensor([len(one.ids) - one.start for one in examples])


def read_file(path: Path) -> list[Protected]:
    """A user's texts: JSON Lines with ``prompt`` and ``answer``, or plain text, one text per line.

    Raises InvalidFactError, naming the line.
    """
    lines = enumerate(read_text(path).splitlines(), 1)
    return [_read(line, f"{path}, line {n}", path.name) for n, line in lines if line.strip()]


def _read(line: str, where: str, source: str) -> Protected:
    if not line.lstrip().startswith("{"):
        return Protected("", line.strip(), source)
    try:
        row = json.loads(line)
        prompt, answer = row["prompt"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidFactError(
            f"{where} is not a protected text", hint='Write {"prompt": "...", "answer": "..."}.'
        ) from error
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
        raise InvalidFactError(
            f"{where}: prompt and answer must be texts",
            hint='Write {"prompt": "...", "answer": "..."}.',
        )
    return Protected(prompt, answer, source)
