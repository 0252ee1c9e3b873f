"""The tasks' data from plain files, for lm-evaluation-harness: nothing is downloaded.

``--metadata '{"data": "DIR"}'`` says where the files are: ``abilities.jsonl`` with task, prompt,
choices and answer (an index), ``gsm8k.jsonl`` with question and answer.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any


def _rows(path: Path, task: str | None = None) -> dict[str, Any]:
    """The split ``test``: the rows of a file, or those of one task."""
    from datasets import Dataset

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {"test": Dataset.from_list([row for row in rows if task in (None, row.get("task"))])}


def _choices(task: str, *, data: str, **_: Any) -> dict[str, Any]:
    return _rows(Path(data) / "abilities.jsonl", task)


def gsm8k(*, data: str, **_: Any) -> dict[str, Any]:
    """Word problems: question and answer, which ends in '#### NUMBER'."""
    return _rows(Path(data) / "gsm8k.jsonl")


arc_easy = partial(_choices, "arc_easy")
piqa = partial(_choices, "piqa")
mmlu = partial(_choices, "mmlu")
