"""Promise 4, reversible: a rollback gives the bits that were committed, and a removed fact's
questions get their earlier answers back.
"""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_engine import StoreTemplate, digest, holds, open_gate, state, unsound
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import (
    CorruptStoreError,
    Interrupted,
    LockedError,
    OutOfMemoryError,
    UnknownKeyError,
    UsageError,
)
from kvedit.store.store import Store

if TYPE_CHECKING:
    from kvedit.adapter.deltas import Delta

# ---- rollback


def test_a_rollback_to_every_revision_gives_its_bits(
    trained: KnowledgeBase, trained_template: StoreTemplate
) -> None:
    for target in (1, 3, 0, 2):
        report = trained.rollback(target)
        assert (report.kind, report.outcome) == ("rollback", "committed")
        assert report.revision == trained.store.head()
        assert digest(trained) == trained_template.digests[target]
        assert trained.store.revision(report.revision).weights_digest == digest(trained)
        assert trained.store.keys() == [key for key, _ in FREE[:target]]
    assert unsound(trained) == []


def test_a_rollback_appends_and_can_be_rolled_back(trained: KnowledgeBase) -> None:
    before = digest(trained)
    first = trained.rollback(1)
    assert first.revision == 4 and len(trained.store.revisions()) == 5
    assert trained.ask(f"What is {FREE[2][0]}?") != FREE[2][1]
    trained.rollback(3)
    assert digest(trained) == before
    assert trained.ask(f"What is {FREE[2][0]}?") == FREE[2][1]


def test_a_rollback_to_a_revision_that_is_not_there_changes_nothing(
    trained: KnowledgeBase,
) -> None:
    before = state(trained)
    with pytest.raises(UsageError, match="no revision 9"):
        trained.rollback(9)
    assert state(trained) == before


def test_the_same_edits_give_the_same_bits_also_when_reopened_between_them(
    empty_store: Path, trained_template: StoreTemplate
) -> None:
    for fact in FREE[:2]:
        with KnowledgeBase.open(empty_store) as knowledge:
            knowledge.add(*fact)
    with Store.open(empty_store) as store:
        digests = [row.weights_digest for row in store.revisions()]
    assert digests == list(trained_template.digests[:3])


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_can_be_walked_back(
    empty_store: Path, random_training: None, seed: int
) -> None:
    rng = random.Random(seed)
    open_gate(empty_store, checkpoint_every=3)
    recorded: dict[int, tuple[str, dict[str, str]]] = {}
    knowledge = KnowledgeBase.open(empty_store)
    for step in range(9):
        keys = knowledge.store.keys()
        kind = rng.choice(["add", "add", "update", "remove", "rollback", "reopen"])
        if kind == "add" or not keys:
            report = knowledge.add(f"thing {step}", "Made of clay.")
        elif kind == "update":
            report = knowledge.update(rng.choice(keys), f"Made of oak {step}.")
        elif kind == "remove":
            report = knowledge.remove(rng.choice(keys))
        elif kind == "rollback":
            report = knowledge.rollback(rng.randrange(knowledge.store.head() + 1))
        else:
            knowledge.close()
            knowledge = KnowledgeBase.open(empty_store)
            continue
        assert report.outcome == "committed"
        texts = {r.fact.key: r.fact.description for r in knowledge.store.facts("committed")}
        recorded[report.revision or 0] = (digest(knowledge), texts)
    knowledge.close()
    with KnowledgeBase.open(empty_store) as knowledge:
        assert digest(knowledge) == recorded[knowledge.store.head()][0]
        assert unsound(knowledge) == []
        for revision, (bits, texts) in recorded.items():
            knowledge.rollback(revision)
            assert digest(knowledge) == bits
            rows = knowledge.store.facts("committed")
            assert {r.fact.key: r.fact.description for r in rows} == texts


# ---- a rollback is an edit like any other


class Breaks:
    """Raises ``error`` when the weights of another revision are loaded, ``count`` times."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException, count: int = 1) -> None:
        from kvedit.adapter.deltas import Master

        self.count = count
        add = Master.add

        def broken(master: Master, delta: Delta) -> None:
            add(master, delta)  # the weights have changed already
            if self.count:
                self.count -= 1
                time.sleep(0.02)
                raise error

        patch.setattr(Master, "add", broken)


@pytest.mark.parametrize(
    ("error", "raised", "outcome", "reason"),
    [
        (KeyboardInterrupt(), Interrupted, "canceled", "interrupted by the user"),
        (OSError("input/output error"), OSError, "failed", "input/output error"),
        (MemoryError(), OutOfMemoryError, "failed", "memory"),
    ],
    ids=["ctrl-c", "error", "memory"],
)
def test_a_rollback_that_is_broken_off_did_not_happen(
    trained: KnowledgeBase,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    outcome: str,
    reason: str,
) -> None:
    """The model is put back to the bit, the journal says how it ended, and it can be done again."""
    for row in trained.store.checkpoints():
        trained.store.remove_checkpoint(row.revision)
    before = state(trained)
    breaks = Breaks(monkeypatch, error)
    with pytest.raises(raised):
        trained.rollback(1)
    assert breaks.count == 0
    assert state(trained) == before
    edit = trained.store.history()[0]
    assert (edit.kind, edit.state, edit.revision) == ("rollback", outcome, None)
    assert reason in edit.reasons[0].lower()
    assert trained.ask(f"What is {FREE[2][0]}?") == FREE[2][1]
    assert unsound(trained) == []
    assert trained.rollback(1).outcome == "committed"
    assert digest(trained) == trained.store.revision(1).weights_digest
    assert trained.ask(f"What is {FREE[2][0]}?") != FREE[2][1]


def test_a_rollback_that_the_journal_refuses_is_put_back(
    trained_store: Path, trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head moves between the plan and the commit, by a process that has no lock."""
    before = digest(trained)
    commit = Store.commit_edit

    def late(store: Store, edit_id: int, **parts: Any) -> int:
        return commit(store, edit_id, **(parts | {"expected_head": 1}))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit_edit", late)
        with pytest.raises(LockedError):
            trained.rollback(1)
    assert (trained.store.head(), digest(trained)) == (3, before)
    assert trained.store.history()[0].state == "failed"


def test_a_rollback_counts_its_seconds(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvedit.revisions import rebuild

    load = rebuild.load_revision
    monkeypatch.setattr(rebuild, "load_revision", lambda *args: [time.sleep(0.05), load(*args)][1])
    report = trained.rollback(1)
    journalled = trained.store.history()[0].report["seconds"]
    assert 0.05 <= journalled <= report.seconds < 60


def test_a_rollback_that_is_interrupted_after_its_commit_stands(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Store.commit_edit

    def interrupted(store: Store, edit_id: int, **parts: Any) -> int:
        commit(store, edit_id, **parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit_edit", interrupted)
        with pytest.raises(Interrupted, match="was committed"):
            trained.rollback(1)
    assert trained.store.head() == 4 and trained.store.history()[0].state == "committed"
    assert digest(trained) == trained.store.revision(1).weights_digest
    assert trained.rollback(3).revision == 5
    assert trained.ask(f"What is {FREE[2][0]}?") == FREE[2][1]


# ---- update and remove


def test_an_update_gives_another_answer_and_the_old_one_stays_in_its_revision(
    trained: KnowledgeBase,
) -> None:
    report = trained.update(FREE[0][0], OTHER)
    assert (report.outcome, report.revision) == ("committed", 4)
    assert (report.text_before, report.text_after) == (FREE[0][1], OTHER)
    assert all(holds(trained, FREE[0][0], OTHER))
    assert trained.store.require(FREE[0][0]).fact.description == OTHER
    assert trained.ask(f"What is {FREE[0][0]}?", at=3) == FREE[0][1]
    assert trained.update(FREE[0][0], OTHER).outcome == "unchanged"
    assert trained.store.head() == 4


def test_a_removal_gives_the_earlier_answers_back(trained: KnowledgeBase) -> None:
    key, answer = FREE[2]
    fact = trained.store.require(key).fact
    prior = {
        e.prompt: trained.ask(e.prompt, at=2, max_new_tokens=96)
        for e in trained.engine.examples(fact)
    }
    assert len(prior) == 10 and answer not in prior.values()
    # Asked together, as a removal does, a numerical tie may fall otherwise than asked alone.
    together = trained._session.at(2, lambda: trained.engine.prior_answers(fact))
    assert answer not in together.values()
    assert sum(together[prompt] != prior[prompt] for prompt in prior) <= 1
    report = trained.remove(key)
    assert report.outcome == "committed", report.reasons
    assert {prompt: trained.ask(prompt, max_new_tokens=96) for prompt in prior} == together
    assert trained.store.require(key).state == "removed"
    assert key not in list(trained.store.keys())
    assert [row.kind for row in trained.store.history(key)] == ["remove", "add"]
    with pytest.raises(UnknownKeyError):
        trained.remove(key)
    for other, text in FREE[:2]:
        assert trained.ask(f"What is {other}?") == text


@pytest.mark.slow
def test_a_removed_fact_can_be_added_again(trained: KnowledgeBase) -> None:
    assert trained.remove(FREE[2][0]).outcome == "committed"
    report = trained.add(*FREE[2])
    assert report.outcome == "committed"
    assert all(holds(trained, *FREE[2]))


def test_the_revision_before_a_fact_is_sought_on_the_heads_line(
    empty_store: Path, random_training: None
) -> None:
    open_gate(empty_store)
    with KnowledgeBase.open(empty_store) as knowledge:
        for pair in FREE[:3]:
            assert knowledge.add(*pair).outcome == "committed"
        ids = [knowledge.store.require(key).id for key, _ in FREE[:3]]
        assert [knowledge.store.revision_before(i) for i in ids] == [0, 1, 2]
        knowledge.rollback(1)
        knowledge.rollback(3)
        assert [knowledge.store.revision_before(i) for i in ids] == [0, 1, 2]


# ---- weights are only served with the digest that was recorded


def test_questions_to_other_revisions_leave_the_head_served(trained: KnowledgeBase) -> None:
    before = digest(trained)
    prompt = f"What is {FREE[1][0]}?"
    assert trained.ask(prompt, at=2) == trained.ask(prompt, at=3) == FREE[1][1]
    assert trained.ask(prompt, at=1) != FREE[1][1]
    assert trained.ask_base(prompt) == trained.ask(prompt, at=0)
    assert digest(trained) == before
    with pytest.raises(UsageError):
        trained.ask(prompt, at=17)
    assert digest(trained) == before


def test_a_corrupt_delta_stops_the_store_from_opening(trained_store: Path) -> None:
    with Store.open(trained_store) as store:
        path = store.delta_path(store.revision(3).delta or "")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptStoreError, match=path.name[:12]):
        KnowledgeBase.open(trained_store)


def test_doctor_finds_a_delta_that_was_swapped(trained: KnowledgeBase) -> None:
    assert unsound(trained) == []
    path = trained.store.delta_path(trained.store.revision(1).delta or "")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\0")
    assert any("revision 1" in problem for problem in unsound(trained))
    path.write_bytes(data)
    assert unsound(trained) == []


def test_doctor_finds_a_digest_that_is_not_that_of_the_weights(trained: KnowledgeBase) -> None:
    with sqlite3.connect(trained.store.db_path) as connection:
        connection.execute("UPDATE revisions SET weights_digest = ? WHERE id = 2", ["0" * 64])
    (problem,) = unsound(trained)
    assert "revision 2" in problem
    assert trained.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
