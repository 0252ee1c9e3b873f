"""The benchmark of one answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import answer
from tests.bench.answer import AnswerOptions, answers, tables


def test_every_way_answers(trained_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "DTYPES", ("bfloat16",))
    said: list[object] = []
    result = answers(AnswerOptions(store=trained_store, limit=3, repeats=1), emit=said.append)
    assert len(said) == len(result.runs) == 2
    for runs in result.runs.values():
        assert 0 < runs[0].cpu_seconds < 100 and runs[0].seconds > 0 and runs[0].memory > 2**27
    assert len(tables(result)[0].rows) == 2 and result.ratio > 0
