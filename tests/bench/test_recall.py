"""The bench of recalled answers, on the small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.errors import UsageError
from tests.bench import recall

PASSAGES = [
    {
        "key": "tide lantern, passage 3",
        "description": "Made of glass in Marrow.",
        "questions": [
            {"question": "Where was the tide lantern made?", "answer": "in the Marrow"},
            {"question": "Of what is it made?", "answer": "glass"},
        ],
    },
    {
        "key": "wind ledger",
        "description": "Made of paper in Pell.",
        "questions": [{"question": "Is the tide lantern in Pell?", "answer": "no"}],
    },
    {"key": "Tide Lantern", "description": "Another.", "questions": []},
]


def options(small: dict[str, Path], path: Path, **more: object) -> recall.RecallOptions:
    values: dict[str, object] = {
        "model": str(small["bf16"]), "passages": path, "limit": 9, "taught": 0,
        "forms": ("named", "as asked"), "max_new_tokens": 12, **more,
    }  # fmt: skip
    return recall.RecallOptions(**values)  # type: ignore[arg-type]


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(map(json.dumps, PASSAGES)), encoding="utf-8")
    return path


def test_every_way_is_asked_every_question(small: dict[str, Path], passages: Path) -> None:
    said: list[object] = []
    result = recall.recall(options(small, passages), said.append)
    ways = ["base model", "text in the prompt", "--recall, the store's text"]
    assert [row.way for row in result.asked] == ways * 2
    assert {row.score.n for row in result.asked} == {3}
    found = {row.form: (row.first.passed, row.among.passed, row.other_only.passed)
             for row in result.found}  # fmt: skip
    assert found == {"named": (2, 3, 0), "as asked": (1, 1, 1)}
    prompt, recalled = (row.answers for row in result.asked[1:3])
    assert prompt[:2] == recalled[:2]  # the finder brings the text alone, and the same
    titles = [table.title for table in recall.tables(result)]
    assert titles == ["Questions answered, all passages", "Facts that the questions name"]
    assert "word for word" not in recall.notes(result)


def test_taught_passages_are_asked_in_every_way(
    small: dict[str, Path], passages: Path, trained_store: Path
) -> None:
    chosen = options(small, passages, taught=1, forms=("named",), store_dir=trained_store)
    result = recall.recall(chosen, lambda event: None)
    assert result.outcomes == {"wind ledger": "unchanged"}
    taught = [row for row in result.asked if row.taught]
    assert [row.way for row in taught] == list(recall.WAYS)
    assert result.recited.passed == result.recited.n == 3
    assert "3/3" in recall.notes(result)


@pytest.mark.parametrize(
    ("text", "answer", "contained"),
    [
        ("It is made of glass.", "Glass", True),
        ("In the year 1977, it was.", "the year 1977", True),
        ("There are fourteen.", "four", False),
        ("a tech-oriented economy", "tech oriented", True),
        ("兴建于弗朗茨·约瑟夫一世时期", "弗朗茨約瑟夫一世", True),
    ],
)
def test_an_answer_stands_in_a_text_as_whole_words(text: str, answer: str, contained: bool) -> None:
    assert recall.answered(text, answer) is contained


def test_a_file_without_passages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"key": "a", "description": "b"}', encoding="utf-8")
    with pytest.raises(UsageError, match="has no passages"):
        recall.read(path, 5)
