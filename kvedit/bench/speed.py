"""How long facts take on this machine, one by one and in a group, and where the time goes.

Invariant: what is timed is ``KnowledgeBase`` at work in a temporary store; nothing is instrumented.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

from kvedit import errors
from kvedit.bench.tables import Table, counts_cell, number_cell
from kvedit.config import FILE_NAME
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import EditReport, Event, Status
from kvedit.facts.fact import Fact
from kvedit.facts.formats import read_facts
from kvedit.ingest.report import IngestOptions
from kvedit.ingest.run import ingest

Emit = Callable[[Event], None]
NOTES = "Model loaded; the first fact of a process also warms it up."
_UNFIT = (errors.InvalidFactError, errors.TextTooLongError, errors.DuplicateKeyError,
          errors.TrainingError)  # fmt: skip
ALONE, INGEST = "one by one", "in groups (ingest)"
EXTRACTION = "extraction"
"""The part of an ingest that extracts what the model knows: once for a store, before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured: a base model, facts, and a ``kvedit.toml`` with settings."""

    model: str | None = None
    facts: tuple[Fact, ...] = ()
    config: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditTime:
    """One fact that was added; ``seconds`` is the whole call, ``timings`` its parts."""

    key: str
    outcome: str
    seconds: float
    steps: int
    timings: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestTime:
    """One run of ingest: seconds of all, and by part: the extraction, the parts of its edits, and
    the rest (``other``).
    """

    facts: int
    committed: int
    seconds: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """Seconds of making the store, of each single edit, and of the ingest of the other facts."""

    model: str
    setup_seconds: float
    edits: tuple[EditTime, ...]
    ingested: IngestTime | None


def load_facts(source: str, limit: int) -> tuple[Fact, ...]:
    """The first valid facts of a file; raises UsageError if there are none."""
    rows = (located.fact for located in read_facts(source))
    facts = {fact.key: fact for fact in rows if fact is not None}
    if not facts:
        hint = "See `kvedit ingest --help` for the formats."
        raise errors.UsageError(f"{source} has no facts", hint=hint)
    return tuple(facts.values())[:limit]


def new_store(
    folder: Path, model: str | None, emit: Emit, config: Path | str | None, *, trust: bool = False
) -> KnowledgeBase:
    """A store in a new folder; ``config`` is a ``kvedit.toml`` or its text."""
    folder.mkdir()
    text = config.read_text(encoding="utf-8") if isinstance(config, Path) else config or ""
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return KnowledgeBase.create(folder, model, trust_remote_code=trust, on_event=emit)


@contextmanager
def temporary_store(
    model: str | None, emit: Emit, config: Path | str | None = None, *, trust: bool = False
) -> Iterator[KnowledgeBase]:
    """The same, gone afterwards."""
    with TemporaryDirectory(prefix="kvedit-bench-") as folder:
        store = Path(folder) / "store"
        with new_store(store, model, emit, config, trust=trust) as knowledge:
            yield knowledge


class EditTimings:
    """Passes events on, and adds up the parts of all edits that they report."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.parts: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take an event of a knowledge base."""
        if isinstance(event, EditReport):
            self.parts = _sums((self.parts, event.timings))
        self._emit(event)


def speed(setup: Setup, single: int, emit: Emit) -> SpeedResult:
    """Add ``single`` facts one by one, then ingest the others in groups of automatic size."""
    timings, began = EditTimings(emit), time.monotonic()
    with temporary_store(setup.model, timings, setup.config) as knowledge:
        made = time.monotonic() - began
        edits = time_single(knowledge, setup.facts[:single], emit)
        rest = setup.facts[single:]
        ingested = time_ingest(knowledge, rest, timings, emit) if rest else None
        model = knowledge.engine.base.name
    return SpeedResult(model=model, setup_seconds=made, edits=tuple(edits), ingested=ingested)


def time_single(knowledge: KnowledgeBase, facts: Sequence[Fact], emit: Emit) -> list[EditTime]:
    """Add facts one after the other."""
    edits = []
    for number, fact in enumerate(facts, 1):
        emit(Status(phase=f"fact {number} of {len(facts)}", key=fact.key))
        edits.append(add_timed(knowledge, fact))
    return edits


def add_timed(knowledge: KnowledgeBase, fact: Fact) -> EditTime:
    """Add a fact; one that cannot be trained counts as failed and stops nothing."""
    began = time.monotonic()
    try:
        report = knowledge.add_fact(fact)
    except _UNFIT as error:
        spent, reasons = time.monotonic() - began, (error.message,)
        return EditTime(key=fact.key, outcome="failed", seconds=spent, steps=0, reasons=reasons)
    spent = time.monotonic() - began
    timings = {**report.timings, "other": max(0.0, spent - sum(report.timings.values()))}
    return EditTime(key=fact.key, outcome=report.outcome, seconds=spent, steps=report.steps,
                    timings=timings, reasons=report.reasons)  # fmt: skip


def time_ingest(knowledge: KnowledgeBase, facts: Sequence[Fact], timings: EditTimings,
                emit: Emit) -> IngestTime:  # fmt: skip
    """Ingest facts; ``timings`` is what the knowledge base reports to."""
    timings.parts.clear()
    began = time.monotonic()
    knowledge.protect_for(len(facts))
    parts = {EXTRACTION: time.monotonic() - began}
    report = ingest(knowledge, facts, IngestOptions(skip_invalid=True), emit).require_end()
    seconds = time.monotonic() - began
    parts |= timings.parts
    parts["other"] = max(0.0, seconds - sum(parts.values()))
    return IngestTime(
        facts=len(facts), committed=report.count("committed"), seconds=seconds, parts=parts
    )


def parts_of(edits: Sequence[EditTime]) -> dict[str, float]:
    """The seconds of each part over all edits."""
    return _sums([edit.timings for edit in edits])


def _sums(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in parts for name in one)
    return {name: sum(one.get(name, 0.0) for one in parts) for name in names}


def tables(result: SpeedResult) -> list[Table]:
    """Seconds a fact, and the share of each part of the time."""
    rows, parts = [], _part_rows(ALONE, parts_of(result.edits))
    if result.edits:
        seconds = [edit.seconds for edit in result.edits]
        outcomes = counts_cell(Counter(edit.outcome for edit in result.edits))
        rows.append((ALONE, outcomes, number_cell(median(seconds)), number_cell(mean(seconds))))
    if (run := result.ingested) is not None:
        outcomes = f"{run.committed} of {run.facts} committed"
        rows.append((INGEST, outcomes, "-", number_cell(run.seconds / run.facts)))
        parts += _part_rows(INGEST, run.parts)
    title = f"Seconds a fact; making the store took {result.setup_seconds:.0f} s"
    return [
        Table(title, ("how", "outcomes", "median", "mean"), tuple(rows)),
        Table("Where the time goes", ("how", "part", "seconds", "share"), tuple(parts)),
    ]


def _part_rows(how: str, parts: Mapping[str, float]) -> list[tuple[str, ...]]:
    total = sum(parts.values()) or 1.0
    return [(how, name, f"{spent:.2f}", f"{spent / total:.1%}") for name, spent in parts.items()]
