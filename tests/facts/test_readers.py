"""Descriptions and facts from files, standard input and the command line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.readers import read_description
from tests.jsonl_facts import read_facts_jsonl


def test_a_description_comes_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(" from a file\n")
    assert read_description(path) == "from a file"
    assert read_description(None, " as typed ") == "as typed"


def test_exactly_one_source_must_be_given() -> None:
    with pytest.raises(UsageError, match="both"):
        read_description("f", "text")
    with pytest.raises(UsageError, match="no description"):
        read_description(None)
    with pytest.raises(InvalidFactError, match="--text is empty"):
        read_description(None, " ")


def test_facts_come_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + '{"key": "爐", "description": "夢中的爐"}\r\n\n'.encode()
        + b'{"key": "lamp", "description": "It shines.", "aliases": ["light"], "era": 3}'
    )
    assert list(read_facts_jsonl(path)) == [
        Fact.create("爐", "夢中的爐"),
        Fact.create("lamp", "It shines.", aliases=["light"]),
    ]


def test_facts_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"key": "k", "description": "d"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [fact.key for fact in read_facts_jsonl("-")] == ["k"]
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"7", "must be a JSON object"),
        (b'{"key": "k"}', '"description" is missing'),
        (b'{"key": "", "description": "d"}', "the key is empty"),
        (b'{"key": "\xff"}', "byte 0xff at offset 9"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"key": "k", "description": "d"}\n\n' + line + b"\n")
    facts = read_facts_jsonl(path)
    assert next(facts).key == "k"
    with pytest.raises(InvalidFactError, match=message) as caught:
        next(facts)
    assert f"{path}, line 3" in caught.value.message


def test_a_file_without_facts_or_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(InvalidFactError, match="is empty"):
        list(read_facts_jsonl(tmp_path / "empty"))
    with pytest.raises(UsageError, match="there is no file"):
        list(read_facts_jsonl(tmp_path / "none"))
    with pytest.raises(UsageError, match="cannot read"):
        list(read_facts_jsonl(tmp_path))
