"""The database of a store: safe opening, transactions, and plain error messages.

Invariants:
- WAL, ``synchronous=FULL`` and foreign keys are on for every writing connection.
- A database appears under its name only when it is complete (``create_database``).
- No ``sqlite3`` error leaves this module's helpers untranslated.
- Reading needs no place to write: where SQLite's own files cannot be made, a copy in memory is
  read, of one moment, with the write-ahead log in it.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import quote

from sqlite_utils import Database

from kvedit.config import FILE_NAME, Config
from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    KveditError,
    LockedError,
    NoStoreError,
    NotWritableError,
)
from kvedit.files import (
    disk_errors,
    disk_full,
    remove,
    require_writable,
    sync_directory,
    temporary_path,
)
from kvedit.lock import StoreLock
from kvedit.store.checks.schema import harden, require_ours
from kvedit.store.checks.values import require_types
from kvedit.store.migrations import FORMAT_VERSION, check_version, migrate
from kvedit.store.rows import Row
from kvedit.trust import names

DB_NAME = "kvedit.db"
BUSY_SECONDS = 10.0
COPY_TRIES = 5  # of a database that is written meanwhile
DELTA_SUFFIX = ".safetensors"


def create_database(path: Path, meta: Mapping[str, str], weights_digest: str) -> None:
    """Make a database with its base revision, under a temporary name until it is complete."""
    temporary = temporary_path(path)
    try:
        with sqlite_errors(path), disk_errors(path):
            with closing(Database(sqlite3.connect(temporary), execute_plugins=False)) as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = FULL")
                migrate(db)
                _fill(db, meta, weights_digest)
                db.enable_wal()
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(OSError):  # recovery removes what is left of it
                remove(temporary.with_name(temporary.name + suffix))


def _fill(db: Database, meta: Mapping[str, str], weights_digest: str) -> None:
    with db.atomic():
        base = {"id": 0, "kind": "base", "weights_digest": weights_digest}
        db.table("revisions").insert({**base, "created_at": meta["created_at"]})
        for name, value in {**meta, "head": "0"}.items():
            db.table("meta").insert({"name": name, "value": value})


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Translate what SQLite raises about the database at ``path``."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error


def _translated(error: sqlite3.Error, path: Path) -> KveditError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return disk_full(path)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LockedError(f"{path} is in use: {error}", hint="Wait a moment and try again.")
    if code in (*_NOT_WRITABLE, sqlite3.SQLITE_IOERR) and (reason := _why_not(path)):
        return reason
    if code in _NOT_WRITABLE:
        return NotWritableError(f"cannot write {path}: {error}", hint=_WRITE_HINT)
    if code == sqlite3.SQLITE_IOERR:
        hint = "Look at the system's log and at the disk; the store itself may be sound."
        return KveditError(f"the disk failed at {path}: {error}", hint=hint)
    return CorruptStoreError(
        f"{path} is not a sound database: {error}",
        hint="Run `kvedit doctor`; restore the store from a backup if it fails.",
    )


_NOT_WRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_WRITE_HINT = "Check the permissions of the store's folder and of the files in it."


def _why_not(path: Path) -> KveditError | None:
    """Why SQLite could not open a file for writing; None if that cannot be told."""
    try:
        path.open("rb").close()
    except OSError as error:
        return KveditError(f"cannot read {path}: {error.strerror}", hint=_WRITE_HINT)
    try:
        require_writable(path)
    except KveditError as error:
        return error
    return None


def connect(path: Path, *, readonly: bool) -> Database:
    """Open a database that exists; one of an older format is upgraded first, also for reading.

    Raises StoreTooNewError or CorruptStoreError, NotWritableError unless ``readonly``, and what
    ``upgrade`` raises.
    """
    try:
        db, version = _open(path, readonly=readonly)
        if version < FORMAT_VERSION:
            db.close()
            upgrade(path, version)
            db, _ = _open(path, readonly=readonly)
    except (NotWritableError, DiskFullError):
        if not readonly:
            raise
        return _copy_in_memory(path)
    return db


def _copy_in_memory(path: Path) -> Database:
    """The database as it is now, of today's format, for reading alone, without any file written.

    Raises LockedError if it is written all the time.
    """
    for _ in range(COPY_TRIES):
        before = _last_write(path)
        copy = Database(memory=True)
        try:
            with sqlite_errors(path):
                _read_unlocked(path, copy.conn)
                if _last_write(path) == before:
                    harden(copy.conn)
                    require_ours(copy, check_version(copy, str(path)), str(path))
                    migrate(copy)
                    copy.execute("PRAGMA query_only = ON")
                    return copy
        except BaseException:
            copy.close()
            raise
        copy.close()
    hint = "Wait until the other command has ended, then try again."
    raise LockedError(f"{path} is being written, and cannot be read meanwhile", hint=hint)


def _read_unlocked(path: Path, target: sqlite3.Connection) -> None:
    """Copy a database with what its write-ahead log holds, without locks and shared memory."""
    has_log = any(size for size, _ in _last_write(path)[1:])
    without_locks = "unix-none" if os.name == "posix" else "win32-none"
    mode = f"vfs={without_locks}" if has_log else "immutable=1"  # the latter passes over a log
    uri = f"file:{quote(os.fsencode(path.resolve()))}?mode=ro&{mode}"
    with closing(sqlite3.connect(uri, uri=True)) as source:
        source.execute("PRAGMA locking_mode = EXCLUSIVE")  # the log's index is kept in memory then
        source.backup(target)


def _last_write(path: Path) -> list[tuple[int, int]]:
    """Size in bytes and time of change of a database and of its write-ahead log, if any."""
    files = [path, path.with_name(f"{path.name}-wal")]
    status = [file.stat() for file in files if file.exists()]
    return [(one.st_size, one.st_mtime_ns) for one in status]


def _open(path: Path, *, readonly: bool) -> tuple[Database, int]:
    """A connection, and the version of the database's format."""
    uri = f"file:{quote(os.fsencode(path.resolve()))}?mode={'ro' if readonly else 'rw'}"
    with sqlite_errors(path):
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        db = Database(connection, execute_plugins=False)
    try:
        with sqlite_errors(path):
            harden(connection)
            version = check_version(db, str(path))
            require_ours(db, version, str(path))
            db.execute("PRAGMA foreign_keys = ON")
            if not readonly:
                db.enable_wal()
                db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db, version


def upgrade(path: Path, version: int) -> None:
    """Bring an older database up to date, under the store's lock: nobody writes it meanwhile.

    A failed upgrade leaves the format as it was.  Raises the KveditError that stands in the way
    (LockedError, NotWritableError, DiskFullError), saying what it was for.
    """
    try:
        with StoreLock(path.parent):
            db, _ = _open(path, readonly=False)
            with closing(db), sqlite_errors(path):
                migrate(db)
    except KveditError as error:
        what = f"{path} has format {version} and must be upgraded to {FORMAT_VERSION}"
        raise type(error)(f"{what}: {error.message}", hint=error.hint) from error


def rows_of(cursor: sqlite3.Cursor, sql: str, where: str) -> list[Row]:
    """The rows of a query; raises CorruptStoreError for values of another type than kvedit's."""
    columns = [column[0] for column in cursor.description]
    rows = cursor.fetchall()
    if not sql.startswith("PRAGMA"):
        require_types(columns, rows, where)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def query_of(connection: sqlite3.Connection, where: str) -> Callable[[str], list[Row]]:
    """A function that returns the rows of a query, as ``rows_of`` does."""

    def query(sql: str) -> list[Row]:
        with sqlite_errors(Path(where)):
            return rows_of(connection.execute(sql), sql, where)

    return query


class StoreBase:
    """A folder with an open database: paths, meta, lock, transactions.

    With ``database`` it is that copy which is opened, in place of the store's own.
    """

    def __init__(self, path: Path, *, readonly: bool = False, database: Path | None = None) -> None:
        self.path = path
        self.readonly = readonly
        self.db_path = path / DB_NAME
        self.deltas = path / "deltas"  # files named by their SHA-256
        self.checkpoints_path = path / "checkpoints"
        self.cache = path / "cache"  # files that save time and can be computed again
        self.exports = path / "exports"  # for exports that name no other place
        if not self.db_path.is_file():
            raise NoStoreError(
                f"there is no knowledge store at {path}",
                hint="Create one with `kvedit init`, or name another with --store.",
            )
        names.refuse_links(path)
        self.settings: Config | None = None  # in place of those of the file, where they are set
        self._db = connect(database or self.db_path, readonly=readonly)
        self.connection: sqlite3.Connection = self._db.conn  # for work on the database as a whole
        self._store_lock = StoreLock(path)
        try:
            self.head()
        except BaseException:
            self._db.close()
            raise

    @property
    def config(self) -> Config:
        """The settings, read from ``kvedit.toml`` where there is one."""
        return self.settings or Config.load(self.path / FILE_NAME)

    def delta_path(self, digest: str) -> Path:
        """The file of a delta; raises CorruptStoreError for anything but a SHA-256 in hex."""
        return self.deltas / f"{names.delta(digest)}{DELTA_SUFFIX}"

    def checkpoint_path(self, revision: int) -> Path:
        """The folder for the checkpoint of a revision."""
        return self.checkpoints_path / f"{revision:08d}"

    def lock(self) -> StoreLock:
        """The writer's lock, a context manager; entering it twice is allowed."""
        return self._store_lock

    def close(self) -> None:
        """Close the database; a second call does nothing."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def meta(self, name: str) -> str | None:
        """A named value of the store, or None."""
        row = self._one("SELECT value FROM meta WHERE name = ?", [name])
        return None if row is None else str(row["value"])

    def set_meta(self, name: str, value: str) -> None:
        """Set a named value; ``head`` moves by commits only."""
        self.set_metas({name: value})

    def set_metas(self, values: Mapping[str, str]) -> None:
        """Set several named values in one transaction."""
        if "head" in values:
            raise ValueError("the head moves by commits only")
        with self._transaction():
            for name, value in values.items():
                self._set(name, value)

    def _set(self, name: str, value: str) -> None:
        self._execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", [name, value])

    def head(self) -> int:
        """The current revision; raises CorruptStoreError if the store names none."""
        return names.revision(self.meta("head"), f"{self.db_path} names no head revision")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction; anything raised inside undoes it."""
        with sqlite_errors(self.db_path), self._db.atomic():
            yield

    def _execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with sqlite_errors(self.db_path):
            return self._db.execute(sql, list(values))

    def _insert(self, table: str, row: Row, *, replace: bool = False) -> int:
        """Insert one row and return its rowid."""
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        sql = f"{verb} INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        return int(self._execute(sql, list(row.values())).lastrowid or 0)

    def _update(self, table: str, id_: int, row: Row) -> None:
        """Change columns of the row with this id."""
        columns = ", ".join(f"{name} = ?" for name in row)
        self._execute(f"UPDATE {table} SET {columns} WHERE id = ?", [*row.values(), id_])

    def query(self, sql: str, values: Iterable[object] = ()) -> list[Row]:
        """The rows of a query, as ``rows_of`` does."""
        with sqlite_errors(self.db_path):
            return rows_of(self._db.execute(sql, list(values)), sql, str(self.db_path))

    def _one(self, sql: str, values: Iterable[object] = ()) -> Row | None:
        return next(iter(self.query(sql, values)), None)
