"""What may be kept of questions and statements that somebody wrote from a fact's description.

Kept is what the text supports.  A question's answer stands in it, or the base model gives it twice,
with the text before the question and after it, and not without the text.  A statement has no
number, date or name that the text does not have, and shares most of its words with it.

Invariants:
- The same rules for every writer, but for one: the base model must answer what it wrote so when it
  reads the text, and not without it.  Of 36 questions that a model of 135M parameters wrote for
  words of a text it gave these words to 7 (roundtrip consistency: Alberti et al.,
  arXiv:1906.05416); "What is the capital of California?" was one it knew, wrongly, without it.
- Nothing kept names another key of the store: it would be trained against that fact.
- Nothing kept is a question that was given, held out, or trained as a phrasing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from kvedit.asking.mentions import NameIndex
from kvedit.editing.study.answers import SLACK
from kvedit.editing.study.examples import text_before
from kvedit.errors import InvalidFactError, TextTooLongError
from kvedit.events import EditReport, JsonDict
from kvedit.facts.fact import Fact, Written
from kvedit.facts.keys import contains_answer, normalise
from kvedit.facts.parts import UNIT, sentences, values
from kvedit.revisions.session import Session

MODEL = "model"  # the writer of what the base model wrote
MAX_NAMES = 16  # that are looked for in one text
SHARED = 0.6  # of a statement's words must stand in the text
REPEATED, UNSUPPORTED = "it is there already", "the text does not support it"
_OF_THE_TEXT = (
    "passage", "the text", "this text", "paragraph", "the article", "the author", "excerpt",
    "文中", "本文", "文章", "短文", "段落", "段话", "段話", "作者", "这段", "這段", "上文",
)  # fmt: skip
"""Words of a question that nobody understands without the text."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A text that was not kept, and why."""

    text: Written
    why: str


@dataclass(frozen=True, slots=True)
class Sorted:
    """What was kept and what was refused, each in its order."""

    kept: tuple[Written, ...] = ()
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True, slots=True)
class StudyReport:
    """What became of texts that were brought for a fact; ``edit`` trained those that were kept."""

    key: str
    texts: Sorted
    edit: EditReport | None = None

    def to_json(self) -> JsonDict:
        """A JSON document; refused texts with their reasons."""
        refused = [{**_document(one.text), "why": one.why} for one in self.texts.refused]
        kept = [_document(one) for one in self.texts.kept]
        outcome = self.edit.outcome if self.edit else "unchanged"
        return {"key": self.key, "outcome": outcome, "kept": kept, "refused": refused}


def _document(text: Written) -> JsonDict:
    return {name: value for name, value in asdict(text).items() if value}


class Filters:
    """Sorts texts for a session's store; the weights in memory must be the base model's."""

    def __init__(self, session: Session) -> None:
        self._store, self._engine = session.store, session.engine

    def sort(self, fact: Fact, texts: Sequence[Written]) -> Sorted:
        """What of some texts may be trained beside a fact; of several answers to a question the
        first that the text supports.
        """
        unfit = {one: self._unfit(fact, one) for one in dict.fromkeys(texts)}
        asked = [one for one, why in unfit.items() if not why and one.prompt]
        supported = dict(zip(asked, self._supported(fact, asked), strict=True))
        kept: dict[str, Written] = {}
        refused = []
        for one, why in unfit.items():
            form = normalise(one.prompt or one.answer)
            if not why and not supported.get(one, True):
                why = UNSUPPORTED
            elif not why and form in kept:
                why = REPEATED
            if why:
                refused.append(Refused(one, why))
            else:
                kept[form] = one
        return Sorted(tuple(kept.values()), tuple(refused))

    def _unfit(self, fact: Fact, one: Written) -> str:
        """Why a text is refused without asking the model; empty if it is not."""
        try:
            self._require_trainable(fact, one)
        except (InvalidFactError, TextTooLongError) as error:
            return error.message
        if self._is_known(fact, one):
            return REPEATED
        if other := self._other_key(fact, f"{one.prompt}\n{one.answer}"):
            return f"it names another key, {other}"
        return _unfit_question(one) if one.prompt else _unfit_statement(fact, one.answer)

    def _require_trainable(self, fact: Fact, one: Written) -> None:
        Fact.create(fact.key, fact.description, lang=fact.lang, written=[one])
        renderer = self._engine.renderer
        if one.prompt:
            renderer.examples([(one.prompt, one.answer)])
        renderer.refuse_control_tokens([one.answer])

    def _is_known(self, fact: Fact, one: Written) -> bool:
        """Whether it is a statement or a question that the fact has, or one of its phrasings."""
        if not one.prompt:
            return normalise(one.answer) in map(normalise, fact.all_statements)
        examples = (*self._engine.examples(fact), *self._engine.paraphrases(fact))
        prompts = [
            *(example.prompt for example in examples),
            *(q.prompt for q in fact.all_questions),
        ]
        return normalise(one.prompt) in map(normalise, prompts)

    def _other_key(self, fact: Fact, text: str) -> str:
        """A key of another fact that a text names; names that are this fact's too do not count."""
        own = {normalise(name) for name in (fact.key, fact.name, *fact.aliases)}
        mentions = self._index_with(fact).mentioned(text, MAX_NAMES)
        own |= {normalise(one.name) for one in mentions if one.key == fact.key}
        others = (m.key for m in mentions if m.key != fact.key and normalise(m.name) not in own)
        return next(others, "")

    def _index_with(self, fact: Fact) -> NameIndex:
        """The names of the store's facts and of this one: no name counts inside a longer one."""
        if fact.key in self._facts:
            return self._index
        return _index_of([*self._facts.values(), fact])

    @cached_property
    def _facts(self) -> dict[str, Fact]:
        rows = [*self._store.facts("committed"), *self._store.facts("pending")]
        return {row.fact.key: row.fact for row in rows}

    @cached_property
    def _index(self) -> NameIndex:
        return _index_of(self._facts.values())

    def _supported(self, fact: Fact, asked: Sequence[Written]) -> list[bool]:
        """Whether the text supports the answers to some questions."""
        stands = {one: contains_answer(fact.description, one.answer) for one in asked}
        unsure = [one for one in asked if not stands[one] or one.writer == MODEL]
        told = self._giving(unsure, lambda prompt: text_before(fact, prompt))
        alone = self._giving(told, lambda prompt: prompt)
        learned = [one for one in told if one not in alone]
        absent = [one for one in learned if not stands[one]]
        twice = self._giving(absent, lambda prompt: f"{prompt}\n\n{fact.description}")
        refused = {*unsure} - {*learned} | {*absent} - {*twice}
        return [one not in refused for one in asked]

    def _giving(self, asked: Sequence[Written], put: Callable[[str], str]) -> list[Written]:
        """The questions to which the model's answer, when they are put so, contains theirs."""
        given = self._contains([(put(one.prompt), one.answer) for one in asked])
        return [one for one, so in zip(asked, given, strict=True) if so]

    def _contains(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the model's greedy answer to each prompt contains what is expected; no for one
        that does not fit into its context.
        """
        renderer = self._engine.renderer
        rows = [(renderer.prefix(p), a, len(renderer.tokens(a)) + SLACK) for p, a in pairs]
        fitting = [row for row in rows if len(row[0]) + row[2] <= renderer.context]
        longest = max((limit for *_, limit in fitting), default=0)
        ids = self._engine.proceed([row[0] for row in fitting], end=renderer.stops, limit=longest)
        said = iter(ids)
        return [
            contains_answer(renderer.answer_text(next(said)[:limit]), answer)
            if len(prefix) + limit <= renderer.context else False
            for prefix, answer, limit in rows
        ]  # fmt: skip


def _index_of(facts: Iterable[Fact]) -> NameIndex:
    named = [(fact.key, (fact.key, fact.name, *fact.aliases)) for fact in facts]
    return NameIndex((name, key) for key, names in named for name in dict.fromkeys(names))


def refused_all(texts: Sequence[Written], why: str) -> Sorted:
    """All of some texts refused for one reason."""
    return Sorted(refused=tuple(Refused(one, why) for one in texts))


def unknown_texts(fact: Fact, texts: Sequence[Written]) -> list[Written]:
    """Those of some texts that a fact does not have word for word."""
    known = {(one.prompt, one.answer) for one in fact.all_questions}
    known |= {("", statement) for statement in fact.all_statements}
    return [one for one in texts if (one.prompt, one.answer) not in known]


def _unfit_question(one: Written) -> str:
    if contains_answer(one.prompt, one.answer):
        return "the question contains its answer"
    if any(word in one.prompt.casefold() for word in _OF_THE_TEXT):
        return "the question speaks of the text"
    return ""


def _unfit_statement(fact: Fact, statement: str) -> str:
    text = fact.description
    if normalise(statement) in map(normalise, (text, *sentences(text))):
        return "it is the text itself"
    allowed = f"{text}\n{fact.key}\n{fact.name}\n" + "\n".join(fact.aliases)
    foreign = [
        v for s in sentences(statement) for v in values(s) if not contains_answer(allowed, v)
    ]
    if foreign:
        return f"the text does not say {foreign[0]}"
    words = [unit[0].casefold() for unit in UNIT.finditer(statement)]
    known = {unit[0].casefold() for unit in UNIT.finditer(allowed)}
    if not words or sum(word in known for word in words) < SHARED * len(words):
        return UNSUPPORTED
    return ""
