"""The benchmark of what trained texts answer, on the small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.errors import UsageError
from tests.bench.answers import AnswersOptions, RecipeResult, answers, line, read_passages, tables

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
    assert [one.prompt for one in text.answers] == [one.prompt for one in both.answers]
    assert text.answered.n == result.base.n == result.in_prompt.n == 2
    assert {name: score.n for name, score in both.recalled.items()} == {
        "none": 2, "model": 2, "store": 2
    }  # fmt: skip
    assert text.abilities.n == result.abilities.n == 1
    assert text.cpu_seconds > 0 and text.recited.n == 1
    settings = (folder / "parts-questions" / "kvedit.toml").read_text(encoding="utf-8")
    assert "[study]\nparts = true" in settings
    assert [row[0] for row in tables(result)[0].rows] == [
        "base model", "text in the prompt", "text", "parts, questions"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no recipe 'more'"):
        answers(AnswersOptions(passages=passages, recipes=("more",)), emit=lambda event: None)


def test_passages_can_be_ingested(passages: Path, empty_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    empty_store.rename(folder / "store")
    options = AnswersOptions(
        passages=passages, recipes=("questions",), method="ingest", store_dir=folder
    )
    result = answers(options, emit=lambda event: None)
    assert tables(result)[0].title == "2 passages by ingest"
    (questions,) = result.recipes
    assert questions.recited.n == 2 and questions.steps > 0 and questions.seconds > 0
