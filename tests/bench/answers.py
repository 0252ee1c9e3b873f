"""How much of a trained text can be used: questions about it that nobody trained, by recipe.

Every second question of a passage is held out.  The recipes differ in what is trained beside the
text: nothing, its parts, the other questions, both, or what the base model wrote; and in whether
questions are distilled from the model that reads the text.  The base model is asked the same
questions, without the text and with it in the prompt, which is the upper bound.

Invariants:
- Each recipe begins with a copy of one store and gets the same facts in the same order, all by
  ``add`` or all by ``ingest``.
- Every recipe is asked the same questions, freely and greedily, when all facts are in; with recall
  each names its fact, as a user's would have to.
- An answer that contains the expected one may be long; F1 of words, beside it, favours short ones.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvedit.asking.recall import SOURCES
from kvedit.bench.tables import BRACKETS, Table, number_cell, score_cell
from kvedit.config import FILE_NAME
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.editing.study import answers as probes
from kvedit.editing.study.examples import text_before
from kvedit.errors import UsageError
from kvedit.events import Event, Score, Status
from kvedit.facts.fact import Fact, Question
from kvedit.metrics import word_f1
from kvedit.training.engine import Engine
from tests.bench import quality_material
from tests.bench.asking import AskedModel
from tests.bench.field.scores import Mean, mean
from tests.bench.field.table import cell
from tests.bench.quality_material import Choice
from tests.bench.quality_methods import ADD, INGEST, OpenStore, opened
from tests.bench.quality_probes import choose
from tests.bench.recall import NAMING

Emit = Callable[[Event], None]
WRITTEN = 8  # questions that the model writes about each passage, at most
AS_IT_STANDS, NAMED, IN_PROMPT = "as it stands", "named", "named, the text in the prompt"
RECALL = {f"named, recall from the {source}": source for source in SOURCES}
WAYS = (AS_IT_STANDS, NAMED, IN_PROMPT, *RECALL)
RECITED = 20  # characters with which a text begins: an answer that has them is a recitation


NO_CHOICES = Score(0, 0, "likelihood")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained beside the text: ``settings`` of [study], and ``questions`` not held out,
    which may be ``named``: the key stands before each.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    questions: bool = False
    named: bool = False


RECIPES = {
    "text": Recipe(),
    "parts": Recipe({"parts": True}),
    "questions": Recipe(questions=True),
    "questions, named": Recipe(questions=True, named=True),
    "parts, questions": Recipe({"parts": True}, questions=True),
    "questions, distilled": Recipe({"distill": True}, questions=True),
    "written": Recipe({"questions": WRITTEN}),
    "written, distilled": Recipe({"questions": WRITTEN, "distill": True}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersOptions:
    """``limit``: the shortest passages alone; ``method``: ``add`` or ``ingest``; ``config``: a
    kvedit.toml that holds for all.
    """

    passages: Path
    model: str | None = None
    limit: int | None = None
    recipes: tuple[str, ...] = tuple(RECIPES)
    method: str = ADD
    abilities: Path | None = None
    store_dir: Path | None = None
    config: Path | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out question; it is ``passed`` if the answer contains the expected one, and ``f1``
    says how many words the two have in common.
    """

    key: str
    prompt: str
    expected: str
    answer: str
    passed: bool
    f1: float


@dataclass(frozen=True, slots=True)
class Asked:
    """The held-out questions asked one way; the interval of ``f1`` is over passages."""

    score: Score
    f1: Mean
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class RecipeResult:
    """``recited`` are facts recalled at the end, of all given; ``recitations`` the answers that
    begin as the text does; ``asked`` has what was answered by each of the ``WAYS``; ``abilities``
    is multiple choice; ``written`` the questions and statements that the model wrote; seconds are
    of the training alone, by the clock and of the processor.
    """

    name: str
    committed: int
    recited: Score
    asked: Mapping[str, Asked]
    recitations: int
    perturbation_gap: float | None
    written: int
    seconds: float
    cpu_seconds: float
    steps: int
    abilities: Score = NO_CHOICES


@dataclass(frozen=True, slots=True)
class AnswersResult:
    """The base model without and with the text in the prompt, then the recipes."""

    model: str
    facts: int
    method: str
    base: Mapping[str, Asked]
    abilities: Score
    recipes: tuple[RecipeResult, ...]


def answers(
    options: AnswersOptions,
    *,
    emit: Emit,
    tell: Callable[[AnswersResult, RecipeResult], None] = lambda result, point: None,
) -> AnswersResult:
    """Measure all recipes; ``tell`` gets what is measured so far after each.

    Raises UsageError for an unknown recipe or no questions.
    """
    if unknown := [name for name in options.recipes if name not in RECIPES]:
        raise UsageError(f"there is no recipe {unknown[0]!r}", hint=f"Known: {', '.join(RECIPES)}.")
    passages = read_passages(options.passages, options.limit)
    choices = quality_material.abilities(options.abilities) if options.abilities else ()
    with _folder(options.store_dir) as folder:
        template = folder / "store"
        result = _ask_base(template, options, passages, choices, emit)
        for name in options.recipes:
            path = _copy(template, folder / name.replace(", ", "-"), options)
            done = _run(name, path, passages, choices, options.method, emit)
            result = replace(result, recipes=(*result.recipes, done))
            tell(result, done)
    return result


def read_passages(path: Path, limit: int | None) -> list[Fact]:
    """The passages, the shortest first, every second question of each a probe.

    Raises UsageError where there is no question.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    facts = [_held_out(Fact.from_json(_with_one_answer(row))) for row in rows]
    facts = sorted((f for f in facts if f.questions), key=lambda fact: len(fact.description))
    if not facts:
        raise UsageError(f"{path} has no passage with questions")
    return facts[:limit]


def _with_one_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A passage in which each question stands once: public sets repeat some."""
    by_prompt = {one["question"]: one for one in reversed(row.get("questions", []))}
    return {**row, "questions": list(by_prompt.values())[::-1]}


def _held_out(fact: Fact) -> Fact:
    """Every second question as a probe, the first one among them."""
    pairs = enumerate(fact.questions)
    return replace(fact, questions=tuple(replace(one, probe=at % 2 == 0) for at, one in pairs))


def _for_recipe(fact: Fact, recipe: Recipe) -> Fact:
    kept = (one for one in fact.questions if recipe.questions or one.probe)
    named = [
        replace(one, prompt=_named(fact, one)) if recipe.named and not one.probe else one
        for one in kept
    ]
    return replace(fact, questions=tuple(named))


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _ask_base(
    path: Path, options: AnswersOptions, passages: Sequence[Fact], choices: Sequence[Choice],
    emit: Emit,
) -> AnswersResult:  # fmt: skip
    """The base model's scores, the questions without and with the text in the prompt."""
    make = KnowledgeBase.open if path.is_dir() else _make(options)
    with make(path, on_event=emit) as knowledge:
        emit(Status(phase="asking the base model"))
        ways = {AS_IT_STANDS: _as_it_stands, NAMED: _named, IN_PROMPT: _after_the_text}
        asked = {name: ask(knowledge.engine, passages, way) for name, way in ways.items()}
        name = knowledge.store.meta("model_name") or ""
        chosen = _choose(knowledge.engine, choices, emit)
        return AnswersResult(name, len(passages), options.method, asked, chosen, ())


def _choose(engine: Engine, choices: Sequence[Choice], emit: Emit) -> Score:
    right = choose(AskedModel(engine.base.model, engine.renderer), choices, emit)
    return Score(sum(right), len(right), NO_CHOICES.protocol)


def _make(options: AnswersOptions) -> Callable[..., KnowledgeBase]:
    def create(path: Path, on_event: Emit) -> KnowledgeBase:
        return KnowledgeBase.create(path, options.model, time=options.time, on_event=on_event)

    return create


def ask(engine: Engine, facts: Sequence[Fact], prompt: Callable[[Fact, Question], str]) -> Asked:
    """The held-out questions, each by the prompt that is made of it, freely answered."""
    keyed = [(fact, one) for fact in facts for one in fact.questions if one.probe]
    examples = [engine.renderer.example(prompt(fact, one), one.answer) for fact, one in keyed]
    rows = probes.ask(engine, list(enumerate(examples)))
    given = [
        Answer(fact.key, one.prompt, one.answer, answer, row.passed, word_f1(answer, one.answer))
        for (fact, one), row in zip(keyed, rows, strict=True)
        for answer in [row.answer or ""]
    ]
    numbers = {fact.key: number for number, fact in enumerate(facts)}
    f1 = mean([(numbers[one.key], one.f1) for one in given], probes.PROTOCOL)
    score = Score(sum(one.passed for one in given), len(given), probes.PROTOCOL)
    return Asked(score, f1, tuple(given))


def _as_it_stands(fact: Fact, question: Question) -> str:
    return question.prompt


def _named(fact: Fact, question: Question) -> str:
    return NAMING[fact.lang].format(key=fact.key, question=question.prompt)


def _after_the_text(fact: Fact, question: Question) -> str:
    return text_before(fact, _named(fact, question))


def _recalling(knowledge: KnowledgeBase, source: str, fact: Fact, question: Question) -> str:
    message = {"role": "user", "content": _named(fact, question)}
    return knowledge.recall([message], source=source).messages[-1]["content"]


def _ask_trained(knowledge: KnowledgeBase, facts: Sequence[Fact]) -> dict[str, Asked]:
    """What is answered as it stands, with its fact named, and with recall besides."""
    recalling = {name: partial(_recalling, knowledge, source) for name, source in RECALL.items()}
    ways = {AS_IT_STANDS: _as_it_stands, NAMED: _named, **recalling}
    return {name: ask(knowledge.engine, facts, way) for name, way in ways.items()}


def _copy(template: Path, path: Path, options: AnswersOptions) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, path)
    if options.config is not None:
        shutil.copy(options.config, path / FILE_NAME)
    return path


def _configure(path: Path, settings: Mapping[str, object]) -> None:
    """Add settings of [study], a section that the common settings do not have."""
    file = path / FILE_NAME
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    file.write_text("\n".join([text, "[study]", *lines, ""]), encoding="utf-8")


def _run(
    name: str, path: Path, passages: Sequence[Fact], choices: Sequence[Choice], method: str,
    emit: Emit,
) -> RecipeResult:  # fmt: skip
    recipe = RECIPES[name]
    if recipe.settings:
        _configure(path, recipe.settings)
    facts = [_for_recipe(fact, recipe) for fact in passages]
    with opened(path, emit) as store:
        knowledge = store.knowledge
        began, cpu_began = time.monotonic(), time.process_time()
        _teach(store, facts, method)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        committed = knowledge.store.facts("committed")
        written = sum(len(row.fact.written) for row in committed)
        report = knowledge.verify()
        asked = _ask_trained(knowledge, facts)
        chosen = _choose(knowledge.engine, choices, emit)
    starts = {fact.key: fact.description[:RECITED] for fact in facts}
    recitations = sum(one.answer.startswith(starts[one.key]) for one in asked[AS_IT_STANDS].answers)
    return RecipeResult(
        name, len(committed), Score(report.score.passed, len(facts), report.score.protocol),
        asked, recitations, report.perturbation_gap, written, seconds, cpu_seconds, store.steps,
        chosen,
    )  # fmt: skip


def _teach(store: OpenStore, facts: Sequence[Fact], method: str) -> None:
    if method == INGEST:
        store.ingest(facts)
        return
    for fact in facts:
        store.knowledge.add_fact(fact)


def tables(result: AnswersResult) -> list[Table]:
    """What is answered by each way, twice: by what it contains and by F1; then what it costs."""
    asked = {"base model": result.base, **{one.name: one.asked for one in result.recipes}}
    title = f"{result.facts} passages by {result.method}"
    return [
        _answered(f"{title}: answers that contain the expected one", asked, attrgetter("score")),
        _answered(f"{title}: F1 of words, mean of the answers", asked, attrgetter("f1")),
        _costs(title, result),
    ]


def _answered(
    title: str, asked: Mapping[str, Mapping[str, Asked]], value: Callable[[Asked], Score | Mean]
) -> Table:
    rows = (
        (name, *(cell(value(ways[way])) if way in ways else "-" for way in WAYS))
        for name, ways in asked.items()
    )
    return Table(title, ("trained", *WAYS), tuple(rows))


def _costs(title: str, result: AnswersResult) -> Table:
    columns = (
        "trained", "committed", "recites", "multiple choice", "recitations", "gap", "written",
        "steps a fact", "seconds", "CPU seconds",
    )  # fmt: skip
    base = ("base model", "-", "-", score_cell(result.abilities), *"------")
    rows = (_cost(one, result.facts) for one in result.recipes)
    return Table(f"{title}: what it costs", columns, (base, *rows))


def _cost(one: RecipeResult, facts: int) -> tuple[str, ...]:
    means = (one.steps / facts, one.seconds / facts, one.cpu_seconds / facts)
    return (
        one.name, f"{one.committed} of {facts}", score_cell(one.recited),
        score_cell(one.abilities), str(one.recitations), number_cell(one.perturbation_gap, ".1f"),
        str(one.written), *(f"{value:.0f}" for value in means),
    )  # fmt: skip


def line(one: RecipeResult) -> str:
    """A recipe's result, as soon as it is there."""
    answered = one.asked[AS_IT_STANDS].score
    return f"{one.name}: {one.committed} committed, answers {score_cell(answered)}"


def notes(result: AnswersResult) -> str:
    """What the tables do not say."""
    return (
        "Held-out questions by free, greedy generation; named: the key stands before the question."
        " Recites: facts recalled under all training prompts at the end, teacher-forced, of all"
        " given. Recitations: answers, as it stands, that begin as the text does. Gap: perplexity"
        " of the text with its sentences in another order over that of the text."
        f" {BRACKETS} Of F1: bootstrap over passages (n)."
    )
