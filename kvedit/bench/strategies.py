"""The same facts trained in groups of several sizes: what is recalled, what is kept, how long.

Invariants:
- All sizes begin with a copy of one store: the same weights and the same protected text.
- Answers are generated freely; a fact counts as recalled only if all its phrasings are exact.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kvedit.bench.speed import Emit, Setup, new_store
from kvedit.bench.tables import BRACKETS, Table, number_cell, score_cell
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import Score, Status
from kvedit.facts.fact import Fact
from kvedit.ingest.report import IngestOptions
from kvedit.ingest.run import ingest

NOTES = (
    "Recalled: of all facts given, under all training phrasings. Unseen phrasings: of the committed"
    " facts, never trained on. Locality: answers of the base model that must not change. Earlier"
    f" facts: those committed before the last edit. All generated freely. {BRACKETS}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRun:
    """One group size (None: automatic), and what held after its last edit."""

    group: int | None
    committed: int
    facts: int
    recall: Score
    unseen: Score
    locality: Score
    earlier: Score
    ingest_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategiesResult:
    """A run for each group size."""

    model: str
    runs: tuple[StrategyRun, ...]


def strategies(setup: Setup, groups: Sequence[int | None], emit: Emit) -> StrategiesResult:
    """Ingest the facts once for each group size, each time into a copy of a new store."""
    runs = []
    with TemporaryDirectory(prefix="kvedit-bench-") as folder:
        original = Path(folder) / "store"
        with new_store(original, setup.model, emit, setup.config) as knowledge:
            knowledge.protect_for(len(setup.facts))
            model = knowledge.engine.base.name
        for number, group in enumerate(groups, 1):
            emit(Status(phase=f"{_name(group)}: strategy {number} of {len(groups)}"))
            copy = shutil.copytree(original, Path(folder) / str(number))
            with KnowledgeBase.open(copy, on_event=emit) as knowledge:
                runs.append(_run(knowledge, group, setup.facts, emit))
    return StrategiesResult(model=model, runs=tuple(runs))


def _run(knowledge: KnowledgeBase, group: int | None, facts: Sequence[Fact],
         emit: Emit) -> StrategyRun:  # fmt: skip
    report = ingest(
        knowledge, facts, IngestOptions(group=group, skip_invalid=True), emit
    ).require_end()
    engine, store = knowledge.engine, knowledge.store
    rows = store.facts("committed")
    last = max((row.revision or 0 for row in rows), default=0)
    recalled = [all(engine.generated_recall(engine.examples(row.fact))) for row in rows]
    unseen = [example for row in rows for example in engine.paraphrases(row.fact)]
    probes = knowledge.locality_examples()
    earlier = [
        exact for row, exact in zip(rows, recalled, strict=True) if (row.revision or 0) < last
    ]
    return StrategyRun(
        group=group, committed=len(rows), facts=len(facts),
        recall=_score([*recalled, *[False] * (len(facts) - len(rows))]),
        unseen=_score(engine.generated_recall(unseen)),
        locality=_score(engine.generated_recall(probes)),
        earlier=_score(earlier), ingest_seconds=report.seconds,
    )  # fmt: skip


def _score(values: Sequence[bool]) -> Score:
    return Score(sum(values), len(values), "generated")


def _name(group: int | None) -> str:
    return "automatic groups" if group is None else "one by one" if group == 1 else f"{group}"


def tables(result: StrategiesResult) -> list[Table]:
    """A row for each group size."""
    rows = tuple(
        (_name(run.group), f"{run.committed} of {run.facts}",
         *map(score_cell, (run.recall, run.unseen, run.locality, run.earlier)),
         number_cell(run.ingest_seconds / run.facts))
        for run in result.runs
    )  # fmt: skip
    columns = ("group size", "committed", "recalled", "unseen phrasings", "locality",
               "earlier facts", "s a fact")  # fmt: skip
    return [Table("Group sizes", columns, rows)]
