"""The schema of a database from elsewhere, compared with ours before anything else is read.

A view in a table's place may never end, a trigger may change what nobody asked for, and without a
CHECK constraint a row may say anything.  So a database has our tables and indexes, word for word,
and nothing besides but what SQLite and sqlite-utils keep for themselves.
"""

import sqlite3
from collections.abc import Iterator
from functools import cache

from sqlite_utils import Database

from kvedit.errors import CorruptStoreError

_OWN = ("sqlite_autoindex_", "sqlite_sequence", "sqlite_stat")
_MIGRATIONS = "_sqlite_migrations"  # of sqlite-utils, which may change its columns
_LIST = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
Schema = dict[str, tuple[str, str, str]]
"""Of each table and index, by its name: type, table, and SQL with plain spaces."""


def require_ours(db: Database, version: int, where: str) -> None:
    """Raise CorruptStoreError unless a database has the schema of this version of the format."""
    expected, found = _of_version(version), dict(_schema(db))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            kind = (found.get(name) or expected[name])[0]
            fault = "is missing" if name not in found else "is not kvedit's own"
            raise CorruptStoreError(
                f"{where}: the {kind} {name!r:.80} {fault}",
                hint="This is no database of kvedit, or somebody changed it; restore it from a"
                " backup.",
            )


@cache
def _of_version(version: int) -> Schema:
    from kvedit.store.migrations import empty_database

    db = empty_database(version)
    try:
        return dict(_schema(db))
    finally:
        db.close()


def _schema(db: Database) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for kind, name, table, sql in db.execute(_LIST).fetchall():
        text = " ".join(str(sql).split())
        if name == _MIGRATIONS and kind == "table" and text.upper().startswith("CREATE TABLE"):
            continue
        plain = sql is None or text.upper().startswith("CREATE TABLE")
        if not (plain and str(name).startswith(_OWN)):
            yield str(name), (str(kind), str(table), text)


def harden(connection: sqlite3.Connection) -> None:
    """Let SQLite believe less of what is in a file, and leave nothing there that was deleted."""
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
