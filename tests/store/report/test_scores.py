"""Checks by protocol: a numerical tie belongs to the teacher-forced check that it came from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvedit.store.report.scores import FORCED, GENERATED, Check, checks
from kvedit.store.rows import ProbeCount


@st.composite
def counts(draw: st.DrawFn) -> ProbeCount:
    """A row with fewer ties than probes."""
    passed, failed, tied, tied_failed = draw(st.tuples(*[st.integers(0, 9)] * 4))
    protocol = draw(st.sampled_from((GENERATED, FORCED)))
    if protocol == FORCED:
        tied = tied_failed = 0
    of_all = (passed + tied, passed + failed + tied + tied_failed)
    revision = draw(st.integers(1, 5))
    return ProbeCount(revision, "recall", protocol, *of_all, tied + tied_failed, tied)


def test_ties_join_the_check_they_came_from() -> None:
    rows = [
        ProbeCount(1, "recall", FORCED, 8, 10),
        ProbeCount(1, "recall", GENERATED, 3, 5, ties=4, ties_passed=3),
        ProbeCount(2, "recall", GENERATED, 1, 1, ties=1, ties_passed=1),
        ProbeCount(2, "locality", FORCED, 1, 1),
    ]
    by_protocol = checks(rows, "recall")
    assert by_protocol[FORCED] == [Check(1, 11, 14, 4), Check(2, 1, 1, 1)]
    assert by_protocol[GENERATED] == [Check(1, 0, 1)]


@given(st.lists(counts()))
def test_no_probe_is_lost_or_counted_twice(rows: list[ProbeCount]) -> None:
    every = [check for of_protocol in checks(rows, "recall").values() for check in of_protocol]
    assert sum(check.n for check in every) == sum(row.n for row in rows)
    assert sum(check.passed for check in every) == sum(row.passed for row in rows)
    assert sum(check.ties for check in every) == sum(row.ties for row in rows)
    assert all(0 <= check.passed <= check.n and check.n for check in every)
