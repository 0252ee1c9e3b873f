"""Questions that a model asks itself, and its answers, many of them decoded together.

Questions are sampled by continuing an empty user turn (as in Magpie, arXiv:2406.08464).  In
``converse`` a row samples a question, is given the tokens that lead to the answer, and answers,
all in one decode: the tokens that every conversation begins with are computed once, no question is
computed twice, and no row is padded, since all are of the same length at every step.

Invariants:
- An answer is the model's own greedy one; one that does not end within the limit is cut there.
- A text has the tokens that were generated, also when it is tokenized again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvedit.errors import TextTooLongError
from kvedit.model.devices import first_device
from kvedit.model.generation import Decoding, generate
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.model.scoring import token_scores
from kvedit.replay.protected_texts import CUT, Protected, after, example

QUESTION_TOKENS = 64  # at most; longer questions are left out
QUESTION_TEMPERATURE = 0.7  # lower ones give more of what the model knows, but repeat themselves
ANSWER_TOKENS = 256  # at most; longer answers are cut
MIN_CUT_TOKENS = 4  # of an answer that is cut; shorter ones say nothing
MAX_LEFT_OUT = 0.3  # of the questions: if more have other tokens, it is the template that does it
MIN_ANSWERED = 8  # rows: a batch goes on until so many have an answer, whatever it takes
MAX_FREE_TOKENS = 128
MIN_LOCALITY_MARGIN = 1.0  # logits: the model is sure of a token from which on it leads by so much
MIN_SURE = 4  # tokens in a row that a locality probe judges, at least
PROBE_REACH = 16  # tokens at the beginning of an answer among which they are taken
MAX_TRIMMED = 3  # tokens at a cut that may be half a character or half a word


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a batch of conversations: its rows, and the most tokens of a question and an answer."""

    rows: int
    question: int
    answer: int
    given: int = 0  # rows whose question is given, beside those that ask


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its answer's tokens and their logit margins, the end token's among them."""

    prompt: str
    ids: tuple[int, ...]  # without the end token
    margins: tuple[float, ...]
    ended: bool
    source: str

    def text(self, renderer: Renderer, tokens: int | None = None) -> Protected | None:
        """The answer, or its first ``tokens`` tokens or a few less, as a text that has these tokens
        when it is tokenized again; None if there is none.
        """
        cut = tokens is not None or not self.ended
        ids = self.ids[:tokens]
        for count in range(len(ids), max(0, len(ids) - MAX_TRIMMED) if cut else len(ids) - 1, -1):
            text = renderer.answer_text(ids[:count])
            if text and _tokens(renderer, self.prompt, text) == ids[:count]:
                return Protected(self.prompt, text, self.source + (CUT if cut else ""))
        return None

    def probe(self, renderer: Renderer) -> Protected | None:
        """The answer as a locality probe: all of it if the model is sure of every token, else the
        longest run of sure tokens near its beginning, given the tokens before it.

        A guess that hangs on a numerical tie may change without any loss of knowledge.
        """
        start, stop = self._sure_run()
        if self.ended and stop - start == len(self.ids) + 1:
            return self.text(renderer)
        text = self.text(renderer, stop)
        if text is None or len(_tokens(renderer, text.prompt, text.answer)) - start < MIN_SURE:
            return None
        return replace(text, source=text.source + after(start)) if start else text

    @property
    def judged(self) -> tuple[int, ...]:
        """The tokens that a probe of it judges."""
        start, stop = self._sure_run()
        return self.ids[start:stop]

    def _sure_run(self) -> tuple[int, int]:
        """The tokens that a probe judges: all with the end, or a run among the first ones."""
        sure = [margin >= MIN_LOCALITY_MARGIN for margin in self.margins]
        if self.ended and sure and all(sure):
            return 0, len(sure)
        return _longest_run(sure[: len(self.ids)][:PROBE_REACH])


def _longest_run(sure: Sequence[bool]) -> tuple[int, int]:
    """Start and stop of the longest run of true values, the first of equally long ones."""
    best, start = (0, 0), 0
    for at, one in enumerate([*sure, False]):
        if not one:
            best = max(best, (start, at), key=lambda run: (run[1] - run[0], -run[0]))
            start = at + 1
    return best


def _tokens(renderer: Renderer, prompt: str, answer: str) -> tuple[int, ...]:
    """The answer's tokens; none where it does not fit, as bytes that are no text may become."""
    try:
        example = renderer.example(prompt, answer, ended=False)
    except TextTooLongError:
        return ()
    return example.ids[example.start :]


@dataclass(slots=True)
class _Row:
    """One conversation as it is decoded."""

    prompt: str | None = None  # not asked yet
    source: str = "drawn"
    question: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)  # tokens to come that lead to the answer
    answer: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    ended: bool = False
    done: bool = False


class _Conversations:
    """Rows that ask and answer; see ``converse``."""

    def __init__(
        self, renderer: Renderer, turn: tuple[list[int], int], limits: Limits, rows: Sequence[_Row]
    ) -> None:
        self._renderer, self._limits = renderer, limits
        self._before, self._after = turn
        self.rows = rows
        self.asked_again: list[str] = []  # questions that have other tokens than were sampled

    def step(self, active: Sequence[_Row], logits: Tensor, rng: torch.Generator) -> Tensor:
        """(rows,): the token that continues each row, by the logits (rows, vocabulary) of what
        comes next; at first these are one row's.
        """
        best = logits.float().topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        asking = [at for at, row in enumerate(active) if row.prompt is None and not row.done]
        of_rows = logits[asking] if len(logits) == len(active) else logits
        sampled = _sample(of_rows, len(asking), QUESTION_TEMPERATURE, rng)
        tokens = (best.indices[:, 0].tolist() * len(active))[: len(active)]
        for at, row in enumerate(active):
            if not row.done and row.given:
                tokens[at] = row.given.pop(0)
            elif not row.done and row.prompt is not None:
                self._answer(row, tokens[at], margins[at])
        for at, token in zip(asking, sampled.tolist(), strict=True):
            tokens[at] = token
            self._ask(active[at], token)
        return torch.tensor(tokens)

    def _ask(self, row: _Row, token: int) -> None:
        if token != self._after:
            row.question.append(token)
            row.done = len(row.question) >= self._limits.question
            return
        asked = [*self._before, *row.question, token]
        text = next(readable(self._renderer, [row.question]), "")
        prefix = self._renderer.prefix(text) if text else []
        row.done = prefix[: len(asked)] != asked
        row.prompt, row.given = text, prefix[len(asked) :]
        if row.done and text:
            self.asked_again.append(text)

    def _answer(self, row: _Row, token: int, margin: float) -> None:
        row.margins.append(margin)
        row.ended = token == self._renderer.end
        if token not in self._renderer.stops:
            row.answer.append(token)
        row.done = token in self._renderer.stops or len(row.answer) >= self._limits.answer

    @property
    def have_answers(self) -> bool:
        """Whether some rows have come to an answer, which would be lost otherwise."""
        begun = sum(len(row.answer) >= MIN_CUT_TOKENS or row.ended for row in self.rows)
        return begun >= min(MIN_ANSWERED, len(self.rows))

    def answered(self) -> Iterator[Answered]:
        """The conversations that have come to an answer, each question once."""
        seen = set()
        for row in self.rows:
            enough = len(row.answer) >= (1 if row.ended else MIN_CUT_TOKENS)
            if row.prompt and enough and row.prompt not in seen:
                seen.add(row.prompt)
                ids, margins = tuple(row.answer), tuple(row.margins)
                yield Answered(row.prompt, ids, margins, row.ended, row.source)


@torch.no_grad()
def converse(
    base: BaseModel,
    renderer: Renderer,
    prompts: Sequence[str],
    limits: Limits,
    rng: torch.Generator,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[list[Answered], list[str]]:
    """Answers to ``prompts``, which are shipped ones, and to questions that ``limits.rows`` sample.

    Once ``is_over``, what was answered by then is kept, cut.  The second result are questions that
    could not be answered in this way: their tokens do not follow those of an empty user turn, or
    are others than were sampled.  A few such questions are left out.
    """
    turn = renderer.empty_user_turn()
    if turn is None:
        return [], list(prompts)
    before = turn[0]
    prefixes = {prompt: renderer.prefix(prompt) for prompt in prompts}
    given = {p: ids[len(before) :] for p, ids in prefixes.items() if ids[: len(before)] == before}
    rows = [_Row(prompt, "shipped", given=list(ids)) for prompt, ids in given.items()]
    rows += [_Row() for _ in range(limits.rows)]
    conversations = _Conversations(renderer, turn, limits, rows)
    _decode(base, conversations, before, rng, is_over)
    others = [prompt for prompt in prompts if prompt not in given]
    if len(conversations.asked_again) > limits.rows * MAX_LEFT_OUT:
        others += conversations.asked_again
    return list(conversations.answered()), others


def _decode(
    base: BaseModel,
    conversations: _Conversations,
    before: Sequence[int],
    rng: torch.Generator,
    is_over: Callable[[], bool],
) -> None:
    """Decode until all rows are done; those that are leave the batch."""
    run, active = Decoding(base.model, [before]), list(conversations.rows)
    device = first_device(base.model)
    while active:
        tokens = conversations.step(active, run.next_logits(), rng).to(device)
        going = [at for at, row in enumerate(active) if not row.done]
        if not going or (is_over() and conversations.have_answers):
            return
        first = run.rows < len(active)  # of one row so far, which now becomes all of them
        # Copying the KV cache costs: it pays once a quarter of the rows are done.
        if not first and (len(going) > len(active) * 3 // 4 or not run.can_select_rows):
            run.append(tokens)
            continue
        rows = torch.tensor(going, device=device)
        run.append(tokens[rows], torch.zeros_like(rows) if first else rows)
        active = [active[at] for at in going]


def _sample(logits: Tensor, count: int, temperature: float, rng: torch.Generator) -> Tensor:
    """(rows,), tokens sampled from logits (rows, vocabulary); or ``count`` of them from one row."""
    if not count:
        return torch.empty(0, dtype=torch.long)
    weights = torch.softmax(logits.float() / temperature, -1)
    each = count if len(weights) == 1 else 1
    return torch.multinomial(weights, each, replacement=each > 1, generator=rng).flatten()


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
    base: BaseModel, renderer: Renderer, prompts: Sequence[str], source: str,
    limit: int = ANSWER_TOKENS,
) -> list[Answered]:  # fmt: skip
    """The model's greedy answers, without their margins."""
    prefixes = [renderer.prefix(prompt) for prompt in prompts]
    limit = min(limit, renderer.context // 2)
    answers = generate(base.model, prefixes, end=renderer.end, limit=limit)
    return [
        Answered(prompt, tuple(ids), (), len(ids) < limit, source)
        for prompt, ids in zip(prompts, answers, strict=True)
        if len(ids) >= (1 if len(ids) < limit else MIN_CUT_TOKENS)
    ]


def with_margins(
    base: BaseModel, renderer: Renderer, answered: Sequence[Answered]
) -> list[Answered]:
    """The answers that are the same when they are tokenized again, with the margins of their tokens
    from one forward pass.
    """
    texts = [(one, text) for one in answered if (text := one.text(renderer))]
    if not texts:
        return []
    scores = token_scores(base.model, [example(renderer, text) for _, text in texts])
    margins = defaultdict[int, list[float]](list)
    for row, margin in zip(scores.rows.tolist(), scores.token_margins.tolist(), strict=True):
        margins[row].append(margin)
    return [replace(one, margins=tuple(margins[at])) for at, (one, _) in enumerate(texts)]


def asked_now(
    base: BaseModel, renderer: Renderer, prompts: Sequence[str], limit: int
) -> list[Protected]:
    """Locality probes from the model's answers to these prompts, with the weights as they are."""
    answered = with_margins(base, renderer, answer_all(base, renderer, prompts, "asked", limit))
    return [probe for one in answered if (probe := one.probe(renderer) or one.text(renderer))]


def write_freely(
    base: BaseModel, renderer: Renderer, count: int, rng: torch.Generator,
    limit: int = MAX_FREE_TOKENS,
) -> list[Protected]:  # fmt: skip
    """Up to ``count`` different texts of up to ``limit`` tokens, sampled without a prompt."""
    if count == 0:
        return []
    rows = generate(
        base.model, [[renderer.begin]] * count, end=renderer.end,
        limit=limit, temperature=1.0, generator=rng,
    )  # fmt: skip
    texts = {text: len(ids) < limit for ids in rows if (text := renderer.text(ids).strip())}
    return [Protected("", text, "free" if ended else f"free{CUT}") for text, ended in texts.items()]
