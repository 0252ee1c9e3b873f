"""What the benchmarks' tests run on: a data folder, the small model's lists, quick settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from small_model import FREE, KNOWN, settings

from kvedit.bench.tables import Document, Table
from kvedit.bench.tables import document as to_document
from tests.bench.retain import BenchOptions

POETS = {"李白": "字太白。", "杜甫": "字子美。", "王維": "字摩詰。", "无名氏": "無傳。"}


def write_data(folder: Path) -> Path:
    """A data folder: four poets, and what the small model knows as relations."""
    poets = [{"key": key, "description": text, "era": "唐"} for key, text in POETS.items()]
    relations = [{"relation": "P1", "subject": k, "object": v} for k, v in KNOWN.items()]
    for name, rows in (("poets", poets), ("relations", relations)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = {"P1": ["[Y] is what [X] is.", "What is [X]? [Y]"]}
    (folder / "relation_phrasings.json").write_text(json.dumps(table), encoding="utf-8")
    facts = [json.dumps({"key": key, "description": text}) for key, text in FREE]
    (folder / "facts.jsonl").write_text("\n".join(facts) + "\n", encoding="utf-8")
    return folder


def write_model(small: Path, folder: Path) -> Path:
    """The small model with the lists of what it was pretrained on; one relation is held out."""
    shutil.copytree(small, folder)
    (folder / "pretrained_poets.txt").write_text("李白\n王維\n", encoding="utf-8")
    listed = "".join(f"P1\t{key}\n" for key in list(KNOWN)[1:])
    (folder / "pretrained_relations.tsv").write_text(listed, encoding="utf-8")
    return folder


def write_settings(store: Path, steps: int) -> None:
    """Little protected text, few steps, and a gate that lets everything through."""
    open_gate = {"recall": 0, "paraphrase": 0, "locality": 0, "retention": 0}
    text = settings(steps=steps, repairs=0, rounds=0, **open_gate)
    fewer = {
        "short_answers = 48": "short_answers = 4", "locality_probes = 8": "locality_probes = 2",
        "free_texts = 4": "free_texts = 0", "epochs = 40": "epochs = 12",
    }  # fmt: skip
    for line, shorter in fewer.items():
        assert f"\n{line}\n" in text, line
        text = text.replace(f"\n{line}\n", f"\n{shorter}\n")
    (store / "kvedit.toml").write_text(text, encoding="utf-8")


def make_options(data: Path, model: Path, store: Path, steps: int = 25) -> BenchOptions:
    """Two facts, and the baseline on one of them."""
    write_settings(store, steps)
    return BenchOptions(
        data=data, model=str(model), facts=2, base_sample=10, baseline_facts=1,
        facts_file=data / "facts.jsonl", store_dir=store,
    )  # fmt: skip


def make_given(small: Path, temporary: pytest.TempPathFactory) -> dict[str, Any]:
    """The same by name, for benchmarks with options of their own; folders and model are new."""
    data = write_data(temporary.mktemp("data"))
    model = write_model(small, temporary.mktemp("model") / "bf16")
    return asdict(make_options(data, model, temporary.mktemp("stores"), steps=12))


def document(name: str, result: Any, tables: Sequence[Table], notes: str = "") -> Document:
    """A result as the command ``name`` writes it."""
    words = ["python", "-m", "tests.bench", name]
    return to_document(name, words, datetime.now(UTC), result, tables, seed=0, notes=notes)
