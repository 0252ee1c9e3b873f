"""After an erasure: the files are cleaned of what the database no longer has.

Invariants:
- Nothing is removed that the database names, but what is cached and can be made again.
- The database says that files are not clean until all of them are on the disk.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from kvedit.files import (
    OLD_TRAINING_CHECKPOINTS,
    TEMPORARY,
    TRAINING_CHECKPOINTS,
    disk_errors,
    remove,
    sync_directory,
    sync_stream,
)
from kvedit.store.database import sqlite_errors
from kvedit.store.forget.erasure import SCRUB
from kvedit.store.store import Store

_CACHED = (TRAINING_CHECKPOINTS, OLD_TRAINING_CHECKPOINTS, "head-*", "known-*", f"{TEMPORARY}*")


def scrub(store: Store) -> bool:
    """After an erasure: remove from the files what the database no longer has.

    Under the store's lock.  Returns whether all is done; other processes that read the database
    just now put it off.
    """
    if not store.needs_scrub:
        return True
    cached = [path for pattern in _CACHED for path in store.cache.glob(pattern)]
    for path in [*store.stray_files(), *cached]:
        with disk_errors(path):
            remove(path)
    for folder in (store.path, store.deltas, store.checkpoints_path, store.cache, store.exports):
        if folder.is_dir():
            with disk_errors(folder):
                sync_directory(folder)
    with sqlite_errors(store.db_path):
        store.connection.execute("VACUUM")  # pages keep deleted rows of times without secure_delete
    if not _truncate_log(store.db_path, store.connection):
        return False
    store.set_meta(SCRUB, "")
    _truncate_log(store.db_path, store.connection)
    return True


def _truncate_log(db_path: Path, connection: sqlite3.Connection) -> bool:
    """Empty SQLite's write-ahead log, on the disk too; False while another process reads."""
    with sqlite_errors(db_path):
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    log = db_path.with_name(f"{db_path.name}-wal")
    if not busy and log.is_file():
        with disk_errors(log), open(log, "rb+") as stream:
            sync_stream(stream)
    return not busy
