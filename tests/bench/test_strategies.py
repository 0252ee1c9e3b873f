"""The ways of training side by side, on the small model: marks, clock, tables, what is kept."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_model import FREE

from kvedit.errors import Interrupted
from kvedit.events import Status
from tests.bench import (
    course,
    plots,
    report_strategies,
    strategies,
)
from tests.bench.asking import AskedModel, Kept, Point, Task, measure
from tests.bench.bench_data import document, make_given
from tests.bench.commands import bench
from tests.bench.course import group_marks, paces
from tests.bench.documents import markdown
from tests.bench.strategies import StrategiesResult, StrategyOptions

FACTS = 4


@pytest.fixture(scope="module")
def options(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StrategyOptions:
    """Four facts in twos, all at once, and the baseline on one."""
    baseline = make_given(small["bf16"], tmp_path_factory)
    return StrategyOptions(**{**baseline, "facts": FACTS}, groups=("2", "all"))


@pytest.fixture(scope="module")
def calls() -> list[tuple[StrategiesResult, Point | None]]:
    """What was calls while ``result`` was measured."""
    return []


@pytest.fixture(scope="module")
def result(
    options: StrategyOptions, calls: list[tuple[StrategiesResult, Point | None]]
) -> StrategiesResult:
    """One run of the benchmark, with a mark after two facts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "EARLY_MARKS", (2,))
        return strategies.strategies(
            options, lambda event: None, lambda so_far, point: calls.append((so_far, point))
        )


def test_marks() -> None:
    assert group_marks(20) == [16, 20]
    assert group_marks(300) == [16, 32, 64, 128, 256, 300]
    assert group_marks(2500) == [16, 32, 64, 128, 256, 300, 512, 1000, 2000, 2500]


def test_what_a_group_took_is_shared_by_its_facts() -> None:
    trail = [(0, 0.5), (4, 2.0), (8, 6.0), (8, 7.0), (12, 12.0)]
    assert paces(trail, 4) == (0.5, 1.5)
    assert paces(trail, 6) == (pytest.approx(4 / 6), pytest.approx(8 / 6))
    assert paces([(0, 0.0), (12, 6.0)], 6) == (0.5, 0.5)
    assert paces([(0, 1.0)], 1) == paces([], 1) == (None, None)


def test_each_way_is_one_run_in_its_own_store(
    result: StrategiesResult, options: StrategyOptions
) -> None:
    assert [(p.method, p.after, p.asked) for p in result.points] == [
        ("groups of 2", 2, 1), ("groups of 2", 4, None), ("one group", 4, None),
        ("baseline", 1, None),
    ]  # fmt: skip
    first, last = result.points[0], result.points[1]
    assert first.tried.generated.n == first.tried.forced.n == 2
    assert first.phrasings.generated.n < first.phrasings.forced.n, "one was generated of several"
    assert last.phrasings.generated.n == last.phrasings.forced.n
    assert last.relations.generated.n == first.relations.generated.n > 0
    for run in result.runs:
        assert sum(run.outcomes.values()) == run.facts == FACTS and run.stopped == ""
        assert sum(run.parts.values()) == pytest.approx(run.seconds, abs=0.1)
        assert (
            run.parts["train"] > 0
            and run.parts["journal"] > 0
            and run.retention.n == run.outcomes["committed"]
        )
    assert options.store_dir is not None
    assert all((options.store_dir / f"group-{g}" / "kvedit.db").is_file() for g in ("2", "all"))


def test_the_clock_leaves_measuring_out(result: StrategiesResult) -> None:
    twos = result.runs[0]
    assert [done for done, _ in twos.trail] == [0, 2, 4]
    assert twos.first == pytest.approx(twos.trail[1][1] / 2, abs=0.01)
    assert result.points[1].seconds == pytest.approx(twos.seconds / FACTS, rel=0.05)


def test_every_measurement_is_reported_at_once(
    result: StrategiesResult, calls: list[tuple[StrategiesResult, Point | None]]
) -> None:
    first, point = calls[0]
    assert (
        point is not None
        and first.points == (point,)
        and first.runs == ()
        and first.base == result.base
    )
    assert calls[-1][0] == result
    assert [point for _, point in calls if point is not None] == list(result.points)
    assert "groups of 2, 2 facts (1 asked): recalled" in report_strategies.line(point)


def test_one_phrasing_of_each_is_drawn(options: StrategyOptions, small: dict[str, Path]) -> None:
    from kvedit.model import loading
    from kvedit.model.prompts import Renderer

    base = loading.load(str(small["bf16"]))
    renderer = Renderer(base.tokenizer, context=base.context)
    examples = [renderer.example(f"{way} {FREE[0][0]}?", "No.") for way in ("What is", "Tell me")]
    asked: list[int] = []

    class Counting(AskedModel):
        def generated(self, examples: object) -> list[bool]:
            asked.append(len(list(examples)))  # type: ignore[call-overload]
            return [True] * asked[-1]

    asked_model = Counting(base.model, renderer)
    tasks = [Task(examples, [], True), Task(examples, examples, False)]
    point = measure("m", 2, asked_model, tasks, Kept((), ()), random.Random(0))
    assert asked == [2, 0, 0, 0, 0]
    assert (point.tried.generated.n, point.committed.generated.n) == (2, 1)


def test_tables_and_picture(result: StrategiesResult) -> None:
    made = document(
        "strategies", result, report_strategies.tables(result), report_strategies.notes(result)
    )
    page = markdown(made)
    for text in ("| groups of 2 | 2 | 1 |", "| one group | 4 | all |", "4 committed", "train"):
        assert text in page
    assert made["runs"][0]["trail"][-1][0] == 4
    held = next(a for a in plots.figure(made).axes if a.get_title() == "New facts held (ERR)")
    names = [bars.get_label() for bars in held.containers]
    assert names == ["groups of 2", "one group", "baseline"]


def test_a_group_is_a_number_or_a_word(tmp_path: Path) -> None:
    words = ["strategies", "--data", str(tmp_path), "--group", "some"]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 2 and "neither a number" in done.stderr


def test_the_command_says_and_keeps_each_measurement(
    options: StrategyOptions, tmp_path: Path
) -> None:
    assert options.store_dir is not None
    store, file = tmp_path / "stores", tmp_path / "result.json"
    store.mkdir()
    (store / "kvedit.toml").write_bytes((options.store_dir / "kvedit.toml").read_bytes())
    words = ["strategies", "--data", str(options.data), "--model", str(options.model)]
    words += ["--facts", "2", "--facts-file", str(options.facts_file), "--group", "all"]
    words += ["--no-baseline", "--store-dir", str(store), "--json", str(file)]
    words += ["--plot", str(tmp_path / "held.svg")]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 0, done.output
    assert "one group, 2 facts (all asked): recalled" in done.stderr
    assert "one group: 2 of 2, 2 committed" in done.stderr
    assert "| one group | 2 | all |" in done.stdout
    assert len(json.loads(file.read_text(encoding="utf-8"))["runs"]) == 1
    assert (tmp_path / "held.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_in_its_store(
    options: StrategyOptions, tmp_path: Path
) -> None:
    """Stopped when the first of two groups has been measured; the second run knows that one."""
    measured: list[Point] = []

    def stop(_: StrategiesResult, point: Point | None) -> None:
        raise KeyboardInterrupt

    def tell(_: StrategiesResult, point: Point | None) -> None:
        measured.extend([] if point is None else [point])

    here = replace(options, store_dir=tmp_path, groups=("2",), baseline_facts=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "EARLY_MARKS", (2,))
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            strategies.strategies(here, lambda event: None, stop)
        left = json.loads((tmp_path / "group-2" / course.LOG).read_text(encoding="utf-8"))
        again = replace(here, resume=True)
        events: list[Any] = []
        resumed = strategies.strategies(again, events.append, tell)
    assert [point.after for point in measured] == [FACTS]
    said = [event.phase for event in events if isinstance(event, Status)]
    assert f"groups of 2: {FACTS} of {FACTS}, {FACTS} committed, 0 rejected, 0 failed" in said
    (run,) = resumed.runs
    assert run.facts == sum(run.outcomes.values()) == FACTS
    done, seconds = left["trail"][-1]
    assert done == 2 and run.trail[: len(left["trail"])][-1] == (2, round(seconds, 3))
    assert run.seconds > seconds
    assert [score.recall.generated.n for score in resumed.base] > [0, 0]
