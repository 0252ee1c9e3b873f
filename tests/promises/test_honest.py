"""Promise 5, honest: every score has its protocol, n and revision, and what is generated freely
is what counts.
"""

from __future__ import annotations

import pytest
from small_engine import StoreTemplate, holds
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.events import RetentionCheck, Score, Status


def test_a_committed_fact_is_generated_freely(trained: KnowledgeBase) -> None:
    for key, answer in FREE[:3]:
        assert all(holds(trained, key, answer)), key
        assert trained.ask_base(f"What is {key}?") != answer


def test_a_report_gives_scores_with_their_protocol(trained_template: StoreTemplate) -> None:
    for number, report in enumerate(trained_template.reports, 1):
        assert (report.outcome, report.revision, report.parent) == ("committed", number, number - 1)
        assert report.reasons == () and report.broke == ()
        assert report.reliability == Score(10, 10, "teacher-forced")
        assert report.generalization.n == 8 and report.generalization.passed >= 4
        assert report.locality.n > 0
        assert report.retention == Score(number - 1, number - 1, "teacher-forced")
        assert report.steps > 0 and 0 < sum(report.timings.values()) <= report.seconds
        assert report.ranks and max(report.ranks.values()) <= 32
        assert report.text_after == FREE[number - 1][1] != report.text_before


def test_a_scores_interval_is_in_its_json(trained_template: StoreTemplate) -> None:
    score = trained_template.reports[2].to_json()["reliability"]
    assert isinstance(score, dict)
    assert (score["passed"], score["n"], score["protocol"]) == (10, 10, "teacher-forced")
    low, high = score["interval"]
    assert 0.69 < low < 0.73 and high == pytest.approx(1.0)  # Wilson, 10 of 10


def test_progress_and_retention_are_reported_as_they_happen(
    trained_template: StoreTemplate,
) -> None:
    steps = [e for e in trained_template.events if isinstance(e, Status) and e.step]
    assert {event.phase for event in steps} == {"learn"}
    assert all(event.loss is not None and event.recall is not None for event in steps)
    checks = [e for e in trained_template.events if isinstance(e, RetentionCheck)]
    assert {(c.key, c.revision) for c in checks} >= {(FREE[0][0], 2), (FREE[0][0], 3)}


def test_every_probe_is_recorded_with_revision_and_protocol(trained: KnowledgeBase) -> None:
    edit = trained.store.history(FREE[1][0])[0]
    rows = trained.store.edit_results(edit.id)
    kinds = {kind: [r for r in rows if r.kind == kind] for kind in ("recall", "paraphrase")}
    assert len(kinds["recall"]) == 10 and all(r.passed for r in kinds["recall"])
    assert len(kinds["paraphrase"]) == 8
    assert not {r.prompt for r in kinds["recall"]} & {r.prompt for r in kinds["paraphrase"]}
    assert {r.kind for r in rows} == {"recall", "paraphrase", "locality", "retention"}
    assert {r.revision for r in rows} == {2}
    forced = [r for r in rows if r.protocol == "teacher-forced"]
    ties = [r for r in rows if r.protocol == "generated"]  # numerical ties, decided by generation
    assert len(forced) + len(ties) == len(rows) and len(ties) < len(forced) / 4
    assert all(r.margin is not None and (r.margin > 0) == r.passed for r in forced)
    assert all(r.margin is not None and abs(r.margin) < 1 for r in ties)


def test_verify_asks_what_the_base_model_knew(trained: KnowledgeBase) -> None:
    report = trained.verify(base_knowledge=8)
    base = report.base
    assert base is not None and base.score.n == base.generated.n == 8
    assert len(base.lost) == 8 - base.generated.passed
    assert base.base_fluency is not None and (base.fluency or 0) > base.base_fluency / 2
    counts = {
        row.protocol: row.n
        for row in trained.store.probe_counts()
        if row.kind == "locality" and row.revision == report.revision
    }
    assert counts["generated"] >= 8  # recorded
    assert trained.verify().base is None
    assert trained.verify(base_knowledge=8).base == base  # the same questions
    trained.rollback(0)
    untouched = trained.verify(base_knowledge=10_000).base
    assert untouched is not None and untouched.generated.rate == 1.0
    assert untouched.fluency == untouched.base_fluency
    assert untouched.generated.n > 8  # all there are


def test_chat_gives_the_same_answer_as_ask(trained: KnowledgeBase) -> None:
    key, answer = FREE[0]
    messages = [{"role": "user", "content": f"What is {key}?"}]
    assert trained.chat(messages) == trained.ask(f"What is {key}?") == answer
    assert len(trained.ask(f"What is {key}?", max_new_tokens=1)) < len(answer)
