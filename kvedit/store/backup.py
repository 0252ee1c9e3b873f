"""A backup: one tar file with a consistent copy of a store.

Invariants:
- A backup is complete or absent, and what stood under its name before is replaced only when the
  new one was read again and found whole.
- Nothing from outside the store's folder is packed, whatever the database says.
- A backup is written while other processes write: the database is copied first, and what is
  committed meanwhile is not named by the copy.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kvedit.errors import CorruptStoreError, KveditError, UsageError
from kvedit.files import (
    MANIFEST,
    TEMPORARY,
    disk_errors,
    remove,
    sha256_file,
    sync_directory,
    sync_stream,
    temporary_path,
    verify_manifest,
)
from kvedit.store import integrity
from kvedit.store.checks.contents import contents
from kvedit.store.database import DB_NAME, query_of, sqlite_errors
from kvedit.store.store import Store
from kvedit.trust import names

_LEFT_OUT = frozenset({"lock", "lock.json", "exports", "cache"})  # of this moment, or made again
_HINT = "Run `kvedit doctor`. The last backup was not replaced."


def write_backup(store: Store, target: Path) -> None:
    """Write the store into one tar file; complete or absent.

    Raises CorruptStoreError if the database or a delta is damaged, UsageError if the target's
    folder is missing, DiskFullError if there is no space.
    """
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", hint="Create it first.")
    temporary, snapshot = temporary_path(target), temporary_path(target.with_suffix(".db"))
    try:
        with disk_errors(target), sqlite_errors(target):
            needed = _snapshot(store, snapshot)
            with open(temporary, "xb") as stream:
                # A delta may be a link: its content is known by its digest, and is packed.
                with tarfile.open(fileobj=stream, mode="w", dereference=True) as archive:
                    archive.add(snapshot, DB_NAME)
                    digests = _add_files(archive, store, needed, {temporary, snapshot, target})
                sync_stream(stream)
            _verify(temporary, {DB_NAME: sha256_file(snapshot), **digests})
            os.replace(temporary, target)
            sync_directory(target.parent)
    finally:
        remove(temporary)
        remove(snapshot)


@dataclass(frozen=True, slots=True)
class _Needed:
    """The deltas that a database needs, and its checkpoints with the digests of their manifests;
    those that are ``pinned`` stand for deltas that are no longer there.
    """

    deltas: list[str]
    checkpoints: dict[str, str]
    pinned: frozenset[str]


def _snapshot(store: Store, path: Path) -> _Needed:
    """Copy the database, and check the copy; what it needs."""
    with closing(sqlite3.connect(path)) as copy:
        store.connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, with no -wal beside it
        query = query_of(copy, str(path))
        for finding in (*integrity.database(query), *contents(query)):
            if finding.level == "error":
                raise CorruptStoreError(f"not backed up: {finding.what}", hint=_HINT)
        sql = "SELECT DISTINCT delta FROM revisions WHERE delta IS NOT NULL AND dropped IS NULL"
        deltas = [names.delta(row["delta"]) for row in query(sql)]
        saved = query("SELECT revision, path, digest FROM checkpoints")
        if store.needs_scrub:
            copy.execute("VACUUM")  # pages that an erasure left behind are not packed
    with Store(store.path, readonly=True, database=path) as there:
        pinned = there.pinned()
    checkpoints = {names.checkpoint(r["revision"], r["path"]): r["digest"] for r in saved}
    kept = frozenset(
        names.checkpoint(r["revision"], r["path"]) for r in saved if r["revision"] in pinned
    )
    return _Needed(deltas, checkpoints, kept)


def _add_files(
    archive: tarfile.TarFile, store: Store, needed: _Needed, skip: set[Path]
) -> dict[str, str]:
    """Add the files that the database names, and settings and texts of the store's folder; the
    digests of those without which the store is not whole.
    """
    digests = {f"deltas/{digest}.safetensors": digest for digest in needed.deltas}
    for digest in needed.deltas:
        path = store.delta_path(digest)
        if not path.is_file():
            raise CorruptStoreError(f"the delta {path} is missing", hint=_HINT)
        archive.add(path, f"deltas/{path.name}", recursive=False)
    for name, digest in needed.checkpoints.items():
        if files := _files_of(store.path / name, digest):
            _add_folder(archive, store.path / name, name)
            if name in needed.pinned:
                digests |= {f"{name}/{file}": one for file, one in files.items()}
        elif name in needed.pinned:  # any other only costs time
            raise CorruptStoreError(f"{store.path / name} is missing or damaged", hint=_HINT)
    skipped = {path.resolve() for path in skip}
    for path in sorted(store.path.iterdir()):
        done = path.name in ("deltas", "checkpoints") or path.name.startswith((DB_NAME, TEMPORARY))
        if path.name not in _LEFT_OUT and not done and path.resolve() not in skipped:
            _add_folder(archive, path, path.name)
    return digests


def _files_of(folder: Path, digest: str) -> dict[str, str]:
    """The files of a checkpoint and their digests; none if it is damaged or a link."""
    try:
        files = verify_manifest(folder, digest)["files"]
    except (KveditError, OSError):
        return {}
    if folder.is_symlink() or not isinstance(files, dict):
        return {}
    return {MANIFEST: digest, **files}


def _add_folder(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file, or a folder with what is in it: plain files alone, and no links."""
    if path.is_symlink():
        return
    for file in [path, *sorted(path.rglob("*"))]:  # which does not follow links
        if not file.is_symlink() and (file.is_file() or file.is_dir()):
            inside = (Path(name) / file.relative_to(path)).as_posix()
            archive.add(file, inside, recursive=False)


def _verify(path: Path, expected: Mapping[str, str]) -> None:
    """Read a backup again; raises CorruptStoreError unless these files are in it, with these
    digests.
    """
    with tarfile.open(path) as archive:
        found = {name: digest for name, digest in _digests(archive) if name in expected}
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise CorruptStoreError(f"not backed up: {name} was altered or is missing", hint=_HINT)


def _digests(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file in a tar file."""
    for member in archive:
        stream = archive.extractfile(member)
        if stream is not None:
            yield member.name, hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
