"""The list of public files: what it says, and what it finds wrong in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.bench import data
from tests.bench.commands import bench

VALUES: dict[tuple[type, ...], Any] = {data.TEXT: "text", data.LIST: ["text"], data.NUMBER: 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good row in every file."""
    for file in data.FILES:
        row = {name: VALUES[kinds] for name, kinds in file.fields.items()}
        text = json.dumps(row or {"P19": ["[X] was born in [Y]."]})
        (tmp_path / file.name).write_text(text + "\n", encoding="utf-8")
    return tmp_path


def test_every_file_has_an_origin_a_licence_and_fields() -> None:
    text = "\n".join(data.lines())
    for file in data.FILES:
        assert file.name in text and file.origin in text and file.licence in text


def test_a_good_folder_passes(folder: Path) -> None:
    done = CliRunner().invoke(bench, ["data", "--data", str(folder)])
    assert done.exit_code == 0 and "well formed" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("poets.jsonl", None, "missing (from github.com/chinese-poetry"),
        ("poets.jsonl", "", "empty"),
        ("poets.jsonl", "{", "line 1 is not JSON"),
        ("poets.jsonl", '{"key": "a", "description": "b"}', "line 1: has no era"),
        ("poets.jsonl", '{"key": 1, "description": "b", "era": "c"}', "line 1: key must be text"),
        ("zsre_1500.jsonl", "[1]", "line 1: not an object"),
        ("relation_phrasings.json", '{"P19": "[X]"}', "not lists of texts with [X]"),
        ("relation_phrasings.json", "{}", "not lists of texts with [X]"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, name: str, text: str | None, why: str) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text, encoding="utf-8")
    done = CliRunner().invoke(bench, ["data", "--data", str(folder)])
    assert done.exit_code == 4 and f"{name}: {why}" in done.stderr
