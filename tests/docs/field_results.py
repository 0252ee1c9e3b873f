"""docs/results/14-field.json, made from what ``bench field --json`` kept:
``python -m tests.docs.field_results RESULT.json LOG-ENTRY``.

Invariant: figures come from the result alone; the answer in words and the notes of the file that is
there stay, because a person writes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvedit.files import write_atomic

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "14-field.json"
SHARES = ("reliability", "generalization", "locality", "trr")
COLUMNS = (
    "method", "base model", "edits", "its own prompts, exact", "paraphrases, exact",
    "other answers unchanged", "unedited keys still right (TRR)",
    "harmonic mean of the first three [95%]", "multiple choice, points [95%]",
    "processor s an edit",
)  # fmt: skip


def rows(result: Mapping[str, Any], log: str) -> list[dict[str, Any]]:
    """A row a method, after its last edit."""
    return [{"cells": _cells(result, row), "log": log} for row in result["rows"]]


def _cells(result: Mapping[str, Any], row: Mapping[str, Any]) -> list[Any]:
    last = row["points"][-1]
    mean = last["harmonic"]
    low, high = mean["interval"]
    seconds = row["processor_seconds"] / last["after"]
    way = "" if row["way"] == "sequential" else ", all together"
    return [
        f"{row['method']}{way} ({row['changes']})", Path(result["model"]).name, str(last["after"]),
        *(_share(last[name]) for name in SHARES),
        "-" if mean["value"] is None else f"{mean['value']:.2f} [{low:.2f}, {high:.2f}]",
        _points(last["abilities"]), f"{seconds:.1f}",
    ]  # fmt: skip


def _share(score: Mapping[str, Any]) -> Any:
    return [score["passed"], score["n"]] if score["n"] else "-"


def _points(abilities: list[Mapping[str, Any]]) -> str:
    if not abilities:
        return "-"
    low, high = (100 * bound for bound in abilities[-1]["interval"])
    return f"{100 * abilities[-1]['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def figures(result: Mapping[str, Any], log: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content; ``before`` is what is there."""
    return {
        "question": "What would people use instead, and how does it compare?",
        "answer": before.get("answer", ""),
        "columns": list(COLUMNS),
        "rows": rows(result, log),
        "notes": before.get("notes", []),
    }


def main(path: Path, log: str) -> None:
    """Write the file again."""
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    made = figures(json.loads(path.read_text(encoding="utf-8")), log, before)
    write_atomic(FILE, (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
