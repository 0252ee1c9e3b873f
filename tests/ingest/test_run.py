"""A run over many facts: it ends well, it resumes, it does nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fake_knowledge import LONGEST, FakeKnowledge, facts, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import FREE

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import (
    DiskFullError,
    Interrupted,
    InvalidFactError,
    LockedError,
    OutOfTimeError,
    ProcessesDifferError,
    TrainingError,
)
from kvedit.events import EditReport, IngestProgress, Score
from kvedit.facts.fact import Fact
from kvedit.ingest.report import IngestOptions, IngestReport
from kvedit.ingest.run import ERRORS_IN_A_ROW, ingest


@pytest.fixture
def knowledge(tmp_path: Path) -> Iterator[FakeKnowledge]:
    with make_store(tmp_path / "store") as store:
        yield FakeKnowledge(store)


def run(
    knowledge: FakeKnowledge,
    given_facts: list[Fact],
    emit: Callable[[Any], None] = lambda event: None,
    **options: Any,
) -> IngestReport:
    base = cast(KnowledgeBase, knowledge)
    return ingest(base, given_facts, IngestOptions(**options), emit)


def counts(report: IngestReport) -> tuple[int, int, int]:
    return report.count("committed"), report.count("rejected"), report.count("failed")


def at(number: int, error: BaseException) -> Callable[[Fact], None]:
    """Raise when the fact of this number (in ``facts``) is to be taught."""

    def before(fact: Fact) -> None:
        if fact.description.endswith(f" {number}."):
            raise error

    return before


@pytest.mark.parametrize("step", ["verify", "protect_for"])
def test_an_error_between_the_facts_ends_the_run_with_a_report(
    knowledge: FakeKnowledge, step: str
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    setattr(knowledge, step, fail)
    report = run(knowledge, facts(6), group=3)
    assert (report.stopped, str(report.error)) == ("error", "[Errno 5] Input/output error")
    committed = 6 if step == "verify" else 0
    assert (counts(report), report.remaining) == ((committed, 0, 0), 6 - committed)


def test_all_facts_are_taught_and_verified(knowledge: FakeKnowledge) -> None:
    given_facts = facts(20)
    report = run(knowledge, given_facts)
    assert counts(report) == (20, 0, 0)
    assert sorted(knowledge.trained) == sorted(fact.key for fact in given_facts)
    assert (report.stopped, report.remaining, report.revision) == ("", 0, 20)
    assert report.retention == Score(20, 20, "generated")
    assert {one.revision for one in report.outcomes} == set(range(1, 21))
    assert knowledge.verified[-1] is None  # at the end all facts are asked


def test_running_again_does_nothing(knowledge: FakeKnowledge) -> None:
    run(knowledge, facts(5))
    knowledge.trained.clear(), knowledge.verified.clear()
    report = run(knowledge, facts(5))
    assert (report.unchanged, report.outcomes, knowledge.trained) == (5, (), [])
    assert knowledge.verified == []


def test_protected_text_for_all_is_drawn_before_the_first_group(knowledge: FakeKnowledge) -> None:
    run(knowledge, facts(9), group=4)
    run(knowledge, facts(9), group=4)  # nothing is left to be taught
    assert knowledge.protected_for == [9]
    run(knowledge, facts(12), group=1)  # one by one: as `add`
    assert knowledge.protected_for == [9]


def test_groups_are_no_larger_than_there_is_memory_for(knowledge: FakeKnowledge) -> None:
    def before(fact: Fact) -> None:
        if knowledge.largest_group is None:
            knowledge.largest_group = 5

    knowledge.before = before
    report = run(knowledge, facts(40), group=16)
    assert [len(group) for group in knowledge.groups] == [16, 5, 5, 5, 5, 4]
    assert counts(report) == (40, 0, 0)


def test_facts_that_there_is_no_memory_for_fail_and_end_the_run(knowledge: FakeKnowledge) -> None:
    def add_group(group: list[Fact], **_: bool) -> tuple[EditReport, ...]:
        return tuple(
            EditReport(kind="add", outcome="failed", key=f.key, keys=(f.key,), reasons=("no room",))
            for f in group
        )

    knowledge.add_group = add_group  # type: ignore[method-assign,assignment]
    report = run(knowledge, facts(40), group=4)
    assert report.stopped == "errors" and report.count("failed") == 12
    assert {one.reasons for one in report.outcomes} == {("no room",)}


def test_a_group_that_is_one_revision(knowledge: FakeKnowledge) -> None:
    knowledge.together = True
    report = run(knowledge, facts(6), group=3)
    assert [len(group) for group in knowledge.groups] == [3, 3]
    assert sorted(one.revision or 0 for one in report.outcomes) == [1, 1, 1, 2, 2, 2]


def test_refused_facts_have_reasons_and_are_let_be_until_asked(knowledge: FakeKnowledge) -> None:
    given_facts = facts(6)
    bad = given_facts[2].key
    knowledge.refuses = {bad}
    report = run(knowledge, given_facts)
    assert counts(report) == (5, 1, 0)
    assert [(o.fact.key, o.reasons) for o in report.outcomes if o.outcome == "rejected"] == [
        (bad, ("recall probes: 1 of 10 passed, 100% needed",))
    ]
    knowledge.refuses, knowledge.trained = set(), []
    again = run(knowledge, given_facts)
    assert knowledge.trained == []
    assert [(o.fact.key, o.reasons) for o in again.rejected_before] == [
        (bad, ("recall probes: 1 of 10 passed, 100% needed",))
    ]
    third = run(knowledge, given_facts, retry_rejected=True)
    assert (counts(third), third.rejected_before, knowledge.trained) == ((1, 0, 0), (), [bad])


def test_one_fact_that_fails_does_not_stop_the_others(knowledge: FakeKnowledge) -> None:
    knowledge.before = at(3, ValueError("boom"))
    report = run(knowledge, facts(6), group=4)
    assert counts(report) == (5, 0, 1)
    failed = next(one for one in report.outcomes if one.outcome == "failed")
    assert failed.reasons == ("ValueError: boom",)
    assert knowledge.store.require(failed.fact.key).state == "pending"
    knowledge.before = lambda fact: None
    assert counts(run(knowledge, facts(6))) == (1, 0, 0)


def test_when_everything_fails_it_stops(knowledge: FakeKnowledge) -> None:
    def before(fact: Fact) -> None:
        raise RuntimeError("the device is gone")

    knowledge.before = before
    report = run(knowledge, facts(40), group=1)
    assert (report.stopped, report.count("failed")) == ("errors", ERRORS_IN_A_ROW)
    assert report.remaining == 40 - ERRORS_IN_A_ROW


@pytest.mark.parametrize(
    "error", [DiskFullError("full"), LockedError("moved"), ProcessesDifferError("weights")]
)
def test_what_would_break_every_fact_ends_the_run_with_a_report(
    knowledge: FakeKnowledge, error: Exception
) -> None:
    knowledge.before = at(5, error)
    report = run(knowledge, facts(9), group=1)
    assert (report.stopped, report.error, report.remaining) == ("error", error, 4)
    assert (counts(report), report.revision) == ((5, 0, 0), 5)
    assert len(knowledge.store.keys()) == 5
    knowledge.before = lambda fact: None
    assert counts(run(knowledge, facts(9))) == (4, 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("ctrl-c")])
def test_an_interruption_ends_with_a_report(knowledge: FakeKnowledge, error: BaseException) -> None:
    knowledge.before = at(5, error)
    report = run(knowledge, facts(9), group=1)
    assert (report.stopped, counts(report), report.remaining) == ("interrupted", (5, 0, 0), 4)
    assert [row.state for row in knowledge.store.facts("pending")] == ["pending"] * 4


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=4), st.sampled_from([None, 1, 3]), st.booleans())
def test_however_often_it_is_stopped_nothing_is_taught_twice(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], group: int | None, together: bool
) -> None:
    given_facts = facts(12)
    with make_store(tmp_path_factory.mktemp("s") / "store") as store:
        knowledge = FakeKnowledge(store, together=together)
        for stop in stops:
            knowledge.before = at(stop, KeyboardInterrupt())
            run(knowledge, given_facts, group=group)
        knowledge.before = lambda fact: None
        report = run(knowledge, given_facts, group=group)
        assert sorted(knowledge.trained) == sorted(fact.key for fact in given_facts)
        assert len(store.facts("committed")) == 12
        assert report.unchanged + report.count("committed") == 12


def test_limits(knowledge: FakeKnowledge, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(knowledge, facts(9), limit=4)
    assert (counts(report), report.stopped, report.remaining) == ((4, 0, 0), "limit", 5)
    assert knowledge.store.facts("pending") == []
    report = run(knowledge, facts(9), max_seconds=0.0)
    assert (counts(report), report.stopped, report.remaining) == ((0, 0, 0), "time", 5)
    assert len(knowledge.store.facts("pending")) == 5
    knowledge.refuses = {fact.key for fact in facts(9)}
    report = run(knowledge, facts(9), max_failures=2, group=1)
    assert (counts(report), report.stopped, report.remaining) == ((0, 2, 0), "failures", 3)


def test_time_may_be_up_in_the_middle_of_a_group(knowledge: FakeKnowledge) -> None:
    """The groups before it stand, and are verified in passing; the rest is for the next run."""

    def before(fact: Fact) -> None:
        assert knowledge.deadlines[-1] is not None
        if fact.key == facts(9)[5].key:
            raise OutOfTimeError("time is up")

    knowledge.before = before
    report = run(knowledge, facts(9), group=3, max_seconds=3600.0, sample=2)
    assert (counts(report), report.stopped, report.remaining) == ((3, 0, 0), "time", 6)
    assert knowledge.verified == [2]
    knowledge.before = lambda fact: None
    assert counts(run(knowledge, facts(9), group=3)) == (6, 0, 0)
    assert knowledge.deadlines[-1] is None


def test_one_bad_fact_does_not_cost_its_group(knowledge: FakeKnowledge) -> None:
    """What breaks a group as a whole is found by halving it."""
    bad = facts(32)[20].key

    def before(fact: Fact) -> None:
        if fact.key == bad:
            raise TrainingError("the training loss became NaN")

    knowledge.before, knowledge.together = before, True
    report = run(knowledge, facts(32), group=32)
    assert counts(report) == (31, 0, 1)
    assert [o.fact.key for o in report.outcomes if o.outcome == "failed"] == [bad]
    assert len(knowledge.groups) <= 2 * 5 + 1


def test_what_breaks_everything_ends_the_run(knowledge: FakeKnowledge) -> None:
    def before(fact: Fact) -> None:
        raise RuntimeError("no kernel image")

    knowledge.before = before
    report = run(knowledge, facts(64), group=64)
    assert (counts(report), report.stopped, report.remaining) == ((0, 0, 10), "errors", 54)


def test_nothing_is_edited_before_all_is_found_fit(knowledge: FakeKnowledge) -> None:
    long = Fact.create("the long one", "x" * (LONGEST + 1))
    with pytest.raises(InvalidFactError, match="1 fact cannot go in") as caught:
        run(knowledge, [*facts(3), long], places={"the long one": "f, line 4"})
    assert "f, line 4: the text has too many tokens" in caught.value.hint
    assert knowledge.trained == [] and knowledge.store.facts() == []
    report = run(knowledge, [*facts(3), long], skip_invalid=True)
    assert (counts(report), report.count("invalid"), report.remaining) == ((3, 0, 0), 1, 0)
    with pytest.raises(InvalidFactError, match="2 facts"):
        run(knowledge, [Fact.create("a", "b"), Fact.create("A", "c")])


def test_verification_comes_at_growing_intervals(knowledge: FakeKnowledge) -> None:
    knowledge.loses = {facts(1)[0].key}
    report = run(knowledge, facts(80), group=1, first_check=8, sample=5)
    assert knowledge.verified == [5, 5, 5, 5, None]  # after 8, 16, 32, 64; all at the end
    assert report.lost == (facts(1)[0].key,)
    assert report.retention == Score(79, 80, "generated")


def test_a_refused_edit_says_nothing_about_retention(knowledge: FakeKnowledge) -> None:
    knowledge.refuses, knowledge.retention = {facts(1)[0].key}, Score(1, 3)
    assert run(knowledge, facts(1)).retention == Score()
    told: list[Any] = []
    run(knowledge, facts(2), told.append)
    assert told[-1].retention == Score(1, 3)  # the gate of the edit that was committed


def test_progress_is_told(knowledge: FakeKnowledge) -> None:
    run(knowledge, facts(2))
    told: list[Any] = []
    knowledge.refuses = {facts(4)[3].key}
    run(knowledge, facts(8), told.append, group=3)
    progress = [event for event in told if isinstance(event, IngestProgress)]
    assert [event.done for event in progress] == [0, 3, 6]
    assert progress[0].seconds_left is None
    last = progress[-1]
    assert (last.total, last.committed, last.rejected, last.unchanged) == (6, 5, 1, 2)
    assert last.seconds_left == 0.0 and last.seconds_per_fact is not None
    assert last.to_json()["message_type"] == "progress"


def test_a_real_model_learns_a_file_and_goes_on_where_it_stopped(empty_store: Path) -> None:
    given_facts = [Fact.create(*pair) for pair in FREE[:2]]
    with KnowledgeBase.open(empty_store) as knowledge:
        first = ingest(knowledge, given_facts, IngestOptions(limit=1))
        assert (first.count("committed"), first.stopped) == (1, "limit"), first.outcomes
    with KnowledgeBase.open(empty_store) as knowledge:
        second = ingest(knowledge, given_facts)
        assert (second.count("committed"), second.unchanged) == (1, 1), second.outcomes
        assert second.retention == Score(2, 2, "generated")
        assert {knowledge.ask(f"What is {key}?") for key, _ in FREE[:2]} == {
            text for _, text in FREE[:2]
        }


KILLED = """
import os, signal, sys
from pathlib import Path
from kvedit.facts import Fact
from kvedit.editor import KnowledgeBase
from kvedit.ingest import IngestOptions, ingest
from kvedit.store import Store

def mark_trained(store, edit, delta, real=Store.mark_trained):
    real(store, edit, delta)
    if store.head() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

Store.mark_trained = mark_trained
facts = [Fact.create(*pair) for pair in %r]
with KnowledgeBase.open(Path(sys.argv[1])) as knowledge:
    ingest(knowledge, facts, IngestOptions(group=1))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on_where_it_stopped(empty_store: Path) -> None:
    command = [sys.executable, "-c", KILLED % (FREE[:3],), str(empty_store)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    events: list[Any] = []
    with KnowledgeBase.open(empty_store, on_event=events.append) as knowledge:
        assert [row.state for row in knowledge.store.facts()] == ["committed", "pending", "pending"]
        facts = [Fact.create(*pair) for pair in FREE[:3]]
        report = ingest(knowledge, facts, IngestOptions(group=1))
        assert (report.count("committed"), report.unchanged) == (2, 1)
        assert [row.kind for row in knowledge.store.revisions()[1:]] == ["add"] * 3
    assert any("was interrupted and did not happen" in getattr(e, "text", "") for e in events)
