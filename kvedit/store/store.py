"""The knowledge store: facts, their health and history, and protected texts, in one folder.

Invariants:
- One row for each normalised key; an alias belongs to one fact only.
- A committed fact changes by ``commit_edit`` alone (see ``journal``).
- Nothing here imports torch: reading a store is quick.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvedit.errors import (
    DiskFullError,
    DuplicateKeyError,
    NotWritableError,
    UnknownKeyError,
    UsageError,
)
from kvedit.facts.fact import Fact
from kvedit.facts.keys import did_you_mean, in_words, normalise
from kvedit.files import disk_errors, now, sync_directory
from kvedit.lock import StoreLock
from kvedit.paths import home_path
from kvedit.store.database import DB_NAME, create_database
from kvedit.store.results import Results
from kvedit.store.rows import (
    CheckpointRow,
    EditRow,
    FactRow,
    ProbeRow,
    ProtectedRow,
    Row,
    fact_columns,
    fact_from_columns,
)
from kvedit.trust import names

ENVIRONMENT = "KVEDIT_STORE"
DEFAULT = "store"
_FACTS = """
    SELECT f.*, h.passed, h.margin, h.last_checked_revision, h.last_checked_at,
        (SELECT max(revision) FROM fact_versions v WHERE v.fact_id = f.id) AS revision
    FROM facts f LEFT JOIN fact_health h ON h.fact_id = f.id
"""


def resolve_store(option: str | Path | None = None) -> Path:
    """The store to use: ``--store``, then ``KVEDIT_STORE``, then ``./store``."""
    return home_path(option or os.environ.get(ENVIRONMENT) or DEFAULT)


class Store(Results):
    """A knowledge store.  Open it with ``Store.open``, make one with ``Store.create``."""

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a (complete) store at this path."""
        return (path / DB_NAME).is_file()

    @classmethod
    def create(cls, path: Path, meta: Mapping[str, str]) -> Store:
        """Make a store and open it.  If the process is killed meanwhile, there is no store.

        ``meta`` describes the model (``model_name``, ``model_fingerprint`` and so on);
        ``weights_digest``, if given, is that of the base revision.  Raises UsageError if there is
        a store already.
        """
        with disk_errors(path):
            for folder in (path, path / "deltas", path / "checkpoints"):
                folder.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)
        with StoreLock(path):
            if cls.exists(path):
                hint = "Name another with --store."
                raise UsageError(f"there is a store at {path} already", hint=hint)
            full = {"created_at": now(), **meta}
            digest = full.get("weights_digest") or full.get("model_fingerprint", "")
            create_database(path / DB_NAME, full, digest)
        return cls(path)

    @classmethod
    def open(cls, path: Path, readonly: bool = False) -> Store:
        """Open a store; one of an older format is upgraded first, also for reading.  Raises
        NoStoreError, StoreTooNewError, CorruptStoreError, and what ``database.upgrade`` raises.
        """
        return cls(path, readonly=readonly)

    @classmethod
    def open_to_ask(cls, path: Path) -> Store:
        """Open a store to ask its model: for writing too, so that it recovers and keeps what was
        measured, but for reading alone where it cannot be written (``readonly`` says so).
        """
        try:
            return cls.open(path)
        except (NotWritableError, DiskFullError):
            return cls.open(path, readonly=True)

    def put_pending(self, fact: Fact) -> int:
        """Insert a fact to be trained, or replace one that is not committed; returns its id.

        Raises DuplicateKeyError if the key is a committed fact's, or if the key or an alias
        belongs to another fact.
        """
        return self.put_pending_many([fact])[0]

    def put_pending_many(self, facts: Sequence[Fact]) -> list[int]:
        """``put_pending`` for many facts in one transaction: all of them, or on an error none."""
        with self._transaction():
            self._decide_key_form()
            return [self._put_pending(fact) for fact in facts]

    def _put_pending(self, fact: Fact) -> int:
        row = self._one("SELECT * FROM facts WHERE norm_key = ?", [self.key_form(fact.key)])
        if row is not None and row["state"] == "committed":
            hint = f"To change its text: kvedit update {shlex.quote(row['key'])} FILE"
            raise DuplicateKeyError(f"{row['key']} is in the store already", hint=hint)
        self._refuse_taken(fact, None if row is None else row["id"])
        fact_id: int = self._insert_fact(fact) if row is None else row["id"]
        self._write_fact(fact_id, fact, "pending")
        return fact_id

    def _insert_fact(self, fact: Fact) -> int:
        stamp = now()
        row = {**fact_columns(fact, self.key_form), "state": "pending"}
        return self._insert("facts", {**row, "created_at": stamp, "updated_at": stamp})

    def _refuse_taken(self, fact: Fact, fact_id: int | None) -> None:
        """Refuse a key or alias of another pending or committed fact."""
        for name in (fact.key, *fact.aliases):
            row = self._named(name)
            if row and row["id"] != fact_id and row["state"] in ("pending", "committed"):
                raise DuplicateKeyError(
                    f"{name} already belongs to the fact {row['key']}",
                    hint="Choose another key or alias, or remove that fact first.",
                )

    def _named(self, name: str) -> Row | None:
        """The row with this key or alias: a committed fact before others, a key before an alias."""
        norm = self.key_form(name)
        sql = f"""{_FACTS} WHERE f.id IN (SELECT id FROM facts WHERE norm_key = ?
            UNION SELECT fact_id FROM aliases WHERE norm_alias = ?)
            ORDER BY f.state = 'committed' DESC, f.norm_key = ? DESC LIMIT 1"""
        return self._one(sql, [norm, norm, norm])

    def find(self, key: str) -> FactRow | None:
        """The fact with this key or alias, in any state, or None; keys are normalised."""
        row = self._named(key)
        return None if row is None else self._fact_rows([row])[0]

    def require(self, key: str) -> FactRow:
        """Like ``find``, and the subject of a single relation finds that one; raises
        UnknownKeyError, with the subject's relations or similar keys as a suggestion.
        """
        if row := self.find(key):
            return row
        relations = self._relations_of(key)
        if len(relations) == 1:
            return relations[0]
        if relations:
            what = f"{relations[0].fact.name} has {len(relations)} relations"
            keys = in_words([row.fact.key for row in relations])
            raise UnknownKeyError(what, hint=f"Name one of them: {keys}")
        known = [name for row in self.facts() for name in (row.fact.key, *row.fact.aliases)]
        close = did_you_mean(key, known)
        hint = f"Did you mean {' or '.join(close)}?" if close else "See `kvedit list`."
        raise UnknownKeyError(f"there is no fact {key!r} in {self.path}", hint=hint)

    def _relations_of(self, subject: str) -> list[FactRow]:
        """The relations of a subject that are pending or committed."""
        sql = f"""{_FACTS} WHERE f.norm_subject = ? AND f.state IN ('pending', 'committed')
            ORDER BY f.id"""
        return self._fact_rows(self.query(sql, [normalise(subject)]))

    def get(self, fact_id: int) -> FactRow:
        """The fact with this id; raises UnknownKeyError."""
        rows = self.query(f"{_FACTS} WHERE f.id = ?", [fact_id])
        if not rows:
            raise UnknownKeyError(
                f"there is no fact number {fact_id} in {self.path}", hint="Run `kvedit list`."
            )
        return self._fact_rows(rows)[0]

    def facts(self, state: str | None = None) -> list[FactRow]:
        """All facts, or those in one state, in the order they came."""
        where, values = ("", []) if state is None else ("WHERE f.state = ?", [state])
        rows = self.query(f"{_FACTS} {where} ORDER BY f.id", values)
        return self._fact_rows(rows)

    def keys(self, state: str = "committed") -> list[str]:
        """The keys of the facts in a state, in the order they came."""
        rows = self.query("SELECT key FROM facts WHERE state = ? ORDER BY id", [state])
        return [str(row["key"]) for row in rows]

    def names(self, state: str = "committed") -> list[str]:
        """What questions call the facts in a state: keys, and the subjects of relations."""
        sql = "SELECT coalesce(relation_of, key) AS name FROM facts WHERE state = ? ORDER BY id"
        return [str(row["name"]) for row in self.query(sql, [state])]

    def _fact_rows(self, rows: Iterable[Row]) -> list[FactRow]:
        head, stale_after = self.head(), self.config.retention.stale_after_revisions
        return [
            FactRow(
                fact=fact_from_columns(row), health=_health(row, head, stale_after),
                **{name: row[name] for name in _FACT_ROW_COLUMNS},
            )
            for row in rows
        ]  # fmt: skip

    def history(self, key: str | None = None) -> list[EditRow]:
        """All edits, or those of one fact, newest first; raises UnknownKeyError."""
        if key is None:
            return self._edits("")
        where = "WHERE id IN (SELECT edit_id FROM edit_facts WHERE fact_id = ?)"
        return self._edits(where, [self.require(key).id])

    def record_results(self, results: Sequence[ProbeRow], revision: int) -> None:
        """Store the probe results of a revision, and update the facts' health from them."""
        with self._transaction():
            self._add_results(results, edit_id=None, revision=revision)

    def protected(self, role: str) -> list[ProtectedRow]:
        """The protected texts of a role, ``control`` or ``locality``, in order."""
        rows = self.query("SELECT * FROM protected WHERE role = ? ORDER BY id", [role])
        return [ProtectedRow(**row) for row in rows]

    def set_protected(self, rows: Iterable[ProtectedRow]) -> None:
        """Replace all protected texts, of both roles; their ids are new."""
        with self._transaction():
            self._execute("DELETE FROM protected")
            self._insert_protected(rows)

    def add_protected(self, rows: Iterable[ProtectedRow]) -> None:
        """Add protected texts to the present ones."""
        with self._transaction():
            self._insert_protected(rows)

    def _insert_protected(self, rows: Iterable[ProtectedRow]) -> None:
        for row in rows:
            self._insert("protected", {name: getattr(row, name) for name in _PROTECTED_COLUMNS})

    def checkpoints(self) -> list[CheckpointRow]:
        """The checkpoints, oldest revision first; their reader has to verify each one.

        Raises CorruptStoreError if one has another name than kvedit gives.
        """
        rows = self.query("SELECT * FROM checkpoints ORDER BY revision")
        paths = [self.path / names.checkpoint(row["revision"], row["path"]) for row in rows]
        return [
            CheckpointRow(row["revision"], path, row["digest"])
            for row, path in zip(rows, paths, strict=True)
        ]

    def add_checkpoint(self, revision: int, path: Path, digest: str) -> None:
        """Record a checkpoint that is complete on the disk; ``digest`` is of its manifest."""
        relative = path.resolve().relative_to(self.path.resolve()).as_posix()
        row = {"revision": revision, "path": relative, "digest": digest}
        with self._transaction():
            self._insert("checkpoints", row, replace=True)

    def remove_checkpoint(self, revision: int) -> None:
        """Forget a checkpoint, then remove its folder."""
        paths = [row.path for row in self.checkpoints() if row.revision == revision]
        with self._transaction():
            self._execute("DELETE FROM checkpoints WHERE revision = ?", [revision])
        self._drop(paths)


_PROTECTED_COLUMNS = ("role", "prompt", "answer", "source")
_FACT_ROW_COLUMNS = (
    "id", "state", "created_at", "updated_at", "revision", "margin", "last_checked_revision",
    "last_checked_at",
)  # fmt: skip


def _health(row: Row, head: int, stale_after: int) -> str:
    checked = row["passed"] is not None and row["last_checked_revision"] is not None
    if not checked or row["state"] != "committed":
        return "unchecked"
    if not row["passed"]:
        return "regressed"
    return "stale" if head - row["last_checked_revision"] > stale_after else "recalled"
