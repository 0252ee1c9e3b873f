"""A slice of each part of `python -m tests.bench faults`; what is found can be repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvedit.bench.tables import plain
from kvedit.errors import KveditError
from tests.bench.faults import fuzz, steps
from tests.bench.faults.run import NAMES, FaultOptions, Part, faults, tables


@pytest.mark.parametrize("name", [*fuzz.TARGETS, *steps.CASES])
def test_a_slice_is_clean(name: str) -> None:
    limit = 12 if name == "command line" or name in steps.CASES else 300
    limit = 4 if "mappings" in name else limit  # each opens a model
    options = FaultOptions(parts=(name,), limit=limit, seconds=60, seed=1)
    result = faults(options, lambda event: None)
    assert result.sound, result.parts
    assert result.parts[0].tried == limit


def test_slices_add_up_and_go_on(tmp_path: Path) -> None:
    kept = tmp_path / "faults.json"
    options = FaultOptions(parts=("keys",), limit=5, seconds=60, kept=kept)
    for slices in (1, 2):
        result = faults(options, lambda event: None)
        kept.write_text(json.dumps(plain(result)), encoding="utf-8")
        assert (result.parts[0].tried, result.parts[0].next) == (5 * slices, 5 * slices)


def test_a_part_that_came_to_its_end_is_not_begun_again(tmp_path: Path) -> None:
    kept = tmp_path / "faults.json"
    whole = Part(name="keys", tried=5, next=5, seconds=1.0, complete=True)
    kept.write_text(json.dumps({"parts": [plain(whole)]}), encoding="utf-8")
    options = FaultOptions(parts=("keys",), limit=5, seconds=60, kept=kept)
    assert faults(options, lambda event: None).parts == (whole,)
    again = faults(replace(options, first=0), lambda event: None)  # one case is asked for by name
    assert again.parts[0].tried == 10


def test_a_failure_is_counted_and_has_a_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvedit.facts.keys.normalise", lambda key: key + "x")
    result = faults(FaultOptions(parts=("keys",), limit=3, seconds=60), lambda event: None)
    assert not result.sound and result.parts[0].failed == 3
    assert "--part 'keys' --seed 0 --first 2 --limit 1" in result.parts[0].failures[-1]["repeat"]
    assert len(tables(result)) == 2


def test_an_input_is_a_function_of_its_number(tmp_path: Path) -> None:
    target = fuzz.Keys(tmp_path)
    made = [target.make(fuzz.generator(0, "keys", 7)) for _ in range(2)]
    assert made[0] == made[1]


def test_an_input_that_never_ends_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(fuzz.Target):
        def execute(self, given: object) -> None:
            while True:
                pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert "more than" in str(fuzz.fault_of(Endless(tmp_path), None))


def test_every_kind_is_a_part() -> None:
    assert len(NAMES) == 11 and Part(name=NAMES[0]).tried == 0


def test_a_reader_that_takes_much_more_memory_than_its_file_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fuzz.Readers(tmp_path)
    made = (target.make(fuzz.generator(0, "readers", number)) for number in range(5_000))
    large = next(given for given in made if target.bytes_of(given))
    assert fuzz.fault_of(target, large) is None
    monkeypatch.setattr(fuzz, "MOST_TIMES", 0)
    monkeypatch.setattr(fuzz, "MOST_BESIDES", 10_000)
    assert "Large: took" in str(fuzz.fault_of(target, large))


def test_an_error_without_a_hint_is_a_failure(tmp_path: Path) -> None:
    class Mute(fuzz.Target):
        def execute(self, given: object) -> None:
            raise KveditError("no")

    assert "without a hint" in str(fuzz.fault_of(Mute(tmp_path), None))
