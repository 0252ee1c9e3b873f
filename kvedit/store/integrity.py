"""The status of a store, its integrity check and its backup.

Invariants:
- Nothing here changes the store.
- A backup is complete or absent, and contains every delta and checkpoint its database names.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kvedit.errors import CorruptStoreError, KveditError, UsageError
from kvedit.files import (
    TEMPORARY,
    TRAINING_CHECKPOINTS,
    disk_errors,
    remove,
    sha256_file,
    sync_directory,
    sync_stream,
    temporary_path,
    verify_manifest,
)
from kvedit.store.checks.values import from_json
from kvedit.store.database import DB_NAME, sqlite_errors
from kvedit.store.rows import Finding, Row, require_report

if TYPE_CHECKING:
    from kvedit.store.store import Store

Query = Callable[[str], list[Row]]
_RUN_TIME = frozenset({"lock", "lock.json", "exports", "deltas", "checkpoints"})
_DESCRIPTION = ("model_name", "model_fingerprint", "dtype", "created_at")
_RESTORE = "Restore it from a backup."
MIN_PROBES = 32  # if all of so many pass, the 95% interval of the share begins at 89%


def status(store: Store, query: Query) -> dict[str, object]:
    """Counts, model, head, sizes in bytes and health, as plain values."""
    facts = store.facts()
    edits = query("SELECT state, count(*) AS n, max(finished_at) AS last FROM edits GROUP BY state")
    meta = {row["name"]: row["value"] for row in query("SELECT name, value FROM meta")}
    protected = Counter(row["role"] for row in query("SELECT role FROM protected"))
    return {
        "path": str(store.path),
        "head": store.head(),
        "revisions": len(store.revisions()) - 1,
        **{name: meta.get(name) for name in _DESCRIPTION},
        "facts": dict(Counter(row.state for row in facts)),
        "health": dict(Counter(row.health for row in facts if row.state == "committed")),
        "edits": {row["state"]: row["n"] for row in edits},
        "last_edit_at": max((row["last"] for row in edits if row["last"]), default=None),
        "unfinished_at": _unfinished(store),
        "relative_norm": _largest_norm(query),
        "checkpoints": len(store.checkpoints()),
        "protected": sum(protected.values()),
        "locality_probes": protected["locality"],
        "few_probes": few_probes(protected["locality"]),
        "bytes": {
            "database": _size(store.db_path), "deltas": _size(store.deltas),
            "checkpoints": _size(store.checkpoints_path), "cache": _size(store.cache),
        },
    }  # fmt: skip


def few_probes(count: int) -> str:
    """What it means that a store has so few locality probes; empty when it has enough."""
    if not count:
        return "no locality probes: this part of the gate checks nothing"
    return f"only {count} locality probes: this part of the gate sees little" * (count < MIN_PROBES)


def _unfinished(store: Store) -> str | None:
    """When the newest training checkpoint was written; None if no training can be resumed."""
    files = _stats(store.cache.glob(TRAINING_CHECKPOINTS))
    written = max((file.st_mtime for file in files), default=None)
    return None if written is None else datetime.fromtimestamp(written, UTC).isoformat()


def _largest_norm(query: Query) -> dict[str, object] | None:
    """Norms of the accumulated deltas at the head, as shares of the base matrices' norms.

    Their number, the median, the largest (``most``) and its matrix; None before the first edit.
    """
    latest = query("SELECT report FROM edits WHERE state = 'committed' ORDER BY id DESC LIMIT 1")
    report = from_json(latest[0]["report"], dict, "the latest edit's report") if latest else {}
    require_report(report, "of the latest edit")
    norms = report.get("relative_norms")
    if not norms:
        return None
    matrix, most = max(norms.items(), key=lambda item: item[1])
    return {
        "matrices": len(norms), "median": median(norms.values()), "most": most, "matrix": matrix,
    }  # fmt: skip


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 if there is none."""
    return sum(file.st_size for file in _stats([path, *path.rglob("*")]))


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """The status of each regular file; one that another process removes meanwhile is left out."""
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield status


def integrity(store: Store, query: Query, *, deep: bool = True) -> list[Finding]:
    """Everything that can be checked without the model; one ``ok`` for each part that is sound."""
    parts = {
        "database": _database(query),
        "revisions and head": _revisions(store),
        "deltas": _deltas(store, deep),
        "checkpoints": _checkpoints(store, deep),
        "leftovers": _leftovers(store, query),
    }
    findings: list[Finding] = []
    for name, problems in parts.items():
        findings += list(problems) or [Finding("ok", f"{name}: sound")]
    return findings


def _database(query: Query) -> Iterator[Finding]:
    try:
        for row in query("PRAGMA integrity_check"):
            if row["integrity_check"] != "ok":
                yield Finding("error", f"database: {row['integrity_check']}", _RESTORE)
        for row in query("PRAGMA foreign_key_check"):
            what = f"database: a row of {row['table']} names a missing row of {row['parent']}"
            yield Finding("error", what, _RESTORE)
    except CorruptStoreError as error:
        yield Finding("error", f"database: {error.message}", _RESTORE)


def _revisions(store: Store) -> Iterator[Finding]:
    try:
        known = {row.id for row in store.revisions()}
        head = store.head()
        if head not in known:
            yield Finding("error", f"the head, revision {head}, does not exist", _RESTORE)
        elif head != max(known):
            yield Finding("error", f"revisions beyond the head, {head}, exist", _RESTORE)
        else:
            store.lineage(head)
    except CorruptStoreError as error:
        yield Finding("error", error.message, _RESTORE)


def _deltas(store: Store, deep: bool) -> Iterator[Finding]:
    for row in store.revisions():
        if row.delta is None:
            continue
        path = store.delta_path(row.delta)
        if not path.is_file():
            yield Finding("error", f"the delta of revision {row.id} is missing: {path}", _RESTORE)
        elif deep and sha256_file(path) != row.delta:
            yield Finding("error", f"the delta of revision {row.id} was altered: {path}", _RESTORE)


def _checkpoints(store: Store, deep: bool) -> Iterator[Finding]:
    hint = "The deltas replace it; its folder may be deleted."
    for row in store.checkpoints():
        if not row.path.is_dir():
            what = f"the checkpoint of revision {row.revision} is missing: {row.path}"
            yield Finding("warning", what, hint)
        elif deep:
            try:
                verify_manifest(row.path, row.digest)
            except (KveditError, ValueError) as error:
                what = f"the checkpoint of revision {row.revision} is damaged: {error}"
                yield Finding("warning", what, hint)


def _leftovers(store: Store, query: Query) -> Iterator[Finding]:
    hint = "The next command that writes cleans up, unless one is running now."
    for row in query("SELECT id, kind FROM edits WHERE state IN ('planned', 'trained')"):
        yield Finding("warning", f"edit {row['id']} ({row['kind']}) was not ended", hint)
    for path in store.stray_files():
        yield Finding("warning", f"a file that nothing needs: {path}", hint)


def backup(store: Store, connection: sqlite3.Connection, target: Path) -> None:
    """Write the store into one tar file; complete or absent.

    The database is copied first: deltas committed meanwhile are not named by the copy.
    Raises CorruptStoreError if a delta is missing, UsageError if the target's folder is,
    DiskFullError if there is no space.
    """
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", hint="Create it first.")
    temporary, snapshot = temporary_path(target), temporary_path(target.with_suffix(".db"))
    try:
        with disk_errors(target), sqlite_errors(target):
            names = _snapshot(connection, snapshot)
            with open(temporary, "xb") as stream:
                with tarfile.open(fileobj=stream, mode="w") as archive:
                    archive.add(snapshot, DB_NAME)
                    _add_files(archive, store, names, {temporary, snapshot, target})
                sync_stream(stream)
            os.replace(temporary, target)
            sync_directory(target.parent)
    finally:
        remove(temporary)
        remove(snapshot)


def _snapshot(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Copy the database; return the names of the files that the copy needs, inside the store."""
    with closing(sqlite3.connect(path)) as copy:
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, with no -wal beside it
        deltas = copy.execute("SELECT DISTINCT delta FROM revisions WHERE delta IS NOT NULL")
        names = [f"deltas/{row[0]}" for row in deltas]
        return names + [str(row[0]) for row in copy.execute("SELECT path FROM checkpoints")]


def _add_files(archive: tarfile.TarFile, store: Store, names: list[str], skip: set[Path]) -> None:
    """Add the files that the database names, and settings and texts of the store's folder."""
    for name in names:
        if name.startswith("deltas/"):
            path = store.delta_path(name.removeprefix("deltas/"))
            if not path.is_file():
                raise CorruptStoreError(f"the delta {path} is missing", hint=_RESTORE)
            archive.add(path, f"deltas/{path.name}")
        elif (store.path / name).is_dir():  # a missing checkpoint only costs time
            archive.add(store.path / name, name)
    skipped = {path.resolve() for path in skip}
    for path in sorted(store.path.iterdir()):
        run_time = path.name in _RUN_TIME or path.name.startswith((DB_NAME, TEMPORARY))
        if not run_time and path.resolve() not in skipped:
            archive.add(path, path.name)
