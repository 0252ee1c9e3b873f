"""Which edit changed an answer, and which facts are near it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from small_engine import digest, open_gate
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import UsageError


def test_the_edit_that_changed_an_answer_is_found(trained: KnowledgeBase) -> None:
    before = digest(trained)
    for number, (key, text) in enumerate(FREE[:3], 1):
        question = f"What is {key}?"
        found = trained.explain(question)
        assert (found.question, found.revision, found.answer) == (question, 3, text)
        assert found.base_answer == trained.ask_base(question) != text
        changed = found.changes[0]
        assert (changed.revision, changed.before) == (number, number - 1)
        assert (changed.kind, changed.keys) == ("add", (key,))
        assert changed.answer_before == trained.ask(question, at=number - 1, max_new_tokens=96)
        assert found.facts[0].key == key
        assert (found.facts[0].named, found.facts[0].edited) == (100.0, True)
    assert digest(trained) == before


def test_an_answer_that_no_edit_changed(trained: KnowledgeBase) -> None:
    found = trained.explain("What is amber lamp?")
    assert found.changes == ()
    assert found.answer == found.base_answer
    assert found.asked == 2
    assert not any(fact.named or fact.edited for fact in found.facts)
    document = found.to_json()
    assert document["changes"] == []
    assert document["facts"][0]["key"] == found.facts[0].key  # type: ignore[index]


def test_an_earlier_revision_is_explained_by_its_own_facts(trained: KnowledgeBase) -> None:
    found = trained.explain(f"What is {FREE[0][0]}?", at=1)
    assert [change.revision for change in found.changes] == [1]
    assert [fact.key for fact in found.facts] == [FREE[0][0]]
    assert trained.explain(f"What is {FREE[0][0]}?", at=0).changes == ()


def test_few_revisions_are_asked(trained_store: Path, random_training: None) -> None:
    open_gate(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        for number in range(6):
            knowledge.update("grey bucket", f"{OTHER} {number}")
        found = knowledge.explain("What is tide lantern?", limit=1)
        assert found.asked <= 2 + 2 * 4  # two ends, and twice log2 of 9 steps
        assert [fact.key for fact in found.facts] == ["tide lantern"]
        assert found.changes


def test_revisions_that_are_gone_are_passed_over(trained: KnowledgeBase) -> None:
    trained.prune(3)
    found = trained.explain(f"What is {FREE[0][0]}?")
    assert [(change.before, change.revision) for change in found.changes] == [(0, 3)]
    with pytest.raises(UsageError, match="revision 1 can no longer be restored"):
        trained.explain("What is it?", at=1)


def test_after_a_rollback_the_line_is_that_of_what_it_restored(
    trained_store: Path, random_training: None
) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.rollback(1)
        found = knowledge.explain(f"What is {FREE[0][0]}?")
        assert found.revision == 4
        assert [change.revision for change in found.changes] == [1]
        assert [fact.key for fact in found.facts] == [FREE[0][0]]


def test_a_later_change_of_wording_does_not_hide_the_edit_that_said_it(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [
        "It is made of oak.",
        "Glass, lit at dusk on the wall.",
        "Glass, lit at dusk on a wall.",
    ]

    def answer(prompts: Sequence[str], *, limit: int) -> list[str]:
        return [said[min(2, trained._session.revision)]]

    monkeypatch.setattr(trained.engine, "generate", answer)
    found = trained.explain("Where does it hang?")
    assert [(one.revision, one.answer_before) for one in found.changes] == [
        (2, said[1]),
        (1, said[0]),
    ]
    assert {fact.key for fact in found.facts if fact.edited} == {"tide lantern", "wind ledger"}
