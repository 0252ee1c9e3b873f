"""A whole run on the small model: cost first, parts kept, tables and picture from the document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_model import KNOWN

from kvedit.errors import UsageError
from tests.bench import plots
from tests.bench.bench_data import document
from tests.bench.commands import bench
from tests.bench.field import run, table
from tests.bench.field.conftest import make_record
from tests.bench.field.method import BATCH, SEQUENTIAL
from tests.bench.field.run import FieldOptions, FieldResult, Row, field_, measure_part

METHODS = ("ft-m", "p-tuning-v2", "retrieval")


def row_of(number: int) -> dict[str, Any]:
    record = make_record(number)
    prompt, answer = record.locality[0]
    return {
        "subject": record.key, "prompt": record.prompts[0], "target_new": record.target,
        "ground_truth": record.truth, "rephrase_prompt": record.paraphrases[0],
        "locality_prompt": prompt, "locality_ground_truth": answer,
    }  # fmt: skip


@pytest.fixture(scope="module")
def options(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FieldOptions:
    """Two records to edit, and what the model knows to be asked."""
    folder = tmp_path_factory.mktemp("field")
    known = [{**row_of(0), "subject": key, "prompt": f"What is {key}?", "ground_truth": text}
             for key, text in list(KNOWN.items())[8:11]]  # fmt: skip
    choices = [
        {"task": task, "prompt": f"What is {key}?", "choices": [KNOWN[key], "No."], "answer": 0}
        for task, key in zip("abab", list(KNOWN)[4:8], strict=True)
    ]
    files = {"data": [row_of(0), row_of(1), *known], "abilities": choices}
    for name, rows in files.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return FieldOptions(
        base=str(small["bf16"]), data=folder / "data", n=2, methods=METHODS, known=3,
        abilities=folder / "abilities", ability_questions=2, store_dir=folder / "parts",
    )  # fmt: skip


@pytest.fixture(scope="module")
def said() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def result(options: FieldOptions, said: list[Any]) -> FieldResult:
    """One run, every part in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "in_child", measure_part)
        return field_(options, said.append, lambda so_far, row: said.append(row))


def test_every_method_has_a_row_of_its_own(result: FieldResult) -> None:
    assert [(row.method, row.way) for row in result.rows] == [
        ("ft-m", SEQUENTIAL), ("p-tuning-v2", BATCH), ("retrieval", SEQUENTIAL)
    ]  # fmt: skip
    tuned, soft, retrieval = result.rows
    assert [point.after for point in tuned.points] == [1, 2] and len(tuned.edits) == 2
    assert [point.after for point in soft.points] == [2] and soft.median_seconds is None
    assert soft.points[0].err.n == 0 and tuned.points[-1].at_once.n == 2
    assert not tuned.points[0].abilities and len(tuned.points[-1].abilities) == 3
    assert result.base.reliability.passed == 0 and result.base.locality.rate == 1.0
    assert result.base.trr.n == 3 and retrieval.points[-1].trr.rate == 1.0
    assert retrieval.changes == "the prompt" and tuned.settings["learning_rate"] == 5e-4
    assert result.fingerprint and result.versions["torch"] and result.pass_seconds > 0
    assert not any(row.stopped for row in result.rows)


def test_the_cost_is_said_before_the_first_method(result: FieldResult, said: list[Any]) -> None:
    expected = [at for at, one in enumerate(said) if getattr(one, "phase", "") == "expected"]
    started = [at for at, one in enumerate(said) if getattr(one, "phase", "") == "ft-m: starting"]
    assert len(expected) == len(METHODS) + 1 and max(expected) < started[0]
    assert said[expected[-1]].text.startswith("all: at most about ")
    by_name = {cost.method: cost for cost in result.costs}
    assert by_name["retrieval"].editing == 0
    assert by_name["ft-m"].editing == pytest.approx(2 * 25 * result.pass_seconds)


def test_tables_keep_the_protocols_apart(result: FieldResult) -> None:
    tables = {one.title: one for one in table.tables(result)}
    for one in tables.values():
        assert all(len(cells) == len(one.columns) for cells in one.rows)
    assert tables["All methods, by free generation"].rows[0][0] == "(base model)"
    assert {"By likelihood, length-normalised", "Teacher-forced, token by token"} <= set(tables)
    assert len(tables["In the course of the edits"].rows) == 1 + 2 + 1 + 2
    assert len(tables["Multiple choice, by mean log-likelihood"].rows) == 3 * 3
    assert "rapidfuzz" in table.notes(result)
    assert table.line(result.rows[0]).startswith("ft-m (sequential), 2 edits: reliability ")


def test_the_results_page_has_a_row_for_each_method(result: FieldResult) -> None:
    from tests.docs.field_results import COLUMNS, figures
    from tests.docs.results import section

    whole = document("field", result, table.tables(result))
    made = figures(json.loads(json.dumps(whole)), "2026-01-01.md#entry", {"answer": "So."})
    assert [len(row["cells"]) for row in made["rows"]] == [len(COLUMNS)] * len(METHODS)
    tuned = result.rows[0].points[-1]
    assert made["rows"][0]["cells"][3] == [tuned.reliability.passed, tuned.reliability.n]
    assert "all together" in made["rows"][1]["cells"][0]
    assert "| [2026-01-01](log/2026-01-01.md#entry) |" in section(made)


def test_the_picture_has_a_line_for_each_method(result: FieldResult) -> None:
    figure = plots.figure(document("field", result, table.tables(result)))
    first, *_, legend = figure.axes
    assert len(first.containers) == len(METHODS)
    assert [text.get_text() for text in legend.get_legend().get_texts()] == [
        "ft-m (sequential)", "p-tuning-v2 (batch)", "retrieval (sequential)"
    ]  # fmt: skip
    assert first.get_ylabel() == "%"


def test_what_is_complete_is_not_measured_again(
    result: FieldResult, options: FieldOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def refuse(options: FieldOptions, name: str, *more: Any) -> None:
        started.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "in_child", refuse)
    assert field_(replace(options, resume=True), lambda event: None) == result
    with pytest.raises(KeyboardInterrupt):
        field_(replace(options, resume=True, known=2), lambda event: None)
    assert started == ["base"], "other questions: all is measured anew"


def test_a_method_that_was_stopped_starts_again_and_time_ends_one(
    result: FieldResult, options: FieldOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.store_dir is not None
    path = options.store_dir / "ft-m-sequential.json"
    half = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**half, "complete": False, "edits": half["edits"][:1]}))
    monkeypatch.setattr(run, "in_child", measure_part)
    again = replace(options, resume=True, methods=("ft-m",), minutes=0.0)
    row = field_(again, lambda event: None).rows[0]
    assert row.stopped and len(row.edits) == 1 and row.points[-1].after == 1
    assert row.points[-1].abilities, "all is asked where it ends"
    assert "stopped by the limit of time" in table._whole(replace(result, rows=(row,))).rows[1][-1]


def test_only_the_cost(options: FieldOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "in_child", measure_part)
    result = field_(replace(options, resume=True, cost=True), lambda event: None)
    assert not result.rows and len(result.costs) == len(METHODS)
    first = next(iter(table.tables(result)))
    assert first.title == "What was expected and what it took"


def test_a_wrong_name_ends_it_before_anything_is_measured(options: FieldOptions) -> None:
    with pytest.raises(UsageError, match="lora has no setting 'magic'"):
        field_(replace(options, settings=(("lora", "magic", 1),)), lambda event: None)
    with pytest.raises(UsageError, match="no method 'magic'"):
        field_(replace(options, methods=("magic",)), lambda event: None)


def test_the_options_reach_the_measurement(
    options: FieldOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[FieldOptions] = []

    def stop(chosen: FieldOptions, **more: Any) -> None:
        given.append(chosen)
        raise UsageError("enough")

    monkeypatch.setattr(run, "field_", stop)
    words = ["field", "--data", str(options.data), "--n", "7", "--methods", "lora, rome"]
    more = ["--way", "batch", "--minutes", "2", "--cost", "--set", "rome.contexts=1"]
    assert CliRunner().invoke(bench, [*words, *more]).exit_code == 2
    assert given[0].methods == ("lora", "rome") and given[0].marks == (1, 7)
    assert (given[0].ways, given[0].minutes, given[0].cost) == ((BATCH,), 2.0, True)
    assert given[0].changes("rome") == {"contexts": 1} and given[0].changes("lora") == {}
    assert CliRunner().invoke(bench, [*words, "--set", "rome.contexts=one"]).exit_code == 2
    assert CliRunner().invoke(bench, words[:-2]).exit_code == 2
    assert "kvedit" in given[1].methods and len(given[1].methods) == 20


def test_a_row_of_the_base_as_it_is_served(
    options: FieldOptions, result: FieldResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kvedit changes is compared with the base model in the dtype of its store."""
    asked: list[str] = []

    def note(options: FieldOptions, name: str, way: str, folder: Path, emit: Any) -> None:
        asked.append(name)
        measure_part(options, name, way, folder, emit)

    monkeypatch.setattr(run, "in_child", note)
    parts = run._Parts(replace(options, resume=True), options.store_dir, lambda event: None)  # type: ignore[arg-type]
    base = parts.get("base", "")
    assert parts.served(base).dtype == "torch.bfloat16" != base.dtype
    assert asked == ["base-as-served"]
    assert isinstance(result.rows[0], Row)
