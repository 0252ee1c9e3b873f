"""Revisions: how each follows from earlier ones, and what facts the model holds at each.

Invariants:
- Nothing here writes: revisions are appended by ``journal`` alone.
- A line of revisions ends at the base, revision 0: parents and restored revisions have smaller
  numbers than their own.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.keys import normalise
from kvedit.store.checks.values import from_json
from kvedit.store.database import StoreBase
from kvedit.store.rows import FactChange, RevisionRow, fact_from_text

_KEY_OF = "SELECT key FROM facts WHERE id = ?"
_REPORT = "the report of an edit"


class Lineage(StoreBase):
    """The part of a store that reads revisions."""

    def revisions(self) -> list[RevisionRow]:
        """All revisions, oldest first; the first is the base.  Raises CorruptStoreError if one says
        that its delta was dropped for no reason that there is.
        """
        rows = [RevisionRow(**row) for row in self.query("SELECT * FROM revisions ORDER BY id")]
        for row in rows:
            if row.dropped is not None and row.dropped not in WHY_GONE:
                what = f"the delta of revision {row.id} was dropped: {row.dropped!r:.80}"
                raise CorruptStoreError(what, hint="Restore the store from a backup.")
        return rows

    def revision(self, number: int) -> RevisionRow:
        """One revision; raises UsageError if there is none with this number."""
        row = None
        if number <= self.head():  # SQLite refuses to compare with a number of 20 digits
            row = self._one("SELECT * FROM revisions WHERE id = ?", [number])
        if row is None:
            raise UsageError(
                f"there is no revision {number}; the head is {self.head()}",
                hint="See `kvedit history` for the revisions there are.",
            )
        return RevisionRow(**row)

    def lineage(self, number: int) -> list[RevisionRow]:
        """The revisions whose deltas, merged in this order, make the weights of a revision.

        The base is not among them.  A rollback stands for the lineage of the revision it restores;
        a compaction has a delta as well and continues from what it restores.  Raises UsageError for
        a number that does not exist, CorruptStoreError if a revision on the way is missing.
        """
        known = {row.id: row for row in self.revisions()}
        self.revision(number)  # a clear error for a number that does not exist
        line: list[RevisionRow] = []
        while number:
            if (row := known.get(number)) is None:
                hint = "Restore the store from a backup."
                raise CorruptStoreError(f"revision {number} is missing", hint=hint)
            if row.restores is None or row.delta is not None:
                line.append(row)
            earlier = row.restores if row.restores is not None else row.parent or 0
            if earlier >= number:  # a database that was tampered with: this would not end
                what = f"revision {number} comes from revision {earlier}, which is not older"
                raise CorruptStoreError(what, hint="Restore the store from a backup.")
            number = earlier
        return line[::-1]

    def gaps(self, without: int | None = None) -> dict[int, str]:
        """The revisions whose weights can no longer be made, and why: ``erased`` or ``pruned``.

        With ``without`` they are those that would be if that revision had no checkpoint.
        """
        return self._gaps(self._saved() - {without})

    def _saved(self) -> set[int]:
        """The revisions that have a checkpoint."""
        return {row["revision"] for row in self.query("SELECT revision FROM checkpoints")}

    def _gaps(self, saved: Container[int], pruned: Container[int] = ()) -> dict[int, str]:
        """The same with these checkpoints, and without the deltas of ``pruned`` revisions too."""
        gaps: dict[int, str] = {}
        for row, before in self._steps():
            adds = row.restores is None or row.delta is not None
            dropped = row.dropped or ("pruned" if row.id in pruned else "")
            why = gaps.get(before, "") or (dropped if adds else "")
            if dropped == "erased":
                why = dropped
            if why and not (adds and row.id in saved):
                gaps[row.id] = why
        return gaps

    def _steps(self) -> Iterator[tuple[RevisionRow, int]]:
        """Every revision but the base, and the one whose weights it starts from."""
        for row in self.revisions():
            if row.id:
                yield row, row.restores if row.restores is not None else row.parent or 0

    def pinned(self) -> set[int]:
        """The revisions whose checkpoint cannot be replaced by deltas."""
        return {number for number in self._saved() if number in self.gaps(number)}

    def require_kept(self, number: int) -> RevisionRow:
        """A revision whose weights can be made; raises UsageError and says why they cannot."""
        row, gaps = self.revision(number), self.gaps()
        if number not in gaps:
            return row
        kept = [row.id for row in self.revisions() if row.id not in gaps]
        raise UsageError(
            f"revision {number} can no longer be restored or asked: {WHY_GONE[gaps[number]]}",
            hint=f"Still there: {in_ranges(kept)}. See `kvedit history`.",
        )

    def facts_at(self, number: int) -> dict[int, tuple[str, Fact]]:
        """State and text, by its id, of every fact that a commit changed up to a revision."""
        line = {row.id for row in self.lineage(number)}
        rows = self.query("SELECT * FROM fact_versions ORDER BY revision, id")
        return {
            row["fact_id"]: (row["state"], fact)
            for row in rows
            if row["revision"] in line and (fact := fact_from_text(row["fact"])) is not None
        }

    def held_at(self, number: int) -> dict[int, Fact]:
        """The facts that the model holds at a revision, by their ids."""
        return _committed(self.facts_at(number))

    def held_counts(self) -> dict[int, int]:
        """How many facts the model holds at each revision; erased ones are counted nowhere."""
        rows = self.query("SELECT revision, fact_id, state FROM fact_versions ORDER BY revision")
        changes: dict[int, list[tuple[int, bool]]] = {}
        for row in rows:
            change = (row["fact_id"], row["state"] == "committed")
            changes.setdefault(row["revision"], []).append(change)
        held: set[int] = set()
        counts = {}
        for revision in self.revisions():
            for fact_id, is_held in changes.get(revision.id, ()):
                (held.add if is_held else held.discard)(fact_id)
            counts[revision.id] = len(held)
        return counts

    def revision_before(self, fact_id: int) -> int:
        """The revision in the head's lineage just before the weights were trained on a fact, since
        the model last did not hold it; 0, the base, if they never were.

        A group that did not learn the fact counts: its weights may recite it in part.
        """
        line = [row.id for row in self.lineage(self.head())]
        rows = self.query("SELECT revision, state FROM fact_versions WHERE fact_id = ?", [fact_id])
        states = {row["revision"]: row["state"] for row in rows}
        own = {normalise(row["key"]) for row in self.query(_KEY_OF, [fact_id])}
        met = {r for r, keys in self.not_learned().items() if own & set(map(normalise, keys))}
        before, is_met = 0, False
        for previous, revision in pairwise([0, *line]):
            state = states.get(revision, "trained" if revision in met else "")
            if state and state not in ("committed", "trained"):
                is_met = False
            elif state and not is_met:
                before, is_met = previous, True
        return before

    def not_learned(self) -> dict[int, tuple[str, ...]]:
        """The keys of the facts that a revision's group was trained on and did not learn."""
        rows = self.query("SELECT revision, report FROM edits WHERE revision IS NOT NULL")
        reports = ((row["revision"], from_json(row["report"], dict, _REPORT)) for row in rows)
        return {r: tuple(keys) for r, one in reports if (keys := one.get("not_learned"))}

    def added_since_compaction(self) -> int:
        """How many facts were changed after the first revision of the head's lineage.

        That first revision alone was trained from the base model.
        """
        later = {row.id for row in self.lineage(self.head())[1:]}
        rows = self.query("SELECT DISTINCT revision, fact_id FROM fact_versions")
        return len({row["fact_id"] for row in rows if row["revision"] in later})

    def rollback_changes(self, number: int) -> list[FactChange]:
        """What a rollback from the head to a revision does to the facts."""
        before, after = self.held_at(self.head()), self.held_at(number)
        return [
            FactChange(fact_id, before.get(fact_id), after.get(fact_id))
            for fact_id in sorted({*before, *after})
            if before.get(fact_id) != after.get(fact_id)
        ]


WHY_GONE = {
    "erased": "something that was known there was erased",
    "pruned": "deltas that are needed for it were pruned",
}


def in_ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, for a sentence: '0, 3-7, 9'."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)


def revisions_text(numbers: Sequence[int]) -> str:
    """'revision 0', 'revisions 0, 3-7'."""
    return f"revision{'s'[: len(numbers) != 1]} {in_ranges(numbers)}"


def _committed(facts: Mapping[int, tuple[str, Fact]]) -> dict[int, Fact]:
    """The facts that the model holds."""
    return {fact_id: fact for fact_id, (state, fact) in facts.items() if state == "committed"}
