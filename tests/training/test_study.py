"""What is trained beside a text: which examples a step has, and that the text alone decides."""

from __future__ import annotations

import random
from dataclasses import replace

from small_model import FREE

from kvedit.adapter.deltas import to_bytes
from kvedit.config import GroupConfig, StudyConfig
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Example
from kvedit.replay.protected_texts import mean_losses
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Step, Task
from kvedit.training.study import Study

TEXTS = [[Example((1, fact, at), 1) for at in range(3)] for fact in range(3)]
EXAMPLES = [[Example((2, fact, at), 1) for at in range(4)] for fact in range(2)]


def study(by_fact: list[list[Example]] = EXAMPLES) -> Study:
    return Study(TEXTS[:2], TEXTS[2:], by_fact, random.Random(0))


def test_weak_examples_and_those_never_drawn_come_first() -> None:
    drawn = study()
    everything = [e for fact in EXAMPLES for e in fact]
    drawn.note(everything, [5.0] * 8)
    drawn.note([everything[6]], [-1.0])
    assert not drawn.is_recalled
    assert all(everything[6] in drawn.draw(2) for _ in range(5))
    assert len(set(drawn.draw(20))) == 8
    drawn.note([everything[6]], [0.5])
    assert drawn.is_recalled
    fresh = study()
    first = fresh.draw(4)
    fresh.note(first, [3.0] * 4)
    assert set(fresh.draw(4)[:2]).isdisjoint(first)
    fresh.margins = [1.0] * 8
    assert fresh.is_recalled


def test_a_group_draws_those_of_the_texts_in_its_step() -> None:
    drawn = study().beside([TEXTS[1][2], TEXTS[2][0]], 2)
    assert len(drawn) == 2 and set(drawn) <= set(EXAMPLES[1])


def test_those_of_rehearsed_facts_are_drawn_and_decide_nothing() -> None:
    of_rehearsed = [Example((3, 0, 0), 1)]
    both = study([*EXAMPLES, of_rehearsed])
    assert both.beside(TEXTS[2][:1], 5) == of_rehearsed
    both.note([e for fact in EXAMPLES for e in fact], [1.0] * 8)
    both.note(of_rehearsed, [-1.0])
    assert both.is_recalled and len(both.draw(20)) == 8
    assert not study([[], [], of_rehearsed])  # no new fact has any


def test_without_any_no_random_number_is_drawn() -> None:
    rng = random.Random(0)
    before = rng.getstate()
    empty = Study(TEXTS, [], [], rng)
    assert not empty and empty.is_recalled and empty.beside([TEXTS[0][0]], 2) == []
    assert rng.getstate() == before


KEY, TEXT = FREE[0]
QUESTIONS = [
    ("Which port lights tide lantern?", "Marrow."),
    ("What is tide lantern made of?", "glass"),
]


def task(engine: Engine, study: list[Example], **settings: int) -> Task:
    texts = engine.examples(Fact.create(KEY, TEXT, lang="en"))
    return Task([texts], study=[study], study_config=StudyConfig(**settings))  # type: ignore[arg-type]


def test_questions_are_trained_beside_the_text(engine: Engine) -> None:
    questions = engine.renderer.examples(QUESTIONS)
    assert not any(outcome.passed for outcome in engine.recall(questions))
    config = replace(engine.config, penalty_weight=0.6, step_gain=0.2)
    result = engine.train(task(engine, questions, extra_steps=60), config)
    assert result.trained.learned
    engine.master.add(result.delta)
    assert all(outcome.passed for outcome in engine.recall(questions))
    assert all(o.passed for o in engine.recall(engine.examples(Fact.create(KEY, TEXT, lang="en"))))


def test_a_question_that_cannot_be_learned_does_not_make_the_text_fail(engine: Engine) -> None:
    prompt, _ = QUESTIONS[0]
    contradiction = engine.renderer.examples([(prompt, "Marrow."), (prompt, "Pell.")])
    steps: list[Step] = []
    trained = engine.train(task(engine, contradiction, extra_steps=3), None, steps.append).trained
    assert trained.learned and not trained.stalled
    assert len(steps) == trained.steps <= 40


def test_no_study_is_what_was_before(engine: Engine) -> None:
    texts = engine.examples(Fact.create(KEY, TEXT, lang="en"))
    plain = engine.train(Task([texts])).delta
    assert to_bytes(engine.train(task(engine, [])).delta) == to_bytes(plain)


def test_a_group_trains_its_questions_too(engine: Engine) -> None:
    facts = [engine.examples(Fact.create(*pair, lang="en")) for pair in FREE[:2]]
    questions = engine.renderer.examples(QUESTIONS)
    group = replace(GroupConfig(), batch_size=2, epochs=10, refine_rounds=0, penalty_scale=60.0)
    losses = []
    for study in ([], [questions, []]):
        task = Task(facts, study=study)
        snapshot = engine.master.snapshot()
        engine.master.add(engine.train(task, None, lambda step: None, group).delta)
        losses.append(mean_losses(engine.base, questions).tolist())
        engine.master.restore(snapshot)
    without, with_study = losses
    assert all(new < 0.7 * old for new, old in zip(with_study, without, strict=True))
