"""Forgotten for good: after ``erase`` neither the store nor the model has the fact."""

from __future__ import annotations

import json
import shutil
from array import array
from pathlib import Path
from typing import Any

import pytest
from small_engine import StoreTemplate, digest, holds, open_gate, state, unsound, warnings_in
from small_model import FREE, OTHER

from kvedit import KnowledgeBase
from kvedit.errors import UnknownKeyError, UsageError
from kvedit.events import EditReport
from kvedit.facts.fact import Fact
from kvedit.model.prompts import Renderer
from kvedit.store.backup import write_backup
from kvedit.store.store import Store


def forms(renderer: Renderer, *texts: str) -> list[bytes]:
    """A text as UTF-8, as JSON escapes it, and as the tokenizer's ids in binary and in JSON."""
    found = []
    for text in texts:
        found += [text.encode(), json.dumps(text)[1:-1].encode()]
        ids = list(renderer.tokens(text))
        found += [array(kind, ids).tobytes() for kind in "iq"]
        found += [json.dumps(ids)[1:-1].encode(), ",".join(map(str, ids)).encode()]
    return found


def files_with(path: Path, wanted: list[bytes]) -> list[str]:
    files = [one for one in sorted(path.rglob("*")) if one.is_file()]
    return [one.name for one in files if any(form in one.read_bytes() for form in wanted)]


def test_the_latest_fact_is_gone_and_the_model_is_the_one_before_it(
    trained_store: Path, trained_template: StoreTemplate
) -> None:
    key, text = FREE[2]
    with KnowledgeBase.open(trained_store) as knowledge:
        wanted = forms(knowledge.engine.renderer, text, key)
        assert files_with(trained_store, wanted)
        answers = [knowledge.ask(f"What is {key}?", at=2), knowledge.ask(f"And {key}?", at=2)]
        report = knowledge.erase(key.upper())
        assert (report.kind, report.outcome, report.key) == ("erase", "committed", "1 fact")
        assert (report.revision, report.steps, report.keys) == (4, 0, ())
        assert digest(knowledge) == trained_template.digests[2]
        assert [knowledge.ask(f"What is {key}?"), knowledge.ask(f"And {key}?")] == answers
        assert files_with(trained_store, wanted) == []
        assert unsound(knowledge) == []
        with pytest.raises(UnknownKeyError):
            knowledge.erase(key)
        with pytest.raises(UsageError, match="erased"):
            knowledge.rollback(3)
        with pytest.raises(UsageError, match="erased"):
            knowledge.ask("What is it?", at=3)
        assert knowledge.rollback(2).outcome == "committed"
        assert knowledge.add(key, OTHER).outcome in ("committed", "rejected")
    assert files_with(trained_store, forms(knowledge.engine.renderer, text)) == []


def test_an_earlier_fact_is_gone_and_the_others_are_trained_from_the_base(
    trained_store: Path, events: list[Any]
) -> None:
    (key, text), others = FREE[0], FREE[1:3]
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        knowledge.update(key, OTHER)
        wanted = forms(knowledge.engine.renderer, text, key, OTHER)
        plan = knowledge.store.erase_plan([knowledge.store.require(key).id])
        assert (plan.restores, plan.retrained, plan.lost) == (None, 2, (1, 2, 3, 4))
        report = knowledge.erase(key)
        assert report.outcome == "committed", report.reasons
        assert (report.retrained, report.retention.n) == (2, 2)
        assert knowledge.store.keys() == [one for one, _ in others]
        for other, answer in others:
            assert knowledge.ask(f"What is {other}?") == answer
        assert not any(holds(knowledge, key, text) + holds(knowledge, key, OTHER))
        assert unsound(knowledge) == [] and not warnings_in(events, "text-remains")
        assert knowledge.store.lineage(5)[0].id == 5
        assert files_with(trained_store, wanted) == []
    assert files_with(trained_store, wanted) == []
    with KnowledgeBase.open(trained_store) as knowledge:  # and not from memory after it
        assert knowledge.add(*FREE[3]).outcome == "committed"
    assert files_with(trained_store, wanted) == []


def test_nothing_of_another_run_is_left_either(
    trained_store: Path, tmp_path: Path, random_training: None
) -> None:
    """Its group was interrupted, its list of rejected facts written, a backup made of the rest."""
    open_gate(trained_store)
    key, text = FREE[1]
    with KnowledgeBase.open(trained_store) as knowledge:
        wanted = forms(knowledge.engine.renderer, text, key)
        (trained_store / "exports").mkdir(exist_ok=True)
        line = json.dumps({**Fact.create(key, text).to_json(), "reasons": ["no"]}) + "\n"
        (trained_store / "exports" / "rejected-all.jsonl").write_text(line)
        ids = array("q", knowledge.engine.renderer.tokens(text)).tobytes()
        (trained_store / "cache" / "training-7-0123.safetensors").write_bytes(ids)
        (trained_store / "cache" / ".tmp-one").write_bytes(ids)
        assert knowledge.erase(key, FREE[2][0]).outcome == "committed"
        assert digest(knowledge) == knowledge.store.revision(1).weights_digest
        target = tmp_path / "backup.tar"
        write_backup(knowledge.store, target)
    assert files_with(trained_store, wanted) == []
    assert not any(form in target.read_bytes() for form in wanted)


def test_what_the_gate_refuses_erases_nothing(
    trained_store: Path, random_training: None, events: list[Any]
) -> None:
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        before = state(knowledge)
        report = knowledge.erase(FREE[0][0])
        assert report.outcome == "rejected" and "earlier facts lost" in report.reasons[0]
        assert state(knowledge) == before
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        assert not knowledge.store.needs_scrub and knowledge.store.gaps() == {}
        assert knowledge.erase(FREE[0][0], force=True).outcome == "committed"
        assert knowledge.store.find(FREE[0][0]) is None


def test_an_interrupted_erasing_did_not_happen(trained_store: Path, events: list[Any]) -> None:
    with Store.open(trained_store) as store:
        store.plan_edit("erase", [], {})
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        assert knowledge.store.require(FREE[0][0]).state == "committed"
    (warning,) = warnings_in(events, "recovered")
    assert "the erase of facts that it does not name was interrupted" in warning.text


def test_an_own_protected_text_goes_too(trained_store: Path, random_training: None) -> None:
    from kvedit.store.rows import ProtectedRow

    open_gate(trained_store, samples=12, max_samples=12)
    key, text = FREE[2]
    with KnowledgeBase.open(trained_store) as knowledge:
        row = ProtectedRow(role="control", prompt="", answer=f"{key}: {text}", source="mine")
        knowledge.store.add_protected([row])
        assert knowledge.erase(key).outcome == "committed"
        answers = [row.answer for row in knowledge.store.protected("control")]
        assert answers and not any(text in answer for answer in answers)
        assert not list(knowledge.store.cache.glob("*fisher*"))
        assert knowledge.add(*FREE[3]).outcome == "committed"
        assert unsound(knowledge) == []


# ---- pruning


@pytest.fixture
def many(empty_store: Path, random_training: None, tmp_path: Path) -> Path:
    """Six revisions."""
    open_gate(empty_store, checkpoint_every=3)
    with KnowledgeBase.open(empty_store) as knowledge:
        for number in range(6):
            assert knowledge.add(f"thing {number}", "Made of clay.").outcome == "committed"
    return Path(shutil.copytree(empty_store, tmp_path / "many"))


def test_pruned_deltas_are_gone_and_later_revisions_are_the_same_bits(many: Path) -> None:
    with KnowledgeBase.open(many) as knowledge:
        before = [row.weights_digest for row in knowledge.store.revisions()]
        head = digest(knowledge)
        plan = knowledge.prune(4)
        assert (plan.stands_on, plan.dropped, plan.lost) == (4, (1, 2, 3, 4), (1, 2, 3))
        assert len(list(knowledge.store.deltas.iterdir())) == 2
        assert digest(knowledge) == head and unsound(knowledge) == []
        assert knowledge.prune(4).dropped == ()
        for number in (4, 5, 6, 0):
            knowledge.rollback(number)
            assert digest(knowledge) == before[number]
        with pytest.raises(UsageError, match=r"revision 2 can no longer .* pruned") as raised:
            knowledge.rollback(2)
        assert "0, 4-10" in raised.value.hint
        ok = [finding.what for finding in knowledge.doctor() if finding.level == "ok"]
        assert any("pruned" in what and "1-3" in what for what in ok)


def test_checkpoints_to_come_leave_the_one_that_is_needed(many: Path) -> None:
    open_gate(many, checkpoint_every=1)
    with KnowledgeBase.open(many) as knowledge:
        knowledge.prune(4)
        for number in range(6, 12):
            knowledge.add(f"thing {number}", "Made of clay.")
        saved = [row.revision for row in knowledge.store.checkpoints()]
        assert saved[0] == 4 and len(saved) == 4
        for row in knowledge.store.checkpoints()[1:]:
            knowledge.store.remove_checkpoint(row.revision)
        assert unsound(knowledge) == []
        knowledge.prune(10)
        assert [row.revision for row in knowledge.store.checkpoints()] == [10]
        assert unsound(knowledge) == []
        assert knowledge.rollback(11).outcome == "committed"


def test_a_removal_after_pruning_says_whose_answers_come_back(
    many: Path, events: list[Any]
) -> None:
    with KnowledgeBase.open(many, on_event=events.append) as knowledge:
        knowledge.prune(4)
        report: EditReport = knowledge.remove("thing 1")
        assert report.outcome == "committed"
        (warning,) = warnings_in(events, "gone")
        assert "base model's answers" in warning.text


def test_nothing_is_dropped_where_the_weights_do_not_agree(many: Path) -> None:
    import sqlite3

    from kvedit.errors import CorruptStoreError

    with sqlite3.connect(many / "kvedit.db") as connection:
        connection.execute("UPDATE revisions SET weights_digest = 'x' WHERE id = 4")
    with KnowledgeBase.open(many) as knowledge:
        with pytest.raises(CorruptStoreError, match="revision 4"):
            knowledge.prune(4)
        assert len(list(knowledge.store.deltas.iterdir())) == 6
        assert knowledge.store.gaps() == {}
