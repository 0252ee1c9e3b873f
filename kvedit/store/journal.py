"""The journal of edits: each is planned, then committed in one transaction, or ended.

Invariants:
- ``commit_edit`` is the only commit point: results, facts, revision and head change together or
  not at all, and only if the head is still the one the edit started from.
- A revision is only recorded when its delta's file is on the disk with the right digest.
- Revisions are never changed or deleted; a rollback appends one that names what it restores.
  Only that a delta was dropped is noted in them (see ``forget``).
- An edit that is neither committed nor ended was interrupted: ``recover`` ends it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvedit.errors import CorruptStoreError, LockedError, UsageError
from kvedit.facts.fact import Fact
from kvedit.files import OLD_TRAINING_CHECKPOINTS, TEMPORARY, disk_errors, now, remove, sha256_file
from kvedit.store.database import DELTA_SUFFIX
from kvedit.store.forget.erasure import Erasure
from kvedit.store.rows import (
    EditRow,
    FactChange,
    InterruptedEdit,
    ProbeRow,
    Row,
    edit_from,
    fact_columns,
    fact_from_text,
    fact_text,
    to_text,
)

OPEN_STATES = ("planned", "trained")
ENDINGS = ("rejected", "failed", "canceled")
_DELTA_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(DELTA_SUFFIX)}")
_CHECKPOINT_NAME = re.compile(r"\d{8,}")
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}.*")
_HEALTH_KINDS = "('recall', 'retention')"


class Journal(Erasure):
    """The part of a store that records edits and appends revisions."""

    def plan_edit(
        self, kind: str, changes: Sequence[FactChange], config: Mapping[str, object]
    ) -> int:
        """Journal an edit that starts from the head; returns its id."""
        with self._transaction():
            row = {"kind": kind, "state": "planned", "parent": self.head(), "started_at": now()}
            edit_id = self._insert("edits", {**row, "config": to_text(config)})
            self._record_changes(edit_id, changes)
        return edit_id

    def mark_trained(self, edit_id: int, delta: str) -> None:
        """Record that the edit's delta is durable on the disk; raises LockedError if it ended."""
        with self._transaction():
            self._require_open(edit_id)
            self._update("edits", edit_id, {"state": "trained", "delta": delta})

    def commit_edit(
        self,
        edit_id: int,
        *,
        expected_head: int,
        delta: str | None,
        weights_digest: str,
        changes: Sequence[FactChange],
        results: Sequence[ProbeRow],
        report: Mapping[str, object],
        restores: int | None = None,
        erases: Sequence[int] = (),
    ) -> int:
        """Commit an edit in one transaction and return the new revision.

        ``delta`` is the digest of its file; ``erases`` are facts whose rows and texts go with it.
        Raises LockedError if the head has moved or the edit
        has ended, CorruptStoreError if the delta's file is missing or damaged; nothing is changed.
        """
        self._require_delta(delta)
        with self._transaction():
            revision = self._move_head(expected_head)
            edit = self._require_open(edit_id)
            row: Row = {"id": revision, "parent": expected_head, "edit_id": edit_id}
            row |= {"kind": edit["kind"], "restores": restores, "delta": delta}
            row |= {"weights_digest": weights_digest, "created_at": now()}
            self._insert("revisions", row)
            ending = {"state": "committed", "revision": revision, "finished_at": now()}
            self._update("edits", edit_id, {**ending, "delta": delta, "report": to_text(report)})
            self._execute("DELETE FROM edit_facts WHERE edit_id = ?", [edit_id])
            self._record_changes(edit_id, changes)  # of a group only the facts that were learned
            self._apply_changes(changes, revision)
            if restores is not None and delta is None:
                self._restore_health(restores)
            self._add_results(results, edit_id=edit_id, revision=revision)
            if erases:
                self._erase(erases)
        return revision

    def finish_edit(
        self,
        edit_id: int,
        outcome: str,
        reasons: Sequence[str],
        report: Mapping[str, object],
        results: Sequence[ProbeRow] = (),
    ) -> None:
        """End an edit that is not committed: ``rejected``, ``failed`` or ``canceled``.

        A rejected new fact becomes ``rejected``, one whose edit failed stays ``pending``; facts
        that were committed before stay as they were.  Results are kept without a revision.
        Raises LockedError if the edit has ended, ValueError for another outcome.
        """
        if outcome not in ENDINGS:
            raise ValueError(f"an edit cannot end as {outcome!r}")
        with self._transaction():
            delta = self._require_open(edit_id)["delta"]
            self._end(edit_id, outcome, reasons, to_text(report))
            self._add_results(results, edit_id=edit_id, revision=None)
        if delta is not None:  # only this one: an open edit may have written one unmarked yet
            self._drop([path for path in self.stray_files() if path.stem == delta])

    def recover(self) -> list[InterruptedEdit]:
        """End the edits that a killed process left open, remove its files; returns these edits.

        Raises LockedError while another process holds the store's lock.
        """
        with self.lock():
            with self._transaction():
                rows = self.query(f"SELECT id FROM edits WHERE state IN {OPEN_STATES} ORDER BY id")
                interrupted = [self.edit(row["id"]) for row in rows]
                for edit in interrupted:
                    self._end(edit.id, "failed", ["interrupted"], "{}")
            self._drop(self.stray_files())
        return [InterruptedEdit(edit.id, edit.kind, edit.keys) for edit in interrupted]

    def edit(self, edit_id: int) -> EditRow:
        """One edit; raises UsageError if there is none with this id."""
        for edit in self._edits("WHERE id = ?", [edit_id]):
            return edit
        raise UsageError(f"there is no edit {edit_id}", hint="See `kvedit history`.")

    def changes(self, edit_id: int) -> list[FactChange]:
        """What an edit changes in the facts; of a committed one, what it changed."""
        rows = self.query("SELECT * FROM edit_facts WHERE edit_id = ? ORDER BY fact_id", [edit_id])
        texts = [(row["fact_id"], row["before"], row["after"]) for row in rows]
        return [FactChange(id_, fact_from_text(b), fact_from_text(a)) for id_, b, a in texts]

    def stray_files(self) -> list[Path]:
        """Files that nothing in the database needs: deltas, checkpoints, temporary files, and
        training checkpoints of older versions.
        """
        sql = f"""SELECT delta FROM revisions WHERE dropped IS NULL
            UNION SELECT delta FROM edits WHERE state IN {OPEN_STATES}"""
        deltas = {row["delta"] for row in self.query(sql)}
        checkpoints = {row["revision"] for row in self.query("SELECT revision FROM checkpoints")}
        stray = [path for path in _entries(self.deltas, _DELTA_NAME) if path.stem not in deltas]
        folders = _entries(self.checkpoints_path, _CHECKPOINT_NAME)
        stray += [path for path in folders if int(path.name) not in checkpoints]
        for folder in (self.path, self.deltas, self.checkpoints_path, self.exports):
            stray += _entries(folder, _TEMPORARY_NAME)
        return [*stray, *self.cache.glob(OLD_TRAINING_CHECKPOINTS)]

    def _edits(self, where: str, values: Sequence[object] = ()) -> list[EditRow]:
        """Edits with the keys of their facts, newest first."""
        rows = self.query(f"SELECT * FROM edits {where} ORDER BY id DESC", values)
        gaps = self.gaps() if rows else {}
        return [
            edit_from(row, self._edit_keys(row["id"]), gaps.get(row["revision"], ""))
            for row in rows
        ]

    def _edit_keys(self, edit_id: int) -> tuple[str, ...]:
        sql = """SELECT f.key FROM edit_facts e JOIN facts f ON f.id = e.fact_id
            WHERE e.edit_id = ? ORDER BY f.id"""
        return tuple(str(row["key"]) for row in self.query(sql, [edit_id]))

    def _require_open(self, edit_id: int) -> Row:
        row = self._one("SELECT * FROM edits WHERE id = ?", [edit_id])
        if row is None or row["state"] not in OPEN_STATES:
            state = "unknown" if row is None else row["state"]
            raise LockedError(
                f"edit {edit_id} is {state}: it was ended by another process",
                hint="Run the command again.",
            )
        return row

    def _require_delta(self, digest: str | None) -> None:
        path = None if digest is None else self.delta_path(digest)
        if path and not (path.is_file() and sha256_file(path) == digest):
            message = f"the delta {path} is missing or was altered"
            raise CorruptStoreError(message, hint="Run the command again.")

    def _move_head(self, expected: int) -> int:
        """Compare and swap the head; the first statement, so it also takes the write lock."""
        sql = """UPDATE meta SET value = (SELECT max(id) + 1 FROM revisions)
            WHERE name = 'head' AND value = ?"""
        if self._execute(sql, [str(expected)]).rowcount != 1:
            raise LockedError(
                f"the store changed meanwhile: its head is {self.head()}, not {expected}",
                hint="Run the command again.",
            )
        return self.head()

    def _record_changes(self, edit_id: int, changes: Sequence[FactChange]) -> None:
        for change in changes:
            texts = {"before": fact_text(change.before), "after": fact_text(change.after)}
            row = {"edit_id": edit_id, "fact_id": change.fact_id, **texts}
            self._insert("edit_facts", row, replace=True)

    def _apply_changes(self, changes: Sequence[FactChange], revision: int) -> None:
        # Removed facts first: their aliases become free for the added ones.
        for change in sorted(changes, key=lambda change: change.after is not None):
            state = "removed" if change.after is None else "committed"
            fact = change.after or change.before
            if fact is None:
                raise ValueError(f"the change of fact {change.fact_id} is from nothing to nothing")
            version = {"fact_id": change.fact_id, "revision": revision, "state": state}
            self._insert("fact_versions", {**version, "fact": fact_text(fact)})
            self._write_fact(change.fact_id, fact, state)
            self._execute("DELETE FROM fact_health WHERE fact_id = ?", [change.fact_id])

    def _write_fact(self, fact_id: int, fact: Fact, state: str) -> None:
        """Set a fact's row and its aliases."""
        form = self.key_form
        columns = {**fact_columns(fact, form), "state": state}
        self._update("facts", fact_id, {**columns, "updated_at": now()})
        self._execute("DELETE FROM aliases WHERE fact_id = ?", [fact_id])
        if state in ("pending", "committed"):
            for alias in {form(name) for name in fact.aliases} - {form(fact.key)}:
                row = {"norm_alias": alias, "fact_id": fact_id}
                self._insert("aliases", row, replace=True)

    def _add_results(
        self, results: Sequence[ProbeRow], *, edit_id: int | None, revision: int | None
    ) -> None:
        """Keep probe results; recall and retention at a revision are a fact's health."""
        stamp = now()
        for result in results:
            row = {name: getattr(result, name) for name in _RESULT_COLUMNS}
            origin = {"edit_id": edit_id, "revision": revision, "created_at": stamp}
            self._insert("probe_results", {**row, **origin})
        if results and revision is not None:
            self._refresh_health("revision = ? AND created_at = ?", [revision, stamp])

    def _restore_health(self, restored: int) -> None:
        """After a rollback: each fact's health is its last check on the restored weights."""
        weights = {row.weights_digest for row in self.lineage(restored)}
        line = [str(row.id) for row in self.revisions() if row.weights_digest in weights]
        self._execute("DELETE FROM fact_health")
        self._refresh_health(f"revision IN ({', '.join(line)})", [])

    def _refresh_health(self, where: str, values: Sequence[object]) -> None:
        """Set each committed fact's health from its newest batch of checks among the selected."""
        sql = f"""
            INSERT OR REPLACE INTO fact_health
            SELECT r.fact_id, r.revision, r.created_at, min(r.passed), min(r.margin)
            FROM probe_results r
            JOIN probe_results n ON r.fact_id = n.fact_id
                AND r.revision = n.revision AND r.created_at = n.created_at
            JOIN facts f ON f.id = r.fact_id AND f.state = 'committed'
            WHERE r.kind IN {_HEALTH_KINDS} AND n.id IN (
                SELECT max(id) FROM probe_results
                WHERE kind IN {_HEALTH_KINDS} AND fact_id IS NOT NULL AND {where}
                GROUP BY fact_id)
            GROUP BY r.fact_id"""
        self._execute(sql, values)

    def _end(self, edit_id: int, outcome: str, reasons: Sequence[str], report: str) -> None:
        ending = {"state": outcome, "reasons": to_text(list(reasons)), "finished_at": now()}
        self._update("edits", edit_id, {**ending, "report": report})
        state = "rejected" if outcome == "rejected" else "pending"
        sql = """
            UPDATE facts SET state = ?, updated_at = ? WHERE state IN ('pending', 'rejected')
            AND id IN (SELECT fact_id FROM edit_facts JOIN edits ON edits.id = edit_id
                WHERE edit_id = ? AND kind = 'add')"""
        self._execute(sql, [state, now(), edit_id])

    def _drop(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with disk_errors(path):
                remove(path)


_RESULT_COLUMNS = (
    "fact_id", "kind", "protocol", "prompt", "expected", "answer", "passed", "margin"
)  # fmt: skip


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The files and folders in a folder whose name matches from end to end."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
