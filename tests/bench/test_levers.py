"""What each lever is worth, on the small model: one is off at a time, all else is the same."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvedit.config import Config
from kvedit.errors import UsageError
from kvedit.store.store import Store
from tests.bench import levers
from tests.bench.bench_data import make_given
from tests.bench.commands import bench
from tests.bench.strategies import StrategiesResult, StrategyOptions

FACTS = 2


@pytest.fixture(scope="module")
def options(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StrategyOptions:
    baseline = make_given(small["bf16"], tmp_path_factory)
    settings = baseline["store_dir"] / "kvedit.toml"
    text = settings.read_text(encoding="utf-8")
    assert "max_samples = 96" in text
    settings.write_text(text.replace("max_samples = 96", "max_samples = 400"), encoding="utf-8")
    return StrategyOptions(**{**baseline, "facts": FACTS}, groups=("2",))


@pytest.fixture(scope="module")
def result(options: StrategyOptions) -> StrategiesResult:
    """Everything, and without two of the levers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levers, "LEVERS", (levers.LEVERS[1], levers.SEARCH))
        return levers.levers(options, lambda event: None)


def test_a_lever_is_a_setting_that_is_on() -> None:
    for lever in levers.LEVERS:
        section = getattr(Config(), lever.section)
        assert lever.setting in {item.name for item in fields(section)}
        on = getattr(section, lever.setting)
        assert on != lever.off and type(on) is type(lever.off)


def test_one_is_off_at_a_time(result: StrategiesResult, options: StrategyOptions) -> None:
    names = ["everything", "no replay of protected text", "no search for what is known"]
    assert [run.strategy for run in result.runs] == names
    assert [point.method for point in result.points][:3] == names
    assert result.points[-1].method == "baseline"
    assert options.store_dir is not None
    given = tomllib.loads((options.store_dir / "kvedit.toml").read_text(encoding="utf-8"))
    read = [Config.load(options.store_dir / name / "kvedit.toml") for name in names]
    assert read[0] == Config.load(options.store_dir / "kvedit.toml") and given
    assert read[1] == replace(read[0], group=replace(read[0].group, reference_texts=0))
    assert read[2] == replace(read[0], protect=replace(read[0].protect, samples_per_fact=0))


def test_what_was_searched_for_serves_all(
    result: StrategiesResult, options: StrategyOptions
) -> None:
    assert options.store_dir is not None
    texts = []
    for run in result.runs:
        with Store.open(options.store_dir / run.strategy) as store:
            rows = store.protected("control")
        texts.append([row.answer for row in rows])
        assert sum(run.outcomes.values()) == FACTS
    assert texts[0] == texts[1]
    assert set(texts[2]) < set(texts[0])


def test_stores_of_another_run_are_left_alone(
    result: StrategiesResult, options: StrategyOptions
) -> None:
    with pytest.raises(UsageError, match="another run"):
        levers.levers(options, lambda event: None)


def test_settings_are_written_as_they_were_read(tmp_path: Path) -> None:
    text = """
[prompts]
system = "Say \\"yes\\" or\\nno."
template_options = { enable_thinking = false, depth = 2 }
[training]
step_gain = 1e-05
"""
    document = tomllib.loads(text)
    assert tomllib.loads(levers.as_toml(document)) == document


def test_the_command_is_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(bench, ["levers", "--data", str(tmp_path), "--group", "several"])
    assert done.exit_code == 2 and "neither a number" in done.stderr
