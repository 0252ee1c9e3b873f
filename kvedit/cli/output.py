"""Text and JSON for people and programs: tables, scores, and the report of an edit.

Pure functions from values to strings, but for the three that write to stdout. Columns are aligned
by display width, because a Chinese character takes two cells.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvedit.events import EditReport, Score, Similar

OUTCOME_COLOURS = {"committed": "green", "unchanged": "cyan", "rejected": "red", "failed": "red"}
SCORES = (
    ("reliability", "recall", "the phrasings it was trained on"),
    ("generalization", "paraphrase", "phrasings it was never trained on"),
    ("locality", "locality", "answers that must not change"),
    ("retention", "retention", "earlier facts, asked again"),
)
FORGOTTEN = "asked again: answers as before the fact came"
ELLIPSIS = "…"
PIPE_WIDTH = 100
MIN_LAST_COLUMN = 20


def print_json(document: object) -> None:
    """One JSON document to stdout, readable, non-ASCII kept."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def print_json_line(fields: Mapping[str, Any]) -> None:
    """One JSON object on one line to stdout."""
    click.echo(json.dumps(fields, ensure_ascii=False))


def width(text: str) -> int:
    """How many terminal cells the text takes, styling not counted."""
    return sum(_cells(character) for character in click.unstyle(text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, cells: int) -> str:
    """The text on one line, cut to at most `cells` terminal cells."""
    line = " ".join(text.split())
    if width(line) <= cells:
        return line
    used = 1
    for index, character in enumerate(line):
        used += _cells(character)
        if used > cells:
            return line[:index] + ELLIPSIS
    return line


def pad(text: str, cells: int) -> str:
    """The text followed by spaces up to `cells` terminal cells."""
    return text + " " * max(0, cells - width(text))


def line_width() -> int:
    """Cells on a line of stdout: the terminal's, or a fixed number where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table; the last column is cut to what is left of the line."""
    cells = [[" ".join(str("" if cell is None else cell).split()) for cell in row] for row in rows]
    widths = [
        max(width(line[column]) for line in [list(headers), *cells])
        for column in range(len(headers) - 1)
    ]
    left = max(MIN_LAST_COLUMN, line_width() - sum(widths) - 2 * len(widths))
    lines = []
    for row in [list(headers), *cells]:
        columns = [pad(cell, size) for cell, size in zip(row, widths, strict=False)]
        lines.append("  ".join([*columns, clip(row[-1], left)]).rstrip())
    return [click.style(lines[0], bold=True), *lines[1:]]


def print_lines(lines: Sequence[str]) -> None:
    """Lines to stdout."""
    for line in lines:
        click.echo(line)


def percent(share: float) -> str:
    """0.985 as '98.5%', 1.0 as '100%'; never rounded up to 100%."""
    value = 100 * share
    if 99.95 <= value < 100:
        return "99.9%"
    return f"{value:.1f}".removesuffix(".0") + "%"


def score_text(score: Score) -> str:
    """Counts, share, 95% interval and protocol: '8/8  100%  (95% interval 68-100%, generated)'."""
    if score.rate is None:
        return "not measured"
    low, high = (round(100 * bound) for bound in score.interval())
    share = percent(score.rate)
    return f"{score.passed}/{score.n}  {share}  (95% interval {low}-{high}%, {score.protocol})"


def similar_text(similar: Sequence[Similar]) -> str:
    """Keys with their scores: '夢中情人 (88), 夢中人 (86)'."""
    return ", ".join(f"{one.key} ({one.score:.0f})" for one in similar)


def seconds_text(seconds: float) -> str:
    """3.14 as '3.1 s', 135 as '2 min 15 s', 9000 as '2 h 30 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def size_text(size: int) -> str:
    """A size in bytes as '512 B', '1.5 MB'."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def edit_lines(report: EditReport, *, verbose: bool = False) -> list[str]:
    """What an edit did, for a human: outcome, reasons, scores, answers and time."""
    lines = [_headline(report)]
    lines += [f"  {click.style('because', fg='red')} {reason}" for reason in report.reasons]
    if report.outcome == "unchanged":
        return lines
    lines += _score_lines(report)
    lines += _answer_lines(report)
    if report.similar:
        lines.append(f"  similar keys, checked first: {similar_text(report.similar)}")
    if report.broke:
        lines.append(f"  {click.style('broke', fg='red')} {', '.join(report.broke)}")
    if report.steps or report.seconds:
        lines.append(f"  {report.steps} steps in {seconds_text(report.seconds)}{_timings(report)}")
    return lines + (_rank_lines(report) if verbose else [])


def _headline(report: EditReport) -> str:
    outcome = click.style(
        report.outcome, fg=OUTCOME_COLOURS.get(report.outcome, "yellow"), bold=True
    )
    subject = f" {report.key}" if report.key else ""
    if report.outcome == "committed" and report.kind == "rollback":
        return f"{outcome} rollback: the new revision {report.revision} restores an earlier one"
    if report.outcome == "committed":
        beside = f", {report.retrained} earlier facts taught once more" if report.retrained else ""
        return f"{outcome} {report.kind}{subject}: revision {report.revision}{beside}"
    if report.outcome == "unchanged":
        return f"{outcome}{subject}: the store already says exactly this"
    return f"{outcome} {report.kind}{subject}: the model is exactly as it was before"


def _score_lines(report: EditReport) -> list[str]:
    lines = []
    for field, label, meaning in SCORES:
        score = getattr(report, field)
        if not score.n:
            continue
        if field == "reliability" and report.kind == "remove":
            label, meaning = "forgotten", FORGOTTEN
        lines.append(f"  {label:<11} {pad(score_text(score), 52)} {meaning}")
    return lines


def _answer_lines(report: EditReport) -> list[str]:
    room = max(MIN_LAST_COLUMN, line_width() - 10)
    pairs = (("before", report.text_before), ("after", report.text_after))
    return [f"  {label:<7} {clip(text, room)}" for label, text in pairs if text]


def _timings(report: EditReport) -> str:
    slow = sorted(report.timings.items(), key=lambda item: -item[1])
    shown = [f"{name} {seconds_text(seconds)}" for name, seconds in slow if seconds >= 0.05]
    return f" ({', '.join(shown)})" if shown else ""


def _rank_lines(report: EditReport) -> list[str]:
    """For each matrix the rank of the change, and how far it is from the base model's by now."""
    return [
        f"  rank {rank:>3}  {_moved(report, name)}{name}"
        for name, rank in sorted(report.ranks.items())
    ]


def _moved(report: EditReport, name: str) -> str:
    share = report.relative_norms.get(name)
    return "" if share is None else f"{f'{share:.2%}':>7} from the base  "
