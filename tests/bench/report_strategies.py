"""What ``strategies`` and ``levers`` measured: tables, and one line at a time while they run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from kvedit.bench.tables import BRACKETS, Table, counts_cell, number_cell, score_cell
from tests.bench.asking import Point
from tests.bench.course import StrategyRun
from tests.bench.report import asked_cell, base_table, outcomes_cell, points_tables
from tests.bench.retain import BASELINE
from tests.bench.strategies import StrategiesResult

MEASURES = (
    ("recalled", "tried"), ("of committed", "committed"), ("never-trained", "phrasings"),
    ("base poets", "poets"), ("base relations", "relations"), ("any poets", "any_poets"),
)  # fmt: skip


def line(point: Point) -> str:
    """One measurement in one line, by free generation."""
    scores = ((label, getattr(point, name).generated) for label, name in MEASURES)
    parts = [f"{label} {score.passed}/{score.n}" for label, score in scores]
    parts.append(f"{number_cell(point.seconds)} s a fact")
    return f"{point.method}, {point.after} facts ({asked_cell(point)} asked): " + ", ".join(parts)


def tables(result: StrategiesResult) -> list[Table]:
    """What is recalled after each number of facts, under both protocols, and what it cost."""
    return [
        base_table("Base facts that no protected text names, before the first edit", result.base),
        *points_tables(result.points),
        _outcomes(result),
        _times(result),
    ]


def notes(result: StrategiesResult) -> str:
    """What the tables do not say."""
    return (
        f"Each strategy has a store of its own ({result.protected} protected texts) and one run of"
        f" ingest over {result.facts} facts. {BRACKETS} Asked: how many training phrasings, and"
        " how many never-trained ones, each fact is asked by generation; a fact counts only if all"
        " that were asked are exact. The last line of each strategy comes after the run's last"
        " verification and repairs. Seconds leave the measuring out. The base facts occur in no"
        " protected text and in no added fact; any poets are drawn from all that the model was"
        " pretrained on, most of which it names by itself."
    )


def outcomes_row(run: StrategyRun) -> tuple[str, ...]:
    """How one strategy ended."""
    return (
        run.strategy, str(run.facts), counts_cell(run.outcomes), score_cell(run.retention),
        str(run.repaired), run.stopped or "-",
    )  # fmt: skip


def _outcomes(result: StrategiesResult) -> Table:
    rows = [outcomes_row(run) for run in result.runs]
    if edits := result.baseline:
        rows.append((BASELINE, str(len(edits)), outcomes_cell(edits), "-", "-", "-"))
    columns = ("strategy", "facts", "outcomes", "last verification", "repairs", "stopped")
    return Table("How it ended", columns, tuple(rows))


def _times(result: StrategiesResult) -> Table:
    names = list(dict.fromkeys(name for run in result.runs for name in run.parts))
    rows = [_time_row(run, names) for run in result.runs]
    if result.baseline:
        spent = number_cell(mean(edit.seconds for edit in result.baseline))
        rows.append((BASELINE, spent, *["-"] * (len(names) + 3)))
    columns = ("strategy", "all", "first", "last", "first and last", *names)
    return Table("Seconds a fact, model loaded", columns, tuple(rows))


def _time_row(run: StrategyRun, names: Sequence[str]) -> tuple[str, ...]:
    facts = max(1, run.facts)
    ends = (run.seconds / facts, run.first, run.last)
    each = [number_cell(run.parts.get(name, 0.0) / facts) for name in names]
    return (run.strategy, *map(number_cell, ends), str(run.window), *each)
