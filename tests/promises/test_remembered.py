"""Promise 3, remembered: the state of every fact is known; what was lost is found and repaired."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_engine import digest, holds, lose, open_gate
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import DuplicateKeyError, UnknownKeyError
from kvedit.events import RetentionCheck, Score
from kvedit.facts.fact import Fact
from kvedit.model import scoring
from kvedit.model.prompts import Example
from kvedit.training.engine import Engine, TrainingResult


def test_verify_records_the_state_of_every_fact(trained: KnowledgeBase, events: list[Any]) -> None:
    report = trained.verify()
    assert report.revision == 3
    assert [check.key for check in report.checks] == [key for key, _ in FREE[:3]]
    assert report.score == Score(3, 3) and report.generated == Score(3, 3, "generated")
    assert [e for e in events if isinstance(e, RetentionCheck)] == list(report.checks)
    for row, check in zip(trained.store.facts("committed"), report.checks, strict=True):
        assert (row.health, row.last_checked_revision) == ("recalled", 3)
        assert row.margin == check.margin
        newest = trained.store.results(row.id, limit=11)
        assert {r.protocol for r in newest} == {"teacher-forced", "generated"}


def test_verify_can_check_some_facts(trained: KnowledgeBase) -> None:
    assert [c.key for c in trained.verify([FREE[1][0]]).checks] == [FREE[1][0]]
    assert len(trained.verify(sample=2).checks) == 2
    with pytest.raises(UnknownKeyError):
        trained.verify(["nobody"])


def test_verify_lets_generation_decide_numerical_ties(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one forward pass all is well; generation contradicts it for one prompt."""
    generated = Engine.generated_recall
    wrong = trained.engine.examples(trained.store.require(FREE[1][0]).fact)[4]

    def contradict(engine: Engine, examples: list[Example]) -> list[bool]:
        pairs = zip(generated(engine, examples), examples, strict=True)
        return [passed and example != wrong for passed, example in pairs]

    monkeypatch.setattr(Engine, "generated_recall", contradict)
    monkeypatch.setattr(random.Random, "choice", lambda rng, items: items[0])  # another prompt
    assert trained.verify().score == Score(3, 3)
    monkeypatch.setattr(scoring, "TIE_TOLERANCE", 1e6)
    report = trained.verify()
    assert report.score == Score(2, 3) and report.generated == Score(3, 3, "generated")
    assert [check.key for check in report.checks if not check.passed] == [FREE[1][0]]


def test_repair_trains_lost_facts_again(trained_store: Path) -> None:
    """The journal's text of one fact is replaced behind the model's back: the model has lost it."""
    key, old = FREE[1]
    lose(trained_store, key, old, OTHER)
    with KnowledgeBase.open(trained_store) as knowledge:
        assert all(holds(knowledge, key, old)) and not any(holds(knowledge, key, OTHER))
        found = knowledge.verify([key])
        assert not found.checks[0].passed and knowledge.store.head() == 3
        assert knowledge.store.require(key).health == "regressed"
        report = knowledge.verify(repair=True)
        assert [edit.kind for edit in report.repaired] == ["repair"]
        assert report.repaired[0].outcome == "committed", report.repaired[0].reasons
        assert report.score == Score(3, 3)
        assert all(holds(knowledge, key, OTHER)) and not any(holds(knowledge, key, old))
        # Exactly the lost fact was trained, in one edit with a delta of its own.
        edit = knowledge.store.history()[0]
        assert (edit.kind, edit.keys, edit.revision) == ("repair", (key,), knowledge.store.head())
        assert knowledge.store.revision(4).parent == 3 and knowledge.store.revision(4).delta
        assert knowledge.store.require(key).health == "recalled"


# ---- what is measured before training, so that nothing is forgotten


def test_an_edit_without_training_measures_nothing(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are measured before facts are trained; with thousands that takes minutes."""
    key, description = FREE[2]

    def measured(*_: Any) -> None:
        raise AssertionError("measured")

    for name in ("protect", "remember", "measure_margins", "measure_at_head"):
        monkeypatch.setattr(Engine, name, measured)
    shutil.rmtree(trained_store / "cache")
    with KnowledgeBase.open(trained_store) as knowledge:
        assert knowledge.add(key, description).outcome == "unchanged"
        assert knowledge.update(key, description).outcome == "unchanged"
        with pytest.raises(DuplicateKeyError):
            knowledge.add(key, "Something else.")
        with pytest.raises(UnknownKeyError):
            knowledge.remove("no such key")
        assert knowledge.rollback(1).outcome == "committed"
        with pytest.raises(AssertionError, match="measured"):
            knowledge.add(*FREE[3])


def test_an_edit_from_the_base_model_counts_the_margins_of_what_it_knows(
    empty_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For that edit alone; later edits protect the base model's texts and the facts, as ever."""
    open_gate(empty_store)
    during: list[Any] = []
    measured: list[int] = []
    train, measure = Engine.train, Engine.measure_margins

    def watched(engine: Engine, *task: Any) -> TrainingResult:
        during.append(engine.fisher)
        return train(engine, *task)

    def margins(engine: Engine, texts: Any) -> None:
        assert engine.master.digest() == base
        measured.append(len(texts))
        measure(engine, texts)

    monkeypatch.setattr(Engine, "train", watched)
    monkeypatch.setattr(Engine, "measure_margins", margins)
    with KnowledgeBase.open(empty_store) as knowledge:
        base = digest(knowledge)
        for pairs in (FREE[:2], FREE[2:4]):  # the second retrains all from the base model
            report, *_ = knowledge.add_group([Fact.create(*pair) for pair in pairs], carry=True)
            assert report.outcome == "committed"
            now = knowledge.engine.fisher
            assert now is not None and now[1] is not now[0] is during[-1][0]
        assert during[0][1] is during[-1][1] is not knowledge.engine.fisher[1]
        assert knowledge.engine.reference_texts is not None
        assert measured == [len(knowledge.engine.reference_texts)]  # once for both
    with KnowledgeBase.open(empty_store) as reopened:  # and they are kept for the next process
        report, *_ = reopened.add_group([Fact.create(*pair) for pair in FREE[4:8]])
        assert report.retrained and during[-1][1] is not during[-1][0] and len(measured) == 1


def test_moments_are_measured_again_as_facts_come_in(
    empty_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_gate(empty_store, compaction=1e9)  # groups are trained on the head, never from the base
    measured: list[tuple[int, int]] = []
    measure = Engine.measure_at_head

    def watched(engine: Engine, texts: Any, facts: Any, weight: float) -> None:
        measured.append((len(texts), len(facts)))
        before = engine.fisher
        measure(engine, texts, facts, weight)
        after = engine.fisher
        assert before is not None and after is not None
        assert after[0] is before[0] and after[1] is not before[1]

    monkeypatch.setattr(Engine, "measure_at_head", watched)
    facts = [Fact.create(f"thing {number}", "Made of clay.") for number in range(28)]
    with KnowledgeBase.open(empty_store) as knowledge:
        for start, end in ((0, 14), (14, 16), (16, 18), (18, 24), (24, 28)):
            knowledge.add_group(facts[start:end])
        assert len(knowledge.store.facts("committed")) == 28
    # With 16 facts for the first time, and again when there were half as many more.
    assert [count for _, count in measured] == [16, 24]
