"""Facts added one by one: what the model then holds, what it lost, and what it cost.

Invariants:
- "Kept" is measured on base facts that the model answered before the first edit and whose names
  occur in no protected text and in none of the facts that are added.
- The baseline runs in the same process, on the same facts, from the same base weights.
- Of the true facts that a second run protects none is asked.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kvedit.bench.speed import EditTime, add_timed
from kvedit.config import FILE_NAME
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import TextTooLongError
from kvedit.events import Event, Status
from kvedit.facts.fact import Fact
from kvedit.facts.phrasings import paraphrase_prompts
from kvedit.model import loading, scoring
from kvedit.model.prompts import Example, Renderer
from kvedit.store.database import DB_NAME
from kvedit.store.rows import ProtectedRow
from kvedit.training.engine import Engine
from tests.bench import questions
from tests.bench.asking import (
    AskedEngine,
    AskedModel,
    Both,
    Kept,
    Point,
    Task,
    both,
    marks,
    measure,
)
from tests.bench.baseline import BaselineConfig, BaselineStep, baseline_examples, train_baseline
from tests.bench.questions import BaseFact, BenchData, Seen

KVEDIT, BASELINE = "kvedit", "baseline"
TRUE = "kvedit, true facts protected"
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure, and on what; ``baseline_facts`` 0 leaves the baseline out.

    ``true_facts``: how many facts of the model's own pretraining to protect in a second run;
    ``kind`` of facts to train, where no file has them: see ``questions.new_facts``.
    """

    data: Path
    model: str | None = None
    facts: int = 20
    base_sample: int = 300
    baseline_facts: int = 10
    true_facts: int = 0
    protect: Path | None = None
    facts_file: Path | None = None
    kind: str = questions.POETS
    store_dir: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseScore:
    """What the base model recalls of a sample before any edit; ``excluded`` names had been seen."""

    what: str
    recall: Both
    pool: int
    excluded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One store that the facts were added to, and what its base model knew before."""

    method: str
    model: str
    base: tuple[BaseScore, ...]
    points: tuple[Point, ...]
    edits: tuple[EditTime, ...]
    setup_seconds: float
    protected: int
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainResult:
    """All that ``retain`` measured; ``ratios`` pairs plain with kvedit seconds, fact by fact.

    ``points`` are those of all methods; the rest is of the first run, and ``true_*`` of the one
    with true facts in its protected text, where there was one.
    """

    model: str
    base: tuple[BaseScore, ...]
    points: tuple[Point, ...]
    edits: tuple[EditTime, ...]
    baseline: tuple[EditTime, ...]
    setup_seconds: float
    protected: int
    ratios: tuple[float, ...]
    true_base: tuple[BaseScore, ...] = ()
    true_edits: tuple[EditTime, ...] = ()
    true_protected: int = 0


def retain(options: BenchOptions, emit: Emit) -> RetainResult:
    """Add facts one by one and measure what is held; the same again with true facts in the
    protected text, if so wished; then the same with the baseline.
    """
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    first = _run(KVEDIT, options, data, facts, emit)
    second = _run_beside_true_facts(options, data, facts, emit) if options.true_facts else None
    some = facts[: options.baseline_facts]
    baseline, more = run_baseline(source, some, first.kept, emit) if some else ([], [])
    return RetainResult(
        model=first.model,
        base=first.base,
        points=(*first.points, *(second.points if second else ()), *more),
        edits=first.edits,
        baseline=tuple(baseline),
        setup_seconds=first.setup_seconds,
        protected=first.protected,
        ratios=tuple(pair_ratios(first.edits, baseline)),
        true_base=second.base if second else (),
        true_edits=second.edits if second else (),
        true_protected=second.protected if second else 0,
    )


def _run(
    method: str, options: BenchOptions, data: BenchData, facts: Sequence[Fact], emit: Emit
) -> Run:
    """One new store, asked before and after."""
    began = time.monotonic()
    with new_store(options, emit) as knowledge:
        setup = time.monotonic() - began
        engine = engine_of(knowledge)
        asked_model = AskedEngine.of(engine)
        rows = protected_rows(knowledge)
        asked = base_facts(asked_model, data, seen_texts(rows, facts), options, emit)
        edits, points = _add_all(method, knowledge, asked_model, facts, asked.kept, emit)
        return Run(
            method=method,
            model=engine.base.name,
            base=asked.scores,
            points=tuple(points),
            edits=tuple(edits),
            setup_seconds=setup,
            protected=len(rows),
            kept=asked.kept,
        )


def _run_beside_true_facts(
    options: BenchOptions, data: BenchData, facts: Sequence[Fact], emit: Emit
) -> Run:
    """The run again, with a file of what the model was pretrained on beside its own text."""
    with TemporaryDirectory(prefix="kvedit-bench-") as folder:
        path = Path(folder) / "true-facts.jsonl"
        rng = random.Random(f"{options.seed} true")
        drawn = questions.true_facts(data, options.true_facts, rng)
        lines = [json.dumps({"prompt": f.prompt, "answer": f.answer}) for f in drawn]
        own = options.protect.read_text(encoding="utf-8") if options.protect else ""
        path.write_text("\n".join([own, *lines]), encoding="utf-8")
        given = replace(options, protect=path, store_dir=_second_store(options.store_dir))
        return _run(TRUE, given, data, facts, emit)


def _second_store(first: Path | None) -> Path | None:
    """A folder beside that of the first store, with its settings."""
    if first is None:
        return None
    return store_folder(first.with_name(f"{first.name}-true-facts"), first)


def store_folder(folder: Path, like: Path) -> Path:
    """Make the folder of a new store, with the settings that lie in another."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = like / FILE_NAME
    if settings.is_file():
        shutil.copy(settings, folder)
    return folder


def engine_of(knowledge: KnowledgeBase) -> Engine:
    """The engine behind a knowledge base: the benchmarks ask it more than its users do."""
    return knowledge.engine


@contextmanager
def new_store(options: BenchOptions, emit: Emit, *, go_on: bool = False) -> Iterator[KnowledgeBase]:
    """A new store, kept only where ``store_dir`` says so; ``go_on`` takes one that is there."""
    with TemporaryDirectory(prefix="kvedit-bench-") as folder:
        path = options.store_dir or Path(folder) / "store"
        if go_on and (path / DB_NAME).is_file():
            opened = KnowledgeBase.open(path, on_event=emit)
        else:
            opened = KnowledgeBase.create(
                path, options.model, protect_file=options.protect, on_event=emit
            )
        with opened as knowledge:
            yield knowledge


def protected_rows(knowledge: KnowledgeBase) -> list[ProtectedRow]:
    """All protected texts of a store."""
    return [row for role in ("control", "locality") for row in knowledge.store.protected(role)]


def seen_texts(rows: Sequence[ProtectedRow], facts: Sequence[Fact]) -> Seen:
    """All that training may see: protected texts and the new facts themselves."""
    texts = [text for row in rows for text in (row.prompt, row.answer)]
    texts += [text for fact in facts for text in (fact.key, fact.description)]
    return Seen(texts)


@dataclass(frozen=True, slots=True)
class Asked:
    """Base facts: what the model said, which it answers, and names that are not to be seen."""

    scores: tuple[BaseScore, ...]
    kept: Kept
    names: frozenset[str]


def base_facts(
    asked_model: AskedModel,
    data: BenchData,
    seen: Seen,
    options: BenchOptions,
    emit: Emit,
    *,
    any_poets: bool = False,
) -> Asked:
    """Sample base facts that training never sees, and find those that the base model answers.

    With ``any_poets`` other poets too, whether training sees them or not: that is what a user
    meets, for whom nothing is kept out of the protected text.
    """
    rng = random.Random(options.seed)
    poets = questions.poet_questions(data.known, rng)

    def ask(what: str, pool: Sequence[BaseFact], free: Sequence[BaseFact]) -> _Drawn:
        emit(Status(phase=f"asking the base model: {what}"))
        drawn = questions.sample(free, options.base_sample, rng)
        examples = _examples(asked_model, drawn)
        generated, forced = asked_model.ask(examples)
        kept = [example for example, said in zip(examples, generated, strict=True) if said]
        left = len(pool) - len(free)
        score = BaseScore(what=what, recall=both(generated, forced), pool=len(pool), excluded=left)
        return _Drawn(score, kept, frozenset(item.name for item in drawn))

    unseen = ask("base poets", poets, _unseen(poets, seen))
    relations = ask("base relations", data.relations, _unseen(data.relations, seen))
    drawn = [unseen, relations]
    if any_poets:
        others = [item for item in poets if item.name not in unseen.names]
        drawn.append(ask("any poets", poets, others))
    return Asked(
        tuple(one.score for one in drawn),
        Kept(*(one.kept for one in drawn)),
        unseen.names | relations.names,
    )


class _Drawn(NamedTuple):
    score: BaseScore
    kept: list[Example]
    names: frozenset[str]


def _unseen(pool: Sequence[BaseFact], seen: Seen) -> list[BaseFact]:
    return questions.unseen(pool, [item.name for item in pool], seen)


def _examples(asked_model: AskedModel, items: Sequence[BaseFact]) -> list[Example]:
    """Questions as tokens, those left out that do not fit into the model's context."""
    fitting = []
    for item in items:
        try:
            fitting.append(asked_model.renderer.example(item.prompt, item.answer))
        except TextTooLongError:
            continue
    return fitting


def _add_all(
    method: str,
    knowledge: KnowledgeBase,
    asked_model: AskedModel,
    facts: Sequence[Fact],
    kept: Kept,
    emit: Emit,
) -> tuple[list[EditTime], list[Point]]:
    engine = engine_of(knowledge)
    edits: list[EditTime] = []
    points: list[Point] = []
    tasks: list[Task] = []
    for fact in facts:
        emit(Status(phase=f"fact {len(edits) + 1} of {len(facts)}", key=fact.key))
        edits.append(add_timed(knowledge, fact))
        if edits[-1].outcome != "failed":
            done = edits[-1].outcome == "committed"
            tasks.append(Task(engine.examples(fact), engine.paraphrases(fact), done))
        if len(edits) in marks(len(facts)):
            emit(Status(phase=f"measuring after {len(edits)} facts"))
            point = measure(method, len(edits), asked_model, tasks, kept)
            points.append(replace(point, seconds=mean(edit.seconds for edit in edits)))
    return edits, points


def run_baseline(
    source: str, facts: Sequence[Fact], kept: Kept, emit: Emit
) -> tuple[list[EditTime], list[Point]]:
    """The baseline on a fresh copy of the base model."""
    base = loading.load(source)
    asked_model = AskedModel(base.model, Renderer(base.tokenizer, context=base.context))
    edits: list[EditTime] = []
    points: list[Point] = []
    tasks: list[Task] = []
    for fact in facts:
        edit, task = _baseline_one(asked_model, fact, emit)
        edits.append(edit)
        tasks.append(task)
        if len(edits) in marks(len(facts)):
            emit(Status(phase=f"measuring the baseline after {len(edits)} facts"))
            point = measure(BASELINE, len(edits), asked_model, tasks, kept)
            points.append(replace(point, seconds=mean(edit.seconds for edit in edits)))
    return edits, points


def _baseline_one(asked_model: AskedModel, fact: Fact, emit: Emit) -> tuple[EditTime, Task]:
    """Train one fact; learned means that the merged model recalls all it was trained on."""

    def tell(step: BaselineStep) -> None:
        emit(
            Status(
                phase=BASELINE,
                key=fact.key,
                step=step.step,
                total=step.total,
                loss=step.loss,
                recall=(step.recalled, step.n),
            )
        )

    renderer = asked_model.renderer
    trained = baseline_examples(renderer, fact)
    result = train_baseline(asked_model.model, trained, BaselineConfig(), tell)
    asked = [renderer.example(p, fact.description) for p in paraphrase_prompts(fact)]
    learned = all(outcome.passed for outcome in scoring.recall(asked_model.model, trained))
    outcome = "learned" if learned else "not learned"
    edit = EditTime(key=fact.key, outcome=outcome, seconds=result.seconds, steps=result.steps)
    return edit, Task(trained, asked, True)


def pair_ratios(edits: Sequence[EditTime], baseline: Sequence[EditTime]) -> list[float]:
    """Plain seconds over kvedit seconds, for the facts that both learned."""
    return [
        theirs.seconds / ours.seconds
        for ours, theirs in zip(edits, baseline, strict=False)
        if ours.outcome == "committed" and theirs.outcome == "learned"
    ]


def median_ratio(result: RetainResult) -> float | None:
    """The median of the paired ratios, or None when no fact was learned by both."""
    return median(result.ratios) if result.ratios else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseResult:
    """What a base model recalls."""

    model: str
    base: tuple[BaseScore, ...]


def base(options: BenchOptions, emit: Emit) -> BaseResult:
    """What a model recalls of the facts it was pretrained on, and of others."""
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    loaded = loading.load(source)
    asked_model = AskedModel(loaded.model, Renderer(loaded.tokenizer, context=loaded.context))
    rng = random.Random(options.seed)
    pools = (
        ("pretrained poets", questions.poet_questions(data.known, rng)),
        ("pretrained relations", list(data.relations)),
        ("held-out poets", questions.poet_questions(data.held_out, rng)),
    )
    scores = []
    for what, pool in pools:
        emit(Status(phase=f"asking {what}"))
        asked = _examples(asked_model, questions.sample(pool, options.base_sample, rng))
        recall = both(*asked_model.ask(asked))
        scores.append(BaseScore(what=what, recall=recall, pool=len(pool), excluded=0))
    return BaseResult(model=loaded.name, base=tuple(scores))
