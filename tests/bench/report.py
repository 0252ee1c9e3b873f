"""Tables of the results of the benchmarks; those that several of them share stand first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean, median

from kvedit.bench.speed import EditTime, parts_of
from kvedit.bench.tables import BRACKETS, Table, counts_cell, number_cell, score_cell
from kvedit.events import Score
from tests.bench.asking import Point
from tests.bench.kills import KillsResult
from tests.bench.retain import BASELINE, KVEDIT, TRUE, BaseScore, RetainResult, median_ratio
from tests.bench.undo import UndoResult

MEASURES = ("tried", "committed", "phrasings", "poets", "relations", "any_poets")
HEADERS = (
    "recalled, of all", "ERR (of committed)", "never-trained phrasings", "base poets kept",
    "base relations kept", "any poets kept",
)  # fmt: skip


def base_table(title: str, scores: Sequence[BaseScore]) -> Table:
    """What a model recalls of base facts."""
    rows = tuple(
        (one.what, score_cell(one.recall.generated), score_cell(one.recall.forced), str(one.pool),
         str(one.excluded))
        for one in scores
    )  # fmt: skip
    columns = ("what", "generated", "teacher-forced", "of how many", "left out as seen")
    return Table(title, columns, rows)


def points_table(title: str, points: Sequence[Point], protocol: str) -> Table:
    """What is recalled after each number of facts, under one protocol."""
    rows = tuple(
        (
            point.method, str(point.after), asked_cell(point) if protocol == "generated" else "all",
            *(score_cell(getattr(getattr(point, name), protocol)) for name in MEASURES),
            number_cell(point.seconds),
        )
        for point in points
    )  # fmt: skip
    return Table(title, ("method", "facts", "asked", *HEADERS, "s a fact"), rows)


def points_tables(points: Sequence[Point], suffix: str = "") -> list[Table]:
    """The same under both protocols."""
    return [
        points_table(f"By free greedy generation{suffix}", points, "generated"),
        points_table(f"Teacher-forced (all phrasings){suffix}", points, "forced"),
    ]


def asked_cell(point: Point) -> str:
    """How many phrasings of each kind each fact was asked by generation."""
    return "all" if point.asked is None else str(point.asked)


def outcomes_cell(edits: Iterable[EditTime]) -> str:
    """'3 committed, 1 rejected'."""
    return counts_cell(Counter(edit.outcome for edit in edits))


def time_row(name: str, edits: Sequence[EditTime]) -> tuple[str, ...]:
    """Seconds of some edits, median and mean, and their steps."""
    seconds = [edit.seconds for edit in edits]
    steps = median(edit.steps for edit in edits)
    return name, number_cell(median(seconds)), number_cell(mean(seconds)), f"{steps:g} (median)"


# ---- retain


def retain_tables(result: RetainResult) -> list[Table]:
    """What was known, what is recalled after each number of facts, and the time."""
    title = f"The same for the second row ({result.true_protected} protected texts)"
    return [
        base_table("Base facts that no protected text names, before the first edit", result.base),
        *([base_table(title, result.true_base)] if result.true_edits else []),
        *points_tables(result.points),
        _retain_outcomes(result),
        _retain_times(result),
    ]


def retain_notes(result: RetainResult) -> str:
    """What the tables do not say."""
    return (
        f"Making the store took {result.setup_seconds:.0f} s ({result.protected} protected texts)."
        f" {BRACKETS} A fact counts only if all its training phrasings are exact. The base facts"
        " occur in no protected text and in no added fact."
    )


def _retain_outcomes(result: RetainResult) -> Table:
    methods = ((KVEDIT, result.edits), (TRUE, result.true_edits), (BASELINE, result.baseline))
    rows = tuple(
        (
            method, str(len(edits)), outcomes_cell(edits),
            "; ".join(f"{edit.key}: {', '.join(edit.reasons)}" for edit in edits if edit.reasons)
            or "-",
        )
        for method, edits in methods
        if edits
    )  # fmt: skip
    return Table("Outcomes", ("method", "facts", "outcomes", "reasons"), rows)


def _retain_times(result: RetainResult) -> Table:
    rows = [time_row(KVEDIT, result.edits)]
    for name in parts_of(result.edits):
        spent = [edit.timings.get(name, 0.0) for edit in result.edits]
        rows.append((f"- {name}", number_cell(median(spent)), number_cell(mean(spent)), ""))
    for method, edits in ((TRUE, result.true_edits), (BASELINE, result.baseline)):
        rows += [time_row(method, edits)] if edits else []
    if (ratio := median_ratio(result)) is not None:
        pairs = f"over {len(result.ratios)} facts that both learned"
        rows.append((f"{BASELINE} / {KVEDIT}", number_cell(ratio), "", pairs))
    columns = ("what", "median", "mean", "steps")
    return Table("Seconds a fact, model loaded", columns, tuple(rows))


# ---- rollback, kills


def undo_tables(result: UndoResult) -> list[Table]:
    """What was rolled back to, and how the export answers."""
    total = len(result.restored)
    digests = Score(sum(one.recorded for one in result.restored), total)
    served = Score(sum(one.served for one in result.restored), total)
    rows = (
        ("edits", outcomes_cell(result.edits)),
        ("rollbacks whose recorded digest is that of the commit", _of(digests)),
        ("rollbacks whose served weights are those after the commit, all parameters", _of(served)),
        ("probes answered alike by the export in transformers alone", _of(result.exported)),
        ("answered otherwise: numerical ties", _differences(result, tied=True)),
        ("answered otherwise: ERRORS", _differences(result, tied=False)),
    )
    return [Table("Undone and exported", ("what", "result"), rows)]


def _differences(result: UndoResult, *, tied: bool) -> str:
    """Prompts that were answered otherwise, with the margin that decides between tie and error."""
    chosen = [one for one in result.differences if one.tied == tied]
    texts = [
        f"{one.prompt} (logits {one.margin:.3f} apart, rounding may move {one.tie_tolerance:.3f};"
        f" {'one of the answers is the right one' if one.expected else 'neither answer is right'})"
        for one in chosen
    ]
    return f"{len(chosen)}: {'; '.join(texts)}" if chosen else "none"


def kills_tables(result: KillsResult) -> list[Table]:
    """What is left of an ingest that was killed, and how far each round came."""
    outcomes = counts_cell(dict(sorted(result.outcomes.items())))
    rows = (
        ("processes killed", f"{result.killed}, then one that finished"),
        ("facts at the end", f"{outcomes}, of {result.facts}"),
        ("edits that were in flight when killed", str(result.interrupted)),
        ("facts committed after some round and not at the end", _listed(result.lost)),
        ("facts added more than once", _listed(result.twice)),
        ("problems that doctor reports, every revision replayed", _listed(result.findings)),
        ("served weights have the recorded digest", "yes" if result.same_digest else "NO"),
    )
    rounds = tuple(
        (str(number), f"{one.seconds:.1f}", str(one.exit_code), str(one.committed))
        for number, one in enumerate(result.rounds, 1)
    )
    return [
        Table("An ingest that was killed", ("what", "result"), rows),
        Table("Rounds", ("round", "seconds", "exit code", "facts committed"), rounds),
    ]


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items) or "none"


def _of(score: Score) -> str:
    return f"{score.passed} of {score.n}"
