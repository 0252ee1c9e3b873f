"""What a benchmark found, as tables for a terminal, Markdown for docs/log, and JSON.

Invariants:
- Every share stands with its count, its n and its Wilson 95% interval.
- A result says with what it was made: command, commit, machine, versions.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

from kvedit import __version__
from kvedit.events import Score
from kvedit.files import now, write_atomic
from tests.bench.asking import Both, Point
from tests.bench.kills import KillsResult
from tests.bench.retain import KVEDIT, PLAIN, TRUE, BaseScore, Edit, RetainResult, median_ratio
from tests.bench.undo import UndoResult

BRACKETS = "Brackets: Wilson 95% intervals."


@dataclass(frozen=True, slots=True)
class Sheet:
    """A titled table."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """With what a measurement was made."""

    command: str
    date: str
    commit: str
    cpu: str
    cores: int
    processes: int
    threads: int
    torch: str
    python: str
    kvedit: str


def setting(command: str) -> Setting:
    """The setting of this process."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Setting(
        command=command,
        date=now()[:10],
        commit=_commit(),
        cpu=_cpu(),
        cores=usable or 1,
        processes=dist.get_world_size() if dist.is_initialized() else 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        kvedit=__version__,
    )


def _commit() -> str:
    """The checkout's commit, marked when files differ from it; 'unknown' outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return "unknown"
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- tables


def score_cell(score: Score) -> str:
    """'18/20 = 90.0% [69.9, 97.2]'; a dash when nothing was asked."""
    if score.rate is None:
        return "-"
    low, high = (100 * bound for bound in score.interval())
    return f"{score.passed}/{score.n} = {100 * score.rate:.1f}% [{low:.1f}, {high:.1f}]"


def retain_sheets(result: RetainResult) -> list[Sheet]:
    """What was known, what is held after each number of facts, under both protocols, and time."""
    more = [_true_sheet(result)] if result.true_edits else []
    return [
        base_sheet("Base facts that no protected text names, before the first edit", result.base),
        *more,
        _points_sheet("Held, by free greedy generation", result.points, "generated"),
        _points_sheet("Held, teacher-forced", result.points, "forced"),
        _outcomes_sheet(result),
        _time_sheet(result),
    ]


def _true_sheet(result: RetainResult) -> Sheet:
    return base_sheet(
        f"The same for the second row ({result.true_protected} protected texts)", result.true_base
    )


def base_sheet(title: str, scores: Sequence[BaseScore]) -> Sheet:
    """What a model recalls of base facts."""
    rows = [
        (
            score.what,
            score_cell(score.found.generated),
            score_cell(score.found.forced),
            str(score.pool),
            str(score.excluded),
        )
        for score in scores
    ]
    headers = ("what", "generated", "teacher-forced", "of how many", "left out as seen")
    return Sheet(title, headers, tuple(rows))


def _points_sheet(title: str, points: Sequence[Point], protocol: str) -> Sheet:
    def cell(both: Both) -> str:
        return score_cell(getattr(both, protocol))

    rows = [
        (
            point.method,
            str(point.after),
            cell(point.tried),
            cell(point.committed),
            cell(point.phrasings),
            cell(point.poets),
            cell(point.relations),
        )
        for point in points
    ]
    headers = (
        "method", "facts", "recalled, of all", "recalled, of committed (ERR)",
        "never-trained phrasings", "base poets kept", "base relations kept",
    )  # fmt: skip
    return Sheet(title, headers, tuple(rows))


def _outcomes_sheet(result: RetainResult) -> Sheet:
    rows = []
    ways = ((KVEDIT, result.edits), (TRUE, result.true_edits), (PLAIN, result.plain))
    for method, edits in ways:
        counts = Counter(edit.outcome for edit in edits)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        why = "; ".join(f"{edit.key}: {', '.join(edit.reasons)}" for edit in edits if edit.reasons)
        if edits:
            rows.append((method, str(len(edits)), told, why or "-"))
    return Sheet("Outcomes", ("method", "facts", "outcomes", "reasons"), tuple(rows))


def _time_sheet(result: RetainResult) -> Sheet:
    rows = [time_row(KVEDIT, result.edits)]
    rows += [(f"- {name}", *summary(values), "") for name, values in parts_of(result.edits)]
    if result.true_edits:
        rows.append(time_row(TRUE, result.true_edits))
    if result.plain:
        rows.append(time_row(PLAIN, result.plain))
    ratio = median_ratio(result)
    if ratio is not None:
        pairs = f"over {len(result.ratios)} facts that both learned"
        rows.append((f"{PLAIN} / {KVEDIT}", f"{ratio:.2f}", "", pairs))
    return Sheet("Seconds a fact, model loaded", ("what", "median", "mean", "steps"), tuple(rows))


def time_row(name: str, edits: Sequence[Edit]) -> tuple[str, ...]:
    """Seconds of some edits, median and mean, and their steps."""
    steps = median(edit.steps for edit in edits)
    return (name, *summary([edit.seconds for edit in edits]), f"{steps:g} (median)")


def summary(values: Sequence[float]) -> tuple[str, str]:
    """Median and mean as text."""
    return f"{median(values):.2f}", f"{mean(values):.2f}"


def parts_of(edits: Sequence[Edit]) -> list[tuple[str, list[float]]]:
    """The seconds of each part, an item for each edit."""
    names = dict.fromkeys(name for edit in edits for name in edit.timings)
    return [(name, [edit.timings.get(name, 0.0) for edit in edits]) for name in names]


def undo_sheets(result: UndoResult) -> list[Sheet]:
    """What was rolled back to, and how the export answers."""
    counts = Counter(edit.outcome for edit in result.edits)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    total = len(result.restored)
    digests = Score(sum(one.recorded for one in result.restored), total)
    served = Score(sum(one.served for one in result.restored), total)
    rows = (
        ("edits", told),
        ("rollbacks whose recorded digest is that of the commit", _of(digests)),
        ("rollbacks whose served weights are those after the commit, all parameters", _of(served)),
        ("probes answered alike by the export in plain transformers", _of(result.exported)),
        ("answered otherwise: near-ties", _differences(result, tied=True)),
        ("answered otherwise: ERRORS", _differences(result, tied=False)),
    )
    return [Sheet("Undone and exported", ("what", "found"), rows)]


def _differences(result: UndoResult, *, tied: bool) -> str:
    """Prompts that were answered otherwise, with the margin that judge."""
    found = [one for one in result.differences if one.tied == tied]
    told = [
        f"{one.prompt} (logits {one.margin:.3f} apart, rounding may move {one.tie_tolerance:.3f};"
        f" {'one of the answers is the right one' if one.expected else 'neither answer is right'})"
        for one in found
    ]
    return f"{len(found)}: {'; '.join(told)}" if found else "none"


def kills_sheets(result: KillsResult) -> list[Sheet]:
    """What is left of an ingest that was killed, and how far each round came."""
    told = ", ".join(f"{count} {state}" for state, count in sorted(result.outcomes.items()))
    rows = (
        ("processes killed", f"{result.killed}, then one that finished"),
        ("facts at the end", f"{told}, of {result.facts}"),
        ("edits that were in flight when killed", str(result.interrupted)),
        ("facts committed after some round and not at the end", _listed(result.lost)),
        ("facts added more than once", _listed(result.twice)),
        ("what doctor found, every revision replayed", _listed(result.findings)),
        ("served weights have the recorded digest", "yes" if result.same_digest else "NO"),
    )
    rounds = tuple(
        (str(number), f"{one.seconds:.1f}", str(one.exit_code), str(one.committed))
        for number, one in enumerate(result.rounds, 1)
    )
    return [
        Sheet("An ingest that was killed", ("what", "found"), rows),
        Sheet("Rounds", ("round", "seconds", "exit code", "facts committed"), rounds),
    ]


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items) or "none"


def _of(score: Score) -> str:
    return f"{score.passed} of {score.n}"


# ---- Markdown, JSON


def markdown(title: str, made: Setting, model: str, notes: str, sheets: Sequence[Sheet]) -> str:
    """A block for docs/log."""
    lines = [
        f"## {made.date}: {title}",
        "",
        f"`{made.command}`",
        "",
        f"Model {model}; kvedit {made.kvedit}, commit {made.commit}; {made.cpu}, {made.cores} cores"
        f" usable, {_threads(made)}; torch {made.torch}, Python {made.python}. {notes}",
    ]
    for sheet in sheets:
        lines += [
            "",
            f"**{sheet.title}**",
            "",
            _row(sheet.headers),
            _row(["---"] * len(sheet.headers)),
        ]
        lines += [_row(row) for row in sheet.rows]
    return "\n".join(lines) + "\n"


def _threads(made: Setting) -> str:
    threads = f"{made.threads} thread{'s' * (made.threads > 1)}"
    return threads if made.processes == 1 else f"{made.processes} processes, {threads} each"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def notes(result: RetainResult) -> str:
    """What the tables of ``retain`` do not say."""
    return (
        f"Making the store took {result.setup_seconds:.0f} s ({result.protected} protected texts)."
        f" {BRACKETS} A fact counts only if all its training phrasings are"
        " exact. The base facts occur in no protected text and in no added fact."
    )


def to_json(made: Setting, result: Any) -> str:
    """Everything, as one JSON document."""
    document = {"setting": asdict(made), **_plain(result)}
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Score):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        names = value.__dataclass_fields__
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def write(path: Path, text: str) -> None:
    """Write a result whole or not at all."""
    write_atomic(path, text.encode())
