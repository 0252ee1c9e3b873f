"""What is answered freely, and how much a text hangs on its order; an edit that reports both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_engine import configure, warnings_in
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.editing.study import answers
from kvedit.events import Score
from kvedit.facts.fact import Fact, Question
from kvedit.store.rows import ProbeRow

KEY, TEXT = FREE[0]
"""The store ``trained`` has learned it."""


def test_an_answer_passes_when_it_contains_what_was_expected(trained: KnowledgeBase) -> None:
    prompts = [(f"What is {KEY}?", "MARROW"), (f"What is {KEY}?", "Tarn")]
    examples = trained.engine.renderer.examples(prompts)
    right, wrong = answers.ask(trained.engine, [(7, example) for example in examples])
    assert (right.passed, wrong.passed) == (True, False)
    assert right.answer == wrong.answer == TEXT
    assert (right.fact_id, right.kind, right.protocol) == (7, "portability", "generated")
    assert answers.ask(trained.engine, []) == []


def test_a_recitation_that_is_too_long_is_cut(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SLACK", 0)
    example = trained.engine.renderer.example(f"What is {KEY}?", "a")
    (row,) = answers.ask(trained.engine, [(1, example)])
    assert row.answer is not None and TEXT.startswith(row.answer) and row.answer != TEXT


def row(passed: bool, kind: str = "portability") -> ProbeRow:
    return ProbeRow(
        fact_id=1, kind=kind, protocol="generated", prompt="", expected="", answer="", passed=passed
    )


def test_only_held_out_questions_are_counted() -> None:
    assert answers.score([row(True), row(False), row(True, "recall")]) == Score(1, 2, "generated")


def test_sentences_change_places() -> None:
    fact = Fact.create("k", "One is here. Two is there. Three is lost.")
    assert answers.reordered(fact) == "Three is lost. One is here. Two is there."
    assert answers.reordered(Fact.create("k", "一個。兩個！")) == "兩個！一個。"
    assert answers.reordered(Fact.create("k", "One only.")) == ""


def test_a_text_known_by_heart_hangs_on_its_order(trained: KnowledgeBase) -> None:
    known = Fact.create(KEY, TEXT, lang="en")
    two = Fact.create("oiled sail", "Made of silk. Found in Tarn.", lang="en")
    gaps = answers.perturbation_gaps(trained.engine, [known, two])
    assert gaps[0] is None and gaps[1] is not None and gaps[1] > 0
    assert answers.mean_gap(gaps) == pytest.approx(gaps[1])
    assert answers.mean_gap([None]) is None
    assert answers.mean_gap([2.0, None, 8.0]) == pytest.approx(4.0)


def test_an_edit_reports_what_is_answered_and_does_not_refuse_for_it(empty: KnowledgeBase) -> None:
    questions = [
        Question(prompt="Who wound moss clock last?", answer="the miller of Pell", probe=True),
        Question(prompt="What is moss clock made of?", answer="oak", probe=True),
    ]
    key, text = FREE[3]
    report = empty.add(key, text, questions=questions)
    assert report.outcome == "committed"
    assert report.answers.n == 2 and report.answers.protocol == "generated"
    assert report.answers.passed < 2
    assert report.perturbation_gap is None  # one sentence
    row = empty.store.require(key)
    rows = [one for one in empty.store.results(row.id) if one.kind == "portability"]
    assert [one.expected for one in rows][::-1] == ["the miller of Pell", "oak"]
    assert all(one.revision == 1 and one.answer for one in rows)
    verified = empty.verify()
    assert verified.answers == report.answers and verified.checks[0].answers == report.answers
    assert [c.n for c in empty.store.probe_counts() if c.kind == "portability"] == [4]


def test_other_questions_are_an_update_and_go_when_the_text_does_not_say_them(
    trained: KnowledgeBase, events: list[Any]
) -> None:
    fact = trained.store.require(KEY).fact
    assert trained.add(KEY, TEXT).outcome == "unchanged"
    configure(trained.store.path, recall=0, paraphrase=0, locality=0, retention=0, steps=4)
    trained._session.config = trained.store.config
    questions = (Question(prompt="Of what is it?", answer="glass"),)
    report = trained.add(KEY, TEXT, questions=questions, force=True)
    assert (report.kind, report.outcome) == ("update", "committed")
    assert trained.store.require(KEY).fact == replace(fact, questions=questions)
    assert trained.add(KEY, TEXT, questions=questions).outcome == "unchanged"
    changed = trained.update(KEY, "Made of glass in Tarn.", force=True)
    assert changed.outcome == "committed" and trained.store.require(KEY).fact.questions == questions
    assert not warnings_in(events, "dropped")
    trained.update(KEY, "Made of silk in Tarn.", force=True)
    (warning,) = warnings_in(events, "dropped")
    assert "so it was dropped: Of what is it?" in warning.text
    assert trained.store.require(KEY).fact.questions == ()
