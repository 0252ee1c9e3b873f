"""Several processes: what counts as the same, and as clean; and the whole of it, for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_model import FREE, settings

from kvedit.errors import KveditError
from kvedit.events import Score
from tests.bench.bench_data import document, write_data, write_model
from tests.bench.kills import KILLED
from tests.bench.several import (
    ENDED,
    Death,
    Run,
    SeveralOptions,
    SeveralResult,
    StoreState,
    several,
    tables,
)

ALL = StoreState(("a", "b"), ("a", "b"), Score(2, 2, "generated"), ())
ONE = Run(1, 2.0, (0,), ALL)
DEATH = Death(1, 0.5, (ENDED, KILLED), replace(ALL, committed=("a",)), ONE)
RESULT = SeveralResult(
    facts=2, alone=ONE, together=Run(2, 2.0, (0, 0), ALL), deaths=(replace(DEATH), DEATH)
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"committed": ("a",)},
        {"recalled": ("a",)},
        {"generated": Score(1, 2, "generated")},
        {"findings": ("a digest differs",)},
    ],
)
def test_one_difference_is_enough(wrong: dict[str, Any]) -> None:
    assert RESULT.equal and RESULT.clean
    other = replace(RESULT, together=replace(RESULT.together, state=replace(ALL, **wrong)))
    assert not other.equal
    assert tables(other) != tables(RESULT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exit_codes": (0, KILLED)},  # the other one took no notice
        {"exit_codes": (ENDED, 0)},  # nobody was killed
        {"left": replace(ALL, findings=("a leftover",))},
        {"left": replace(ALL, committed=("a", "c"))},  # which the next run does not have
        {"after": replace(ONE, state=replace(ALL, committed=("a",)))},
        {"after": replace(ONE, state=replace(ALL, findings=("a leftover",)))},
    ],
)
def test_one_thing_left_behind_is_enough(wrong: dict[str, Any]) -> None:
    other = replace(RESULT, deaths=(DEATH, replace(DEATH, **wrong)))
    assert not other.clean and other.equal
    assert tables(other) != tables(RESULT)


def options(tmp_path: Path, small: Path, **more: Any) -> SeveralOptions:
    store = tmp_path / "store"
    store.mkdir()
    (store / "kvedit.toml").write_text(settings(), encoding="utf-8")
    data = write_data(tmp_path)
    return SeveralOptions(
        data=data, facts_file=data / "facts.jsonl", store_dir=store,
        model=str(write_model(small, tmp_path / "model")), **more,
    )  # fmt: skip


def test_a_command_that_fails_is_named(tmp_path: Path, small: dict[str, Path]) -> None:
    with pytest.raises(KveditError, match=r"exit codes \(2,\)") as error:
        several(options(tmp_path, small["bf16"], facts=1, group="none"), lambda event: None)
    assert "ingest" in error.value.hint and "--group none" in error.value.hint


@pytest.mark.slow
def test_two_do_what_one_does_and_a_death_leaves_nothing(
    tmp_path: Path, small: dict[str, Path]
) -> None:
    result = several(options(tmp_path, small["bf16"], facts=4, group="2"), lambda event: None)
    assert result.equal and result.clean, result
    assert result.alone.state.committed == tuple(sorted(key for key, _ in FREE[:4]))
    assert document("several", result, tables(result))["deaths"]
