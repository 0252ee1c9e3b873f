"""doctor: every part is looked at whatever is wrong with the others, and nothing is changed."""

from __future__ import annotations

import builtins
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvedit import KnowledgeBase
from kvedit.errors import CorruptStoreError, ModelMismatchError, NoStoreError, StoreTooNewError
from kvedit.lock import StoreLock
from kvedit.revisions import rebuild
from kvedit.revisions.doctor import examine, mend
from kvedit.store.checks.inspection import examine_files
from kvedit.store.rows import FactChange
from kvedit.store.store import Store


def quiet(text: str) -> None:
    """Say nothing."""


def errors(path: Path) -> list[str]:
    return [one.what for one in examine(path, quiet) if one.level == "error"]


def state(path: Path) -> dict[str, tuple[bytes, int]]:
    """All bytes of a store, and when they were written."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def sql(path: Path, text: str, *values: object) -> None:
    with closing(sqlite3.connect(path / "kvedit.db", isolation_level=None)) as db:
        db.execute(text, values)


def changed_letter(path: Path) -> None:
    sql(path, "UPDATE facts SET description = replace(description, 'glass', 'grass')")


def test_a_sound_store_is_sound_and_untouched(trained_store: Path) -> None:
    before = state(trained_store)
    assert errors(trained_store) == []
    assert {one.level for one in examine_files(trained_store)} == {"ok"}
    assert state(trained_store) == before


def test_an_interrupted_store_is_looked_at_and_not_mended(
    trained_store: Path, tmp_path: Path
) -> None:
    """A commit that is in the write-ahead log alone, an edit that was not ended, and leftovers."""
    with Store.open(trained_store) as store:
        fact = store.require("tide lantern").fact
        changes = [FactChange(1, fact, None)]
        store.plan_edit("remove", changes, {})
        (store.deltas / ".tmp-half").write_bytes(b"")
        copy = Path(shutil.copytree(trained_store, tmp_path / "killed"))
    assert (copy / "kvedit.db-wal").stat().st_size > 0
    (copy / "kvedit.db-shm").unlink(missing_ok=True)
    before = state(copy)
    warnings = [one.what for one in examine_files(copy) if one.level == "warning"]
    assert warnings[0] == "edit 4 (remove) was not ended" and ".tmp-half" in warnings[1]
    assert state(copy) == before
    assert mend(copy, quiet) == ["ended the interrupted remove of tide lantern"]
    assert {one.level for one in examine_files(copy)} == {"ok"}


def test_each_part_is_looked_at_whatever_is_wrong_with_the_others(trained_store: Path) -> None:
    changed_letter(trained_store)
    sql(trained_store, "UPDATE edits SET report = '{' WHERE id = 1")
    sql(trained_store, "UPDATE revisions SET weights_digest = 'x' WHERE id = 2")
    sql(trained_store, "UPDATE meta SET value = '/nowhere/at/all' WHERE name LIKE 'model_%e'")
    sql(trained_store, "UPDATE meta SET value = '/nowhere/at/all' WHERE name = 'model_path'")
    (trained_store / "kvedit.toml").write_text("[training", encoding="utf-8")
    with Store.open(trained_store) as store:
        store.delta_path(str(store.revision(3).delta)).unlink()
    before = state(trained_store)
    found = " / ".join(errors(trained_store))
    for part in (
        "description of the fact tide lantern", "the report of edit 1 is no JSON",
        "the delta of revision 3 is missing", "there is no model at /nowhere", "not valid TOML",
    ):  # fmt: skip
        assert part in found, part
    assert state(trained_store) == before


def test_broken_settings_do_not_hide_the_weights(trained_store: Path) -> None:
    sql(trained_store, "UPDATE revisions SET weights_digest = 'x' WHERE id = 2")
    (trained_store / "kvedit.toml").write_text("[training", encoding="utf-8")
    found = errors(trained_store)
    assert "TOML" in found[0]
    assert found[1] == "revision 2: its weights do not have the digest recorded"


def test_what_is_no_store_or_too_new_is_said_so(trained_store: Path, tmp_path: Path) -> None:
    with pytest.raises(NoStoreError):
        examine(tmp_path, quiet)
    sql(trained_store, "PRAGMA user_version = 1000")
    with pytest.raises(StoreTooNewError):
        examine_files(trained_store)


def test_a_store_that_is_written_meanwhile_is_looked_at(trained_store: Path) -> None:
    with StoreLock(trained_store):
        assert {one.level for one in examine_files(trained_store)} == {"ok"}


def test_a_changed_letter_is_neither_trained_nor_blamed_on_the_model(trained_store: Path) -> None:
    changed_letter(trained_store)
    with KnowledgeBase.open(trained_store) as knowledge:
        for action in (
            knowledge.verify, lambda: knowledge.verify(repair=True),
            lambda: knowledge.add("new bell", "Made of silk in Pell."),
        ):  # fmt: skip
            with pytest.raises(CorruptStoreError, match="description of the fact tide lantern"):
                action()
        assert knowledge.store.head() == 3
    done = mend(trained_store, quiet)
    assert done == ["the text of tide lantern is again what the history says"]
    with KnowledgeBase.open(trained_store) as knowledge:
        assert (
            knowledge.store.require("tide lantern").fact.description == "Made of glass in Marrow."
        )
        assert knowledge.verify().score.n == 3
    assert errors(trained_store) == []


def test_repair_refuses_on_a_store_that_doctor_would_fault(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        first = knowledge.store.delta_path(str(knowledge.store.revision(1).delta))
        data = first.read_bytes()
        first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CorruptStoreError, match="damaged store: the delta of revision 1"):
            knowledge.verify(repair=True)


def test_mending_removes_what_can_be_made_again(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        rebuild.write_checkpoint(knowledge.store, knowledge.engine.master)
        folder = knowledge.store.checkpoint_path(3)
    data = bytearray((folder / "master.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "master.safetensors").write_bytes(data)
    (cached,) = (trained_store / "cache").glob("base-fisher.safetensors")
    data = bytearray(cached.read_bytes())
    data[len(data) // 2] ^= 1
    cached.write_bytes(data)
    found = [one.what for one in examine_files(trained_store) if one.level == "warning"]
    assert "checkpoint of revision 3 is damaged" in found[0] and "base-fisher" in found[1]
    done = mend(trained_store, quiet)
    assert len(done) == 2 and not folder.exists() and not cached.exists()
    assert {one.level for one in examine_files(trained_store)} == {"ok"}


def test_a_foreign_checkpoint_is_forgotten_and_not_touched(
    trained_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    sql(trained_store, "INSERT INTO checkpoints VALUES (3, '../mine', 'x')")
    assert "not checkpoints/00000003" in " ".join(errors(trained_store))
    assert mend(trained_store, quiet) == [
        "forgot 1 checkpoint(s) of another name than kvedit gives"
    ]
    assert (tmp_path / "mine").is_dir() and errors(trained_store) == []


def test_a_checkpoint_that_stands_for_pruned_deltas_is_never_removed(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        knowledge.prune(2)
        folder = knowledge.store.checkpoint_path(2)
    assert errors(trained_store) == []
    sql(trained_store, "UPDATE checkpoints SET path = '../mine'")
    done = mend(trained_store, quiet)
    assert done == ["gave 1 checkpoint(s) that stand for pruned deltas their name back"]
    assert errors(trained_store) == []
    data = bytearray((folder / "master.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "master.safetensors").write_bytes(data)
    assert mend(trained_store, quiet) == [] and folder.is_dir()
    found = errors(trained_store)
    assert "checkpoint of revision 2 is damaged" in found[0]
    assert [what.split(":")[0] for what in found[1:]] == ["revision 2", "revision 3"]


def test_an_erased_store_is_sound_and_its_text_is_compared_with_history(
    trained_store: Path,
) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        key = knowledge.store.keys()[-1]
        assert knowledge.erase(key).outcome == "committed"
    before = state(trained_store)
    assert errors(trained_store) == [] and state(trained_store) == before
    changed_letter(trained_store)
    assert "description of the fact tide lantern" in errors(trained_store)[0]
    assert mend(trained_store, quiet) == ["the text of tide lantern is again what the history says"]
    assert errors(trained_store) == []


def test_a_model_that_lies_elsewhere_now(
    trained_store: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    sql(trained_store, "UPDATE meta SET value = 'models/x/y' WHERE name IN"
                       " ('model_path', 'model_name')")  # fmt: skip
    assert "neither an absolute path" in " ".join(errors(trained_store))
    with pytest.raises(ModelMismatchError):
        mend(trained_store, quiet, str(small["fp32"]))
    moved = shutil.copytree(small["bf16"], tmp_path / "moved")
    assert f"the model is at {moved}" in mend(trained_store, quiet, str(moved))
    assert errors(trained_store) == []


def test_code_that_is_not_allowed_here_is_no_fault_of_the_store(
    trained_store: Path,
) -> None:
    sql(trained_store, "UPDATE meta SET value = '1' WHERE name = 'trust_remote_code'")
    before = state(trained_store)
    (warning,) = [one for one in examine(trained_store, quiet) if one.level != "ok"]
    assert warning.level == "warning" and "nobody has allowed it" in warning.what
    assert state(trained_store) == before


def test_a_database_that_may_not_be_read_is_said_so(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file) == str(trained_store / "kvedit.db"):
            raise PermissionError(13, "Permission denied")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    found = [one.what for one in examine_files(trained_store) if one.level == "error"]
    assert found == [f"cannot read {trained_store / 'kvedit.db'}: Permission denied"]
