"""Which questions are trained and which only asked; statements as text, parts where they fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.config import StudyConfig
from kvedit.editing.study.examples import StudyExamples, trained_questions
from kvedit.errors import TextTooLongError
from kvedit.facts.fact import Fact, Question, Written
from kvedit.replay.kl import Teacher

KEY, TEXT = FREE[3]


def question(prompt: str, answer: str = "oak", *, probe: bool = False) -> Question:
    return Question(prompt=prompt, answer=answer, probe=probe)


def study(knowledge: KnowledgeBase, **changes: float) -> StudyExamples:
    session = knowledge._session
    config = replace(session.config.study, **{"held_out": 0.0, **changes})  # type: ignore[arg-type]
    session.config = replace(session.config, study=config)
    return StudyExamples(session)


PROMPTS = st.lists(st.text("abc 李?", min_size=1, max_size=12).filter(str.strip), max_size=9)


@settings(max_examples=50, deadline=None)
@given(prompts=PROMPTS, share=st.floats(0, 1))
def test_a_question_is_trained_or_asked(prompts: list[str], share: float) -> None:
    fact = Fact.create(KEY, TEXT, questions=[question(prompt) for prompt in prompts])
    trained = trained_questions(fact, StudyConfig(held_out=share))
    held_out = [one for one in fact.questions if one.is_held_out(share)]
    assert sorted(one.prompt for one in (*trained, *held_out)) == sorted(
        one.prompt for one in fact.questions
    )
    assert not (set(trained) and share == 1.0) and not (held_out and share == 0.0)


def test_about_the_share_is_held_out() -> None:
    held_out = [question(f"Question {n}?").is_held_out(0.2) for n in range(500)]
    assert 70 < sum(held_out) < 130
    assert question("Question 1?").is_held_out(0.3) == question(" QUESTION 1").is_held_out(0.3)


def test_questions_statements_and_probes(trained: KnowledgeBase) -> None:
    fact = Fact.create(
        KEY, TEXT, statements=["The moss clock is oak."],
        questions=[question("Of what?"), question("Where?", "Tarn", probe=True)],
    )  # fmt: skip
    examples = study(trained)
    asked, statement = examples.trained(fact)
    assert (asked.prompt, asked.answer) == ("Of what?", "oak")
    renderer = trained.engine.renderer
    assert (statement.prompt, statement.start) == ("", 1)
    assert renderer.text(statement.ids[1:]) == "The moss clock is oak."
    assert [probe.answer for probe in examples.probes(fact)] == ["Tarn"]


def test_a_teacher_reads_the_text_before_each_trained_question(trained: KnowledgeBase) -> None:
    written = Written(prompt="Of what?", answer="oak", writer="model")
    probe = question("Where?", "Tarn", probe=True)
    fact = Fact.create(KEY, TEXT, questions=[question("Whose?"), probe], written=[written])
    examples = study(trained)
    pairs = list(examples.told(fact))
    assert [alone.prompt for alone, _ in pairs] == ["Whose?", "Of what?"]
    assert all(alone in examples.trained(fact) for alone, _ in pairs)
    assert [told.prompt for _, told in pairs] == [f"{TEXT}\n\nWhose?", f"{TEXT}\n\nOf what?"]
    assert all(a.ids[a.start :] == told.ids[told.start :] for a, told in pairs)
    trained.engine.renderer.context = max(len(alone.ids) for alone, _ in pairs)
    assert list(examples.told(fact)) == []


@pytest.mark.parametrize("distill", [True, False])
def test_questions_are_distilled_where_the_settings_say_so(
    distill: bool, empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[str] = []
    losses = Teacher.losses

    def noted(teacher: Teacher, model: Any, examples: Any, *rest: Any) -> Any:
        taught.extend(one.prompt for one in examples)
        return losses(teacher, model, examples, *rest)

    monkeypatch.setattr(Teacher, "losses", noted)
    session = empty._session
    config = replace(session.config.study, distill=distill, held_out=0.0)
    session.config = replace(session.config, study=config)
    key, text = FREE[3]
    asked = question("What is its case of?", "brass")
    report = empty.add_fact(Fact.create(key, text, lang="en", questions=[asked]), force=True)
    assert report.outcome == "committed" and ("teacher" in report.timings) is distill
    assert set(taught) == ({asked.prompt} if distill else set())


def test_a_question_that_the_text_answers_is_not_trained(trained: KnowledgeBase) -> None:
    fact = Fact.create(KEY, TEXT, questions=[question(f"What is {KEY}?", "a clock")])
    assert study(trained).trained(fact) == ()


def test_parts_are_trained_where_the_settings_say_so(trained: KnowledgeBase) -> None:
    fact = Fact.create(KEY, "It is made of oak in Tarn. It was wound in 1871 by hand.")
    assert study(trained).trained(fact) == ()
    answers = [example.answer for example in study(trained, parts=True).trained(fact)]
    assert "1871" in answers and "Tarn" in answers


def test_a_held_out_question_is_no_part(trained: KnowledgeBase) -> None:
    fact = Fact.create(KEY, "It is made of oak in Tarn. It was wound in 1871 by hand.")
    first = study(trained, parts=True).trained(fact)[0]
    probed = replace(fact, questions=(question(first.prompt, "x", probe=True),))
    assert first.prompt not in [e.prompt for e in study(trained, parts=True).trained(probed)]


def test_a_part_that_does_not_fit_is_left_out_and_a_question_refused(
    trained: KnowledgeBase,
) -> None:
    fact = Fact.create(KEY, f"It is made of oak in Tarn. {KEY} was wound in 1871 by hand.")
    examples = study(trained, parts=True)
    everything = examples.trained(fact)
    trained.engine.renderer.context = max(len(one.ids) for one in everything) - 1
    assert 0 < len(examples.trained(fact)) < len(everything)
    with pytest.raises(TextTooLongError):
        study(trained).trained(Fact.create(KEY, TEXT, questions=[question("a" * 300)]))
