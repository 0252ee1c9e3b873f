"""The result of a benchmark: one JSON document, and its tables for a terminal.

Invariants:
- Every benchmark writes the same document: what was run, with what, and its tables as text; the
  raw values stand beside them under names of the benchmark's own.
- Every share stands with its count, its n and its Wilson 95% interval.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvedit import __version__
from kvedit.events import Score

SCHEMA = "kvedit-benchmark/1"
BRACKETS = "Brackets: Wilson 95% intervals."
_WIDE = 10_000  # columns: more than any table needs
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; all cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def document(
    benchmark: str, words: Sequence[str], began: datetime, result: Any, tables: Sequence[Table], *,
    seed: int | None = None, notes: str = "",
) -> Document:  # fmt: skip
    """A ``result`` with its tables as plain values; ``words`` are those of the command line.

    Raises ValueError where a value of the result has the name of one of the document's own.
    """
    raw = plain(result)
    own = {
        "schema": SCHEMA, "benchmark": benchmark, "command": shlex.join(words), "commit": commit(),
        "kvedit": __version__, "machine": machine(),
        "model": raw.pop("model", getattr(result, "model", None)), "seed": seed,
        "started": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds(), 3),
        "notes": notes, "tables": plain(tables),
    }  # fmt: skip
    if twice := set(own) & set(raw):
        raise ValueError(f"a benchmark's own values must not be called {sorted(twice)}")
    return {**own, **raw}


def machine() -> dict[str, Any]:
    """What the measurement ran on."""
    import torch
    import torch.distributed as dist

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": usable or 1, "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """The checkout's commit, marked when files differ from it; 'unknown' outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    if not (root / ".git").exists():
        return "unknown"
    try:
        return subprocess.check_output(words, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as what JSON has; a score with rate and interval."""
    if isinstance(value, Score):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def score_cell(score: Score) -> str:
    """'18/20 = 90.0% [69.9, 97.2]'; a dash when nothing was asked."""
    if score.rate is None:
        return "-"
    low, high = (100 * bound for bound in score.interval())
    return f"{score.passed}/{score.n} = {100 * score.rate:.1f}% [{low:.1f}, {high:.1f}]"


def number_cell(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def counts_cell(counts: Mapping[str, int]) -> str:
    """'3 committed, 1 rejected'."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"


def print_tables(result: Document) -> None:
    """The tables for the eye; one that is too wide for whole words is left to Markdown."""
    from rich.console import Console
    from rich.measure import measure_renderables
    from rich.table import Table as RichTable

    console = Console() if sys.stdout.isatty() else Console(width=120)
    for table in result["tables"]:
        drawn = RichTable(title=table["title"], title_justify="left", title_style="bold")
        for column in table["columns"]:
            drawn.add_column(column, overflow="fold")
        for row in table["rows"]:
            drawn.add_row(*(cell.replace(" = ", "\n").replace(" [", "\n[") for cell in row))
        width = measure_renderables(console, console.options.update(max_width=_WIDE), [drawn])
        if width.minimum <= console.width:
            console.print(drawn, markup=False)
