"""Forgetting for good: a fact leaves the database and the files, and old deltas are dropped.

Invariants:
- The rows and texts of an erased fact go in the transaction that commits the edit, together with
  the checkpoints of every revision that knew it; those revisions stay in the journal, marked.
- What is left in files is removed after that commit, by ``scrub``; until it is done the database
  says so, and the next command that writes goes on with it.
- A delta is marked as dropped before its file is removed, and never while a revision that is to be
  kept needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.files import disk_errors, write_atomic
from kvedit.store.checks.values import from_json
from kvedit.store.forget.plans import ErasePlan, PrunePlan
from kvedit.store.forget.wording import ERASED, LONG_TEXT, Wording
from kvedit.store.key_forms import KeyForms
from kvedit.store.lineage import Lineage
from kvedit.store.rows import Row, fact_from_columns, fact_from_text, reasons_from, to_text

CANDIDATES = 16  # newest revisions among which one without the fact is sought
PROGRESS = "protected_progress"  # in ``meta``: how many protected texts were measured, and more
SEARCHED_BYTES = 64 * 1024 * 1024  # of a file that is looked into for what remains, at most
SCRUB = "scrub"  # in ``meta`` from the commit of an erasure until the files are clean
_WITH_FACTS = (
    "aliases", "edit_facts", "fact_versions", "probe_results", "fact_health", "prior_answers",
)  # fmt: skip


class Erasure(Lineage, KeyForms):
    """The part of a store that forgets."""

    def wording(self, fact_ids: Sequence[int]) -> Wording:
        """All versions of some facts."""
        ids = _listed(fact_ids)
        rows = self.query(f"SELECT * FROM facts WHERE id IN ({ids})")
        facts: list[Fact | None] = [fact_from_columns(row) for row in rows]
        for table, column in (
            ("fact_versions", "fact"), ("edit_facts", "before"), ("edit_facts", "after"),
        ):  # fmt: skip
            sql = f"SELECT {column} AS text FROM {table} WHERE fact_id IN ({ids})"
            facts += [fact_from_text(row["text"]) for row in self.query(sql)]
        every = [fact for fact in facts if fact is not None]
        subjects = {fact.relation_of for fact in every if fact.relation_of}
        named = "SELECT 1 FROM facts WHERE (norm_key = ? OR norm_subject = ?)"

        def is_shared(subject: str) -> bool:
            forms = [self.key_form(subject), normalise(subject)]
            return self._one(f"{named} AND id NOT IN ({ids}) LIMIT 1", forms) is not None

        own = {subject for subject in subjects if not is_shared(subject)}
        return Wording(every, own, self.key_form)

    def revisions_with(self, fact_ids: Sequence[int], wording: Wording) -> set[int]:
        """The revisions whose weights were trained on some facts.

        Also those of groups that a fact was part of and that did not learn it.
        """
        sql = f"SELECT DISTINCT revision FROM fact_versions WHERE fact_id IN ({_listed(fact_ids)})"
        direct = {row["revision"] for row in self.query(sql)}
        direct |= {r for r, keys in self.not_learned().items() if any(map(wording.has_key, keys))}
        knew: set[int] = set()
        for revision, before in self._steps():
            adds = revision.restores is None or revision.delta is not None
            if before in knew or (adds and revision.id in direct):
                knew.add(revision.id)
        return knew

    def erase_plan(self, fact_ids: Sequence[int]) -> ErasePlan:
        """What erasing these facts would do."""
        wording = self.wording(fact_ids)
        knew, gaps = self.revisions_with(fact_ids, wording), self.gaps()
        rows = self.revisions()
        kept = tuple(row.id for row in rows if row.id not in knew and row.id not in gaps)
        files = {row.delta for row in rows if row.id in knew and row.delta and not row.dropped}
        paths = [path for name in files if (path := self.delta_path(name)).is_file()]
        held = {i: fact for i, (s, fact) in self.facts_at(self.head()).items() if s == "committed"}
        others = {i: fact for i, fact in held.items() if i not in fact_ids}
        restores = self._newest_with(others, kept)
        return ErasePlan(
            keys=tuple(str(row["key"]) for row in self._keyed(fact_ids)),
            fact_ids=tuple(fact_ids), lost=tuple(sorted(knew - gaps.keys())), kept=kept,
            restores=restores, retrained=0 if restores is not None else len(others),
            delta_files=len(paths), delta_bytes=sum(path.stat().st_size for path in paths),
            shared_with=self._shared_with(fact_ids, wording),
            protected=len(self._protected_with(wording)),
        )  # fmt: skip

    def _keyed(self, fact_ids: Sequence[int]) -> list[Row]:
        return self.query(f"SELECT key FROM facts WHERE id IN ({_listed(fact_ids)}) ORDER BY id")

    def _newest_with(self, facts: dict[int, Fact], revisions: Sequence[int]) -> int | None:
        """The newest of some revisions at which the model held exactly these facts."""
        for number in dict.fromkeys([*revisions[: -CANDIDATES - 1 : -1], 0]):
            there = self.facts_at(number).items()
            if {i: fact for i, (state, fact) in there if state == "committed"} == facts:
                return number
        return None

    def _shared_with(self, fact_ids: Sequence[int], wording: Wording) -> tuple[str, ...]:
        """The keys of other facts that contain the text."""
        sql = f"SELECT * FROM facts WHERE id NOT IN ({_listed(fact_ids)}) ORDER BY id"
        facts = [fact_from_columns(row) for row in self.query(sql)]
        return tuple(fact.key for fact in facts if wording.tells(to_text(fact.to_json())))

    def _protected_with(self, wording: Wording) -> list[int]:
        rows = self.query("SELECT id, prompt, answer FROM protected")
        return [row["id"] for row in rows if wording.tells(f"{row['prompt']}\n{row['answer']}")]

    def release_protected(self, wording: Wording) -> int:
        """Remove the protected texts that contain the facts, before they are erased; how many.

        What was measured on all texts counts for none of them then.
        """
        ids = self._protected_with(wording)
        progress = self.meta(PROGRESS)
        if ids:
            with self._transaction():
                self._execute(f"DELETE FROM protected WHERE id IN ({_listed(ids)})")
                if progress is not None:
                    known = from_json(progress, dict, "the value protected_progress")
                    value = json.dumps({**known, "measured": 0})
                    self._insert("meta", {"name": PROGRESS, "value": value}, replace=True)
        return len(ids)

    def clean_rejected_files(self, wording: Wording) -> None:
        """Take the facts out of the lists of rejected facts that ``ingest`` wrote here.

        Before the commit: after it nobody knows what to look for.
        """
        for path in sorted(self.exports.glob("rejected-*.jsonl")):
            with disk_errors(path):
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if not _is_line_about(line, wording)]
                if len(kept) < len(lines):
                    write_atomic(path, "".join(kept).encode())

    def files_with(self, wording: Wording) -> list[Path]:
        """Files of the store, other than weights, that contain the facts' texts.

        Texts too short to be told from others are not looked for, nor files that are very large.
        """
        long = {text for text in wording.texts if len(text) >= LONG_TEXT}
        forms = {form.encode() for text in long for form in (text, json.dumps(text)[1:-1])}
        weights = (self.deltas, self.checkpoints_path, self.cache)
        files = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
        paths = [path for path in files if path.stat().st_size <= SEARCHED_BYTES]
        others = [path for path in paths if not set(weights) & set(path.parents)]
        return [path for path in others if any(form in path.read_bytes() for form in forms)]

    def _erase(self, fact_ids: Sequence[int]) -> None:
        """Inside the committing transaction: all that the database has of some facts goes."""
        wording, ids = self.wording(fact_ids), _listed(fact_ids)
        knew = self.revisions_with(fact_ids, wording)
        self._redact_edits(fact_ids, knew, wording)
        self._redact_probes(wording)
        self._execute(f"""
            DELETE FROM prior_answers WHERE fact_id IN (
                SELECT v.fact_id FROM fact_versions v JOIN revisions r ON r.id = v.revision
                WHERE r.parent IN ({_listed(knew)}))""")
        for table in _WITH_FACTS:
            self._execute(f"DELETE FROM {table} WHERE fact_id IN ({ids})")
        self._execute(f"DELETE FROM facts WHERE id IN ({ids})")
        self._execute(f"UPDATE revisions SET dropped = 'erased' WHERE id IN ({_listed(knew)})")
        self._execute(f"DELETE FROM checkpoints WHERE revision IN ({_listed(knew)})")
        self._insert("meta", {"name": SCRUB, "value": "1"}, replace=True)

    def _redact_edits(self, fact_ids: Sequence[int], knew: set[int], wording: Wording) -> None:
        """Reports and reasons keep their figures; what the model said while it knew goes too."""
        sql = f"SELECT DISTINCT edit_id FROM edit_facts WHERE fact_id IN ({_listed(fact_ids)})"
        own = {row["edit_id"] for row in self.query(sql)}
        for row in self.query("SELECT id, state, parent, reasons, report FROM edits"):
            what = f"of edit {row['id']}"
            said: object = from_json(row["report"], dict, f"the report {what}")
            before = list(reasons_from(row["reasons"], what)), said
            reasons, report = map(wording.without, before)
            if isinstance(report, dict) and (row["id"] in own or row["parent"] in knew):
                report |= {name: None for name in ("text_before", "text_after") if name in report}
            if row["id"] in own and row["state"] == "failed":  # an error may quote any part of it
                reasons = [ERASED] if reasons else []
            if (reasons, report) != before:
                texts = {"reasons": to_text(reasons), "report": to_text(report)}
                self._update("edits", row["id"], texts)

    def _redact_probes(self, wording: Wording) -> None:
        """Probes of no fact that are about these go; in those of others an answer may tell them."""
        sql = "SELECT id, fact_id, prompt, expected, answer FROM probe_results"
        for row in self.query(sql):
            asked = f"{row['prompt']}\n{row['expected'] or ''}"
            about = wording.is_about(row["prompt"]) or wording.is_about(asked)
            if row["fact_id"] is None and about:
                self._execute("DELETE FROM probe_results WHERE id = ?", [row["id"]])
            elif wording.tells(row["answer"]):
                self._update("probe_results", row["id"], {"answer": None})

    @property
    def needs_scrub(self) -> bool:
        """Whether files may still hold what was erased from the database."""
        return bool(self.meta(SCRUB))

    def prune_plan(self, before: int) -> PrunePlan:
        """What dropping the deltas that no revision from ``before`` on needs would do.

        Raises UsageError if there is no such revision.
        """
        self.revision(before)
        rows, gaps = self.revisions(), self.gaps()
        there = [row.id for row in rows if row.id not in gaps]
        line = self.lineage(next(number for number in there if number >= before))
        stand = line[-1].id if len(line) > 1 else None
        stands = self.pinned() | ({stand} if stand else set())
        needed: set[int] = set()
        used: set[int] = set()
        for number in (one for one in there if one >= before):
            ids = [row.id for row in self.lineage(number)]
            start = max((place for place, one in enumerate(ids) if one in stands), default=-1)
            needed |= {*ids[start + 1 :]}
            used |= {*ids[start : start + 1]} if start >= 0 else set()
        drops = [row for row in rows if row.delta and not row.dropped and row.id not in needed]
        pruned = {row.id for row in drops}
        if not pruned & {row.id for row in line}:
            stand = None
        saved = {one for one in self._saved() if one >= before} | used
        then = self._gaps(saved, pruned)
        paths = [self.delta_path(row.delta or "") for row in drops]
        return PrunePlan(
            before=before, stands_on=stand, dropped=tuple(sorted(pruned)),
            lost=tuple(number for number in there if number in then),
            kept=tuple(number for number in there if number not in then),
            checkpoints=tuple(sorted(self._saved() - saved)),
            delta_bytes=sum(path.stat().st_size for path in paths if path.is_file()),
        )  # fmt: skip

    def mark_pruned(self, revisions: Iterable[int]) -> None:
        """Note that the deltas of some revisions are no longer kept; their files are then stray."""
        with self._transaction():
            sql = f"UPDATE revisions SET dropped = 'pruned' WHERE id IN ({_listed(revisions)})"
            self._execute(f"{sql} AND dropped IS NULL AND delta IS NOT NULL")


def _is_line_about(line: str, wording: Wording) -> bool:
    """Whether a line of a list of rejected facts is one of the facts."""
    try:
        record = json.loads(line)
    except ValueError:
        return wording.tells(line)
    return isinstance(record, dict) and (
        wording.has_key(record.get("key")) or wording.tells(to_text(record))
    )


def _listed(numbers: Iterable[int]) -> str:
    """Ids for an SQL list."""
    return ", ".join(str(int(number)) for number in numbers)
