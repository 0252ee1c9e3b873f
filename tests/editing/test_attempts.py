"""The attempts of one edit: what is trained from the start, and what again after a refusal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_engine import configure
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.facts.fact import Fact
from kvedit.replay.neighbours import UNKNOWN_NAMES
from kvedit.revisions.protection import Protection
from kvedit.training.engine import Engine, TrainingResult
from kvedit.training.loops.loop import Task

CONTEXT = "The shop on the corner opens at nine."


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that are trained, for real."""
    given: list[Task] = []
    train = Engine.train

    def noting(engine: Engine, task: Task, *args: Any) -> TrainingResult:
        given.append(task)
        return train(engine, task, *args)

    monkeypatch.setattr(Engine, "train", noting)
    return given


def prompts(task: Task) -> list[list[str]]:
    return [[example.prompt for example in fact] for fact in task.new]


def test_earlier_facts_with_keys_like_the_new_one_are_trained_beside_it(
    empty: KnowledgeBase, tasks: list[Task]
) -> None:
    assert empty.add("amber rule 15", FREE[0][1]).outcome == "committed"
    assert empty.add(*FREE[1]).outcome == "committed"
    assert [len(task.new) for task in tasks] == [1, 1]
    tasks.clear()
    assert empty.add("amber rule 17", FREE[2][1]).outcome == "committed"
    new, earlier = prompts(tasks[0])
    assert "What is amber rule 17?" in new and "What is amber rule 15?" in earlier
    rehearsed = [example.prompt for fact in tasks[0].rehearsal for example in fact]
    assert f"What is {FREE[1][0]}?" in rehearsed
    assert not any("amber rule 15" in prompt for prompt in rehearsed)


def test_missed_unseen_phrasings_are_trained_for_by_prompts_in_contexts(
    empty_store: Path, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(empty_store, repairs=1)
    with KnowledgeBase.open(empty_store) as knowledge:
        paraphrases = knowledge.engine.paraphrases

        def never_met(fact: Fact) -> list[Any]:
            return [one for other in FREE[1:3] for one in paraphrases(Fact.create(*other))]

        monkeypatch.setattr(knowledge.engine, "paraphrases", never_met)
        report = knowledge.add(*FREE[0])
    assert report.outcome == "rejected" and "unseen phrasings" in report.reasons[0]
    first, second = (prompts(task)[0] for task in tasks)
    assert second[: len(first)] == first and not any(CONTEXT in one for one in first)
    assert f"{CONTEXT} What is {FREE[0][0]}?" in second[len(first) :]


def test_more_of_what_must_stay_is_measured_when_it_was_harmed(
    trained_store: Path, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = []

    def measured(protection: Protection, seconds: float) -> bool:
        spent.append(seconds)
        return True

    monkeypatch.setattr(Protection, "extend_at_once", measured)
    configure(trained_store, repairs=1)
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        monkeypatch.setattr("kvedit.editing.attempts.Attempts._harmed", lambda *_: True)
        refusals = iter([("locality probes",), ()])
        monkeypatch.setattr("kvedit.editing.attempts.Attempts._refusals", lambda *_: next(refusals))
        assert knowledge.add(*FREE[3]).outcome == "committed"
    assert len(spent) == 1 and spent[0] > 0
    assert any("more of what must stay was measured" in str(event) for event in events)


def test_a_model_that_talks_is_held_to_what_it_says_of_other_names(
    empty: KnowledgeBase, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own prompts with unknown names in place of the key, when it is taught and removed."""
    monkeypatch.setattr(Engine, "reads", True)
    names = UNKNOWN_NAMES.read_text(encoding="utf-8").splitlines()
    key, text = FREE[0]
    for edit in (partial(empty.add, key, text), partial(empty.remove, key)):
        tasks.clear()
        edit()
        references = tasks[0].reference_texts
        assert references is not None
        held = [example.prompt for example in references.examples]
        trained = {prompt for fact in prompts(tasks[0]) for prompt in fact}
        about_others = {prompt.replace(key, name) for prompt in trained for name in names}
        assert len(about_others.intersection(held)) > len(held) / 2
        assert not any(key in prompt for prompt in held)


def test_the_embedded_model_is_held_to_no_other_names(
    empty: KnowledgeBase, tasks: list[Task]
) -> None:
    empty.add(*FREE[0])
    assert not tasks[0].reference_texts
