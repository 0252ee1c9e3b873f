"""What a disk holds after the power is cut: only what was synced, in two ways of losing the rest.

- ``strict``: a name is on the disk only once its folder was synced; an unlinked one comes back.
- ``eager``: names reach the disk at once, but the bytes of a file only when they were synced.

SQLite is trusted with its own files: what it has committed is on the disk (``synchronous=FULL``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvedit.store import database
from kvedit.store.database import DB_NAME, StoreBase

Folder = dict[str, int]  # name to inode


@dataclass(frozen=True)
class Moment:
    """What would be left if the power were cut now."""

    label: str
    root: int
    folders: dict[int, Folder]
    files: dict[int, bytes]

    def write(self, target: Path) -> None:
        """Make the folder as the disk has it."""
        self._write(self.root, target)

    def _write(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self.folders[inode].items():
            if child in self.folders:
                self._write(child, target / name)
            else:
                (target / name).write_bytes(self.files.get(child, b""))


@dataclass
class Disk:
    """Follows a folder; ``moments`` are the states after each call that changes what is durable."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    _synced_folders: dict[int, Folder] = field(default_factory=dict)
    _synced_files: dict[int, bytes] = field(default_factory=dict)
    _open: dict[int, int] = field(default_factory=dict)  # keeps inodes from being used again

    def __post_init__(self) -> None:
        for path in [self.root, *self.root.rglob("*")]:
            self.sync(path)

    def sync(self, path: Path) -> None:
        """A file's bytes, or a folder's names, are on the disk now."""
        inode = self._inode(path)
        if path.is_dir():
            self._synced_folders[inode] = self._names(path)
        else:
            self._synced_files[inode] = path.read_bytes()

    def sync_database(self, folder: Path) -> None:
        """SQLite has committed, or closed its database."""
        names = self._synced_folders.setdefault(self._inode(folder), {})
        for path in folder.iterdir():
            if DB_NAME in path.name and not path.name.endswith("-shm"):
                self.sync(path)
                names[path.name] = self._inode(path)
        for name in [n for n in names if DB_NAME in n and not (folder / n).exists()]:
            if name.endswith(("-wal", "-journal")):
                del names[name]

    def record(self, label: str) -> None:
        """Note both states that the disk may be in."""
        self.calls.append(label)
        now = {self._inode(p): self._names(p) for p in self._folders()}
        for way, names in (("strict", self._synced_folders), ("eager", now)):
            folders = {inode: dict(names.get(inode, {})) for inode in {*names, *now}}
            files = dict(self._synced_files)
            self.moments.append(Moment(f"{way}, {label}", self._inode(self.root), folders, files))

    def _folders(self) -> list[Path]:
        return [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]

    def _names(self, folder: Path) -> Folder:
        return {path.name: self._inode(path) for path in folder.iterdir()}

    def _inode(self, path: Path) -> int:
        handle = os.open(path, os.O_RDONLY)
        inode = os.fstat(handle).st_ino
        if inode in self._open:
            os.close(handle)
        else:
            self._open[inode] = handle
        return inode

    def close(self) -> None:
        """Let the inodes go."""
        for handle in self._open.values():
            os.close(handle)


@contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Follow every fsync, rename, removal and commit in a folder."""
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch:
        _watch_files(disk, patch)
        _watch_sqlite(disk, patch)
        try:
            yield disk
        finally:
            patch.undo()
            disk.close()


def _watch_files(disk: Disk, patch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def sync(handle: Any) -> None:
        fsync(handle)
        number = handle if isinstance(handle, int) else handle.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if disk.root in [path, *path.parents]:
            if path.name.startswith(DB_NAME):  # its log, which SQLite has emptied into the database
                disk.sync_database(path.parent)
            disk.sync(path)
            disk.record(f"fsync {path.name}")

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            disk.record(f"{name} {' '.join(Path(str(a)).name for a in args)}")
            return result

        return call

    patch.setattr(os, "fsync", sync)
    for name in ("replace", "unlink", "mkdir", "rmdir"):
        patch.setattr(os, name, watched(name))


def _watch_sqlite(disk: Disk, patch: pytest.MonkeyPatch) -> None:
    transaction, fill = StoreBase._transaction, database.Database.close

    @contextmanager
    def committed(store: StoreBase) -> Iterator[None]:
        with transaction(store):
            yield
            disk.record("inside a transaction")
        disk.sync_database(store.path)
        disk.record("commit")

    def close(db: Any) -> None:
        fill(db)
        for folder in {path.parent for path in disk.root.rglob(f"*{DB_NAME}*")}:
            disk.sync_database(folder)
        disk.record("close of the database")

    patch.setattr(StoreBase, "_transaction", committed)
    patch.setattr(database.Database, "close", close)
