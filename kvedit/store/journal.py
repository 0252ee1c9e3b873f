"""Edits and revisions: every change is planned, then committed in one transaction, or ended.

Invariants:
- ``commit_edit`` is the only commit point: results, facts, revision and head change together or
  not at all, and only if the head is still the one the edit started from.
- A revision is only recorded when its delta's file is on the disk with the right digest.
- Revisions are never changed nor deleted; a rollback appends one that names what it restores.
- An edit that is neither committed nor ended was interrupted: ``recover`` ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvedit.errors import CorruptStoreError, LockedError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.files import (
    OLD_TRAINING_CHECKPOINTS,
    TEMPORARY,
    disk_errors,
    now,
    remove,
    sha256_file,
)
from kvedit.store.database import DELTA_SUFFIX, StoreBase
from kvedit.store.rows import (
    EditRow,
    FactChange,
    InterruptedEdit,
    ProbeRow,
    RevisionRow,
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


class Journal(StoreBase):
    """The part of a store that records edits and revisions."""

    def plan_edit(
        self, kind: str, changes: Sequence[FactChange], config: Mapping[str, object]
    ) -> int:
        """Journal an edit that starts from the head; returns its id."""
        with self._transaction():
            edit_id = self._insert(
                "edits",
                {
                    "kind": kind,
                    "state": "planned",
                    "parent": self.head(),
                    "config": to_text(config),
                    "started_at": now(),
                },
            )
            self._record_changes(edit_id, changes)
        return edit_id

    def mark_trained(self, edit_id: int, delta: str) -> None:
        """Note that the edit's delta is safely on the disk."""
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
        prior_answers: Mapping[int, Mapping[str, str]],
        report: Mapping[str, object],
        restores: int | None = None,
    ) -> int:
        """Commit an edit in one transaction and return the new revision.

        Raises LockedError, and changes nothing, if the head has moved or the edit was already
        ended; CorruptStoreError if the delta's file is missing or damaged.
        """
        self._require_delta(delta)
        with self._transaction():
            revision = self._move_head(expected_head)
            edit = self._require_open(edit_id)
            row = {"delta": delta, "restores": restores, "weights_digest": weights_digest}
            self._append_revision(revision, expected_head, edit, row)
            done = {"state": "committed", "revision": revision, "finished_at": now()}
            self._update("edits", edit_id, {**done, "delta": delta, "report": to_text(report)})
            self._execute("DELETE FROM edit_facts WHERE edit_id = ?", [edit_id])
            self._record_changes(edit_id, changes)  # of a group, those that were learned
            self._apply_changes(changes, revision)
            if restores is not None and delta is None:
                self._restore_health(restores)
            self._add_results(results, edit_id=edit_id, revision=revision)
            for fact_id, answers in prior_answers.items():
                self._set_prior_answers(fact_id, answers)
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
        """
        if outcome not in ENDINGS:
            raise ValueError(f"an edit cannot end as {outcome!r}")
        with self._transaction():
            own = self._require_open(edit_id)["delta"]
            self._end(edit_id, outcome, reasons, to_text(report))
            self._add_results(results, edit_id=edit_id, revision=None)
        if own is not None:  # another open edit's delta may not be marked yet: only our own goes
            self._drop([path for path in self.stray_files() if path.stem == own])

    def recover(self) -> list[InterruptedEdit]:
        """End what a killed process left behind and remove its files; returns the edits ended.

        Raises LockedError if another process is at work.
        """
        with self.lock():
            with self._transaction():
                rows = self._rows(f"SELECT id FROM edits WHERE state IN {OPEN_STATES} ORDER BY id")
                left = [self.edit(row["id"]) for row in rows]
                for edit in left:
                    self._end(edit.id, "failed", ["interrupted"], "{}")
            self._drop(self.stray_files())
        return [InterruptedEdit(edit.id, edit.kind, edit.keys) for edit in left]

    def edit(self, edit_id: int) -> EditRow:
        """One edit; raises UsageError if there is none with this id."""
        edits = self._edits("WHERE id = ?", [edit_id])
        if not edits:
            raise UsageError(f"there is no edit {edit_id}", hint="See `kvedit history`.")
        return edits[0]

    def changes(self, edit_id: int) -> list[FactChange]:
        """What an edit does, or did, to facts."""
        rows = self._rows("SELECT * FROM edit_facts WHERE edit_id = ? ORDER BY fact_id", [edit_id])
        return [
            FactChange(r["fact_id"], fact_from_text(r["before"]), fact_from_text(r["after"]))
            for r in rows
        ]

    def revisions(self) -> list[RevisionRow]:
        """All revisions, oldest first; the first is the base."""
        return [RevisionRow(**row) for row in self._rows("SELECT * FROM revisions ORDER BY id")]

    def revision(self, number: int) -> RevisionRow:
        """One revision; raises UsageError if there is none with this number."""
        row = self._one("SELECT * FROM revisions WHERE id = ?", [number])
        if row is None:
            raise UsageError(
                f"there is no revision {number}; the head is {self.head()}",
                hint="See `kvedit history` for the revisions there are.",
            )
        return RevisionRow(**row)

    def lineage(self, number: int) -> list[RevisionRow]:
        """The revisions whose deltas, in this order, make the weights of a revision.

        The base is not among them; a rollback stands for the lineage of what it restores, and one
        that has a delta besides goes on from there.
        """
        known = {row.id: row for row in self.revisions()}
        self.revision(number)  # a clear error for a number that does not exist
        path: list[RevisionRow] = []
        while number:
            row = known.get(number)
            if row is None:
                raise CorruptStoreError(
                    f"revision {number} is missing", hint="Restore the store from a backup."
                )
            if row.restores is None or row.delta is not None:
                path.append(row)
            # Both are smaller than the row's own number (checked by the schema): this ends.
            number = row.restores if row.restores is not None else row.parent or 0
        return path[::-1]

    def facts_at(self, number: int) -> dict[int, tuple[str, Fact]]:
        """State and text of every fact that a commit had touched by a revision."""
        wanted = {row.id for row in self.lineage(number)}
        rows = self._rows("SELECT * FROM fact_versions ORDER BY revision, id")
        return {
            row["fact_id"]: (row["state"], fact)
            for row in rows
            if row["revision"] in wanted and (fact := fact_from_text(row["fact"])) is not None
        }

    def before_fact(self, fact_id: int) -> int:
        """The revision that the head's line had before a fact came in; the base's if it never did.

        The line itself: after a rollback, what it restored.
        """
        line = [row.id for row in self.lineage(self.head())]
        rows = self._rows("SELECT revision, state FROM fact_versions WHERE fact_id = ?", [fact_id])
        states = {row["revision"]: row["state"] for row in rows}
        before, held = 0, False
        for at, revision in enumerate(line):
            now_held = states.get(revision, "committed" if held else "removed") == "committed"
            if now_held and not held:
                before = line[at - 1] if at else 0
            held = now_held
        return before

    def added_since_compaction(self) -> int:
        """How many facts the head's line touched after its first revision, which alone began with
        the base model.
        """
        later = {row.id for row in self.lineage(self.head())[1:]}
        rows = self._rows("SELECT DISTINCT revision, fact_id FROM fact_versions")
        return len({row["fact_id"] for row in rows if row["revision"] in later})

    def rollback_changes(self, number: int) -> list[FactChange]:
        """What going back from the head to a revision does to the facts."""
        before = _held(self.facts_at(self.head()))
        after = _held(self.facts_at(number))
        touched = sorted({*before, *after})
        return [
            FactChange(fact_id, before.get(fact_id), after.get(fact_id))
            for fact_id in touched
            if before.get(fact_id) != after.get(fact_id)
        ]

    def stray_files(self) -> list[Path]:
        """Deltas and checkpoints that nothing in the database needs, and temporary files."""
        needed = {
            str(row["delta"])
            for row in self._rows(
                "SELECT delta FROM revisions WHERE delta IS NOT NULL UNION"
                f" SELECT delta FROM edits WHERE delta IS NOT NULL AND state IN {OPEN_STATES}"
            )
        }
        kept = {int(row["revision"]) for row in self._rows("SELECT revision FROM checkpoints")}
        stray = [path for path in _entries(self.deltas, _DELTA_NAME) if path.stem not in needed]
        folders = _entries(self.checkpoints_path, _CHECKPOINT_NAME)
        stray += [path for path in folders if int(path.name) not in kept]
        for folder in (self.path, self.deltas, self.checkpoints_path, self.exports):
            stray += _entries(folder, _TEMPORARY_NAME)
        return [*stray, *self.cache.glob(OLD_TRAINING_CHECKPOINTS)]

    def _edits(self, where: str, values: Sequence[object] = ()) -> list[EditRow]:
        """Edits with the keys of their facts, newest first."""
        rows = self._rows(f"SELECT * FROM edits {where} ORDER BY id DESC", values)
        return [edit_from(row, self._edit_keys(row["id"])) for row in rows]

    def _edit_keys(self, edit_id: int) -> tuple[str, ...]:
        sql = (
            "SELECT f.key FROM edit_facts e JOIN facts f ON f.id = e.fact_id"
            " WHERE e.edit_id = ? ORDER BY f.id"
        )
        return tuple(str(row["key"]) for row in self._rows(sql, [edit_id]))

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
        if digest is None:
            return
        path = self.delta_path(digest)
        if not path.is_file() or sha256_file(path) != digest:
            raise CorruptStoreError(
                f"the delta {path} is missing or was altered", hint="Run the command again."
            )

    def _move_head(self, expected: int) -> int:
        """Compare and swap the head; the first statement, so it also takes the write lock."""
        sql = "UPDATE meta SET value = (SELECT max(id) + 1 FROM revisions)"
        sql += " WHERE name = 'head' AND value = ?"
        if self._execute(sql, [str(expected)]).rowcount != 1:
            raise LockedError(
                f"the store changed meanwhile: its head is {self.head()}, not {expected}",
                hint="Run the command again.",
            )
        return self.head()

    def _append_revision(self, number: int, parent: int, edit: Row, row: Row) -> None:
        own = {"id": number, "parent": parent, "edit_id": edit["id"], "kind": edit["kind"]}
        self._insert("revisions", {**own, **row, "created_at": now()})

    def _record_changes(self, edit_id: int, changes: Sequence[FactChange]) -> None:
        for change in changes:
            texts = {"before": fact_text(change.before), "after": fact_text(change.after)}
            row = {"edit_id": edit_id, "fact_id": change.fact_id, **texts}
            self._insert("edit_facts", row, replace=True)

    def _apply_changes(self, changes: Sequence[FactChange], revision: int) -> None:
        # Facts that go first: their aliases become free for those that come.
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
        """Set a fact's row and the aliases it is found by."""
        columns = {**fact_columns(fact), "norm_key": normalise(fact.key), "state": state}
        self._update("facts", fact_id, {**columns, "updated_at": now()})
        self._execute("DELETE FROM aliases WHERE fact_id = ?", [fact_id])
        if state in ("pending", "committed"):
            for alias in {normalise(name) for name in fact.aliases} - {normalise(fact.key)}:
                row = {"norm_alias": alias, "fact_id": fact_id}
                self._insert("aliases", row, replace=True)

    def _add_results(
        self, results: Sequence[ProbeRow], *, edit_id: int | None, revision: int | None
    ) -> None:
        """Keep probe results; recall and retention at a revision are a fact's health."""
        stamp = now()
        for result in results:
            row = {name: getattr(result, name) for name in _RESULT_COLUMNS}
            where = {"edit_id": edit_id, "revision": revision, "created_at": stamp}
            self._insert("probe_results", {**row, **where})
        if results and revision is not None:
            self._refresh_health("revision = ? AND created_at = ?", [revision, stamp])

    def _restore_health(self, restored: int) -> None:
        """After a rollback a fact is as healthy as when last checked on the restored line."""
        weights = {row.weights_digest for row in self.lineage(restored)}
        line = [str(row.id) for row in self.revisions() if row.weights_digest in weights]
        self._execute("DELETE FROM fact_health")
        self._refresh_health(f"revision IN ({', '.join(line)})", [])

    def _refresh_health(self, where: str, values: Sequence[object]) -> None:
        """Take the newest batch of checks of each committed fact, among those selected."""
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

    def _set_prior_answers(self, fact_id: int, answers: Mapping[str, str]) -> None:
        self._execute("DELETE FROM prior_answers WHERE fact_id = ?", [fact_id])
        for prompt, answer in answers.items():
            row = {"fact_id": fact_id, "prompt": prompt, "answer": answer}
            self._insert("prior_answers", row)

    def _end(self, edit_id: int, outcome: str, reasons: Sequence[str], report: str) -> None:
        done = {"state": outcome, "reasons": to_text(list(reasons)), "finished_at": now()}
        self._update("edits", edit_id, {**done, "report": report})
        state = "rejected" if outcome == "rejected" else "pending"
        self._execute(
            "UPDATE facts SET state = ?, updated_at = ? WHERE state IN ('pending', 'rejected')"
            " AND id IN (SELECT fact_id FROM edit_facts JOIN edits ON edits.id = edit_id"
            " WHERE edit_id = ? AND kind = 'add')",
            [state, now(), edit_id],
        )

    def _drop(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with disk_errors(path):
                remove(path)


_RESULT_COLUMNS = (
    "fact_id", "kind", "protocol", "prompt", "expected", "answer", "passed", "margin"
)  # fmt: skip


def _held(facts: Mapping[int, tuple[str, Fact]]) -> dict[int, Fact]:
    """The facts that the model holds."""
    return {fact_id: fact for fact_id, (state, fact) in facts.items() if state == "committed"}


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The files and folders whose whole name matches."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
