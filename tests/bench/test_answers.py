"""The benchmark of what trained texts answer, on the small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import UsageError
from tests.bench.answers import (
    WAYS,
    AnswersOptions,
    RecipeResult,
    answers,
    line,
    read_passages,
    tables,
)

PASSAGES = [
    {"key": f"{name} bell", "description": text, "questions": [
        {"question": f"Of what is {name} bell?", "answer": metal},
        {"question": f"Where is {name} bell?", "answer": "Pell"},
        {"question": f"Who rings {name} bell?", "answer": "nobody"},
        {"question": f"Who rings {name} bell?", "answer": "no one"},
    ]}
    for name, metal, text in (
        ("amber", "copper", "Made of copper in Pell. It hangs there."),
        ("salt", "glass", "Made of glass in Pell."),
    )
]  # fmt: skip


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    plain = {"key": "plain", "description": "It has no question."}
    rows = [json.dumps(row) for row in (*PASSAGES, plain)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_the_shortest_come_first_and_every_second_question_is_held_out(passages: Path) -> None:
    facts = read_passages(passages, None)
    assert [fact.key for fact in facts] == ["salt bell", "amber bell"]
    assert [one.probe for one in facts[0].questions] == [True, False, True]
    assert len(read_passages(passages, 1)) == 1
    passages.write_text('{"key": "k", "description": "d"}', encoding="utf-8")
    with pytest.raises(UsageError, match="no passage with questions"):
        read_passages(passages, None)


def test_recipes_are_asked_the_same_questions(
    passages: Path, empty_store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    empty_store.rename(folder / "store")
    told: list[RecipeResult] = []
    choice = {"task": "bells", "prompt": "A bell is", "choices": ["rung", "eaten"], "answer": 0}
    abilities = tmp_path / "abilities.jsonl"
    abilities.write_text(json.dumps(choice), encoding="utf-8")
    options = AnswersOptions(
        passages=passages, limit=1, recipes=("text", "parts, questions"), store_dir=folder,
        abilities=abilities,
    )  # fmt: skip
    result = answers(options, emit=lambda event: None, tell=lambda _, one: told.append(one))
    assert told == list(result.recipes) and line(told[0]).startswith("text: ")
    text, both = result.recipes
    (plain, *others) = [
        [one.prompt for one in asked.answers]
        for ways in (text.asked, both.asked, result.base)
        for asked in ways.values()
    ]
    assert (
        len(plain) == 2
        and len(others) == 4 + 4 + 3 - 1
        and set(map(tuple, others)) == {tuple(plain)}
    )
    assert set(text.asked) | set(result.base) == set(WAYS)
    assert all(one.score.n == 2 and one.f1.n == 1 for one in both.asked.values())
    assert text.abilities.n == result.abilities.n == 1
    assert text.cpu_seconds > 0 and text.recited.n == 1
    settings = (folder / "parts-questions" / "kvedit.toml").read_text(encoding="utf-8")
    assert "[study]\nparts = true" in settings
    for table in tables(result):
        assert [row[0] for row in table.rows] == ["base model", "text", "parts, questions"]
        assert {len(row) for row in table.rows} == {len(table.columns)}
    with pytest.raises(UsageError, match="no recipe 'more'"):
        answers(AnswersOptions(passages=passages, recipes=("more",)), emit=lambda event: None)


def test_passages_can_be_ingested(passages: Path, empty_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    empty_store.rename(folder / "store")
    options = AnswersOptions(
        passages=passages, recipes=("questions, named",), method="ingest", store_dir=folder
    )
    result = answers(options, emit=lambda event: None)
    assert tables(result)[0].title.startswith("2 passages by ingest")
    (questions,) = result.recipes
    assert questions.recited.n == 2 and questions.steps > 0 and questions.seconds > 0
    with KnowledgeBase.open(folder / "questions-named") as knowledge:
        asked = [one for row in knowledge.store.facts() for one in row.fact.questions]
    assert {one.prompt.startswith("About ") for one in asked if not one.probe} == {True}
    assert {one.prompt.startswith("About ") for one in asked if one.probe} == {False}
