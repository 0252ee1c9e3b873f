"""Times and capacity, on the small model: parts that add up, counted operations, single facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import FREE

from kvedit.bench.speed import EXTRACTION, EditTime, IngestTime
from kvedit.errors import Interrupted
from kvedit.facts.fact import Fact
from tests.bench import capacity as capacities
from tests.bench import (
    plots,
    report_capacity,
    report_speed,
)
from tests.bench.asking import Both, Point, both
from tests.bench.bench_data import document, make_given, write_model
from tests.bench.capacity import CapacityResult, bits, capacity, difference, largest, nearest
from tests.bench.documents import markdown
from tests.bench.retain import BenchOptions
from tests.bench.speed import (
    SpeedOptions,
    SpeedResult,
    ingest_ratio,
    matmul_rate,
    speed,
    spread,
)
from tests.bench.strategies import StrategyOptions


@pytest.fixture(scope="module")
def given(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for the small model."""
    return make_given(small["bf16"], tmp_path_factory)


@pytest.fixture(scope="module")
def timed(given: dict[str, Any]) -> SpeedResult:
    """Two facts one by one and by ingest, and a task profiled."""
    return speed(SpeedOptions(**given, ingest_facts=2), lambda event: None)


@pytest.fixture(scope="module")
def to_hold(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> StrategyOptions:
    """Two facts in one group, in a store that is kept."""
    options = StrategyOptions(**{**given, "baseline_facts": 0, "groups": ("all",)})
    return replace(options, store_dir=_copy(options, tmp_path_factory.mktemp("capacity")))


@pytest.fixture(scope="module")
def held(to_hold: StrategyOptions) -> CapacityResult:
    """The capacity measured with them."""
    return capacity(to_hold, (to_hold.model,), lambda event: None)


def _copy(options: BenchOptions, folder: Path) -> Path:
    assert options.store_dir is not None
    text = (options.store_dir / "kvedit.toml").read_text(encoding="utf-8")
    (folder / "kvedit.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_speed_parts_add_up(timed: SpeedResult) -> None:
    assert [edit.key for edit in timed.edits] == [key for key, _ in FREE[:2]]
    task = timed.task
    assert {"forward", "backward", "optimizer", "other"} == set(task.parts)
    assert all(spent > 0 for spent in task.parts.values())
    assert task.operations > 1e6 and task.steps > 0 and task.rehearsal == 2
    group = timed.group_task
    assert group is not None and (group.facts, group.rehearsal) == (2, 0)
    assert group.operations > task.operations / task.steps and group.parts["backward"] > 0
    assert sum(timed.ingested.parts.values()) == pytest.approx(timed.ingested.seconds, rel=0.01)
    assert {EXTRACTION, "train", "other"} <= set(timed.ingested.parts)
    assert timed.verified.facts == 2 and timed.verified.phrasings >= 16
    assert timed.peaks["one by one"] <= timed.peaks["ingest"] <= timed.peaks["baseline"]
    assert set(timed.matmul) == {"bfloat16", "float32"}


@pytest.mark.slow
def test_instruments_are_taken_off(timed: SpeedResult) -> None:
    assert torch.autograd.backward.__name__ == "backward"
    spent = dict(timed.task.parts)
    one = torch.ones(1, requires_grad=True)
    torch.optim.SGD([one], lr=0.1).step()
    assert timed.task.parts == spent


@pytest.mark.slow
def test_speed_tables(timed: SpeedResult) -> None:
    made = document("speed", timed, report_speed.tables(timed), report_speed.notes(timed))
    page = markdown(made)
    for text in ("| ingest |", "backward", "GFLOP/s", "training of 2 facts",
                 "matrix product, bfloat16", "MiB"):  # fmt: skip
        assert text in page
    learned = [edit.seconds for edit in timed.baseline if edit.outcome == "learned"]
    assert (timed.ingest_ratio is None) == (not learned)
    shares = plots.figure(made).axes[2]
    assert [t.get_text() for t in shares.get_yticklabels()] == [
        "one by one", "- its training", "ingest", "- of 2 facts",
    ]  # fmt: skip
    assert made["verified"]["facts"] == 2


def test_what_is_timed_by_itself_is_spread_over_all() -> None:
    facts = [Fact.create(f"key {at}", "A text.") for at in range(9)]
    assert spread(facts, 3) == [facts[0], facts[3], facts[6]]
    assert spread(facts, 9) == facts and spread(facts, 0) == []


def test_a_ratio_is_of_medians_and_has_an_interval() -> None:
    baseline = [
        EditTime(key="k", outcome=outcome, seconds=seconds, steps=1)
        for outcome, seconds in (("learned", 4.0), ("learned", 6.0), ("learned", 9.0))
    ]
    baseline.append(EditTime(key="k", outcome="not learned", seconds=100.0, steps=1))
    run = IngestTime(facts=5, committed=4, seconds=8.0, parts={})
    ratio = ingest_ratio(run, baseline)
    assert ratio is not None and ratio.value == 3.0, "6 s against 2 s a committed fact"
    assert 2.0 <= ratio.low < ratio.value < ratio.high <= 4.5
    searched = replace(run, parts={EXTRACTION: 2.0})
    assert ingest_ratio(searched, baseline) == ratio
    apart = ingest_ratio(searched, baseline, extracted=False)
    assert apart is not None and apart.value == 4.0
    assert ingest_ratio(replace(run, committed=0), baseline) is None
    assert ingest_ratio(run, baseline[3:]) is None


def test_a_matrix_product_has_a_rate() -> None:
    assert matmul_rate(torch.float32, torch.device("cpu"), side=64, seconds=0.01) > 1e6


def test_capacity(held: CapacityResult) -> None:
    (one,) = held.models
    assert [record.key for record in one.facts] == [key for key, _ in FREE[:2]]
    for record in one.facts:
        assert record.bits > 1 and record.tokens > 1 and record.outcome == "committed"
        assert record.margin is not None and record.held == (record.lost_after is None)
    assert one.stored_bits == sum(record.bits for record in one.facts if record.held)
    assert 0 < one.touched < one.parameters
    made = document("capacity", held, report_capacity.tables(held))
    page = markdown(made)
    assert len(plots.figure(made).axes[0].containers) == 2, "under both protocols"
    assert "similarity of the closest other key" in page and "held at the end" in page
    assert f"| {one.bits_per_touched:.2g} |" in page and one.bits_per_touched > 0
    assert len(made["models"][0]["facts"]) == 2


def test_a_capacity_run_that_goes_on_counts_the_same_bits(
    to_hold: StrategyOptions, held: CapacityResult
) -> None:
    again = replace(to_hold, resume=True)
    (one,) = capacity(again, (again.model,), lambda event: None).models
    assert one.facts == held.models[0].facts and one.stored_bits > 0


def test_all_models_are_trained_on_the_same_facts(
    given: dict[str, Any], small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model(small["bf16"], tmp_path / "other")
    (other / "pretrained_poets.txt").write_text("杜甫\n", encoding="utf-8")
    trained: list[list[str]] = []

    def train(ways: capacities.Ways, group: str) -> None:
        trained.append([fact.key for fact in ways._facts])
        raise Interrupted("enough")

    monkeypatch.setattr(capacities.Ways, "train", train)
    options = StrategyOptions(
        **{**given, "baseline_facts": 0, "facts_file": None, "store_dir": None}
    )
    for sources in ((given["model"], str(other)), (str(other), given["model"])):
        with pytest.raises(Interrupted):
            capacity(options, sources, lambda event: None)
    assert trained == [["无名氏"], ["无名氏"]]


def test_bits_are_those_of_the_answer(small: dict[str, Path]) -> None:
    from kvedit.model import loading
    from kvedit.model.prompts import Renderer

    base = loading.load(str(small["fp32"]))
    renderer = Renderer(base.tokenizer, context=base.context)
    examples = [renderer.example("What is tide lantern?", text) for _, text in FREE[:2]]
    costs = bits(base.model, examples)
    for example, cost in zip(examples, costs, strict=True):
        logits = base.model(torch.tensor([example.ids])).logits[0].float().log_softmax(-1)
        own = [
            logits[at - 1, example.ids[at]].item() for at in range(example.start, len(example.ids))
        ]
        assert cost == pytest.approx(-sum(own) / 0.6931472, rel=1e-3)
    assert bits(base.model, []) == []


def test_the_largest_number_is_before_the_first_fall() -> None:
    def point(after: int, passed: int, forced: int = 20) -> Point:
        recall = Both(
            both([True] * passed + [False] * (20 - passed), []).generated,
            both([], [True] * forced + [False] * (20 - forced)).forced,
        )
        whole = both([True], [True])
        return Point(
            method="m", after=after, tried=recall, committed=whole, phrasings=whole, poets=whole,
            relations=whole, any_poets=whole,
        )  # fmt: skip

    assert largest([point(16, 20), point(32, 19)]) == (32, False)
    assert largest([point(16, 20), point(32, 18), point(64, 20)]) == (16, True)
    assert largest([point(16, 20, forced=18)]) == (0, True)


def test_the_closest_other_key() -> None:
    assert nearest(["moss clock", "Moss clocks", "wind"])["moss clock"] > 90
    assert nearest(["alone"]) == {"alone": 0.0}


def test_a_difference_has_an_interval() -> None:
    gap = difference([5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert gap is not None and gap.value == 4.0 and 1.0 < gap.low < 4.0 < gap.high < 7.0
    assert difference([1.0], [2.0, 3.0]) is None
