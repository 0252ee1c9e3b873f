"""What edits and checks measured: probe results, refusals, how long edits took.

Invariant: nothing here writes.
"""

from kvedit.store.checks.repairs import Repairs
from kvedit.store.rows import ProbeCount, ProbeRow, probe_from, reasons_from


class Results(Repairs):
    """The part of a store that reads results."""

    def results(self, fact_id: int, limit: int = 100) -> list[ProbeRow]:
        """The latest probe results of a fact, newest first; what an edit that was not committed saw
        says nothing about one that the model holds.
        """
        sql = """SELECT * FROM probe_results WHERE fact_id = ? AND (revision IS NOT NULL
                OR (SELECT state FROM facts WHERE id = fact_id) <> 'committed')
            ORDER BY id DESC LIMIT ?"""
        return [probe_from(row) for row in self.query(sql, [fact_id, limit])]

    def probe_counts(self) -> list[ProbeCount]:
        """How many probes of each kind passed at each revision, oldest first."""
        # Of the generated answers only a tie has a margin; held-out questions are never ties.
        sql = """SELECT revision, kind, protocol, sum(passed) AS passed, count(*) AS n,
                sum(tie) AS ties, sum(tie AND passed) AS ties_passed
            FROM (SELECT *, protocol = 'generated' AND margin IS NOT NULL
                AND kind <> 'portability' AS tie FROM probe_results)
            WHERE revision IS NOT NULL
            GROUP BY revision, kind, protocol ORDER BY revision"""
        return [ProbeCount(**row) for row in self.query(sql)]

    def pace(self, limit: int = 100) -> tuple[int, float]:
        """How many facts the latest ``limit`` adding edits had, and the seconds that they took."""
        sql = """SELECT (SELECT count(*) FROM edit_facts WHERE edit_id = e.id) AS n,
                json_extract(e.report, '$.seconds') AS seconds
            FROM edits e WHERE kind = 'add' AND state IN ('committed', 'rejected')
            ORDER BY id DESC LIMIT ?"""
        found = self.query(sql, [limit])
        timed = [row for row in found if row["seconds"] and type(row["seconds"]) in (int, float)]
        rows = [row for row in timed if row["n"]]  # facts that were erased since are not counted
        return sum(row["n"] for row in rows), sum(row["seconds"] for row in rows)

    def refusals(self) -> dict[int, tuple[str, ...]]:
        """The reasons why each ``rejected`` fact was rejected last, by the fact's id."""
        sql = """SELECT f.id, (SELECT e.reasons FROM edits e JOIN edit_facts c ON c.edit_id = e.id
                WHERE c.fact_id = f.id AND e.state = 'rejected' ORDER BY e.id DESC LIMIT 1) AS why
            FROM facts f WHERE f.state = 'rejected'"""
        rows = self.query(sql)
        return {r["id"]: reasons_from(r["why"] or "[]", f"of fact {r['id']}") for r in rows}

    def edit_results(self, edit_id: int) -> list[ProbeRow]:
        """The probe results of an edit, in the order they were taken."""
        sql = "SELECT * FROM probe_results WHERE edit_id = ? ORDER BY id"
        return [probe_from(row) for row in self.query(sql, [edit_id])]

    def locality_at(self, revision: int) -> dict[tuple[str, str], bool]:
        """The locality probes of the edit that made a revision, as prompt and expected answer:
        whether each kept its answer.
        """
        sql = """SELECT prompt, expected, passed FROM probe_results
            WHERE kind = 'locality' AND edit_id = (SELECT edit_id FROM revisions WHERE id = ?)"""
        rows = self.query(sql, [revision])
        return {(row["prompt"], row["expected"]): bool(row["passed"]) for row in rows}

    def prior_answers(self, fact_id: int) -> dict[str, str]:
        """What the model answered to a fact's prompts before the fact was added; empty in stores
        that have not kept it, since its revision before can be asked.
        """
        sql = "SELECT prompt, answer FROM prior_answers WHERE fact_id = ? ORDER BY rowid"
        return {str(row["prompt"]): str(row["answer"]) for row in self.query(sql, [fact_id])}
