"""Protected texts: control texts and locality probes from the base model, made with a store.

Nobody has the training data of a model from a hub, so the texts come from the model: it samples
questions (continuing an empty user turn, as in Magpie, arXiv:2406.08464), answers them and the
shipped questions greedily, and samples free text after its beginning-of-sequence token.

Invariants:
- Locality probes and control texts are disjoint, and no two texts have the same prompt.
- The same model, settings and seed give the same texts on the same machine.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvedit.config import ProtectConfig
from kvedit.errors import InvalidFactError
from kvedit.files import read_text
from kvedit.model.devices import generator
from kvedit.model.generation import generate
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.model.scoring import recall, token_scores

SHIPPED_PROMPTS = Path(__file__).parents[1] / "data" / "protected_prompts.txt"
QUESTION_TOKENS = 64  # at most; longer questions are left out
QUESTION_TEMPERATURE = 0.7  # lower ones give more of what the model knows, but repeat themselves
ANSWER_TOKENS = 256  # at most; longer answers are left out
LONG_ANSWER_TOKENS = 16  # from which on an answer counts as long
MAX_FREE_TOKENS = 128
EXTRACTED = "extracted"  # the source of texts from knowledge extraction; never probed
MODEL_SOURCES = frozenset({"drawn", "shipped", "free", EXTRACTED})  # texts that no user gave
KNOWN_LOSS = 0.1  # nats a token: the model knows an answer whose mean loss is below it
MIN_LOCALITY_MARGIN = 1.0  # logits: a smaller margin may be a guess that any edit changes
LONG_LOCALITY_RATIO = 0.5  # of locality probes have a long answer


@dataclass(frozen=True, slots=True)
class Protected:
    """A prompt with the answer that must not change; ``prompt`` is empty for free text."""

    prompt: str
    answer: str
    source: str


@dataclass(frozen=True, slots=True)
class ProtectedSet:
    """Control texts, for the Fisher moments and the KL, and locality probes, only ever probed."""

    control: tuple[Protected, ...]
    locality: tuple[Protected, ...]


def make(
    base: BaseModel,
    renderer: Renderer,
    config: ProtectConfig,
    *,
    extra: Sequence[Protected] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> ProtectedSet:
    """Sample texts from the model; ``extra`` are the user's texts, all of which are included."""
    draws = generator(base.model, seed)
    progress(f"sampling {config.samples:,} questions from the model")
    questions = draw_questions(base, renderer, config.samples, draws)
    drawn = list(dict.fromkeys(readable(renderer, questions)))
    shipped = SHIPPED_PROMPTS.read_text(encoding="utf-8").splitlines()
    taken = {text.prompt for text in extra}
    progress(f"answering {len(drawn):,} questions")
    answered = [t for t in answer_all(base, renderer, drawn, "drawn") if t.prompt not in taken]
    long = [t for t in answered if len(renderer.tokens(t.answer)) >= LONG_ANSWER_TOKENS]
    short = [t for t in answered if len(renderer.tokens(t.answer)) < LONG_ANSWER_TOKENS]
    rng = random.Random(seed)
    rng.shuffle(long)
    rng.shuffle(short)
    count = round(config.locality_probes * LONG_LOCALITY_RATIO)
    long_probes = _robust(base, renderer, long, count)
    short_probes = _robust(base, renderer, short, config.locality_probes - len(long_probes))
    progress(f"answering {len(shipped):,} shipped questions and sampling free text")
    shipped_texts = answer_all(base, renderer, [p for p in shipped if p not in taken], "shipped")
    prompts = {t.prompt for t in answered}
    control = (
        *extra,
        *[t for t in long if t not in long_probes][: config.long_answers],
        *[t for t in short if t not in short_probes][: config.short_answers],
        *(t for t in shipped_texts if t.prompt not in prompts),
        *write_freely(base, renderer, config.free_texts, draws),
    )
    return ProtectedSet(control, (*long_probes, *short_probes))


def example(renderer: Renderer, text: Protected) -> Example:
    """A protected text as tokens; free text begins after the model's own first token."""
    if text.prompt:
        return renderer.example(text.prompt, text.answer)
    ids = (renderer.begin, *renderer.tokens(text.answer)[: renderer.context - 2], renderer.end)
    return Example(ids, 1, "", text.answer)


def known(base: BaseModel, renderer: Renderer, texts: Sequence[Protected]) -> tuple[Protected, ...]:
    """The user's texts, and of the model's own one for each answer that it is confident of.

    Many sampled answers are guesses.  Protecting those costs more than protecting knowledge, since
    a guess hangs on numerical ties.  Extracted texts were filtered when they were extracted.
    """
    given = [text for text in texts if text.source not in MODEL_SOURCES]
    answers = {text.answer for text in given}
    rest = [text for text in texts if text.source in MODEL_SOURCES and text.answer not in answers]
    sampled = [text for text in rest if text.source != EXTRACTED]
    by_answer = {text.answer: text for text in confident(base, renderer, sampled)}
    for text in rest:
        if text.source == EXTRACTED:
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


def _robust(
    base: BaseModel, renderer: Renderer, texts: Sequence[Protected], count: int
) -> list[Protected]:
    """Up to ``count`` texts with a large margin, at most half of the given ones.

    A guess that hangs on a numerical tie may change without any loss of knowledge.
    """
    drawn = texts[: min(4 * count, len(texts) // 2)]
    outcomes = recall(base.model, [example(renderer, text) for text in drawn])
    robust = [t for t, o in zip(drawn, outcomes, strict=True) if o.margin >= MIN_LOCALITY_MARGIN]
    return robust[:count]


def draw_questions(
    base: BaseModel,
    renderer: Renderer,
    count: int,
    rng: torch.Generator,
    temperature: float = QUESTION_TEMPERATURE,
) -> list[list[int]]:
    """Questions as tokens: the model's continuations of an empty user turn.

    Unfinished ones are left out; there are none without a chat template.
    """
    opening = renderer.empty_user_turn()
    if opening is None:
        return []
    before, after = opening
    questions = generate(
        base.model, [before] * count, end=after,
        limit=QUESTION_TOKENS, temperature=temperature, generator=rng,
    )  # fmt: skip
    return [ids for ids in questions if len(ids) < QUESTION_TOKENS]


def readable(renderer: Renderer, questions: Iterable[Sequence[int]]) -> Iterator[str]:
    """Questions as texts, in order, without empty ones and those that are not valid text."""
    texts = (renderer.text(ids).strip() for ids in questions)
    return (text for text in texts if text and "\ufffd" not in text)


def answer_all(
    base: BaseModel, renderer: Renderer, prompts: Sequence[str], source: str
) -> list[Protected]:
    """The model's greedy answers, without unfinished ones."""
    prefixes = [renderer.prefix(prompt) for prompt in prompts]
    limit = min(ANSWER_TOKENS, renderer.context // 2)
    answers = generate(base.model, prefixes, end=renderer.end, limit=limit)
    texts = []
    for prompt, ids in zip(prompts, answers, strict=True):
        text = renderer.answer_text(ids)
        if 0 < len(ids) < limit and text:
            answer = renderer.example(prompt, text, ended=False)
            if answer.ids[answer.start :] == tuple(ids):  # the text is tokenized as generated
                texts.append(Protected(prompt, text, source))
    return texts


def write_freely(
    base: BaseModel, renderer: Renderer, count: int, rng: torch.Generator
) -> list[Protected]:
    """Up to ``count`` different texts sampled without a prompt."""
    if count == 0:
        return []
    rows = generate(
        base.model, [[renderer.begin]] * count, end=renderer.end,
        limit=MAX_FREE_TOKENS, temperature=1.0, generator=rng,
    )  # fmt: skip
    texts = dict.fromkeys(text for ids in rows if (text := renderer.text(ids).strip()))
    return [Protected("", text, "free") for text in texts]


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
        raise InvalidFactError(f"{where}: prompt and answer must be texts")
    return Protected(prompt, answer, source)
