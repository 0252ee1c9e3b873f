"""The tasks for lm-evaluation-harness name what is there, and read their data from plain files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.harness import plain_files

TASKS = Path(plain_files.__file__).parent
FUNCTION = re.compile(r"^custom_dataset: !function plain_files\.(\w+)$", re.M)


def test_every_task_has_its_data() -> None:
    texts = {path.stem: path.read_text("utf-8") for path in sorted(TASKS.glob("*.yaml"))}
    assert set(texts) == {"plain_arc_easy", "plain_piqa", "plain_mmlu", "plain_gsm8k"}
    for name, text in texts.items():
        (function,) = FUNCTION.findall(text)
        assert text.startswith(f"task: {name}\n") and name == f"plain_{function}"
        assert callable(getattr(plain_files, function))


def test_a_task_gets_its_own_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [
        {"task": task, "prompt": "Is it?", "choices": ["yes", "no"], "answer": 0}
        for task in ("piqa", "mmlu", "piqa")
    ]
    (tmp_path / "abilities.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len(plain_files.piqa(data=str(tmp_path), version=1)["test"]) == 2
