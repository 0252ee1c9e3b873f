"""Facts on their way to a writer and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.config import StudyConfig
from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact, Question, Written
from kvedit.facts.forms.study import StudyEntry, StudyRecord, entries, lines, read

CONFIG = StudyConfig(held_out=0.0)
FACT = Fact.create(
    "Porto", "Porto is a harbour town on the Douro. It was rebuilt in 1871.",
    questions=[
        Question(prompt="Which river?", answer="the Douro"),
        Question(prompt="What kind of town?", answer="a harbour town", probe=True),
    ],
    statements=["The Douro flows by Porto."],
    written=[
        Written(prompt="When was it rebuilt?", answer="1871", writer="model"),
        Written(prompt="", answer="Porto has a harbour.", writer="Ann"),
    ],
)  # fmt: skip


def test_entries_say_who_wrote_them_and_what_is_only_asked() -> None:
    assert entries(FACT, CONFIG) == [
        StudyEntry("Which river?", "the Douro", "given"),
        StudyEntry("What kind of town?", "a harbour town", "given", held_out=True),
        StudyEntry("When was it rebuilt?", "1871", "model"),
        StudyEntry("", "The Douro flows by Porto.", "given"),
        StudyEntry("", "Porto has a harbour.", "Ann"),
    ]
    assert all(one.held_out for one in entries(FACT, StudyConfig(held_out=1.0)) if one.prompt)
    with_parts = entries(FACT, StudyConfig(held_out=0.0, parts=True))
    assert {one.writer for one in with_parts} == {"given", "model", "Ann", "parts"}


def test_a_writer_gets_no_held_out_question_and_no_parts() -> None:
    (line,) = lines([FACT], StudyConfig(held_out=0.0, parts=True))
    document = json.loads(line)
    assert [one["prompt"] for one in document["questions"]] == [
        "Which river?",
        "When was it rebuilt?",
    ]
    assert document["statements"] == ["The Douro flows by Porto.", "Porto has a harbour."]
    assert "harbour town on" in document["description"] and "What kind" not in line


def test_what_was_written_out_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n\n".join(lines([FACT], CONFIG)) + "\n", encoding="utf-8")
    (record,) = read(path, "Bob")
    assert (record.key, record.description) == (FACT.key, FACT.description)
    assert Written(prompt="When was it rebuilt?", answer="1871", writer="Bob") in record.texts
    assert [one.answer for one in record.texts if not one.prompt] == [*FACT.all_statements]
    path.write_text('{"key": "k", "description": "d", "questions": null}', encoding="utf-8")
    assert read(path, "Bob") == [StudyRecord("k", "d", ())]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no object"),
        ('{"key": "k"}', '"description" must be a text'),
        ('{"key": "k", "description": "d", "questions": ["q"]}', '"questions" must hold objects'),
        ('{"key": "k", "description": "d", "questions": {}}', '"questions" must be a list'),
        ('{"key": "k", "description": "d", "questions": [{"prompt": " ", "answer": ""}]}', "empty"),
        ('{"key": "k", "description": "d", "questions": [{"question": "q"}]}', '"answer" must be'),
        ('{"key": "k", "description": "d", "statements": [1]}', '"statements" must hold texts'),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(InvalidFactError, match=message) as caught:
        read(path, "Bob")
    assert "line 2" in caught.value.message
