"""Erasing, measured: what is said before and after it, and which files have the texts."""

from __future__ import annotations

import json
from pathlib import Path

from small_model import FREE

from tests.bench.forget import SEED, ForgetOptions, forget, tables


def test_a_run_finds_the_texts_before_and_not_after(
    small: dict[str, Path], tmp_path: Path, random_training: None
) -> None:
    # Texts that the small model does not give as answers to other keys, which stay.
    facts = [(key, f"{text[:-1]}, on quay 70{len(key)}.") for key, text in FREE[:3]]
    lines = [json.dumps({"key": key, "description": text, "lang": "en"}) for key, text in facts]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    options = ForgetOptions(
        facts_files=(file,), facts=2, others=1, model=str(small["bf16"]), time=2.0
    )
    result = forget(options, lambda event: None)
    assert result.outcome == "committed"
    assert "kvedit.db-wal" in result.files_before or "kvedit.db" in result.files_before
    assert result.files_after == ()
    assert [one.model for one in result.said] == ["base model", "taught", "erased", "never taught"]
    assert all(one.recalled.n == 2 and one.loss > 0 for one in result.said)
    first, second = tables(result)
    assert first.rows[-1][-1] == "2 of 2" and second.rows[1] == ("after it", "none")


def test_the_seed_has_enough_facts() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SEED) >= 28
