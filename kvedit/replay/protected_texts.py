"""The text that must stay: what the base model says by itself, made once when a store is made.

Nobody has the training data of a model from a hub, so the model is asked instead: questions are
drawn from it (it continues an empty user turn, as in Magpie, arXiv:2406.08464), it answers them and
the shipped questions greedily, and it writes freely from its beginning-of-sequence token.

Invariants:
- Locality probes and control texts are disjoint, and no two texts have the same prompt.
- The same model, settings and seed give the same texts on the same machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvedit.config import ProtectConfig
from kvedit.errors import InvalidFactError
from kvedit.model.devices import generator
from kvedit.model.generation import generate
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import recall, token_scores

SHIPPED = Path(__file__).parents[1] / "data" / "protected_prompts.txt"
QUESTION_TOKENS = 64
QUESTION_TEMPERATURE = 0.7  # lower ones name more of what the model knows, but repeat themselves
ANSWER_TOKENS = 256
LONG = 16  # tokens from which on an answer counts as long
EXTRACTED = "extracted"  # the source of what knowledge extraction brought; never measured again
MADE = frozenset({"drawn", "shipped", "free", EXTRACTED})  # sources of what no user gave
SURE = 0.1  # nats a token: an answer that costs the model less is one that it knows
FIRM = 1.0  # logits by which a locality probe's answer must lead
LOCALITY_LONG = 0.5  # the share of locality probes with a long answer


@dataclass(frozen=True, slots=True)
class Protected:
    """A text that must stay; ``prompt`` is empty for free text."""

    prompt: str
    answer: str
    source: str


@dataclass(frozen=True, slots=True)
class ProtectedSet:
    """Texts for the curvature, and others that are only ever probed."""

    control: tuple[Protected, ...]
    locality: tuple[Protected, ...]


Progress = Callable[[str], None]


def make(
    base: BaseModel,
    renderer: Renderer,
    config: ProtectConfig,
    *,
    extra: Sequence[Protected] = (),
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> ProtectedSet:
    """Let the model say what it knows; ``extra`` are the user's own texts, all of them kept."""
    chance = generator(base.model, seed)
    progress("drawing questions from the model")
    questions = draw_questions(base, renderer, config.samples, chance)
    drawn = list(dict.fromkeys(readable(renderer, questions)))
    shipped = SHIPPED.read_text(encoding="utf-8").splitlines()
    taken = {text.prompt for text in extra}
    progress(f"answering {len(drawn)} questions")
    answered = [t for t in answer_all(base, renderer, drawn, "drawn") if t.prompt not in taken]
    long = [t for t in answered if len(renderer.tokens(t.answer)) >= LONG]
    short = [t for t in answered if len(renderer.tokens(t.answer)) < LONG]
    rng = random.Random(seed)
    rng.shuffle(long)
    rng.shuffle(short)
    wanted = round(config.locality_probes * LOCALITY_LONG)
    far = _robust(base, renderer, long, wanted)
    near = _robust(base, renderer, short, config.locality_probes - len(far))
    locality = (*far, *near)
    long = [t for t in long if t not in far]
    short = [t for t in short if t not in near]
    progress("writing freely")
    asked = answer_all(base, renderer, [p for p in shipped if p not in taken], "shipped")
    known = {t.prompt for t in answered}
    control = (
        *extra,
        *long[: config.long_answers],
        *short[: config.short_answers],
        *(t for t in asked if t.prompt not in known),
        *write_freely(base, renderer, config.free_texts, chance),
    )
    return ProtectedSet(control, locality)


def example(renderer: Renderer, text: Protected) -> Example:
    """A protected text as tokens; free text begins after the model's own first token."""
    if text.prompt:
        return renderer.example(text.prompt, text.answer)
    ids = (renderer.begin, *renderer.tokens(text.answer)[: renderer.context - 2], renderer.end)
    return Example(ids, 1, "", text.answer)


def known(base: BaseModel, renderer: Renderer, texts: Sequence[Protected]) -> tuple[Protected, ...]:
    """What the model says because it knows it: answers that it is sure of, one text for each.

    Much of what is drawn from a model is made up, and to hold it to that costs more than holding it
    to what it knows, since a guess hangs on near-ties.  A model that is sure of little is held to
    the surer half; what a user gave is left as it is, and what is recited was looked at before.
    """
    given = [text for text in texts if text.source not in MADE]
    answers = {text.answer for text in given}
    made = [text for text in texts if text.source in MADE and text.answer not in answers]
    drawn = [text for text in made if text.source != EXTRACTED]
    found = {text.answer: text for text in surely(base, renderer, drawn)}
    for text in made:
        if text.source == EXTRACTED:
            found.setdefault(text.answer, text)
    return (*given, *found.values())


def surely(
    base: BaseModel, renderer: Renderer, texts: Sequence[Protected]
) -> tuple[Protected, ...]:
    """The texts whose answers the model is sure of, one for each answer."""
    costs = costs_of(base, [example(renderer, text) for text in texts])
    bound = sure_bound(costs)
    found: dict[str, Protected] = {}
    for text, cost in zip(texts, costs.tolist(), strict=True):
        if cost < bound:
            found.setdefault(text.answer, text)
    return tuple(found.values())


def sure_bound(costs: torch.Tensor) -> float:
    """What an answer costs at most that the model is sure of; for a model that is sure of little,
    the median.
    """
    return max(SURE, float(costs.median())) if len(costs) else SURE


@torch.no_grad()
def costs_of(base: BaseModel, examples: Sequence[Example]) -> torch.Tensor:
    """(N,): the mean cross-entropy of each answer's tokens, nats a token."""
    if not examples:
        return torch.empty(0)
    scores = token_scores(base.model, examples)
    rows, losses = scores.rows.cpu(), scores.losses.cpu()
    sums, counts = torch.zeros(2, len(examples))
    sums.index_add_(0, rows, losses)
    counts.index_add_(0, rows, torch.ones_like(losses))
    found: torch.Tensor = sums / counts
    return found


def _robust(
    base: BaseModel, renderer: Renderer, texts: Sequence[Protected], count: int
) -> list[Protected]:
    """Up to ``count`` texts that the model is sure of, at most half of those there are.

    A made-up answer that hangs on a near-tie says nothing about what was lost when it changes.
    """
    drawn = texts[: min(4 * count, len(texts) // 2)]
    outcomes = recall(base.model, [example(renderer, text) for text in drawn])
    robust = [t for t, o in zip(drawn, outcomes, strict=True) if o.margin >= FIRM]
    return robust[:count]


def draw_questions(
    base: BaseModel,
    renderer: Renderer,
    count: int,
    chance: torch.Generator,
    temperature: float = QUESTION_TEMPERATURE,
) -> list[list[int]]:
    """What the model would have a user ask, as tokens: its continuation of an empty user turn.

    Those left out that did not come to an end; none at all without a chat template.
    """
    opening = renderer.empty_user_turn()
    if opening is None:
        return []
    before, after = opening
    found = generate(
        base.model,
        [before] * count,
        end=after,
        limit=QUESTION_TOKENS,
        temperature=temperature,
        generator=chance,
    )
    return [ids for ids in found if len(ids) < QUESTION_TOKENS]


def readable(renderer: Renderer, questions: Iterable[Sequence[int]]) -> Iterator[str]:
    """Questions as texts, in order; those left out that are no text."""
    for ids in questions:
        text = renderer.text(ids).strip()
        if text and "\ufffd" not in text:
            yield text


def answer_all(
    base: BaseModel, renderer: Renderer, prompts: Sequence[str], source: str
) -> list[Protected]:
    """The model's greedy answers, those left out that did not come to an end."""
    prefixes = [renderer.prefix(prompt) for prompt in prompts]
    limit = min(ANSWER_TOKENS, renderer.context // 2)
    answers = generate(base.model, prefixes, end=renderer.end, limit=limit)
    found = []
    for prompt, ids in zip(prompts, answers, strict=True):
        text = renderer.answer_text(ids)
        if 0 < len(ids) < limit and text and _says(renderer, prompt, text) == ids:
            found.append(Protected(prompt, text, source))
    return found


def _says(renderer: Renderer, prompt: str, text: str) -> list[int]:
    """The tokens of an answer as an example of it would have them."""
    made = renderer.example(prompt, text, ended=False)
    return list(made.ids[made.start :])


def write_freely(
    base: BaseModel, renderer: Renderer, count: int, chance: torch.Generator
) -> list[Protected]:
    if count == 0:
        return []
    prefixes = [[renderer.begin]] * count
    texts = generate(
        base.model, prefixes, end=renderer.end, limit=128, temperature=1.0, generator=chance
    )
    kept = dict.fromkeys(text for ids in texts if (text := renderer.text(ids).strip()))
    return [Protected("", text, "free") for text in kept]


def read_file(path: Path) -> list[Protected]:
    """A user's own texts: JSON Lines with ``prompt`` and ``answer``, or plain text, a text a line.

    Raises InvalidFactError, naming the line.
    """
    from kvedit.files import read_text

    texts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            texts.append(Protected("", line.strip(), path.name))
            continue
        texts.append(_from_json(line, f"{path}, line {number}", path.name))
    return texts


def _from_json(line: str, where: str, source: str) -> Protected:
    try:
        row = json.loads(line)
        prompt, answer = row["prompt"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidFactError(
            f"{where} is not a protected text", hint='Write {"prompt": "...", "answer": "..."}.'
        ) from error
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
        raise InvalidFactError(f"{where}: prompt and answer must be texts")
    return Protected(prompt, answer, source)
