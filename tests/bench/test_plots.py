"""Pictures of results: what is drawn is what was measured, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvedit.bench.tables import SCHEMA
from kvedit.errors import UsageError
from kvedit.events import Score
from tests.bench import plots
from tests.bench.commands import bench


def heading(benchmark: str) -> dict[str, Any]:
    """What the pictures read of a document's own values."""
    started = "2026-11-24T10:00:00+00:00"
    return {"schema": SCHEMA, "benchmark": benchmark, "started": started, "commit": "abc1234"}


def both(passed: int, n: int) -> dict[str, Any]:
    forced = Score(max(0, passed - 1), n)
    return {"generated": Score(passed, n, "generated").to_json(), "forced": forced.to_json()}


def point(method: str, after: int, poets: int, seconds: float | None = 2.0) -> dict[str, Any]:
    own = {name: both(after, after) for name in ("tried", "committed", "phrasings")}
    kept = {"poets": both(poets, 20), "relations": both(19, 20)}
    return {"method": method, "after": after, "asked": None, "seconds": seconds, **own, **kept}


STRATEGIES = {
    **heading("strategies"),
    "model": "tiny",
    "points": [
        point("groups of 4", 16, 18), point("groups of 4", 32, 15, 3.0),
        point("one group", 32, 12, None), point("baseline", 2, 0),
    ],
    "runs": [],
}  # fmt: skip
RETAIN = {
    **heading("retain"),
    "model": "tiny",
    "edits": [],
    "points": [point("kvedit", 1, 20), point("kvedit", 2, 19), point("baseline", 1, 1)],
}


def capacity_of(name: str, parameters: int, fell: bool) -> dict[str, Any]:
    points = [point("automatic groups", after, 20) for after in (16, 32)]
    return {
        "model": name, "parameters": parameters, "touched": parameters // 4, "largest": 32,
        "fell": fell, "stored_bits": 1000.0, "points": points,
    }  # fmt: skip


CAPACITY = {
    **heading("capacity"),
    "models": [
        capacity_of("/models/small", 1_000_000, True),
        capacity_of("large", 4_000_000, False),
    ],
}


def edit(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "timings": {"train": 0.75 * seconds, "probe": 0.25 * seconds}}


SPEED = {
    **heading("speed"),
    "model": "tiny",
    "edits": [edit(2.0), edit(4.0), edit(5.0)],
    "baseline": [{"seconds": value, "timings": {}} for value in (8.0, 9.0)],
    "ingested": {
        "facts": 4,
        "committed": 3,
        "seconds": 3.0,
        "parts": {"train": 2.0, "other": 1.0},
    },
    "group_task": {"facts": 2, "parts": {"forward": 1.0, "other": 1.0}},
    "task": {"parts": {"forward": 1.0, "backward": 3.0}},
    "ratios": [4.0, 2.0],
    "ratio": {"value": 3.0, "low": 2.0, "high": 4.0},
    "ingest_ratio": {"value": 8.5, "low": 8.0, "high": 9.0},
}
ALL = {"strategies": STRATEGIES, "retain": RETAIN, "capacity": CAPACITY, "speed": SPEED}


def panels(document: dict[str, Any]) -> dict[str, Any]:
    """The axes of a picture by their titles."""
    return {axes.get_title(): axes for axes in plots.figure(document).axes if axes.get_title()}


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The data of each curve with intervals, by its name."""
    curves = {}
    for bars in axes.containers:
        line = bars.lines[0]
        curves[bars.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return curves


@pytest.mark.parametrize("kind", ALL)
def test_a_result_is_known_by_its_parts(kind: str) -> None:
    assert plots.measured(ALL[kind]) == kind
    assert f"python -m tests.bench {kind}" in plots.figure(ALL[kind]).get_suptitle()
    assert "2026-11-24 · abc1234" in plots.figure(ALL[kind]).get_suptitle()


def test_strategies_have_a_line_each_for_every_measure() -> None:
    drawn = panels(STRATEGIES)
    assert set(drawn) == {title for _, title in plots.HELD} | {"Seconds a fact"}
    for _, title in plots.HELD:
        assert list(lines(drawn[title])) == ["groups of 4", "one group", "baseline"]
    x, y = lines(drawn["Base poets kept"])["groups of 4"]
    assert y == [90.0, 75.0]
    assert x == pytest.approx([16, 32], rel=0.03), "moved aside a little, no more"
    assert drawn["Base poets kept"].get_ylim()[0] < 0 < 100 < drawn["Base poets kept"].get_ylim()[1]


def test_intervals_are_those_of_the_result() -> None:
    axes = panels(STRATEGIES)["Base poets kept"]
    (segments,) = axes.containers[0].lines[2]
    ends = [sorted(value for _, value in segment) for segment in segments.get_segments()]
    wanted = [[100 * bound for bound in Score(passed, 20).interval()] for passed in (18, 15)]
    assert ends == [pytest.approx(pair) for pair in wanted]


def test_seconds_leave_out_what_was_not_timed() -> None:
    axes = panels(STRATEGIES)["Seconds a fact"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {"groups of 4": [2.0, 3.0], "one group": [], "baseline": [2.0]}


def test_it_is_said_where_not_all_phrasings_were_asked() -> None:
    some = {**STRATEGIES, "points": [{**point("one group", 16, 20), "asked": 1}]}
    texts = [text.get_text() for axes in plots.figure(some).axes for text in axes.texts]
    assert plots.SOME_ASKED in texts
    texts = [text.get_text() for axes in plots.figure(STRATEGIES).axes for text in axes.texts]
    assert plots.SOME_ASKED not in texts


def test_a_measure_that_nobody_was_asked_is_left_out() -> None:
    asked = {**point("one group", 16, 20), "poets": both(0, 0)}
    drawn = panels({**STRATEGIES, "points": [asked]})
    assert lines(drawn["Base poets kept"]) == {}
    assert list(lines(drawn["Base relations kept"])) == ["one group"]


def test_one_mark_alone_is_not_zoomed_into() -> None:
    axes = panels({**STRATEGIES, "points": [point("one group", 8, 20)]})["Base poets kept"]
    left, right = axes.get_xlim()
    assert left < 7 and right > 9


def test_a_run_with_nothing_measured_yet_is_drawn() -> None:
    assert len(panels({**STRATEGIES, "points": []})) == 5


def test_retain_shows_both_methods_and_counts_all_facts() -> None:
    drawn = panels(RETAIN)
    assert "New facts recalled, of all" in drawn and "Base poets kept" in drawn
    assert list(lines(drawn["Base poets kept"])) == ["kvedit", "baseline"]


def test_capacity_has_a_line_under_each_protocol_and_bits() -> None:
    drawn = panels(CAPACITY)
    held = lines(drawn["New facts held, of all given"])
    assert held["small, 1.0M"][1] == [100.0, 100.0]
    assert held["small, 1.0M, teacher-forced"][1] == pytest.approx([100 * 15 / 16, 100 * 31 / 32])
    bits = drawn["Bits stored a touched parameter"]
    assert [bar.get_height() for bar in bits.patches] == [0.004, 0.001]
    assert [text.get_text() for text in bits.texts] == ["0.004", "0.001"]
    most = drawn["Most facts with 95% held"]
    assert [text.get_text() for text in most.texts] == ["32", "32 or more"]


def test_speed_shows_every_fact_its_median_and_the_shares() -> None:
    drawn = panels(SPEED)
    seconds = drawn["Seconds a fact (line: median; ingest: mean)"]
    assert [list(line.get_ydata()) for line in seconds.get_lines()] == [
        [2.0, 4.0, 5.0], [1.0], [8.0, 9.0],
    ]  # fmt: skip
    assert [text.get_text() for text in seconds.texts] == ["4.0 s", "1.0 s", "8.5 s"]
    ratios = drawn["Baseline's seconds / kvedit's"]
    assert [text.get_text() for text in ratios.texts] == ["3.00", "8.50"]
    intervals = [sorted(p[1] for p in c.get_segments()[0]) for c in ratios.collections]
    assert [2.0, 4.0] in intervals and [8.0, 9.0] in intervals
    bars = {
        bar.get_label(): [p.get_width() for p in bar]
        for bar in drawn["Where the time goes"].containers
    }
    assert bars["train"] == pytest.approx([75.0, 0.0, 100 * 2 / 3, 0.0])
    assert [sum(widths) for widths in zip(*bars.values(), strict=True)] == pytest.approx([100] * 4)


def test_an_older_result_with_less_in_it_is_drawn() -> None:
    older = {name: value for name, value in SPEED.items() if "ratio" not in name}
    del older["group_task"]
    assert panels({**older, "ratios": [], "baseline": []})


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")]
)
def test_the_name_says_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    plots.draw(SPEED, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file is left"


def test_a_result_without_a_picture_is_refused() -> None:
    with pytest.raises(UsageError, match="kills has no picture"):
        plots.figure(heading("kills"))


def test_drawing_loads_no_torch_and_changes_nothing_global(tmp_path: Path) -> None:
    code = (
        "import sys, json, pathlib, matplotlib; before = dict(matplotlib.rcParams)\n"
        "from tests.bench import plots\n"
        "plots.draw(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "from matplotlib._pylab_helpers import Gcf\n"
        "print(before == dict(matplotlib.rcParams), Gcf.figs == {}, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, json.dumps(STRATEGIES), str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True False"


def test_a_kept_result_is_drawn_by_the_command(tmp_path: Path) -> None:
    kept, picture = tmp_path / "kept.json", tmp_path / "kept.svg"
    kept.write_text(json.dumps(CAPACITY), encoding="utf-8")
    done = CliRunner().invoke(bench, ["plot", str(kept), "-o", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_text(encoding="utf-8").count('id="axes_') == 3
    kept.write_text("no", encoding="utf-8")
    done = CliRunner().invoke(bench, ["plot", str(kept), "-o", str(picture)])
    assert done.exit_code == 2 and "cannot be read as JSON" in done.stderr


def test_a_picture_of_no_known_format_is_refused_before_anything_runs(tmp_path: Path) -> None:
    words = ["strategies", "--data", str(tmp_path), "--plot", "held.jpeg"]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 2 and "must end in .png" in done.stderr
