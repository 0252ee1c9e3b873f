"""The perplexity of ordinary text: measured once a revision, part of the gate and of the report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_engine import open_gate, random_train, state
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.replay import general_texts
from kvedit.revisions.reading import Reading
from kvedit.training.engine import Engine


@pytest.fixture
def reads(trained_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model counts as one that reads English, however badly."""
    monkeypatch.setattr(general_texts, "MAX_LOSS", 100.0)
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.store.set_meta("reading_losses", "{}")


def test_a_model_that_cannot_read_is_not_asked(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        reading = knowledge._session.reading
        assert reading.of(0) is None and reading.of(knowledge.store.head()) is None


@pytest.mark.usefixtures("reads")
def test_a_loss_belongs_to_its_revision(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        reading, head = knowledge._session.reading, knowledge.store.head()
        base, now = reading.of(0), reading.of(head)
        assert base is not None and now == reading.now() != base
        monkeypatch.setattr(Reading, "now", lambda self: 1 / 0)
        assert (reading.of(0), reading.of(head)) == (base, now)


@pytest.mark.usefixtures("reads")
def test_a_report_says_how_well_the_model_reads(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "train", random_train())
    open_gate(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        report = knowledge.add(*FREE[4])
        assert report.outcome == "committed"
        reading = knowledge._session.reading
        base, now = reading.of(0), reading.now()
        assert base is not None and now is not None
        assert report.perplexity == pytest.approx(math.exp(now - base))


@pytest.mark.usefixtures("reads")
def test_an_edit_that_spoils_reading_is_refused(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "train", random_train())
    open_gate(trained_store, repairs=0)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        monkeypatch.setattr(Reading, "of", lambda self, revision: 2.0)
        monkeypatch.setattr(Reading, "now", lambda self: 2.0 + math.log(1.2))
        report = knowledge.add(*FREE[4])
        assert report.outcome == "rejected"
        assert any("perplexity of ordinary text: 1.20" in reason for reason in report.reasons)
        assert state(knowledge) == before
