"""What a model answers about a text: alone, with the text in the prompt, and with recall.

Passages with questions, none of which is ever trained.  An answer counts if the expected one stands
in it, both in normal form, as whole words.

Invariants:
- Every way is asked the same questions; answers are free and greedy.
- Passages are registered in the store without training, which moves no weight; those that are
  taught are added to a store before that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kvedit.asking.mentions import UNSPACED
from kvedit.asking.recall import with_texts
from kvedit.bench.tables import BRACKETS, Table, score_cell
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import UsageError
from kvedit.events import Event, Score, Status
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.store.store import Store
from tests.bench.retain import engine_of
from tests.bench.verification import SETTINGS, commit

Emit = Callable[[Event], None]
NAMING = {
    "en": "About {key}: {question}",
    "zh-Hans": "关于{key}：{question}",
    "zh-Hant": "關於{key}：{question}",
}
SHORTENED = ", passage "  # a number that tells two passages of one article apart


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallOptions:
    """``limit`` passages are asked about; the ``taught`` shortest of them are trained first."""

    model: str | None
    passages: Path
    limit: int
    taught: int
    forms: tuple[str, ...]
    max_new_tokens: int
    store_dir: Path | None = None


class Question(NamedTuple):
    """A question about a fact, as asked and with the fact's key before it, and its answer."""

    fact: Fact
    texts: Mapping[str, str]
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How many questions of one form a way answers; ``taught``: of taught facts alone."""

    way: str
    form: str
    taught: bool
    score: Score
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How often the finder names the fact that a question is about: first, at all, another one."""

    form: str
    first: Score
    among: Score
    other_only: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallResult:
    """``recited`` counts the taught facts whose recitation is the text, word for word."""

    model: str
    asked: tuple[Asked, ...]
    found: tuple[Found, ...]
    recited: Score
    outcomes: dict[str, str]


def read(path: Path, limit: int) -> list[Question]:
    """The questions of the first passages of a file; raises UsageError for another file."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
        for row in map(json.loads, lines):
            key = row["key"].partition(SHORTENED)[0]
            fact = Fact.create(key, row["description"])
            for one in row["questions"]:
                named = NAMING[fact.lang].format(key=key, question=one["question"])
                texts = {"named": named, "as asked": one["question"]}
                questions.append(Question(fact, texts, one["answer"]))
    except (KeyError, TypeError, ValueError) as error:
        hint = "Each line needs key, description and questions with question and answer."
        raise UsageError(f"{path} has no passages: {error}", hint=hint) from error
    return _first_of_each_key(questions)


def _first_of_each_key(questions: Sequence[Question]) -> list[Question]:
    """Without the passages whose key an earlier one has: a store holds one fact of a key."""
    first: dict[str, Fact] = {}
    return [q for q in questions if first.setdefault(normalise(q.fact.key), q.fact) == q.fact]


def answered(text: str, answer: str) -> bool:
    """Whether a text contains an answer, in normal form, as whole words where there are words."""
    if UNSPACED.search(answer):
        return normalise(answer) in normalise(text)
    wanted = [word for word in _words(answer) if word not in ("a", "an", "the")]
    return f" {' '.join(wanted)} " in f" {' '.join(_words(text))} "


def _words(text: str) -> list[str]:
    forms = (normalise(word) for word in re.split(r"[\s\-–—]+", text))
    return [form for form in forms if form]


def recall(options: RecallOptions, emit: Emit) -> RecallResult:
    """Ask every way all questions."""
    questions = read(options.passages, options.limit)
    with TemporaryDirectory(prefix="kvedit-recall-") as scratch:
        folder = options.store_dir or Path(scratch) / "store"
        outcomes = _make_store(folder, options, questions, emit)
        copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
        with KnowledgeBase.open(copy, on_event=emit) as knowledge:
            taught = set(knowledge.store.keys())
            missing = {q.fact for q in questions if q.fact.key not in taught}
            if missing:
                commit(knowledge, sorted(missing, key=lambda fact: fact.key))
        with KnowledgeBase.open(copy, on_event=emit) as knowledge:
            asked = list(_ask_all(knowledge, options, questions, taught, emit))
            recited = [_recites(knowledge, key) for key in sorted(taught)]
            return RecallResult(
                model=engine_of(knowledge).base.name, asked=tuple(asked),
                found=tuple(_found(knowledge, questions, form) for form in options.forms),
                recited=Score(sum(recited), len(recited), "generated"), outcomes=outcomes,
            )  # fmt: skip


def _make_store(
    folder: Path, options: RecallOptions, questions: Sequence[Question], emit: Emit
) -> dict[str, str]:
    """A store with the taught facts; facts that are there are not taught again."""
    facts = sorted({q.fact for q in questions}, key=lambda fact: len(fact.description))
    if not Store.exists(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not options.taught:
            (folder / "kvedit.toml").write_text(SETTINGS, encoding="utf-8")
        KnowledgeBase.create(folder, options.model, on_event=emit).close()
    outcomes = {}
    with KnowledgeBase.open(folder, on_event=emit) as knowledge:
        for fact in facts[: options.taught]:
            report = knowledge.add_fact(fact)
            outcomes[fact.key] = report.outcome
            emit(Status(phase=f"{report.outcome} {fact.key} in {report.seconds:.0f} s"))
    return outcomes


def _ask_all(
    knowledge: KnowledgeBase, options: RecallOptions, questions: Sequence[Question],
    taught: set[str], emit: Emit,
) -> Iterator[Asked]:  # fmt: skip
    """Every way and form; what only a taught fact can show is asked of taught facts alone."""
    learned = [q for q in questions if q.fact.key in taught]
    for form in options.forms:
        for way, base_only in WAYS.items():
            parts = [(questions, False)] if base_only else []
            parts += [(learned, True)] if learned else []
            for part, of_taught in parts:
                answers = _answers(knowledge, way, form, part, options.max_new_tokens)
                pairs = zip(answers, part, strict=True)
                passed = sum(answered(said, question.answer) for said, question in pairs)
                score = Score(passed, len(part), "generated")
                emit(Status(phase=f"{form}, {way}: {score_cell(score)}"))
                yield Asked(way=way, form=form, taught=of_taught, score=score, answers=answers)


WAYS = {
    "base model": True,
    "head, without recall": False,
    "text in the prompt": True,
    "--recall, the store's text": True,
    "--recall, the model's recitation": False,
}
"""Each way, and whether it is asked of all facts; the others of the taught ones alone."""


def _answers(
    knowledge: KnowledgeBase, way: str, form: str, questions: Sequence[Question], limit: int
) -> tuple[str, ...]:
    engine = engine_of(knowledge)
    prefixes = [
        engine.renderer.dialogue(_messages(knowledge, way, q.texts[form], q.fact))
        for q in questions
    ]

    def complete() -> list[str]:
        return engine.complete(prefixes, limit=limit)

    at = 0 if way == "base model" else None
    return tuple(knowledge._session.at(at, complete))


def _messages(
    knowledge: KnowledgeBase, way: str, text: str, fact: Fact
) -> Sequence[Mapping[str, str]]:
    message = {"role": "user", "content": text}
    if way == "text in the prompt":
        return with_texts(message, [fact.description])
    if way.startswith("--recall"):
        source = "store" if "store" in way else "model"
        return knowledge.recall([message], source=source).messages
    return [message]


def _recites(knowledge: KnowledgeBase, key: str) -> bool:
    message = {"role": "user", "content": f"“{key}” it is."}  # no phrasing of its own
    return any(s.exact for s in knowledge.recall([message], source="model").sources if s.key == key)


def _found(knowledge: KnowledgeBase, questions: Sequence[Question], form: str) -> Found:
    """What the finder names, for each question."""
    named = []
    for q in questions:
        message = {"role": "user", "content": q.texts[form]}
        sources = knowledge.recall([message], source="store").sources
        named.append([source.key for source in sources])
    right = [q.fact.key in keys for q, keys in zip(questions, named, strict=True)]
    first = [keys[:1] == [q.fact.key] for q, keys in zip(questions, named, strict=True)]
    other = [bool(keys) and not one for keys, one in zip(named, right, strict=True)]
    n = len(questions)
    return Found(form=form, first=Score(sum(first), n), among=Score(sum(right), n),
                 other_only=Score(sum(other), n))  # fmt: skip


def tables(result: RecallResult) -> list[Table]:
    """The questions answered by each way, of all facts and of the taught ones; what was found."""
    forms = list(dict.fromkeys(row.form for row in result.asked))
    cells = {(row.way, row.form, row.taught): score_cell(row.score) for row in result.asked}
    shown = []
    for title, taught in (("all passages", False), ("taught passages", True)):
        rows = tuple(
            (way, *(cells[way, form, taught] for form in forms))
            for way in WAYS
            if (way, forms[0], taught) in cells
        )
        if rows:
            shown.append(Table(f"Questions answered, {title}", ("way", *forms), rows))
    found = tuple(
        (f.form, score_cell(f.first), score_cell(f.among), score_cell(f.other_only))
        for f in result.found
    )
    columns = ("question", "right fact first", "right fact among those found", "another alone")
    return [*shown, Table("Facts that the questions name", columns, found)]


def notes(result: RecallResult) -> str:
    """What the tables leave out."""
    taught = f" Recited word for word: {score_cell(result.recited)}." if result.recited.n else ""
    return (
        "Answered: the expected answer stands in the free, greedy one, in normal form, as whole"
        " words. Named: the key stands before the question; as asked: the question alone."
        f"{taught} {BRACKETS}"
    )
