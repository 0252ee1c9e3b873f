"""docs/results.md, made from docs/results/*.json: ``python -m tests.docs.results``.

A JSON file is one question: ``question``, a short ``answer``, ``columns``, ``rows`` and ``notes``.
A row has its ``cells`` and the ``log`` entry that its figures come from, as a link from docs/log/.
A cell of two whole numbers, ``[passed, n]``, is written as a share with its Wilson 95% interval, so
that n is never missing and no interval is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvedit.files import write_atomic
from kvedit.metrics import wilson

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results"
INTRODUCTION = """\
# Results

What is true now, one question a section. Each row names its base model and links to the log \
entry with the command, the machine and the commit. This page is made from `docs/results/*.json` \
by `python -m tests.docs.results`; a test fails when it is out of date.

Three kinds of base model occur. **kvedit-tiny** (8.4 million parameters) ships with the package. \
Models that are called **pretrained here** saw the same two sets of facts (poets of the Tang and \
Song in Chinese, subject-relation-object facts in English) in other sizes. Models with **random \
weights** have the shape of a published model and measure time and memory only. Of published \
models two were measured; see [their section](#does-it-work-on-published-models). Facts one by \
one, and whatever else trains single facts, were measured before 2026-11-28 unless the row says \
otherwise: the loop for single facts is another one since.

Counts are of exact answers. Unless a table says otherwise they are generated greedily and freely. \
Brackets are Wilson 95% intervals. Every row is one run.
"""


def cell(value: Any) -> str:
    """One cell of a table; two whole numbers are a count of passes and n."""
    if not isinstance(value, list):
        return str(value)
    passed, n = value
    low, high = wilson(passed, n)
    return f"{passed:,}/{n:,} = {passed / n:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def table(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """A Markdown table whose last column links to the log."""
    lines = [[*columns, "measured"], ["---"] * (len(columns) + 1)]
    for row in rows:
        assert len(row["cells"]) == len(columns), row
        lines.append([*map(cell, row["cells"]), f"[{row['log'][:10]}](log/{row['log']})"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def section(figures: dict[str, Any]) -> str:
    """One question with its answer, table and notes."""
    parts = [f"## {figures['question']}\n", figures["answer"] + "\n"]
    if figures["rows"]:
        parts.append(table(figures["columns"], figures["rows"]))
    parts += [f"{note}\n" for note in figures.get("notes", ())]
    return "\n".join(parts)


def page() -> str:
    """The whole page, questions in the order of the file names."""
    files = sorted(FIGURES.glob("*.json"))
    sections = [section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return "\n".join([INTRODUCTION, *sections])


if __name__ == "__main__":
    write_atomic(PAGE, page().encode())
