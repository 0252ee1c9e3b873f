"""Which facts and answers differ between two revisions."""

from __future__ import annotations

from pathlib import Path

from small_engine import digest, open_gate
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.asking.diff import changed_facts


def test_exactly_the_facts_that_changed_are_listed(
    trained_store: Path, random_training: None
) -> None:
    open_gate(trained_store)
    (first, one), (second, two), (third, three) = FREE[:3]
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.update(first, OTHER)
        knowledge.remove(second)
        knowledge.rollback(2)
        rows = {
            (a, b): [
                (d.key, d.change, d.before, d.after) for d in changed_facts(knowledge.store, a, b)
            ]
            for a, b in ((3, 5), (5, 3), (2, 6), (4, 4), (0, 3))
        }
    assert rows == {
        (3, 5): [(first, "updated", one, OTHER), (second, "removed", two, None)],
        (5, 3): [(first, "updated", OTHER, one), (second, "added", None, two)],
        (2, 6): [],
        (4, 4): [],
        (0, 3): [(first, "added", None, one), (second, "added", None, two),
                 (third, "added", None, three)],
    }  # fmt: skip


def test_answers_are_asked_at_both_revisions(trained: KnowledgeBase) -> None:
    before = digest(trained)
    found = trained.diff(1, 3)
    assert (found.before, found.after, found.asked) == (1, 3, 3)
    answered = {fact.key: (fact.answer_before, fact.answer_after) for fact in found.facts}
    for key, text in FREE[1:3]:
        assert answered[key] == (trained.ask(f"What is {key}?", at=1), text)
    assert digest(trained) == before


def test_an_answer_that_changed_without_an_edit_is_listed(
    trained_store: Path, random_training: None
) -> None:
    open_gate(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.update("grey bucket", OTHER)
        found = knowledge.diff(3, 4)
        said = {
            key: [knowledge.ask(f"What is {key}?", at=at) for at in (3, 4)] for key, _ in FREE[:2]
        }
    listed = {fact.key: fact.change for fact in found.facts}
    assert listed.pop("grey bucket") == "updated"
    assert set(listed) == {key for key, (one, other) in said.items() if one != other}
    assert set(listed.values()) <= {"none"}


def test_only_as_many_as_allowed_are_asked_those_that_changed_first(
    trained: KnowledgeBase,
) -> None:
    found = trained.diff(2, 3, ask=1)
    assert found.asked == 1
    assert [(fact.key, fact.answer_changed) for fact in found.facts] == [("grey bucket", True)]
    none = trained.diff(2, 3, ask=0)
    assert none.asked == 0
    assert [fact.answer_changed for fact in none.facts] == [None]
    assert none.to_json()["facts"][0]["change"] == "added"  # type: ignore[index]
