"""Stores as somebody would make them who means harm: any value in any column of the database."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

VALUES: dict[str, object] = {
    "a path upwards": "../../outside/folder",
    "an absolute path": "{outside}/folder",
    "a zero byte": "checkpoints/0000\x000001",
    "a huge text": "x" * 300_000,
    "a huge number": 2**63 - 1,
    "a text of digits": "9" * 5_000,
    "a negative number": -3,
    "a fraction": 0.5,
    "bytes": b"\xff\xfe\x00",
    "no UTF-8": "CAST(x'ff41' AS TEXT)",
    "nothing": None,
    "half a JSON": '{"a": [',
    "a deep JSON": "[" * 50_000,
    "another JSON": '{"relative_norms": {"a": "b"}, "seconds": [], "key": 7}',
    "another list": '[7, {"a": null}, []]',
    "code": "__import__('os').system('touch {outside}/run')",
}
RAW = ("no UTF-8",)  # SQL, not a value
EXIT_CODES = frozenset({0, 1, 2, 3, 4, 10, 11, 12, 13})
"""Those that ``kvedit --help`` documents."""
SECONDS = 60  # after which a command counts as endless


@dataclass(frozen=True)
class Outcome:
    """What a command said and did."""

    command: str
    code: int
    text: str


def columns(database: Path) -> list[tuple[str, str]]:
    """Every table of a store's database and its columns."""
    with closing(sqlite3.connect(database)) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        names = [name for (name,) in tables if not name.startswith(("sqlite_", "_sqlite"))]
        return [
            (name, row[1]) for name in names for row in db.execute(f"PRAGMA table_info({name})")
        ]


def poison(database: Path, table: str, column: str, value: object, *, raw: bool = False) -> int:
    """Write a value into a column of the last row, past every constraint but a unique one; returns
    how many rows it reached.
    """
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", [table]).fetchone()
        _set_schema(db, table, re.sub("(?<!IS )NOT NULL", "", sql))
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        mark = str(value) if raw else "?"
        last = f"rowid = (SELECT max(rowid) FROM {table})"
        last = "name = 'model_path'" if (table, column) == ("meta", "value") else last
        try:
            changed = db.execute(
                f"UPDATE {table} SET {column} = {mark} WHERE {last}", [] if raw else [value]
            ).rowcount
        except sqlite3.IntegrityError:  # a rowid must be a number, a key must be its own
            changed = 0
        _set_schema(db, table, sql)
    return int(changed)


def _set_schema(db: sqlite3.Connection, table: str, sql: str) -> None:
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ? AND type = 'table'", [sql, table])
    db.execute("PRAGMA writable_schema = RESET")


def set_meta(database: Path, name: str, value: object) -> None:
    """Write a named value of the store."""
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", [name, value])


def make_outside(folder: Path) -> Path:
    """A folder of the user's that no store may touch."""
    outside = folder / "outside"
    for name in ("folder/00000001/manifest.json", "folder/secret", ".tmp-mine", f"{'a' * 64}.txt"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(f"my own secret {name}", encoding="utf-8")
    return outside


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder and their digests."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def packed_outside(archive: Path) -> list[str]:
    """Members of a backup that would be unpacked elsewhere, or hold what is not the store's."""
    if not archive.exists():
        return []
    with tarfile.open(archive) as tar:
        wrong = [m.name for m in tar if m.name.startswith("/") or ".." in Path(m.name).parts]
        wrong += [m.name for m in tar.getmembers() if not (m.isfile() or m.isdir())]
    return wrong + ["a secret"] * (b"my own secret" in archive.read_bytes())


def copy(template: Path, target: Path) -> Path:
    """A store of its own, in place of the last one."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(template, target))


@contextmanager
def ends_in_time() -> Iterator[None]:
    """Inside, an endless query or loop is broken off with an error."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
