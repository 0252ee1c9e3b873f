"""Backups: complete or absent, checked before they replace the last one, and nothing foreign."""

from __future__ import annotations

import os
import sqlite3
import tarfile
from pathlib import Path

import pytest
from store_steps import add, committed_texts, new_store, problems

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.files import write_manifest
from kvedit.store.backup import write_backup
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


def test_a_backup_unpacks_to_the_same_store(store: Store, tmp_path: Path) -> None:
    (store.path / "kvedit.toml").write_text("[retention]\nchecked_facts = 3\n")
    (store.path / "exports").mkdir()
    (store.path / "cache").mkdir(exist_ok=True)
    (store.path / "cache" / "base-fisher.safetensors").write_bytes(b"large, and made again")
    target = store.path / "backup.tar"  # inside the store: it must not hold itself
    with store.lock():
        write_backup(store, target)
        write_backup(store, target)
    unpacked = tmp_path / "unpacked"
    with tarfile.open(target) as archive:
        names = archive.getnames()
        archive.extractall(unpacked, filter="data")
    assert not {"lock", "lock.json", "exports", "cache", "backup.tar"} & set(names)
    assert not any("cache" in name for name in names)
    with Store.open(unpacked) as copy:
        assert (committed_texts(copy), copy.head()) == (committed_texts(store), store.head())
        assert copy.config.retention.checked_facts == 3
        assert copy.lineage(2) == store.lineage(2)
        assert problems(copy) == []
    assert list(store.path.glob(".tmp-*")) == []


def test_a_backup_that_cannot_be_complete_is_not_written(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out" / "backup.tar"
    with pytest.raises(UsageError, match="there is no folder"):
        write_backup(store, target)
    target.parent.mkdir()
    store.delta_path(str(store.revision(1).delta)).unlink()
    with pytest.raises(CorruptStoreError, match="is missing"):
        write_backup(store, target)
    assert list(target.parent.iterdir()) == []


DAMAGE = {
    "an altered delta": lambda store: next(store.deltas.iterdir()).write_bytes(b"other"),
    "an altered text": lambda store: sql(store, "UPDATE facts SET description = 'other'"),
    "broken JSON": lambda store: sql(store, "UPDATE edits SET report = '{'"),
    "a foreign checkpoint": lambda store: sql(store, "UPDATE checkpoints SET path = '../x'"),
    "a foreign delta": lambda store: sql(store, "UPDATE revisions SET delta = '../x' WHERE id > 0"),
    "a missing row": lambda store: sql(store, "DELETE FROM revisions WHERE id = 1"),
}


def sql(store: Store, text: str) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute(text)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_does_not_replace_the_last_good_backup(
    store: Store, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "backup.tar"
    write_backup(store, target)
    good = target.read_bytes()
    DAMAGE[damage](store)
    with pytest.raises(CorruptStoreError):
        write_backup(store, target)
    assert target.read_bytes() == good
    assert {path.name for path in tmp_path.iterdir()} == {"s", "backup.tar"}


def test_a_damaged_checkpoint_is_left_out(store: Store, tmp_path: Path) -> None:
    (store.checkpoint_path(2) / "weights.safetensors").write_bytes(b"x")
    write_backup(store, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as archive:
        assert not any(name.startswith("checkpoints") for name in archive.getnames())


def test_nothing_from_outside_the_store_is_packed(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (store.path / "notes.txt").write_text("mine")
    (store.path / "linked").symlink_to(outside)
    (store.path / "linked.txt").symlink_to(outside / "secret")
    os.mkfifo(store.path / "pipe")
    write_backup(store, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as archive:
        members = {member.name for member in archive if member.isfile()}
        assert all(member.isfile() or member.isdir() for member in archive)
    assert "notes.txt" in members and not any("linked" in name for name in members)
    assert b"secret" not in (tmp_path / "backup.tar").read_bytes()


def test_a_delta_that_is_a_link_is_packed_by_its_content(store: Store, tmp_path: Path) -> None:
    path = store.delta_path(str(store.revision(1).delta))
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    write_backup(store, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as archive:
        assert archive.getmember(f"deltas/{path.name}").isfile()
    (tmp_path / "moved").write_text("a secret")
    with pytest.raises(CorruptStoreError, match="was altered"):
        write_backup(store, tmp_path / "other.tar")
    assert not (tmp_path / "other.tar").exists()
