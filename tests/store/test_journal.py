"""Edits commit completely or not at all; history is never rewritten; a kill loses nothing."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_steps import (
    add,
    check,
    committed_texts,
    delta_for,
    digest_of,
    fact,
    new_store,
    problems,
    remove,
    roll_back,
    update,
)

from kvedit.errors import CorruptStoreError, LockedError, UsageError
from kvedit.store.rows import FactChange, InterruptedEdit
from kvedit.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "s")


def plan(store: Store, key: str = "k") -> tuple[int, list[FactChange]]:
    new = fact(key)
    changes = [FactChange(store.put_pending(new), None, new)]
    return store.plan_edit("add", changes, {"seed": 7}), changes


def try_commit(store: Store, edit_id: int, changes: list[FactChange], head: int = 0) -> int:
    return store.commit_edit(
        edit_id,
        expected_head=head,
        delta=delta_for(store, "delta"),
        weights_digest="w",
        changes=changes,
        results=[check(changes[0].fact_id)],
        report={"steps": 3},
    )


def test_a_commit_writes_everything(store: Store) -> None:
    edit_id, changes = plan(store)
    delta = delta_for(store, "delta")
    store.mark_trained(edit_id, delta)
    assert store.edit(edit_id).state == "trained"
    assert try_commit(store, edit_id, changes) == store.head() == 1
    edit = store.edit(edit_id)
    assert (edit.kind, edit.state, edit.parent, edit.revision) == ("add", "committed", 0, 1)
    assert (edit.delta, edit.keys) == (delta, ("k",))
    assert (edit.report, edit.config) == ({"steps": 3}, {"seed": 7})
    assert edit.finished_at is not None
    revision = store.revision(1)
    assert (revision.parent, revision.edit_id, revision.delta) == (0, edit_id, delta)
    assert revision.weights_digest == "w"
    row = store.require("k")
    assert (row.state, row.revision, row.health) == ("committed", 1, "recalled")
    assert store.facts_at(1) == {row.id: ("committed", row.fact)}
    assert store.changes(edit_id) == changes


def test_a_commit_on_a_head_that_moved_changes_nothing(store: Store) -> None:
    add(store, "other")
    edit_id, changes = plan(store)
    before = snapshot(store)
    with pytest.raises(LockedError, match="its head is 1, not 0"):
        try_commit(store, edit_id, changes, head=0)
    assert snapshot(store) == before
    assert try_commit(store, edit_id, changes, head=1) == 2


def test_an_edit_that_was_ended_cannot_be_committed_nor_ended_again(store: Store) -> None:
    edit_id, changes = plan(store)
    store.finish_edit(edit_id, "rejected", ["recall 3 of 8"], {})
    before = snapshot(store)
    for attempt in (
        lambda: try_commit(store, edit_id, changes),
        lambda: store.finish_edit(edit_id, "failed", [], {}),
        lambda: store.mark_trained(edit_id, "d"),
        lambda: store.finish_edit(99, "failed", [], {}),
    ):
        with pytest.raises(LockedError, match="ended by another process"):
            attempt()
    assert snapshot(store) == before


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_commit_needs_its_delta_on_the_disk(store: Store, damage: str) -> None:
    edit_id, changes = plan(store)
    delta = delta_for(store, "x")
    store.delta_path(delta).unlink() if damage == "missing" else store.delta_path(
        delta
    ).write_bytes(b"y")
    with pytest.raises(CorruptStoreError, match="missing or was altered"):
        store.commit_edit(
            edit_id, expected_head=0, delta=delta, weights_digest="w", changes=changes,
            results=[], report={},
        )  # fmt: skip
    assert store.head() == 0
    assert store.edit(edit_id).state == "planned"


def test_a_failure_in_the_middle_of_a_commit_undoes_all_of_it(store: Store) -> None:
    edit_id, changes = plan(store)
    before = snapshot(store)
    with pytest.raises(CorruptStoreError, match="FOREIGN KEY"):
        try_commit(store, edit_id, [*changes, FactChange(999, None, fact("x"))])
    with pytest.raises(ValueError, match="from nothing to nothing"):
        try_commit(store, edit_id, [FactChange(changes[0].fact_id, None, None)])
    assert snapshot(store) == before
    assert try_commit(store, edit_id, changes) == 1


@pytest.mark.parametrize(
    ("outcome", "state"), [("rejected", "rejected"), ("failed", "pending"), ("canceled", "pending")]
)
def test_an_edit_that_is_not_committed_says_why(store: Store, outcome: str, state: str) -> None:
    edit_id, changes = plan(store)
    delta = delta_for(store, "delta")
    store.mark_trained(edit_id, delta)
    bad = check(changes[0].fact_id, passed=False)
    store.finish_edit(edit_id, outcome, ["recall 3 of 8"], {"steps": 9}, [bad])
    edit = store.edit(edit_id)
    assert (edit.state, edit.reasons, edit.report) == (outcome, ("recall 3 of 8",), {"steps": 9})
    row = store.require("k")
    assert (row.state, row.health, row.revision) == (state, "unchecked", None)
    (result,) = store.edit_results(edit_id)
    assert (result.passed, result.revision) == (False, None)
    assert not store.delta_path(delta).exists()
    assert store.head() == 0
    assert problems(store) == []


def test_an_unknown_ending_is_a_programming_error(store: Store) -> None:
    edit_id, _ = plan(store)
    with pytest.raises(ValueError, match="cannot end as 'committed'"):
        store.finish_edit(edit_id, "committed", [], {})


def test_a_rejected_update_or_remove_leaves_the_fact_as_it_was(store: Store) -> None:
    add(store, "k", "old")
    row = store.require("k")
    for kind, after in (("update", row.fact.with_description("new")), ("remove", None)):
        edit_id = store.plan_edit(kind, [FactChange(row.id, row.fact, after)], {})
        store.finish_edit(edit_id, "rejected", ["no"], {})
    assert store.require("k") == row


def test_ending_one_edit_spares_the_delta_of_another(store: Store) -> None:
    first, _ = plan(store, "a")
    second, _ = plan(store, "b")
    store.mark_trained(first, delta_for(store, "first"))
    kept = delta_for(store, "second")  # on the disk, but not marked yet
    store.finish_edit(first, "rejected", [], {})
    store.mark_trained(second, kept)
    assert store.delta_path(kept).exists()


def test_two_edits_with_the_same_delta_share_its_file(store: Store) -> None:
    edit_id, changes = plan(store, "a")
    try_commit(store, edit_id, changes)
    again, _ = plan(store, "b")
    delta = delta_for(store, "delta")
    store.mark_trained(again, delta)
    store.finish_edit(again, "rejected", [], {})
    assert store.delta_path(delta).exists()
    assert problems(store) == []


@pytest.mark.parametrize("trained", [False, True])
def test_recovery_ends_what_was_interrupted_and_cleans_up(store: Store, trained: bool) -> None:
    add(store, "kept")
    edit_id, _ = plan(store)
    stray = store.delta_path(delta_for(store, "stray"))
    if trained:
        store.mark_trained(edit_id, delta_for(store, "half"))
    (store.deltas / ".tmp-x").write_bytes(b"half")
    (store.checkpoint_path(7)).mkdir()
    (store.path / ".tmp-y").write_bytes(b"half")
    notes = store.deltas / "notes.txt"
    notes.write_text("the user's own")
    with Store.open(store.path) as again:
        assert again.recover() == [InterruptedEdit(edit_id, "add", ("k",))]
        assert again.edit(edit_id).state == "failed"
        assert again.edit(edit_id).reasons == ("interrupted",)
        assert again.require("k").state == "pending"
        assert committed_texts(again) == {"kept": "some text"}
        assert not stray.exists()
        assert notes.exists()
        assert problems(again) == []
        assert again.recover() == []


def test_recovery_leaves_a_store_alone_that_another_command_is_working_on(store: Store) -> None:
    edit_id, _ = plan(store)
    with store.lock(), Store.open(store.path) as other, pytest.raises(LockedError):
        other.recover()
    assert store.edit(edit_id).state == "planned"


def test_unknown_revisions_and_edits_are_usage_errors(store: Store) -> None:
    with pytest.raises(UsageError, match="no revision 5; the head is 0"):
        store.revision(5)
    with pytest.raises(UsageError, match="no revision -1"):
        store.lineage(-1)
    with pytest.raises(UsageError, match="no edit 5"):
        store.edit(5)


def test_a_rollback_restores_facts_aliases_and_health(store: Store) -> None:
    first = add(store, "a", "old", aliases=["alpha"])
    update(store, "a", "new")
    add(store, "b")
    remove(store, "a")
    third = add(store, "c", aliases=["alpha"])
    store.record_results([check(third, passed=False)], store.head())
    assert roll_back(store, 1) == 6
    assert committed_texts(store) == {"a": "old"}
    assert [row.id for row in store.lineage(6)] == [1]
    row = store.find("alpha")
    assert row is not None
    assert (row.id, row.health, row.last_checked_revision) == (first, "recalled", 1)
    assert store.require("c").state == "removed"
    assert store.require("c").health == "unchecked"
    assert store.revision(6).weights_digest == store.revision(1).weights_digest
    assert problems(store) == []


def test_after_a_rollback_a_check_of_the_same_weights_counts(store: Store) -> None:
    number = add(store, "a")
    add(store, "b")
    roll_back(store, 1)
    store.record_results([check(number, margin=0.25, kind="retention")], 3)
    add(store, "c")
    store.record_results([check(number, passed=False, kind="retention")], 4)
    assert store.require("a").health == "regressed"
    roll_back(store, 3)
    row = store.require("a")
    assert (row.health, row.margin, row.last_checked_revision) == ("recalled", 0.25, 3)


def test_a_rollback_to_the_base_empties_the_model(store: Store) -> None:
    add(store, "a")
    roll_back(store, 0)
    assert committed_texts(store) == {}
    assert store.lineage(2) == []
    assert store.rollback_changes(1)[0].after == store.changes(1)[0].after


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "update", "remove", "rollback"]), st.integers(0, 30)),
    max_size=10,
)


@settings(max_examples=15, deadline=None)
@given(STEPS)
def test_any_history_can_be_replayed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    with new_store(tmp_path_factory.mktemp("s")) as store:
        expected: list[tuple[dict[str, str], str]] = [({}, "base-digest")]
        for number, (kind, pick) in enumerate(steps):
            _one_step(store, kind, pick, number)
            now_committed = committed_texts(store)
            if len(expected) == store.head():
                expected.append((now_committed, store.revision(store.head()).weights_digest))
        assert len(expected) == store.head() + 1
        for number, (facts, digest) in enumerate(expected):
            at = store.facts_at(number).values()
            assert {f.key: f.description for state, f in at if state == "committed"} == facts
            assert store.revision(number).weights_digest == digest
            if number:  # the deltas of the lineage, in order, give the recorded weights
                assert _replayed(store, number) == digest
        assert problems(store) == []


def _one_step(store: Store, kind: str, pick: int, number: int) -> None:
    keys = store.keys()
    if kind == "rollback":
        roll_back(store, pick % (store.head() + 1))
    elif kind == "add":
        key = f"k{pick % 4}"
        if key not in keys:
            add(store, key, f"text {number}")
    elif keys:
        key = keys[pick % len(keys)]
        update(store, key, f"text {number}") if kind == "update" else remove(store, key)


def _replayed(store: Store, number: int) -> str:
    deltas = [str(row.delta) for row in store.lineage(number)]
    return hashlib.sha256("".join(deltas).encode()).hexdigest() if deltas else "base-digest"


def snapshot(store: Store) -> list[str]:
    """The whole database as text."""
    return list(store._db.iterdump())


def run_and_die(path: Path, statements: int, work: Callable[[Store], object]) -> bool:
    """Do some work in a child that is killed at its nth SQL statement; True if it was."""
    child = os.fork()
    if child == 0:
        _child(path, statements, work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _child(path: Path, statements: int, work: Callable[[Store], object]) -> None:
    left = statements

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with Store.open(path) as store:
            store._db.conn.set_trace_callback(count)
            work(store)
    finally:
        os._exit(0)


@pytest.mark.parametrize("kind", ["add", "update", "rollback"])
def test_killed_at_any_statement_an_edit_is_there_or_not(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    with new_store(path) as store:
        add(store, "first", "old")
        add(store, "second")
    work: dict[str, Callable[[Store], object]] = {
        "add": lambda store: add(store, f"new {store.head()}"),
        "update": lambda store: update(store, "first", f"text {store.head()}"),
        "rollback": lambda store: roll_back(store, store.head() - 1),
    }
    statements, killed = 1, True
    while killed:
        with Store.open(path) as store:
            head, before = store.head(), committed_texts(store)
        killed = run_and_die(path, statements, work[kind])
        with Store.open(path) as store:
            store.recover()
            assert problems(store) == []
            assert store.head() in (head, head + 1)
            assert (committed_texts(store) == before) == (
                store.head() == head
            ) or kind == "rollback"
            at = store.facts_at(store.head()).values()
            committed = {f.key: f.description for state, f in at if state == "committed"}
            assert committed_texts(store) == committed
            assert digest_of(store) == store.revision(store.head()).weights_digest
        statements += killed
    assert statements > 30  # it was killed many times before it got through
