"""How long ``verify`` takes over a number of facts, and where the time goes.

The store is made without training: the facts are committed in one edit that moves no weights.  With
facts that the model was pretrained on this is the state after an ingest that lost nothing; with
others the answers are wrong, and generation goes on for as long as a wrong answer does.

Invariants:
- What is timed is ``KnowledgeBase.verify`` in a store that was just opened: nothing is warm.
- The parts are separated by what ``verify`` says while it runs; no instruments are put in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kvedit.bench.tables import BRACKETS, Table, score_cell
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.editing.verify import VerifyReport
from kvedit.errors import TextTooLongError
from kvedit.events import Event, RetentionCheck, Score, Status
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.store.rows import FactChange
from tests.bench import questions
from tests.bench.retain import BenchOptions, Emit, engine_of

SETTINGS = """\
[protect]
samples = 16
long_answers = 0
short_answers = 4
free_texts = 0
locality_probes = 0
"""
"""Of a temporary store: protected text takes a minute to make, and verify never looks at it."""
NOTES = (
    "The facts were committed by an edit that moves no weights; the store was opened again before"
    " verify began. Held, teacher-forced: under all training phrasings; generated: under one of"
    f" them, drawn. {BRACKETS}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """``verify_seconds`` of all of it and of its ``parts``; ``phrasings``: asked, of all facts."""

    model: str
    kind: str
    facts: int
    phrasings: int
    verify_seconds: float
    parts: dict[str, float]
    forced: Score
    generated: Score


def verification(options: BenchOptions, emit: Emit) -> Verification:
    """Verify ``options.facts`` facts in a store that was made for it."""
    data = questions.load(options.data, loading.locate(options.model))
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    kind = options.kind if options.facts_file is None else str(options.facts_file)
    with _folder(options) as folder:
        with KnowledgeBase.create(folder, options.model, on_event=emit) as knowledge:
            fitting = [fact for fact in facts if _fits(knowledge, fact)]
            commit(knowledge, fitting)
            phrasings = sum(len(engine_of(knowledge).examples(fact)) for fact in fitting)
        watch = _Watch(emit)
        with KnowledgeBase.open(folder, on_event=watch) as knowledge:
            report = watch.time(knowledge)
            model = engine_of(knowledge).base.name
    return Verification(
        model=model,
        kind=kind,
        facts=len(fitting),
        phrasings=phrasings,
        verify_seconds=report.seconds,
        parts=watch.parts,
        forced=report.score,
        generated=report.generated,
    )


@contextmanager
def _folder(options: BenchOptions) -> Iterator[Path]:
    """Where the user says, or a temporary folder, for a store with next to no protected text."""
    with TemporaryDirectory(prefix="kvedit-verify-") as scratch:
        folder = options.store_dir or Path(scratch)
        if options.store_dir is None:
            (folder / "kvedit.toml").write_text(SETTINGS, encoding="utf-8")
        yield folder


def _fits(knowledge: KnowledgeBase, fact: Fact) -> bool:
    try:
        engine_of(knowledge).examples(fact)
    except TextTooLongError:
        return False
    return True


def commit(knowledge: KnowledgeBase, facts: Sequence[Fact]) -> int:
    """Write facts down as committed by an edit without a delta; returns the revision."""
    store = knowledge.store
    with store.lock():
        ids = store.put_pending_many(facts)
        changes = [FactChange(number, None, fact) for number, fact in zip(ids, facts, strict=True)]
        edit = store.plan_edit("add", changes, store.config.to_json())
        return store.commit_edit(
            edit,
            expected_head=store.head(),
            delta=None,
            weights_digest=engine_of(knowledge).master.digest(),
            changes=changes,
            results=[],
            report={},
        )


class _Watch:
    """Takes what verify says, and when: each thing it says ends the part before."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._part, self._since = "", 0.0
        self.parts: dict[str, float] = {}

    def time(self, knowledge: KnowledgeBase) -> VerifyReport:
        """Verify all facts."""
        self._part, self._since = "rendering", time.monotonic()
        report = knowledge.verify()
        self._turn("")
        return report

    def __call__(self, event: Event) -> None:
        """Take an event of the knowledge base."""
        if isinstance(event, Status) and event.phase.startswith("checking"):
            self._turn("teacher-forced")
        elif isinstance(event, Status) and event.phase.startswith("generating"):
            self._turn("generated")
        elif isinstance(event, RetentionCheck):
            self._turn("recording")
            return  # thousands of them
        self._emit(event)

    def _turn(self, part: str) -> None:
        if part != self._part:
            now = time.monotonic()
            self.parts[self._part] = self.parts.get(self._part, 0.0) + now - self._since
            self._part, self._since = part, now


def tables(result: Verification) -> list[Table]:
    """Seconds of all, of each part, and of what was recalled."""
    columns = ("facts", "kind", "phrasings", "seconds", "held, teacher-forced", "held, generated")
    row = (
        str(result.facts),
        result.kind,
        str(result.phrasings),
        f"{result.verify_seconds:.2f}",
        score_cell(result.forced),
        score_cell(result.generated),
    )
    parts = tuple((name, f"{spent:.2f}") for name, spent in result.parts.items())
    return [
        Table("Verifying all facts", columns, (row,)),
        Table("Where the time goes", ("part", "seconds"), parts),
    ]
