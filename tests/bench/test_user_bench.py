"""`kvedit bench` on the small model: what each command measures, shows and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_model import FREE, settings

from kvedit.bench import architectures, memory, speed, strategies, tables
from kvedit.cli import cli
from kvedit.cli.commands.bench import bench
from kvedit.errors import InvalidFactError, UsageError

HEADING = {"schema", "benchmark", "command", "commit", "machine", "model", "seed", "started",
           "seconds", "tables"}  # fmt: skip


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of four facts."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    rows = [json.dumps({"key": key, "description": text}) for key, text in FREE[:4]]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for the small model, with a gate that lets everything through."""
    gate = {"recall": 0, "paraphrase": 0, "locality": 0, "retention": 0}
    path = tmp_path_factory.mktemp("config") / "kvedit.toml"
    path.write_text(settings(steps=12, repairs=0, rounds=0, **gate), encoding="utf-8")
    return ["--model", str(small["bf16"]), "--config", str(path)]


def run(*words: str) -> Result:
    # Through the program, as users do: click keeps the first help option that it makes.
    return CliRunner().invoke(cli, ["-q", "bench", *words], prog_name="kvedit")


def document_of(done: Result) -> dict[str, Any]:
    """What --json printed."""
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    assert document.keys() >= HEADING and document["schema"] == tables.SCHEMA
    assert all({"title", "columns", "rows"} == set(table) for table in document["tables"])
    assert document["machine"].keys() >= {"cores", "processor", "torch"}
    return document


@pytest.mark.parametrize("name", sorted(bench.commands))
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0 and f"kvedit bench {name}" in done.output


def test_facts_are_the_first_valid_ones_of_a_file(facts: Path, tmp_path: Path) -> None:
    assert [fact.key for fact in speed.load_facts(str(facts), 2)] == [key for key, _ in FREE[:2]]
    (tmp_path / "bad.jsonl").write_text('{"description": "no key"}\n' * 2, encoding="utf-8")
    with pytest.raises(InvalidFactError, match='"key" is missing'):
        speed.load_facts(str(tmp_path / "bad.jsonl"), 2)
    (tmp_path / "empty.jsonl").write_text(
        '{"key": "", "description": "no key"}\n', encoding="utf-8"
    )
    with pytest.raises(UsageError, match="no facts"):
        speed.load_facts(str(tmp_path / "empty.jsonl"), 2)


def test_parts_of_the_time_add_up() -> None:
    edits = [
        speed.EditTime(key="a", outcome="committed", seconds=3.0, steps=1, timings={"train": 2.0}),
        speed.EditTime(key="b", outcome="rejected", seconds=1.0, steps=1,
                       timings={"train": 0.5, "other": 0.5}),
    ]  # fmt: skip
    assert speed.parts_of(edits) == {"train": 2.5, "other": 0.5}
    ingested = speed.IngestTime(facts=4, committed=3, seconds=2.0, parts={"train": 2.0})
    result = speed.SpeedResult(model="m", setup_seconds=1.0, edits=tuple(edits), ingested=ingested)
    seconds, parts = speed.tables(result)
    assert seconds.rows[0][1:] == ("1 committed, 1 rejected", "2.00", "2.00")
    assert seconds.rows[1][1:] == ("3 of 4 committed", "-", "0.50")
    assert ("one by one", "train", "2.50", "83.3%") in parts.rows


def test_memory_is_estimated_without_the_weights(
    small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "temporary_store", None)
    document = document_of(run("memory", "--model", str(small["bf16"]), "--estimate", "--json"))
    parts = document["estimate"]  # the gradients are gone when the adapter is there
    at_once = sum(parts.values()) - min(parts["gradients"], parts["adapter"])
    assert document["total"] == at_once > 0
    assert document["peak"] is None and len(document["tables"]) == 1


def test_memory_of_one_edit_is_measured(small: dict[str, Path]) -> None:
    document = document_of(run("memory", "--model", str(small["bf16"]), "--json"))
    assert document["peak"] > 2**20 and 0 < document["steps"] <= memory.STEPS
    assert document["tables"][1]["rows"][0][0] == "system memory"


def test_a_small_random_model_is_edited_undone_and_exported(small: dict[str, Path]) -> None:
    document = document_of(run("architectures", "--model", str(small["fp32"]), "--json"))
    (row,) = document["rows"]
    assert row["edited"] and row["exported"] and row["undone"] and row["matrices"] == 7
    assert row["problem"] == ""


@pytest.mark.parametrize(
    ("family", "matrices"),
    [
        ("gpt2", 4),  # Conv1D
        pytest.param("phi3", 4, marks=pytest.mark.slow),  # fused projections
    ],
)
def test_other_ways_to_name_and_store_projections(family: str, matrices: int) -> None:
    result = architectures.architectures(None, [family], lambda event: None)
    assert result.passed, result
    assert result.rows[0].matrices == matrices


def test_an_architecture_that_cannot_be_built_is_a_row_that_says_why() -> None:
    done = run("architectures", "no-such-family")
    assert done.exit_code != 0 and "no-such-family" in done.stdout
    result = architectures.architectures(None, ["no-such-family"], lambda event: None)
    assert not result.passed and "no-such-family" in result.rows[0].problem


@pytest.mark.slow
def test_speed(facts: Path, words: list[str]) -> None:
    document = document_of(run("speed", str(facts), *words, "--single", "1", "--json"))
    assert [edit["key"] for edit in document["edits"]] == [FREE[0][0]]
    assert document["ingested"]["facts"] == 3
    parts = document["ingested"]["parts"]
    assert sum(parts.values()) == pytest.approx(document["ingested"]["seconds"], rel=0.01)
    assert {speed.EXTRACTION, "train", "other"} <= set(parts)


@pytest.mark.slow
def test_strategies_begin_with_the_same_store(facts: Path, words: list[str]) -> None:
    groups = ["--group", "1", "--group", "2"]
    done = run("strategies", str(facts), *words, *groups, "--json")
    document = document_of(done)
    assert [one["group"] for one in document["runs"]] == [1, 2]
    for one in document["runs"]:
        assert one["facts"] == one["recall"]["n"] == 4 and one["recall"]["protocol"] == "generated"
        assert one["unseen"]["n"] > 0 and one["ingest_seconds"] > 0
    first, second = (one["locality"]["n"] for one in document["runs"])
    assert first == second > 0
    (table,) = document["tables"]
    assert [row[0] for row in table["rows"]] == ["one by one", "2"]
    assert document["notes"] == strategies.NOTES


@pytest.mark.slow
def test_every_family_that_is_known_can_be_edited() -> None:
    result = architectures.architectures(None, [], lambda event: None)
    broken = {row.name: row.problem for row in result.rows if row.problem}
    assert all("no model type" in why or "not in transformers" in why for why in broken.values()), (
        broken
    )
