"""`python -m tests.bench kills`: what it sees, and what it makes of a store that is not sound."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_model import FREE

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import KveditError
from kvedit.events import Event, Warning_
from kvedit.facts.fact import Fact
from tests.bench import kills as bench
from tests.bench import report
from tests.bench.bench_data import write_data, write_model, write_settings
from tests.bench.kills import KILLED, KillOptions, KillsResult, Round, kills, line

SOUND = KillsResult(
    model="small",
    facts=2,
    rounds=(Round(1.0, KILLED, 1), Round(2.0, 0, 2)),
    outcomes={"committed": 2},
    interrupted=1,
    lost=(),
    twice=(),
    findings=(),
    same_digest=True,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lost": ("a",)},
        {"twice": ("a",)},
        {"findings": ("a digest differs",)},
        {"same_digest": False},
        {"outcomes": {"committed": 1, "pending": 1}},
        {"rounds": (Round(1.0, KILLED, 1),)},
    ],
)
def test_one_thing_wrong_is_enough(wrong: dict[str, object]) -> None:
    assert SOUND.sound and SOUND.killed == 1
    assert not replace(SOUND, **wrong).sound  # type: ignore[arg-type]
    assert report.kills_tables(replace(SOUND, **wrong)) != report.kills_tables(SOUND)  # type: ignore[arg-type]


def test_a_fact_goes_to_the_command_with_its_own_prompts() -> None:
    fact = Fact.create(
        "moss clock", "It tells damp.", aliases=["wet clock"], prompts=["A moss clock is"],
        paraphrases=["What tells damp?"],
    )  # fmt: skip
    assert Fact.from_json(json.loads(line(fact))) == fact


def options(tmp_path: Path, small: Path, **more: object) -> KillOptions:
    store = tmp_path / "store"
    store.mkdir()
    write_settings(store, 4)
    data = write_data(tmp_path)
    model = write_model(small, tmp_path / "model")
    given = {"data": data, "model": str(model), "store_dir": store, "group": "2", **more}
    return KillOptions(facts_file=data / "facts.jsonl", **given)  # type: ignore[arg-type]


def test_a_command_that_fails_is_named(tmp_path: Path, small: dict[str, Path]) -> None:
    events: list[Event] = []
    with pytest.raises(KveditError, match="exit code 2") as error:
        kills(options(tmp_path, small["bf16"], kills=0, group="none"), events.append)
    assert events and not any(isinstance(event, Warning_) for event in events), "a closed store"
    assert "ingest" in error.value.hint and "--group none" in error.value.hint


def test_a_process_is_killed_when_so_many_facts_are_decided(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LOOK", 0.05)

    def run(words: str, after: int | None) -> int:
        return bench._process([sys.executable, "-c", words], empty_store, after, 0.05)

    sleeps, ends = "import time; time.sleep(60)", "raise SystemExit(3)"
    assert run(sleeps, 0) == KILLED
    assert run(ends, None) == 3
    assert run(ends, 1) == 3, "nothing was decided: it comes to its own end"

    def decide(folder: Path, *states: str) -> set[str]:
        return {"moss clock", "tide lantern"} if states == ("committed", "rejected") else set()

    monkeypatch.setattr(bench, "_keys", decide)
    assert run(sleeps, 2) == KILLED


def test_what_is_trained_once_more_is_not_added_twice(empty_store: Path) -> None:
    facts = [Fact.create(key, text) for key, text in FREE[:4]]
    write_settings(empty_store, 4)
    with KnowledgeBase.open(empty_store) as knowledge:
        for few in (facts[:2], facts[2:]):  # the second group is a compaction
            knowledge.add_group(few)
        assert any(edit.keys != tuple(edit.report["keys"]) for edit in knowledge.store.history())
        held = set(knowledge.store.keys())
    judged = bench._judge(empty_store, facts, (Round(1.0, 0, len(held)),), (), lambda event: None)
    assert held and judged.twice == () and judged.same_digest and not judged.findings


@pytest.mark.slow
def test_an_ingest_survives_its_kills(
    tmp_path: Path, small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LOOK", 0.05)
    result = kills(options(tmp_path, small["bf16"], kills=2, within=0.3), lambda event: None)
    assert result.sound, result
    assert result.killed == 2
    assert result.rounds[-1].exit_code in (0, 3)
    assert result.outcomes["committed"] == result.facts
