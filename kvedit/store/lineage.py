"""Revisions: how each follows from earlier ones, and what facts the model holds at each.

Invariants:
- Nothing here writes: revisions are appended by ``journal`` alone.
- A line of revisions ends at the base, revision 0: parents and restored revisions have smaller
  numbers than their own.
"""

from collections.abc import Mapping
from itertools import pairwise

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.facts.fact import Fact
from kvedit.store.database import StoreBase
from kvedit.store.rows import FactChange, RevisionRow, fact_from_text


class Lineage(StoreBase):
    """The part of a store that reads revisions."""

    def revisions(self) -> list[RevisionRow]:
        """All revisions, oldest first; the first is the base."""
        return [RevisionRow(**row) for row in self._rows("SELECT * FROM revisions ORDER BY id")]

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

    def facts_at(self, number: int) -> dict[int, tuple[str, Fact]]:
        """State and text, by its id, of every fact that a commit changed up to a revision."""
        line = {row.id for row in self.lineage(number)}
        rows = self._rows("SELECT * FROM fact_versions ORDER BY revision, id")
        return {
            row["fact_id"]: (row["state"], fact)
            for row in rows
            if row["revision"] in line and (fact := fact_from_text(row["fact"])) is not None
        }

    def held_at(self, number: int) -> dict[int, Fact]:
        """The facts that the model holds at a revision, by their ids."""
        return _committed(self.facts_at(number))

    def revision_before(self, fact_id: int) -> int:
        """The revision in the head's lineage just before a fact was committed last.

        0, the base, if it never was.
        """
        line = [row.id for row in self.lineage(self.head())]
        rows = self._rows("SELECT revision, state FROM fact_versions WHERE fact_id = ?", [fact_id])
        states = {row["revision"]: row["state"] for row in rows}
        before, state = 0, ""
        for previous, revision in pairwise([0, *line]):
            earlier, state = state, states.get(revision, state)
            if state == "committed" and earlier != "committed":
                before = previous
        return before

    def added_since_compaction(self) -> int:
        """How many facts were changed after the first revision of the head's lineage.

        That first revision alone was trained from the base model.
        """
        later = {row.id for row in self.lineage(self.head())[1:]}
        rows = self._rows("SELECT DISTINCT revision, fact_id FROM fact_versions")
        return len({row["fact_id"] for row in rows if row["revision"] in later})

    def rollback_changes(self, number: int) -> list[FactChange]:
        """What a rollback from the head to a revision does to the facts."""
        before, after = self.held_at(self.head()), self.held_at(number)
        return [
            FactChange(fact_id, before.get(fact_id), after.get(fact_id))
            for fact_id in sorted({*before, *after})
            if before.get(fact_id) != after.get(fact_id)
        ]


def _committed(facts: Mapping[int, tuple[str, Fact]]) -> dict[int, Fact]:
    """The facts that the model holds."""
    return {fact_id: fact for fact_id, (state, fact) in facts.items() if state == "committed"}
