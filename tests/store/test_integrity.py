"""Status, integrity and backup."""

from __future__ import annotations

import sqlite3
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from store_steps import add, check, committed_texts, fact, new_store, problems, remove

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.files import write_manifest
from kvedit.store.rows import FactChange
from kvedit.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = new_store(tmp_path / "s")
    add(store, "a")
    add(store, "b")
    folder = store.checkpoint_path(2)
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"w")
    store.add_checkpoint(2, folder, write_manifest(folder))
    return store


def test_status_counts(store: Store) -> None:
    remove(store, "b")
    store.put_pending(fact("c"))
    store.record_results([check(store.require("a").id, passed=False)], store.head())
    status = store.status()
    assert (status["head"], status["revisions"], status["checkpoints"]) == (3, 3, 1)
    assert status["facts"] == {"committed": 1, "removed": 1, "pending": 1}
    assert status["health"] == {"regressed": 1}
    assert status["edits"] == {"committed": 3}
    assert (status["model_name"], status["model_fingerprint"]) == ("tiny", "base-digest")
    sizes = status["bytes"]
    assert isinstance(sizes, dict)
    assert sizes["deltas"] == sum(path.stat().st_size for path in store.deltas.iterdir()) > 0
    assert sizes["database"] > 0
    assert sizes["cache"] == 0


def test_status_reports_training_that_can_be_resumed(store: Store) -> None:
    assert store.status()["unfinished_at"] is None
    store.cache.mkdir()
    (store.cache / "training-5-0123456789abcdef.safetensors").write_bytes(b"kept")
    kept = store.status()["unfinished_at"]
    assert isinstance(kept, str)
    assert datetime.now(UTC) - datetime.fromisoformat(kept) < timedelta(minutes=1)


def test_a_training_checkpoint_of_an_older_version_is_a_leftover(store: Store) -> None:
    store.cache.mkdir()
    old = store.cache / "lesson-4-0123456789abcdef.pt"
    old.write_bytes(b"kept")
    assert store.status()["unfinished_at"] is None
    assert problems(store) == [f"a file that nothing needs: {old}"]
    store.recover()
    assert not old.exists()


def test_status_reports_the_norm_of_the_accumulated_deltas(store: Store, tmp_path: Path) -> None:
    norms = {"matrices": 2, "median": 0.03, "most": 0.04, "matrix": "down"}
    assert store.status()["relative_norm"] == pytest.approx(norms)
    assert new_store(tmp_path / "empty").status()["relative_norm"] is None


def test_a_sound_store_has_no_problem_and_lists_what_was_checked(store: Store) -> None:
    assert problems(store) == []
    assert len(store.integrity()) == 5


def test_a_missing_or_altered_delta_is_an_error(store: Store) -> None:
    first, second = (store.delta_path(str(row.delta)) for row in store.lineage(2))
    first.unlink()
    second.write_bytes(b"other")
    errors = [finding for finding in store.integrity() if finding.level == "error"]
    assert [error.what for error in errors] == [
        f"the delta of revision 1 is missing: {first}",
        f"the delta of revision 2 was altered: {second}",
    ]
    assert all(error.hint for error in errors)
    assert len([f for f in store.integrity(deep=False) if f.level == "error"]) == 1


def test_a_damaged_or_missing_checkpoint_is_a_warning(store: Store) -> None:
    weights = store.checkpoint_path(2) / "weights.safetensors"
    weights.write_bytes(b"x")
    (finding,) = [f for f in store.integrity() if f.level != "ok"]
    assert finding.level == "warning"
    assert "checkpoint of revision 2 is damaged" in finding.what
    weights.unlink()
    (weights.parent / "manifest.json").unlink()
    weights.parent.rmdir()
    assert "checkpoint of revision 2 is missing" in problems(store)[0]


def test_leftovers_are_warnings_until_recovery(store: Store) -> None:
    new = fact("c")
    store.plan_edit("add", [FactChange(store.put_pending(new), None, new)], {})
    (store.deltas / ".tmp-half").write_bytes(b"")
    leftovers = problems(store)
    assert leftovers[0] == "edit 3 (add) was not ended"
    assert ".tmp-half" in leftovers[1]
    store.recover()
    assert problems(store) == []


def test_a_head_that_does_not_exist_is_an_error(store: Store) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("UPDATE meta SET value = '9' WHERE name = 'head'")
    assert "the head, revision 9, does not exist" in problems(store)
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("UPDATE meta SET value = '1' WHERE name = 'head'")
    assert "revisions beyond the head, 1, exist" in problems(store)


def test_a_reference_to_nothing_is_an_error(store: Store) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("INSERT INTO prior_answers VALUES (99, 'p', 'a')")
    assert problems(store) == ["database: a row of prior_answers names a missing row of facts"]


def test_a_backup_unpacks_to_the_same_store(store: Store, tmp_path: Path) -> None:
    (store.path / "kvedit.toml").write_text("[retention]\nchecked_facts = 3\n")
    (store.path / "exports").mkdir()
    target = store.path / "backup.tar"  # inside the store: it must not hold itself
    with store.lock():
        store.backup(target)
        store.backup(target)
    unpacked = tmp_path / "unpacked"
    with tarfile.open(target) as archive:
        names = archive.getnames()
        archive.extractall(unpacked, filter="data")
    assert not {"lock", "lock.json", "exports", "backup.tar"} & set(names)
    with Store.open(unpacked) as copy:
        assert (committed_texts(copy), copy.head()) == (committed_texts(store), store.head())
        assert copy.config.retention.checked_facts == 3
        assert copy.lineage(2) == store.lineage(2)
        assert problems(copy) == []
    assert list(store.path.glob(".tmp-*")) == []


def test_a_backup_that_cannot_be_complete_is_not_written(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out" / "backup.tar"
    with pytest.raises(UsageError, match="there is no folder"):
        store.backup(target)
    target.parent.mkdir()
    store.delta_path(str(store.revision(1).delta)).unlink()
    with pytest.raises(CorruptStoreError, match="is missing"):
        store.backup(target)
    assert list(target.parent.iterdir()) == []
