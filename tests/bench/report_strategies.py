"""What ``bench strategies`` found: tables, and one line at a time while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from tests.bench.asking import Both, Point
from tests.bench.course import StrategyRun
from tests.bench.report import BRACKETS, Sheet, base_sheet, score_cell
from tests.bench.retain import PLAIN
from tests.bench.strategies import StrategiesResult


def line(point: Point) -> str:
    """One measurement in one line, by free generation."""

    def part(label: str, measured: Both) -> str:
        return f"{label} {measured.generated.passed}/{measured.generated.n}"

    said = (
        part("recalled", point.tried),
        part("of committed", point.committed),
        part("never-trained", point.phrasings),
        part("base poets", point.poets),
        part("base relations", point.relations),
        part("any poets", point.any_poets),
        f"{_seconds(point.seconds)} s a fact",
    )
    return f"{point.method}, {point.after} facts ({_asked(point)} asked): " + ", ".join(said)


def sheets(result: StrategiesResult) -> list[Sheet]:
    """What is held after each number of facts, under both protocols, and what each way cost."""
    return [
        base_sheet("Base facts that no protected text names, before the first edit", result.base),
        points_sheet("Held, by free greedy generation", result.points, "generated"),
        points_sheet("Held, teacher-forced (all phrasings)", result.points, "forced"),
        _outcomes_sheet(result),
        _time_sheet(result),
    ]


def notes(result: StrategiesResult) -> str:
    """What the tables do not say."""
    return (
        f"Each way has a store of its own ({result.protected} protected texts) and one run of"
        f" ingest over {result.facts} facts. {BRACKETS} Asked: how many training phrasings, and"
        " how many never-trained ones, each fact is asked by generation; a fact counts only if all"
        " that were asked are exact. The last line of each way comes after the run's last"
        " verification and repairs. Seconds leave the measuring out. The base facts occur in no"
        " protected text and in no added fact; any poets are drawn from all that the model was"
        " pretrained on, most of which it names by itself."
    )


def points_sheet(title: str, points: Sequence[Point], protocol: str) -> Sheet:
    """What is held after each number of facts, under one protocol."""

    def cell(measured: Both) -> str:
        return score_cell(getattr(measured, protocol))

    rows = [
        (
            point.method,
            str(point.after),
            _asked(point) if protocol == "generated" else "all",
            cell(point.tried),
            cell(point.committed),
            cell(point.phrasings),
            cell(point.poets),
            cell(point.relations),
            cell(point.any_poets),
            _seconds(point.seconds),
        )
        for point in points
    ]
    headers = (
        "strategy", "facts", "asked", "recalled, of all", "ERR (of committed)",
        "never-trained", "base poets kept", "base relations kept",
        "any poets kept", "s a fact",
    )  # fmt: skip
    return Sheet(title, headers, tuple(rows))


def _asked(point: Point) -> str:
    return "all" if point.asked is None else str(point.asked)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _outcomes_sheet(result: StrategiesResult) -> Sheet:
    rows = [outcomes_row(run) for run in result.runs]
    if result.plain:
        counts = Counter(edit.outcome for edit in result.plain)
        rows.append((PLAIN, str(len(result.plain)), _told(counts), "-", "-", "-"))
    headers = ("strategy", "facts", "outcomes", "last verification", "repairs", "stopped")
    return Sheet("How it ended", headers, tuple(rows))


def outcomes_row(run: StrategyRun) -> tuple[str, ...]:
    """How one way ended."""
    return (
        run.strategy,
        str(run.facts),
        _told(run.outcomes),
        score_cell(run.retention),
        str(run.repaired),
        run.stopped or "-",
    )


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _time_sheet(result: StrategiesResult) -> Sheet:
    names = list(dict.fromkeys(name for run in result.runs for name in run.parts))
    rows = [_time_row(run, names) for run in result.runs]
    if result.plain:
        spent = f"{mean(edit.seconds for edit in result.plain):.2f}"
        rows.append((PLAIN, spent, *["-"] * (len(names) + 3)))
    headers = ("strategy", "all", "first", "last", "first and last", *names)
    return Sheet("Seconds a fact, model loaded", headers, tuple(rows))


def _time_row(run: StrategyRun, names: Sequence[str]) -> tuple[str, ...]:
    facts = max(1, run.facts)
    each = [f"{run.parts.get(name, 0.0) / facts:.2f}" for name in names]
    overall = f"{run.seconds / facts:.2f}"
    return (run.strategy, overall, _seconds(run.first), _seconds(run.last), str(run.window), *each)
