"""What commands print to stdout: JSON, tables, scores, and the report of an edit.

Invariants:
- rich is imported only where something is laid out for a person.
- Keys, descriptions and answers are text, never markup; their control characters are shown
  escaped, so that no stored text can steer the terminal.
- A line is as wide as the terminal, or 100 cells where stdout is none; long text is wrapped or
  shortened between words.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from kvedit.events import EditReport, Score, Similar

COLOURS = {
    "committed": "green", "unchanged": "cyan", "rejected": "red", "failed": "red",
    "canceled": "yellow", "passed": "green", "lost": "red", "recalled": "green",
    "regressed": "red", "stale": "yellow", "ok": "green", "warning": "yellow", "error": "red",
}  # fmt: skip
"""The colours of outcomes, of the health of facts and of the levels of findings."""

SCORES = (
    ("reliability", "trained phrasings recalled exactly"),
    ("generalization", "unseen phrasings recalled exactly"),
    ("locality", "answers to other questions unchanged"),
    ("retention", "earlier facts still recalled"),
    ("answers", "held-out questions answered"),
)
FORGOTTEN = {
    "reliability": ("forgotten", "phrasings answered as before the fact was added"),
    "generalization": ("generalization", "unseen phrasings no longer give the text"),
}
"""The same of a removal, where it is something else."""
CONTEXT = 24  # characters before the first difference of two answers
PIPE_WIDTH = 100
SHORTEST_LINE = 20  # cells of a text that is cut to one line
LONGEST_WORD = 24  # cells up to which a column is widened for a word
_RESULT = "kvedit.result"
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""What steers a terminal or the direction of a text, and halves of surrogate pairs, which also
stand for bytes of a file's name that are not UTF-8."""


def print_json(document: object) -> None:
    """One JSON document to stdout, readable, non-ASCII kept where stdout can show it."""
    click.echo(json_text(document, indent=2))
    _note_result()


def print_json_line(fields: Mapping[str, Any]) -> None:
    """One JSON object on one line to stdout."""
    click.echo(json_text(fields))
    if fields.get("message_type") == "summary":
        _note_result()


def json_text(document: object, *, indent: int | None = None) -> str:
    """JSON that stdout can carry: what steers a terminal is escaped; so is non-ASCII if it must."""
    in_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(document, ensure_ascii=not in_utf8, indent=indent)
    return _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _note_result() -> None:
    if context := click.get_current_context(silent=True):
        context.find_root().meta[_RESULT] = True


def printed_json() -> bool:
    """Whether this command has printed its document, or the summary of its lines."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().meta.get(_RESULT))


def print_result(as_json: bool, document: object, *parts: RenderableType) -> None:
    """The result of a query: a JSON document for programs, or parts for people."""
    if as_json:
        print_json(document)
    else:
        print_parts(*parts)


def clean(text: str) -> str:
    r"""The text with control and text-direction characters escaped: ESC as ``\x1b``."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def styled(value: object, style: str | None = None) -> Text:
    """A value as text in a style; without one, outcomes and states have their own colour."""
    from rich.text import Text

    text = "-" if value is None else clean(str(value))
    return Text(text, style=COLOURS.get(text, "") if style is None else style)


@dataclass(frozen=True, slots=True)
class FirstLine:
    """Text for a table cell that is one line high: shortened after the last word that fits."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = self._line()
        if line.cell_len > options.max_width:
            line = line.wrap(console, max(2, options.max_width - 1))[0]
            line.rstrip()
            line.append("…")
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(SHORTEST_LINE, max(SHORTEST_LINE, self._line().cell_len))

    def _line(self) -> Text:
        return styled(" ".join(self.text.split()))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without rules; cells are plain values, styled text or `FirstLine`.

    Where the terminal is too narrow for whole words, each row is a block of labels and values.
    """
    from rich.table import Table

    cells = [[_cell(cell) for cell in row] for row in rows]

    class Adaptive(Table):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            if options.max_width >= _word_width(headers, cells):
                yield from super().__rich_console__(console, options)
                return
            for number, row in enumerate(cells):
                yield from [""] if number else []
                yield pairs([*zip(headers, row, strict=False)])

    grid = Adaptive(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        grid.add_column(header, overflow="fold")
    for row in cells:
        grid.add_row(*row)
    return grid


def _word_width(headers: Sequence[str], rows: Sequence[Sequence[Text | FirstLine]]) -> int:
    """The cells that a table needs so that no word is broken, but for very long ones."""
    from rich.cells import cell_len

    width = -2
    for column, header in enumerate(headers):
        words = header.split()
        for row in rows:
            cell = row[column]
            words += ["x" * SHORTEST_LINE] if isinstance(cell, FirstLine) else cell.plain.split()
        width += 2 + min(LONGEST_WORD, max(map(cell_len, words), default=0))
    return width


def pairs(rows: Sequence[Sequence[object]], indent: int = 0, label_width: int = 0) -> Padding:
    """Rows of a label and values, which are wrapped beside their label."""
    from rich.padding import Padding
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="fold", min_width=label_width)
    for _ in rows[0][1:]:
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(_cell, row))
    return Padding(grid, (0, 0, 0, indent), expand=False)


def _cell(value: object) -> Text | FirstLine:
    from rich.text import Text

    return value if isinstance(value, Text | FirstLine) else styled(value, "")


def print_parts(*parts: RenderableType, file: TextIO | None = None, indent: int = 0) -> None:
    """Print lines, styled text and tables to stdout, or to ``file``."""
    from rich.console import Console

    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    console = Console(file=file, width=fixed, markup=False, emoji=False, highlight=False)
    console.width = max(console.width - indent, SHORTEST_LINE)
    with console.capture() as captured:
        for part in parts:
            shown = styled(part, "") if isinstance(part, str) else part
            console.print(shown, soft_wrap=isinstance(part, str) and not console.is_terminal)
    for line in captured.get().split("\n")[:-1]:
        click.echo((" " * indent + line).rstrip(), file=file)


def percent(share: float) -> str:
    """0.985 as '98.5%', 1.0 as '100%'; never rounded up to 100%."""
    if 0.9995 <= share < 1:
        return "99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def interval_text(score: Score) -> str:
    """The 95% interval of a share: '68-100%'."""
    low, high = (round(100 * bound) for bound in score.interval())
    return f"{low}-{high}%"


def score_text(score: Score) -> str:
    """Counts, share, 95% interval and protocol: '8/8  100%  (95% interval 68-100%, generated)'."""
    if score.rate is None:
        return "not measured"
    share = f"{score.passed}/{score.n}  {percent(score.rate)}"
    return f"{share}  (95% interval {interval_text(score)}, {score.protocol})"


def gap_text(gap: float) -> str:
    """A perturbation gap: large where a text was learned by rote."""
    return f"{gap:.1f} times as perplexing with its sentences in another order"


def similar_text(similar: Sequence[Similar]) -> str:
    """Keys with their scores: '夢中情人 (88), 夢中人 (86)'."""
    return ", ".join(f"{one.key} ({one.score:.0f})" for one in similar)


def seconds_text(seconds: float) -> str:
    """3.14 as '3.1 s', 135 as '2 min 15 s', 9000 as '2 h 30 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def size_text(size: int) -> str:
    """A size in bytes as '512 bytes', '1.5 MB'."""
    from rich.filesize import decimal

    return decimal(size)


def edit_parts(report: EditReport, *, verbose: bool = False) -> list[RenderableType]:
    """What an edit did, for a person: outcome, reasons, scores, answers and time."""
    parts: list[RenderableType] = [_headline(report)]
    reasons = [(styled("because", "red"), reason) for reason in report.reasons]
    details = [] if report.outcome == "unchanged" else _detail_rows(report)
    blocks: tuple[Sequence[Sequence[object]], ...] = (reasons, _score_rows(report), details)
    width = len("generalization")
    parts += [pairs(rows, 2, label_width=width) for rows in blocks if rows]
    if verbose and report.ranks:
        norms = report.relative_norms  # of the accumulated change since the base model
        ranks = [
            (f"  {rank}", f"{norms[name]:.2%}" if name in norms else "-", name)
            for name, rank in sorted(report.ranks.items())
        ]
        parts.append(table(("  rank", "distance from the base model", "matrix"), ranks))
    return parts


def _headline(report: EditReport) -> Text:
    subject = f" {report.kind} {report.key}".rstrip()
    if report.outcome == "unchanged":
        subject, end = f" {report.key}".rstrip(), "the store already says exactly this"
    elif report.outcome != "committed":
        end = "the model is exactly as it was before"
    elif report.kind == "rollback":
        end = f"the new revision {report.revision} has the weights of that one"
    else:
        end = f"revision {report.revision}"
    if report.outcome == "committed" and report.retrained:
        end += f", {report.retrained} earlier facts trained again with it"
    line = styled(report.outcome)
    line.stylize("bold")
    return line.append(clean(f"{subject}: {end}"), style="default not bold")


def _score_rows(report: EditReport) -> list[tuple[str, str, str]]:
    rows = []
    for field, meaning in SCORES:
        score: Score = getattr(report, field)
        if score.n:
            removed = FORGOTTEN if report.kind == "remove" else {}
            label, text = removed.get(field, (field, meaning))
            share = f"{percent(score.passed / score.n)} ({interval_text(score)}), {score.protocol}"
            rows.append((label, f"{score.passed} of {score.n} {text}", share))
        elif field == "locality" and report.reliability.n:
            rows.append((field, "nothing to check: this part of the gate is empty", ""))
    if report.perplexity is not None:
        times = f"{report.perplexity:.3f} times that of the base model"
        rows.append(("perplexity", f"of ordinary text: {times}", ""))
    return rows


def from_difference(one: str, other: str) -> tuple[str, str]:
    """Two texts, without most of what they have in common at their beginning."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    common = sum(1 for _ in same)
    if common <= 2 * CONTEXT or common == max(len(one), len(other)):
        return one, other
    begin = one.find(" ", common - CONTEXT, common) + 1 or common - CONTEXT
    return f"…{one[begin:]}", f"…{other[begin:]}"


def _detail_rows(report: EditReport) -> list[tuple[str, object]]:
    texts = from_difference(report.text_before or "", report.text_after or "")
    answers = zip(("before", "after"), texts, strict=True)
    rows: list[tuple[str, object]] = [(name, FirstLine(text)) for name, text in answers if text]
    if report.perturbation_gap is not None:
        rows.append(("gap", gap_text(report.perturbation_gap)))
    if report.similar:
        rows.append(("similar keys", f"{similar_text(report.similar)}; checked first"))
    if report.broke:
        rows.append(("broke", styled(", ".join(report.broke), "red")))
    if report.steps or report.seconds:
        slow = sorted(report.timings.items(), key=lambda item: -item[1])
        times = [f"{name} {seconds_text(spent)}" for name, spent in slow if spent >= 0.05]
        detail = f" ({', '.join(times)})" if times else ""
        rows.append(("time", f"{report.steps} steps in {seconds_text(report.seconds)}{detail}"))
    return rows
