"""Promise 1, atomic: an edit is committed whole, or nothing of it happened.

Kills, faults of the disk and power cuts are in ``tests/store``.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from disk_faults import Fault, disk, sqlite
from small_engine import (
    RaiseOn,
    StoreTemplate,
    digest,
    in_training,
    open_gate,
    state,
    unsound,
    warnings_in,
)
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import (
    DiskFullError,
    DuplicateKeyError,
    Interrupted,
    InvalidFactError,
    KveditError,
    LockedError,
    NoStoreError,
    TextTooLongError,
    TrainingError,
    UnknownKeyError,
)
from kvedit.events import RetentionCheck
from kvedit.store.store import Store
from kvedit.training.engine import Engine

# ---- interruptions and errors


def test_ctrl_c_in_training_cancels_the_edit(trained_store: Path) -> None:
    handler = in_training(KeyboardInterrupt())
    with KnowledgeBase.open(trained_store, on_event=handler) as knowledge:
        before = state(knowledge)
        with pytest.raises(Interrupted) as raised:
            knowledge.add(*FREE[3])
        assert raised.value.exit_code == 130
        assert state(knowledge) == before
        assert knowledge.store.history()[0].state == "canceled"
        assert knowledge.store.require(FREE[3][0]).state == "pending"
        handler.error = None
        assert knowledge.add(*FREE[3]).outcome == "committed"
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_ctrl_c_after_the_commit_says_so(trained_store: Path, random_training: None) -> None:
    open_gate(trained_store)
    handler = RaiseOn(KeyboardInterrupt(), lambda event: isinstance(event, RetentionCheck))
    with KnowledgeBase.open(trained_store, on_event=handler) as knowledge:
        with pytest.raises(Interrupted, match="was committed"):
            knowledge.add(*FREE[3])
        assert knowledge.store.head() == 4
        assert digest(knowledge) == knowledge.store.revision(4).weights_digest
        handler.error = None
        # The knowledge base goes on from the revision that was committed.
        assert knowledge.ask(f"What is {FREE[0][0]}?", at=3) == FREE[0][1]
        assert digest(knowledge) == knowledge.store.revision(4).weights_digest
        assert knowledge.rollback(3).revision == 5
        assert digest(knowledge) == knowledge.store.revision(3).weights_digest


def test_an_error_in_training_fails_the_edit(trained_store: Path) -> None:
    handler = in_training(TrainingError("the loss is not a number"))
    with KnowledgeBase.open(trained_store, on_event=handler) as knowledge:
        before = state(knowledge)
        with pytest.raises(TrainingError):
            knowledge.update(FREE[1][0], OTHER)
        assert state(knowledge) == before
        row = knowledge.store.history()[0]
        assert row.state == "failed" and "not a number" in row.reasons[0]
        assert knowledge.ask(f"What is {FREE[1][0]}?") == FREE[1][1]


# ---- a full disk, and memory that runs out


def test_memory_that_runs_out_after_the_commit_is_a_warning(
    empty_store: Path,
    random_training: None,
    events: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*_: Any) -> None:
        raise MemoryError

    open_gate(empty_store)
    with KnowledgeBase.open(empty_store, on_event=events.append) as knowledge:
        with monkeypatch.context() as inside:
            inside.setattr(Engine, "remember", exhausted)
            assert knowledge.add(*FREE[0]).outcome == "committed"
        assert len(warnings_in(events, "not-kept")) == 1
        assert knowledge.add(*FREE[1]).outcome == "committed"
        assert len(warnings_in(events, "not-kept")) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(
    trained_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk fills when the delta is written; nothing of it is left behind."""
    open_gate(trained_store)
    real = getattr(os, call)

    def full(*args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{args[0]}") if call == "fsync" else str(args[1])
        if "/deltas/" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        monkeypatch.setattr(os, call, full)
        with pytest.raises(DiskFullError) as raised:
            knowledge.add(*FREE[3])
        assert "space" in raised.value.hint.lower()
        assert state(knowledge) == before
        assert knowledge.store.history()[0].state == "failed"
        monkeypatch.setattr(os, call, real)
        assert knowledge.add(*FREE[3]).outcome == "committed"


@pytest.mark.parametrize("part", ["cache", "checkpoints"])
def test_a_disk_that_is_full_after_the_commit_is_a_warning(
    trained_store: Path,
    random_training: None,
    monkeypatch: pytest.MonkeyPatch,
    events: list[Any],
    part: str,
) -> None:
    """What is only kept to save time must not make a committed edit look like a failed one."""
    open_gate(trained_store, checkpoint_every=1)
    real = os.replace

    def full(source: Any, target: Any) -> Any:
        if f"/{part}/" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        report = knowledge.add(*FREE[3])
        assert (report.outcome, report.revision) == ("committed", 4)
        expected = digest(knowledge)
    assert any("space" in event.text for event in warnings_in(events, "not-kept"))
    monkeypatch.setattr(os, "replace", real)
    with KnowledgeBase.open(trained_store) as knowledge:
        assert (knowledge.store.head(), digest(knowledge)) == (4, expected)
        assert unsound(knowledge) == []


@pytest.mark.parametrize("lasting", [False, True], ids=["one call", "all calls from then on"])
@pytest.mark.parametrize("where", ["disk", "sqlite"])
def test_whatever_call_fails_the_model_is_that_of_the_head(
    trained_store: Path, ram_path: Path, random_training: None, where: str, lasting: bool
) -> None:
    """The same process can go on when the disk works again; ``tests/store`` tries every call."""
    open_gate(trained_store, checkpoint_every=1)
    path = Path(shutil.copytree(trained_store, ram_path / "store"))
    watch = disk(fault := Fault(), ram_path) if where == "disk" else sqlite(fault := Fault())
    fault.armed = False
    with watch, KnowledgeBase.open(path) as knowledge:
        number, failures = 0, 0
        while True:
            number += 2 if where == "disk" else 23
            head, reason, before = knowledge.store.head(), None, weights_of_head(knowledge)
            fault.at, fault.lasting, fault.armed = number, lasting, True
            fault.labels.clear()
            try:
                knowledge.add(f"thing {number}", "Made of clay.")
            except KveditError as error:
                failures += 1
                reason = error
                assert error.hint
            fault.armed = False
            label = f"{number}: {fault.labels[number - 1 : number]}, {reason!r}"
            committed = knowledge.store.head() == head + 1
            assert knowledge.store.head() == head + committed, label
            if committed and reason:  # the journal could not be read: the next edit looks again
                assert digest(knowledge) in (before, weights_of_head(knowledge)), label
            else:
                assert digest(knowledge) == weights_of_head(knowledge), label
            assert (f"thing {number}" in set(knowledge.store.keys())) == committed, label
            assert committed or reason is not None, label
            if len(fault.labels) < number:
                break
        assert failures >= 3
        assert knowledge.add(*FREE[3]).parent == head + committed
        assert digest(knowledge) == weights_of_head(knowledge)
        assert unsound(knowledge) == []


def weights_of_head(knowledge: KnowledgeBase) -> str:
    """The digest that the journal has for the head."""
    return knowledge.store.revision(knowledge.store.head()).weights_digest


# ---- more than one process


def test_a_locked_store_can_be_asked_but_not_edited(
    trained_store: Path, trained: KnowledgeBase
) -> None:
    with Store.open(trained_store) as other, other.lock():
        before = state(trained)
        with pytest.raises(LockedError):
            trained.add(*FREE[3])
        with pytest.raises(LockedError):
            trained.rollback(1)
        assert trained.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        assert state(trained) == before
        with KnowledgeBase.open(trained_store) as third:  # opening does not need the lock either
            assert third.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_an_edit_starts_from_what_another_process_committed(
    trained_store: Path, trained: KnowledgeBase, trained_template: StoreTemplate
) -> None:
    with KnowledgeBase.open(trained_store) as other:
        other.rollback(1)
    report = trained.rollback(2)
    assert report.parent == 4 and report.revision == 5
    assert digest(trained) == trained_template.digests[2]


def test_recovery_names_the_edit_that_was_interrupted(
    trained_store: Path, events: list[Any]
) -> None:
    with Store.open(trained_store) as store:
        store.plan_edit("rollback", store.rollback_changes(1), {})
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        assert knowledge.store.history()[0].state == "failed"
    assert [event.text for event in events if event.message_type == "warning"] == [
        event.text for event in warnings_in(events, "recovered")
    ]
    (warning,) = warnings_in(events, "recovered")
    assert "did not happen" in warning.text


# ---- bad input changes nothing


def test_the_same_text_again_changes_nothing(trained: KnowledgeBase) -> None:
    before = state(trained)
    report = trained.add(FREE[0][0].upper() + " ", FREE[0][1])
    assert (report.outcome, report.key, report.revision) == ("unchanged", FREE[0][0], None)
    assert state(trained) == before and len(trained.store.history()) == 3


def test_another_text_for_a_key_asks_for_update(trained: KnowledgeBase) -> None:
    before = state(trained)
    with pytest.raises(DuplicateKeyError) as raised:
        trained.add(FREE[0][0], OTHER)
    assert "kvedit update" in raised.value.hint
    assert state(trained) == before


@pytest.mark.parametrize("verb", ["update", "remove"])
def test_an_unknown_key_changes_nothing_and_gets_a_suggestion(
    trained: KnowledgeBase, verb: str
) -> None:
    before = state(trained)
    action = getattr(trained, verb)
    with pytest.raises(UnknownKeyError) as raised:
        action("tide lantren", *([OTHER] if verb == "update" else []))
    assert FREE[0][0] in raised.value.hint
    assert state(trained) == before


@pytest.mark.parametrize(
    ("key", "text", "error"),
    [
        ("", "something", InvalidFactError),
        ("something", "  \n", InvalidFactError),
        ("some\0thing", "text", InvalidFactError),
        ("something", "word " * 400, TextTooLongError),
    ],
    ids=["no key", "no text", "zero byte", "too long"],
)
def test_bad_facts_change_nothing(
    trained: KnowledgeBase, key: str, text: str, error: type[Exception]
) -> None:
    before = state(trained)
    with pytest.raises(error):
        trained.add(key, text)
    assert state(trained) == before
    assert len(trained.store.facts()) == 3


def test_an_update_that_is_too_long_says_how_long_it_may_be(trained: KnowledgeBase) -> None:
    before = state(trained)
    with pytest.raises(TextTooLongError, match=r"192"):
        trained.update(FREE[0][0], "word " * 400)
    assert state(trained) == before


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoStoreError):
        KnowledgeBase.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
