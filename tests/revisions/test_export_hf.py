"""An export is a folder that plain transformers loads and that answers as the store does."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import FREE, KNOWN

from kvedit import KnowledgeBase
from kvedit.errors import DiskFullError, UsageError
from kvedit.files import TEMPORARY


def test_plain_transformers_gives_the_same_answers(trained: KnowledgeBase, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = trained.export(tmp_path / "out")
    assert (report.path, report.revision) == (str(tmp_path / "out"), 3)
    assert report.probes.protocol == "generated"
    assert (report.probes.passed, report.probes.n, report.mismatches) == (30, 30, ())
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for key in [*dict(FREE[:3]), *list(KNOWN)[:4]]:
        message = [{"role": "user", "content": f"What is {key}?"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert said == trained.ask(f"What is {key}?", max_new_tokens=40)
    for name in trained.engine.names:
        served = trained.engine.base.model.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).weight, served)


def test_a_dtype_can_be_asked_for(trained: KnowledgeBase, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = trained.engine.master.digest()
    trained.export(tmp_path / "out", dtype="fp32")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float32
    name = trained.engine.names[0]
    served = trained.engine.base.model.get_submodule(name).weight
    assert torch.equal(model.get_submodule(name).weight, served.float())  # what the gate judged
    assert trained.engine.master.digest() == before


def test_weights_in_shards(trained: KnowledgeBase, tmp_path: Path) -> None:
    report = trained.export(tmp_path / "out", max_shard_size="100KB")
    assert report.mismatches == ()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors.index.json" in names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    (tmp_path / "new").touch()  # every file may be read by whom a new one may
    modes = {path.stat().st_mode for path in [tmp_path / "new", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    with pytest.raises(UsageError, match="not a file size"):
        trained.export(tmp_path / "other", max_shard_size="many")


def test_a_folder_that_is_not_empty_is_refused(trained: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(UsageError, match="not an empty folder"):
        trained.export(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_file_in_its_place_is_refused(trained: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("keep me", encoding="utf-8")
    with pytest.raises(UsageError):
        trained.export(tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "keep me"


def test_an_empty_folder_is_filled(trained: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert trained.export(tmp_path / "out").mismatches == ()
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_unknown_dtype_is_refused(trained: KnowledgeBase, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int3"):
        trained.export(tmp_path / "out", dtype="int3")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_folder(
    trained: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskFullError):
        trained.export(tmp_path / "deep" / "out")
    monkeypatch.undo()
    assert not (tmp_path / "deep" / "out").exists()
    assert not list((tmp_path / "deep").glob(f"{TEMPORARY}*"))


def test_answers_that_differ_are_named(
    trained: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is the base model: the report must not be kind about it."""
    monkeypatch.setattr(type(trained.engine.master), "write_into", lambda self, model: None)
    report = trained.export(tmp_path / "out")
    assert report.probes.passed < report.probes.n == 30
    assert f"What is {FREE[0][0]}?" in report.mismatches
