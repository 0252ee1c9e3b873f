"""The records of every form, and what they are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvedit.errors import InvalidFactError
from kvedit.facts.phrasings import load_phrasings
from tests.bench.field.records import KINDS, choose, questions, read, sample
from tests.bench.quality_material import Choice

COUNTERFACT = {
    "subject": "Aa", "prompt": "Aa is in", "target_new": "Rome", "ground_truth": "Oslo",
    "rephrase_prompt": "Aa lies in", "locality_prompt": "Bb is in",
    "locality_ground_truth": "Bern",
}  # fmt: skip
ZSRE = {
    "subject": "Bb", "src": "Where is Bb?", "alt": "Paris", "answers": ["Bern"],
    "rephrase": "where is  BB", "loc": "Where is Cc?", "loc_ans": "Kiel",
}  # fmt: skip
HALLUCINATED = {
    "subject": "Cc", "question": "Who made Cc?", "object": "Dee", "paraphrase": "Cc's maker?",
    "locality": "What is Cc?", "hops": [{"question": "Who is Cc's maker's son?", "answer": "Eff"}],
}  # fmt: skip
PASSAGE = {
    "key": "tide lantern", "description": "A lamp of green glass.",
    "questions": [{"question": "What colour is it?", "answer": "green"}],
}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def test_all_forms_are_read(tmp_path: Path) -> None:
    first, second, third, fourth = read(
        write(tmp_path / "all.jsonl", COUNTERFACT, ZSRE, HALLUCINATED, PASSAGE)
    )
    assert (first.key, first.target, first.truth) == ("Aa", "Rome", "Oslo")
    assert first.prompts == ("Aa is in",) and first.paraphrases == ("Aa lies in",)
    assert first.locality == (("Bb is in", "Bern"),) and first.pairs == [("Aa is in", "Rome")]
    assert second.truth == "Bern", "zsRE's first answer"
    assert second.paraphrases == (), "the trained prompt is not asked again in other letters"
    assert third.portability == (("Who is Cc's maker's son?", "Eff"),) and third.truth is None
    assert third.locality == (("What is Cc?", None),)
    ways = load_phrasings("en")
    assert fourth.prompts == tuple(w.replace("{key}", "tide lantern") for w in ways.train)
    assert len(fourth.paraphrases) == 2 and not set(fourth.paraphrases) & set(fourth.prompts)
    assert fourth.portability == (("What colour is it?", "green"),)


def test_questions_of_the_first_records_come_first(tmp_path: Path) -> None:
    records = read(write(tmp_path / "all.jsonl", COUNTERFACT, ZSRE, HALLUCINATED))
    asked = questions(records)
    assert asked[: len(questions(records[:2]))] == questions(records[:2])
    assert [one.kind for one in asked[:3]] == list(KINDS[:3])
    assert asked[0].expected == "Rome" and asked[2].expected == "Bern"


def test_unedited_keys_come_from_the_end_and_are_none_of_the_edited(tmp_path: Path) -> None:
    rows = [{**COUNTERFACT, "subject": name} for name in ("Aa", "Bb", "AA", "Dd", "Ee")]
    edited, known = choose(write(tmp_path / "five.jsonl", *rows), 2, 2)
    assert [one.key for one in edited] == ["Aa", "Bb"] and [one.key for one in known] == [
        "Ee",
        "Dd",
    ]
    assert [one.key for one in choose(tmp_path / "five.jsonl", 1, 9)[1]] == ["Ee", "Dd", "Bb"]


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidFactError, match="line 2 is no record"):
        read(write(tmp_path / "bad.jsonl", ZSRE, {"subject": "x"}))
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(InvalidFactError, match="is empty"):
        read(tmp_path / "empty.jsonl")


def test_a_sample_is_even_over_tasks_and_the_same_each_time() -> None:
    rows = [Choice(task, str(at), ("a", "b"), 0) for at in range(9) for task in ("one", "two")]
    drawn = sample(rows, 5, 0)
    assert [sum(row.task == task for row in drawn) for task in ("one", "two")] == [3, 2]
    assert drawn == sample(rows, 5, 0) != sample(rows, 5, 1) and sample(rows, None, 0) == rows
