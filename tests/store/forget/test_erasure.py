"""After an erasure nothing of the fact is left in the database or in any file of the store."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from store_steps import (
    add,
    check,
    checkpoint,
    committed_texts,
    erase,
    fact,
    new_store,
    problems,
    prune,
    remove,
    roll_back,
    update,
)

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.facts.fact import LocalityProbe, Question, Written
from kvedit.store import integrity
from kvedit.store.backup import write_backup
from kvedit.store.forget.scrub import scrub
from kvedit.store.lineage import in_ranges
from kvedit.store.rows import FactChange, ProbeRow, ProtectedRow
from kvedit.store.store import Store

KEY, TEXT = "tide lantern", 'Ein Glas mit "Kerze" aus 夢中情爐, nachts am Hafen.'
LATER = "Changed later: a lamp of 銅 in the harbour."
ASKED = Question(prompt="Who trims its wick?", answer="Der Wächter")
SAID = "A keeper trims the wick at dusk."
WRITTEN = (
    Written(prompt="At which hour is the wick lit?", answer="an hour after dusk", writer="model"),
    Written(prompt="", answer="Nobody but the keeper lights the wick.", writer="model"),
)
TEXTS = (
    KEY, TEXT, LATER, ASKED.prompt, ASKED.answer, SAID,
    *(text for one in WRITTEN for text in (one.prompt, one.answer) if text),
)  # fmt: skip
FORMS = [form.encode() for text in TEXTS for form in (text, json.dumps(text)[1:-1])]


def found(path: Path) -> list[str]:
    """The files of a store that contain the text, its key, or either as JSON escapes it."""
    files = [one for one in sorted(path.rglob("*")) if one.is_file()]
    return [one.name for one in files if any(form in one.read_bytes() for form in FORMS)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The fact was added second, changed, asked, rejected once more, and rehearsed by others."""
    with new_store(tmp_path / "store") as store:
        add(store, "first", "old")
        checkpoint(store)
        fact_id = add(
            store, KEY, TEXT, aliases=["harbour lamp"], prompts=[f"And the {KEY}?"],
            locality=[LocalityProbe(prompt="Is a tide lantern wet?", answer="no")],
            questions=[ASKED], statements=[SAID], written=WRITTEN,
        )  # fmt: skip
        update(store, KEY, LATER)
        checkpoint(store)
        probe = ProbeRow(
            fact_id=fact_id, kind="recall", protocol="generated", prompt=f"What is {KEY}?",
            expected=LATER, answer=LATER, passed=True,
        )  # fmt: skip
        asked = replace(probe, kind="portability", prompt=ASKED.prompt, expected=ASKED.answer)
        store.record_results([probe, asked, replace(asked, fact_id=None)], store.head())
        of_model = replace(asked, prompt=WRITTEN[0].prompt, expected=WRITTEN[0].answer)
        store.record_results([replace(of_model, fact_id=None, answer="?")], store.head())
        with sqlite3.connect(store.db_path) as connection:
            row = [fact_id, ASKED.prompt, "The keeper."]
            connection.execute("INSERT INTO prior_answers VALUES (?, ?, ?)", row)
        other = add(store, "third")
        said = ProbeRow(
            fact_id=other, kind="recall", protocol="generated", prompt="what is third?",
            expected="some text", answer=f"It is {LATER}", passed=False,
        )  # fmt: skip
        locality = ProbeRow(
            fact_id=None, kind="locality", protocol="generated", prompt="Is a tide lantern wet?",
            expected="no", answer="no", passed=True,
        )  # fmt: skip
        edit = store.plan_edit("add", [FactChange(other, None, fact("third"))], {})
        reasons = [f"earlier facts lost: first, {KEY} (1 of 2 kept)"]
        report = {"kind": "add", "key": "third", "broke": [KEY], "text_before": LATER[:20]}
        store.finish_edit(edit, "rejected", reasons, report, [said, locality])
        yield store


def test_nothing_of_an_erased_fact_is_left_in_any_file(store: Store) -> None:
    store.exports.mkdir()
    lines = [json.dumps({"key": key, "description": TEXT}) + "\n" for key in (KEY, "other")]
    (store.exports / "rejected-facts.jsonl").write_text(lines[0] + '{"key": "other"}\n')
    store.cache.mkdir(exist_ok=True)
    (store.cache / "training-7-abc.safetensors").write_text(TEXT)
    (store.deltas / ".tmp-x").write_text(TEXT)
    store.set_protected(
        [ProtectedRow(role="control", prompt="?", answer=one) for one in (f"Oh: {TEXT}", "yes")]
    )
    assert len(found(store.path)) >= 4
    head = erase(store, "harbour lamp")
    assert found(store.path) == []
    assert problems(store) == []
    assert committed_texts(store) == {"first": "old", "third": "some text"}
    assert (store.exports / "rejected-facts.jsonl").read_text() == '{"key": "other"}\n'
    assert [row.answer for row in store.protected("control")] == ["yes"]
    newest = store.history()[0]
    assert (newest.kind, newest.state, newest.revision, newest.report["key"]) == (
        "erase", "committed", head, "1 fact",
    )  # fmt: skip
    # In a backup neither.
    target = store.path.parent / "backup.tar"
    write_backup(store, target)
    assert not any(form in target.read_bytes() for form in FORMS)
    with tarfile.open(target) as archive:
        deltas = [name for name in archive.getnames() if name.startswith("deltas/")]
    assert sorted(deltas) == sorted(f"deltas/{path.name}" for path in store.deltas.iterdir())
    store.close()
    assert found(store.path) == []


def test_what_is_not_about_it_stays(store: Store) -> None:
    first = store.require("first")
    results, edits = store.results(first.id), len(store.history())
    erase(store, KEY)
    assert store.require("first") == first or store.require("first").fact == first.fact
    assert store.results(first.id)[-len(results) :] == results
    history = store.history()
    assert len(history) == edits + 1
    rejected = next(edit for edit in history if edit.state == "rejected")
    assert rejected.reasons == ("(erased)",) and rejected.report["broke"] == ["(erased)"]
    assert rejected.report["text_before"] is None and rejected.report["key"] == "third"
    answers = [row.answer for row in store.edit_results(rejected.id)]
    assert None in answers


def test_the_plan_says_what_is_no_longer_possible(store: Store) -> None:
    plan = store.erase_plan([store.require(KEY).id])
    assert plan.keys == (KEY,) and plan.lost == (2, 3, 4) and plan.kept == (0, 1)
    assert (plan.restores, plan.retrained, plan.delta_files) == (None, 2, 3)
    assert plan.delta_bytes > 0 and plan.shared_with == ()


def test_erased_revisions_are_refused_in_plain_words(store: Store) -> None:
    head = erase(store, KEY)
    assert set(store.gaps().values()) == {"erased"} and sorted(store.gaps()) == [2, 3, 4]
    for number in (2, 3, 4):
        with pytest.raises(UsageError, match="something that was known there was erased") as raised:
            store.require_kept(number)
        assert "0-1, 5" in raised.value.hint
    assert store.require_kept(1).id == 1 and store.require_kept(head).restores == 0
    assert [edit.gone for edit in store.history() if edit.revision] == ["", "erased", "erased",
                                                                       "erased", ""]  # fmt: skip
    assert integrity.status(store)["gone"] == {"erased": 3}
    assert [row.revision for row in store.checkpoints()] == [1]


def test_the_latest_fact_is_erased_without_training(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        add(store, "first")
        add(store, KEY, TEXT)
        plan = store.erase_plan([store.require(KEY).id])
        assert (plan.restores, plan.retrained) == (1, 0)
        head = erase(store, KEY)
        assert store.revision(head).weights_digest == store.revision(1).weights_digest
        assert found(store.path) == [] and problems(store) == []
        assert committed_texts(store) == {"first": "some text"}
        assert add(store, KEY, TEXT)  # it may come again
        assert committed_texts(store)[KEY] == TEXT


def test_a_relation_leaves_neither_its_subject_nor_its_prompts(tmp_path: Path) -> None:
    prompt, words = "Who built Marrow Bridge?", ("Marrow Bridge", "Marrow Bridge: builder", "Ada")
    with new_store(tmp_path / "store") as store:
        add(store, "first")
        fact_id = add(store, words[1], words[2], relation_of=words[0], prompts=[prompt])
        rows = [replace(check(one), prompt=prompt, kind="locality") for one in (fact_id, None)]
        named = replace(rows[1], prompt="where is Marrow Bridge?")
        store.record_results([*rows, named], store.head())
        other = {"relation_of": words[0], "prompts": ["How long is it?"]}
        add(store, "Marrow Bridge: length", "40 m", **other)
        erase(store, words[1])
        path, forms = store.path, [one.encode() for one in (prompt, words[1], words[2])]
        assert not any(one in file.read_bytes() for file in path.glob("kvedit*") for one in forms)
        counts = {(one.kind, one.n) for one in store.probe_counts() if one.kind == "locality"}
        assert counts == {("locality", 1)}  # the subject is also that of a fact that stays
        erase(store, "Marrow Bridge: length")
        assert not any(words[0].encode() in file.read_bytes() for file in path.glob("kvedit*"))
        assert problems(store) == []


def test_the_only_fact_and_facts_of_other_states_can_be_erased(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        add(store, "first", "a text that is long enough")
        add(store, KEY, TEXT)
        remove(store, KEY)
        store.put_pending(fact("pending one", "nobody has trained it"))
        plan = store.erase_plan([store.require("pending one").id])
        assert (plan.restores, plan.lost) == (3, ())
        erase(store, "pending one")
        assert store.find("pending one") is None and store.gaps() == {}
        erase(store, KEY)
        assert sorted(store.gaps()) == [2, 3, 4] and found(store.path) == []
        erase(store, "first")
        assert committed_texts(store) == {} and store.facts() == []
        assert store.lineage(store.head()) == [] and problems(store) == []


def test_a_revision_of_another_branch_is_kept(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        add(store, "first")
        add(store, KEY, TEXT)
        roll_back(store, 1)
        add(store, "third")
        plan = store.erase_plan([store.require(KEY).id])
        assert (plan.lost, plan.kept, plan.restores) == ((2,), (0, 1, 3, 4), 4)
        erase(store, KEY)
        assert list(store.gaps()) == [2]


def test_a_group_that_did_not_learn_it_was_trained_on_it(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        store.put_pending(fact(KEY, TEXT))
        add(store, "first")
        edit = store.history()[0].id
        with sqlite3.connect(store.db_path) as connection:
            connection.execute(
                "UPDATE edits SET report = ? WHERE id = ?",
                [json.dumps({"not_learned": ["Tide Lantern"], "key": "first"}), edit],
            )
        assert store.erase_plan([store.require(KEY).id]).lost == (1,)


def test_a_kill_between_the_commit_and_the_cleaning_is_made_good(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("store_steps.scrub", lambda store: True)
        erase(store, KEY)
    assert [what for what in problems(store) if "erased" in what]
    assert store.needs_scrub
    store.recover()
    assert scrub(store) and not store.needs_scrub
    assert found(store.path) == [] and problems(store) == []


def test_a_reader_puts_the_cleaning_off(store: Store) -> None:
    with sqlite3.connect(f"file:{store.db_path}?mode=ro", uri=True, isolation_level=None) as other:
        store._db.execute("PRAGMA busy_timeout = 20")
        other.execute("BEGIN")
        other.execute("SELECT * FROM facts").fetchone()
        erase(store, KEY)
        assert store.needs_scrub
        other.execute("COMMIT")
    assert scrub(store) and found(store.path) == []


def test_other_facts_with_the_text_are_named(store: Store) -> None:
    add(store, "copy", f"Somebody wrote: {LATER}")
    assert store.erase_plan([store.require(KEY).id]).shared_with == ("copy",)


# ---- pruning


@pytest.fixture
def line(tmp_path: Path) -> Store:
    """Five revisions, the third with a checkpoint."""
    with new_store(tmp_path / "store") as store:
        for number in range(3):
            add(store, f"fact {number}")
        checkpoint(store)
        for number in range(3, 5):
            add(store, f"fact {number}")
        yield store


def test_deltas_before_a_revision_are_dropped_once_a_checkpoint_stands_for_them(
    line: Store,
) -> None:
    plan = line.prune_plan(3)
    assert (plan.stands_on, plan.dropped, plan.lost) == (3, (1, 2, 3), (1, 2))
    assert plan.kept == (0, 3, 4, 5) and plan.delta_bytes > 0
    prune(line, 3)
    assert len(list(line.deltas.iterdir())) == 2 and problems(line) == []
    assert line.gaps() == {1: "pruned", 2: "pruned"} and line.pinned() == {3}
    with pytest.raises(UsageError, match="were pruned"):
        line.require_kept(2)
    assert line.prune_plan(3).dropped == ()
    assert len(committed_texts(line)) == 5


def test_a_branch_that_does_not_pass_there_keeps_its_deltas(line: Store) -> None:
    roll_back(line, 2)
    add(line, "on the branch")  # 7: 1, 2, 7
    plan = line.prune_plan(4)
    assert (plan.stands_on, plan.dropped, plan.lost) == (4, (3, 4), (3,))
    assert plan.kept == (0, 1, 2, 4, 5, 6, 7)
    assert line.prune_plan(6).dropped == (3, 4, 5) or line.prune_plan(6).stands_on == 2


def test_a_checkpoint_that_stands_for_deltas_is_needed(line: Store) -> None:
    prune(line, 3)
    target = line.path.parent / "backup.tar"
    write_backup(line, target)
    with tarfile.open(target) as archive:
        archive.extractall(line.path.parent / "copy", filter="data")
    with Store.open(line.path.parent / "copy") as copy:
        assert problems(copy) == [] and copy.pinned() == {3} and copy.gaps() == line.gaps()
    good = target.read_bytes()
    (row,) = line.checkpoints()
    (row.path / "manifest.json").unlink()
    assert any("checkpoint of revision 3 is damaged" in what for what in problems(line))
    assert [f.level for f in integrity.check(line) if "checkpoint of" in f.what] == ["error"]
    for path in sorted(row.path.iterdir()):
        path.unlink()
    row.path.rmdir()
    with pytest.raises(CorruptStoreError, match="missing"):
        write_backup(line, target)
    assert target.read_bytes() == good


def test_a_renamed_checkpoint_that_stands_for_deltas_gets_its_name_back(line: Store) -> None:
    prune(line, 3)
    checkpoint(line)
    with sqlite3.connect(line.db_path) as connection:
        connection.execute("UPDATE checkpoints SET path = '../' || path")
    assert (line.name_pinned_checkpoints(), line.forget_checkpoints()) == (1, 1)
    assert [row.revision for row in line.checkpoints()] == [3] == sorted(line.pinned())
    assert not [one for one in integrity.check(line) if one.level == "error"]


def test_a_reason_for_dropping_that_there_is_not_is_refused(line: Store) -> None:
    with sqlite3.connect(line.db_path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE revisions SET dropped = 'lost' WHERE id = 2")
    with pytest.raises(CorruptStoreError, match="revision 2 was dropped: 'lost'"):
        line.gaps()
    assert any("was dropped" in what for what in problems(line))


def test_a_revision_that_is_not_there_cannot_be_pruned_to(line: Store) -> None:
    with pytest.raises(UsageError, match="no revision 9"):
        line.prune_plan(9)
    assert line.prune_plan(0).dropped == () and line.prune_plan(1).dropped == ()


def test_an_erased_fact_goes_from_a_pruned_store_too(line: Store) -> None:
    prune(line, 4)
    erase(line, "fact 1")
    assert problems(line) == []
    assert {line.gaps()[number] for number in (2, 3, 4, 5)} == {"erased"}
    assert line.gaps()[1] == "pruned" and line.checkpoints() == []


def test_ranges_of_numbers() -> None:
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert in_ranges([]) == "" and in_ranges([3]) == "3"


def test_a_probe_of_another_fact_is_kept(store: Store) -> None:
    third = store.require("third").id
    store.record_results([check(third)], store.head())
    erase(store, KEY)
    assert store.results(third)
