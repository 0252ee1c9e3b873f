"""Promise 2, gated: nothing is committed unless its probes pass after the merge; a refused edit
leaves the model bit-identical and says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import configure, open_gate, random_train, state, unsound, warnings_in
from small_model import FREE, KNOWN, OTHER

from kvedit import KnowledgeBase
from kvedit.adapter.deltas import Factors
from kvedit.events import RetentionCheck, Score, Warning_
from kvedit.facts.fact import Fact
from kvedit.model import scoring
from kvedit.training.engine import Engine, TrainingResult
from kvedit.training.loops.loop import LoopResult

WRECK = 1e5
"""Times the size of a random change that hardly shows: nothing is answered as before."""


def test_a_refused_edit_leaves_the_model_bit_identical_and_says_why(trained_store: Path) -> None:
    configure(trained_store, steps=4, repairs=0, gain=0.01)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        answer = knowledge.ask(f"What is {FREE[3][0]}?")
        report = knowledge.add(*FREE[3])
        assert report.outcome == "rejected"
        assert report.revision is None and report.delta is None
        assert any("recall" in reason for reason in report.reasons)
        assert state(knowledge) == before
        assert knowledge.ask(f"What is {FREE[3][0]}?") == answer
        row = knowledge.store.history(FREE[3][0])[0]
        assert (row.state, row.reasons) == ("rejected", report.reasons)
        assert knowledge.store.require(FREE[3][0]).state == "rejected"
        assert len(knowledge.store.edit_results(row.id)) > 10
    with KnowledgeBase.open(trained_store) as reopened:
        assert state(reopened) == before
        configure(trained_store)
    with KnowledgeBase.open(trained_store) as third:
        assert third.add(*FREE[3]).outcome == "committed"


def test_a_refused_update_or_removal_keeps_the_old_text(trained_store: Path) -> None:
    configure(trained_store, steps=4, repairs=0, gain=1e-8)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        assert knowledge.update(FREE[0][0], OTHER).outcome == "rejected"
        assert knowledge.remove(FREE[1][0]).outcome == "rejected"
        assert state(knowledge) == before
        assert knowledge.store.require(FREE[0][0]).fact.description == FREE[0][1]


def test_each_part_of_the_gate_can_refuse(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a change that wrecks the model nothing passes, and every reason is given."""
    monkeypatch.setattr(Engine, "train", random_train(WRECK))
    configure(trained_store, repairs=0)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        reasons = " / ".join(knowledge.add(*FREE[3]).reasons)
        assert state(knowledge) == before
    for part in (
        "recall probes",
        "unseen phrasings",
        "locality probes",
        "earlier facts lost",
    ):
        assert part in reasons
    assert FREE[0][0] in reasons


def test_every_refused_attempt_is_reported(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt changes nothing and is refused; the second trains as usual."""
    with KnowledgeBase.open(trained_store) as knowledge:
        train = knowledge.engine.train

        def idle(*task: Any) -> TrainingResult:
            monkeypatch.setattr(knowledge.engine, "train", train)
            return TrainingResult({}, LoopResult(1, False, 1.0, 0.0), 0.0)

        monkeypatch.setattr(knowledge.engine, "train", idle)
        report = knowledge.add(*FREE[3])
        assert report.outcome == "committed"
        assert len(report.refusals) == 1 and "recall" in report.refusals[0]
        journalled = knowledge.store.history(FREE[3][0])[0].report["refusals"]
        assert journalled == list(report.refusals)


@pytest.mark.parametrize(
    ("locality", "penalties", "epochs"),
    [(0.5, [1, 2, 4], [40, 40, 40]), (0.0, [1, 1, 1], [40, 12, 12])],
)
def test_a_refused_group_is_trained_with_other_settings(
    trained_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    locality: float,
    penalties: list[int],
    epochs: list[int],
) -> None:
    """With twice the penalty if it harmed the locality probes, else for more epochs."""
    configure(trained_store, locality=locality)
    groups: list[Any] = []
    events: list[Any] = []
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        before = state(knowledge)
        weights = knowledge.engine.master.snapshot()

        def wreck(task: Any, config: Any, on_step: Any, group: Any, *rest: Any) -> TrainingResult:
            groups.append(group)
            noise = torch.Generator().manual_seed(len(groups))
            delta = {
                name: Factors(
                    torch.randn(m.shape[0], 2, generator=noise), torch.ones(2, m.shape[1])
                )
                for name, m in weights.items()
            }
            return TrainingResult(delta, LoopResult(1, True, 0.0, 0.0), 0.0)

        monkeypatch.setattr(knowledge.engine, "train", wreck)
        first = knowledge.add_group([Fact.create(*pair) for pair in FREE[3:5]])[0]
        assert first.outcome == "rejected" and len(first.refusals) == 3
        # Two refusals from the base model on, two incremental; the last of each is in the report.
        texts = [event.text for event in warnings_in(events, "refused")]
        assert len(texts) == 2 * 2
        assert all("2 facts" in text and "refused" in text for text in texts)
        assert state(knowledge) == before
    attempts = groups[:3]
    assert [g.penalty_scale / attempts[0].penalty_scale for g in attempts] == penalties
    assert [g.epochs for g in attempts] == epochs


@pytest.mark.parametrize("generated", [True, False])
def test_generation_decides_numerical_ties(
    generated: bool,
    empty_store: Path,
    random_training: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All margins count as ties, and generation gives the same outcome for all."""
    monkeypatch.setattr(scoring, "TIE_TOLERANCE", 1e6)
    monkeypatch.setattr(
        Engine, "generated_recall", lambda engine, examples: [generated] * len(examples)
    )
    configure(empty_store, repairs=0)
    with KnowledgeBase.open(empty_store) as knowledge:
        report = knowledge.add(*FREE[0])
        assert report.outcome == ("committed" if generated else "rejected")
        assert report.reliability.passed == (report.reliability.n if generated else 0)
        rows = knowledge.store.edit_results(knowledge.store.history(FREE[0][0])[0].id)
        assert {row.protocol for row in rows} == {"generated"}


def test_force_commits_and_says_what_it_broke_and_verify_finds_it(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost is found by ``verify``, and a rollback brings it back."""
    monkeypatch.setattr(Engine, "train", random_train(WRECK))
    configure(trained_store, repairs=0)
    with KnowledgeBase.open(trained_store) as knowledge:
        report = knowledge.add(*FREE[3], force=True)
    assert (report.outcome, report.revision) == ("committed", 4)
    assert report.reasons
    assert set(report.broke) == {key for key, _ in FREE[:3]}
    configure(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        assert knowledge.store.require(FREE[3][0]).state == "committed"
        assert {row.health for row in knowledge.store.facts("committed")} == {"regressed"}
        found = knowledge.verify()
        assert [check.passed for check in found.checks] == [False] * 4
        assert found.score == Score(0, 4, "teacher-forced")
        assert found.generated == Score(0, 4, "generated")
        knowledge.rollback(3)
        after = knowledge.verify()
        assert after.score == Score(3, 3) and after.generated == Score(3, 3, "generated")
        assert {row.health for row in knowledge.store.facts("committed")} == {"recalled"}


def test_a_similar_key_warns_and_its_fact_is_checked_first(
    trained_store: Path, random_training: None, events: list[Any]
) -> None:
    open_gate(trained_store)
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        report = knowledge.add("tide lanterns", OTHER)
        assert unsound(knowledge) == []
    warnings = [e for e in events if isinstance(e, Warning_)]
    assert [(w.code, w.key) for w in warnings] == [("similar-key", FREE[0][0])]
    assert report.similar[0].key == FREE[0][0] and report.similar[0].score > 85
    first = next(e for e in events if isinstance(e, RetentionCheck))
    assert first.key == FREE[0][0]


def test_a_group_is_not_held_to_what_it_changes(
    empty_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference texts that name a fact of the group take no part in its training."""
    open_gate(empty_store)
    counts: list[int] = []
    with KnowledgeBase.open(empty_store) as knowledge:
        train = knowledge.engine.train

        def counted(task: Any, *rest: Any) -> Any:
            counts.append(len(task.reference_texts))
            return train(task, *rest)

        monkeypatch.setattr(knowledge.engine, "train", counted)
        knowledge._session.protection.prepare_texts(2)
        references = knowledge.engine.reference_texts
        assert references is not None
        texts = " ".join(f"{one.prompt} {one.answer}" for one in references.examples)
        names = [key for key in KNOWN if key in texts][:2]
        knowledge.add_group([Fact.create(name, "Another thing altogether.") for name in names])
        assert 0 < counts[0] < len(references)
        assert counts[0] == len(references.without(names))
