"""Events become strict JSON, with their kind."""

from __future__ import annotations

import json

import pytest

from kvedit.events import (
    EditReport,
    Event,
    IngestProgress,
    RetentionCheck,
    Score,
    Similar,
    Status,
    Summary,
    Warning_,
)

EVENTS: list[tuple[Event, str]] = [
    (Status(phase="train", key="k", step=3, total=9, loss=0.5, recall=(1, 8)), "status"),
    (Warning_(text="close", code="similar", key="k"), "warning"),
    (RetentionCheck(key="k", revision=4, passed=False, margin=-0.5), "retention"),
    (EditReport(kind="add", outcome="committed", key="k"), "edit"),
    (IngestProgress(done=1, total=2, retention=Score(1, 1)), "progress"),
    (Summary(fields={"committed": 3}), "summary"),
]


@pytest.mark.parametrize(("event", "kind"), EVENTS)
def test_every_event_is_strict_json_that_names_its_kind(event: Event, kind: str) -> None:
    text = json.dumps(event.to_json(), allow_nan=False)
    assert json.loads(text)["message_type"] == kind


def test_numbers_that_json_cannot_carry_become_null() -> None:
    status = Status(phase="train", loss=float("nan"))
    assert status.to_json()["loss"] is None
    summary = Summary(fields={"seconds": {"train": float("inf")}})
    assert summary.to_json()["seconds"] == {"train": None}


def test_a_report_carries_scores_with_interval_and_similar_keys() -> None:
    report = EditReport(
        kind="add",
        outcome="rejected",
        key="k",
        reliability=Score(7, 8, "generated"),
        similar=(Similar("other", 91.5),),
        ranks={"q": 4},
        reasons=("recall 7 of 8",),
    ).to_json()
    score = report["reliability"]
    assert isinstance(score, dict)
    assert (score["passed"], score["n"], score["protocol"]) == (7, 8, "generated")
    assert score["rate"] == 0.875
    low, high = score["interval"]
    assert low < 0.875 < high
    assert report["similar"] == [{"key": "other", "score": 91.5}]
    assert report["ranks"] == {"q": 4}
    assert report["reasons"] == ["recall 7 of 8"]


def test_a_score_of_nothing_has_no_rate() -> None:
    assert Score().rate is None
    assert Score().interval() == (0.0, 1.0)


def test_a_summary_is_flat_and_keeps_its_kind() -> None:
    document = Summary(fields={"rejected": 1, "message_type": "x"}).to_json()
    assert document == {"rejected": 1, "message_type": "summary"}
