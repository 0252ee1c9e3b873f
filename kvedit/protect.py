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
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvedit.config import ProtectConfig
from kvedit.errors import InvalidFactError
from kvedit.models import BaseModel
from kvedit.probes import generate, recall
from kvedit.prompts import Example, Renderer

SHIPPED = Path(__file__).parent / "data" / "protected_prompts.txt"
QUESTION_TOKENS = 64
QUESTION_TEMPERATURE = 0.7  # lower ones name more of what the model knows, but repeat themselves
ANSWER_TOKENS = 256
LONG = 16  # tokens from which on an answer counts as long
DRAFTS_A_TEXT = 4
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
    generator = torch.Generator().manual_seed(seed)
    progress("drawing questions from the model")
    drawn = _questions(base, renderer, config.drafts, generator)
    shipped = SHIPPED.read_text(encoding="utf-8").splitlines()
    taken = {text.prompt for text in extra}
    progress(f"answering {len(drawn)} questions")
    answered = [t for t in _answers(base, renderer, drawn, "drawn") if t.prompt not in taken]
    long = [t for t in answered if len(renderer.tokens(t.answer)) >= LONG]
    short = [t for t in answered if len(renderer.tokens(t.answer)) < LONG]
    rng = random.Random(seed)
    rng.shuffle(long)
    rng.shuffle(short)
    wanted = round(config.locality * LOCALITY_LONG)
    far = _firm(base, renderer, long, wanted)
    near = _firm(base, renderer, short, config.locality - len(far))
    locality = (*far, *near)
    long = [t for t in long if t not in far]
    short = [t for t in short if t not in near]
    progress("writing freely")
    asked = _answers(base, renderer, [p for p in shipped if p not in taken], "shipped")
    known = {t.prompt for t in answered}
    control = (
        *extra,
        *long[: config.long],
        *short[: config.short],
        *(t for t in asked if t.prompt not in known),
        *_free(base, renderer, config.free, generator),
    )
    return ProtectedSet(control, locality)


def more(
    base: BaseModel,
    renderer: Renderer,
    drafts: int,
    *,
    known: Container[str],
    seed: int,
    progress: Progress = lambda text: None,
) -> tuple[Protected, ...]:
    """Let the model say more, from so many questions; ``known`` are prompts to leave out.

    A model without a chat template writes freely instead, a text for ``DRAFTS_A_TEXT`` drafts.
    """
    generator = torch.Generator().manual_seed(seed)
    progress(f"drawing {drafts} more questions from the model")
    drawn = _questions(base, renderer, drafts, generator)
    if not drawn:
        return tuple(_free(base, renderer, drafts // DRAFTS_A_TEXT, generator))
    new = [prompt for prompt in drawn if prompt not in known]
    progress(f"answering {len(new)} questions")
    return tuple(_answers(base, renderer, new, "drawn"))


def example(renderer: Renderer, text: Protected) -> Example:
    """A protected text as tokens; free text begins after the model's own first token."""
    if text.prompt:
        return renderer.example(text.prompt, text.answer)
    ids = (renderer.begin, *renderer.tokens(text.answer)[: renderer.context - 2], renderer.end)
    return Example(ids, 1, "", text.answer)


def _firm(
    base: BaseModel, renderer: Renderer, texts: Sequence[Protected], count: int
) -> list[Protected]:
    """Up to ``count`` texts that the model is sure of, at most half of those there are.

    A made-up answer that hangs on a near-tie says nothing about what was lost when it changes.
    """
    drawn = texts[: min(4 * count, len(texts) // 2)]
    outcomes = recall(base.model, [example(renderer, text) for text in drawn])
    firm = [t for t, o in zip(drawn, outcomes, strict=True) if o.margin >= FIRM]
    return firm[:count]


def _questions(
    base: BaseModel, renderer: Renderer, count: int, generator: torch.Generator
) -> list[str]:
    """What the model would have a user ask: its own continuation of an empty user turn."""
    opening = renderer.empty_user_turn()
    if opening is None:
        return []
    before, after = opening
    drawn = generate(
        base.model,
        [before] * count,
        end=after,
        limit=QUESTION_TOKENS,
        temperature=QUESTION_TEMPERATURE,
        generator=generator,
    )
    whole = (renderer.text(ids).strip() for ids in drawn if len(ids) < QUESTION_TOKENS)
    return list(dict.fromkeys(text for text in whole if text and "\ufffd" not in text))


def _answers(
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


def _free(
    base: BaseModel, renderer: Renderer, count: int, generator: torch.Generator
) -> list[Protected]:
    if count == 0:
        return []
    prefixes = [[renderer.begin]] * count
    texts = generate(
        base.model, prefixes, end=renderer.end, limit=128, temperature=1.0, generator=generator
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
