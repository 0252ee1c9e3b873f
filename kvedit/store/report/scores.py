"""What checks measured, by kind of probe and by protocol.

Invariant: a numerical tie that free generation decided counts with the teacher-forced check that it
came from, and is said to be one; alone it is no score of free answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvedit.events import Score
from kvedit.store.rows import ProbeCount

GENERATED, FORCED = "generated", "teacher-forced"


@dataclass(frozen=True, slots=True)
class Check:
    """``passed`` of ``n`` probes at one revision, ``ties`` of them numerical ties."""

    revision: int
    passed: int
    n: int
    ties: int = 0

    @property
    def score(self) -> Score:
        """The share that passed."""
        return Score(self.passed, self.n)


def checks(counts: Iterable[ProbeCount], kind: str) -> dict[str, list[Check]]:
    """The checks of one kind of probe, by protocol, oldest first."""
    free, forced = [], []
    for row in counts:
        if row.kind == kind and row.protocol == GENERATED:
            passed, n = row.passed - row.ties_passed, row.n - row.ties
            free.append(Check(row.revision, passed, n))
            forced.append(Check(row.revision, row.ties_passed, row.ties, row.ties))
        elif row.kind == kind:
            forced.append(Check(row.revision, row.passed, row.n))
    return {GENERATED: by_revision(free), FORCED: by_revision(forced)}


def by_revision(parts: Iterable[Check]) -> list[Check]:
    """The parts of each check together; a check of nothing is none."""
    together: dict[int, list[Check]] = {}
    for part in parts:
        together.setdefault(part.revision, []).append(part)
    every = [pooled(together[revision]) for revision in sorted(together)]
    return [check for check in every if check.n]


def pooled(parts: Sequence[Check]) -> Check:
    """Several checks as one, at the latest of their revisions."""
    return Check(
        max(part.revision for part in parts), sum(part.passed for part in parts),
        sum(part.n for part in parts), sum(part.ties for part in parts),
    )  # fmt: skip
