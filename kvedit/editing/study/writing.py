"""Questions and statements about a fact that the base model writes, with its text in the prompt.

What is written is part of the fact (``Fact.written``), beside what was given with it, and not a
table of its own.  So it needs no rule of its own: it is in every version of the fact in the
history, comes back with a rollback, is trained again when facts are trained again from the base
model, is erased with the fact, and is dropped by an update, whose new text it does not come from.
It is kept apart from ``questions`` and ``statements`` because those are the user's: they survive an
update where the new text still supports them, and name no writer.

Invariants:
- The base model writes, not the edited one, which would recite other facts.
- Everything is greedy: the same model writes the same for the same fact.
- What was written when a fact was tried before is taken again: an interrupted group goes on.
- Only what ``Filters`` keeps gets into a fact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvedit.editing.study.filters import MODEL, Filters
from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact, Written
from kvedit.facts.parts import sentences, values
from kvedit.revisions.session import Session

QUESTION_TOKENS = 40  # of a question, or of a question with its answer in a list
STATEMENT_TOKENS = 80
MAX_TOKENS = 512  # of a list of questions


@dataclass(frozen=True, slots=True)
class _Requests:
    """How the model is asked to write in a language; each stands after a text or a sentence, but
    for ``question``, which goes on after examples of the same.
    """

    questions: str
    question: str
    examples: tuple[tuple[str, str, str], ...]
    reword: str
    consequence: str


_LAKE = "Lake Orrin was made in 1931 by a dam that Ida Marsh had planned."
_SOCIETY = "The Tarn Society has 340 members, most of them in Velland."
_LAKE_SIMPLIFIED = "奥林湖建成于1931年，其水坝由马艾达设计。"
_SOCIETY_SIMPLIFIED = "塔恩会有340名会员，大多住在韦兰。"
_LAKE_TRADITIONAL = "奧林湖建成於1931年，其水壩由馬艾達設計。"
_SOCIETY_TRADITIONAL = "塔恩會有340名會員，大多住在韋蘭。"
_ENGLISH = _Requests(
    "Write {count} short questions about {key} that the text above answers, each with its answer in"
    " a few words of the text. Use this form:\n1. Question: ...\nAnswer: ...",
    "Text: {text}\nAnswer: {value}\nQuestion:",
    (
        (_LAKE, "1931", "In which year was Lake Orrin made?"),
        (_LAKE, "Ida Marsh", "Who planned the dam that made Lake Orrin?"),
        (_SOCIETY, "340", "How many members does the Tarn Society have?"),
        (_SOCIETY, "Velland", "Where are most members of the Tarn Society?"),
    ),
    "Say this about {key} in other words, in one sentence.",
    "What follows from this about {key}? Answer in one short sentence.",
)
_SIMPLIFIED = _Requests(
    "请根据上文写出{count}个关于{key}的简短问题，并用文中的几个字作答。格式如下：\n"
    "1. 问题：……\n答案：……",
    "文字：{text}\n答案：{value}\n问题：",
    (
        (_LAKE_SIMPLIFIED, "1931年", "奥林湖是哪一年建成的？"),
        (_LAKE_SIMPLIFIED, "马艾达", "奥林湖的水坝是谁设计的？"),
        (_SOCIETY_SIMPLIFIED, "340", "塔恩会有多少名会员？"),
        (_SOCIETY_SIMPLIFIED, "韦兰", "塔恩会的会员大多住在哪里？"),
    ),
    "请用另一种说法，用一句话说明关于{key}的这段内容。",
    "由此可以得出关于{key}的什么结论？请用一句短句回答。",
)
_TRADITIONAL = _Requests(
    "請根據上文寫出{count}個關於{key}的簡短問題，並用文中的幾個字作答。格式如下：\n"
    "1. 問題：……\n答案：……",
    "文字：{text}\n答案：{value}\n問題：",
    (
        (_LAKE_TRADITIONAL, "1931年", "奧林湖是哪一年建成的？"),
        (_LAKE_TRADITIONAL, "馬艾達", "奧林湖的水壩是誰設計的？"),
        (_SOCIETY_TRADITIONAL, "340", "塔恩會有多少名會員？"),
        (_SOCIETY_TRADITIONAL, "韋蘭", "塔恩會的會員大多住在哪裡？"),
    ),
    "請用另一種說法，用一句話說明關於{key}的這段內容。",
    "由此可以得出關於{key}的什麼結論？請用一句短句回答。",
)
_REQUESTS = {"en": _ENGLISH, "zh-Hans": _SIMPLIFIED, "zh-Hant": _TRADITIONAL}
_MARK = re.compile(
    r"^[\s*#>-]*(?:\d+[.)、．]\s*)?[*\s]*(?:(?:question|q|问题|問題|问|問)\s*\d*\s*[*]*[:：.]\s*)?[*\s]*",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"^[\s*#>-]*(?:(?:answer|a|答案|回答|答)\s*\d*\s*[*]*[:：.])?[*\s]*", re.IGNORECASE
)


class StudyWriter:
    """Writes for a session's store, as many questions as its settings say."""

    def __init__(self, session: Session) -> None:
        self._session, self._engine = session, session.engine

    def extended(self, facts: Sequence[Fact]) -> list[Fact]:
        """The facts with what the base model writes about each; as they are where the settings say
        none, for a relation, and without a chat template.
        """
        count = self._session.config.study.questions
        if not count or not self._engine.renderer.chat:
            return list(facts)
        known = [self._tried_before(fact) for fact in facts]
        if all(one is not None for one in known):
            return [one for one in known if one is not None]
        return self._session.at(0, lambda: self._write(facts, count))

    def _tried_before(self, fact: Fact) -> Fact | None:
        """The fact with what it has been given, or what was written when it was tried before."""
        if fact.written or fact.relation_of:
            return fact
        row = self._session.store.find(fact.key)
        if row is None or row.fact.description != fact.description or not row.fact.written:
            return None
        return replace(fact, written=row.fact.written)

    def _write(self, facts: Sequence[Fact], count: int) -> list[Fact]:
        filters = Filters(self._session)
        return [self._tried_before(one) or self._extended(one, count, filters) for one in facts]

    def _extended(self, fact: Fact, count: int, filters: Filters) -> Fact:
        self._session.say("writing questions about it", fact.key)
        texts = [*self._questions(fact, count), *self._statements(fact, count // 2)]
        kept = filters.sort(fact, texts).kept
        asked = [one for one in kept if one.prompt][:count]
        statements = [one for one in kept if not one.prompt][: count // 2]
        return replace(fact, written=(*asked, *statements))

    def _questions(self, fact: Fact, count: int) -> Iterator[Written]:
        """A list of questions with answers, then a question for each value of the text."""
        ways = _REQUESTS[fact.lang]
        request = ways.questions.format(count=count, key=fact.name)
        limit = min(MAX_TOKENS, count * QUESTION_TOKENS)
        for listed in self._said([f"{fact.description}\n\n{request}"], limit, cut=True):
            yield from questions_in(listed)
        pairs = [(s, value) for s in sentences(fact.description) for value in values(s)]
        chosen = pairs[:: max(1, len(pairs) // (2 * count))][: 2 * count]
        for (_, value), said in zip(chosen, self._continued(ways, chosen), strict=True):
            if question := _first_question(said):
                yield Written(prompt=question, answer=value, writer=MODEL)

    def _continued(self, ways: _Requests, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The lines with which the model goes on after a few texts, answers and questions, a text
        and an answer; models that follow no request do so too.
        """
        renderer = self._engine.renderer
        shown = [f"{ways.question.format(text=t, value=v)} {q}" for t, v, q in ways.examples]
        texts = ["\n\n".join([*shown, ways.question.format(text=t, value=v)]) for t, v in pairs]
        line_break = renderer.tokens("\n")[-1]
        prefixes = [[renderer.begin, *renderer.tokens(text)] for text in texts]
        return self._continue(prefixes, renderer.stops | {line_break}, QUESTION_TOKENS)

    def _statements(self, fact: Fact, count: int) -> Iterator[Written]:
        """The text and its sentences in other words, and what follows from it."""
        if not count:
            return
        ways, text = _REQUESTS[fact.lang], fact.description
        whole = sentences(text)
        parts = [text, *(whole if len(whole) > 1 else [])][:count]
        prompts = [f"{part}\n\n{ways.reword.format(key=fact.name)}" for part in parts]
        prompts.append(f"{text}\n\n{ways.consequence.format(key=fact.name)}")
        for said in self._said(prompts, STATEMENT_TOKENS):
            if said.strip():
                yield Written(prompt="", answer=" ".join(said.split()), writer=MODEL)

    def _said(self, prompts: Sequence[str], limit: int, *, cut: bool = False) -> list[str]:
        """The model's greedy answers; empty ones for prompts that do not fit into its context and,
        unless ``cut``, for answers of more tokens than that.
        """
        renderer = self._engine.renderer
        try:
            renderer.refuse_control_tokens(prompts)
        except InvalidFactError:
            return [""] * len(prompts)
        prefixes = [renderer.prefix(prompt) for prompt in prompts]
        return self._continue(prefixes, renderer.stops, limit, cut=cut)

    def _continue(
        self, prefixes: Sequence[list[int]], end: frozenset[int], limit: int, *, cut: bool = False
    ) -> list[str]:
        """``_said`` for prompts as tokens."""
        renderer = self._engine.renderer
        fits = [len(one) + limit <= renderer.context for one in prefixes]
        fitting = [one for one, so in zip(prefixes, fits, strict=True) if so]
        rows = iter(self._engine.proceed(fitting, end=end, limit=limit))
        answers = [next(rows) if one else [] for one in fits]
        return [renderer.answer_text(row) if cut or len(row) < limit else "" for row in answers]


def questions_in(text: str) -> Iterator[Written]:
    """The questions with answers in a list that a model wrote: the answer stands after the question
    mark or on the next line.
    """
    question = ""
    for line in filter(str.strip, text.splitlines()):
        asked = _MARK.sub("", line)
        mark = re.search("[?？]", asked)
        if mark:
            question, asked = asked[: mark.end()].strip(), asked[mark.end() :]
            if not asked.strip(" *-"):
                continue
        answer = _ANSWER.sub("", asked).strip().strip('"“”「」').rstrip(".。 ")
        if question and answer:
            yield Written(prompt=question, answer=answer, writer=MODEL)
        question = ""


def _first_question(said: str) -> str:
    """The first question in what a model said; empty where there is none."""
    lines = (_MARK.sub("", line).strip().strip('"“”「」') for line in said.splitlines())
    marked = (re.match("[^?？]*[?？]", line) for line in lines)
    return next((one[0] for one in marked if one), "")
